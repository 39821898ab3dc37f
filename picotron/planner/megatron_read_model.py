"""The model that Megatron-LM's flags describe, as the family of ``ModelSpec`` that has its shapes.

What no family has, and which changes neither shapes nor time to speak of (another norm, activation or kind
of position), is read as the nearest and noted. What would change the price (layers that attend to a window,
state spaces, experts without a family) is refused by name.
"""

from __future__ import annotations

from typing import Any

from picotron.errors import PlanError
from picotron.planner.expressions import expression
from picotron.planner.megatron_flags import Given
from picotron.planner.megatron_read_family import read_family
from picotron.planner.model import MOST_PARTS, Experts, LatentAttention, ModelSpec

REFUSED = {  # flag: what it asks for
    "hybrid-layer-pattern": "layers of several kinds",
    "hybrid-override-pattern": "layers of several kinds",
    "window-size": "attention to a window",
    "experimental-attention-variant": "another kind of attention",
    "linear-attention-freq": "linear attention",
    "heterogeneous-layers-config-path": "layers that differ",
    "heterogeneous-layers-config-encoded-json": "layers that differ",
    "moe-latent-size": "experts in a latent space",
    "attention-output-gate": "gated attention",
    "enable-mhc-connections": "several residual streams",
    "moe-shared-expert-gate": "a gated shared expert",
}
NOTED = {  # flag: how it is read
    "mtp-num-layers": "multi-token prediction is left out of the plan",
    "apply-layernorm-1p": "norms are read without the offset of 1, which costs nothing",
    "fp32-residual-connection": "the residual stream is counted in the precision of the rest",
    "apply-query-key-layer-scaling": "scores are read without scaling by layer, which costs nothing",
    "qk-l2-norm": "L2 norms of queries and keys are not counted",
    "no-rope-freq": "every layer is read with rotary positions",
    "moe-expert-capacity-factor": "experts are counted without dropping or padding tokens",
    "moe-router-padding-for-fp8": "padding of experts' tokens is not counted",
    "moe-router-padding-for-quantization": "padding of experts' tokens is not counted",
    "decoupled-lr": "one learning rate is read for all weights",
    "use-mup": "muP's scales are left out of the plan",
}
VOCABULARIES = {"GPT2BPETokenizer": 50_257, "Llama2Tokenizer": 32_000}  # of tokenizers that always have them


def read_model(flags: Given, *, tp: int, seq_len: int, vocab_size: int | None, name: str) -> ModelSpec:
    """The model. Raises PlanError, naming the flag, for one that no ``ModelSpec`` can say."""
    _refuse_and_note(flags)
    hidden = flags.integer("hidden-size")
    layers = flags.integer("num-layers", "encoder-num-layers")
    if layers > MOST_PARTS:
        raise PlanError(f"--num-layers must be at most {MOST_PARTS:,}, got {layers:,}")
    heads = flags.integer("num-attention-heads")
    gated = _activation(flags)
    positions = _positions(flags, seq_len)
    inner = flags.integer("ffn-hidden-size", default=int(8 * hidden / 3 / 64) * 64 if gated else 4 * hidden)
    latent = _latent(flags)
    experts = _experts(flags, layers, inner)
    sizes: dict[str, Any] = {
        "name": name,
        "vocab_size": _vocabulary(flags, tp, vocab_size),
        "hidden_size": hidden,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": heads if latent else _groups(flags, heads),
        "head_dim": _head_dim(flags, hidden, heads, latent),
        "intermediate_size": inner,
        "max_positions": positions,
        "norm_eps": flags.number("norm-epsilon", "layernorm-epsilon", default=1e-5),
        "init_std": flags.number("init-method-std", default=0.02) or 0.02,
        "tied_embeddings": not flags.has("untie-embeddings-and-output-weights"),
        "gated_mlp": gated,
        "activation": _activation_name(flags),
    }
    return ModelSpec(**sizes, **read_family(flags, sizes, latent, experts))


def _refuse_and_note(flags: Given) -> None:
    """Raise PlanError for what would change the price; note what is read otherwise."""

    def asked(flag: str) -> bool:
        return flags.has(flag) and flags.words(flag) not in (("0",), ("None",))

    for flag, what in REFUSED.items():
        if asked(flag):
            raise PlanError(
                f"--{flag} asks for {what}, which no model of a plan has; leave it out to price the rest"
            )
    for flag, how in NOTED.items():
        if asked(flag):
            flags.note(f"--{flag}: {how}")


def _positions(flags: Given, seq_len: int) -> int:
    """Positions that the model is built for: at least those that are trained."""
    positions = flags.integer("max-position-embeddings")
    if positions < seq_len:
        raise PlanError(
            f"--max-position-embeddings must be at least --seq-length, got {positions} and {seq_len}"
        )
    return positions


