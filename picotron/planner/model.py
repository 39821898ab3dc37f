"""What a decoder is made of: its sizes, and its segments with every named parameter.

A ``ModelSpec`` is read from a Hugging Face ``config.json`` (``picotron/planner/families.py``). Its segments,
in the order of forward, are the units at which backward can pause: the embedding, then attention and MLP
(or experts) of each layer, then the head. Parameters bear the names of the Hugging Face checkpoint, and
routed experts are one 2-D matrix each, as the checkpoint stores them. A tied table is listed and counted
once, with the embedding. What is no trained parameter is not listed: DeepSeek-V3's
``e_score_correction_bias`` and its multi-token-prediction layers (which transformers does not build).
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

from attrs import Attribute, field, frozen
from attrs.converters import optional as or_none
from attrs.validators import optional

from picotron.errors import PlanError

Family = Literal["llama", "qwen2", "qwen3", "qwen3_moe", "mixtral", "deepseek_v3", "gpt2"]
Role = Literal[
    "embedding",  # [vocab, hidden]
    "position",  # [positions, hidden]
    "head",  # [vocab, hidden]
    "norm",  # [hidden], weight or bias
    "head_norm",  # [head_dim]
    "column",  # [out, in]
    "column_bias",  # [out]
    "kv_column",  # [out, in] of k_proj and v_proj
    "kv_column_bias",  # [out]
    "row",  # [out, in]
    "row_bias",  # [out]
    "fused_qkv",  # [in, 3 * out]
    "fused_qkv_bias",  # [3 * out]
    "conv_column",  # [in, out]
    "conv_row",  # [in, out]
    "router",  # [experts, hidden]
    "expert_column",  # [out, in] of one expert
    "expert_row",  # [out, in] of one expert
    "latent",  # [rank, hidden]
    "latent_norm",  # [rank]
]
Init = Literal["normal", "ones", "zeros"]
SegmentKind = Literal["embedding", "attention", "mlp", "moe", "head"]
Norm = Literal["rms", "layer"]
Activation = Literal["silu", "gelu_tanh"]
ScoreFunction = Literal["softmax", "sigmoid"]
RopeKind = Literal["linear", "llama3", "yarn"]

FAMILIES: tuple[Family, ...] = get_args(Family)
ROLES: tuple[Role, ...] = get_args(Role)

_Validator = Callable[[Any, "Attribute[Any]", Any], None]


def _must_be(words: str, holds: Callable[[Any], bool]) -> _Validator:
    """A validator that raises PlanError unless ``holds(value)``."""

    def validate(instance: object, attribute: Attribute[Any], value: Any) -> None:
        if not holds(value):
            raise PlanError(f"{attribute.name} must be {words}, got {value!r}")

    return validate


def _one_of(alias: Any) -> _Validator:
    choices = get_args(alias)
    return _must_be(f"one of {choices}", lambda value: isinstance(value, str) and value in choices)


def _none_or(kind: type) -> _Validator:
    return _must_be(f"None or of {kind.__name__}", lambda value: value is None or isinstance(value, kind))


def is_size(value: object, least: int = 1) -> bool:
    """Whether ``value`` is an integer of at least ``least`` (True is not one)."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_positive(value: object) -> bool:
    """Whether ``value`` is a positive finite number (True is not one)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def _is_count(value: object) -> bool:
    return is_size(value, least=0)


def _is_shape(value: object) -> bool:
    return isinstance(value, tuple) and len(value) > 0 and all(is_size(length) for length in value)


def _are_layers(value: object) -> bool:
    return isinstance(value, tuple) and all(map(_is_count, value)) and list(value) == sorted(set(value))


def _as_float(value: float) -> float:
    """An integer as a float, so that equal specs are saved as equal bytes; anything else as it is."""
    return float(value) if is_positive(value) else value


_SIZE = _must_be("a positive integer", is_size)
_COUNT = _must_be("an integer of at least 0", _is_count)
_POSITIVE = _must_be("a positive finite number", is_positive)
_FLAG = _must_be("True or False", lambda value: isinstance(value, bool))
_NAME = _must_be("a name that is not empty", lambda value: isinstance(value, str) and value != "")


@frozen(kw_only=True)
class Parameter:
    """One trained tensor, as the Hugging Face checkpoint names it.

    ``init`` "normal" draws with mean 0 and the model's ``init_std``.
    """

    name: str = field(validator=_NAME)
    shape: tuple[int, ...] = field(validator=_must_be("a tuple of positive integers", _is_shape))
    role: Role = field(validator=_one_of(Role))
    init: Init = field(default="normal", validator=_one_of(Init))

    @property
    def num_elements(self) -> int:
        """How many numbers the tensor holds."""
        return math.prod(self.shape)


@frozen(kw_only=True)
class Segment:
    """The unit at which backward can pause; ``layer`` is None for the embedding and the head."""

    kind: SegmentKind = field(validator=_one_of(SegmentKind))
    layer: int | None = field(validator=optional(_COUNT))
    parameters: tuple[Parameter, ...] = ()

    @property
    def num_parameters(self) -> int:
        """How many numbers the segment's own parameters hold."""
        return sum(parameter.num_elements for parameter in self.parameters)


