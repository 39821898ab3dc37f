"""A plan as JSON text: saved, loaded, named by a fingerprint and compared.

Keys are sorted and numbers written in one way, so equal plans have equal bytes. A schedule is saved as its
name, its parameters and the digest of its CSV; on load it is made again and must have that digest. The orders
of a custom schedule are saved with it. What every decoder layer has alike is saved once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from csv import Error
from functools import cache, partial
from operator import eq
from typing import Any, get_type_hints

from attrs import fields, frozen, has
from cattrs import Converter

from picotron.errors import PlanError
from picotron.planner.catalogue import SCHEDULES
from picotron.planner.pipeline import Schedule, schedule_from_csv, schedule_to_csv
from picotron.planner.plan import SCHEMA_VERSION, TrainingPlan
from picotron.planner.records import read_json, read_text, strict_converter, structured, write_text
from picotron.planner.validators import shown

FINGERPRINT_DIGITS = 12
REMEDY = "make the plan again, or correct the file"
BY_LAYER = ("recompute", "offload")  # of a plan: saved once where all layers have the same


@frozen(kw_only=True)
class SavedSchedule:
    """A schedule in a plan's file: its name, its parameters, the digest of its CSV.

    ``csv`` holds the orders of a custom schedule.
    """

    name: str
    num_ranks: int
    num_microbatches: int
    sha256: str
    csv: str | None = None


@frozen(kw_only=True)
class Difference:
    """One field in which two plans differ: where it is ("topology.tp"), and its value in each."""

    path: str
    left: Any
    right: Any

    def __str__(self) -> str:
        return f"{self.path}: {_shown(self.left)} -> {_shown(self.right)}"


def plan_to_json(plan: TrainingPlan) -> str:
    """The plan as canonical JSON, which ``plan_from_json`` reads back to an equal plan."""
    data = to_data(plan)
    name, csv = data.pop("schedule_name"), data.pop("schedule_csv")
    data |= {key: _once(data[key]) for key in BY_LAYER}
    data["schedule"] = to_data(_saved_schedule(name, csv, plan.schedule))
    data["schema_version"] = SCHEMA_VERSION
    return json.dumps(data, sort_keys=True, indent=2, allow_nan=False) + "\n"


def plan_from_json(text: str) -> TrainingPlan:
    """The plan in a JSON text. Raises PlanError naming the path of each bad field."""
    data = read_json(text, "a plan")
    if not isinstance(data, dict):
        raise PlanError(f"$: must be an object, got {data!r}")
    _check_version(data)
    saved = structured(_converter(), _required(data, "schedule"), SavedSchedule, "$.schedule")
    _check_orders(saved)
    own = {key: value for key, value in data.items() if key not in ("schema_version", "schedule")}
    orders = {"schedule_name": saved.name, "schedule_csv": saved.csv}
    for key in sorted(orders.keys() & own.keys()):
        raise PlanError(f"$.{key}: no such field; it belongs in $.schedule")
    plan = structured(_converter(), own | orders, TrainingPlan)
    _check_schedule(saved, plan.schedule)
    return plan


def save_plan(plan: TrainingPlan, path: str | os.PathLike[str]) -> None:
    """Write the plan's JSON to ``path``, whole or not at all. Raises PlanError if that fails."""
    write_text(path, plan_to_json(plan), "a plan")


def load_plan(path: str | os.PathLike[str]) -> TrainingPlan:
    """The plan in a JSON file. Raises PlanError naming the file and the path of each bad field."""
    if not isinstance(path, str | os.PathLike):
        raise PlanError(f"a plan's file must be a path, got {shown(path)}")
    text = read_text(path, "a plan")
    try:
        return plan_from_json(text)
    except PlanError as error:
        raise PlanError(f"{os.fspath(path)}: {error}; {REMEDY}") from error


