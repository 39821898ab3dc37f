"""The family of ``ModelSpec`` that has the shapes which Megatron-LM's flags describe.

What no family has, and which changes neither shapes nor time to speak of (another norm or kind of position,
a bias), is read as the nearest and noted; what would change the price is refused by name.
"""

from __future__ import annotations

from typing import Any

from picotron.errors import PlanError
from picotron.planner.megatron_flags import Given
from picotron.planner.model import Experts, LatentAttention, RopeScaling


def read_family(
    flags: Given, sizes: dict[str, Any], latent: LatentAttention | None, experts: Experts | None
) -> dict[str, Any]:
    """The family, and the fields that it decides: norm, positions, biases."""
    norm = flags.choice("normalization", ("RMSNorm", "LayerNorm"), "LayerNorm")
    kind = _position_kind(flags)
    if not sizes["gated_mlp"]:
        if experts or latent or sizes["num_kv_heads"] != sizes["num_heads"]:
            raise PlanError(
                "an MLP without a gate must come with plain attention: no model of a plan has it beside "
                "experts, latent attention or grouped queries; give --swiglu to price the gated one"
            )
        return _gpt2(flags, sizes, norm, kind)
    if norm != "RMSNorm":
        flags.note("--normalization LayerNorm: read as RMSNorm, which costs about as much")
    if kind != "rotary":
        flags.note("positions other than rotary are read as rotary")
    return {
        "norm": "rms",
        "rope_theta": flags.number("rotary-base", default=1e4) or 1e4,
        "rope_scaling": _scaling(flags, latent),
        **(_dense(flags) if experts is None and latent is None else _sparse(flags, latent, experts)),
    }


def _position_kind(flags: Given) -> str:
    kinds = ("learned_absolute", "rope", "yarn", "mrope", "relative", "none")
    rotary = flags.has("use-rotary-position-embeddings")
    kind = flags.choice("position-embedding-type", kinds, "rope" if rotary else "learned_absolute")
    flags.has("no-position-embedding")
    if flags.number("rotary-percent", default=1.0) != 1.0:
        flags.note("--rotary-percent: all of a head is read as rotated, which costs about as much")
    return "rotary" if kind in ("rope", "yarn", "mrope") else kind


def _gpt2(flags: Given, sizes: dict[str, Any], norm: str, kind: str) -> dict[str, Any]:
    """The one family without a gate: LayerNorm, learned positions and biases everywhere."""
    if sizes["num_heads"] * sizes["head_dim"] != sizes["hidden_size"]:
        raise PlanError(
            f"--kv-channels must be --hidden-size / --num-attention-heads in a model without a gate, "
            f"got {sizes['head_dim']}"
        )
    if norm != "LayerNorm":
        flags.note(
            "--normalization RMSNorm without a gated MLP: read as LayerNorm, which costs about as much"
        )
    if kind != "learned_absolute":
        flags.note("positions other than learned are read as learned, where the MLP has no gate")
    if flags.has("disable-bias-linear"):
        flags.note("--disable-bias-linear: biases are counted where the MLP has no gate, which costs little")
    for flag in ("rotary-base", "rotary-seq-len-interpolation-factor", "add-qkv-bias"):
        flags.has(flag)
    if flags.has("qk-layernorm"):
        flags.note("--qk-layernorm: norms of queries and keys are not counted where the MLP has no gate")
    biases = dict.fromkeys(("qkv_bias", "output_bias", "mlp_bias"), True)
    return {"family": "gpt2", "norm": "layer", "rope_theta": None, **biases}


def _dense(flags: Given) -> dict[str, Any]:
    """llama, qwen2 or qwen3, by norms of queries and keys and by biases."""
    whole, queries = not flags.has("disable-bias-linear"), flags.has("add-qkv-bias")
    if flags.has("qk-layernorm"):
        if whole:
            flags.note("biases of the MLP are not counted beside norms of queries and keys")
        elif queries:
            flags.note("--add-qkv-bias beside --qk-layernorm: the output projection is read with a bias too")
        return {
            "family": "qwen3",
            "qk_norm": True,
            **dict.fromkeys(("qkv_bias", "output_bias"), whole or queries),
        }
    if queries and not whole:
        return {"family": "qwen2", "qkv_bias": True}
    return {"family": "llama", **dict.fromkeys(("qkv_bias", "output_bias", "mlp_bias"), whole)}


