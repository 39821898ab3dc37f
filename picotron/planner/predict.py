"""What a plan will do: step time, rates, bubble, communication and memory, before anything runs."""

from __future__ import annotations

from attrs import evolve, field, frozen

from picotron.errors import PlanError
from picotron.planner.body import collective_bytes
from picotron.planner.cluster import peak_flops_per_second
from picotron.planner.cost import SegmentCost
from picotron.planner.flops import AttentionCount, backward_flops, forward_flops
from picotron.planner.memory import MemoryTimeline, memory_timeline
from picotron.planner.plan import TrainingPlan
from picotron.planner.program import Kind, Program, payload_bytes, rows
from picotron.planner.timeline import Durations, Timeline, bubble_seconds, durations, simulate_program
from picotron.planner.topology import Coordinate, coordinate

SECONDS_PER_DAY = 86_400
MAX_STEP_SECONDS = 1e15


@frozen(kw_only=True)
class Prediction:
    """The prediction of one step. Rates are of the whole cluster unless they say per device.

    ``mfu`` counts model FLOPs with full attention over the dense peak, ``mfu_causal`` with the causal half of
    it, ``hfu`` what the plan really executes (causal kernels, flash attention's second scores).
    ``bubble_fraction`` is the schedule's own idle share, averaged over pipeline ranks, transfers free.
    ``exposed_communication_seconds`` is what the step would gain if all communication were free.
    ``payload_bytes_by_rank`` counts what each rank hands over in a step, by (kind, group).
    """

    plan: TrainingPlan = field(repr=False)
    step_seconds: float
    tokens_per_second: float
    tokens_per_second_per_device: float
    mfu: float
    mfu_causal: float
    hfu: float
    bubble_seconds: tuple[float, ...]
    bubble_fraction: float
    exposed_communication_seconds: float
    compute_seconds_by_rank: tuple[float, ...]
    memory_by_rank: tuple[int, ...]
    peak_memory_bytes: int
    peak_memory_rank: int
    memory_by_category: tuple[tuple[str, int], ...]
    capacity_bytes: int
    misfits: tuple[str, ...]
    payload_bytes_by_rank: tuple[tuple[tuple[str, str, int], ...], ...] = field(repr=False)
    timeline: Timeline = field(repr=False)

    @property
    def fits(self) -> bool:
        """Whether every rank's peak is within the device's memory."""
        return not self.misfits

    @property
    def margin_bytes(self) -> int:
        """What the fullest rank has left; negative if it does not fit."""
        return self.capacity_bytes - self.peak_memory_bytes


