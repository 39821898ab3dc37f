"""The constants of the time model, each with its unit, meaning, bounds and where its value comes from.

They are in ``presets/constants.json``. A constant is one number, or one for each architecture, kernel set or
attention kernel and architecture; ``Constants`` holds arrays, so that index columns pick what they need. What
says ``calibrated`` was fitted on published runs, within its bounds and from its ``assumed`` value, by
``benchmarks/calibrate.py``; what does not is an assumption with its source.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
from attrs import field, frozen

from picotron.errors import PlanError
from picotron.planner.cases import ARCHITECTURES, ATTENTIONS, KERNEL_SETS, Column

AXES: Mapping[str, tuple[str, ...]] = {
    "architecture": ARCHITECTURES,
    "attention": ATTENTIONS,
    "kernels": KERNEL_SETS,
}


@frozen(kw_only=True)
class Constant:
    """One entry of the table: its values by key (one key "" for a plain number) and what they mean."""

    name: str
    unit: str
    meaning: str
    source: str
    bounds: tuple[float, float]
    axes: tuple[str, ...] = ()
    values: Mapping[str, float]
    calibrated: tuple[str, ...] = ()


@frozen(kw_only=True, eq=False)
class Constants:
    """Every constant as an array: shape () for a number, else one dimension for each of its axes."""

    arrays: Mapping[str, Column] = field()

    def __getitem__(self, name: str) -> Any:
        return self.arrays[name]

    def by(self, name: str, *indices: Column) -> Column:
        """The constant ``name`` picked by the index columns of its axes, in the table's order of axes."""
        picked: Column = self.arrays[name][tuple(index.astype(np.intp) for index in indices)]
        return picked


def keys_of(constant: Constant) -> tuple[str, ...]:
    """``name`` or ``name.key`` of every value of one constant: what ``replaced`` takes."""
    return tuple(f"{constant.name}.{key}" if key else constant.name for key in constant.values)


def replaced(constants: Constants, values: Mapping[str, float]) -> Constants:
    """``constants`` with some values changed, by ``name`` or ``name.key`` (``name.flash-2.hopper``)."""
    table, arrays = constant_table(), dict(constants.arrays)
    for path, value in values.items():
        name, _, key = path.partition(".")
        if name not in table or key not in table[name].values:
            raise PlanError(f"a constant must be one of those in presets/constants.json, got {path!r}")
        array = arrays[name] = arrays[name].copy()
        array[_position(table[name], key)] = value
    return Constants(arrays=arrays)


@cache
def constant_table() -> Mapping[str, Constant]:
    """Every constant with its unit, meaning, bounds and source, by name."""
    text = (files("picotron.planner") / "presets" / "constants.json").read_text(encoding="utf-8")
    return {name: _constant(name, row) for name, row in json.loads(text).items()}


@cache
def default_constants() -> Constants:
    """The constants of the table."""
    return Constants(arrays={name: _array(constant) for name, constant in constant_table().items()})


def _constant(name: str, row: Mapping[str, Any]) -> Constant:
    value = row["value"]
    axes = tuple(row.get("axes", ()))
    return Constant(
        name=name,
        unit=row["unit"],
        meaning=row["meaning"],
        source=row["source"],
        bounds=(row["bounds"][0], row["bounds"][1]),
        axes=axes,
        values=dict(_flat(value)) if axes else {"": float(value)},
        calibrated=tuple(row.get("calibrated", ())),
    )


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    pairs: list[tuple[str, float]] = []
    for key, inner in value.items():
        nested = isinstance(inner, dict)
        pairs += _flat(inner, f"{prefix}{key}.") if nested else [(f"{prefix}{key}", float(inner))]
    return pairs


def _position(constant: Constant, key: str) -> tuple[int, ...]:
    return tuple(
        AXES[axis].index(part) for axis, part in zip(constant.axes, key.split("."), strict=bool(key))
    )


def _array(constant: Constant) -> Column:
    array = np.full([len(AXES[axis]) for axis in constant.axes], np.nan)
    for key, value in constant.values.items():
        array[_position(constant, key)] = value
    if np.isnan(array).any():
        raise PlanError(f"constant {constant.name} must have a value for each of {constant.axes}")
    return array
