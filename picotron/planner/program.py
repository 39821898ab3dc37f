"""A schedule lowered to rows: everything a pipeline rank posts, computes and waits for, in order.

Sends and receives are posted in program order on one channel per (pair, direction) and end at their WAIT.
A receive is posted one action ahead of its use; a send is waited for before the next one on its channel,
so at most one is in flight there. No lowered program deadlocks, even if a send ends only when its receive
is posted: ``lower`` raises PlanError for a schedule whose ranks would wait in a circle.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
from attrs import cmp_using, field, frozen

from picotron.errors import PlanError
from picotron.planner.actions import Action, Phase
from picotron.planner.data import Bucket
from picotron.planner.pipeline import Schedule


class Kind(IntEnum):
    """What a row does."""

    COUNT = 0  # sum the step's valid tokens over data-parallel ranks
    FORWARD = 1
    BACKWARD = 2
    SEND_F = 3  # activations to the next stage
    RECV_F = 4
    SEND_B = 5  # gradients to the previous stage
    RECV_B = 6
    REDUCE = 7  # sum one bucket over one group
    WAIT = 8
    NORM = 9  # gradient norm and loss over the world
    UPDATE = 10


COMPUTE = (Kind.FORWARD, Kind.BACKWARD)
SENDS = (Kind.SEND_F, Kind.SEND_B)
RECEIVES = (Kind.RECV_F, Kind.RECV_B)
STATISTICS_BYTES = 24  # squared gradient norm, loss sum, valid tokens: three fp64
COUNT_BYTES = 8


class Row(NamedTuple):
    """One row, made only when looked at. -1 stands for none; ``bytes`` is payload of one rank."""

    kind: Kind
    stage: int = -1
    microbatch: int = -1
    part: int = -1  # bucket
    anchor_row: int = -1  # posted inside that row ...
    anchor_segment: int = -1  # ... once this segment of it has run
    peer: int = -1  # pipeline rank
    group: int = -1  # index into Program.groups
    bytes: int = 0
    target: int = -1  # the row that a WAIT ends

    def __str__(self) -> str:
        name = {Kind.FORWARD: "F", Kind.BACKWARD: "B"}.get(self.kind, self.kind.name)
        if self.kind is Kind.REDUCE:
            return f"{self.stage}{name}{self.part}"
        return (
            name if self.stage < 0 else f"{self.stage}{name}{self.microbatch if self.microbatch >= 0 else ''}"
        )


_COLUMNS = Row._fields


def _read_only(column: Sequence[int]) -> np.ndarray:
    try:
        array = np.asarray(column, dtype=np.int64)
    except OverflowError:
        raise PlanError("a row's bytes must fit in 64 bits; the model or the batch is too large") from None
    array.setflags(write=False)
    return array


_column: Any = field(converter=_read_only, eq=cmp_using(eq=np.array_equal), repr=False)


@frozen(kw_only=True)
class Program:
    """Rows of all pipeline ranks in read-only columns; rank r's are ``offsets[r]`` to ``offsets[r + 1]``.

    ``anchor_row`` and ``target`` count from the rank's own first row.
    """

    groups: tuple[str, ...]
    offsets: tuple[int, ...]
    kind: np.ndarray = _column
    stage: np.ndarray = _column
    microbatch: np.ndarray = _column
    part: np.ndarray = _column
    anchor_row: np.ndarray = _column
    anchor_segment: np.ndarray = _column
    peer: np.ndarray = _column
    group: np.ndarray = _column
    bytes: np.ndarray = _column
    target: np.ndarray = _column

    @property
    def num_ranks(self) -> int:
        """Pipeline ranks."""
        return len(self.offsets) - 1

    @property
    def num_rows(self) -> int:
        """Rows over all ranks."""
        return self.offsets[-1]


def rows(program: Program, rank: int) -> tuple[Row, ...]:
    """The rows of one pipeline rank, in program order."""
    first, stop = program.offsets[rank : rank + 2]
    columns = [getattr(program, name)[first:stop].tolist() for name in _COLUMNS]
    return tuple(Row(Kind(kind), *rest) for kind, *rest in zip(*columns, strict=True))


def lower(
    schedule: Schedule,
    *,
    boundary_bytes: int,
    buckets: Sequence[Sequence[Bucket]],
    bucket_bytes: Sequence[Sequence[int]],
    data_parallel: bool,
    world_size: int,
) -> Program:
    """The program of one step.

    ``boundary_bytes``: what passes between stages for one microbatch. ``buckets`` and ``bucket_bytes``:
    for each stage. Raises PlanError where ranks would wait for each other in a circle.
    """
    names = sorted(
        {name for own in buckets for bucket in own for name in bucket.partial} | {"dp_cp", "world"}
    )
    per_rank = []
    for rank, order in enumerate(schedule.orders):
        lowered = _with_transfers(schedule, rank, order, boundary_bytes)
        lowered = _with_counting(schedule, rank, lowered, names, data_parallel)
        for stage in (stage for stage, owner in enumerate(schedule.stage_ranks) if owner == rank):
            lowered = _with_reductions(lowered, buckets[stage], bucket_bytes[stage], names)
        lowered += [
            Row(Kind.NORM, group=names.index("world"), bytes=STATISTICS_BYTES if world_size > 1 else 0),
            Row(Kind.UPDATE),
        ]
        per_rank.append(lowered)
    program = _program(per_rank, names)
    check_no_deadlock(program)
    check_channels(program)
    return program


def _with_transfers(schedule: Schedule, rank: int, order: Sequence[Action], size: int) -> list[Row]:
    """Compute rows with their sends, receives and waits."""
    out: list[Row] = []
    posted: dict[Action, int] = {}
    in_flight: dict[tuple[Kind, int], int] = {}

    def receive(action: Action) -> None:
        source = _source(schedule, action)
        if source is not None and source != rank:
            kind = Kind.RECV_F if action.phase is Phase.FORWARD else Kind.RECV_B
            posted[action] = len(out)
            out.append(Row(kind, action.stage, action.microbatch, peer=source, bytes=size))

    def wait(target: int) -> None:
        row = out[target]
        out.append(Row(Kind.WAIT, row.stage, row.microbatch, peer=row.peer, target=target))

    if order:
        receive(order[0])
    for action, following in zip(order, [*order[1:], None], strict=True):
        if following is not None:
            receive(following)
        if action in posted:
            wait(posted[action])
        kind = Kind.FORWARD if action.phase is Phase.FORWARD else Kind.BACKWARD
        out.append(Row(kind, action.stage, action.microbatch))
        target = _destination(schedule, action)
        if target is not None and target != rank:
            send = Kind.SEND_F if action.phase is Phase.FORWARD else Kind.SEND_B
            if (send, target) in in_flight:
                wait(in_flight[send, target])
            in_flight[send, target] = len(out)
            out.append(Row(send, action.stage, action.microbatch, peer=target, bytes=size))
    for target in in_flight.values():
        wait(target)
    return out


def _source(schedule: Schedule, action: Action) -> int | None:
    stage = action.stage + (-1 if action.phase is Phase.FORWARD else 1)
    return schedule.stage_ranks[stage] if 0 <= stage < schedule.num_stages else None


def _destination(schedule: Schedule, action: Action) -> int | None:
    stage = action.stage + (1 if action.phase is Phase.FORWARD else -1)
    return schedule.stage_ranks[stage] if 0 <= stage < schedule.num_stages else None


def _with_counting(
    schedule: Schedule, rank: int, lowered: list[Row], names: list[str], data_parallel: bool
) -> list[Row]:
    """The rank of the last stage first learns how many valid tokens its loss is divided by."""
    if schedule.stage_ranks[-1] != rank:
        return lowered
    count = Row(
        Kind.COUNT,
        schedule.num_stages - 1,
        group=names.index("dp_cp"),
        bytes=COUNT_BYTES if data_parallel else 0,
    )
    return [count, *(_shifted(row, 1) for row in lowered)]


def _shifted(row: Row, by: int) -> Row:
    return row._replace(
        target=row.target + by if row.target >= 0 else -1,
        anchor_row=row.anchor_row + by if row.anchor_row >= 0 else -1,
    )


def _with_reductions(
    lowered: list[Row], buckets: Sequence[Bucket], sizes: Sequence[int], names: list[str]
) -> list[Row]:
    """Each bucket's first sum starts inside the last backward as soon as the bucket is complete.

    Its row follows the backward it is anchored in; further sums of the same bucket follow the wait for the
    one before.
    """
    reduced = [(bucket, size) for bucket, size in zip(buckets, sizes, strict=True) if bucket.partial]
    if not reduced:
        return lowered
    stage = reduced[0][0].stage
    anchor = max(i for i, row in enumerate(lowered) if row.kind is Kind.BACKWARD and row.stage == stage)

    def reduction(bucket: Bucket, size: int, group: str) -> Row:
        return Row(Kind.REDUCE, stage, part=bucket.index, group=names.index(group), bytes=size)

    started = [
        reduction(bucket, size, bucket.partial[0])._replace(
            anchor_row=anchor, anchor_segment=bucket.ready_segment
        )
        for bucket, size in reduced
    ]
    shift = len(started)
    tail = [
        row._replace(
            target=row.target + shift * (row.target > anchor),
            anchor_row=row.anchor_row + shift * (row.anchor_row > anchor),
        )
        for row in lowered[anchor + 1 :]
    ]
    out = [*lowered[: anchor + 1], *started, *tail]
    for position, (bucket, size) in enumerate(reduced, start=anchor + 1):
        last = position
        for group in bucket.partial[1:]:
            out.append(Row(Kind.WAIT, stage, part=bucket.index, target=last))
            last = len(out)
            out.append(reduction(bucket, size, group))
        out.append(Row(Kind.WAIT, stage, part=bucket.index, target=last))
    return out


def _program(per_rank: list[list[Row]], names: list[str]) -> Program:
    offsets = [0]
    for own in per_rank:
        offsets.append(offsets[-1] + len(own))
    every = [row for own in per_rank for row in own]
    columns: dict[str, Any] = dict(zip(_COLUMNS, zip(*every, strict=True), strict=True))
    return Program(groups=tuple(names), offsets=tuple(offsets), **columns)


def matching_sends(program: Program) -> dict[tuple[int, int], tuple[int, int]]:
    """For each receive (rank, row), the send (rank, row) across the same border for its microbatch."""
    sends: dict[tuple[Kind, int, int, int, int], tuple[int, int]] = {}
    for rank in range(program.num_ranks):
        for index, row in enumerate(rows(program, rank)):
            if row.kind in SENDS:
                step = 1 if row.kind is Kind.SEND_F else -1
                receive = Kind.RECV_F if row.kind is Kind.SEND_F else Kind.RECV_B
                sends[receive, row.peer, rank, row.stage + step, row.microbatch] = rank, index
    return {
        (rank, index): sends[row.kind, rank, row.peer, row.stage, row.microbatch]
        for rank in range(program.num_ranks)
        for index, row in enumerate(rows(program, rank))
        if row.kind in RECEIVES
    }


def check_channels(program: Program) -> None:
    """Raise PlanError unless every channel's receives come in the order of its sends."""
    own = [rows(program, rank) for rank in range(program.num_ranks)]
    latest: dict[tuple[int, int, Kind], int] = {}
    for (rank, index), (sender, sent) in sorted(matching_sends(program).items()):
        channel = sender, rank, own[rank][index].kind
        if sent < latest.get(channel, -1):
            raise PlanError(
                f"a channel delivers in the order sent: rank {rank} receives {own[rank][index]} "
                f"after what rank {sender} sent it later"
            )
        latest[channel] = sent


