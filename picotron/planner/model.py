"""What a decoder is made of: its sizes, and its segments with every named parameter.

A ``ModelSpec`` is read from a Hugging Face ``config.json`` (``picotron/planner/families.py``). Its segments,
in the order of forward, are the units at which backward can pause: the embedding, then attention and MLP
(or experts) of each layer, then the head. Parameters bear the names of the Hugging Face checkpoint, and
routed experts are one 2-D matrix each, as the checkpoint stores them. A tied table is listed and counted
once, with the embedding. What is no trained parameter is not listed: DeepSeek-V3's
``e_score_correction_bias`` and its multi-token-prediction layers (which transformers does not build).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from attrs import Attribute, field, frozen
from attrs.converters import optional as or_none
from attrs.validators import optional

from picotron.errors import PlanError
from picotron.planner import blocks
from picotron.planner.parts import (
    FAMILIES,
    ROLES,
    Activation,
    Experts,
    Family,
    LatentAttention,
    Norm,
    Parameter,
    RopeScaling,
    Segment,
    SegmentKind,
)
from picotron.planner.validators import FLAG, NAME, POSITIVE, SIZE, as_float, none_or, one_of

__all__ = [
    "FAMILIES",
    "ROLES",
    "Activation",
    "Experts",
    "Family",
    "LatentAttention",
    "ModelSpec",
    "Norm",
    "Parameter",
    "RopeScaling",
    "Segment",
    "SegmentKind",
    "parameters",
    "segments",
    "to_hf",
]

MOST_PARTS = 10_000  # layers, or experts of a layer: each is listed by name

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

    name: str = field(validator=NAME)
    family: Family = field(validator=one_of(Family))
    vocab_size: int = field(validator=SIZE)
    hidden_size: int = field(validator=SIZE)
    num_layers: int = field(validator=SIZE)
    num_heads: int = field(validator=SIZE)
    num_kv_heads: int = field(validator=SIZE)
    head_dim: int = field(validator=SIZE)
    intermediate_size: int = field(validator=SIZE)
    max_positions: int = field(validator=SIZE)
    norm: Norm = field(validator=one_of(Norm))
    norm_eps: float = field(converter=as_float, validator=POSITIVE)
    activation: Activation = field(validator=one_of(Activation))
    gated_mlp: bool = field(validator=FLAG)
    rope_theta: float | None = field(converter=or_none(as_float), validator=optional(POSITIVE))
    rope_scaling: RopeScaling | None = field(default=None, validator=none_or(RopeScaling))
    qkv_bias: bool = field(default=False, validator=FLAG)
    output_bias: bool = field(default=False, validator=FLAG)
    mlp_bias: bool = field(default=False, validator=FLAG)
    qk_norm: bool = field(default=False, validator=FLAG)
    tied_embeddings: bool = field(default=False, validator=FLAG)
    init_std: float = field(default=0.02, converter=as_float, validator=POSITIVE)
    experts: Experts | None = field(default=None, validator=none_or(Experts))
    latent_attention: LatentAttention | None = field(default=None, validator=none_or(LatentAttention))

    @latent_attention.validator
    def _check_together(self, _: Attribute[Any], __: LatentAttention | None) -> None:
        for name, count in (
            ("num_layers", self.num_layers),
            ("num_experts", self.experts.num_experts if self.experts else 1),
        ):
            if count > MOST_PARTS:
                raise PlanError(f"{name} must be at most {MOST_PARTS:,}, got {count:,}")
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
            blocks.embedding(self).num_parameters
            + self.num_layers * blocks.attention(self, 0).num_parameters
            + (dense * blocks.mlp(self, 0).num_parameters if dense else 0)
            + (self.num_moe_layers * blocks.moe(self, 0).num_parameters if self.num_moe_layers else 0)
            + blocks.head(self).num_parameters
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
        for segment in (blocks.attention(model, layer), blocks.feed_forward(model, layer))
    )
    return (blocks.embedding(model), *layers, blocks.head(model))


def parameters(model: ModelSpec) -> tuple[Parameter, ...]:
    """Every trained parameter, in the order of ``segments``."""
    return tuple(parameter for segment in segments(model) for parameter in segment.parameters)


def to_hf(model: ModelSpec) -> dict[str, Any]:
    """The ``config.json`` from which transformers builds the same architecture.

    ``ModelSpec.from_hf`` reads it back into an equal model.
    """
    from picotron.planner.families import write

    return write(model)
