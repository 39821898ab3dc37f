"""A model's shapes as Megatron-LM's arguments; ``megatron_read_model`` reads them back."""

from __future__ import annotations

from collections.abc import Iterator

from picotron.planner.exported import Unexpressed
from picotron.planner.megatron_write_layout import Part
from picotron.planner.model import Experts, ModelSpec

LLAMA3_SCALING = (1.0, 4.0, 8192)  # low and high frequency factor and trained positions: fixed in its code


def model_of(model: ModelSpec, seq_len: int, tp: int) -> Iterator[Part]:
    """Layers, widths, positions, norms, biases, vocabulary and experts."""
    yield "--num-layers", str(model.num_layers)
    yield "--hidden-size", str(model.hidden_size)
    yield "--ffn-hidden-size", str(model.intermediate_size)
    yield "--num-attention-heads", str(model.num_heads)
    yield from _attention(model)
    yield from _positions(model, seq_len)
    yield "--normalization", "RMSNorm" if model.norm == "rms" else "LayerNorm"
    yield "--norm-epsilon", repr(model.norm_eps)
    yield from _activation(model)
    yield from _biases(model)
    yield "--init-method-std", repr(model.init_std)
    yield "--attention-dropout", "0.0"
    yield "--hidden-dropout", "0.0"
    if not model.tied_embeddings:
        yield ("--untie-embeddings-and-output-weights",)
    yield "--vocab-size", str(model.vocab_size)
    yield "--make-vocab-size-divisible-by", "1"
    if model.vocab_size % tp:
        yield Unexpressed(
            f"a vocabulary of {model.vocab_size} cut unevenly over tp={tp}: "
            f"it is padded to {-(-model.vocab_size // tp) * tp}"
        )
    if model.experts:
        yield from _experts(model, model.experts)


def _attention(model: ModelSpec) -> Iterator[Part]:
    latent = model.latent_attention
    if latent is None:
        yield "--kv-channels", str(model.head_dim)
        if model.num_kv_heads != model.num_heads:
            yield ("--group-query-attention",)
            yield "--num-query-groups", str(model.num_kv_heads)
        if model.qk_norm:
            yield ("--qk-layernorm",)
        return
    yield ("--multi-latent-attention",)
    if latent.q_lora_rank is not None:
        yield "--q-lora-rank", str(latent.q_lora_rank)
    yield "--kv-lora-rank", str(latent.kv_lora_rank)
    yield "--qk-head-dim", str(latent.qk_nope_head_dim)
    yield "--qk-pos-emb-head-dim", str(latent.qk_rope_head_dim)
    yield "--v-head-dim", str(latent.v_head_dim)
    yield ("--qk-layernorm",)
    if not latent.interleaved:
        yield Unexpressed("rotary pairs half a head apart under latent attention: it takes adjacent ones")


def _positions(model: ModelSpec, seq_len: int) -> Iterator[Part]:
    yield "--max-position-embeddings", str(max(model.max_positions, seq_len))
    if seq_len > model.max_positions:
        yield Unexpressed(
            f"sequences longer than the model's {model.max_positions} positions: it asks for as many"
        )
    if model.rope_theta is None:
        yield "--position-embedding-type", "learned_absolute"
        return
    scaling = model.rope_scaling
    latent = model.latent_attention is not None
    yarn = scaling is not None and scaling.kind == "yarn"
    yield "--position-embedding-type", "yarn" if yarn and not latent else "rope"
    yield "--rotary-base", str(int(model.rope_theta))
    if model.rope_theta != int(model.rope_theta):
        yield Unexpressed(f"a rotary base of {model.rope_theta:g}: it takes whole numbers")
    if latent:
        yield "--rope-type", "yarn" if yarn else "rope"
    if latent and not yarn:
        yield ("--no-rope-fusion",)  # its fused kernel for latent attention takes YaRN alone
    if scaling is not None:
        yield from {"linear": _linear, "llama3": _llama3, "yarn": _yarn}[scaling.kind](model)


def _linear(model: ModelSpec) -> Iterator[Part]:
    assert model.rope_scaling
    factor = model.rope_scaling.factor
    yield "--rotary-seq-len-interpolation-factor", str(max(1, round(factor)))
    if factor != round(factor):
        yield Unexpressed(f"positions divided by {factor:g}: it takes whole numbers")


