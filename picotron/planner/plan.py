"""From a request to a plan: what the caller left out is chosen by a stated rule, and said.

The rules that a request must hold are in ``plan_rules``, the value and what follows from its fields in
``training_plan``; both have their public names here too.
"""

from __future__ import annotations

from collections.abc import Sequence

from picotron.errors import PlanError
from picotron.planner.body import TensorOverlap
from picotron.planner.catalogue import known, make_schedule
from picotron.planner.cluster import ClusterSpec
from picotron.planner.context import ContextParallel, chosen_context
from picotron.planner.data import DEFAULT_BUCKET_BYTES
from picotron.planner.flops import matmuls
from picotron.planner.model import ModelSpec, Segment, segments
from picotron.planner.pipeline import Schedule
from picotron.planner.plan_rules import (
    MAX_ACTIONS,
    check_actions,
    check_degrees,
    check_kind,
    check_schedule,
    check_stages,
    two_copies,
)
from picotron.planner.recompute import Recompute, flags_by_layer, modes_by_layer
from picotron.planner.sharding import Accumulate, Reshard
from picotron.planner.split import rank_split
from picotron.planner.topology import AXES, Topology
from picotron.planner.training_plan import SCHEMA_VERSION, TrainingPlan
from picotron.planner.validators import is_size
from picotron.planner.workload import Workload

__all__ = ["MAX_ACTIONS", "SCHEMA_VERSION", "TrainingPlan", "plan"]


def plan(
    model: ModelSpec,
    cluster: ClusterSpec,
    work: Workload,
    *,
    dp: int | None = None,
    pp: int = 1,
    cp: int = 1,
    tp: int = 1,
    ep: int = 1,
    etp: int = 1,
    order: tuple[str, ...] = AXES,
    schedule: str | Schedule = "1f1b",
    virtual_stages: int | None = None,
    micro_batch: int = 1,
    sequence_parallel: bool | None = None,
    context: ContextParallel | None = None,
    loss_chunks: int = 1,
    tensor_overlap: TensorOverlap = "none",
    compile: bool = False,
    stage_layers: tuple[int, ...] | None = None,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    zero_stage: int = 0,
    shard: int | None = None,
    accumulate: Accumulate | None = None,
    reshard: Reshard | None = None,
    recompute: Recompute | Sequence[Recompute] = "none",
    offload: bool | Sequence[bool] = False,
    foreign: list[str] | tuple[str, ...] = (),
) -> TrainingPlan:
    """The plan that trains ``model`` on ``cluster`` as asked.

    Left out, ``dp`` takes the devices that the other degrees leave, ``virtual_stages`` (stages of a pipeline
    rank) is what the schedule has by itself, ``sequence_parallel`` is on when tp > 1 and the tokens can be
    cut, ``context`` is a ring unless only an all-to-all can cut what there is, and layers are split so that
    the dearest stage costs least. Raises PlanError for a request that cannot be met.
    """
    check_kind("model", model, ModelSpec, "use ModelSpec.from_hf(...)")
    check_kind("cluster", cluster, ClusterSpec, "use ClusterSpec.preset(...) or ClusterSpec.parse(...)")
    check_kind("work", work, Workload, "use Workload(global_batch=..., seq_len=...)")
    dp, why_dp = (dp, ()) if dp is not None else _left_over(cluster, Topology(pp=pp, cp=cp, tp=tp))
    topology = Topology(pp=pp, dp=dp, cp=cp, tp=tp, ep=ep, etp=etp, order=order)
    check_degrees(model, cluster, work, topology, micro_batch)
    num_microbatches = work.global_batch // (dp * micro_batch)
    made = _scheduled(schedule, model, pp, virtual_stages, num_microbatches)
    virtual_stages, why_virtual = (virtual_stages, ()) if virtual_stages is not None else _own_stages(made)
    check_schedule(made, pp, virtual_stages, num_microbatches)
    sequence_parallel, why_sequence = (
        (sequence_parallel, ())
        if sequence_parallel is not None
        else _sequence_parallel(topology, micro_batch * work.seq_len)
    )
    context, why_context = (context, ()) if context is not None else _context(model, topology, work.seq_len)
    check_stages(model, pp, virtual_stages)
    stage_layers, why_layers = (
        (stage_layers, ()) if stage_layers is not None else _even(model, work, made, micro_batch)
    )
    custom = isinstance(schedule, Schedule)
    return TrainingPlan(
        model=model,
        cluster=cluster,
        workload=work,
        topology=topology,
        schedule_name=made.name if custom else str(schedule),
        schedule_csv=str(made) if custom else None,
        virtual_stages=virtual_stages,
        micro_batch=micro_batch,
        sequence_parallel=sequence_parallel,
        context=context,
        loss_chunks=loss_chunks,
        tensor_overlap=tensor_overlap,
        compile=compile,
        stage_layers=stage_layers,
        bucket_bytes=bucket_bytes,
        zero_stage=zero_stage,
        shard=shard,
        accumulate=accumulate,
        reshard=reshard,
        recompute=modes_by_layer(recompute, model.num_layers),
        offload=flags_by_layer(offload, model.num_layers),
        foreign=foreign,
        chosen=(*why_dp, *why_virtual, *why_sequence, *why_context, *why_layers),
    )


