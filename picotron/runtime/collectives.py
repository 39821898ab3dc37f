"""How the parts of a collective meet: complete when the last member has posted its own.

The n-th of a group must agree among its members in kind, op, dtype and sizes. Reductions are
((t0 + t1) + t2) + ... in group order (see ``arithmetic``), done by whichever rank comes last.
"""

from __future__ import annotations

from collections.abc import Callable

from picotron.planner.clock import Operation as Timed
from picotron.planner.clock import advance
from picotron.runtime.arithmetic import ARITHMETIC, flip_bit
from picotron.runtime.backend import Group, unseen
from picotron.runtime.guards import CHANGED
from picotron.runtime.ledger import Collective, Ledger, Part
from picotron.runtime.scheduler import Scheduler

Seconds = Callable[[Collective], float]

_LET_GO = Part((), (), 0.0, "")  # a late waiter must not keep another rank's memory alive


class Collectives:
    """Matches the parts of collectives in ``ledger``; called by the rank that holds the baton."""

    def __init__(self, scheduler: Scheduler, ledger: Ledger, seconds: Seconds) -> None:
        self._scheduler, self._ledger, self._seconds = scheduler, ledger, seconds

    def post(self, rank: int, group: Group, number: int, part: Part, payload_bytes: int) -> Collective:
        """Take up the part of ``rank`` in a group's ``number``-th collective; the last completes it."""
        key = group.payload, number
        collective = self._ledger.collectives.get(key)
        if collective is None:
            collective = Collective(number=number, kind=str(part.agreed[0]), group=group)
            self._ledger.collectives[key] = collective
        problem = collective.disagreement(rank, part)
        collective.parts[rank] = part
        collective.payload_bytes = max(collective.payload_bytes, payload_bytes)
        complete = len(collective.parts) == group.size
        if complete:
            del self._ledger.collectives[key]
        if problem is not None:
            self._scheduler.fail(collective, problem, (rank, collective.describe(), part.place))
        elif complete and collective.problem is None:
            with unseen():
                self._complete(collective)
        elif gone := self._ledger.vanished.keys() & group.ranks - collective.parts.keys():
            self._scheduler.fail(collective, self._ledger.vanished[min(gone)])
        return collective

    def abandon(self, rank: int) -> None:
        """Fail what waits for a part of ``rank``, which is gone."""
        for collective in self._ledger.collectives.values():
            if rank in collective.absent():
                self._scheduler.fail(collective, self._ledger.vanished[rank])

    def _complete(self, collective: Collective) -> None:
        kind, parts = collective.kind, collective.parts
        problem, blamed = None, None
        if (rank := _changed(collective)) is not None:
            problem, blamed = CHANGED, (rank, collective.describe(), parts[rank].place)
        if problem is None and kind in ARITHMETIC:
            problem = ARITHMETIC[kind](collective.in_group_order())
        if problem is not None:
            self._scheduler.fail(collective, problem, blamed)
            return
        communicator = "group", collective.group.payload
        ready = max(part.posted_seconds for part in parts.values())
        span = advance(self._scheduler.streams, Timed((communicator,), ready, self._seconds(collective)))
        self._scheduler.streams[communicator] = span.end
        collective.start_seconds, collective.end_seconds = span
        for part in parts.values():
            if part.corrupt is not None:
                flip_bit(part.arguments[0], *part.corrupt)
        for part in parts.values():
            for watched in part.guards:
                watched.refresh()
        if kind in ARITHMETIC:
            collective.parts = dict.fromkeys(parts, _LET_GO)
        self._scheduler.wake(collective)


def _changed(collective: Collective) -> int | None:
    """The least rank whose tensors somebody has changed since it posted them."""
    changed = (r for r, part in collective.parts.items() if any(watched.changed() for watched in part.guards))
    return min(changed, default=None)
