"""A plan's program: its schedule lowered with the buckets, gathers and copies that its fields ask for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from picotron.planner.lower import NOTHING_SHARDED, Sharded, Stream, lower
from picotron.planner.program import Kind, Program
from picotron.planner.sharding import DATA_GROUPS, PARAMETERS
from picotron.planner.stage import offloaded_bytes

if TYPE_CHECKING:
    from picotron.planner.training_plan import TrainingPlan


def lowered(plan: TrainingPlan, tp_index: int) -> Program:
    """The rows of one step, as tensor-parallel rank ``tp_index`` of each stage runs them."""
    stages = range(plan.num_stages)
    return lower(
        plan.schedule,
        boundary_bytes=plan.dims(tp_index).local_bytes,
        buckets=plan.stage_buckets,
        bucket_bytes=[plan.bucket_payload_bytes(stage, tp_index) for stage in stages],
        data_parallel=plan.topology.dp * plan.topology.cp > 1,
        world_size=plan.topology.world_size,
        sharded=_sharded(plan, tp_index) if plan.zero_stage else NOTHING_SHARDED,
        streams=tuple(_streams(plan, tp_index)),
    )


def _sharded(plan: TrainingPlan, tp_index: int) -> Sharded:
    """What is done with each bucket, where data-parallel ranks share rather than copy."""
    stages = range(plan.num_stages)
    return Sharded(
        sums=[plan.bucket_sums(stage, tp_index) for stage in stages],
        gathers=[plan.bucket_gathers(stage, tp_index) for stage in stages],
        scattered=[[plan.is_scattered(bucket) for bucket in own] for own in plan.stage_buckets],
        waits_inside=plan.zero_stage < PARAMETERS or plan.reshard == "stage",
        unsharding=_unsharding(plan, tp_index),
    )


def _unsharding(plan: TrainingPlan, tp_index: int) -> tuple[list[int], str] | None:
    """What is gathered of whole stages, and over which group."""
    sizes = [sum(plan.gathered_bytes(stage, "dp_cp", tp_index)) for stage in range(plan.num_stages)]
    return (sizes, plan.sharding.within("dp_cp")) if plan.reshard == "stage" and any(sizes) else None


def _streams(plan: TrainingPlan, tp_index: int) -> Iterator[Stream]:
    """What is gathered and copied beside the computing."""
    stages, backwards = range(plan.num_stages), (Kind.BACKWARD, Kind.BACKWARD_INPUT)
    for group in DATA_GROUPS:
        sizes = [sum(plan.gathered_bytes(stage, group, tp_index)) for stage in stages]
        if any(sizes) and plan.reshard != "stage":
            beside, name = (Kind.FORWARD, *backwards), plan.sharding.within(group)
            yield Stream(kind=Kind.UNSHARD, beside=beside, stage_bytes=sizes, group=name)
    if any(plan.offload):
        sizes = [offloaded_bytes(plan.bodies(stage, tp_index)) for stage in stages]
        yield Stream(kind=Kind.OFFLOAD, beside=(Kind.FORWARD,), stage_bytes=sizes)
        yield Stream(kind=Kind.RELOAD, beside=backwards, stage_bytes=sizes)