def _llama3(model: ModelSpec) -> Iterator[Part]:
    scaling = model.rope_scaling
    assert scaling
    yield ("--use-rope-scaling",)
    yield "--rope-scaling-factor", repr(scaling.factor)
    own = (scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_positions)
    if own != LLAMA3_SCALING:
        yield Unexpressed(
            "rotary scaling with frequency factors {:g} and {:g} from {} positions: its code has {:g}, {:g} "
            "and {}".format(*own, *LLAMA3_SCALING)
        )


def _yarn(model: ModelSpec) -> Iterator[Part]:
    scaling = model.rope_scaling
    assert scaling
    yield "--rotary-scaling-factor", repr(scaling.factor)
    # Unless both are given, transformers takes neither: the factor that 1 and 0 lead to.
    both = scaling.mscale and scaling.mscale_all_dim
    yield "--mscale", repr(scaling.mscale if both else 1.0)
    yield "--mscale-all-dim", repr(scaling.mscale_all_dim if both else 0.0)
    told = (scaling.original_max_positions, scaling.beta_fast, scaling.beta_slow, scaling.truncate)
    if model.latent_attention is None:
        yield "--yarn-original-max-position-embeddings", str(told[0])
        yield "--yarn-beta-fast", repr(told[1])
        yield "--yarn-beta-slow", repr(told[2])
        yield (f"--{'' if told[3] else 'no-'}yarn-correction-range-round-to-int",)
    elif told != (4096, 32.0, 1.0, True):
        yield Unexpressed(
            f"YaRN from {told[0]} positions with beta {told[1]:g} and {told[2]:g}: under latent attention "
            "its arguments have 4096, 32 and 1"
        )
    if scaling.attention_factor is not None:
        yield Unexpressed(
            f"YaRN's attention factor of {scaling.attention_factor:g}: it derives it from mscale"
        )


def _activation(model: ModelSpec) -> Iterator[Part]:
    if model.gated_mlp:
        yield ("--swiglu",) if model.activation == "silu" else ("--quick-geglu",)
        if model.activation != "silu":
            yield Unexpressed("a gate through tanh GELU: --quick-geglu approximates it by a sigmoid")
    elif model.activation == "silu":
        yield Unexpressed("SiLU without a gate: it runs GELU")


def _biases(model: ModelSpec) -> Iterator[Part]:
    told = (model.qkv_bias, model.output_bias, model.mlp_bias)
    if told == (True, True, True):
        return
    yield ("--disable-bias-linear",)
    if model.qkv_bias:
        yield ("--add-qkv-bias",)
    if told not in ((False, False, False), (True, False, False)):
        lost = [name for name, there in zip(("output", "MLP"), told[1:], strict=True) if there]
        yield Unexpressed(
            f"biases of the {' and '.join(lost)} projections only: it has all, of queries or none"
        )


def _experts(model: ModelSpec, experts: Experts) -> Iterator[Part]:
    yield "--num-experts", str(experts.num_experts)
    yield "--moe-router-topk", str(experts.top_k)
    yield "--moe-ffn-hidden-size", str(experts.intermediate_size)
    yield ("--moe-grouped-gemm",)
    yield "--moe-token-dispatcher-type", "alltoall"
    if experts.shared_intermediate_size:
        yield "--moe-shared-expert-intermediate-size", str(experts.shared_intermediate_size)
    if experts.dense_layers:
        yield "--moe-layer-freq", _pattern(model.num_layers, experts.dense_layers)
    yield "--moe-router-score-function", experts.score_function
    if experts.score_function == "softmax" and not experts.normalize_scores:
        yield ("--moe-router-pre-softmax",)
    if experts.score_function == "sigmoid":
        yield ("--moe-router-enable-expert-bias",)
        if not experts.normalize_scores:
            yield Unexpressed("sigmoid scores as they are: it divides them by their sum")
    if experts.num_groups > 1:
        yield "--moe-router-num-groups", str(experts.num_groups)
        yield "--moe-router-group-topk", str(experts.top_k_groups)
    if experts.routed_scale != 1:
        yield "--moe-router-topk-scaling-factor", repr(experts.routed_scale)


def _pattern(num_layers: int, dense: tuple[int, ...]) -> str:
    """Which layers have experts, as a Python list: ``([0]*3+[1]*58)``."""
    kinds = [int(layer not in dense) for layer in range(num_layers)]
    runs: list[list[int]] = []
    for kind in kinds:
        if runs and runs[-1][0] == kind:
            runs[-1][1] += 1
        else:
            runs.append([kind, 1])
    return "(" + "+".join(f"[{kind}]*{count}" for kind, count in runs) + ")"
