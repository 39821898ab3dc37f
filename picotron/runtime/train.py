"""The training run: a plan, its data, a folder that keeps everything, and what came of it.

The folder holds ``plan.json``, ``metrics.jsonl`` (one line a step, written at once), ``weights/step-N/`` (a
Hugging Face model folder, whole or absent), ``timeline.json`` (Chrome trace of the measured step) and
``measurement.json``. Nothing in it is overwritten: a run never goes into a folder that holds one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from shutil import rmtree
from typing import Any, TextIO, cast

from attrs import define, field

from picotron.errors import PlanError
from picotron.planner.plan import TrainingPlan
from picotron.planner.program import rows
from picotron.planner.records import write_text
from picotron.planner.serialize import save_plan
from picotron.planner.timeline import chrome_trace
from picotron.planner.topology import coordinate
from picotron.runtime.backend import Backend
from picotron.runtime.data import Dataset
from picotron.runtime.foreign import Modules, check_modules
from picotron.runtime.layout import WeightSource
from picotron.runtime.pipeline import LossError, Session, StepResult
from picotron.runtime.record import finite_or_none, measurement_data
from picotron.runtime.run import (
    Measurement,
    check_data,
    check_runnable,
    check_simulated,
    on_backend,
    run_rank,
)
from picotron.runtime.weights import save_weights

KEPT_WEIGHTS = 2  # folders of weights kept; the newest is complete before an older one goes

Report = Callable[[StepResult, float, float], None]  # result, host seconds of the step, host seconds left


def new_run_folder(parent: str | Path, name: str) -> Path:
    """The first of ``parent/name-1``, ``name-2``, ... that does not exist."""
    number = 1
    while (Path(parent) / f"{name}-{number}").exists():
        number += 1
    return Path(parent) / f"{name}-{number}"


def open_run_folder(folder: Path) -> None:
    """Make ``folder`` ready for a run. Raises PlanError if it holds one or cannot be written."""
    _check_free(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "weights").mkdir(exist_ok=True)
    except OSError as error:
        raise PlanError(f"the run folder must be writable, got {str(folder)!r}: {error.strerror}") from None


def check_request(
    plan: TrainingPlan,
    dataset: Dataset,
    folder: str | Path,
    *,
    steps: int,
    backend: str = "simulated",
    save_every: int = 0,
    modules: Modules | None = None,
) -> None:
    """Raise PlanError for a run that cannot start; nothing is written."""
    check_runnable(plan, backend)
    check_modules(plan, modules or {})
    check_data(plan, dataset)
    for name, value, least in (("steps", steps, 1), ("save_every", save_every, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise PlanError(f"{name} must be a whole number of at least {least}, got {value!r}")
    _check_free(Path(folder))


def _check_free(folder: Path) -> None:
    if (folder / "plan.json").exists():
        raise PlanError(
            f"a run needs a folder of its own, got {str(folder)!r}, which holds one; name another"
        )


def train(
    plan: TrainingPlan,
    dataset: Dataset,
    folder: str | Path,
    *,
    steps: int,
    backend: str = "simulated",
    save_every: int = 0,
    weights: WeightSource | None = None,
    modules: Modules | None = None,
    report: Report | None = None,
    seed: int = 0,
    **world: Any,
) -> Measurement | None:
    """Train ``plan`` for ``steps`` steps into ``folder``; the measurement (None on ranks other than 0).

    Weights are saved every ``save_every`` steps (0: only at the end). More steps in a row without a finite
    loss than the plan's ``max_skipped_steps`` raise LossError after the last good weights have been saved.
    Raises PlanError before anything runs for a plan, data or folder that will not do. ``seed`` and ``world``
    are of simulated ranks, and ``modules`` of foreign segments, as in ``run``.
    """
    check_request(plan, dataset, folder, steps=steps, backend=backend, save_every=save_every, modules=modules)
    check_simulated(plan, backend, world, steps)

    def rank_main(world: Backend) -> Measurement | None:
        return _train_rank(plan, world, dataset, Path(folder), steps, save_every, weights, report, modules)

    measurement: Measurement | None = on_backend(backend, rank_main, plan, seed=seed, **world)
    return measurement


def _train_rank(
    plan: TrainingPlan,
    backend: Backend,
    dataset: Dataset,
    folder: Path,
    steps: int,
    save_every: int,
    weights: WeightSource | None,
    report: Report | None,
    modules: Modules | None = None,
) -> Measurement | None:
    session = Session(plan, backend, weights, modules=modules)
    keeper = _Keeper(folder, plan, steps, save_every, report)
    first = backend.rank == 0
    refusal, keeper.folder = cast(
        tuple[str | None, Path], backend.gather_objects((keeper.open() if first else None, folder))[0]
    )
    if refusal is not None:
        raise PlanError(refusal)
    measure_step = min(1, steps - 1)
    with keeper:
        try:
            measurement = run_rank(
                plan,
                backend,
                dataset,
                steps=steps,
                session=session,
                on_step=keeper.after_step,
                measure_step=measure_step,
            )
        except LossError:
            keeper.save(session)
            raise
        if keeper.saved_step != session.num_steps:
            keeper.save(session)
        if not first:
            return None
        keeper.write_measurement(measurement)
        return measurement


@define
class _Keeper:
    """Writes what a run leaves behind: rank 0 the texts, every rank its part of the weights."""

    folder: Path
    plan: TrainingPlan
    steps: int
    save_every: int
    report: Report | None
    saved_step: int = -1
    began: float = field(factory=time.perf_counter)
    last: float = 0.0
    metrics: TextIO | None = None

    def open(self) -> str | None:
        """Rank 0 opens the folder; what is wrong with it, if anything."""
        try:
            open_run_folder(self.folder)
            (self.folder / "plan.json").open("x").close()  # claimed: no other run may take it
            save_plan(self.plan, self.folder / "plan.json")
            self.metrics = (self.folder / "metrics.jsonl").open("a", encoding="utf-8")
        except PlanError as error:
            return str(error)
        except FileExistsError:
            return (
                f"a run needs a folder of its own, got {str(self.folder)!r}, which another run has just taken"
            )
        except OSError as error:
            return f"the run folder must be writable, got {str(self.folder)!r}: {error.strerror}"
        return None

    def __enter__(self) -> _Keeper:
        self.began = self.last = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        if self.metrics is not None:
            self.metrics.close()

    def after_step(self, session: Session, result: StepResult) -> None:
        """Write the step's line; save weights when it is time."""
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        if self.metrics is not None:
            self.metrics.write(json.dumps(_metrics(session, result, seconds)) + "\n")
            self.metrics.flush()
        if self.report is not None and session.backend.rank == 0:
            done = result.step + 1
            self.report(result, seconds, (now - self.began) / done * (self.steps - done))
        if self.save_every and session.num_steps % self.save_every == 0:
            self.save(session)

    def save(self, session: Session) -> None:
        """Save the weights of the steps done so far; then let go of the oldest beyond KEPT_WEIGHTS."""
        save_weights(session, self.folder / "weights" / f"step-{session.num_steps:06d}")
        self.saved_step = session.num_steps
        if session.backend.rank == 0:
            for old in sorted((self.folder / "weights").glob("step-*"))[:-KEPT_WEIGHTS]:
                rmtree(old)

    def write_measurement(self, measurement: Measurement) -> None:
        """The measured step as a Chrome trace, and the whole measurement."""
        text = json.dumps(
            measurement_data(measurement), sort_keys=True, separators=(",", ":"), allow_nan=False
        )
        write_text(self.folder / "measurement.json", text + "\n", "a measurement")
        write_text(self.folder / "timeline.json", measured_trace(measurement), "a trace")


def _metrics(session: Session, result: StepResult, seconds: float) -> dict[str, float | int | str | None]:
    """One line of metrics.jsonl: ``seconds`` are the host's, ``rank_seconds`` of rank 0's own clock.

    What is not a finite number is null; a step with such a loss or gradient norm has been skipped.
    """
    return {
        "step": result.step,
        "loss": finite_or_none(result.loss),
        "tokens": result.num_tokens,
        "seconds": seconds,
        "grad_norm": finite_or_none(result.grad_norm),
        "skipped": result.skipped,
        "learning_rate": result.learning_rate,
        "rank_seconds": result.seconds,
        "rank_clock": session.backend.capabilities.clock,
    }


def measured_trace(measurement: Measurement) -> str:
    """The measured step as Chrome trace JSON, one process a rank."""
    plan = measurement.plan
    places = [coordinate(plan.topology, rank) for rank in range(plan.topology.world_size)]
    return chrome_trace(measurement.timeline, [rows(plan.program(where.tp), where.pp) for where in places])
