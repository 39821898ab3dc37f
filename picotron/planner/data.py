"""Data parallelism as data: which gradients travel together, and which samples a step sees.

Sample order is a function of the seed and the number of samples consumed, never of the topology, so a
run means the same on one rank as on many, and continues the same on another number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from itertools import pairwise

import numpy as np
from attrs import frozen

from picotron.errors import PlanError
from picotron.planner.layout import Placement, local_numel
from picotron.planner.topology import Coordinate

DEFAULT_BUCKET_BYTES = 25 * 2**20  # as PyTorch's DistributedDataParallel
_COLUMNS = {"column", "kv_column"}


@frozen(kw_only=True)
class Bucket:
    """Gradients of one stage that are reduced together, in one flat buffer.

    ``partial`` are the groups to sum over, in order. ``ready_segment`` is the segment after whose backward
    (in the last microbatch) the bucket is complete.
    """

    stage: int
    index: int
    names: tuple[str, ...]
    partial: tuple[str, ...]
    ready_segment: int


@frozen(kw_only=True)
class Filling:
    """Full gradients of one bucket of a stage, which stand while they fill and travel.

    ``first``: the segment whose backward adds to them first; ``last``: the one at whose end their reduction
    is waited for, or None where that is after the B or W.
    """

    index: int
    bytes: int
    first: int
    last: int | None


def waited_after(own: Iterable[Bucket]) -> dict[int, int | None]:
    """Of buckets that each B or W of a stage reduces, by index: after which segment that is waited for.

    It is the one that completes the next buckets of the same ranks, just before these start to travel: one
    fills while the other travels. None: after the B or W.
    """
    found: dict[int, int | None] = {}
    many = list(own)
    for experts in (False, True):
        ready = {b.index: b.ready_segment for b in many if ("edp" in b.partial) is experts}
        segments = sorted(set(ready.values()), reverse=True)
        following = dict(pairwise(segments))
        found |= {index: following.get(segment) for index, segment in ready.items()}
    return found


def buckets(
    placements: Iterable[Placement],
    stage: int,
    *,
    itemsize: int,
    bucket_bytes: int,
    apart: Callable[[Placement], Hashable] = lambda _: None,
) -> tuple[Bucket, ...]:
    """The buckets of ``stage``'s ``placements``, in the order in which backward completes them.

    A bucket closes when it has reached ``bucket_bytes``; gradients with different groups to sum over never
    share one, nor do those that ``apart`` tells apart. Matrices of a segment that read the same input
    (queries, keys and values; gate and up) are never split, and stand before the bucket's vectors: they lie
    side by side. Sizes are those of tensor-parallel rank 0, which holds the largest slices, so that every
    rank forms the same buckets.
    """
    origin = Coordinate(pp=stage)
    backward_order = sorted(
        (placement for placement in placements if placement.stage == stage),
        key=lambda placement: (-placement.segment, len(placement.shape) < 2),
    )
    open_: dict[Hashable, list[Placement]] = {}
    filled: dict[Hashable, int] = {}
    closed: list[list[Placement]] = []
    for placement in backward_order:
        key = placement.partial, apart(placement)
        if filled.get(key, 0) * itemsize >= bucket_bytes and not _read_one(open_[key][-1], placement):
            filled[key] = 0
            closed.append(open_.pop(key))
        open_.setdefault(key, []).append(placement)
        filled[key] = filled.get(key, 0) + local_numel(placement, origin)
    closed += open_.values()
    closed.sort(key=lambda members: -min(member.segment for member in members))
    return tuple(
        Bucket(
            stage=stage,
            index=index,
            names=tuple(member.name for member in sorted(members, key=lambda member: len(member.shape) < 2)),
            partial=members[0].partial,
            ready_segment=min(member.segment for member in members),
        )
        for index, members in enumerate(closed)
    )


def _read_one(left: Placement, right: Placement) -> bool:
    """Whether two neighbours are matrices that multiply the same input."""
    return left.segment == right.segment and {left.role, right.role} <= _COLUMNS


def sample_indices(*, num_samples: int, consumed: int, count: int, seed: int) -> tuple[int, ...]:
    """The next ``count`` samples after ``consumed`` have been seen, in order.

    Each epoch visits every sample once, in a permutation of its own.
    """
    if num_samples < 1:
        raise PlanError(
            f"the data must hold at least one sample, got {num_samples}; add text or shorten seq_len"
        )
    found: list[int] = []
    while len(found) < count:
        epoch, position = divmod(consumed + len(found), num_samples)
        order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_samples)
        found += order[position : position + count - len(found)].tolist()
    return tuple(found)


def microbatch_slice(
    *, dp: int, dp_index: int, num_microbatches: int, microbatch: int, micro_batch: int
) -> slice:
    """Which of a step's samples one microbatch of one data-parallel rank takes.

    Neighbouring samples go to one rank, microbatch by microbatch.
    """
    if not (0 <= dp_index < dp and 0 <= microbatch < num_microbatches):
        raise PlanError(
            f"dp index must be in [0, {dp}) and microbatch in [0, {num_microbatches}), "
            f"got {dp_index} and {microbatch}"
        )
    start = (dp_index * num_microbatches + microbatch) * micro_batch
    return slice(start, start + micro_batch)
