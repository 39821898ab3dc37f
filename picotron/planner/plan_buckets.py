"""Gradient buckets of a plan's stages, and what is exchanged of them and of the parameters behind them.

A bucket belongs to the stage that adds to its gradients last. Sizes are those of one tensor-parallel rank,
padded to the equal parts that a shard has; of experts, the first expert-parallel rank's stand for all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from attrs import evolve

from picotron.planner.actions import B, W
from picotron.planner.data import Bucket, buckets
from picotron.planner.layout import Placement
from picotron.planner.pipeline import Schedule
from picotron.planner.program import Kind
from picotron.planner.recompute import units
from picotron.planner.sharding import GRADIENTS, OPTIMIZER, PARAMETERS, Exchange, data_group, gradient_sums
from picotron.planner.topology import Coordinate

if TYPE_CHECKING:
    from picotron.planner.training_plan import TrainingPlan


def stage_buckets(plan: TrainingPlan, stage: int) -> tuple[Bucket, ...]:
    """The buckets whose gradients are complete after the last W or B of ``stage``."""
    return buckets(
        _completed(plan, stage), stage, itemsize=plan.format.gradient, bucket_bytes=plan.bucket_bytes
    )


def payload_bytes(plan: TrainingPlan, stage: int, tp_index: int) -> tuple[int, ...]:
    """Bytes of each bucket of ``stage`` on its way between ranks."""
    where = Coordinate(pp=plan.stage_rank(stage), tp=tp_index)
    numel = {p.name: plan.sharding.padded_numel(p, where) for p in plan.held(where)}
    return tuple(
        sum(numel[name] for name in bucket.names) * plan.format.reduce for bucket in plan.stage_buckets[stage]
    )


def sums(plan: TrainingPlan, stage: int, tp_index: int) -> tuple[tuple[Exchange, ...], ...]:
    """What is done with the gradients of each bucket of ``stage``, in order."""
    sizes = payload_bytes(plan, stage, tp_index)
    return tuple(
        gradient_sums(plan.sharding, bucket.partial, size)
        for bucket, size in zip(plan.stage_buckets[stage], sizes, strict=True)
    )


def gathers(plan: TrainingPlan, stage: int, tp_index: int) -> tuple[Exchange | None, ...]:
    """How the parameters of each bucket of ``stage`` are gathered after the update, where they are."""
    if plan.zero_stage not in (OPTIMIZER, GRADIENTS):
        return (None,) * len(plan.stage_buckets[stage])
    return tuple(
        Exchange(
            kind=Kind.ALL_GATHER,
            group=own[0].group,
            bytes=own[0].bytes // plan.format.reduce * plan.format.compute,
        )
        if own and own[0].kind is Kind.REDUCE_SCATTER
        else None
        for own in sums(plan, stage, tp_index)
    )


def buffer_bytes(plan: TrainingPlan, stage: int, tp_index: int) -> int:
    """Full gradients that stand while those of ``stage`` are reduced in every microbatch (ZeRO-2, 3)."""
    if plan.zero_stage < GRADIENTS:
        return 0
    firsts = [own[0] for own in sums(plan, stage, tp_index) if own]
    form = plan.format
    scattered = [first.bytes for first in firsts if first.kind is Kind.REDUCE_SCATTER]
    sizes = [size // form.reduce * form.gradient for size in scattered]
    return min(2 * max(sizes, default=0), sum(sizes))


def gathered_bytes(plan: TrainingPlan, stage: int, group: str, tp_index: int) -> tuple[int, ...]:
    """Of each unit of ``stage``, the parameters gathered over ``group`` (of DATA_GROUPS) under ZeRO-3."""
    segments = plan.stage_segments[stage]
    places = units(segments)
    if plan.zero_stage < PARAMETERS or plan.sharding.size(group) == 1:
        return (0,) * len(places)
    where = Coordinate(pp=plan.stage_rank(stage), tp=tp_index)
    numel = [0] * len(segments)
    own = [(p.segment, p) for p in plan.stage_held(stage, where)]
    if stage == plan.num_stages - 1 and _shares_table(plan):
        own += [(len(numel) - 1, p) for p in plan.stage_layout[0] if p.role == "embedding"]
    for segment, placement in own:
        if data_group(placement) == group:
            numel[segment] += plan.sharding.padded_numel(placement, where)
    return tuple(sum(numel[place] for place in unit) * plan.format.compute for unit in places)


def _completed(plan: TrainingPlan, stage: int) -> tuple[Placement, ...]:
    """The placements whose gradients are complete after the last W or B of ``stage``."""
    own = plan.stage_held(stage, Coordinate(pp=plan.stage_rank(stage)))
    last = plan.num_stages - 1
    if stage not in (0, last) or last == 0 or not _shares_table(plan) or not _later(plan.schedule, last, 0):
        return own
    tables = tuple(p for p in plan.stage_layout[0] if p.role == "embedding")
    if stage == 0:
        return tuple(p for p in own if p not in tables)
    head = len(plan.stage_segments[last]) - 1
    return (*own, *(evolve(table, stage=last, segment=head) for table in tables))


def _shares_table(plan: TrainingPlan) -> bool:
    """Whether embedding and head use the same table on one rank."""
    return plan.model.tied_embeddings and plan.stage_rank(0) == plan.stage_rank(plan.num_stages - 1)


def _later(schedule: Schedule, one: int, other: int) -> bool:
    """Whether ``one`` of two stages on a rank adds its last weight gradients after the ``other`` has."""
    orders = schedule.orders
    adds = (orders.phase == B) | (orders.phase == W)
    one_last, other_last = (np.flatnonzero(adds & (orders.stage == stage))[-1] for stage in (one, other))
    return bool(one_last > other_last)
