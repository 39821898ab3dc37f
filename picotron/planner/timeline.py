"""Discrete-event simulation of a program: when every row starts and ends.

A rank has a compute stream, on which its rows run in order, and a collective stream for bucket reductions;
each (pair, direction) has a channel. A transfer starts when both ends are posted and the channel is free; a
reduction, in posting order, when all its members have come to it and their collective streams are free. WAIT
holds the compute stream until its target has ended. Nothing else blocks, so the result does not depend on
who goes first.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from attrs import cmp_using, field, frozen

from picotron.errors import PlanError
from picotron.planner.cost import StageCost, group_seconds, send_seconds, stage_cost
from picotron.planner.pipeline import Schedule
from picotron.planner.plan import TrainingPlan
from picotron.planner.program import (
    COMPUTE,
    RECEIVES,
    SENDS,
    Kind,
    Program,
    Row,
    anchored,
    matching_sends,
    rows,
)

STREAMS = ("compute", "send", "receive", "collective")

_array: Any = field(eq=cmp_using(eq=np.array_equal), repr=False)


@frozen(kw_only=True)
class Timeline:
    """When rows ran, predicted or measured alike; ``clock`` says which kind of seconds these are.

    Columns over all rows: ``rank`` (pipeline rank when predicted, global rank when measured), ``row``,
    ``operation`` (-1: the row itself), ``stream`` (index into STREAMS), ``start`` and ``end`` in seconds
    since the step began.
    """

    clock: str
    rank: np.ndarray = _array
    row: np.ndarray = _array
    operation: np.ndarray = _array
    stream: np.ndarray = _array
    start: np.ndarray = _array
    end: np.ndarray = _array

    @property
    def makespan_seconds(self) -> float:
        """From the first start to the last end."""
        return float(self.end.max() - self.start.min())


def make_timeline(clock: str, entries: Sequence[tuple[int, int, int, int, float, float]]) -> Timeline:
    """A timeline of (rank, row, operation, stream, start, end), ordered by rank and row."""
    columns = list(zip(*sorted(entries), strict=True))
    whole = [np.array(column, dtype=np.int64) for column in columns[:4]]
    seconds = [np.array(column, dtype=np.float64) for column in columns[4:]]
    names = ("rank", "row", "operation", "stream", "start", "end")
    return Timeline(clock=clock, **dict(zip(names, [*whole, *seconds], strict=True)))


@frozen(kw_only=True)
class Durations:
    """Seconds of everything a program does; a pure function of the plan."""

    stages: tuple[StageCost, ...]
    send_seconds: float
    reduce_seconds: dict[tuple[str, int], float]  # by (group, payload bytes)


def durations(plan: TrainingPlan, program: Program) -> Durations:
    """What the rows of ``program`` cost under ``plan``."""
    reductions = {
        (program.groups[group], size)
        for kind, group, size in zip(
            program.kind.tolist(), program.group.tolist(), program.bytes.tolist(), strict=True
        )
        if kind in (Kind.REDUCE, Kind.NORM, Kind.COUNT)
    }
    return Durations(
        stages=tuple(stage_cost(plan, stage) for stage in range(plan.topology.pp)),
        send_seconds=send_seconds(plan, plan.dims().local_bytes),
        reduce_seconds={
            (group, size): group_seconds(plan, "all_reduce", group, size) for group, size in reductions
        },
    )


def advance(free: float, ready: float, seconds: float) -> tuple[float, float]:
    """Start and end of an operation on a stream that is free at ``free``, ready at ``ready``."""
    start = max(free, ready)
    return start, start + seconds


def simulate_program(program: Program, seconds: Durations) -> Timeline:
    """The timeline of one step. Raises PlanError where ranks wait for each other."""
    return _Simulation(program, seconds).run()


class _Simulation:
    """The state of one simulation: clocks of streams and what has been posted so far."""

    def __init__(self, program: Program, seconds: Durations) -> None:
        self.program, self.seconds = program, seconds
        self.rows = [rows(program, rank) for rank in range(program.num_ranks)]
        self.anchored = [anchored(own) for own in self.rows]
        self.clock = [0.0] * program.num_ranks
        self.collective_free = [0.0] * program.num_ranks
        self.channel_free: dict[tuple[int, int, bool], float] = {}
        receives = matching_sends(program)
        self.partner = {**receives, **{send: receive for receive, send in receives.items()}}
        self.posted: dict[tuple[int, int], float] = {}
        self.ended: dict[tuple[int, int], float] = {}
        self.queued: list[deque[tuple[str, int, int, float]]] = [deque() for _ in self.rows]
        self.joint: dict[tuple[str, int, Kind], dict[int, tuple[int, float]]] = {}
        self.entries: list[tuple[int, int, int, int, float, float]] = []

    def run(self) -> Timeline:
        at = [0] * len(self.rows)
        moved = True
        while moved:
            moved = False
            for rank, own in enumerate(self.rows):
                while at[rank] < len(own) and self.step(rank, at[rank], own[at[rank]]):
                    at[rank] += 1
                    moved = True
        stuck = [str(self.rows[rank][index]) for rank, index in enumerate(at) if index < len(self.rows[rank])]
        if stuck:
            raise PlanError(f"the ranks of this program wait for each other at {', '.join(stuck)}")
        return make_timeline("predicted", self.entries)

    def step(self, rank: int, index: int, row: Row) -> bool:
        """Run one row; False if it has to wait for another rank."""
        if row.kind in COMPUTE:
            self.compute(rank, index, row)
        elif row.kind in SENDS or row.kind in RECEIVES:
            self.transfer(rank, index, row)
        elif row.kind is Kind.WAIT:
            return self.wait(rank, index, row)
        elif row.kind is Kind.REDUCE:
            if row.anchor_row < 0:
                self.reduce(rank, index, row, self.clock[rank])
        elif row.kind is Kind.UPDATE:
            self.occupy(rank, index, self.seconds.stages[rank].update_seconds)
        else:
            return self.meet(rank, index, row)
        return True

    def occupy(self, rank: int, index: int, seconds: float) -> None:
        start, self.clock[rank] = advance(self.clock[rank], 0.0, seconds)
        self.entries.append((rank, index, -1, 0, start, self.clock[rank]))

    def compute(self, rank: int, index: int, row: Row) -> None:
        cost = self.seconds.stages[row.stage]
        segments = cost.forward if row.kind is Kind.FORWARD else cost.backward
        start = self.clock[rank]
        for position, segment in enumerate(segments):
            self.clock[rank] += segment.seconds
            number = position if row.kind is Kind.FORWARD else len(segments) - 1 - position
            for posted in self.anchored[rank].get((index, number), ()):
                self.reduce(rank, posted, self.rows[rank][posted], self.clock[rank])
        self.entries.append((rank, index, -1, 0, start, self.clock[rank]))

    def transfer(self, rank: int, index: int, row: Row) -> None:
        key, other = (rank, index), self.partner[rank, index]
        self.posted[key] = self.clock[rank]
        if other not in self.posted:
            return
        sender, receiver = (key, other) if row.kind in SENDS else (other, key)
        forward = self.rows[sender[0]][sender[1]].kind is Kind.SEND_F
        channel = sender[0], receiver[0], forward
        ready = max(self.posted[key], self.posted[other])
        start, end = advance(self.channel_free.get(channel, 0.0), ready, self.seconds.send_seconds)
        self.channel_free[channel] = self.ended[sender] = self.ended[receiver] = end
        self.entries.append((*sender, -1, 1, start, end))
        self.entries.append((*receiver, -1, 2, start, end))

    def wait(self, rank: int, index: int, row: Row) -> bool:
        end = self.ended.get((rank, row.target))
        if end is None:
            return False
        start, self.clock[rank] = self.clock[rank], max(self.clock[rank], end)
        self.entries.append((rank, index, -1, 0, start, self.clock[rank]))
        return True

    def reduce(self, rank: int, index: int, row: Row, ready: float) -> None:
        """Post a bucket's sum behind those that its rank has posted before."""
        self.queued[rank].append((self.program.groups[row.group], index, row.bytes, ready))
        while self.start_reduction():
            pass

    def start_reduction(self) -> bool:
        """Run one sum that is first in the queue of each of its members; False if there is none."""
        for rank, queue in enumerate(self.queued):
            members = self.members(rank, queue[0][0]) if queue else ()
            heads = [self.queued[member][0] for member in members if self.queued[member]]
            if queue and len(heads) == len(members) and {head[0] for head in heads} == {queue[0][0]}:
                group, _, size, _ = queue[0]
                free = max(self.collective_free[member] for member in members)
                latest = max(ready for *_, ready in heads)
                start, end = advance(free, latest, self.seconds.reduce_seconds[group, size])
                for member in members:
                    _, index, _, _ = self.queued[member].popleft()
                    self.collective_free[member] = self.ended[member, index] = end
                    self.entries.append((member, index, -1, 3, start, end))
                return True
        return False

    def meet(self, rank: int, index: int, row: Row) -> bool:
        """A blocking sum: COUNT over its data-parallel group, NORM over the world."""
        group = self.program.groups[row.group]
        members = self.members(rank, group)
        meeting = self.joint.setdefault((group, members[0], row.kind), {})
        meeting.setdefault(rank, (index, self.clock[rank]))
        if len(meeting) < len(members):
            return False
        latest = max(posted for _, posted in meeting.values())
        start, end = advance(0.0, latest, self.seconds.reduce_seconds[group, row.bytes])
        self.entries.append((rank, index, -1, 0, start, end))
        self.clock[rank] = end
        return True

    def members(self, rank: int, group: str) -> tuple[int, ...]:
        """Pipeline ranks of a group; ranks of one stage run alike, so one stands for all."""
        if group == "world":
            return tuple(range(len(self.rows)))
        if group == "embedding":
            return (0, len(self.rows) - 1)
        return (rank,)


