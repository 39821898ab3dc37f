"""A measurement as JSON text, for the run folder and for whoever compares it later."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from attrs import fields
from cattrs import Converter

from picotron.errors import PlanError
from picotron.planner.memory import MemoryTimeline
from picotron.planner.records import read_json, strict_converter, structured
from picotron.planner.serialize import plan_from_json, plan_to_json
from picotron.planner.timeline import Timeline
from picotron.runtime.run import Measurement

_SECONDS = ("start", "end")  # the columns of a timeline that are not whole numbers
_MAY_BE_NONE = ("losses", "grad_norms")  # of a skipped step, as JSON has no other word for no number


def finite_or_none(value: float) -> float | None:
    """A number that JSON can hold, or None."""
    return value if math.isfinite(value) else None


def measurement_data(measurement: Measurement) -> dict[str, Any]:
    """The measurement as values that JSON has; the plan is its own JSON text, parsed."""
    data = {f.name: getattr(measurement, f.name) for f in fields(Measurement)}
    data["plan"] = read_json(plan_to_json(measurement.plan), "a plan")
    data |= {name: list(map(finite_or_none, data[name])) for name in _MAY_BE_NONE}
    data["memory"] = [_columns(timeline) for timeline in measurement.memory]
    data["timeline"] = _columns(measurement.timeline)
    return data


def measurement_from_json(text: str) -> Measurement:
    """The measurement in a JSON text. Raises PlanError naming the path of each bad field."""
    import json

    data = read_json(text, "a measurement")
    if not isinstance(data, dict) or not isinstance(data.get("plan"), dict):
        raise PlanError("a measurement must be a JSON object with a plan; train the plan again")
    plan = plan_from_json(json.dumps(data.pop("plan")))
    for name in _MAY_BE_NONE:
        if isinstance(data.get(name), list):
            data[name] = [math.nan if value is None else value for value in data[name]]
    rest = {**data, "plan": plan}
    return structured(_converter(), rest, Measurement)


def _columns(value: MemoryTimeline | Timeline) -> dict[str, Any]:
    columns = {f.name: getattr(value, f.name) for f in fields(type(value))}
    return {name: c.tolist() if isinstance(c, np.ndarray) else c for name, c in columns.items()}


@cache
def _converter() -> Converter:
    from picotron.planner.plan import TrainingPlan

    converter = strict_converter()
    converter.register_structure_hook(TrainingPlan, lambda value, _: value)
    converter.register_structure_hook(np.ndarray, lambda value, _: _array(value))
    return converter


def _array(value: object) -> np.ndarray:
    if not isinstance(value, list):
        raise PlanError(f"must be a list of numbers, got {value!r}")
    whole = all(isinstance(item, int) for item in value)
    return np.array(value, dtype=np.int64 if whole else np.float64)
