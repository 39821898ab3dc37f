"""One to three constants of a cluster's efficiency from observed runs: as many as the runs can tell apart.

The constants are what multiplies all seconds of computing, what multiplies all of communication, and seconds
that every rank spends once a step. A constant is fitted only if changing it changes the predictions of the
runs in a way that the others cannot make good: by at least TELLING_SHARE of its own relative change (that of
seconds once a step is relative to the shortest run). What is minimised are squared logarithms of predicted
over observed, by steps of Gauss and Newton.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
from attrs import evolve, field, frozen

from picotron.errors import PlanError
from picotron.planner.cluster import ClusterSpec, Efficiency
from picotron.planner.host_seconds import cpu_seconds_by_rank
from picotron.planner.plan import TrainingPlan
from picotron.planner.records import read_json
from picotron.planner.serialize import load_plan, plan_from_json
from picotron.planner.simulate import simulate_step
from picotron.planner.validators import POSITIVE, as_float, is_positive, shown

Quantity = Literal["step_seconds", "cpu_seconds"]
CONSTANTS = ("compute_scale", "communication_scale", "step_seconds")
REAL_CLOCKS = ("host", "device")
TELLING_SHARE = 0.05
MOST_SCALE = 1000.0  # beyond that the runs are of something else
_NUDGE = 1e-3
_MOST_ITERATIONS = 30


@frozen(kw_only=True)
class Run:
    """A plan that was run: the seconds of its steps ("step_seconds") or of all processors ("cpu_seconds")."""

    plan: TrainingPlan = field(repr=False)
    seconds: float = field(converter=as_float, validator=POSITIVE)
    quantity: Quantity = "step_seconds"


@frozen(kw_only=True)
class ProfileFit:
    """The cluster with the fitted efficiency; which constants were fitted, and each run's seconds."""

    cluster: ClusterSpec
    fitted: tuple[str, ...]
    observed_seconds: tuple[float, ...]
    seconds_before: tuple[float, ...]
    seconds_after: tuple[float, ...]

    @property
    def error_before(self) -> float:
        """Median absolute relative error of the predictions before."""
        return _median_error(self.seconds_before, self.observed_seconds)

    @property
    def error_after(self) -> float:
        """Median absolute relative error of the predictions after."""
        return _median_error(self.seconds_after, self.observed_seconds)


def _median_error(predicted: Sequence[float], observed: Sequence[float]) -> float:
    return median(abs(p / o - 1) for p, o in zip(predicted, observed, strict=True))


def fit_profile(runs: Sequence[Run]) -> ProfileFit:
    """The constants with which predictions of ``runs`` are nearest to what was observed.

    Raises PlanError for no run, for runs on different machines, and where no constant can be told.
    """
    _check_runs(runs)
    before = np.array([_predicted(run, run.plan.cluster.efficiency) for run in runs])
    base, unit = runs[0].plan.cluster.efficiency, min(run.seconds for run in runs)
    chosen = _telling(_slopes(runs, base, CONSTANTS, unit))
    if not chosen:
        raise PlanError(
            f"a run must tell at least one of {', '.join(CONSTANTS)}, and none changes its prediction; "
            "give a run whose steps compute or communicate"
        )
    fitted = _fitted(runs, base, chosen, unit)
    after = [_predicted(run, fitted) for run in runs]
    names = ", ".join(chosen)
    source = f"{base.source}; {names} fitted to {len(runs)} observed run{'s' * (len(runs) > 1)}"
    return ProfileFit(
        cluster=evolve(runs[0].plan.cluster, efficiency=evolve(fitted, source=source)),
        fitted=chosen,
        observed_seconds=tuple(run.seconds for run in runs),
        seconds_before=tuple(map(float, before)),
        seconds_after=tuple(after),
    )