def check_no_deadlock(program: Program) -> None:
    """Raise PlanError unless every rank can finish even if a send ends only when its receive is posted.

    Rows of a rank run in order and only WAIT blocks, so what any rank can reach does not depend on who goes
    first: walking every rank as far as it gets decides it.
    """
    receives = matching_sends(program)
    partner = {**receives, **{send: receive for receive, send in receives.items()}}
    own = [rows(program, rank) for rank in range(program.num_ranks)]
    at = [0] * program.num_ranks

    def blocked(rank: int) -> bool:
        row = own[rank][at[rank]]
        other = partner.get((rank, row.target)) if row.kind is Kind.WAIT else None
        return other is not None and at[other[0]] <= other[1]

    moved = True
    while moved:
        moved = False
        for rank in range(program.num_ranks):
            while at[rank] < len(own[rank]) and not blocked(rank):
                at[rank] += 1
                moved = True
    stuck = [
        f"rank {rank} at {own[rank][i]} of {own[rank][own[rank][i].target]}"
        for rank, i in enumerate(at)
        if i < len(own[rank])
    ]
    if stuck:
        raise PlanError(f"the ranks of this schedule wait for each other: {'; '.join(stuck)}")


def payload_bytes(program: Program, rank: int) -> dict[tuple[str, str], int]:
    """Payload that one pipeline rank hands over outside its bodies, by (kind, group or direction)."""
    totals: dict[tuple[str, str], int] = {}
    for row in rows(program, rank):
        if row.bytes and row.kind is not Kind.WAIT:
            key = _payload_key(program, row)
            totals[key] = totals.get(key, 0) + row.bytes
    return totals


def _payload_key(program: Program, row: Row) -> tuple[str, str]:
    if row.kind in SENDS or row.kind in RECEIVES:
        return ("send" if row.kind in SENDS else "recv"), "pp"
    return "all_reduce", program.groups[row.group]


def anchored(own: Sequence[Row]) -> dict[tuple[int, int], tuple[int, ...]]:
    """Rows posted inside other rows: by (anchor row, segment after which), their indices in order."""
    found: dict[tuple[int, int], tuple[int, ...]] = {}
    for index, row in enumerate(own):
        if row.anchor_row >= 0:
            key = row.anchor_row, row.anchor_segment
            found[key] = (*found.get(key, ()), index)
    return found


def execution_order(own: Sequence[Row]) -> tuple[int, ...]:
    """Row indices in the order in which a rank gets done with posting or running them.

    A row posted inside another one comes before it.
    """
    inside: dict[int, list[int]] = {}
    for (anchor, _), posted in sorted(anchored(own).items(), key=lambda item: (item[0][0], -item[0][1])):
        inside.setdefault(anchor, []).extend(posted)
    return tuple(
        index
        for anchor, row in enumerate(own)
        if row.anchor_row < 0
        for index in (*inside.get(anchor, ()), anchor)
    )
