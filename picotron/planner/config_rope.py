"""Rotary base and scaling of a Hugging Face configuration, under either of the two spellings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from picotron.errors import PlanError
from picotron.planner.config_values import (
    Config,
    flag_of,
    must_equal,
    number_of,
    size_of,
)
from picotron.planner.model import RopeScaling
from picotron.planner.validators import shown


def rope_of(config: Config) -> dict[str, Any]:
    """Rotary base and scaling, from ``rope_parameters`` or from ``rope_theta`` and ``rope_scaling``."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    table = config.get(key) or {}
    if not isinstance(table, Mapping) or any(isinstance(entry, Mapping) for entry in table.values()):
        raise PlanError(f"{key} must be one flat object for all layers, got {shown(table)}")
    must_equal(config, "partial_rotary_factor", 1.0)
    must_equal(table, "partial_rotary_factor", 1.0)
    theta = 1e6 if config.get("model_type") == "mixtral" else 1e4
    own = table if table.get("rope_theta") is not None else config
    return {
        "rope_theta": number_of(own, "rope_theta", theta),
        "rope_scaling": _rope_scaling(table, key),
    }


def _rope_scaling(table: Config, key: str) -> RopeScaling | None:
    kind = table.get("rope_type", table.get("type", "default"))
    if not isinstance(kind, str) or kind not in _SCALINGS:
        raise PlanError(f"{key}.rope_type must be one of {tuple(_SCALINGS)}, got {shown(kind)}")
    return _SCALINGS[kind](table)


def _linear_scaling(table: Config) -> RopeScaling:
    return RopeScaling(kind="linear", factor=number_of(table, "factor"))


def _llama3_scaling(table: Config) -> RopeScaling:
    return RopeScaling(
        kind="llama3",
        factor=number_of(table, "factor"),
        low_freq_factor=number_of(table, "low_freq_factor"),
        high_freq_factor=number_of(table, "high_freq_factor"),
        original_max_positions=size_of(table, "original_max_position_embeddings"),
    )


def _yarn_scaling(table: Config) -> RopeScaling:
    optional = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")
    return RopeScaling(
        kind="yarn",
        factor=number_of(table, "factor"),
        truncate=flag_of(table, "truncate", True),
        original_max_positions=size_of(table, "original_max_position_embeddings"),
        **{key: number_of(table, key) for key in optional if table.get(key) is not None},
    )


_SCALINGS: Mapping[str, Callable[[Config], RopeScaling | None]] = {
    "default": lambda table: None,
    "linear": _linear_scaling,
    "llama3": _llama3_scaling,
    "yarn": _yarn_scaling,
}
