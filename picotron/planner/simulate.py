"""One step of a world of any size, in seconds: as ``predict`` sees it, or with slow and pausing parts.

Only time is simulated, and only one rank of each class of ranks that nothing tells apart. The result is
exact for every rank: to the bit what a simulation of all of them would give.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from attrs import field, frozen

from picotron.errors import PlanError
from picotron.planner.classes import RankClasses, axis_indices, meetings, rank_classes
from picotron.planner.clock import Span
from picotron.planner.cost import StageCost, group_seconds, of_kind, send_seconds, stage_costs
from picotron.planner.faults import (
    Corrupt,
    Fault,
    Kill,
    Pause,
    Slow,
    check_faults,
    compute_factor,
    link_factor,
    ranks_of,
)
from picotron.planner.lanes import Lane, Stream, run_lanes
from picotron.planner.plan import TrainingPlan
from picotron.planner.prices import copy_seconds
from picotron.planner.program import (
    COLLECTIVES,
    COMPUTE,
    COPIES,
    HOST,
    RECEIVES,
    SENDS,
    Kind,
    Program,
    Row,
    rows,
)
from picotron.planner.timeline import STREAMS, Timeline
from picotron.planner.topology import Coordinate, rank_of
from picotron.planner.validators import is_count

MAX_STEP_SECONDS = 1e15
_SUMS = (Kind.REDUCE, Kind.NORM, Kind.COUNT)
_MOVES = (Kind.REDUCE_SCATTER, Kind.ALL_GATHER, Kind.UNSHARD)
_ROW_STREAMS = {
    **dict.fromkeys(SENDS, STREAMS.index("send")),
    **dict.fromkeys(RECEIVES, STREAMS.index("receive")),
    **dict.fromkeys((Kind.REDUCE, *_MOVES), STREAMS.index("collective")),
    **dict.fromkeys(COPIES, STREAMS.index("copy")),
}


@frozen(kw_only=True)
class Durations:
    """Seconds of all that a program does while nothing is wrong; a pure function of plan and program."""

    stages: tuple[StageCost, ...]
    send_seconds: float
    reduce_seconds: Mapping[tuple[str, int], float]  # by (group, payload bytes)
    move_seconds: Mapping[tuple[str, str, int], float] = field(factory=dict)
    """Of sharded state and copies to the host, by (kind, group, payload bytes); what is left out is free."""


def durations(plan: TrainingPlan, tp_index: int = 0) -> Durations:
    """What the rows of tensor-parallel rank ``tp_index`` cost."""
    return Durations(
        stages=stage_costs(plan, tp_index),
        send_seconds=send_seconds(plan, plan.dims(tp_index).local_bytes),
        reduce_seconds={
            (group, size): group_seconds(plan, "all_reduce", group, size)
            for group, size in summed(plan.program(tp_index))
        },
        move_seconds={move: _move_seconds(plan, *move) for move in moved(plan.program(tp_index))},
    )


def _move_seconds(plan: TrainingPlan, kind: str, group: str, payload_bytes: int) -> float:
    return (
        copy_seconds(plan, payload_bytes)
        if group == HOST
        else group_seconds(plan, kind, group, payload_bytes)
    )


def moved(program: Program) -> tuple[tuple[str, str, int], ...]:
    """The (kind, group, payload bytes) of all that moves for sharding and offloading, in sorted order."""
    rows_ = np.flatnonzero(program.is_kind(*_MOVES, *COPIES))
    columns = (program.kind[rows_], program.group[rows_], program.bytes[rows_])
    found = set(zip(*(column.tolist() for column in columns), strict=True))
    return tuple(sorted(_move(program, Kind(kind), group, size) for kind, group, size in found))


def _move(program: Program, kind: Kind, group: int, size: int) -> tuple[str, str, int]:
    if kind in COPIES:
        return COPIES[kind], HOST, size
    return COLLECTIVES[kind], program.groups[group], size


def summed(program: Program) -> tuple[tuple[str, int], ...]:
    """The (group, payload bytes) of all sums outside bodies, each once, in sorted order."""
    of_sums = np.isin(program.kind, _SUMS)
    pairs = set(zip(program.group[of_sums].tolist(), program.bytes[of_sums].tolist(), strict=True))
    return tuple(sorted((program.groups[group], size) for group, size in pairs))


@frozen(kw_only=True)
class SimulatedStep:
    """One step: the rows of one rank of each class, and which class every rank is of.

    ``timeline`` has global ranks, the least of each class. ``compute_seconds``: by class, what a
    rank computes in the step, its update included.
    """

    plan: TrainingPlan = field(repr=False)
    faults: tuple[Fault, ...]
    classes: RankClasses
    compute_seconds: tuple[float, ...]
    timeline: Timeline = field(repr=False)

    @property
    def step_seconds(self) -> float:
        """From the beginning of the step to its last end."""
        return float(self.timeline.end.max())

    @property
    def num_classes(self) -> int:
        """Classes of ranks that differ in time."""
        return len(self.compute_seconds)

    @property
    def idle_seconds(self) -> tuple[float, ...]:
        """By class, how long a rank does not compute: it communicates, waits or pauses."""
        return tuple(self.step_seconds - own for own in self.compute_seconds)

    def class_of(self, rank: int) -> int:
        """The class of ``rank``. Raises PlanError for a rank outside the world."""
        world_size = self.plan.topology.world_size
        if not is_count(rank) or rank >= world_size:
            raise PlanError(f"rank must be in [0, {world_size}), got {rank!r}")
        return self.classes.of_rank[rank]

    def rank_timeline(self, rank: int) -> Timeline:
        """The rows of any rank."""
        whole = self.timeline
        own = whole.rank == self.classes.ranks[self.class_of(rank)]
        columns = {name: getattr(whole, name)[own] for name in ("row", "operation", "stream", "start", "end")}
        return Timeline(clock=whole.clock, rank=np.full_like(whole.rank[own], rank), **columns)


def simulate_step(plan: TrainingPlan, faults: Iterable[Fault] = ()) -> SimulatedStep:
    """One step of ``plan`` with some ranks or links slow, or ranks that pause.

    A ``Pause`` is at (step 0, row). Raises PlanError for other faults, and where the step would take no time
    that can be told.
    """
    if not isinstance(plan, TrainingPlan):
        raise PlanError(f"plan must be a TrainingPlan, got {type(plan).__name__}; make one with plan(...)")
    script = _checked(plan, faults)
    return priced_step(plan, script, {index: durations(plan, index) for index in set(slices(plan))})


def priced_step(
    plan: TrainingPlan,
    faults: tuple[Fault, ...],
    seconds: Mapping[int, Durations],
    classes: RankClasses | None = None,
) -> SimulatedStep:
    """The step at given prices, those of each first tensor-parallel rank in ``slices``.

    ``classes``: those of the ranks where they are known, as of a step of the same plan at other prices.
    """
    classes = _classes(plan, faults, seconds) if classes is None else classes
    lanes = _lanes(plan, faults, classes, seconds)
    timeline = _timeline(classes.ranks, lanes, run_lanes(lanes))
    end = float(timeline.end.max())
    if not 0 < end < MAX_STEP_SECONDS:
        suspects = "the cluster's rates and efficiencies" + " and the faults" * bool(faults)
        raise PlanError(
            f"a step must take between 0 and {MAX_STEP_SECONDS:.0e} seconds, got {end}; look at {suspects}"
        )
    return SimulatedStep(
        plan=plan,
        faults=faults,
        classes=classes,
        compute_seconds=tuple(map(_compute_seconds, lanes)),
        timeline=timeline,
    )


def simulate_program(program: Program, seconds: Durations) -> Timeline:
    """The timeline of a program by itself, with one rank a pipeline rank.

    Raises PlanError where ranks wait for each other.
    """
    everybody = tuple(range(program.num_ranks))
    shared = {"world": everybody, "embedding": tuple(sorted({everybody[0], everybody[-1]}))}
    lanes = [
        Lane(
            **_own_rows(program, rank, seconds),
            communicators={
                name: Stream(name, shared.get(name, (rank,)))
                for name in (*program.groups, *sorted(_body_groups(seconds)))
            },
            peers={peer: (peer, 1.0) for peer in everybody},
        )
        for rank in everybody
    ]
    return _timeline(everybody, lanes, run_lanes(lanes))


def slices(plan: TrainingPlan) -> tuple[int, ...]:
    """For each tensor-parallel rank, the first with a slice of the vocabulary as large: it costs the same."""
    sizes = [plan.dims(index).vocab for index in range(plan.topology.tp)]
    return tuple(sizes.index(size) for size in sizes)


def pipeline_timeline(step: SimulatedStep) -> Timeline:
    """The rows of one rank of each stage, the first along every other axis, by pipeline rank."""
    topology = step.plan.topology
    parts = [step.rank_timeline(rank_of(topology, Coordinate(pp=stage))) for stage in range(topology.pp)]
    columns = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ("row", "operation", "stream", "start", "end")
    }
    ranks = np.repeat(np.arange(topology.pp), [len(part.row) for part in parts])
    return Timeline(clock=step.timeline.clock, rank=ranks, **columns)


def _checked(plan: TrainingPlan, faults: Iterable[Fault]) -> tuple[Fault, ...]:
    script = check_faults(faults, plan.topology.world_size)
    for fault in script:
        if not isinstance(fault, Slow | Pause):
            raise PlanError(
                f"{type(fault).__name__} needs a run: use run(plan, ..., faults=...); "
                "a step of which only the time is simulated takes Slow and Pause"
            )
        if isinstance(fault, Pause):
            check_place(plan, fault, num_steps=1)
    return script


def check_place(plan: TrainingPlan, fault: Fault, *, num_steps: int) -> None:
    """Raise PlanError for a fault at a row, or in a step, that its rank never comes to."""
    if not isinstance(fault, Kill | Pause | Corrupt):
        return
    if fault.step >= num_steps:
        raise PlanError(f"the step of a fault must be in [0, {num_steps}), got {fault}")
    stage = axis_indices(plan.topology)["pp"][fault.rank]
    offsets = plan.program().offsets
    num_rows = offsets[stage + 1] - offsets[stage]
    if fault.at >= num_rows:
        raise PlanError(f"rank {fault.rank} has rows 0 to {num_rows - 1}, got {fault}")


def _classes(plan: TrainingPlan, faults: tuple[Fault, ...], seconds: Mapping[int, Durations]) -> RankClasses:
    """Ranks are told apart by stage, slice of the vocabulary, and what faults do to them."""
    topology, own_slice = plan.topology, slices(plan)
    indices = axis_indices(topology)
    linked = {rank for fault in faults if isinstance(fault, Slow) and fault.link for rank in fault.link}
    touched = {
        rank: (
            compute_factor(faults, rank),
            tuple(_pauses(faults, rank).items()),
            rank if rank in linked else -1,
        )
        for fault in faults
        for rank in ranks_of(fault)
    }
    healthy = (1.0, (), -1)
    marks = [
        (stage, own_slice[tp], touched.get(rank, healthy))
        for rank, (stage, tp) in enumerate(zip(indices["pp"], indices["tp"], strict=True))
    ]
    names = {"pp", *plan.program().groups}.union(*map(_body_groups, seconds.values()))
    return rank_classes(topology, sorted(names), marks)


def _pauses(faults: tuple[Fault, ...], rank: int) -> dict[int, tuple[float, ...]]:
    """The pauses of a rank by row, in the order of the script."""
    found: dict[int, tuple[float, ...]] = {}
    for fault in faults:
        if isinstance(fault, Pause) and fault.rank == rank:
            found[fault.at] = (*found.get(fault.at, ()), fault.seconds)
    return dict(sorted(found.items()))


def _body_groups(seconds: Durations) -> set[str]:
    """Groups of the collectives inside bodies."""
    return {
        collective.group
        for stage in seconds.stages
        for kind in COMPUTE
        for segment in of_kind(stage, kind)
        for collective in segment.collectives
    }


def _lanes(
    plan: TrainingPlan, faults: tuple[Fault, ...], classes: RankClasses, seconds: Mapping[int, Durations]
) -> list[Lane]:
    """One lane a class: the rows of its least rank, and the classes in the groups of that rank."""
    indices, own_slice = axis_indices(plan.topology), slices(plan)
    communicators: list[dict[str, Stream]] = [{} for _ in classes.ranks]
    for name in classes.groups:
        for group, numbers in meetings(classes, name):
            joined = tuple(sorted({classes.of_rank[rank] for rank in group}))
            stream = Stream(name, joined, link_factor(faults, group))
            for number in numbers:
                communicators[number][name] = stream
    pipes = {number: pipe for pipe, numbers in meetings(classes, "pp") for number in numbers}
    shared: dict[tuple[int, int], dict[str, Any]] = {}
    lanes = []
    for number, rank in enumerate(classes.ranks):
        place = stage, index = indices["pp"][rank], own_slice[indices["tp"][rank]]
        if place not in shared:
            shared[place] = _own_rows(plan.program(index), stage, seconds[index])
        lanes.append(
            Lane(
                **shared[place],
                factor=compute_factor(faults, rank),
                communicators=communicators[number],
                peers={
                    pp: (classes.of_rank[peer], link_factor(faults, (rank, peer)))
                    for pp, peer in enumerate(pipes[number])
                },
                pauses=_pauses(faults, rank),
            )
        )
    return lanes


def _own_rows(program: Program, rank: int, seconds: Durations) -> dict[str, Any]:
    """What a lane has from its program: rows and their seconds, stages and update."""
    own = rows(program, rank)
    stages = sorted({row.stage for row in own if row.kind in COMPUTE})

    def moving(row: Row) -> float:
        if row.kind in _SUMS:
            return seconds.reduce_seconds[program.groups[row.group], row.bytes]
        if row.kind in _MOVES or row.kind in COPIES:
            return seconds.move_seconds.get(_move(program, row.kind, row.group, row.bytes), 0.0)
        return seconds.send_seconds if row.kind in _ROW_STREAMS else 0.0

    return {
        "rows": own,
        "group_names": program.groups,
        "seconds": tuple(map(moving, own)),
        "stages": {stage: seconds.stages[stage] for stage in stages},
        "update_seconds": sum(seconds.stages[stage].update_seconds for stage in stages),
    }


def _compute_seconds(lane: Lane) -> float:
    counts = Counter((row.stage, row.kind) for row in lane.rows if row.kind in COMPUTE)
    computed = sum(
        lane.stages[stage].compute_seconds(kind) * count for (stage, kind), count in counts.items()
    )
    return (computed + lane.update_seconds) * lane.factor


def _timeline(ranks: Sequence[int], lanes: Sequence[Lane], spans: Sequence[Sequence[Span]]) -> Timeline:
    """The rows of each lane under the name of its rank; ``ranks`` ascend."""
    counts = [len(lane.rows) for lane in lanes]
    streams = [_ROW_STREAMS.get(row.kind, 0) for lane in lanes for row in lane.rows]
    start, end = np.array([span for own in spans for span in own], dtype=np.float64).T
    return Timeline(
        clock="predicted",
        rank=np.repeat(np.array(ranks, dtype=np.int64), counts),
        row=np.concatenate([np.arange(count, dtype=np.int64) for count in counts]),
        operation=np.full(sum(counts), -1, dtype=np.int64),
        stream=np.array(streams, dtype=np.int64),
        start=start.copy(),
        end=end.copy(),
    )
