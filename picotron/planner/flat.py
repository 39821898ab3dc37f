"""Flat buffers: where each parameter of a bucket lies, and which part of it each rank keeps.

A bucket's parameters stand one after the other, without gaps, matrices before vectors and each group in plan
order; what is shared by several ranks is padded once, at the end, to equal parts. Weights, gradients and the
optimizer's state of a bucket all have this shape, so that one index says where a parameter is in each.
"""

from __future__ import annotations

import math
from itertools import accumulate
from typing import TYPE_CHECKING

from attrs import field, frozen

from picotron.planner.data import Bucket
from picotron.planner.layout import Range, counts_in_norm, local_shape
from picotron.planner.sharding import data_group
from picotron.planner.topology import Coordinate, group_of, rank_of

if TYPE_CHECKING:
    from picotron.planner.training_plan import TrainingPlan

DATA_AXES = ("dp", "cp", "edp")


@frozen(kw_only=True)
class FlatBucket:
    """One bucket at one rank: ``shapes`` of its parameters, by ``names``, and the ``ranks`` that share it.

    ``keeps_gradients`` and ``keeps_parameters``: whether a rank keeps all of them, not its part alone.
    ``group``: the name of the groups whose members have a part each, in their order.
    """

    stage: int
    index: int
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    ranks: int = 1
    group: str = ""
    keeps_gradients: bool = True
    keeps_parameters: bool = True
    offsets: tuple[int, ...] = field(init=False, repr=False)

    @offsets.default
    def _offsets(self) -> tuple[int, ...]:
        return tuple(accumulate(map(math.prod, self.shapes), initial=0))

    @property
    def numel(self) -> int:
        """Elements of its parameters."""
        return self.offsets[-1]

    @property
    def part_numel(self) -> int:
        """Elements that each of its ranks has a part of, the last ones' padding included."""
        return -(-self.numel // self.ranks)

    @property
    def padded_numel(self) -> int:
        """Elements of the whole buffer."""
        return self.part_numel * self.ranks

    def part(self, place: int) -> Range:
        """The elements that the rank at ``place`` of the group updates, padding included."""
        return place * self.part_numel, (place + 1) * self.part_numel

    def range_of(self, name: str) -> Range:
        """The elements of a parameter."""
        at = self.names.index(name)
        return self.offsets[at], self.offsets[at + 1]

    def decays(self) -> tuple[tuple[Range, bool], ...]:
        """The buffer cut where weight decay ends: it is for matrices, which come first."""
        num_matrices = sum(len(shape) > 1 for shape in self.shapes)
        if num_matrices in (0, len(self.shapes)):
            return (((0, self.padded_numel), num_matrices > 0),)
        middle = self.offsets[num_matrices]
        return ((0, middle), True), ((middle, self.padded_numel), False)


def flat_bucket(plan: TrainingPlan, bucket: Bucket, where: Coordinate) -> FlatBucket:
    """``bucket`` as the rank at ``where`` holds it; of experts, as the first expert-parallel rank does."""
    own = [plan.placement(name) for name in bucket.names]
    sharding = plan.sharding
    ranks = sharding.sharing(own[0])
    return FlatBucket(
        stage=bucket.stage,
        index=bucket.index,
        names=bucket.names,
        shapes=tuple(local_shape(placement, where) for placement in own),
        ranks=ranks,
        group=sharding.within(data_group(own[0])) if ranks > 1 else "",
        keeps_gradients=ranks == 1 or not plan.is_scattered(bucket),
        keeps_parameters=ranks == 1 or plan.zero_stage < 3,
    )


def place_in_group(plan: TrainingPlan, flat: FlatBucket, where: Coordinate) -> tuple[int, int]:
    """Of the rank at ``where``: its place among those that share ``flat``, and the number of their copy."""
    if flat.ranks == 1:
        return 0, 0
    rank = rank_of(plan.topology, where)
    axis = flat.group.partition(":")[0]
    copy, place = divmod(group_of(plan.topology, axis, rank).index(rank), flat.ranks)
    return place, copy


def counted_ranges(plan: TrainingPlan, flat: FlatBucket, where: Coordinate) -> tuple[Range, ...]:
    """Elements of the part that the rank at ``where`` keeps which it counts for the world, without padding.

    Over all ranks of the world they are every element of every parameter once, a tied one's copy not.
    """
    place, copy = place_in_group(plan, flat, where)
    first, stop = flat.part(place)
    found: list[Range] = []
    shared = DATA_AXES if flat.ranks > 1 else ()
    for name, begin, end in zip(flat.names, flat.offsets, flat.offsets[1:], strict=False):
        begin, end = max(begin, first) - first, min(end, stop) - first
        if begin < end and not copy and counts_in_norm(plan.placement(name), where, shared=shared):
            if found and found[-1][1] == begin:
                begin, _ = found.pop()
            found.append((begin, end))
    return tuple(found)
