"""A schedule lowered to a program: a chain of pure passes, each over whole columns.

A receive is posted one action ahead of its use, and earlier where the sender sends it earlier than what is
used before it: so every channel delivers in the order sent, whatever the schedule. A send is waited for when
its channel is full. How many it may hold is the least with which no rank ever waits for room while every
action runs as early as it can, at equal costs: so whatever can run at all runs even if a send ends only when
its receive is posted. Between two stages of one rank nothing is sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from attrs import frozen

from picotron.errors import PlanError
from picotron.planner.actions import F
from picotron.planner.data import Bucket
from picotron.planner.passes import cells, with_streams
from picotron.planner.pipeline import Schedule
from picotron.planner.program import (
    COMPUTE,
    COUNT_BYTES,
    RECEIVES,
    SENDS,
    STATISTICS_BYTES,
    Kind,
    Program,
    Row,
    check_bytes,
    last_backwards,
    make_program,
    with_rows,
)
from picotron.planner.schedule_times import needed, schedule_times, unit_costs
from picotron.planner.sharding import Exchange
from picotron.planner.validity import rank_column

MIRROR = "mirror"  # the two ranks that hold a copy of the same stages


MAX_REDUCTIONS = 2_000_000  # rows that reduce gradients in every microbatch


@frozen(kw_only=True)
class Sharded:
    """What is done with each bucket of each stage: its collectives in order, the first inside its B or W.

    ``each_microbatch``: a first one that is a reduce-scatter in every B or W, not in the last alone.
    ``gathers``: after the update, where there is one.
    """

    sums: Sequence[Sequence[Sequence[Exchange]]] = ()
    gathers: Sequence[Sequence[Exchange | None]] = ()
    each_microbatch: bool = False


NOTHING_SHARDED = Sharded()


@frozen(kw_only=True)
class Stream:
    """What moves beside the computing of each stage: see ``passes.with_streams``."""

    kind: Kind
    beside: tuple[Kind, ...]
    stage_bytes: Sequence[int]
    group: str | None = None


def lower(
    schedule: Schedule,
    *,
    boundary_bytes: int,
    buckets: Sequence[Sequence[Bucket]],
    bucket_bytes: Sequence[Sequence[int]],
    data_parallel: bool,
    world_size: int,
    sharded: Sharded = NOTHING_SHARDED,
    streams: Sequence[Stream] = (),
) -> Program:
    """The program of one step.

    ``boundary_bytes``: what passes between stages for one microbatch. ``buckets`` and ``bucket_bytes``:
    for each stage. ``sharded``: what is done with them instead of summing them over where they are partial.
    ``streams``: what is gathered and copied beside the computing. Raises PlanError where ranks would wait for
    each other in a circle.
    """
    program = with_transfers(schedule, boundary_bytes)
    for stream in streams:
        program = with_streams(program, stream.kind, stream.beside, stream.stage_bytes, group=stream.group)
    if sharded.sums:
        program = with_sums(program, buckets, sharded.sums, each_microbatch=sharded.each_microbatch)
    else:
        program = with_reductions(program, buckets, bucket_bytes)
    if schedule.bidirectional:
        program = with_mirror_sums(program, schedule, [sum(sizes) for sizes in bucket_bytes])
    program = with_frame(
        program,
        schedule,
        count_bytes=COUNT_BYTES if data_parallel else 0,
        statistics_bytes=STATISTICS_BYTES if world_size > 1 else 0,
    )
    return with_gathers(program, buckets, sharded.gathers) if sharded.gathers else program


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


def with_reductions(
    program: Program, buckets: Sequence[Sequence[Bucket]], bucket_bytes: Sequence[Sequence[int]]
) -> Program:
    """Each bucket summed over the groups where its gradients are partial, as ``with_sums`` does."""
    sums = [
        [
            [Exchange(kind=Kind.REDUCE, group=group, bytes=size) for group in bucket.partial]
            for bucket, size in zip(own, sizes, strict=True)
        ]
        for own, sizes in zip(buckets, bucket_bytes, strict=True)
    ]
    return with_sums(program, buckets, sums)


def with_sums(
    program: Program,
    buckets: Sequence[Sequence[Bucket]],
    sums: Sequence[Sequence[Sequence[Exchange]]],
    *,
    each_microbatch: bool = False,
) -> Program:
    """Each bucket's first sum starts inside its stage's last B or W as soon as the bucket is complete.

    Its row follows the one it is anchored in; further sums of the same bucket follow the wait for the one
    before, at the end, stage by stage in the order in which they are complete. ``each_microbatch``: a first
    one that is a reduce-scatter starts inside every B or W, and has ended before the rank's next one begins.
    """
    names = (exchange.group for own in sums for bucket in own for exchange in bucket)
    groups = _with_groups(program, "dp_cp", "world", *names)
    new: list[tuple[int, int, Row]] = []

    def post(rank: int, before: int, row: Row) -> int:
        new.append((rank, before, row))
        return program.num_rows + len(new) - 1

    lasts, followed = last_backwards(program), dict[int, int]()
    if each_microbatch:
        for rank, before, anchor in _followed_backwards(program):
            stage, microbatch = int(program.stage[anchor]), int(program.microbatch[anchor])
            if lasts[rank, stage] == anchor:
                followed[anchor] = before
                continue
            for bucket, wanted in zip(buckets[stage], sums[stage], strict=True):
                if wanted and wanted[0].kind is Kind.REDUCE_SCATTER:
                    row = _sum(groups, bucket, wanted[0], anchor, bucket.ready_segment, microbatch)
                    wait = Row(Kind.WAIT, stage, microbatch, bucket.index, target=post(rank, anchor + 1, row))
                    post(rank, before, wait)
                    _check_reductions(len(new))
    started: list[tuple[int, int, Bucket, Sequence[Exchange], int]] = []
    for (rank, stage), anchor in lasts.items():
        for bucket, wanted in zip(buckets[stage], sums[stage], strict=True):
            if wanted:
                row = _sum(groups, bucket, wanted[0], anchor, bucket.ready_segment)
                started.append((rank, anchor, bucket, wanted, post(rank, anchor + 1, row)))
    for rank, anchor, bucket, wanted, last in started:
        stop = program.offsets[rank + 1]
        scattered = wanted[0].kind is Kind.REDUCE_SCATTER
        until = followed.get(anchor, stop) if scattered else stop
        post(rank, until, Row(Kind.WAIT, bucket.stage, part=bucket.index, target=last))
        for exchange in wanted[1:]:
            last = post(rank, stop, _sum(groups, bucket, exchange))
            post(rank, stop, Row(Kind.WAIT, bucket.stage, part=bucket.index, target=last))
    return with_rows(program, new, groups)


def _followed_backwards(program: Program) -> Iterator[tuple[int, int, int]]:
    """Each B and W that another one of its rank follows: the rank, where that cell begins, its row."""
    own = cells(program)
    found = np.flatnonzero(program.is_kind(Kind.BACKWARD, Kind.BACKWARD_WEIGHT)[own.rows])
    begins, rank = own.opens[own.of[found]], program.rank[own.rows[found]]
    for index, row in enumerate(own.rows[found].tolist()):
        later = int(np.searchsorted(begins, row, side="right"))
        if later < len(begins) and rank[later] == rank[index]:
            yield int(rank[index]), int(begins[later]), row


def _check_reductions(count: int) -> None:
    if count > MAX_REDUCTIONS:
        raise PlanError(
            f"zero_stage 2 and 3 reduce every bucket in every microbatch, at most {MAX_REDUCTIONS:,} rows, "
            "got more; raise bucket_bytes or micro_batch"
        )


def _sum(
    groups: Sequence[str],
    bucket: Bucket,
    exchange: Exchange,
    anchor_row: int = -1,
    segment: int = -1,
    microbatch: int = -1,
) -> Row:
    return Row(
        exchange.kind,
        bucket.stage,
        microbatch,
        part=bucket.index,
        anchor_row=anchor_row,
        anchor_segment=segment,
        group=groups.index(exchange.group),
        bytes=exchange.bytes,
    )


def with_gathers(
    program: Program,
    buckets: Sequence[Sequence[Bucket]],
    gathers: Sequence[Sequence[Exchange | None]],
) -> Program:
    """At the end of each rank, after the update, every bucket's parameters gathered again."""
    groups = _with_groups(program, *(found.group for own in gathers for found in own if found is not None))
    posts, waits = list[tuple[int, int, Row]](), list[tuple[int, int, Row]]()
    for rank, stage in last_backwards(program):
        stop = program.offsets[rank + 1]
        for bucket, found in zip(buckets[stage], gathers[stage], strict=True):
            if found is not None:
                wait = Row(Kind.WAIT, stage, part=bucket.index, target=program.num_rows + len(posts))
                posts.append((rank, stop, _sum(groups, bucket, found)))
                waits.append((rank, stop, wait))
    return with_rows(program, [*posts, *waits], groups)


