"""The checker of schedules: whether orders are one, whether they can deadlock, and what they hold at most.

``check`` takes any orders and decides, in turn:

- *valid*: every stage runs every microbatch forward once and back once (a B, or an I and then a W), in that
  order and on its own rank; stages and microbatches are numbered from 0 without gaps and every rank holds a
  stage (``picotron.planner.validity``).
- *deadlock*, under each of three semantics (``picotron.planner.order_waits`` defines them, and proves that
  what runs under a stricter one runs under a weaker one, so the strictest is tried first). Of the
  named schedules (two ranks and more, 2p microbatches and more), AFAB runs under all. 1F1B and ZB-H1 deadlock
  under rendezvous, where two neighbours send to each other, and run batched: for that reason Megatron-LM
  posts the send forward and the receive backward together (Narayanan et al. 2021, arXiv:2104.04473). V-Min
  runs batched for some sizes. All others run buffered only: they make what is needed much later.
- *memory*: the most that each rank holds (``picotron.planner.order_memory``).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import numpy as np
from attrs import field, frozen

from picotron.errors import PlanError
from picotron.planner.actions import Cell, Orders, make_orders
from picotron.planner.order_grid import WIDTH, orders_grid
from picotron.planner.order_memory import Peak, order_peaks
from picotron.planner.order_waits import (
    SEMANTICS,
    Deadlock,
    OrderWaits,
    Semantics,
    find_deadlock,
    order_waits,
)
from picotron.planner.pipeline import Schedule, orders_from_csv
from picotron.planner.schedule_memory import ScheduleMemory
from picotron.planner.validators import is_integer, shown
from picotron.planner.validity import Offence, Where, first_offence, place, placement

Checkable: TypeAlias = "Schedule | Orders | str | Iterable[Iterable[Cell]]"
"""A schedule, orders in any form, or their CSV."""

_SHOWN_RANKS = 8  # whose peaks a line names


@frozen(kw_only=True)
class Verdict:
    """What ``check`` found. Of orders that are not valid nothing else is decided.

    ``deadlocks``: one for each semantics under which there is one. ``peaks``: one for each rank.
    ``semantics`` is the one that is asked for: ``ok`` means valid, no deadlock under it, and no rank above
    ``limit_bytes``.
    """

    orders: Orders = field(repr=False)
    where: Where | None = field(repr=False)
    semantics: Semantics
    invalid: Offence | None = None
    deadlocks: tuple[Deadlock, ...] = ()
    peaks: tuple[Peak, ...] = field(default=(), repr=False)
    limit_bytes: int | None = None
    above_limit: Offence | None = None

    @property
    def ok(self) -> bool:
        """Whether the orders may run."""
        return self.offence is None

    @property
    def offence(self) -> Offence | None:
        """What is to blame, by validity, deadlock and memory in turn; None if all is well."""
        return self.invalid or self._stuck or self.above_limit

    @property
    def _stuck(self) -> Offence | None:
        """The first action of the circle under the semantics that is asked for."""
        deadlock = self.deadlock(self.semantics)
        if deadlock is None:
            return None
        index = deadlock.indices[0]
        return Offence(
            rank=deadlock.cycle[0],
            index=index,
            message=f"{place(self.orders, index)}: the ranks wait for each other ({self.semantics}): "
            f"{deadlock}",
        )

    @property
    def runs_under(self) -> tuple[Semantics, ...]:
        """The semantics under which the orders run to the end; none if they are not valid."""
        found = {deadlock.semantics for deadlock in self.deadlocks}
        return () if self.invalid else tuple(one for one in SEMANTICS if one not in found)

    def deadlock(self, semantics: Semantics) -> Deadlock | None:
        """The deadlock under a semantics, if there is one."""
        return next((found for found in self.deadlocks if found.semantics == semantics), None)

    def raise_if_bad(self) -> None:
        """Raise PlanError, with the offence and its place in the grid, unless all is well."""
        if self.offence is not None:
            raise PlanError(f"{self.offence.message}\n{self.grid()}")

    def grid(self, width: int = WIDTH) -> str:
        """The orders in a grid, the offending cell marked; where ranks wait for each other, every one's."""
        offence = self.offence
        rank, index = (offence.rank, offence.index) if offence else (0, None)
        stuck = self.deadlock(self.semantics) if offence and offence == self._stuck else None
        return orders_grid(
            self.orders, rank=rank, index=index, also=stuck.indices if stuck else (), width=width
        )

    def __str__(self) -> str:
        """A line for each decision, and on an offence the grid."""
        lines = [_validity_line(self)]
        if not self.invalid:
            lines += [_deadlock_line(self, semantics) for semantics in SEMANTICS]
            lines.append(_memory_line(self))
        return "\n".join([*lines, *([] if self.ok else [self.grid()])])