def _check_runs(runs: Sequence[Run]) -> None:
    if not runs:
        raise PlanError("a profile is fitted to observed runs, got none; give one or more")
    first = runs[0].plan.cluster
    for run in runs:
        other = run.plan.cluster
        if (
            evolve(other, name=first.name, nodes=first.nodes, devices_per_node=first.devices_per_node)
            != first
        ):
            raise PlanError(
                f"runs of one profile must be planned for one kind of machine, got {first.name} and "
                f"{other.name}, which differ in device, links or efficiency; fit them apart"
            )


def _predicted(run: Run, efficiency: Efficiency) -> float:
    plan = evolve(run.plan, cluster=evolve(run.plan.cluster, efficiency=efficiency))
    if run.quantity == "cpu_seconds":
        return sum(cpu_seconds_by_rank(plan))
    return simulate_step(plan).step_seconds


def _moved(base: Efficiency, names: Sequence[str], values: Sequence[float], unit: float) -> Efficiency:
    """Efficiency with logarithms of scales, and units of step seconds, away from ``base``."""
    changes: dict[str, Any] = {
        name: base.step_seconds + value * unit
        if name == "step_seconds"
        else getattr(base, name) * math.exp(value)
        for name, value in zip(names, values, strict=True)
    }
    return evolve(base, **changes)


def _logarithms(runs: Sequence[Run], efficiency: Efficiency) -> np.ndarray:
    return np.log([_predicted(run, efficiency) for run in runs])


def _slopes(runs: Sequence[Run], at: Efficiency, names: Sequence[str], unit: float) -> np.ndarray:
    """By run and constant, the relative change of the prediction by a relative change of the constant."""
    here = _logarithms(runs, at)
    moved = [_logarithms(runs, _moved(at, (name,), (_NUDGE,), unit)) for name in names]
    return np.stack([(there - here) / _NUDGE for there in moved], axis=1)


def _telling(slopes: np.ndarray) -> tuple[str, ...]:
    """The largest set of CONSTANTS that can be told apart, the first of them rather than the later."""
    positions = range(len(CONSTANTS))
    for size in range(min(len(CONSTANTS), len(slopes)), 0, -1):
        for chosen in combinations(positions, size):
            if all(_own_share(slopes[:, chosen], index) >= TELLING_SHARE for index in range(size)):
                return tuple(CONSTANTS[position] for position in chosen)
    return ()


def _own_share(slopes: np.ndarray, index: int) -> float:
    """Root mean square of a column, less what the others can make of it."""
    column, others = slopes[:, index], np.delete(slopes, index, axis=1)
    left = column - others @ np.linalg.lstsq(others, column, rcond=None)[0] if others.size else column
    return float(np.sqrt(np.mean(left**2)))


def _fitted(runs: Sequence[Run], base: Efficiency, names: Sequence[str], unit: float) -> Efficiency:
    observed = np.log([run.seconds for run in runs])
    values, at = np.zeros(len(names)), base
    for _ in range(_MOST_ITERATIONS):
        errors = _logarithms(runs, at) - observed
        step = np.linalg.lstsq(_slopes(runs, at, names, unit), -errors, rcond=None)[0]
        moved = np.clip(values + np.clip(step, -2, 2), *_bounds(base, names, unit))
        if np.abs(moved - values).max() < 1e-6:
            break
        values, at = moved, _moved(base, names, moved, unit)
    scales = [value for name, value in zip(names, values, strict=True) if name != "step_seconds"]
    if any(abs(value) > math.log(MOST_SCALE) - 1e-6 for value in scales):
        raise PlanError(
            f"observed runs must be within a factor of {MOST_SCALE:g} of their predictions, and are not; "
            "is it the plan that was run, and are these seconds?"
        )
    return at


def _bounds(base: Efficiency, names: Sequence[str], unit: float) -> tuple[list[float], list[float]]:
    most = math.log(MOST_SCALE)
    least = [-base.step_seconds / unit if name == "step_seconds" else -most for name in names]
    return least, [1e6 if name == "step_seconds" else most for name in names]


