"""A schedule lowered to a program: a chain of pure passes, each over whole columns.

First what stages send each other (``transfers``), then what moves beside the computing (``passes``), then the
sums of gradients (``reductions``), at last the frame of the step. Passes add rows and take none away.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from attrs import frozen

from picotron.planner.data import Bucket
from picotron.planner.passes import with_streams, with_unsharding
from picotron.planner.pipeline import Schedule
from picotron.planner.program import (
    COUNT_BYTES,
    STATISTICS_BYTES,
    Kind,
    Program,
    Row,
    with_rows,
)
from picotron.planner.reductions import (
    with_gathers,
    with_groups,
    with_mirror_sums,
    with_reductions,
    with_sums,
)
from picotron.planner.sharding import Exchange
from picotron.planner.transfers import (
    Messages,
    messages,
    send_depths,
    with_transfers,
)

__all__ = [
    "NOTHING_SHARDED",
    "Messages",
    "Sharded",
    "Stream",
    "lower",
    "messages",
    "send_depths",
    "with_frame",
    "with_gathers",
    "with_mirror_sums",
    "with_reductions",
    "with_sums",
    "with_transfers",
]


@frozen(kw_only=True)
class Sharded:
    """What is done with each bucket of each stage: its collectives in order, the first inside its B or W.

    ``scattered``: of each, whether the first one is in every B or W, not in the last alone, and
    ``waits_inside``: whether it is waited for there. ``gathers``: after the update, where there is one.
    ``unsharding``: where whole stages are gathered, the payload of each, and the group over which.
    """

    sums: Sequence[Sequence[Sequence[Exchange]]] = ()
    gathers: Sequence[Sequence[Exchange | None]] = ()
    scattered: Sequence[Sequence[bool]] = ()
    waits_inside: bool = True
    unsharding: tuple[Sequence[int], str] | None = None


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
    if sharded.unsharding is not None:
        program = with_unsharding(program, sharded.unsharding[0], group=sharded.unsharding[1])
    if sharded.sums:
        program = with_sums(
            program,
            buckets,
            sharded.sums,
            scattered=sharded.scattered,
            waits_inside=sharded.waits_inside,
        )
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


def with_frame(program: Program, schedule: Schedule, *, count_bytes: int, statistics_bytes: int) -> Program:
    """What stands around the microbatches of a step.

    A rank of the last stage first learns how many valid tokens its loss is divided by. At the end of each
    rank come norm and loss, summed over the world, and the optimizer's step.
    """
    groups = with_groups(program, "dp_cp", "world")
    last = schedule.num_stages - 1
    count = Row(Kind.COUNT, last, group=groups.index("dp_cp"), bytes=count_bytes)
    norm = Row(Kind.NORM, group=groups.index("world"), bytes=statistics_bytes)
    new = []
    for rank, (first, stop) in enumerate(pairwise(program.offsets)):
        new += [(rank, first, count)] * (last in schedule.rank_stages(rank))
        new += [(rank, stop, norm), (rank, stop, Row(Kind.UPDATE))]
    return with_rows(program, new, groups)