def _check_no_biases(flags: Given) -> None:
    if not flags.has("disable-bias-linear") or flags.has("add-qkv-bias"):
        flags.note("biases beside experts are not counted (--disable-bias-linear says that there are none)")


def _sparse(flags: Given, latent: LatentAttention | None, experts: Experts | None) -> dict[str, Any]:
    """deepseek_v3, qwen3_moe or mixtral; which differ in attention, shared experts and routing."""
    if experts is None:
        raise PlanError(
            "--multi-latent-attention must come with --num-experts: no model of a plan has it alone"
        )
    _check_no_biases(flags)
    if latent:
        return _deepseek(flags, latent, experts)
    for flag, value, plain in (
        ("moe-shared-expert-intermediate-size", experts.shared_intermediate_size, 0),
        ("moe-router-num-groups", experts.num_groups, 1),
        ("moe-router-topk-scaling-factor", experts.routed_scale, 1.0),
        ("moe-router-score-function", experts.score_function, "softmax"),
    ):
        if value != plain:
            raise PlanError(
                f"--{flag} must be {plain} without --multi-latent-attention, got {value}: "
                "no model of a plan has it otherwise"
            )
    norms = flags.has("qk-layernorm")
    if norms or experts.dense_layers or not experts.normalize_scores:
        if not norms:
            flags.note("experts of this kind are read with norms of queries and keys, which cost little")
        return {"family": "qwen3_moe", "qk_norm": True, "experts": experts}
    return {"family": "mixtral", "experts": experts}


def _deepseek(flags: Given, latent: LatentAttention, experts: Experts) -> dict[str, Any]:
    if experts.score_function != "sigmoid":
        raise PlanError(
            "--moe-router-score-function must be sigmoid beside --multi-latent-attention: "
            "no model of a plan has another"
        )
    flags.has("moe-router-enable-expert-bias", "moe-router-pre-softmax", "moe-router-bias-update-rate")
    return {"family": "deepseek_v3", "latent_attention": latent, "experts": experts}


def _scaling(flags: Given, latent: LatentAttention | None) -> RopeScaling | None:
    """Rotary scaling; what a plan's price does not see, and a round trip does."""
    kind = flags.choice("rope-type", ("rope", "yarn"), "yarn" if latent else "rope")
    factor = flags.number("rotary-scaling-factor", default=1.0)
    if flags.text("position-embedding-type") == "yarn" or (latent and kind == "yarn" and factor != 1):
        return _yarn(flags, factor)
    if flags.has("use-rope-scaling"):
        return RopeScaling(
            kind="llama3",
            factor=flags.number("rope-scaling-factor", default=8.0) or 8.0,
            original_max_positions=8192,
        )
    if flags.has("rotary-seq-len-interpolation-factor"):
        stretch = flags.integer("rotary-seq-len-interpolation-factor")
        return RopeScaling(kind="linear", factor=float(stretch))
    return None


def _yarn(flags: Given, factor: float) -> RopeScaling:
    scales = (flags.number("mscale", default=1.0), flags.number("mscale-all-dim", default=0.0))
    return RopeScaling(
        kind="yarn",
        factor=factor or 1.0,
        original_max_positions=flags.integer("yarn-original-max-position-embeddings", default=4096),
        beta_fast=flags.number("yarn-beta-fast", default=32.0) or 32.0,
        beta_slow=flags.number("yarn-beta-slow", default=1.0) or 1.0,
        truncate=not flags.has("no-yarn-correction-range-round-to-int"),
        mscale=scales[0] if all(scales) else None,
        mscale_all_dim=scales[1] if all(scales) else None,
    )
