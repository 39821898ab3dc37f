"""The schedules that have a name."""

from __future__ import annotations

from collections.abc import Callable

from picotron.errors import PlanError
from picotron.planner.pipeline import Schedule
from picotron.planner.schedules import afab, one_f_one_b

SCHEDULES: dict[str, Callable[[int, int], Schedule]] = {"afab": afab, "1f1b": one_f_one_b}


def make_schedule(name: str, num_ranks: int, num_microbatches: int) -> Schedule:
    """The schedule of that name. Raises PlanError for an unknown one."""
    if name not in SCHEDULES:
        raise PlanError(f"schedule must be one of {', '.join(SCHEDULES)}, got {name!r}")
    return SCHEDULES[name](num_ranks, num_microbatches)
