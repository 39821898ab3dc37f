"""What a plan will do: step time, rates, bubble, communication and memory, before anything runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from attrs import evolve, field, frozen

from picotron.errors import PlanError
from picotron.planner.beyond import beyond_program
from picotron.planner.causes import runs, step_causes, summing_to
from picotron.planner.classes import RankClasses
from picotron.planner.cluster import peak_flops_per_second
from picotron.planner.cost import SegmentCost, StageCost, of_kind
from picotron.planner.flops import AttentionCount, backward_flops, forward_flops
from picotron.planner.interval import Interval, known_interval
from picotron.planner.plan import TrainingPlan
from picotron.planner.program import COMPUTE
from picotron.planner.rank_bytes import bytes_by_rank, misfits
from picotron.planner.rank_bytes import planned_payloads as planned_payloads
from picotron.planner.schedule_times import bubble_fraction, idle_seconds, schedule_times
from picotron.planner.simulate import Durations, durations, pipeline_timeline, priced_step, slices
from picotron.planner.timeline import Timeline, pipeline_costs

SECONDS_PER_DAY = 86_400


@frozen(kw_only=True)
class Prediction:
    """The prediction of one step. Rates are of the whole cluster unless they say per device.

    ``mfu`` counts model FLOPs with full attention over the dense peak, ``mfu_causal`` with the causal half of
    it, ``hfu`` what the plan really executes (causal kernels, flash attention's second scores).
    ``bubble_fraction`` is the schedule's own idle share, averaged over pipeline ranks, transfers free.
    ``exposed_communication_seconds`` is what the step would gain if all communication were free.
    ``payload_bytes_by_rank`` counts what each rank hands over in a step, by (kind, group).
    ``interval`` is how far known runs were off, None where none are known. ``seconds_by_cause`` sum to the
    step (``causes``).

    On accelerators ``step_seconds`` is longer than the ``timeline``: by what no row of the program has
    (``beyond``), such as computing slowed by transfers beside it.

    ``memory_by_rank`` are the tensors of each rank at its highest moment. A device also holds what its
    framework takes and what fragmentation wastes, both nothing on a CPU: ``reserved_by_rank`` is all of it,
    and what decides whether a plan fits. ``peak_memory_rank`` is the rank that reserves most;
    ``peak_memory_bytes`` and ``memory_by_category`` are its tensors.
    """

    plan: TrainingPlan = field(repr=False)
    step_seconds: float
    interval: Interval | None
    tokens_per_second: float
    tokens_per_second_per_device: float
    mfu: float
    mfu_causal: float
    hfu: float
    bubble_seconds: tuple[float, ...]
    bubble_fraction: float
    exposed_communication_seconds: float
    compute_seconds_by_rank: tuple[float, ...] = field(repr=False)
    seconds_by_cause: tuple[tuple[str, float], ...]
    memory_by_rank: tuple[int, ...] = field(repr=False)
    reserved_by_rank: tuple[int, ...] = field(repr=False)
    peak_memory_bytes: int
    peak_memory_rank: int
    memory_by_category: tuple[tuple[str, int], ...]
    framework_bytes: int
    fragmentation_bytes: int
    capacity_bytes: int
    misfits: tuple[str, ...]
    payload_bytes_by_rank: tuple[tuple[tuple[str, str, int], ...], ...] = field(repr=False)
    timeline: Timeline = field(repr=False)

    def __str__(self) -> str:
        from picotron.planner.draw import draw_prediction

        return draw_prediction(self)

    @property
    def step_seconds_range(self) -> tuple[float, float] | None:
        """Between which seconds half of the known runs would be."""
        return self.interval.half_range(self.step_seconds) if self.interval else None

    @property
    def wide_step_seconds_range(self) -> tuple[float, float] | None:
        """Between which seconds 80 % of them would be."""
        return self.interval.most_range(self.step_seconds) if self.interval else None

    @property
    def reserved_bytes(self) -> int:
        """All that the fullest rank's device holds: tensors, framework and fragmentation."""
        return self.peak_memory_bytes + self.framework_bytes + self.fragmentation_bytes

    @property
    def fits(self) -> bool:
        """Whether all that every rank holds is within the device's memory."""
        return not self.misfits

    @property
    def margin_bytes(self) -> int:
        """What the fullest rank has left; negative if it does not fit."""
        return self.capacity_bytes - self.reserved_bytes


def predict(plan: TrainingPlan) -> Prediction:
    """The prediction for one step of ``plan`` in the steady state.

    Raises PlanError for what is no plan, or where the cluster's numbers give no time that can be told.
    """
    if not isinstance(plan, TrainingPlan):
        raise PlanError(f"plan must be a TrainingPlan, got {type(plan).__name__}; make one with plan(...)")
    seconds = {index: durations(plan, index) for index in set(slices(plan))}
    step = priced_step(plan, (), seconds)
    causes = dict(step_causes(plan, step, seconds))
    beyond = beyond_program(plan, causes)
    step_seconds = step.step_seconds + sum(beyond.values())
    tokens = plan.workload.global_batch * plan.workload.seq_len
    costs = pipeline_costs(seconds[0].stages)
    spans = schedule_times(plan.schedule, costs)
    held = bytes_by_rank(plan)
    reserved = tuple(own.reserved_bytes for own in held)
    fullest = max(range(len(held)), key=reserved.__getitem__)
    peak = peak_flops_per_second(plan.cluster.device, plan.format.product) * plan.cluster.num_devices
    return Prediction(
        plan=plan,
        step_seconds=step_seconds,
        interval=known_interval(plan.cluster, experts=plan.model.experts is not None),
        tokens_per_second=tokens / step_seconds,
        tokens_per_second_per_device=tokens / step_seconds / plan.topology.world_size,
        mfu=model_flops(plan, "full") / step_seconds / peak,
        mfu_causal=model_flops(plan, "causal") / step_seconds / peak,
        hfu=_executed_flops(plan) / step_seconds / peak,
        bubble_seconds=idle_seconds(plan.schedule, costs, spans),
        bubble_fraction=bubble_fraction(plan.schedule, costs, spans),
        exposed_communication_seconds=step.step_seconds
        + beyond.get("data", 0.0)
        - _seconds_without_communication(plan, seconds, step.classes),
        compute_seconds_by_rank=tuple(step.compute_seconds[number] for number in step.classes.of_rank),
        seconds_by_cause=summing_to(
            step_seconds, {cause: value + beyond.get(cause, 0.0) for cause, value in causes.items()}
        ),
        memory_by_rank=tuple(own.peak_bytes for own in held),
        reserved_by_rank=reserved,
        peak_memory_bytes=held[fullest].peak_bytes,
        peak_memory_rank=fullest,
        memory_by_category=held[fullest].tensors.peak_by_category,
        framework_bytes=held[fullest].framework_bytes,
        fragmentation_bytes=held[fullest].fragmentation_bytes,
        capacity_bytes=plan.cluster.device.memory_bytes,
        misfits=misfits(plan, held),
        payload_bytes_by_rank=planned_payloads(plan),
        timeline=pipeline_timeline(step),
    )


def model_flops(plan: TrainingPlan, attention: AttentionCount) -> int:
    """FLOPs of the model in one step, forward and backward, without recomputation."""
    batch, seq_len = plan.workload.global_batch, plan.workload.seq_len
    return sum(
        count(plan.model, batch=batch, seq_len=seq_len, attention=attention)
        for count in (forward_flops, backward_flops)
    )


def _executed_flops(plan: TrainingPlan) -> int:
    """What all ranks execute in a step: a stage's bodies on each of its ranks."""
    program, per_pipeline = plan.program(), 0
    for index, num_ranks in Counter(slices(plan)).items():
        bodies = [plan.bodies(stage, index) for stage in range(plan.num_stages)]
        for rank in range(program.num_ranks):
            for (stage, kind), count in runs(program, rank).items():
                per_pipeline += of_kind(bodies[stage], kind).flops * count * num_ranks
    return per_pipeline * plan.topology.dp * plan.topology.cp


def _seconds_without_communication(
    plan: TrainingPlan, seconds: Mapping[int, Durations], classes: RankClasses
) -> float:
    """The step with every transfer and collective free."""
    free = {index: _without_communication(own) for index, own in seconds.items()}
    return priced_step(plan, (), free, classes).step_seconds


def _without_communication(seconds: Durations) -> Durations:
    def free(segment: SegmentCost) -> SegmentCost:
        collectives = tuple(evolve(collective, seconds=0.0) for collective in segment.collectives)
        return evolve(segment, collectives=collectives)

    def phases(stage: StageCost) -> dict[str, Any]:
        return {kind.name.lower(): tuple(map(free, of_kind(stage, kind))) for kind in COMPUTE}

    stages = [evolve(stage, **phases(stage)) for stage in seconds.stages]
    reductions = dict.fromkeys(seconds.reduce_seconds, 0.0)
    return Durations(stages=tuple(stages), send_seconds=0.0, reduce_seconds=reductions)