def predict(plan: TrainingPlan) -> Prediction:
    """The prediction for one step of ``plan`` in the steady state.

    Raises PlanError for what is no plan, or where the cluster's numbers give no time that can be told.
    """
    if not isinstance(plan, TrainingPlan):
        raise PlanError(f"plan must be a TrainingPlan, got {type(plan).__name__}; make one with plan(...)")
    program = plan.program()
    seconds = durations(plan, program)
    timeline = simulate_program(program, seconds)
    step_seconds = timeline.makespan_seconds
    if not 0 < step_seconds < MAX_STEP_SECONDS:
        raise PlanError(
            f"a step must take between 0 and {MAX_STEP_SECONDS:.0e} seconds, got {step_seconds}; "
            "look at the cluster's rates and efficiencies"
        )
    tokens = plan.workload.global_batch * plan.workload.seq_len
    bubbles = bubble_seconds(plan.schedule, seconds.stages)
    work = _compute_seconds(plan, seconds)
    memory = _memory_by_rank(plan)
    fullest = max(range(len(memory)), key=lambda rank: memory[rank].max_bytes)
    peak = peak_flops_per_second(plan.cluster.device, plan.workload.precision) * plan.cluster.num_devices
    return Prediction(
        plan=plan,
        step_seconds=step_seconds,
        tokens_per_second=tokens / step_seconds,
        tokens_per_second_per_device=tokens / step_seconds / plan.topology.world_size,
        mfu=model_flops(plan, "full") / step_seconds / peak,
        mfu_causal=model_flops(plan, "causal") / step_seconds / peak,
        hfu=_executed_flops(plan) / step_seconds / peak,
        bubble_seconds=bubbles,
        bubble_fraction=_bubble_fraction(plan, seconds, bubbles),
        exposed_communication_seconds=step_seconds - _without_communication(program, seconds),
        compute_seconds_by_rank=tuple(
            work[coordinate(plan.topology, r).pp] for r in range(plan.topology.world_size)
        ),
        memory_by_rank=tuple(timeline.max_bytes for timeline in memory),
        peak_memory_bytes=memory[fullest].max_bytes,
        peak_memory_rank=fullest,
        memory_by_category=memory[fullest].peak_by_category,
        capacity_bytes=plan.cluster.device.memory_bytes,
        misfits=_misfits(plan, memory),
        payload_bytes_by_rank=planned_payloads(plan),
        timeline=timeline,
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
    ranks_a_stage = plan.topology.world_size // plan.topology.pp
    per_microbatch = sum(body.flops for stage in range(plan.topology.pp) for body in plan.bodies(stage))
    return per_microbatch * plan.num_microbatches * ranks_a_stage


def _compute_seconds(plan: TrainingPlan, seconds: Durations) -> list[float]:
    return [stage.compute_seconds * plan.num_microbatches + stage.update_seconds for stage in seconds.stages]


def _bubble_fraction(plan: TrainingPlan, seconds: Durations, bubbles: tuple[float, ...]) -> float:
    stage = seconds.stages[0]
    makespan = bubbles[0] + plan.num_microbatches * (stage.forward_seconds + stage.backward_seconds)
    return sum(bubbles) / len(bubbles) / makespan


def _without_communication(program: Program, seconds: Durations) -> float:
    """Makespan with every transfer and collective free."""

    def free(costs: tuple[SegmentCost, ...]) -> tuple[SegmentCost, ...]:
        return tuple(evolve(segment, communication_seconds=0.0) for segment in costs)

    stages = tuple(
        evolve(stage, forward=free(stage.forward), backward=free(stage.backward)) for stage in seconds.stages
    )
    reductions = dict.fromkeys(seconds.reduce_seconds, 0.0)
    return simulate_program(
        program, Durations(stages=stages, send_seconds=0.0, reduce_seconds=reductions)
    ).makespan_seconds


def _memory_by_rank(plan: TrainingPlan) -> tuple[MemoryTimeline, ...]:
    """One timeline a rank, shared by ranks of equal stage and slices.

    Among those, the gradient norm's scratch differs by a few bytes for each tensor; no other moment does.
    """
    found: dict[tuple[int, int, int], MemoryTimeline] = {}
    out = []
    for rank in range(plan.topology.world_size):
        _, key = _alike(plan, rank)
        if key not in found:
            found[key] = memory_timeline(plan, rank)
        out.append(found[key])
    return tuple(out)


def _misfits(plan: TrainingPlan, memory: tuple[MemoryTimeline, ...]) -> tuple[str, ...]:
    """One line for each stage that exceeds the device: by how much, and what takes most."""
    capacity = plan.cluster.device.memory_bytes
    lines: dict[int, str] = {}
    for rank, timeline in enumerate(memory):
        if timeline.max_bytes > capacity:
            stage = coordinate(plan.topology, rank).pp
            name, size = max(timeline.peak_by_category, key=lambda item: item[1])
            lines.setdefault(
                stage,
                f"stage {stage} needs {timeline.max_bytes / 2**30:.2f} GiB of {capacity / 2**30:.2f}: "
                f"{(timeline.max_bytes - capacity) / 2**30:.2f} too much, "
                f"most of it {name} ({size / 2**30:.2f} GiB)",
            )
    return tuple(lines.values())


def planned_payloads(plan: TrainingPlan) -> tuple[tuple[tuple[str, str, int], ...], ...]:
    """For each rank, (kind, group, bytes) that it hands over in one step, in sorted order."""
    found: dict[tuple[int, int, int], tuple[tuple[str, str, int], ...]] = {}
    out = []
    for rank in range(plan.topology.world_size):
        where, key = _alike(plan, rank)
        if key not in found:
            found[key] = _payload(plan, where)
        out.append(found[key])
    return tuple(out)


def _alike(plan: TrainingPlan, rank: int) -> tuple[Coordinate, tuple[int, int, int]]:
    """Where ``rank`` sits, and what it shares with the ranks whose stage and slices are the same."""
    where = coordinate(plan.topology, rank)
    even = plan.model.vocab_size % plan.topology.tp == 0
    return where, (where.pp, 0 if even else where.tp, where.ep)


def _payload(plan: TrainingPlan, where: Coordinate) -> tuple[tuple[str, str, int], ...]:
    program = plan.program(where.tp)
    totals = payload_bytes(program, where.pp)
    counts = {
        kind: sum(row.kind is kind for row in rows(program, where.pp))
        for kind in (Kind.FORWARD, Kind.BACKWARD)
    }
    for body, kind in zip(plan.bodies(where.pp, where.tp), counts, strict=True):
        for key, size in collective_bytes(body).items():
            totals[key] = totals.get(key, 0) + size * counts[kind]
    return tuple(sorted((kind, group, size) for (kind, group), size in totals.items()))