def _activation(flags: Given) -> bool:
    """Whether the MLP has a gate."""
    flags.at_most_one("swiglu", "quick-geglu", "squared-relu")
    if flags.has("squared-relu"):
        flags.note("--squared-relu: read as GELU, which costs as much")
    flags.has("openai-gelu")
    return flags.has("swiglu") or flags.has("quick-geglu")


def _activation_name(flags: Given) -> str:
    if flags.has("quick-geglu"):
        flags.note("--quick-geglu: the gate is read as tanh GELU")
    return "silu" if flags.has("swiglu") else "gelu_tanh"


def _groups(flags: Given, heads: int) -> int:
    """Key/value heads: of ``--num-query-groups`` only under ``--group-query-attention``."""
    groups = flags.integer("num-query-groups", default=1)
    if flags.has("group-query-attention"):
        return groups
    if flags.has("num-query-groups") and groups != heads:
        flags.note("--num-query-groups has no effect without --group-query-attention")
    return heads


def _head_dim(flags: Given, hidden: int, heads: int, latent: LatentAttention | None) -> int:
    width = flags.text("kv-channels")
    if latent:
        return latent.qk_nope_head_dim + latent.qk_rope_head_dim
    if not width and hidden % heads:
        raise PlanError(
            f"--hidden-size must be a multiple of --num-attention-heads, got {hidden} and {heads}; "
            "or give --kv-channels"
        )
    return flags.integer("kv-channels", default=hidden // heads)


def _vocabulary(flags: Given, tp: int, vocab_size: int | None) -> int:
    """Rows of the table, padding counted."""
    padded = flags.integer("padded-vocab-size", default=0)
    multiple = flags.integer("make-vocab-size-divisible-by", default=128) * tp
    kind = flags.text("tokenizer-type")
    if not kind and flags.has("merge-file"):
        kind = "GPT2BPETokenizer"
    size = flags.integer("vocab-size", default=vocab_size or VOCABULARIES.get(kind, 0))
    if padded:
        return padded
    if not size:
        raise PlanError(
            "the vocabulary's size must be known, and is in a tokenizer's file; give it (--vocab-size N)"
        )
    if flags.has("no-pad-vocab-size", "disable-pad-vocab-size"):
        return size
    rows = -(-size // multiple) * multiple
    if rows != size:
        flags.note(f"the vocabulary of {size} is padded to {rows}, a multiple of {multiple}")
    return rows


def _latent(flags: Given) -> LatentAttention | None:
    if not flags.has("multi-latent-attention"):
        return None
    flags.at_most_one("multi-latent-attention", "group-query-attention")
    if not flags.has("qk-layernorm"):
        flags.note("latent attention is read with its two latent norms (--qk-layernorm), which cost little")
    return LatentAttention(
        q_lora_rank=flags.integer("q-lora-rank") if flags.has("q-lora-rank") else None,
        kv_lora_rank=flags.integer("kv-lora-rank", default=32),
        qk_nope_head_dim=flags.integer("qk-head-dim", default=128),
        qk_rope_head_dim=flags.integer("qk-pos-emb-head-dim", default=64),
        v_head_dim=flags.integer("v-head-dim", default=128),
    )


def _experts(flags: Given, layers: int, inner: int) -> Experts | None:
    if not flags.integer("num-experts", default=0, least=0):
        return None
    score = flags.choice("moe-router-score-function", ("softmax", "sigmoid", "sqrtsoftplus"), "softmax")
    if score == "sqrtsoftplus":
        flags.note("--moe-router-score-function sqrtsoftplus: scores are read as sigmoid's")
    return Experts(
        num_experts=flags.integer("num-experts"),
        top_k=flags.integer("moe-router-topk", default=2),
        intermediate_size=flags.integer("moe-ffn-hidden-size", default=inner),
        shared_intermediate_size=flags.integer("moe-shared-expert-intermediate-size", default=0, least=0),
        dense_layers=_dense_layers(flags, layers),
        score_function="softmax" if score == "softmax" else "sigmoid",
        normalize_scores=score != "softmax" or not flags.has("moe-router-pre-softmax"),
        routed_scale=flags.number("moe-router-topk-scaling-factor", default=1.0) or 1.0,
        num_groups=flags.integer("moe-router-num-groups", default=1),
        top_k_groups=flags.integer("moe-router-group-topk", default=1),
    )


def _dense_layers(flags: Given, layers: int) -> tuple[int, ...]:
    """Layers without experts: a pattern of 0 and 1, or all but each N-th."""
    text = flags.text("moe-layer-freq", default="1")
    pattern = expression(text)
    if isinstance(pattern, int):
        if pattern < 1:
            raise PlanError(f"--moe-layer-freq must be at least 1, got {text!r}")
        pattern = [int(layer % pattern == 0) for layer in range(layers)]
    if len(pattern) != layers or any(kind not in (0, 1) for kind in pattern):
        raise PlanError(f"--moe-layer-freq must give each of {layers} layers a 0 or a 1, got {text!r}")
    return tuple(layer for layer, sparse in enumerate(pattern) if not sparse)