def bubble_seconds(schedule: Schedule, stages: Sequence[StageCost]) -> tuple[float, ...]:
    """Idle seconds of each pipeline rank in the schedule itself: makespan less work, transfers free."""
    work = [0.0] * schedule.num_ranks
    ended: dict[tuple[int, str, int], float] = {}
    clock = [0.0] * schedule.num_ranks
    at = [0] * schedule.num_ranks
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(schedule.orders):
            while at[rank] < len(order):
                action = order[at[rank]]
                forward = action.phase == "F"
                before = action.stage - 1 if forward else action.stage + 1
                inside = 0 <= before < schedule.num_stages
                ready = ended.get((before, action.phase.value, action.microbatch)) if inside else 0.0
                if ready is None:
                    break
                cost = stages[action.stage]
                seconds = cost.forward_seconds if forward else cost.backward_seconds
                _, clock[rank] = advance(clock[rank], ready, seconds)
                ended[action.stage, action.phase.value, action.microbatch] = clock[rank]
                work[rank] += seconds
                at[rank] += 1
                moved = True
    return tuple(max(clock) - own for own in work)


def chrome_trace(timeline: Timeline, programs: Sequence[Sequence[Row]]) -> str:
    """The timeline as Chrome trace JSON, which Perfetto opens; one process a rank, one thread a stream.

    ``programs``: the rows of each rank that the timeline names. Times are microseconds.
    """
    events: list[dict[str, object]] = [
        {"ph": "M", "name": "process_name", "pid": rank, "tid": 0, "args": {"name": f"rank {rank}"}}
        for rank in sorted(set(timeline.rank.tolist()))
    ] + [
        {"ph": "M", "name": "thread_name", "pid": rank, "tid": tid, "args": {"name": name}}
        for rank in sorted(set(timeline.rank.tolist()))
        for tid, name in enumerate(STREAMS)
    ]
    columns = (timeline.rank, timeline.row, timeline.stream, timeline.start, timeline.end)
    for rank, index, stream, start, end in zip(*(column.tolist() for column in columns), strict=True):
        row = programs[rank][index]
        events.append(
            {
                "ph": "X",
                "name": str(row),
                "cat": row.kind.name,
                "pid": rank,
                "tid": stream,
                "ts": start * 1e6,
                "dur": (end - start) * 1e6,
                "args": {"row": index, "bytes": row.bytes},
            }
        )
    return json.dumps({"traceEvents": events, "otherData": {"clock": timeline.clock}}, separators=(",", ":"))
