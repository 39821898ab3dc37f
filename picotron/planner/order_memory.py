"""What ranks hold at most as they run orders: three levels a microbatch, and what waits to be sent.

A microbatch on a stage is at level A from the end of its F, at A_W from the end of its I (what W needs:
inputs of linears and gradients of their outputs), and gone after its W; a B frees all at its end
(Qi et al. 2023, arXiv:2401.10241, section 2.3).

Under rendezvous and batched, what a cell sends to other ranks is in its rank's memory from the end of the
cell until its sends have met, which is before the next cell begins: so the most is that over all cells of
levels and sends at the end of the cell. Under buffered a send is over, and its buffer free, as soon as it is
posted. What a cell receives is not counted apart: an A holds its input.
"""

from __future__ import annotations

import numpy as np
from attrs import frozen

from picotron.errors import PlanError
from picotron.planner.actions import PHASES, B, F, I, Orders, W
from picotron.planner.schedule_memory import MOST_BYTES, ScheduleMemory
from picotron.planner.validators import is_integer, shown
from picotron.planner.validity import rank_column

_ACTIVATIONS, _WEIGHTS = np.zeros((2, len(PHASES)), dtype=np.int64)
_ACTIVATIONS[[F, B, I]] = 1, -1, -1
_WEIGHTS[[I, W]] = 1, -1


@frozen(kw_only=True)
class Peak:
    """The most that a rank holds: at the end of the action at ``index`` of the columns, the first of several.

    ``activations`` counts microbatches of a stage at level A then, ``weights`` those at A_W. Without sizes
    the most is that of both together, and of equal ones that with more A. ``most_activations`` is the most
    at A at any time. ``held_bytes`` is what the levels take, ``sent_bytes`` what waits to be sent; None
    without sizes.
    """

    rank: int
    index: int
    activations: int
    weights: int
    most_activations: int
    held_bytes: int | None = None
    sent_bytes: int | None = None

    @property
    def bytes(self) -> int | None:
        """Levels and sends together."""
        if self.held_bytes is None or self.sent_bytes is None:
            return None
        return self.held_bytes + self.sent_bytes


def order_peaks(
    orders: Orders,
    *,
    num_stages: int,
    sends: np.ndarray,
    memory: ScheduleMemory | None = None,
    boundary_bytes: int = 0,
) -> tuple[Peak, ...]:
    """The peak of every rank of orders that are a schedule.

    ``sends``: how many messages of ``boundary_bytes`` the rank has to send at the end of each action. Every
    rank ends with nothing held, so running sums go on from rank to rank.
    """
    if not is_integer(boundary_bytes) or not 0 <= boundary_bytes <= MOST_BYTES:
        raise PlanError(
            f"boundary_bytes must be an integer in [0, {MOST_BYTES}], got {shown(boundary_bytes)}"
        )
    if memory is not None and memory.num_stages != num_stages:
        raise PlanError(f"memory must be that of {num_stages} stages, got {memory.num_stages}")
    activations, weights = (step[orders.phase].cumsum() for step in (_ACTIVATIONS, _WEIGHTS))
    if memory is None:
        held = sent = None
        size = (activations + weights) * (orders.num_actions + 1) + activations
    else:
        held, sent = memory.changes()[orders.phase, orders.stage].cumsum(), sends * boundary_bytes
        size = held + sent
    starts = np.array(orders.offsets[:-1])
    rank, largest = rank_column(orders), np.maximum.reduceat(size, starts)
    at_peak = np.flatnonzero(size == largest[rank])
    index = at_peak[np.unique(rank[at_peak], return_index=True)[1]]
    columns = [index, activations[index], weights[index], np.maximum.reduceat(activations, starts)]
    bytes_: list[list[int | None]] = [
        [None] * len(index) if of_all is None else of_all[index].tolist() for of_all in (held, sent)
    ]
    return tuple(
        Peak(
            rank=own,
            index=at,
            activations=full,
            weights=split,
            most_activations=most,
            held_bytes=held_bytes,
            sent_bytes=sent_bytes,
        )
        for own, (at, full, split, most, held_bytes, sent_bytes) in enumerate(
            zip(*(column.tolist() for column in columns), *bytes_, strict=True)
        )
    )
