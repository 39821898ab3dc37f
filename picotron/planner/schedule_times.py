"""When every action of a schedule runs: as early as its rank's order and the data it needs allow.

Costs are seconds per stage; a hop between two ranks delays what crosses it and holds nobody up. This is the
schedule by itself; the timeline of a program counts channels and collectives too. A bubble has two figures:
idle seconds under the whole makespan, and the zero-bubble papers' own, under each rank's own span
(Qi et al. 2023, arXiv:2401.10241, section 5.2), for which a skew between ranks is free.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Any

import numpy as np
from attrs import Attribute, cmp_using, field, frozen

from picotron.errors import PlanError
from picotron.planner.actions import PHASES, B, F, I, W
from picotron.planner.pipeline import Schedule
from picotron.planner.validators import shown
from picotron.planner.validity import rank_column, sources

LEAST_COST, MOST_COST = 1e-30, 1e30  # so that sums and ratios of them are numbers


def _number(value: float) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise PlanError(f"a cost must be a number, got {shown(value)}") from None


def _seconds(values: Iterable[float]) -> tuple[float, ...]:
    try:
        if isinstance(values, str):
            raise TypeError
        return tuple(map(float, values))
    except (TypeError, ValueError, OverflowError):
        raise PlanError(f"costs must be seconds, one for each stage, got {shown(values)}") from None


@frozen(kw_only=True)
class PipelineCosts:
    """Seconds of F, I and W of one microbatch on each stage; a B takes I and W together.

    ``transfer_seconds``: how much later another rank has what a stage hands over. An overlapped pair takes
    ``overlap_factor`` times what its halves take one after the other.
    """

    forward_seconds: tuple[float, ...] = field(converter=_seconds)
    input_seconds: tuple[float, ...] = field(converter=_seconds)
    weight_seconds: tuple[float, ...] = field(converter=_seconds)
    transfer_seconds: float = field(default=0.0, converter=_number)
    overlap_factor: float = field(default=1.0, converter=_number)

    @overlap_factor.validator
    def _consistent(self, _: Attribute[object], __: float) -> None:
        columns = (self.forward_seconds, self.input_seconds, self.weight_seconds)
        if len(set(map(len, columns))) != 1 or not self.forward_seconds:
            raise PlanError(
                f"F, I and W must have a cost for each stage, got {list(map(len, columns))} of them"
            )
        every = (*columns[0], *columns[1], *columns[2], self.transfer_seconds)
        if not all(value == 0 or LEAST_COST <= value <= MOST_COST for value in every):
            raise PlanError(
                f"costs must be 0, or between {LEAST_COST:g} and {MOST_COST:g}, got {shown(every)}"
            )
        if not all(value > 0 for value in self.forward_seconds):
            raise PlanError(f"an F must take time, got {self.forward_seconds}")
        if not 0.5 <= self.overlap_factor <= 1.0:
            raise PlanError(f"overlap_factor must be in [0.5, 1], got {self.overlap_factor}")

    @property
    def num_stages(self) -> int:
        """Stages that have costs."""
        return len(self.forward_seconds)

    def table(self) -> np.ndarray:
        """Seconds: [phase, stage]."""
        forward, inputs, weights = map(
            np.array, (self.forward_seconds, self.input_seconds, self.weight_seconds)
        )
        rows = {F: forward, B: inputs + weights, I: inputs, W: weights}
        return np.stack([rows[phase] for phase in range(len(PHASES))])


def unit_costs(
    num_stages: int, *, f: float = 1.0, i: float = 1.0, w: float = 1.0, transfer: float = 0.0
) -> PipelineCosts:
    """The same costs on every stage."""
    return PipelineCosts(
        forward_seconds=(f,) * num_stages,
        input_seconds=(i,) * num_stages,
        weight_seconds=(w,) * num_stages,
        transfer_seconds=transfer,
    )


_array: Any = field(eq=cmp_using(eq=np.array_equal), repr=False)


@frozen(kw_only=True)
class Spans:
    """When each action of a schedule runs, in seconds, aligned with the columns of its orders."""

    start: np.ndarray = _array
    end: np.ndarray = _array

    @property
    def makespan_seconds(self) -> float:
        """The last end; the first start is at 0."""
        return float(self.end.max())


def needed(schedule: Schedule) -> np.ndarray:
    """What each action waits for from another stage, as an index of the columns; -1 for nothing.

    An F waits for that of the stage before, a B or an I for that of the stage after.
    """
    return sources(schedule.orders, schedule.num_stages, schedule.num_microbatches)


def action_seconds(schedule: Schedule, costs: PipelineCosts) -> np.ndarray:
    """What each action takes by itself."""
    if costs.num_stages != schedule.num_stages:
        raise PlanError(f"costs must be those of {schedule.num_stages} stages, got {costs.num_stages}")
    seconds: np.ndarray = costs.table()[schedule.orders.phase, schedule.orders.stage]
    return seconds


def schedule_times(schedule: Schedule, costs: PipelineCosts) -> Spans:
    """Every action as early as can be.

    Raises PlanError, naming where each rank stands, if ranks wait for each other in a circle.
    """
    orders = schedule.orders
    need, rank = needed(schedule), rank_column(orders)
    seconds = action_seconds(schedule, costs)
    late = np.where((need >= 0) & (rank[need] != rank), costs.transfer_seconds, 0.0)
    first = np.flatnonzero(orders.joined)  # of a pair: it takes no time here, the second that of both
    seconds[first + 1] = (seconds[first] + seconds[first + 1]) * costs.overlap_factor
    seconds[first] = 0.0
    ends_with = np.arange(orders.num_actions, dtype=np.int32)
    ends_with[first] += 1
    end, at = _played(orders.offsets, np.where(need >= 0, ends_with[need], -1), late, seconds)
    stuck = [(own, index) for own, index in enumerate(at) if index < orders.offsets[own + 1]]
    if stuck:
        where = "; ".join(f"rank {own} at {orders.action(index)}" for own, index in stuck)
        raise PlanError(f"the ranks of this schedule wait for each other: {where}")
    before = np.concatenate([[0.0], end[:-1]])
    before[list(orders.offsets[:-1])] = 0.0
    start = np.where(need >= 0, np.maximum(before, end[ends_with[need]] + late), before)
    start[first] = start[first + 1]
    end[first] = end[first + 1]
    return Spans(start=start, end=end)


def _played(
    offsets: tuple[int, ...], need_column: np.ndarray, late_column: np.ndarray, seconds_column: np.ndarray
) -> tuple[np.ndarray, list[int]]:
    """The end of each action, and how far each rank comes.

    A rank runs on until what it needs is not there; whoever brings that wakes it.
    """
    need = array("i", need_column.astype(np.int32).tobytes())
    late, seconds = array("d", late_column.tobytes()), array("d", seconds_column.tobytes())
    end = array("d", [-1.0]) * offsets[-1] + array("d", [0.0])  # the last is what needs nothing needs (-1)
    at, clock = list(offsets[:-1]), [0.0] * (len(offsets) - 1)
    waiting: dict[int, list[int]] = {}  # both halves of a pair may be waited for
    ready = list(range(len(at)))[::-1]
    while ready:
        rank = ready.pop()
        now, stop = clock[rank], offsets[rank + 1]
        for index in range(at[rank], stop):
            source = need[index]
            arrived = end[source]
            if arrived < 0.0:
                waiting.setdefault(source, []).append(rank)
                at[rank] = index
                break
            arrived += late[index]
            if arrived > now:
                now = arrived
            now += seconds[index]
            end[index] = now
            if index in waiting:
                ready += waiting.pop(index)
        else:
            at[rank] = stop
        clock[rank] = now
    return np.array(end[:-1]), at


def rank_work_seconds(schedule: Schedule, costs: PipelineCosts) -> tuple[float, ...]:
    """Busy seconds of each rank; an overlapped pair counts what it takes."""
    seconds = action_seconds(schedule, costs)
    first = np.flatnonzero(schedule.orders.joined)
    seconds[first] = (seconds[first] + seconds[first + 1]) * costs.overlap_factor
    seconds[first + 1] = 0.0
    return tuple(float(seconds[schedule.orders.span(rank)].sum()) for rank in range(schedule.num_ranks))


def idle_seconds(schedule: Schedule, costs: PipelineCosts, spans: Spans) -> tuple[float, ...]:
    """The bubble of each rank: makespan less its work."""
    return tuple(spans.makespan_seconds - work for work in rank_work_seconds(schedule, costs))


def bubble_fraction(schedule: Schedule, costs: PipelineCosts, spans: Spans) -> float:
    """Idle share of the makespan, averaged over ranks."""
    idle = idle_seconds(schedule, costs, spans)
    return sum(idle) / len(idle) / spans.makespan_seconds


def own_spans(schedule: Schedule, spans: Spans) -> tuple[float, ...]:
    """From the first start to the last end of each rank, in seconds."""
    found = (schedule.orders.span(rank) for rank in range(schedule.num_ranks))
    return tuple(float(spans.end[own].max() - spans.start[own].min()) for own in found)


def stage_span_fraction(schedule: Schedule, costs: PipelineCosts, spans: Spans) -> float:
    """The zero-bubble papers' rate: idle share of the longest own span of a rank."""
    longest = max(own_spans(schedule, spans))
    return (longest - max(rank_work_seconds(schedule, costs))) / longest
