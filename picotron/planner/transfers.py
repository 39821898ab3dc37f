"""What stages send each other: sends, receives and waits around the computing.

A receive is posted one action ahead of its use, and earlier where the sender sends it earlier than what is
used before it: so every channel delivers in the order sent, whatever the schedule. A send is waited for when
its channel is full. How many it may hold is the least with which no rank ever waits for room while every
action runs as early as it can, at equal costs: so whatever can run at all runs even if a send ends only when
its receive is posted. Between two stages of one rank nothing is sent.
"""

from __future__ import annotations

import numpy as np
from attrs import frozen

from picotron.planner.actions import F
from picotron.planner.pipeline import Schedule
from picotron.planner.program import (
    COMPUTE,
    RECEIVES,
    SENDS,
    Kind,
    Program,
    check_bytes,
    make_program,
)
from picotron.planner.schedule_times import needed, schedule_times, unit_costs
from picotron.planner.validity import rank_column


@frozen
class Cells:
    """What a rank runs at a time: an action, or an overlapped pair. Numbered through over all ranks.

    ``of``: the cell of each action. ``half``: 1 where an action is the second of a pair. ``first``: by rank.
    ``starts``: the first action of each cell.
    """

    of: np.ndarray
    half: np.ndarray
    first: np.ndarray
    starts: np.ndarray


def cells_of(schedule: Schedule) -> Cells:
    """The cells of a schedule."""
    joined = schedule.orders.joined
    half = np.zeros(len(joined), dtype=np.int8)
    half[1:] = joined[:-1]
    of = np.cumsum(half == 0, dtype=np.int32) - 1
    return Cells(of, half, of[list(schedule.orders.offsets[:-1])], np.flatnonzero(half == 0))


@frozen
class Messages:
    """What ranks send each other, channel by channel in the order sent; actions by index of the columns.

    Channel c's messages are ``starts[c]`` to ``starts[c + 1]``.
    """

    sender: np.ndarray
    receiver: np.ndarray
    starts: np.ndarray

    @property
    def channel(self) -> np.ndarray:
        """The channel of each message."""
        return np.repeat(np.arange(len(self.starts) - 1, dtype=np.int32), np.diff(self.starts))


def messages(schedule: Schedule) -> Messages:
    """A message for each action that needs what another rank computes."""
    orders, need, rank = schedule.orders, needed(schedule), rank_column(schedule.orders)
    taker = np.full(orders.num_actions, -1, dtype=np.int32)
    takes = np.flatnonzero((need >= 0) & (rank[need] != rank))
    taker[need[takes]] = takes
    sender = np.flatnonzero(taker >= 0).astype(np.int32)
    receiver = taker[sender]
    backward = orders.phase[receiver] != F
    key = (rank[sender].astype(np.int64) * len(orders) + rank[receiver]) * 2 + backward
    by_channel = np.argsort(_narrow(key), kind="stable")
    key = key[by_channel]
    starts = np.concatenate([np.flatnonzero(np.diff(key, prepend=-1)), [len(key)]])
    return Messages(sender[by_channel], receiver[by_channel], starts)


def _narrow(key: np.ndarray) -> np.ndarray:
    """The same numbers in 16 bits if they fit, which sort much faster."""
    return key.astype(np.uint16) if not len(key) or key.max() < 2**16 else key


def receive_cells(cells: Cells, rank: np.ndarray, sent: Messages) -> tuple[np.ndarray, np.ndarray]:
    """For each message, the cell before which its receive is posted, and the one for whose sake.

    That is the one ahead of its use, or of the first use of what the channel brings after it.
    """
    far = len(cells.starts) + 1
    lift = sent.channel.astype(np.int64) * far
    used = np.minimum.accumulate((cells.of[sent.receiver] + lift)[::-1])[::-1] - lift
    return np.maximum(used - 1, cells.first[rank[sent.receiver]]), used


def send_depths(schedule: Schedule, sent: Messages) -> np.ndarray:
    """By channel, how many sends may be under way: the least with which none is ever waited for in vain.

    Raises PlanError for a schedule that can never end.
    """
    cells, rank = cells_of(schedule), rank_column(schedule.orders)
    spans = schedule_times(schedule, unit_costs(schedule.num_stages))
    end = spans.end.astype(np.int64)
    posted_before, _ = receive_cells(cells, rank, sent)
    first_action = cells.starts[posted_before]
    is_first = posted_before == cells.first[rank[sent.receiver]]
    posted = np.where(is_first, 0, end[first_action - 1])
    lift = sent.channel.astype(np.int64) * (int(end.max()) + 1)
    later = np.searchsorted(lift + end[sent.sender], lift + posted, side="right")
    lag = later - np.arange(len(later))
    depths: np.ndarray = np.maximum(1, np.maximum.reduceat(lag, sent.starts[:-1]) if len(lag) else lag)
    return depths