_Why = tuple[str, ...]  # what was chosen and by which rule, where that is worth saying


def _left_over(cluster: ClusterSpec, rest: Topology) -> tuple[int, _Why]:
    """dp: the devices that the other degrees leave."""
    dp = max(1, cluster.num_devices // rest.world_size)
    return dp, (f"dp={dp}: the devices that pp * cp * tp leave",)


def _own_stages(made: Schedule) -> tuple[int, _Why]:
    """virtual_stages: what the schedule has by itself."""
    virtual = made.num_stages // made.num_ranks
    return virtual, (f"virtual_stages={virtual}: stages a rank of {made.name}",) if virtual > 1 else ()


def _sequence_parallel(topology: Topology, tokens: int) -> tuple[bool, _Why]:
    """sequence_parallel: on where tensor-parallel ranks can share the tokens of a microbatch."""
    tp = topology.tp
    on = tp > 1 and tokens // topology.cp % tp == 0
    return on, (f"sequence_parallel={on}: on when tp > 1 and tp divides the tokens",) if tp > 1 else ()


def _context(model: ModelSpec, topology: Topology, seq_len: int) -> tuple[ContextParallel, _Why]:
    """context: a ring where 2 * cp divides the sequence."""
    context = chosen_context(model, topology, seq_len)
    text = f"context={context}: ring, but where cp alone divides seq_len and cuts the heads all_to_all"
    return context, (text,) if topology.cp > 1 else ()


def _even(model: ModelSpec, work: Workload, made: Schedule, micro_batch: int) -> tuple[tuple[int, ...], _Why]:
    """stage_layers: the split that makes the dearest rank as cheap as can be."""
    layers = _balanced_layers(model, work, made.stage_ranks, micro_batch)
    text = f"stage_layers={','.join(map(str, layers))}: least FLOPs on the dearest rank"
    return layers, (text,) if made.num_stages > 1 else ()


def _scheduled(
    schedule: str | Schedule, model: ModelSpec, pp: int, virtual_stages: int | None, num_microbatches: int
) -> Schedule:
    """The schedule of a request. Raises PlanError for an unknown name and for sizes that it cannot have."""
    if virtual_stages is not None and not is_size(virtual_stages):
        raise PlanError(f"virtual_stages must be a whole number of at least 1, got {virtual_stages!r}")
    if isinstance(schedule, Schedule):
        return schedule
    if known(schedule).bidirectional:
        raise two_copies(schedule)
    check_stages(model, pp, virtual_stages or 1)
    check_actions(2 * pp * (virtual_stages or 1) * num_microbatches)
    return make_schedule(schedule, pp, num_microbatches, virtual_stages)


def _balanced_layers(
    model: ModelSpec, work: Workload, stage_ranks: tuple[int, ...], micro_batch: int
) -> tuple[int, ...]:
    """The split of layers that makes the rank with the most forward FLOPs as cheap as can be."""

    def flops(segment: Segment) -> int:
        found = matmuls(model, segment, batch=micro_batch, seq_len=work.seq_len, tp=1, attention="causal")
        return sum(matmul.flops for matmul in found)

    costs = [0.0] * model.num_layers
    ends = {"embedding": 0.0, "head": 0.0}
    for segment in segments(model):
        if segment.layer is None:
            ends[segment.kind] += flops(segment)
        else:
            costs[segment.layer] += flops(segment)
    return rank_split(costs, stage_ranks, first=ends["embedding"], last=ends["head"])