def fingerprint(plan: TrainingPlan) -> str:
    """Hex digits that name the plan: the start of the sha256 of its JSON."""
    return hashlib.sha256(plan_to_json(plan).encode()).hexdigest()[:FINGERPRINT_DIGITS]


def schedule_digest(schedule: Schedule) -> str:
    """The sha256 of the schedule's CSV, in hex."""
    return hashlib.sha256(schedule_to_csv(schedule).encode()).hexdigest()


def diff(left: TrainingPlan, right: TrainingPlan) -> tuple[Difference, ...]:
    """The fields in which two plans differ, in the order of the classes; none for equal plans."""
    return tuple(_differences(left, right, ""))


def to_data(value: object) -> Any:
    """A part of a plan as values that JSON has: equal parts give equal data."""
    return _converter().unstructure(value)


@cache
def _converter() -> Converter:
    """The converter of plans: strict, and a number of equal value is written in one way."""
    converter = strict_converter()
    converter.register_unstructure_hook(float, lambda value: float(value) + 0.0)  # -0.0 is written as 0.0
    converter.register_unstructure_hook(int, int)
    converter.register_unstructure_hook(bool, bool)
    for name in BY_LAYER:
        kind = get_type_hints(TrainingPlan)[name]
        hook = partial(_one_or, converter.get_structure_hook(kind))
        converter.register_structure_hook_func(partial(eq, kind), hook)
    return converter


def _one_or(items: Callable[[Any, Any], Any], value: object, kind: Any) -> Any:
    """A list, or one value for all layers, which the plan itself repeats or refuses."""
    return items(value, kind) if isinstance(value, list | tuple) else value


def _once(values: list[Any] | tuple[Any, ...]) -> Any:
    """One value where all are the same."""
    return values[0] if len(set(values)) == 1 else list(values)


def _saved_schedule(name: str, csv: str | None, schedule: Schedule) -> SavedSchedule:
    return SavedSchedule(
        name=name,
        num_ranks=schedule.num_ranks,
        num_microbatches=schedule.num_microbatches,
        sha256=schedule_digest(schedule),
        csv=csv,
    )


def _required(data: dict[str, Any], key: str) -> Any:
    if key not in data:
        raise PlanError(f"$.{key}: required field is missing")
    return data[key]


def _check_version(data: dict[str, Any]) -> None:
    version = _required(data, "schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise PlanError(
            f"$.schema_version: must be {SCHEMA_VERSION}, the only one that this version of picotron reads, "
            f"got {version!r}"
        )


def _check_orders(saved: SavedSchedule) -> None:
    """Raise PlanError unless the name is known, or the orders are a schedule's."""
    if saved.csv is None and saved.name not in SCHEDULES:
        raise PlanError(f"$.schedule.name: must be one of {', '.join(SCHEDULES)}, got {saved.name!r}")
    try:
        if saved.csv is not None:
            schedule_from_csv(saved.csv)
    except (ValueError, Error) as error:
        raise PlanError(f"$.schedule.csv: {error}") from error


def _check_schedule(saved: SavedSchedule, made: Schedule) -> None:
    """Raise PlanError unless the schedule made again is the one that was saved."""
    again = _saved_schedule(saved.name, saved.csv, made)
    for attribute in fields(SavedSchedule):
        expected, found = getattr(again, attribute.name), getattr(saved, attribute.name)
        if expected != found:
            raise PlanError(
                f"$.schedule.{attribute.name}: must be {expected!r}, "
                f"as in the schedule made again from the plan, got {found!r}"
            )


def _differences(left: Any, right: Any, path: str) -> Iterator[Difference]:
    if type(left) is type(right) and has(type(left)):
        for attribute in fields(type(left)):
            at = f"{path}.{attribute.name}" if path else attribute.name
            yield from _differences(getattr(left, attribute.name), getattr(right, attribute.name), at)
    elif left != right:
        yield Difference(path=path, left=left, right=right)


def _shown(value: object) -> str:
    return type(value).__name__ if has(type(value)) else repr(value)