def runs_from_text(text: str, folder: Path, plan: TrainingPlan | None = None) -> tuple[Run, ...]:
    """The observed runs in a text: metrics lines, a measurement, or a list of plans and seconds.

    Metrics (one JSON object a line, with ``rank_seconds``) are of ``plan``; a measurement has its own. An
    item of a list has ``step_seconds`` or ``cpu_seconds`` and a ``plan``, whole or as a path from ``folder``.
    Raises PlanError for text that is none of these, and where what it holds was not observed.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise PlanError("an observed run must have steps, got an empty text; train at least 3 steps")
    if lines[0].lstrip().startswith("{") and '"rank_seconds"' in lines[0]:
        return (_from_metrics([read_json(line, "a line of metrics") for line in lines], plan),)
    data = read_json(text, "an observed run")
    if plan is not None:
        raise PlanError(
            "a measurement or a list of runs names its own plans, got another; leave the plan out"
        )
    if isinstance(data, dict) and "cpu_seconds_by_rank" in data:
        return (_from_measurement(data),)
    if isinstance(data, list) and data:
        return tuple(_from_item(item, number, folder) for number, item in enumerate(data))
    raise PlanError(
        "observed runs must be lines of metrics, a measurement, or a list of objects with a plan and "
        f"step_seconds, got {shown(data)}"
    )


def _from_metrics(lines: Sequence[Any], plan: TrainingPlan | None) -> Run:
    if plan is None:
        raise PlanError("metrics do not say what was run, got no plan; name the plan's file beside them")
    if any(not isinstance(line, dict) for line in lines):
        raise PlanError("each line of metrics must be a JSON object, got something else")
    clock = lines[0].get("rank_clock")
    if clock not in REAL_CLOCKS:
        raise PlanError(
            f"metrics must have been taken by the host's or a device's clock, got {shown(clock)}, on which "
            "simulated ranks count other seconds; give the run's measurement.json, which has CPU seconds"
        )
    return Run(plan=plan, seconds=_typical([line.get("rank_seconds") for line in lines]))


def _from_measurement(data: Mapping[str, Any]) -> Run:
    if not isinstance(data.get("plan"), dict):
        raise PlanError("a measurement must hold its plan, got none; train the plan again")
    plan = plan_from_json(json.dumps(data["plan"]))
    if data.get("clock") not in REAL_CLOCKS:
        return Run(plan=plan, seconds=_total(data["cpu_seconds_by_rank"]), quantity="cpu_seconds")
    return Run(plan=plan, seconds=_typical(data.get("seconds")))


def _from_item(item: Any, number: int, folder: Path) -> Run:
    if not isinstance(item, dict) or "plan" not in item or len(item) != 2:
        raise PlanError(
            f"run {number} must be an object with a plan and step_seconds or cpu_seconds, got {shown(item)}"
        )
    (quantity,) = item.keys() - {"plan"}
    if quantity not in ("step_seconds", "cpu_seconds"):
        raise PlanError(f"run {number} must have step_seconds or cpu_seconds, got {shown(quantity)}")
    made = item["plan"]
    plan = load_plan(folder / made) if isinstance(made, str) else plan_from_json(json.dumps(made))
    return Run(plan=plan, seconds=_total([item[quantity]]), quantity=quantity)


def _typical(seconds: Any) -> float:
    """Median over the steps but the first, which warms up."""
    if not isinstance(seconds, list) or not all(map(is_positive, seconds)):
        raise PlanError(f"seconds of steps must be positive numbers, got {shown(seconds)}")
    if len(seconds) < 2:
        raise PlanError(
            f"an observed run must have at least 2 steps, since the first warms up, got {len(seconds)}; "
            "train for longer"
        )
    return float(median(seconds[1:]))


def _total(seconds: Any) -> float:
    if not isinstance(seconds, list) or not seconds or not all(map(is_positive, seconds)):
        raise PlanError(f"seconds must be positive numbers, got {shown(seconds)}")
    return math.fsum(seconds)