def with_mirror_sums(program: Program, schedule: Schedule, stage_bytes: Sequence[int]) -> Program:
    """Where two ranks hold a copy of a stage, the sum of its gradients over the two.

    It is posted once the stage's own sums have ended or, without any, after its last B or W; and both ranks
    post those of their stages in the same order.
    """
    groups = _with_groups(program, MIRROR)
    ready = last_backwards(program)
    for index in np.flatnonzero(program.is_kind(Kind.WAIT) & (program.part >= 0)).tolist():
        rank = int(np.searchsorted(program.offsets, index, side="right")) - 1
        ready[rank, int(program.stage[index])] = index
    latest: dict[int, int] = {}
    for (rank, stage), index in ready.items():
        latest[stage] = max(latest.get(stage, 0), index - program.offsets[rank])
    posts: list[tuple[int, int, Row]] = []
    waits: list[tuple[int, int, Row]] = []
    for rank in range(program.num_ranks):
        own = [stage for stage in schedule.rank_stages(rank) if _mirrored(schedule, stage)]
        before = 0
        for stage in sorted(own, key=lambda stage: (latest[stage], stage)):
            before = max(before, ready[rank, stage] + 1)
            wait = Row(Kind.WAIT, stage, target=program.num_rows + len(posts))
            row = Row(Kind.REDUCE, stage, group=groups.index(MIRROR), bytes=stage_bytes[stage])
            posts.append((rank, before, row))
            waits.append((rank, program.offsets[rank + 1], wait))
    return with_rows(program, [*posts, *waits], groups)


