"""Who waits for whom when ranks run orders, and whether they can wait for each other in a circle.

A rank runs its cells (actions, or overlapped pairs) one after the other. What a cell hands to a stage of
another rank is a message: its sender is the cell that made it (F to the stage after, B or I to the stage
before), its receiver the cell that needs it. Between stages of one rank nothing is sent, but what is needed
must have been made. How a rank deals with its messages is the semantics:

- ``buffered``: a send holds nobody up. Before a cell the rank receives what the cell needs.
- ``batched``: between two cells, the sends of the first and the receives of the second are posted together;
  the rank goes on when all of them have met. The receives of its first cell are a batch by themselves.
- ``rendezvous``: before a cell the rank posts its receives and goes on when they have met; after it, it posts
  its sends and goes on when they have met. Nothing is posted ahead.

A message meets when both of its ends are posted (buffered: when it is sent). Ends are matched by name, not by
turn, as if every message had a tag; where two ranks disagree about the order of two messages, batched and
rendezvous block, and buffered does not. A pair receives for both halves before the first and sends for both
after the second. ``picotron.planner.program`` posts receives ahead and keeps sends in flight, so that a
program runs wherever its orders run buffered.

Which orders run to the end does not depend on who is quicker: what a rank may do, it may still do after any
other rank has done something. So a deadlock is found by letting each rank go on for as long as it can.

Rendezvous is the strictest and buffered the weakest: what runs under one runs under those before it in
SEMANTICS. Proof: say that a rank *passes* a wait when it goes on after it. Under all semantics a rank passes
its waits in the same order: receives of a cell, sends of that cell, receives of the next (those posted
together in any order, as nobody waits for a point between them). A receive may pass once the sender has
computed its cell, which is when it has passed all waits up to the receives of that cell: the same under all
three. A send may pass once the receiver has posted its receive: under rendezvous when it has passed all waits
of the cells before, under batched all but the sends of the cell just before, under buffered always. So each
wait needs of other ranks no more than under a stricter semantics, and an order in which all waits pass under
the stricter one is such an order under the weaker one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
from attrs import frozen

from picotron.planner.actions import Orders
from picotron.planner.validity import Where, rank_column, sources
from picotron.planner.waits import SHOWN_WAITS, Wait, shortest_cycle

Semantics = Literal["buffered", "batched", "rendezvous"]
SEMANTICS: tuple[Semantics, ...] = get_args(Semantics)  # the weakest first

_MOST_FOR_SHORTEST = 1000  # ranks that wait: the search for the shortest cycle takes quadratic time


@frozen(kw_only=True)
class Deadlock:
    """Ranks that wait for each other for ever under one semantics.

    ``cycle`` is the shortest one, its first rank repeated at the end (where over a thousand ranks wait, any).
    ``waits`` says what each of its ranks waits for, ``indices`` in which action (an index of the columns).
    """

    semantics: Semantics
    cycle: tuple[int, ...]
    waits: tuple[Wait, ...]
    indices: tuple[int, ...]

    def __str__(self) -> str:
        """The cycle, and what its first ranks wait for."""
        ranks, waits = list(map(str, self.cycle)), list(map(str, self.waits[:SHOWN_WAITS]))
        if len(self.waits) > SHOWN_WAITS:
            ranks[SHOWN_WAITS:-1] = ["..."]
            waits.append(f"and {len(self.waits) - SHOWN_WAITS} more ranks")
        return f"{' -> '.join(ranks)}: {'; '.join(waits)}"


@frozen(kw_only=True, eq=False)
class OrderWaits:
    """Every receive and send of valid orders, in the order in which each rank passes them.

    ``offsets``: rank r's waits are ``offsets[r]`` to ``offsets[r + 1]``. ``action`` is the action that needs
    the message (or, at a send, has made it), ``other`` the one at the other end: indices of the columns. What
    is made on the same rank, but too late, is a receive too. ``cell`` is the cell of each action. ``reached``
    and ``computed`` say how many waits stand before a cell's receives and before its end, ``sent`` how many
    sends it has.
    """

    offsets: tuple[int, ...]
    action: np.ndarray
    other: np.ndarray
    is_send: np.ndarray
    cell: np.ndarray
    reached: np.ndarray
    computed: np.ndarray
    sent: np.ndarray


def order_waits(orders: Orders, where: Where) -> OrderWaits:
    """The waits of orders that are a schedule."""
    rank, second = rank_column(orders), _second_halves(orders)
    source = sources(orders, len(where.stage_ranks), where.num_microbatches)
    cell = np.cumsum(~second, dtype=np.int32) - 1
    abroad = (source >= 0) & (rank[source] != rank)
    receives = abroad | ((source >= 0) & (cell[source] >= cell))
    sink = np.full_like(source, -1)
    sink[source[abroad]] = np.flatnonzero(abroad)
    sends = sink >= 0
    num_cells = int(cell[-1]) + 1
    received, sent = (np.bincount(cell[ends], minlength=num_cells) for ends in (receives, sends))
    reached = np.concatenate([[0], np.cumsum(received + sent)])
    computed = reached[:-1] + received
    first_cells = np.append(cell[np.array(orders.offsets[:-1])], num_cells)
    action, other = np.empty((2, reached[-1]), dtype=np.int32)
    is_send = np.zeros(reached[-1], dtype=np.bool_)
    for ends, partner, begin in ((receives, source, reached), (sends, sink, computed)):
        index = np.flatnonzero(ends)
        behind = second[index] & ends[index - 1]  # the first half of the pair has one too
        at = begin[cell[index]] + behind
        action[at], other[at], is_send[at] = index, partner[index], ends is sends
    return OrderWaits(
        offsets=tuple(reached[first_cells].tolist()),
        action=action,
        other=other,
        is_send=is_send,
        cell=cell,
        reached=reached[:-1],
        computed=computed,
        sent=sent,
    )


def _second_halves(orders: Orders) -> np.ndarray:
    """Which actions are the second half of a pair."""
    second = np.zeros_like(orders.joined)
    second[1:] = orders.joined[:-1]
    return second


def _wants(waits: OrderWaits, semantics: Semantics, rank: np.ndarray) -> np.ndarray:
    """The wait that must have passed before each wait can; the number of waits where it can at once.

    ``rank`` is that of each action.
    """
    other_cell = waits.cell[waits.other]
    needed = waits.computed[other_cell]  # so many waits must have passed
    if semantics == "buffered":
        needed = np.where(waits.is_send, 0, needed)
    else:
        posted = waits.reached
        if semantics == "batched":
            posted = posted - np.concatenate([[0], waits.sent[:-1]])
        needed = np.where(waits.is_send, posted[other_cell], needed)
    begin = np.array(waits.offsets)[rank[waits.other]]
    return np.where(needed > begin, needed - 1, len(waits.action))


def _passed(offsets: Sequence[int], want: list[int]) -> list[int]:
    """How far each rank comes if all go on for as long as they can.

    A rank goes on until the wait that its next one wants has not passed; whoever passes that wakes it.
    """
    num_ranks = len(offsets) - 1
    state = [0] * len(want) + [
        -1
    ]  # of a wait: -1 it has passed, else the last rank that sleeps on it, plus 1
    behind = [0] * (num_ranks + 1)  # the rank that went to sleep on the same wait before, plus 1
    asleep: list[int | None] = [None] * num_ranks  # the wait at which a rank stands
    left = [zip(range(*own), want[slice(*own)], strict=True) for own in pairwise(offsets)]
    ready = list(range(num_ranks))[::-1]
    while ready:
        rank = ready.pop()
        stood = asleep[rank]
        if stood is not None:  # what it wanted has passed, so this passes too
            sleeper, state[stood], asleep[rank] = state[stood], -1, None
            while sleeper:
                ready.append(sleeper - 1)
                sleeper = behind[sleeper]
        for index, wanted in left[rank]:
            sleeper = state[wanted]
            if sleeper >= 0:
                behind[rank + 1], state[wanted], asleep[rank] = sleeper, rank + 1, index
                break
            sleeper = state[index]
            while sleeper:
                ready.append(sleeper - 1)
                sleeper = behind[sleeper]
            state[index] = -1
    return [stop if stood is None else stood for stood, stop in zip(asleep, offsets[1:], strict=True)]


def find_deadlock(orders: Orders, waits: OrderWaits, semantics: Semantics) -> Deadlock | None:
    """The ranks that wait for each other for ever; None if every rank comes to its end."""
    rank = rank_column(orders)
    want = _wants(waits, semantics, rank)
    at = _passed(waits.offsets, want.tolist())
    if tuple(at) == waits.offsets[1:]:
        return None
    open_waits = {own: _open_waits(waits, want, at, rank, own, semantics) for own in range(len(at))}
    edges = {own: tuple(open_) for own, open_ in open_waits.items() if open_}
    cycle = shortest_cycle(edges) if len(edges) <= _MOST_FOR_SHORTEST else _any_cycle(edges)
    chosen = [open_waits[own][peer] for own, peer in pairwise(cycle)]
    return Deadlock(
        semantics=semantics,
        cycle=cycle,
        waits=tuple(_wait(orders, waits, rank, index) for index in chosen),
        indices=tuple(waits.action[chosen].tolist()),
    )


def _open_waits(
    waits: OrderWaits, want: np.ndarray, at: Sequence[int], rank: np.ndarray, own: int, semantics: Semantics
) -> dict[int, int]:
    """What a rank that came no further than ``at[own]`` waits for, by the rank it waits for.

    Those are the waits posted together with the one it stands at that cannot pass; a rank that will wait for
    itself before the same cell does so already.
    """
    first, stop = at[own], waits.offsets[own + 1]
    if first == stop:
        return {}
    found: dict[int, int] = {}
    group = _group(waits, first, semantics)
    for index in range(first, stop):
        if _group(waits, index, semantics) != group:
            break
        peer = int(rank[waits.other[index]])
        if want[index] < len(want) and want[index] >= at[peer]:
            found.setdefault(peer, index)
    return found


def _group(waits: OrderWaits, index: int, semantics: Semantics) -> tuple[int, bool]:
    """Waits of a rank that are posted together have the same group."""
    cell, is_send = int(waits.cell[waits.action[index]]), bool(waits.is_send[index])
    return (cell + is_send, False) if semantics == "batched" else (cell, is_send)


def _wait(orders: Orders, waits: OrderWaits, rank: np.ndarray, index: int) -> Wait:
    """A wait in words."""
    action, other = int(waits.action[index]), int(waits.other[index])
    own, peer = int(rank[action]), int(rank[other])
    place = f"position {action - orders.offsets[own]}"
    if waits.is_send[index]:
        what = f"rank {peer} to take {orders.action(action)}"
    else:
        what = f"{orders.action(other)} of {f'rank {peer}' if peer != own else 'its own, which comes later'}"
        place += f", {orders.action(action)}"
    return Wait(rank=own, operation=what, place=place, absent=(peer,))


def _any_cycle(edges: Mapping[int, Sequence[int]]) -> tuple[int, ...]:
    """A cycle of a graph whose ranks all wait for ranks of it: on from rank to rank until one comes again."""
    path: dict[int, None] = {}
    rank = next(iter(edges))
    while rank not in path:
        path[rank] = None
        rank = edges[rank][0]
    seen = list(path)
    return (*seen[seen.index(rank) :], rank)