def with_transfers(schedule: Schedule, boundary_bytes: int) -> Program:
    """Compute rows with their sends, receives and waits.

    A cell's rows: receives for the next, waits for its own, the computing, and for each half a wait for room
    in the channel and the send. Sends that are still under way are waited for at the end.
    """
    check_bytes(boundary_bytes)
    orders, sent = schedule.orders, messages(schedule)
    cells, rank = cells_of(schedule), rank_column(schedule.orders)
    places = _places(cells, rank, sent, send_depths(schedule, sent))
    backward = (orders.phase[sent.receiver] != F).astype(np.int8)
    kind = np.empty(places.offsets[-1], dtype=np.int8)
    stage, microbatch, peer, target, batch = (np.full(len(kind), -1, dtype=np.int32) for _ in range(5))
    size = np.zeros(len(kind), dtype=np.int64)

    kind[places.compute] = np.array(COMPUTE, dtype=np.int8)[orders.phase]  # in the order of PHASES
    stage[places.compute], microbatch[places.compute] = orders.stage, orders.microbatch
    joined = np.flatnonzero(orders.joined)
    for half in (0, 1):
        batch[places.compute[joined + half]] = np.arange(len(joined))
    kind[places.receive] = np.array(RECEIVES, dtype=np.int8)[backward]
    kind[places.send] = np.array(SENDS, dtype=np.int8)[backward]
    kind[places.arrived] = kind[places.sent] = Kind.WAIT
    first_row = np.array(places.offsets, dtype=np.int32)
    for post, wait, own, other in (
        (places.receive, places.arrived, sent.receiver, sent.sender),
        (places.send, places.sent, sent.sender, sent.receiver),
    ):
        for row in (post, wait):
            stage[row], microbatch[row], peer[row] = orders.stage[own], orders.microbatch[own], rank[other]
        target[wait] = post - first_row[rank[own]]
        size[post] = boundary_bytes
    return make_program(
        (),
        places.offsets,
        kind=kind,
        stage=stage,
        microbatch=microbatch,
        peer=peer,
        bytes=size,
        target=target,
        **({"batch": batch} if len(joined) else {}),
    )


@frozen
class _Places:
    """Rows, by index of the columns: of each action, both ends of each message and the waits for them."""

    offsets: tuple[int, ...]
    compute: np.ndarray
    receive: np.ndarray
    arrived: np.ndarray
    send: np.ndarray
    sent: np.ndarray


def _places(cells: Cells, rank: np.ndarray, sent: Messages, depths: np.ndarray) -> _Places:
    """Where every row of ``with_transfers`` stands."""
    number = np.arange(len(sent.sender))
    made_room = number + depths[sent.channel]  # the message that is not sent before this one is over
    in_time = np.flatnonzero(made_room < sent.starts[1:][sent.channel])
    late = np.flatnonzero(made_room >= sent.starts[1:][sent.channel])
    late = late[np.lexsort((late, sent.sender[sent.starts[:-1]][sent.channel[late]]))]
    room_for = sent.sender[made_room[in_time]]
    last_cell = np.append(cells.first[1:], len(cells.starts)) - 1
    receive_at, used = receive_cells(cells, rank, sent)
    by_use = np.argsort(used, kind="stable")
    receives = np.zeros(len(cells.of), dtype=np.bool_)
    receives[sent.receiver] = True
    second = cells.half[sent.receiver] * receives[sent.receiver - 1]

    steps = [  # of each cell: which messages (or actions), in what cells, and where among several
        (by_use, receive_at[by_use], _number_in_run(receive_at[by_use])),
        (number, cells.of[sent.receiver], second),
        (np.arange(len(cells.of)), cells.of, cells.half),
    ]
    for half in (0, 1):
        own = cells.half[room_for] == half
        steps.append((in_time[own], cells.of[room_for[own]], 0))
        own = np.flatnonzero(cells.half[sent.sender] == half)
        steps.append((own, cells.of[sent.sender[own]], 0))
    end = last_cell[rank[sent.sender[late]]]
    steps.append((late, end, _number_in_run(end)))

    counts = [np.bincount(cell, minlength=len(cells.starts)).astype(np.int32) for _, cell, _ in steps]
    ends = np.cumsum(sum(counts), dtype=np.int32)
    free = np.concatenate([np.zeros(1, dtype=np.int32), ends[:-1]])
    offsets = (*free[cells.first].tolist(), int(ends[-1]))
    found = [np.empty(len(own), dtype=np.int32) for own in (number, number, cells.of, number, number)]
    receive, arrived, compute, send, waited = found
    targets = (receive, arrived, compute, waited, send, waited, send, waited)
    for out, (which, cell, among), count in zip(targets, steps, counts, strict=True):
        out[which] = free[cell] + among
        free += count
    return _Places(offsets, compute, receive, arrived, send, waited)


def _number_in_run(keys: np.ndarray) -> np.ndarray:
    """For each of some sorted keys, how many equal ones stand before it."""
    return np.arange(len(keys), dtype=np.int32) - np.searchsorted(keys, keys, side="left").astype(np.int32)
