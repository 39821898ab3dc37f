"""Sums of gradients as rows of a program: posted inside the backward that completes them.

A bucket's first sum starts inside its stage's last B or W, or inside every one where gradients are kept in
parts (it is then waited for before the next bucket's starts); what follows (sums over other groups, gathers
of updated parameters, sums over two copies of a stage) comes after, in an order that every rank of a group
shares.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from attrs import Factory, evolve, frozen

from picotron.errors import PlanError
from picotron.planner.data import Bucket, waited_after
from picotron.planner.passes import cells
from picotron.planner.pipeline import Schedule
from picotron.planner.program import (
    Kind,
    Program,
    Row,
    last_backwards,
    with_rows,
)
from picotron.planner.sharding import Exchange

MIRROR = "mirror"  # the two ranks that hold a copy of the same stages
MAX_REDUCTIONS = 2_000_000  # rows that reduce gradients in every microbatch


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
    scattered: Sequence[Sequence[bool]] = (),
    waits_inside: bool = True,
) -> Program:
    """Each bucket's first sum starts inside its stage's last B or W as soon as the bucket is complete.

    Its row follows the one it is anchored in; further sums of the same bucket follow the wait for the one
    before, at the end, stage by stage in the order in which they are complete. ``scattered``: of each bucket,
    whether its first sum starts inside every B or W. It is waited for there (``waits_inside``), before the
    next buckets start; the last ones before the rank's next B or W begins.
    """
    names = (exchange.group for own in sums for bucket in own for exchange in bucket)
    groups = with_groups(program, "dp_cp", "world", *names)
    each = scattered or [[False] * len(own) for own in buckets]
    wanted = _Wanted(buckets, sums, each, waits_inside)
    added = _Added(program.num_rows)
    followed = _sums_of_each(program, groups, wanted, added) if any(map(any, scattered)) else {}
    started: list[tuple[int, int, _Started]] = []
    for (rank, _), anchor in last_backwards(program).items():
        posted = _started(program, groups, wanted, added, (rank, anchor), scattered_only=False)
        started += [(rank, anchor, one) for one in posted]
    for rank, anchor, one in started:
        stop, bucket, last = program.offsets[rank + 1], one.bucket, one.row
        if not one.is_waited:
            until = followed.get(anchor, stop) if one.is_scattered else stop
            added.post(rank, until, Row(Kind.WAIT, bucket.stage, part=bucket.index, target=last))
        for exchange in one.sums[1:]:
            last = added.post(rank, stop, _sum(groups, bucket, exchange))
            added.post(rank, stop, Row(Kind.WAIT, bucket.stage, part=bucket.index, target=last))
    return with_rows(program, added.rows, groups)


@frozen
class _Wanted:
    """What is done with each bucket of each stage, and whether every B or W begins with it."""

    buckets: Sequence[Sequence[Bucket]]
    sums: Sequence[Sequence[Sequence[Exchange]]]
    scattered: Sequence[Sequence[bool]]
    waits_inside: bool

    def of(self, stage: int) -> Iterator[tuple[Bucket, Sequence[Exchange], bool]]:
        """The buckets of ``stage`` with which anything is done, and what."""
        columns = zip(self.buckets[stage], self.sums[stage], self.scattered[stage], strict=True)
        return ((bucket, own, each) for bucket, own, each in columns if own)

    def waited_after(self, stage: int) -> dict[int, int | None]:
        """Of the buckets that every B or W reduces, the segment after which that is waited for."""
        own = [bucket for bucket, _, each in self.of(stage) if each]
        return waited_after(own) if self.waits_inside else {bucket.index: None for bucket in own}


@frozen
class _Started:
    """The row in which the first sum of a bucket starts, and whether it is waited for inside its cell."""

    bucket: Bucket
    sums: Sequence[Exchange]
    row: int
    is_scattered: bool
    is_waited: bool


@frozen
class _Added:
    """Rows that a program gets: the rank of each, and the row before which it stands."""

    num_old: int
    rows: list[tuple[int, int, Row]] = Factory(list)

    def post(self, rank: int, before: int, row: Row) -> int:
        """Add one; the index by which others refer to it."""
        self.rows.append((rank, before, row))
        return self.num_old + len(self.rows) - 1


def _started(
    program: Program,
    groups: Sequence[str],
    wanted: _Wanted,
    added: _Added,
    place: tuple[int, int],
    *,
    scattered_only: bool,
) -> list[_Started]:
    """The first sums of a stage's buckets inside a B or W; ``place``: its rank and its row."""
    rank, anchor = place
    stage = int(program.stage[anchor])
    microbatch = int(program.microbatch[anchor]) if scattered_only else -1
    ends, found = wanted.waited_after(stage), list[_Started]()
    for bucket, own, each in wanted.of(stage):
        if scattered_only and not each:
            continue
        for number, one in enumerate(found if each else ()):
            if one.is_waited or not one.is_scattered or ends[one.bucket.index] != bucket.ready_segment:
                continue
            if one.sums[0].group == own[0].group:
                wait = _wait(one, anchor, bucket.ready_segment, microbatch)
                added.post(rank, anchor + 1, wait)
                found[number] = evolve(one, is_waited=True)
        row = _sum(groups, bucket, own[0], anchor, bucket.ready_segment, microbatch)
        found.append(_Started(bucket, own, added.post(rank, anchor + 1, row), each, is_waited=False))
    return found


