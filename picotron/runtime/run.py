"""Runs a plan on a backend and brings back what was measured, in the planner's own types."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, cast

import numpy as np
from attrs import evolve, field, frozen

from picotron.errors import PlanError
from picotron.planner.faults import check_faults
from picotron.planner.memory import MemoryTimeline
from picotron.planner.plan import TrainingPlan
from picotron.planner.prices import plan_price
from picotron.planner.simulate import check_place
from picotron.planner.timeline import Timeline, make_timeline
from picotron.planner.validators import is_positive
from picotron.runtime.backend import Backend
from picotron.runtime.compiled import missing_compiler
from picotron.runtime.data import Dataset, byte_text, step_batches
from picotron.runtime.foreign import Modules, check_modules
from picotron.runtime.layout import WeightSource
from picotron.runtime.pipeline import Session, StepResult

RUNNABLE_FAMILIES = ("llama", "qwen2", "qwen3", "gpt2")
RUNNABLE_PRECISIONS = ("fp32", "fp64", "bf16")
RUNNABLE_SCALINGS = ("linear", "llama3")
MEMORY_REPEATS = 3  # steps whose memory is measured where a backend has threads of its own

Observer = Callable[[Session, StepResult], None]


@frozen(kw_only=True)
class Measurement:
    """What a run did. Per-step tuples run over its steps; the rest is of its ``measured_step``.

    ``seconds`` of a step are those of the rank that took longest.
    ``clock`` says what ``seconds`` and ``timeline`` count: "virtual" (the plan's own seconds, which must be
    the predicted ones), "virtual cpu" (CPU seconds of each rank, as if it had a core of its own), "host", or
    "device" (a GPU's own, from the events that it passed).
    ``payload_bytes_by_rank`` and ``memory`` have the types that the prediction has; ``rows_by_rank`` are the
    rows each rank executed, in order. ``skipped`` are the steps that changed nothing, as their loss or
    gradient norm was not finite. The CPU seconds are of a typical step: the median of those that were
    neither the first nor measured.
    """

    plan: TrainingPlan = field(repr=False)
    backend: str
    clock: str
    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    tokens: tuple[int, ...]
    seconds: tuple[float, ...]
    measured_step: int
    cpu_seconds_by_rank: tuple[float, ...]
    payload_bytes_by_rank: tuple[tuple[tuple[str, str, int], ...], ...] = field(repr=False)
    rows_by_rank: tuple[tuple[int, ...], ...] = field(repr=False)
    memory: tuple[MemoryTimeline, ...] = field(repr=False)
    timeline: Timeline = field(repr=False)
    skipped: tuple[int, ...] = ()


def unsupported(plan: TrainingPlan, backend: str = "simulated") -> tuple[str, ...]:
    """What of ``plan`` this runtime cannot execute yet, one line each; empty if it can."""
    model, found = plan.model, []
    if model.family not in RUNNABLE_FAMILIES:
        found.append(f"the family {model.family} (runnable: {', '.join(RUNNABLE_FAMILIES)})")
    if plan.workload.precision not in RUNNABLE_PRECISIONS:
        found.append(f"precision {plan.workload.precision} (runnable: {', '.join(RUNNABLE_PRECISIONS)})")
    activation = "silu" if model.gated_mlp else "gelu_tanh"
    if model.activation != activation and model.family in RUNNABLE_FAMILIES:
        found.append(f"activation {model.activation} in {model.family} (runnable: {activation})")
    if model.rope_scaling is not None and model.rope_scaling.kind not in RUNNABLE_SCALINGS:
        found.append(f"rope scaling {model.rope_scaling.kind} (runnable: {', '.join(RUNNABLE_SCALINGS)})")
    if plan.compile and (lacking := missing_compiler("cuda" if backend == "nccl" else "cpu")):
        found.append(f"compile=True without {lacking} (runnable: compile=False)")
    if backend not in ("simulated", "gloo", "nccl"):
        found.append(f"the backend {backend} (runnable: simulated, gloo, nccl)")
    return tuple(found)


def check_runnable(plan: TrainingPlan, backend: str = "simulated") -> None:
    """Raise PlanError, before anything opens, for a plan that cannot run."""
    missing = unsupported(plan, backend)
    if missing:
        raise PlanError(f"this plan can be priced but not run yet: {'; '.join(missing)}")


def run(
    plan: TrainingPlan,
    data: Dataset | str | Path,
    *,
    steps: int,
    backend: str | Backend = "simulated",
    weights: WeightSource | None = None,
    modules: Modules | None = None,
    on_step: Observer | None = None,
    measure_step: int = 1,
    seed: int = 0,
    **world: Any,
) -> Measurement:
    """Train ``plan`` for ``steps`` steps on ``data`` (a dataset, or a path to text read as bytes).

    ``backend``: "simulated" runs all ranks in this process, "gloo" and "nccl" this process's rank under
    torchrun, or a backend that is open already. Of simulated ranks, ``seed`` draws who goes next, and
    ``world`` says the rest (faults, semantics, ...) in the words of ``runtime.world.World``; their clock
    takes the plan's own seconds unless it is told otherwise. ``modules``: by name, what computes the plan's
    foreign segments. ``on_step`` is called on every rank after each
    step. Step ``measure_step`` (or the last, if there are fewer) has its memory measured: from the second
    step on, optimizer state stands.
    Raises PlanError for a plan or data that cannot run, ExecutionError when the world departs from the plan.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise PlanError(f"steps must be a whole number of at least 1, got {steps!r}")
    if isinstance(measure_step, bool) or not isinstance(measure_step, int) or measure_step < 0:
        raise PlanError(f"measure_step must be a whole number of at least 0, got {measure_step!r}")
    if not isinstance(plan, TrainingPlan):
        raise PlanError(f"plan must be a TrainingPlan, got {type(plan).__name__}; make one with plan(...)")
    check_runnable(plan, backend if isinstance(backend, str) else "simulated")
    check_modules(plan, modules or {})
    check_simulated(plan, backend, world, steps)
    dataset = byte_text(data, plan.workload.seq_len) if isinstance(data, (str, Path)) else data
    check_data(plan, dataset)
    measured = min(measure_step, steps - 1)

    def rank_main(world: Backend) -> Measurement:
        session = Session(plan, world, weights, modules=modules)
        return run_rank(
            plan, world, dataset, steps=steps, session=session, on_step=on_step, measure_step=measured
        )

    if isinstance(backend, str):
        measurement: Measurement = on_backend(backend, rank_main, plan, seed=seed, **world)
        return measurement
    return rank_main(backend)


def check_simulated(plan: TrainingPlan, backend: object, world: Mapping[str, Any], steps: int) -> None:
    """Raise PlanError where ``world`` asks of real ranks what only simulated ones do, or has idle faults."""
    check_timeout(world.get("timeout_seconds"))
    asked = [name for name, value in world.items() if value and name != "timeout_seconds"]
    if asked and backend != "simulated":
        raise PlanError(f"only simulated ranks take {', '.join(asked)}, got backend {backend!r}")
    for fault in check_faults(world.get("faults", ()), plan.topology.world_size):
        check_place(plan, fault, num_steps=steps)


def check_timeout(seconds: object) -> None:
    """Raise PlanError unless ``seconds`` is None or something to wait for."""
    if seconds is not None and not is_positive(seconds):
        raise PlanError(f"timeout_seconds must be None or a positive finite number, got {seconds!r}")


def on_backend(name: str, rank_main: Callable[[Backend], Any], plan: TrainingPlan, **world: Any) -> Any:
    """What ``rank_main`` returns on rank 0 (simulated) or on this process's rank (torchrun).

    ``world``: of simulated ranks, on a clock to which communication takes what the plan says. Its
    ``timeout_seconds`` is of real ones how long one operation may take (left out: TIMEOUT_SECONDS).
    """
    if name == "simulated":
        from picotron.runtime.simulated import simulate

        return simulate(rank_main, plan.topology.world_size, **{"price": plan_price(plan), **world})[0]
    import torch

    from picotron.runtime.distributed import TIMEOUT_SECONDS, DistributedBackend

    device, timeout_seconds = "cuda" if name == "nccl" else "cpu", world.get("timeout_seconds")
    with DistributedBackend.open(device, timeout_seconds=timeout_seconds or TIMEOUT_SECONDS) as processes:
        if name == "gloo":
            torch.set_num_threads(1)
        return rank_main(processes)


def check_data(plan: TrainingPlan, dataset: Dataset) -> None:
    """Raise PlanError unless ``dataset`` has a sample."""
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise PlanError(f"data must be a dataset or a path to text, got {type(dataset).__name__}")
    if len(dataset) < 1:
        raise PlanError(
            f"the data must hold at least one sample of seq_len {plan.workload.seq_len}, got none; add text"
        )


def run_rank(
    plan: TrainingPlan,
    backend: Backend,
    dataset: Dataset,
    *,
    steps: int,
    session: Session,
    on_step: Observer | None = None,
    measure_step: int = 1,
) -> Measurement:
    """One rank's run of an open session; the measurement, gathered from all ranks, is the same on each."""
    results: list[StepResult] = []
    repeats = MEMORY_REPEATS if backend.capabilities.clock == "host" else 1
    measured: list[StepResult] = []
    for step in range(steps):
        batches = step_batches(
            plan, dataset, consumed=step * plan.workload.global_batch, dp_index=session.where.dp
        )
        watched = measure_step <= step < measure_step + repeats
        if watched:
            backend.barrier()  # as the plan's step, the measured one begins on all ranks at once
        result = session.step(batches, measure_memory=watched)
        measured += [result] if watched else []
        results.append(_light(result))
        if on_step is not None:
            on_step(session, result)
    return _measurement(plan, backend, results, measured)


def _light(result: StepResult) -> StepResult:
    """Without the columns that only one step needs to keep."""
    return evolve(result, entries=(), memory=None)


def _typical_cpu_seconds(results: Sequence[StepResult], measured: Sequence[StepResult]) -> float:
    """Median over the steps that ran undisturbed: not the first, none whose memory was measured."""
    watched = {result.step for result in measured}
    undisturbed = [r.cpu_seconds for r in results[1:] if r.step not in watched]
    return median(undisturbed or [measured[0].cpu_seconds])


def least_memory(timelines: Sequence[MemoryTimeline]) -> MemoryTimeline:
    """The least of several measurements of one step's memory, moment by moment.

    A backend's own threads may let go of a tensor late, which adds to a measurement and never takes away.
    """
    first = timelines[0]
    live_bytes = np.min([timeline.live_bytes for timeline in timelines], axis=0)
    peak_bytes = np.min([timeline.peak_bytes for timeline in timelines], axis=0)
    late = first.max_bytes - int(peak_bytes.max())
    by_category = tuple(
        (name, size - late if name == "activations" else size) for name, size in first.peak_by_category
    )
    return evolve(first, live_bytes=live_bytes, peak_bytes=peak_bytes, peak_by_category=by_category)


def _measurement(
    plan: TrainingPlan, backend: Backend, results: Sequence[StepResult], measured: Sequence[StepResult]
) -> Measurement:
    memory = least_memory([result.memory for result in measured if result.memory is not None])
    own = evolve(measured[0], memory=memory)
    own_seconds = tuple(result.seconds for result in results)
    gathered = backend.gather_objects((own, _typical_cpu_seconds(results, measured), own_seconds))
    reports: list[tuple[StepResult, float, tuple[float, ...]]] = cast(Any, gathered)
    clock = backend.capabilities.clock
    return Measurement(
        plan=plan,
        backend=backend.capabilities.name,
        clock=clock,
        losses=tuple(result.loss for result in results),
        grad_norms=tuple(result.grad_norm for result in results),
        tokens=tuple(result.num_tokens for result in results),
        seconds=tuple(map(max, zip(*(seconds for _, _, seconds in reports), strict=True))),
        measured_step=own.step,
        cpu_seconds_by_rank=tuple(cpu_seconds for _, cpu_seconds, _ in reports),
        payload_bytes_by_rank=tuple(report.payload_bytes for report, *_ in reports),
        rows_by_rank=tuple(tuple(entry[1] for entry in report.entries) for report, *_ in reports),
        memory=tuple(report.memory for report, *_ in reports if report.memory is not None),
        timeline=make_timeline(clock, [entry for report, *_ in reports for entry in report.entries]),
        skipped=tuple(result.step for result in results if result.skipped),
    )
