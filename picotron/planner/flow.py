"""When every row of a program runs: a fast simulation of one step at given seconds, by the rule of ``clock``.

A rank's rows run in order on its own time. What it posts runs on a stream, in posting order, once all ends of
it are posted; WAIT, COUNT and NORM hold the rank until such an operation has ended. Only rows that take or
hold the rank's time are walked through, one by one; all else follows from them a column at a time.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from attrs import cmp_using, field, frozen

from picotron.errors import PlanError
from picotron.planner.meetings import Meetings, meetings, number_in_run
from picotron.planner.program import COMPUTE, RECEIVES, SENDS, Kind, Program, row_at
from picotron.planner.schedule_times import PipelineCosts

Semantics = Literal["buffered", "rendezvous", "batched"]

WORK = (*COMPUTE, Kind.RECOMPUTE, Kind.UPDATE)
HOLDS = (Kind.WAIT, Kind.COUNT, Kind.NORM)

_array: Any = field(eq=cmp_using(eq=np.array_equal), repr=False)


@frozen(kw_only=True)
class Steps:
    """Rows that take or hold a rank's time; a WAIT just before what it is for is one step with it.

    Rank r's are ``offsets[r]`` to ``offsets[r + 1]``, the first of them nothing at all, at 0. ``row``: the
    row of each (a WAIT for a batch has several), ``waits_for``: the operation that it waits for before it
    runs, or -1. ``fused``: whether that WAIT is the row before. ``before``: for each row of the program, the
    last step that is over before it.
    """

    offsets: tuple[int, ...]
    row: np.ndarray = field(eq=False)
    waits_for: np.ndarray = field(eq=False)
    fused: np.ndarray = field(eq=False)
    before: np.ndarray = field(eq=False)


def steps_of(program: Program, met: Meetings, *, buffered: bool = False) -> Steps:
    """The steps of a program. ``buffered``: nobody waits for what is sent."""
    is_work, rank = program.is_kind(*WORK), program.rank
    holds, operation = _waits(program, met, buffered=buffered)
    among = number_in_run(holds)
    counts = is_work.astype(np.int32)
    counts[holds] = among + 1  # of several the last one
    followed = np.zeros(program.num_rows, dtype=np.bool_)
    followed[:-1] = (
        program.is_kind(Kind.WAIT)[:-1] & (counts[:-1] == 1) & is_work[1:] & (rank[:-1] == rank[1:])
    )
    counts[followed] = 0
    ends = np.cumsum(counts, dtype=np.int32)
    before = ends - counts + rank
    size = int(ends[-1]) + program.num_ranks
    row, waits_for = np.full(size, -1, dtype=np.int32), np.full(size, -1, dtype=np.int32)
    fused = np.zeros(size, dtype=np.bool_)
    row[before[is_work] + 1] = np.flatnonzero(is_work)
    step = before[holds] + 1 + among
    row[step] = holds + followed[holds]
    waits_for[step], fused[step] = operation, followed[holds]
    anchored = np.flatnonzero(program.anchor_row >= 0)
    before[anchored] = before[program.anchor_row[anchored] + program.first_row[anchored]] + 1
    starts = (np.append(0, ends)[list(program.offsets)] + np.arange(program.num_ranks + 1)).tolist()
    return Steps(offsets=(*starts[:-1], size), row=row, waits_for=waits_for, fused=fused, before=before)


def _waits(program: Program, met: Meetings, *, buffered: bool) -> tuple[np.ndarray, np.ndarray]:
    """Rows that hold their rank, ascending, and the operations until whose end they do.

    A WAIT for one row of a batch waits for all of it.
    """
    holds = np.flatnonzero(program.is_kind(*HOLDS))
    first = np.array(program.offsets)[np.searchsorted(program.offsets, holds, side="right") - 1]
    target = program.target[holds]
    target = np.where(target >= 0, target + first, holds)
    together = batch_rows(program)
    if together:
        many = [together.get(index, (index,)) for index in target.tolist()]
        holds = np.repeat(holds, list(map(len, many)))
        target = np.array([index for own in many for index in own])
    if buffered:
        kept = ~program.is_kind(*SENDS)[target]
        holds, target = holds[kept], target[kept]
    operation = met.of_row[target]
    return holds[operation >= 0], operation[operation >= 0]


def batch_rows(program: Program) -> dict[int, tuple[int, ...]]:
    """For each row that is posted in a batch, the rows of it."""
    together: dict[tuple[int, int], list[int]] = {}
    for index in np.flatnonzero((program.batch >= 0) & program.is_kind(*SENDS, *RECEIVES)).tolist():
        together.setdefault((program.rank_of(index), int(program.batch[index])), []).append(index)
    return {index: tuple(own) for own in together.values() for index in own}


@frozen(kw_only=True)
class Walked:
    """How a simulation went: when each step and each operation ended, -1 where one has not.

    ``at``: the step that each rank has come to.
    """

    met: Meetings
    steps: Steps
    step_end: np.ndarray
    operation_end: np.ndarray
    at: tuple[int, ...]

    @property
    def step_came(self) -> np.ndarray:
        """When its rank came to each step."""
        came: np.ndarray = np.concatenate([[0.0], self.step_end[:-1]])
        came[list(self.steps.offsets[:-1])] = 0.0
        return came

    @property
    def step_begin(self) -> np.ndarray:
        """When each step had all that it waits for."""
        waited = np.append(self.operation_end, 0.0)[self.steps.waits_for]
        begin: np.ndarray = np.maximum(self.step_came, waited)
        return begin

    @property
    def operation_start(self) -> np.ndarray:
        """When all ends of each operation were posted and the one before on its stream was over."""
        met, step_end = self.met, np.append(self.step_end, -1.0)
        first, second = (step_end[_posted_after(self.steps, rows)] for rows in (met.first, met.second))
        start: np.ndarray = np.maximum(first, second)
        later = np.flatnonzero(~met.opens)
        start[later] = np.maximum(start[later], self.operation_end[later - 1])
        for operation, rows in met.further.items():
            start[operation] = max(start[operation], *step_end[_posted_after(self.steps, np.array(rows))])
        return start


@frozen(kw_only=True)
class Times:
    """When each row of a program runs, in seconds since the step began, aligned with its columns.

    What a row posts counts: a send and its receive from when the message starts. A WAIT runs from when its
    rank comes to it. ``how`` is what was simulated.
    """

    start: np.ndarray = _array
    end: np.ndarray = _array
    how: Walked = field(eq=False, repr=False)

    @property
    def makespan_seconds(self) -> float:
        """The last end."""
        return float(self.end.max())


def walk(
    steps: Steps,
    met: Meetings,
    step_seconds: np.ndarray,
    operation_seconds: np.ndarray,
    *,
    buffered: bool = False,
) -> Walked:
    """Run every rank as far as it comes.

    An operation runs when somebody waits for it and all its ends are posted. Who asks too early is woken by
    the step before an end that is missing.
    """
    one, other = _posted_after(steps, met.first), _posted_after(steps, met.second)
    if buffered:
        other[: met.num_messages] = one[: met.num_messages]
    number = np.arange(met.num_operations, dtype=np.int32)
    step_end, operation_end, at = _walked(
        steps.offsets,
        _ints(steps.waits_for),
        _seconds(step_seconds),
        _ints(one),
        _ints(other),
        {op: _posted_after(steps, np.array(rows)).tolist() for op, rows in met.further.items()},
        _ints(np.where(met.opens, len(number), number - 1)),
        _seconds(operation_seconds),
    )
    return Walked(met=met, steps=steps, step_end=step_end, operation_end=operation_end, at=at)


def _posted_after(steps: Steps, rows: np.ndarray) -> np.ndarray:
    """The step after which each row is posted; for none (-1) the one after the last, which never comes."""
    return np.where(rows >= 0, steps.before[rows], len(steps.row))


def _ints(column: np.ndarray) -> array[int]:
    return array("i", column.astype(np.int32).tobytes())


def _seconds(column: np.ndarray) -> array[float]:
    return array("d", column.tobytes())


def _walked(
    offsets: tuple[int, ...],
    waits_for: array[int],
    step_seconds: array[float],
    one: array[int],
    other: array[int],
    further: Mapping[int, list[int]],
    previous: array[int],
    operation_seconds: array[float],
) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    """Ends of steps and operations, and the steps that ranks came to.

    ``previous``: the operation before on the same stream; for none the number of operations.
    """
    step_end = array("d", [-1.0]) * (offsets[-1] + 1)
    end = array("d", [-1.0]) * len(one) + array("d", [0.0])  # the last for no operation, -1 as an index too
    at, waiting = list(offsets[:-1]), dict[int, list[int]]()

    def run(operation: int) -> int:
        """Run an operation, all before it on its stream first; or the step that has to come before."""
        behind = [operation]
        while end[previous[behind[-1]]] < 0.0:
            behind.append(previous[behind[-1]])
        while behind:
            due = behind.pop()
            ready = end[previous[due]]
            for step in (one[due], other[due], *further.get(due, ())):
                if step_end[step] < 0.0:
                    return int(step)
                ready = max(ready, step_end[step])
            end[due] = ready + operation_seconds[due]
        return -1

    going = list(range(len(at)))[::-1]
    while going:
        rank = going.pop()
        stop = offsets[rank + 1]
        now = step_end[at[rank] - 1] if at[rank] > offsets[rank] else 0.0
        for index in range(at[rank], stop):
            operation = waits_for[index]
            ended = end[operation]
            if ended > now:
                now = ended
            elif ended < 0.0:
                first, second, missing = one[operation], other[operation], -1
                ready, late, free = step_end[first], step_end[second], end[previous[operation]]
                if free < 0.0 or operation in further:
                    missing = run(operation)
                elif ready < 0.0:  # what run would find, without a call
                    missing = first
                elif late < 0.0:
                    missing = second
                else:
                    if late > ready:
                        ready = late
                    end[operation] = (free if free > ready else ready) + operation_seconds[operation]
                if missing >= 0:
                    waiting.setdefault(missing, []).append(rank)
                    at[rank] = index
                    break
                if end[operation] > now:
                    now = end[operation]
            now += step_seconds[index]
            step_end[index] = now
            if index in waiting:
                going += waiting.pop(index)
        else:
            at[rank] = stop
    ends = np.frombuffer(end)
    for operation in np.flatnonzero(ends < 0.0).tolist():
        run(operation)
    return np.frombuffer(step_end)[:-1], ends[:-1], tuple(at)


def row_seconds(
    program: Program,
    costs: PipelineCosts,
    *,
    bytes_per_second: Mapping[Kind, float] | None = None,
    recompute_seconds: float | None = None,
    update_seconds: float = 0.0,
) -> np.ndarray:
    """What each row takes: a computing row what its phase costs, an overlapped one its share of the pair's.

    A RECOMPUTE takes as long as its F, unless ``recompute_seconds`` says otherwise; a message the costs'
    ``transfer_seconds``. ``bytes_per_second``: kinds of rows that take as long as their bytes at this rate
    instead, or instead of no time.
    """
    seconds = np.zeros(program.num_rows)
    table = costs.table()
    for phase, kind in enumerate(COMPUTE):
        own = np.flatnonzero(program.is_kind(kind))
        seconds[own] = table[phase, program.stage[own]]
    paired = np.flatnonzero(program.is_kind(*COMPUTE) & (program.batch >= 0))
    seconds[paired] *= costs.overlap_factor
    again = np.flatnonzero(program.is_kind(Kind.RECOMPUTE))
    seconds[again] = table[0, program.stage[again]] if recompute_seconds is None else recompute_seconds
    seconds[program.is_kind(Kind.UPDATE)] = update_seconds
    seconds[program.is_kind(*SENDS, *RECEIVES)] = costs.transfer_seconds
    for kind, rate in (bytes_per_second or {}).items():
        own = program.is_kind(kind)
        seconds[own] = program.bytes[own] / rate
    return seconds


def program_times(
    program: Program,
    costs: PipelineCosts,
    *,
    bytes_per_second: Mapping[Kind, float] | None = None,
    update_seconds: float = 0.0,
) -> Times:
    """When each row runs, at what ``row_seconds`` says. Raises PlanError where ranks wait for each other."""
    seconds = row_seconds(program, costs, bytes_per_second=bytes_per_second, update_seconds=update_seconds)
    return times_at(program, seconds)


def times_at(program: Program, seconds: np.ndarray) -> Times:
    """When each row runs, at these seconds of each; of what several rows meet in, those of its last row."""
    met = meetings(program)
    steps = steps_of(program, met)
    row, works = steps.row, program.is_kind(*WORK)
    step_seconds = np.where((row >= 0) & works[row], seconds[row], 0.0)
    walked = walk(steps, met, step_seconds, seconds[np.maximum(met.first, met.second)])
    check_finished(program, walked)
    return _row_times(program, walked)


def _row_times(program: Program, walked: Walked) -> Times:
    """Of all rows, those that neither take nor hold time included."""
    met, steps, came, begin = walked.met, walked.steps, walked.step_came, walked.step_begin
    start = walked.step_end[steps.before]
    end = start.copy()
    posted = np.flatnonzero(met.of_row >= 0)
    start[posted] = walked.operation_start[met.of_row[posted]]
    end[posted] = walked.operation_end[met.of_row[posted]]
    own = np.flatnonzero((steps.row >= 0) & ~program.is_kind(Kind.COUNT, Kind.NORM)[steps.row])
    row = steps.row[own]
    end[row] = walked.step_end[own]  # of several steps of a row the last one
    start[row[::-1]] = np.where(program.is_kind(Kind.WAIT)[row], came[own], begin[own])[::-1]  # the first
    fused = np.flatnonzero(steps.fused)
    start[steps.row[fused] - 1], end[steps.row[fused] - 1] = came[fused], begin[fused]
    return Times(start=start, end=end, how=walked)


def check_finished(program: Program, walked: Walked) -> None:
    """Raise PlanError, naming who waits for what, unless every rank came to its end."""
    stuck = [rank for rank, step in enumerate(walked.at) if step < walked.steps.offsets[rank + 1]]
    if stuck:
        told = "; ".join(_told(program, walked, rank) for rank in stuck)
        raise PlanError(f"the ranks of this program wait for each other: {told}")


def _told(program: Program, walked: Walked, rank: int) -> str:
    """Where a rank stands, and the row that has to be posted first."""
    met, steps, step = walked.met, walked.steps, walked.at[rank]
    index = int(steps.row[step]) - bool(steps.fused[step])
    operation = int(steps.waits_for[step])
    while not met.opens[operation] and walked.operation_end[operation - 1] < 0.0:
        operation -= 1
    ends = (int(met.first[operation]), int(met.second[operation]), *met.further.get(operation, ()))
    missing = [row for row in ends if row < 0 or walked.step_end[steps.before[row]] < 0.0]
    needs = " and ".join(
        f"{row_at(program, row)} of rank {program.rank_of(row)}" if row >= 0 else "what nobody posts"
        for row in missing
    )
    row = row_at(program, index)
    at = f"{row} of {row_at(program, row.target + program.offsets[rank])}" if row.target >= 0 else f"{row}"
    return f"rank {rank} at {at}, which needs {needs}"
