"""Whether every rank of a program comes to its end, and whether its messages arrive where they belong.

Rows of a rank run in order and only waiting blocks, so that how far each rank comes does not depend on who
goes first. The semantics of messages are those of ``runtime.messages``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
from attrs import define, evolve

from picotron.errors import PlanError
from picotron.planner.flow import Semantics, check_finished, steps_of, walk
from picotron.planner.meetings import Meetings, meetings
from picotron.planner.program import RECEIVES, SENDS, Kind, Program, row_at, rows


def check_no_deadlock(program: Program, semantics: Semantics = "rendezvous") -> None:
    """Raise PlanError, naming who waits for what, unless every rank can finish.

    ``buffered``: a send ends when posted. ``rendezvous``: it ends with its receive, when both are posted.
    ``batched``: so too, and what two ranks post together runs together, one batch of a channel after the
    other. Time grows with the rows.
    """
    met = meetings(program)
    if semantics == "batched" and (program.batch[met.of_row >= 0] >= 0).any():
        told = _Batches(program, met).run()
        if told:
            raise PlanError(f"the ranks of this program wait for each other: {'; '.join(told)}")
        return
    buffered = semantics == "buffered"
    steps = steps_of(program, met, buffered=buffered)
    free = np.zeros(len(steps.row)), np.zeros(met.num_operations)
    check_finished(program, walk(steps, met, *free, buffered=buffered))


def unbatched(program: Program) -> Program:
    """The program without the batches for which its ranks would wait for ever under batched semantics.

    They are taken apart where the ranks come to stand still, one by one, those that are waited for first.
    Raises PlanError if the ranks stand still without any.
    """
    state = _Batches(program, meetings(program))
    batch = program.batch.copy()
    told = state.run()
    while told:
        apart = state.take_apart()
        if not apart:
            raise PlanError(f"the ranks of this program wait for each other: {'; '.join(told)}")
        batch[apart] = -1
        told = state.run()
    return evolve(program, batch=batch)


@define(eq=False)
class _Batch:
    """What one rank posts together; ``num_ahead`` of its rows have one of another batch before them still.

    It begins once it is posted and nothing is ahead, and is over when ``num_open`` is 0.
    """

    rows: list[int]
    num_ahead: int = 0
    num_open: int = 0
    posted: bool = False


class _Batches:
    """The state of a program under batched semantics: what has been posted, has begun and is over."""

    def __init__(self, program: Program, met: Meetings) -> None:
        self.program, self.met, self.of_row = program, met, met.of_row.tolist()
        self.ends: list[list[int]] = [[] for _ in range(met.num_operations)]
        self.batch: dict[int, _Batch] = {}
        self.after: dict[int, int] = {}  # the next row on the same channel
        self.before: dict[int, int] = {}
        self.last_row: dict[int, _Batch] = {}  # with which a batch is posted
        for rank in range(program.num_ranks):
            self._take(rank)
        for after, before in self.before.items():
            self.batch[after].num_ahead += self.batch[after] is not self.batch[before]
        missing = np.count_nonzero(np.stack([met.first, met.second]) < 0, axis=0)
        self.num_missing = [len(own) + short for own, short in zip(self.ends, missing.tolist(), strict=True)]
        for operation, rows_ in met.further.items():
            self.num_missing[operation] += sum(row < 0 for row in rows_)
        self.at = list(program.offsets[:-1])
        self.waiting: dict[int, list[int]] = {}
        self.going = list(range(program.num_ranks))

    def _take(self, rank: int) -> None:
        """Read the rows of a rank."""
        latest: dict[tuple[Kind, int], int] = {}
        by_id: dict[int, _Batch] = {}
        for index, row in enumerate(rows(self.program, rank), start=self.program.offsets[rank]):
            if self.of_row[index] < 0:
                continue
            one = by_id.setdefault(row.batch, _Batch([])) if row.batch >= 0 else _Batch([])
            if one.rows:
                del self.last_row[one.rows[-1]]
            one.rows.append(index)
            one.num_open += 1
            self.batch[index] = self.last_row[index] = one
            self.ends[self.of_row[index]].append(index)
            if row.kind in SENDS or row.kind in RECEIVES:
                if (row.kind, row.peer) in latest:
                    self.before[index] = latest[row.kind, row.peer]
                    self.after[latest[row.kind, row.peer]] = index
                latest[row.kind, row.peer] = index

    def run(self) -> list[str]:
        """Walk every rank as far as it comes; where those stand that do not come to their end."""
        while self.going:
            self._go(self.going.pop())
        return [self._told(rank) for rank in self._stuck()]

    def _stuck(self) -> list[int]:
        return [rank for rank, at in enumerate(self.at) if at < self.program.offsets[rank + 1]]

    def _go(self, rank: int) -> None:
        while self.at[rank] < self.program.offsets[rank + 1]:
            index = self.at[rank]
            if index in self.last_row:
                batch = self.last_row.pop(index)
                batch.posted = True
                self._begin([batch])
            for operation in self._waits_for(rank, index):
                if self.num_missing[operation]:
                    self.waiting.setdefault(operation, []).append(rank)
                    return
            self.at[rank] += 1

    def _waits_for(self, rank: int, index: int) -> list[int]:
        """The operations until whose end a row holds its rank."""
        kind = self.program.kind[index]
        if kind in (Kind.COUNT, Kind.NORM):
            return [self.of_row[index]]
        target = self.program.offsets[rank] + int(self.program.target[index])
        if kind != Kind.WAIT or target not in self.batch:
            return []
        return [self.of_row[row] for row in self.batch[target].rows]

    def _begin(self, batches: list[_Batch]) -> None:
        """Begin what may; what is over by that lets others begin."""
        while batches:
            batch = batches.pop()
            if batch.num_ahead or not batch.posted:
                continue
            for row in batch.rows:
                operation = self.of_row[row]
                self.num_missing[operation] -= 1
                if not self.num_missing[operation]:
                    self.going += self.waiting.pop(operation, ())
                    for end in self.ends[operation]:
                        batches += self._end_one(self.batch[end])

    def _end_one(self, batch: _Batch) -> list[_Batch]:
        """One of a batch is over; the batches that have nothing ahead of them by that."""
        batch.num_open -= 1
        return [] if batch.num_open else self._let_go(batch, batch.rows)

    def _let_go(self, batch: _Batch, over: Sequence[int]) -> list[_Batch]:
        free = []
        for row in over:
            following = self.batch.get(self.after.get(row, -1))
            if following is not None and following is not batch:
                following.num_ahead -= 1
                free += [following] * (not following.num_ahead)
        return free

    def take_apart(self) -> list[int]:
        """Take one batch apart that stands open where ranks wait, a waited one if there is any; its rows."""
        stuck = self._stuck()
        first = self.program.offsets
        waits = (first[rank] + int(self.program.target[self.at[rank]]) for rank in stuck)
        for row in chain(waits, *(range(first[rank], self.at[rank]) for rank in stuck)):
            batch = self.batch.get(row)
            if batch is not None and batch.posted and batch.num_open and len(batch.rows) > 1:
                self._split(batch)
                self.waiting.clear()
                self.going += stuck
                return batch.rows
        return []

    def _split(self, batch: _Batch) -> None:
        """Go on as if the rows of a batch had been posted one by one."""
        own, begun = set(batch.rows), not batch.num_ahead
        for row in batch.rows:
            is_open = self.num_missing[self.of_row[row]] > 0
            self.batch[row] = _Batch([row], num_open=int(is_open), posted=True)
        for row in batch.rows:
            before = self.before.get(row, -1)
            if begun and before in own:
                del self.after[before]
            elif before >= 0 and not begun:
                self.batch[row].num_ahead = int(self.batch[before].num_open > 0)
        free = [] if begun else [self.batch[row] for row in batch.rows if not self.batch[row].num_ahead]
        for row in batch.rows:
            if not self.batch[row].num_open and self.after.get(row) not in own:
                free += self._let_go(self.batch[row], [row])
        self._begin(free)

    def _told(self, rank: int) -> str:
        """Where a rank stands, and the ends that have to begin first."""
        index, program = self.at[rank], self.program
        row = row_at(program, index)
        operation = next(one for one in self._waits_for(rank, index) if self.num_missing[one])
        two = (int(self.met.first[operation]), int(self.met.second[operation]))
        ends = (*two, *self.met.further.get(operation, ()))
        absent = " and ".join(
            f"{row_at(program, end)} of rank {program.rank_of(end)}" if end >= 0 else "what nobody posts"
            for end in ends
            if end < 0 or program.rank_of(end) != rank
        )
        of = f" of {row_at(program, program.offsets[rank] + row.target)}" if row.target >= 0 else ""
        return f"rank {rank} at {row}{of}, which needs {absent}"


def check_channels(program: Program) -> None:
    """Raise PlanError unless every receive gets what it is meant to.

    The n-th receive of a channel gets what its n-th send sends: it must be of the same microbatch, from the
    stage next to its own.
    """
    met = meetings(program)
    send, receive = met.first[: met.num_messages], met.second[: met.num_messages]
    both = np.flatnonzero((send >= 0) & (receive >= 0))
    send, receive = send[both], receive[both]
    step = np.where(program.is_kind(Kind.SEND_F)[send], 1, -1)
    wrong = program.microbatch[send] != program.microbatch[receive]
    wrong |= program.stage[send] + step != program.stage[receive]
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        got, meant = row_at(program, int(send[first])), row_at(program, int(receive[first]))
        raise PlanError(
            f"a channel delivers in the order sent: rank {got.peer} receives {meant} where rank {meant.peer} "
            f"sends it {got}"
        )