def _wait(one: _Started, anchor: int, segment: int, microbatch: int) -> Row:
    """The wait for a first sum, inside the B or W that starts it."""
    return Row(
        Kind.WAIT,
        one.bucket.stage,
        microbatch,
        one.bucket.index,
        anchor_row=anchor,
        anchor_segment=segment,
        target=one.row,
    )


def _sums_of_each(program: Program, groups: Sequence[str], wanted: _Wanted, added: _Added) -> dict[int, int]:
    """Reduce-scatters of every B and W but a stage's last; for those, where the rank's next cell begins."""
    lasts, followed = last_backwards(program), dict[int, int]()
    for rank, before, anchor in _followed_backwards(program):
        stage, microbatch = int(program.stage[anchor]), int(program.microbatch[anchor])
        if lasts[rank, stage] == anchor:
            followed[anchor] = before
            continue
        for one in _started(program, groups, wanted, added, (rank, anchor), scattered_only=True):
            if not one.is_waited:
                added.post(rank, before, Row(Kind.WAIT, stage, microbatch, one.bucket.index, target=one.row))
        _check_reductions(len(added.rows))
    return followed


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
            "got more; raise bucket_bytes or micro_batch, or take accumulate=full"
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
    groups = with_groups(program, *(found.group for own in gathers for found in own if found is not None))
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
    groups = with_groups(program, MIRROR)
    ready, latest = _ended(program)
    posts, waits = list[tuple[int, int, Row]](), list[tuple[int, int, Row]]()
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


def _ended(program: Program) -> tuple[dict[tuple[int, int], int], dict[int, int]]:
    """The row with which each (rank, stage) has its gradients; by stage, how late in a rank at most."""
    ready = last_backwards(program)
    for index in np.flatnonzero(program.is_kind(Kind.WAIT) & (program.part >= 0)).tolist():
        rank = int(np.searchsorted(program.offsets, index, side="right")) - 1
        ready[rank, int(program.stage[index])] = index
    latest: dict[int, int] = {}
    for (rank, stage), index in ready.items():
        latest[stage] = max(latest.get(stage, 0), index - program.offsets[rank])
    return ready, latest


def _mirrored(schedule: Schedule, stage: int) -> bool:
    return schedule.stage_ranks[stage] != schedule.stage_ranks[schedule.num_stages - 1 - stage]


def with_groups(program: Program, *names: str) -> tuple[str, ...]:
    """The program's groups and these. Old rows keep their index, so new names come last."""
    return (*program.groups, *sorted({*names} - {*program.groups}))