@frozen(kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the positions of pretraining.

    "linear" divides every frequency by ``factor``; "llama3" reads the two frequency factors; "yarn" (Peng et
    al. 2023, arXiv:2309.00071) reads the rest, where None means derived from ``factor``.
    """

    kind: RopeKind = field(validator=_one_of(RopeKind))
    factor: float = field(converter=_as_float, validator=_POSITIVE)
    low_freq_factor: float = field(default=1.0, converter=_as_float, validator=_POSITIVE)
    high_freq_factor: float = field(default=4.0, converter=_as_float, validator=_POSITIVE)
    beta_fast: float = field(default=32.0, converter=_as_float, validator=_POSITIVE)
    beta_slow: float = field(default=1.0, converter=_as_float, validator=_POSITIVE)
    attention_factor: float | None = field(
        default=None, converter=or_none(_as_float), validator=optional(_POSITIVE)
    )
    mscale: float | None = field(default=None, converter=or_none(_as_float), validator=optional(_POSITIVE))
    mscale_all_dim: float | None = field(
        default=None, converter=or_none(_as_float), validator=optional(_POSITIVE)
    )
    truncate: bool = field(default=True, validator=_FLAG)
    original_max_positions: int = field(default=0, validator=_COUNT)

    @original_max_positions.validator
    def _check_range(self, _: Attribute[int], value: int) -> None:
        if self.kind != "linear" and value == 0:
            raise PlanError(f"original_max_positions must be positive for {self.kind!r} scaling, got 0")
        if self.low_freq_factor >= self.high_freq_factor:
            raise PlanError(
                f"low_freq_factor must be below high_freq_factor, got {self.low_freq_factor:g} and "
                f"{self.high_freq_factor:g}"
            )


@frozen(kw_only=True)
class Experts:
    """Routed experts of the layers that have them, and the shared expert beside them.

    ``dense_layers`` have a plain MLP instead. A token's ``top_k`` experts are chosen from the
    ``top_k_groups`` best of ``num_groups`` equal groups; their scores are divided by their sum where
    ``normalize_scores``, then multiplied by ``routed_scale``.
    """

    num_experts: int = field(validator=_SIZE)
    top_k: int = field(validator=_SIZE)
    intermediate_size: int = field(validator=_SIZE)
    shared_intermediate_size: int = field(default=0, validator=_COUNT)
    dense_layers: tuple[int, ...] = field(
        default=(), validator=_must_be("a tuple of ascending layer indices", _are_layers)
    )
    score_function: ScoreFunction = field(default="softmax", validator=_one_of(ScoreFunction))
    normalize_scores: bool = field(default=True, validator=_FLAG)
    routed_scale: float = field(default=1.0, converter=_as_float, validator=_POSITIVE)
    num_groups: int = field(default=1, validator=_SIZE)
    top_k_groups: int = field(default=1, validator=_SIZE)

    @top_k_groups.validator
    def _check_choice(self, _: Attribute[int], value: int) -> None:
        if self.num_experts % self.num_groups:
            raise PlanError(
                f"num_experts must be a multiple of num_groups, got {self.num_experts} and {self.num_groups}"
            )
        if value > self.num_groups:
            raise PlanError(f"top_k_groups must be at most num_groups = {self.num_groups}, got {value}")
        choices = value * (self.num_experts // self.num_groups)
        if self.top_k > choices:
            raise PlanError(f"top_k must be at most the {choices} experts to choose from, got {self.top_k}")


@frozen(kw_only=True)
class LatentAttention:
    """Multi-head latent attention: keys and values are expanded from a low-rank latent.

    ``q_lora_rank`` None means a full query projection. ``interleaved`` says that rotary pairs are adjacent
    dimensions, as the checkpoints store them. The two latent norms keep an epsilon of 1e-6 whatever
    ``norm_eps`` is. Source: DeepSeek-AI 2024, arXiv:2405.04434, section 2.1.
    """

    q_lora_rank: int | None = field(validator=optional(_SIZE))
    kv_lora_rank: int = field(validator=_SIZE)
    qk_nope_head_dim: int = field(validator=_SIZE)
    qk_rope_head_dim: int = field(validator=_SIZE)
    v_head_dim: int = field(validator=_SIZE)
    interleaved: bool = field(default=True, validator=_FLAG)


# What a family fixes: field, then the only value it takes.
_FIXED: Mapping[Family, Mapping[str, Any]] = {
    "llama": {"qk_norm": False},
    "qwen2": {"qk_norm": False, "qkv_bias": True, "output_bias": False, "mlp_bias": False},
    "qwen3": {"qk_norm": True, "mlp_bias": False},
    "qwen3_moe": {"qk_norm": True, "mlp_bias": False},
    "mixtral": {"qk_norm": False, "qkv_bias": False, "output_bias": False, "mlp_bias": False},
    "deepseek_v3": {"qk_norm": False, "qkv_bias": False, "output_bias": False, "mlp_bias": False},
    "gpt2": {"qk_norm": False, "qkv_bias": True, "output_bias": True, "mlp_bias": True},
}
_SPARSE = ("qwen3_moe", "mixtral", "deepseek_v3")


@frozen(kw_only=True)
class ModelSpec:
    """A decoder of one of FAMILIES: everything that decides its shapes and its arithmetic.

    ``head_dim`` is the width of one query and key (under latent attention both its parts together);
    ``rope_theta`` None means learned positions. There is no dropout.
    """

    name: str = field(validator=_NAME)
    family: Family = field(validator=_one_of(Family))
    vocab_size: int = field(validator=_SIZE)
    hidden_size: int = field(validator=_SIZE)
    num_layers: int = field(validator=_SIZE)
    num_heads: int = field(validator=_SIZE)
    num_kv_heads: int = field(validator=_SIZE)
    head_dim: int = field(validator=_SIZE)
    intermediate_size: int = field(validator=_SIZE)
    max_positions: int = field(validator=_SIZE)
    norm: Norm = field(validator=_one_of(Norm))
    norm_eps: float = field(converter=_as_float, validator=_POSITIVE)
    activation: Activation = field(validator=_one_of(Activation))
    gated_mlp: bool = field(validator=_FLAG)
    rope_theta: float | None = field(converter=or_none(_as_float), validator=optional(_POSITIVE))
    rope_scaling: RopeScaling | None = field(default=None, validator=_none_or(RopeScaling))
    qkv_bias: bool = field(default=False, validator=_FLAG)
    output_bias: bool = field(default=False, validator=_FLAG)
    mlp_bias: bool = field(default=False, validator=_FLAG)
    qk_norm: bool = field(default=False, validator=_FLAG)
    tied_embeddings: bool = field(default=False, validator=_FLAG)
    init_std: float = field(default=0.02, converter=_as_float, validator=_POSITIVE)
    experts: Experts | None = field(default=None, validator=_none_or(Experts))
    latent_attention: LatentAttention | None = field(default=None, validator=_none_or(LatentAttention))

    @latent_attention.validator
    def _check_together(self, _: Attribute[Any], __: LatentAttention | None) -> None:
        _check_family(self)
        _check_heads(self)
        _check_experts(self)

    @property
    def num_moe_layers(self) -> int:
        """How many layers have routed experts."""
        return self.num_layers - len(self.experts.dense_layers) if self.experts else 0

    @property
    def num_parameters(self) -> int:
        """Trained parameters, a tied table counted once."""
        dense = self.num_layers - self.num_moe_layers
        return (
            _embedding(self).num_parameters
            + self.num_layers * _attention(self, 0).num_parameters
            + (dense * _mlp(self, 0).num_parameters if dense else 0)
            + (self.num_moe_layers * _moe(self, 0).num_parameters if self.num_moe_layers else 0)
            + _head(self).num_parameters
        )

    @property
    def num_active_parameters(self) -> int:
        """Parameters that one token meets: all but the routed experts it is not sent to."""
        if self.experts is None:
            return self.num_parameters
        expert = 3 * self.hidden_size * self.experts.intermediate_size
        idle = self.experts.num_experts - self.experts.top_k
        return self.num_parameters - self.num_moe_layers * idle * expert

    @classmethod
    def from_hf(
        cls, source: str | os.PathLike[str] | Mapping[str, Any], *, name: str | None = None
    ) -> ModelSpec:
        """The model of a preset's name, of a ``config.json`` or the folder that holds it, or of its dict.

        ``name`` replaces the name that the source suggests.
        Raises PlanError, naming the key, if the configuration is unreadable, incomplete or not supported.
        """
        from picotron.planner.families import read

        return read(source, name=name)

    def __str__(self) -> str:
        active = f" ({_amount(self.num_active_parameters)} active)" if self.experts else ""
        return (
            f"{self.name}: {_amount(self.num_parameters)} parameters{active}, {self.num_layers} layers, "
            f"hidden {self.hidden_size}, {self.num_heads} heads ({self.num_kv_heads} key/value)"
        )


def _amount(count: int) -> str:
    """A count for a reader: "8.03 B"."""
    for unit, letter in ((10**9, " B"), (10**6, " M"), (10**3, " K")):
        if count >= unit:
            return f"{count / unit:.2f}{letter}"
    return str(count)


def _check_family(model: ModelSpec) -> None:
    learned = model.family == "gpt2"
    fixed = {"norm": "layer" if learned else "rms", "gated_mlp": not learned, **_FIXED[model.family]}
    for name, value in fixed.items():
        if getattr(model, name) != value:
            raise PlanError(f"{name} must be {value!r} in {model.family}, got {getattr(model, name)!r}")
    present = {
        "rope_theta": not learned,
        "experts": model.family in _SPARSE,
        "latent_attention": model.family == "deepseek_v3",
    }
    for name, expected in present.items():
        if (getattr(model, name) is not None) != expected:
            rule = "given" if expected else "None"
            raise PlanError(f"{name} must be {rule} in {model.family}, got {getattr(model, name)!r}")
    if learned and model.rope_scaling is not None:
        raise PlanError(f"rope_scaling must be None where positions are learned, got {model.rope_scaling!r}")
    if model.qkv_bias != model.output_bias and model.family != "qwen2":
        raise PlanError(
            f"output_bias must equal qkv_bias in {model.family}, got {model.output_bias} and {model.qkv_bias}"
        )


def _check_heads(model: ModelSpec) -> None:
    heads, latent = model.num_heads, model.latent_attention
    if heads % model.num_kv_heads:
        raise PlanError(f"num_heads must be a multiple of num_kv_heads, got {heads} and {model.num_kv_heads}")
    if model.family in ("gpt2", "deepseek_v3") and heads != model.num_kv_heads:
        raise PlanError(
            f"num_kv_heads must be num_heads = {heads} in {model.family}, got {model.num_kv_heads}"
        )
    if model.family == "gpt2" and heads * model.head_dim != model.hidden_size:
        raise PlanError(
            f"hidden_size must be num_heads * head_dim = {heads * model.head_dim} in gpt2, "
            f"got {model.hidden_size}"
        )
    if latent and model.head_dim != latent.qk_nope_head_dim + latent.qk_rope_head_dim:
        raise PlanError(
            f"head_dim must be qk_nope_head_dim + qk_rope_head_dim = "
            f"{latent.qk_nope_head_dim + latent.qk_rope_head_dim}, got {model.head_dim}"
        )
    rotary = latent.qk_rope_head_dim if latent else model.head_dim
    if model.rope_theta is not None and rotary % 2:
        raise PlanError(f"{'qk_rope_' if latent else ''}head_dim must be even to be rotated, got {rotary}")


def _check_experts(model: ModelSpec) -> None:
    experts = model.experts
    if experts is None:
        return
    score = "sigmoid" if model.family == "deepseek_v3" else "softmax"
    if experts.score_function != score:
        raise PlanError(f"score_function must be {score!r} in {model.family}, got {experts.score_function!r}")
    if experts.dense_layers and experts.dense_layers[-1] >= model.num_layers:
        raise PlanError(f"dense_layers must be in [0, {model.num_layers}), got {experts.dense_layers}")
    if model.family == "mixtral" and experts.dense_layers:
        raise PlanError(f"dense_layers must be () in mixtral, got {experts.dense_layers}")
    if model.family == "deepseek_v3":
        _check_deepseek_experts(experts)
    else:
        _check_softmax_experts(experts, model.family)


def _check_deepseek_experts(experts: Experts) -> None:
    """What DeepSeek-V3's own router and configuration can say."""
    if experts.dense_layers != tuple(range(len(experts.dense_layers))):
        raise PlanError(f"dense_layers must be the first ones in deepseek_v3, got {experts.dense_layers}")
    if experts.shared_intermediate_size % experts.intermediate_size:
        raise PlanError(
            f"shared_intermediate_size must be a multiple of intermediate_size = "
            f"{experts.intermediate_size}, got {experts.shared_intermediate_size}"
        )
    if experts.num_experts // experts.num_groups < 2:
        raise PlanError(
            "num_groups must leave at least 2 experts a group, for groups are ranked by their best two, "
            f"got {experts.num_groups} groups of {experts.num_experts} experts"
        )


def _check_softmax_experts(experts: Experts, family: str) -> None:
    """Plain top-k routing: no shared expert, no groups, no scale."""
    plain = {"shared_intermediate_size": 0, "num_groups": 1, "routed_scale": 1.0}
    if family == "mixtral":
        plain["normalize_scores"] = True
    for name, value in plain.items():
        if getattr(experts, name) != value:
            raise PlanError(f"{name} must be {value!r} in {family}, got {getattr(experts, name)!r}")


def segments(model: ModelSpec) -> tuple[Segment, ...]:
    """Every segment in the order of forward: embedding, attention and MLP of each layer, head."""
    layers = (
        segment
        for layer in range(model.num_layers)
        for segment in (_attention(model, layer), _feed_forward(model, layer))
    )
    return (_embedding(model), *layers, _head(model))


def parameters(model: ModelSpec) -> tuple[Parameter, ...]:
    """Every trained parameter, in the order of ``segments``."""
    return tuple(parameter for segment in segments(model) for parameter in segment.parameters)


def to_hf(model: ModelSpec) -> dict[str, Any]:
    """The ``config.json`` from which transformers builds the same architecture.

    ``ModelSpec.from_hf`` reads it back into an equal model.
    """
    from picotron.planner.families import write

    return write(model)


_BIAS_ROLES: Mapping[Role, Role] = {
    "column": "column_bias",
    "kv_column": "kv_column_bias",
    "row": "row_bias",
    "fused_qkv": "fused_qkv_bias",
    "conv_column": "column_bias",
    "conv_row": "row_bias",
}


def _matrix(name: str, shape: tuple[int, int], role: Role, *, bias_size: int = 0) -> tuple[Parameter, ...]:
    """A projection's weight and, where ``bias_size`` is not 0, its bias."""
    weight = Parameter(name=f"{name}.weight", shape=shape, role=role)
    if not bias_size:
        return (weight,)
    return weight, Parameter(name=f"{name}.bias", shape=(bias_size,), role=_BIAS_ROLES[role], init="zeros")


def _norm(name: str, size: int, role: Role = "norm", *, bias: bool = False) -> tuple[Parameter, ...]:
    weight = Parameter(name=f"{name}.weight", shape=(size,), role=role, init="ones")
    if not bias:
        return (weight,)
    return weight, Parameter(name=f"{name}.bias", shape=(size,), role=role, init="zeros")


def _embedding(model: ModelSpec) -> Segment:
    table = (model.vocab_size, model.hidden_size)
    if model.family != "gpt2":
        tables = _matrix("model.embed_tokens", table, "embedding")
    else:
        positions = (model.max_positions, model.hidden_size)
        tables = _matrix("transformer.wte", table, "embedding")
        tables += _matrix("transformer.wpe", positions, "position")
    return Segment(kind="embedding", layer=None, parameters=tables)


def _head(model: ModelSpec) -> Segment:
    if model.family == "gpt2":
        found = _norm("transformer.ln_f", model.hidden_size, bias=True)
    else:
        found = _norm("model.norm", model.hidden_size)
    if not model.tied_embeddings:
        found += _matrix("lm_head", (model.vocab_size, model.hidden_size), "head")
    return Segment(kind="head", layer=None, parameters=found)


def _attention(model: ModelSpec, layer: int) -> Segment:
    if model.family == "gpt2":
        found = _fused_attention(model, f"transformer.h.{layer}")
    else:
        at = f"model.layers.{layer}"
        latent = model.latent_attention
        found = _norm(f"{at}.input_layernorm", model.hidden_size)
        found += (
            _latent_attention(model, latent, f"{at}.self_attn")
            if latent
            else _grouped_attention(model, f"{at}.self_attn")
        )
    return Segment(kind="attention", layer=layer, parameters=found)


def _grouped_attention(model: ModelSpec, at: str) -> tuple[Parameter, ...]:
    hidden, query, kv = (
        model.hidden_size,
        model.num_heads * model.head_dim,
        model.num_kv_heads * model.head_dim,
    )
    query_bias, kv_bias = (query, kv) if model.qkv_bias else (0, 0)
    found = _matrix(f"{at}.q_proj", (query, hidden), "column", bias_size=query_bias)
    found += _matrix(f"{at}.k_proj", (kv, hidden), "kv_column", bias_size=kv_bias)
    found += _matrix(f"{at}.v_proj", (kv, hidden), "kv_column", bias_size=kv_bias)
    if model.qk_norm:
        found += _norm(f"{at}.q_norm", model.head_dim, "head_norm")
        found += _norm(f"{at}.k_norm", model.head_dim, "head_norm")
    return found + _matrix(
        f"{at}.o_proj", (hidden, query), "row", bias_size=hidden if model.output_bias else 0
    )


def _latent_attention(model: ModelSpec, latent: LatentAttention, at: str) -> tuple[Parameter, ...]:
    hidden, heads, rank = model.hidden_size, model.num_heads, latent.kv_lora_rank
    query = heads * model.head_dim
    if latent.q_lora_rank is None:
        found = _matrix(f"{at}.q_proj", (query, hidden), "column")
    else:
        found = _matrix(f"{at}.q_a_proj", (latent.q_lora_rank, hidden), "latent")
        found += _norm(f"{at}.q_a_layernorm", latent.q_lora_rank, "latent_norm")
        found += _matrix(f"{at}.q_b_proj", (query, latent.q_lora_rank), "column")
    found += _matrix(f"{at}.kv_a_proj_with_mqa", (rank + latent.qk_rope_head_dim, hidden), "latent")
    found += _norm(f"{at}.kv_a_layernorm", rank, "latent_norm")
    expanded = heads * (latent.qk_nope_head_dim + latent.v_head_dim)
    found += _matrix(f"{at}.kv_b_proj", (expanded, rank), "column")
    return found + _matrix(f"{at}.o_proj", (hidden, heads * latent.v_head_dim), "row")


def _fused_attention(model: ModelSpec, at: str) -> tuple[Parameter, ...]:
    hidden = model.hidden_size
    found = _norm(f"{at}.ln_1", hidden, bias=True)
    found += _matrix(f"{at}.attn.c_attn", (hidden, 3 * hidden), "fused_qkv", bias_size=3 * hidden)
    return found + _matrix(f"{at}.attn.c_proj", (hidden, hidden), "conv_row", bias_size=hidden)


def _feed_forward(model: ModelSpec, layer: int) -> Segment:
    if model.experts and layer not in model.experts.dense_layers:
        return _moe(model, layer)
    return _mlp(model, layer)


def _mlp(model: ModelSpec, layer: int) -> Segment:
    if model.family == "gpt2":
        found = _conv_mlp(model, f"transformer.h.{layer}")
    else:
        at = f"model.layers.{layer}"
        found = _norm(f"{at}.post_attention_layernorm", model.hidden_size)
        found += _gated_mlp(model, f"{at}.mlp", model.intermediate_size)
    return Segment(kind="mlp", layer=layer, parameters=found)


def _conv_mlp(model: ModelSpec, at: str) -> tuple[Parameter, ...]:
    hidden, inner = model.hidden_size, model.intermediate_size
    found = _norm(f"{at}.ln_2", hidden, bias=True)
    found += _matrix(f"{at}.mlp.c_fc", (hidden, inner), "conv_column", bias_size=inner)
    return found + _matrix(f"{at}.mlp.c_proj", (inner, hidden), "conv_row", bias_size=hidden)


def _gated_mlp(model: ModelSpec, at: str, inner: int) -> tuple[Parameter, ...]:
    hidden = model.hidden_size
    inner_bias, hidden_bias = (inner, hidden) if model.mlp_bias else (0, 0)
    found = _matrix(f"{at}.gate_proj", (inner, hidden), "column", bias_size=inner_bias)
    found += _matrix(f"{at}.up_proj", (inner, hidden), "column", bias_size=inner_bias)
    return found + _matrix(f"{at}.down_proj", (hidden, inner), "row", bias_size=hidden_bias)


def _moe(model: ModelSpec, layer: int) -> Segment:
    experts = model.experts
    assert experts is not None
    at = f"model.layers.{layer}"
    block = f"{at}.block_sparse_moe" if model.family == "mixtral" else f"{at}.mlp"
    found = _norm(f"{at}.post_attention_layernorm", model.hidden_size)
    found += _matrix(f"{block}.gate", (experts.num_experts, model.hidden_size), "router")
    routed = tuple(
        parameter
        for expert in range(experts.num_experts)
        for parameter in _expert(model, experts, f"{block}.experts.{expert}")
    )
    shared = experts.shared_intermediate_size
    beside = _gated_mlp(model, f"{block}.shared_experts", shared) if shared else ()
    return Segment(kind="moe", layer=layer, parameters=(*found, *routed, *beside))


def _expert(model: ModelSpec, experts: Experts, at: str) -> tuple[Parameter, ...]:
    hidden, inner = model.hidden_size, experts.intermediate_size
    mixtral = model.family == "mixtral"
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    found = _matrix(f"{at}.{gate}", (inner, hidden), "expert_column")
    found += _matrix(f"{at}.{up}", (inner, hidden), "expert_column")
    return found + _matrix(f"{at}.{down}", (hidden, inner), "expert_row")