def check(
    schedule: Checkable,
    *,
    semantics: Semantics = "buffered",
    memory: ScheduleMemory | None = None,
    boundary_bytes: int = 0,
    limit_bytes: int | None = None,
) -> Verdict:
    r"""The verdict on any orders, valid or not: a schedule, columns, nested cells, or a CSV text.

    ``semantics`` is what ``ok`` asks for; all three are decided. ``memory`` gives bytes to the levels,
    ``boundary_bytes`` is what one action sends to another rank, ``limit_bytes`` bounds each rank.
    Raises PlanError for what is no order at all (a cell that does not parse) and for sizes that do not fit.

    >>> print(check("0F0,0F1,0B0,0B1\n1F0,1F1,1B0,1B1\n"))
    valid: 2 ranks, 2 stages, 2 microbatches, 8 actions
    buffered: no deadlock
    batched: no deadlock
    rendezvous: no deadlock
    memory: most on rank 0 (2 A + 0 A_W); A+A_W by rank: 2+0, 2+0
    """
    if semantics not in SEMANTICS:
        raise PlanError(f"semantics must be one of {', '.join(SEMANTICS)}, got {shown(semantics)}")
    if limit_bytes is not None and (memory is None or not is_integer(limit_bytes)):
        raise PlanError(f"limit_bytes must be an integer, given beside memory, got {shown(limit_bytes)}")
    orders, where = _placed(schedule)
    if isinstance(where, Offence):
        return Verdict(orders=orders, where=None, semantics=semantics, invalid=where)
    invalid = None if isinstance(schedule, Schedule) else first_offence(orders, where)
    if invalid is not None:
        return Verdict(orders=orders, where=where, semantics=semantics, invalid=invalid)
    waits = order_waits(orders, where)
    peaks = order_peaks(
        orders,
        num_stages=len(where.stage_ranks),
        sends=_sends_at_end(orders, waits, semantics),
        memory=memory,
        boundary_bytes=boundary_bytes,
    )
    return Verdict(
        orders=orders,
        where=where,
        semantics=semantics,
        deadlocks=_deadlocks(orders, waits),
        peaks=peaks,
        limit_bytes=limit_bytes,
        above_limit=_above(orders, peaks, limit_bytes),
    )


def _placed(schedule: Checkable) -> tuple[Orders, Where | Offence]:
    """The orders, and which rank runs what."""
    if isinstance(schedule, Schedule):
        return schedule.orders, schedule.where
    try:
        orders = orders_from_csv(schedule) if isinstance(schedule, str) else make_orders(schedule)
    except PlanError:
        raise
    except (AttributeError, OverflowError, TypeError, ValueError):
        raise PlanError(
            f"orders must be a schedule, cells for each rank or their CSV, got {shown(schedule)}"
        ) from None
    return orders, placement(orders)


def _deadlocks(orders: Orders, waits: OrderWaits) -> tuple[Deadlock, ...]:
    """The deadlock under each semantics that has one; what a stricter one lets run is not tried again."""
    found: list[Deadlock] = []
    for semantics in reversed(SEMANTICS):
        deadlock = find_deadlock(orders, waits, semantics)
        if deadlock is None:
            break
        found.insert(0, deadlock)
    return tuple(found)


def _sends_at_end(orders: Orders, waits: OrderWaits, semantics: Semantics) -> np.ndarray:
    """Messages that the rank has to send at the end of each action; a pair sends at the end of its second."""
    if semantics == "buffered":
        return np.zeros(orders.num_actions, dtype=np.int64)
    return np.where(orders.joined, 0, waits.sent[waits.cell])


def _above(orders: Orders, peaks: tuple[Peak, ...], limit_bytes: int | None) -> Offence | None:
    """The peak of the first rank that holds more than the limit."""
    for peak in peaks:
        if limit_bytes is not None and peak.bytes is not None and peak.bytes > limit_bytes:
            return Offence(
                rank=peak.rank,
                index=peak.index,
                message=f"{place(orders, peak.index)}: a rank may hold {limit_bytes:,} bytes, "
                f"got {peak.bytes:,} ({_levels(peak)})",
            )
    return None


def _levels(peak: Peak) -> str:
    return f"{peak.activations} A + {peak.weights} A_W" + (", with sends" if peak.sent_bytes else "")


def _validity_line(verdict: Verdict) -> str:
    if verdict.invalid:
        return f"not valid: {verdict.invalid.message}"
    assert verdict.where is not None
    sizes = (len(verdict.orders), len(verdict.where.stage_ranks), verdict.where.num_microbatches)
    ranks, stages, microbatches = (f"{size:,}" for size in sizes)
    both = ", both ways" if verdict.where.bidirectional else ""
    return (
        f"valid: {ranks} ranks, {stages} stages, {microbatches} microbatches, "
        f"{verdict.orders.num_actions:,} actions{both}"
    )


def _deadlock_line(verdict: Verdict, semantics: Semantics) -> str:
    deadlock = verdict.deadlock(semantics)
    return f"{semantics}: no deadlock" if deadlock is None else f"{semantics}: deadlock {deadlock}"


def _memory_line(verdict: Verdict) -> str:
    """Who holds most, and what the first ranks hold at most."""
    peaks = verdict.peaks
    most = max(peaks, key=lambda peak: (peak.bytes or 0, peak.activations + peak.weights, peak.activations))
    size = "" if most.bytes is None else f", {most.bytes:,} bytes"
    by_rank = ", ".join(f"{peak.activations}+{peak.weights}" for peak in peaks[:_SHOWN_RANKS])
    rest = ", ..." if len(peaks) > _SHOWN_RANKS else ""
    head = f"above {verdict.limit_bytes:,} bytes on rank" if verdict.above_limit else "most on rank"
    return f"memory: {head} {most.rank} ({_levels(most)}{size}); A+A_W by rank: {by_rank}{rest}"
