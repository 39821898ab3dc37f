"""What a decoder is made of: named parameters in segments, and the parts that only some families have."""

from __future__ import annotations

import math
from typing import Literal, get_args

from attrs import Attribute, field, frozen
from attrs.converters import optional as or_none
from attrs.validators import optional

from picotron.errors import PlanError
from picotron.planner.validators import (
    COUNT,
    FLAG,
    NAME,
    POSITIVE,
    SIZE,
    as_float,
    is_count,
    is_size,
    must_be,
    one_of,
)

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


def _is_shape(value: object) -> bool:
    return isinstance(value, tuple) and len(value) > 0 and all(is_size(length) for length in value)


def _are_layers(value: object) -> bool:
    return isinstance(value, tuple) and all(map(is_count, value)) and list(value) == sorted(set(value))


@frozen(kw_only=True)
class Parameter:
    """One trained tensor, as the Hugging Face checkpoint names it.

    ``init`` "normal" draws with mean 0 and the model's ``init_std``.
    """

    name: str = field(validator=NAME)
    shape: tuple[int, ...] = field(validator=must_be("a tuple of positive integers", _is_shape))
    role: Role = field(validator=one_of(Role))
    init: Init = field(default="normal", validator=one_of(Init))

    @property
    def num_elements(self) -> int:
        """How many numbers the tensor holds."""
        return math.prod(self.shape)


@frozen(kw_only=True)
class Segment:
    """The unit at which backward can pause; ``layer`` is None for the embedding and the head."""

    kind: SegmentKind = field(validator=one_of(SegmentKind))
    layer: int | None = field(validator=optional(COUNT))
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

    kind: RopeKind = field(validator=one_of(RopeKind))
    factor: float = field(converter=as_float, validator=POSITIVE)
    low_freq_factor: float = field(default=1.0, converter=as_float, validator=POSITIVE)
    high_freq_factor: float = field(default=4.0, converter=as_float, validator=POSITIVE)
    beta_fast: float = field(default=32.0, converter=as_float, validator=POSITIVE)
    beta_slow: float = field(default=1.0, converter=as_float, validator=POSITIVE)
    attention_factor: float | None = field(
        default=None, converter=or_none(as_float), validator=optional(POSITIVE)
    )
    mscale: float | None = field(default=None, converter=or_none(as_float), validator=optional(POSITIVE))
    mscale_all_dim: float | None = field(
        default=None, converter=or_none(as_float), validator=optional(POSITIVE)
    )
    truncate: bool = field(default=True, validator=FLAG)
    original_max_positions: int = field(default=0, validator=COUNT)

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

    num_experts: int = field(validator=SIZE)
    top_k: int = field(validator=SIZE)
    intermediate_size: int = field(validator=SIZE)
    shared_intermediate_size: int = field(default=0, validator=COUNT)
    dense_layers: tuple[int, ...] = field(
        default=(), validator=must_be("a tuple of ascending layer indices", _are_layers)
    )
    score_function: ScoreFunction = field(default="softmax", validator=one_of(ScoreFunction))
    normalize_scores: bool = field(default=True, validator=FLAG)
    routed_scale: float = field(default=1.0, converter=as_float, validator=POSITIVE)
    num_groups: int = field(default=1, validator=SIZE)
    top_k_groups: int = field(default=1, validator=SIZE)

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

    q_lora_rank: int | None = field(validator=optional(SIZE))
    kv_lora_rank: int = field(validator=SIZE)
    qk_nope_head_dim: int = field(validator=SIZE)
    qk_rope_head_dim: int = field(validator=SIZE)
    v_head_dim: int = field(validator=SIZE)
    interleaved: bool = field(default=True, validator=FLAG)