def _mirrored(schedule: Schedule, stage: int) -> bool:
    return schedule.stage_ranks[stage] != schedule.stage_ranks[schedule.num_stages - 1 - stage]


def with_frame(program: Program, schedule: Schedule, *, count_bytes: int, statistics_bytes: int) -> Program:
    """What stands around the microbatches of a step.

    A rank of the last stage first learns how many valid tokens its loss is divided by. At the end of each
    rank come norm and loss, summed over the world, and the optimizer's step.
    """
    groups = _with_groups(program, "dp_cp", "world")
    last = schedule.num_stages - 1
    count = Row(Kind.COUNT, last, group=groups.index("dp_cp"), bytes=count_bytes)
    norm = Row(Kind.NORM, group=groups.index("world"), bytes=statistics_bytes)
    new = []
    for rank, (first, stop) in enumerate(pairwise(program.offsets)):
        new += [(rank, first, count)] * (last in schedule.rank_stages(rank))
        new += [(rank, stop, norm), (rank, stop, Row(Kind.UPDATE))]
    return with_rows(program, new, groups)


def _with_groups(program: Program, *names: str) -> tuple[str, ...]:
    """The program's groups and these. Old rows keep their index, so new names come last."""
    return (*program.groups, *sorted({*names} - {*program.groups}))
