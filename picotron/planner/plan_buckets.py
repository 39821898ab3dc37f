"""Gradient buckets of a plan's stages, and what is exchanged of them and of the parameters behind them.

A bucket belongs to the stage that adds to its gradients last. Sizes are those of one tensor-parallel rank,
padded to the equal parts that a shard has; of experts, the first expert-parallel rank's stand for all.

Where ranks share a bucket it holds matrices only; where they share its parameters too, those of one unit; and
a table that embedding and head of one rank share is alone in its own, so that each can be gathered for
itself.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

import numpy as np
from attrs import evolve

from picotron.planner.actions import B, W
from picotron.planner.data import Bucket, Filling, buckets, waited_after
from picotron.planner.flat import FlatBucket, flat_bucket
from picotron.planner.layout import Placement, local_numel
from picotron.planner.pipeline import Schedule
from picotron.planner.program import Kind
from picotron.planner.recompute import units
from picotron.planner.sharding import GRADIENTS, PARAMETERS, Exchange, data_group, gradient_sums
from picotron.planner.topology import Coordinate

if TYPE_CHECKING:
    from picotron.planner.training_plan import TrainingPlan


def stage_buckets(plan: TrainingPlan, stage: int) -> tuple[Bucket, ...]:
    """The buckets whose gradients are complete after the last W or B of ``stage``."""
    sharding, places = plan.sharding, units(plan.stage_segments[stage])
    unit_of = {place: number for number, unit in enumerate(places) for place in unit}

    def apart(placement: Placement) -> Hashable:
        if not plan.zero_stage or sharding.size(data_group(placement)) == 1:
            return None
        if len(placement.shape) < 2:
            return "vectors"
        if plan.zero_stage >= GRADIENTS and (
            _is_shared_table(plan, placement) or _adds_in_forward(plan, placement)
        ):
            return "table"
        return unit_of[placement.segment] if plan.zero_stage >= PARAMETERS else "matrices"

    return buckets(
        _completed(plan, stage),
        stage,
        itemsize=plan.format.gradient,
        bucket_bytes=plan.bucket_bytes,
        apart=apart,
    )


def is_scattered(plan: TrainingPlan, bucket: Bucket) -> bool:
    """Whether each B and W reduces the bucket's gradients into the parts that ranks keep of them.

    Not those of a table that two stages of a rank add to, or a head in its forward: no B or W has all of a
    microbatch.
    """
    if plan.zero_stage < GRADIENTS or plan.accumulate == "full":
        return False
    first = plan.placement(bucket.names[0])
    two_stages = plan.num_stages > 1 and _is_shared_table(plan, first)
    whole = two_stages or _adds_in_forward(plan, first)
    return plan.sharding.sharing(first) > 1 and not whole


def _adds_in_forward(plan: TrainingPlan, placement: Placement) -> bool:
    """Whether a head adds to the gradient in F: it makes its logits in chunks and none of them again."""
    return plan.loss_chunks > 1 and (placement.role == "head" or _is_shared_table(plan, placement))


def payload_bytes(plan: TrainingPlan, stage: int, tp_index: int) -> tuple[int, ...]:
    """Bytes of each bucket of ``stage`` on its way between ranks."""
    return tuple(flat.padded_numel * plan.format.reduce for flat in _flats(plan, stage, tp_index))


def _flats(plan: TrainingPlan, stage: int, tp_index: int) -> tuple[FlatBucket, ...]:
    where = Coordinate(pp=plan.stage_rank(stage), tp=tp_index)
    return tuple(flat_bucket(plan, bucket, where) for bucket in plan.stage_buckets[stage])


def kept_numel(plan: TrainingPlan, stage: int, where: Coordinate, what: int) -> int:
    """Elements at ``where`` of ``what`` (OPTIMIZER, GRADIENTS or PARAMETERS) of ``stage``, with padding."""
    total = 0
    for bucket in plan.stage_buckets[stage]:
        if plan.placement(bucket.names[0]).expert is None:
            flat = flat_bucket(plan, bucket, where)
            whole = (False, flat.keeps_gradients, flat.keeps_parameters)[what - 1]
            total += flat.padded_numel if whole else flat.part_numel
    experts = [p for p in plan.stage_held(stage, where) if p.expert is not None]
    if experts:
        numel, ranks = sum(local_numel(p, where) for p in experts), plan.sharding.sharing(experts[0])
        part = -(-numel // ranks)
        total += part if _shares(plan, what) else part * ranks
    return total


def _shares(plan: TrainingPlan, what: int) -> bool:
    """Whether ranks that share a copy keep parts of ``what``."""
    return plan.zero_stage >= what and not (what == GRADIENTS and plan.accumulate == "full")


def sums(plan: TrainingPlan, stage: int, tp_index: int) -> tuple[tuple[Exchange, ...], ...]:
    """What is done with the gradients of each bucket of ``stage``, in order."""
    flats = _flats(plan, stage, tp_index)
    return tuple(
        gradient_sums(
            plan.sharding, bucket.partial, flat.padded_numel * plan.format.reduce, shared=flat.ranks > 1
        )
        for bucket, flat in zip(plan.stage_buckets[stage], flats, strict=True)
    )


def gathers(plan: TrainingPlan, stage: int, tp_index: int) -> tuple[Exchange | None, ...]:
    """How the parameters of each bucket of ``stage`` are gathered after the update, where they are."""
    return tuple(
        Exchange(kind=Kind.ALL_GATHER, group=flat.group, bytes=flat.padded_numel * plan.format.compute)
        if flat.ranks > 1 and flat.keeps_parameters
        else None
        for flat in _flats(plan, stage, tp_index)
    )


def fillings(plan: TrainingPlan, stage: int, tp_index: int) -> tuple[Filling, ...]:
    """The buckets of ``stage`` that each of its B and W reduces, in order."""
    scattered = [bucket for bucket in plan.stage_buckets[stage] if is_scattered(plan, bucket)]
    ends, where = waited_after(scattered), Coordinate(pp=plan.stage_rank(stage), tp=tp_index)
    return tuple(
        Filling(
            index=bucket.index,
            bytes=flat_bucket(plan, bucket, where).padded_numel * plan.format.gradient,
            first=max(_last_user(plan, stage, name) for name in bucket.names),
            last=ends[bucket.index],
        )
        for bucket in scattered
    )


def _last_user(plan: TrainingPlan, stage: int, name: str) -> int:
    """The last segment of ``stage`` that uses a parameter."""
    placement = plan.placement(name)
    last = plan.num_stages - 1
    if stage == last and _is_shared_table(plan, placement):
        return len(plan.stage_segments[last]) - 1
    return placement.segment


def unit_buckets(plan: TrainingPlan, stage: int) -> tuple[tuple[Bucket, ...], ...]:
    """Of each unit of ``stage``, the buckets whose parameters are gathered for it under ZeRO-3."""
    segments = plan.stage_segments[stage]
    every = [
        bucket for stage in plan.rank_stages(plan.stage_rank(stage)) for bucket in plan.stage_buckets[stage]
    ]
    of_name = {name: bucket for bucket in every for name in bucket.names}
    found = []
    for unit in units(segments):
        names = [placement.name for placement in plan.stage_layout[stage] if placement.segment in unit]
        if stage == plan.num_stages - 1 and unit[-1] == len(segments) - 1 and shares_table(plan):
            names += [p.name for p in plan.stage_layout[0] if p.role == "embedding"]
        used = {(b.stage, b.index): b for b in (of_name.get(name) for name in names) if b is not None}
        found.append(tuple(bucket for bucket in used.values() if _is_gathered(plan, bucket)))
    return tuple(found)


def _is_gathered(plan: TrainingPlan, bucket: Bucket) -> bool:
    first = plan.placement(bucket.names[0])
    return plan.zero_stage >= PARAMETERS and plan.sharding.sharing(first) > 1


def gathered_bytes(plan: TrainingPlan, stage: int, group: str, tp_index: int) -> tuple[int, ...]:
    """Of each unit of ``stage``, the parameters gathered over ``group`` (of DATA_GROUPS) under ZeRO-3."""
    where = Coordinate(pp=plan.stage_rank(stage), tp=tp_index)
    return tuple(
        sum(
            flat_bucket(plan, bucket, where).padded_numel
            for bucket in own
            if data_group(plan.placement(bucket.names[0])) == group
        )
        * plan.format.compute
        for own in unit_buckets(plan, stage)
    )


def _completed(plan: TrainingPlan, stage: int) -> tuple[Placement, ...]:
    """The placements whose gradients are complete after the last W or B of ``stage``."""
    own = plan.stage_held(stage, Coordinate(pp=plan.stage_rank(stage)))
    last = plan.num_stages - 1
    if stage not in (0, last) or last == 0 or not shares_table(plan) or not _later(plan.schedule, last, 0):
        return own
    tables = tuple(p for p in plan.stage_layout[0] if p.role == "embedding")
    if stage == 0:
        return tuple(p for p in own if p not in tables)
    head = len(plan.stage_segments[last]) - 1
    return (*own, *(evolve(table, stage=last, segment=head) for table in tables))


def shares_table(plan: TrainingPlan) -> bool:
    """Whether embedding and head use the same table on one rank."""
    return plan.model.tied_embeddings and plan.stage_rank(0) == plan.stage_rank(plan.num_stages - 1)


def _is_shared_table(plan: TrainingPlan, placement: Placement) -> bool:
    """Whether ``placement`` is a table that embedding and head of one rank both use."""
    return placement.role == "embedding" and shares_table(plan)


def _later(schedule: Schedule, one: int, other: int) -> bool:
    """Whether ``one`` of two stages on a rank adds its last weight gradients after the ``other`` has."""
    orders = schedule.orders
    adds = (orders.phase == B) | (orders.phase == W)
    one_last, other_last = (np.flatnonzero(adds & (orders.stage == stage))[-1] for stage in (one, other))
    return bool(one_last > other_last)
