"""Values of a Hugging Face configuration by their keys, each checked as it is read.

A key has one alias under which transformers may save it. What is missing without a default, or is not what
its key must be, is a PlanError that names the key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from picotron.errors import PlanError
from picotron.planner.validators import is_positive, is_size, shown

Config = Mapping[str, Any]
REQUIRED = object()
# The other name under which transformers may save a key.
_ALIASES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "num_experts": "num_local_experts",
    "num_local_experts": "num_experts",
    "n_routed_experts": "num_local_experts",
}


def value_of(config: Config, key: str, default: object = REQUIRED) -> Any:
    """The value at ``key`` or its alias, else the default."""
    for name in (key, _ALIASES.get(key, key)):
        if name in config:
            return config[name]
    if default is REQUIRED:
        where = config.get("model_type", "rope_scaling")
        raise PlanError(
            f"{key} must be in the {where} config, got only {sorted(map(str, config))}; "
            "take the model's whole config.json"
        )
    return default


def size_of(config: Config, key: str, default: object = REQUIRED, *, least: int = 1) -> int:
    """A whole number of at least ``least``."""
    value = value_of(config, key, default)
    if not is_size(value, least):
        raise PlanError(f"{key} must be an integer of at least {least}, got {shown(value)}")
    return int(value)


def number_of(config: Config, key: str, default: object = REQUIRED) -> float:
    """A positive finite number."""
    value = value_of(config, key, default)
    if not is_positive(value):
        raise PlanError(f"{key} must be a positive finite number, got {shown(value)}")
    return float(value)


def flag_of(config: Config, key: str, default: bool) -> bool:
    """True or false."""
    value = value_of(config, key, default)
    if not isinstance(value, bool):
        raise PlanError(f"{key} must be true or false, got {shown(value)}")
    return value


def must_equal(config: Config, key: str, supported: object) -> None:
    """Refuse a key that, set to anything else, would change the architecture."""
    value = value_of(config, key, supported)
    if value is not None and value != supported:
        raise PlanError(f"{key} must be {supported!r}, got {shown(value)}; nothing else is supported")


def divided(config: Config, dividend: str, divisor: str, *, remedy: str = "") -> int:
    """``dividend / divisor``, two keys of the configuration, which must divide."""
    whole, part = size_of(config, dividend), size_of(config, divisor)
    if whole % part:
        raise PlanError(f"{dividend} must be a multiple of {divisor}, got {whole} and {part}{remedy}")
    return whole // part
