"""What a request for a plan must hold before anything is derived from it.

Every rule stands once, here: degrees multiply to the cluster and divide the batch, stages have layers,
schedules have the plan's ranks and microbatches, and a step is no longer than can be lowered. Each raises a
PlanError with the rule, the value and a remedy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from picotron.errors import PlanError
from picotron.planner.body import GATHER_CHUNKS, Dims
from picotron.planner.cluster import ClusterSpec
from picotron.planner.model import ModelSpec, Segment
from picotron.planner.pipeline import Schedule, loop_ranks, v_ranks
from picotron.planner.recompute import Recompute
from picotron.planner.sharding import ACCUMULATES, GRADIENTS, PARAMETERS, RESHARDS
from picotron.planner.tensor import check_tensor_parallel
from picotron.planner.topology import Topology
from picotron.planner.validators import is_size, shown
from picotron.planner.workload import Workload

MAX_ACTIONS = 250_000  # of one step over all pipeline ranks
FOREIGN = ("attention", "mlp")  # kinds of segments that a module can stand for


def check_kind(name: str, value: object, kind: type, remedy: str) -> None:
    """Raise PlanError unless ``value`` is of that class."""
    if not isinstance(value, kind):
        raise PlanError(f"{name} must be a {kind.__name__}, got {type(value).__name__}; {remedy}")


def check_parts(model: object, cluster: object, workload: object, topology: object) -> None:
    """Raise PlanError unless each is what its name says."""
    remedy = "build the plan with plan(...)"
    check_kind("model", model, ModelSpec, remedy)
    check_kind("cluster", cluster, ClusterSpec, remedy)
    check_kind("workload", workload, Workload, remedy)
    check_kind("topology", topology, Topology, remedy)


def two_copies(name: str) -> PlanError:
    """What is said of a schedule whose stages stand on two ranks."""
    return PlanError(
        f"{name} keeps two copies of the parameters, which cannot be run yet; dualpipe-v needs one"
    )


def check_stages(model: ModelSpec, num_ranks: int, virtual_stages: int) -> None:
    """Raise PlanError unless every stage can have a layer."""
    if num_ranks > model.num_layers:
        raise PlanError(
            f"pp must be at most the model's {model.num_layers} layers, got pp={num_ranks}; lower pp"
        )
    if num_ranks * virtual_stages > model.num_layers:
        raise PlanError(
            f"pp * virtual_stages must be at most the model's {model.num_layers} layers, "
            f"got {num_ranks} * {virtual_stages}; lower one of the two or take a schedule "
            "with fewer stages a rank"
        )


def check_stage_layers(stage_layers: tuple[int, ...], num_stages: int, num_layers: int) -> None:
    """Raise PlanError unless the stages have all layers between them, and each has one."""
    if not all(map(is_size, stage_layers)):
        raise PlanError(f"every stage needs a layer, got stage_layers={stage_layers}")
    if len(stage_layers) != num_stages or sum(stage_layers) != num_layers:
        raise PlanError(
            f"stage_layers must give {num_stages} stages all {num_layers} layers, got {stage_layers}"
        )


def check_actions(num_actions: int) -> None:
    """Raise PlanError for a step of more actions than are lowered."""
    if num_actions > MAX_ACTIONS:
        raise PlanError(
            f"a step may have at most {MAX_ACTIONS:,} actions (an F and a B, or an F, an I and a W, "
            f"of each microbatch and stage), "
            f"got {num_actions:,}; raise micro_batch or dp"
        )


def check_schedule(schedule: Schedule, num_ranks: int, virtual_stages: int, num_microbatches: int) -> None:
    """Raise PlanError unless ``schedule`` has the plan's ranks, stages and microbatches, and can be run."""
    if schedule.bidirectional:
        raise two_copies(schedule.name)
    if (schedule.num_ranks, schedule.num_microbatches) != (num_ranks, num_microbatches):
        raise PlanError(
            f"the schedule must have {num_ranks} ranks and {num_microbatches} microbatches, "
            f"got {schedule.num_ranks} and {schedule.num_microbatches}"
        )
    if schedule.num_stages != num_ranks * virtual_stages:
        raise PlanError(
            f"the schedule must have virtual_stages={virtual_stages} stages on each of {num_ranks} ranks, "
            f"got {schedule.num_stages} stages"
        )
    if schedule.stage_ranks not in (loop_ranks(num_ranks, virtual_stages), v_ranks(num_ranks)):
        raise PlanError(
            "stages must go round the pipeline ranks, or up and back, "
            f"got stages on ranks {schedule.stage_ranks}"
        )
    check_actions(schedule.orders.num_actions)


def check_degrees(
    model: ModelSpec, cluster: ClusterSpec, work: Workload, topology: Topology, micro_batch: int
) -> None:
    """Raise PlanError unless cluster, batch and model can be divided as ``topology`` asks."""
    if not is_size(micro_batch):
        raise PlanError(f"micro_batch must be a whole number of at least 1, got {micro_batch!r}")
    degrees = f"pp={topology.pp} dp={topology.dp} cp={topology.cp} tp={topology.tp}"
    if topology.world_size != cluster.num_devices:
        raise PlanError(
            f"pp * dp * cp * tp must equal the cluster's {cluster.num_devices} devices, got {degrees} = "
            f"{topology.world_size}; {_degree_remedy(cluster.num_devices, topology)}"
        )
    per_step = topology.dp * micro_batch
    if work.global_batch % per_step:
        raise PlanError(
            f"dp * micro_batch must divide global_batch {work.global_batch}, "
            f"got {topology.dp} * {micro_batch} = {per_step}; change one of the three"
        )
    check_tensor_parallel(model, tp=topology.tp, etp=topology.etp)
    _check_experts(model, topology)
    if model.rope_theta is None and work.seq_len > model.max_positions:
        raise PlanError(
            f"seq_len must be at most the model's {model.max_positions} learned positions, got {work.seq_len}"
        )


def _check_experts(model: ModelSpec, topology: Topology) -> None:
    for name in ("ep", "etp"):
        if getattr(topology, name) > 1 and model.experts is None:
            raise PlanError(
                f"{name} needs a model with experts, got {name}={getattr(topology, name)} for {model.name}"
            )
    if model.experts is not None and topology.ep > model.experts.num_experts:
        raise PlanError(f"ep must be at most the {model.experts.num_experts} experts, got ep={topology.ep}")


def check_loss_chunks(chunks: int, tokens: int) -> None:
    """Raise PlanError unless a microbatch's ``tokens`` can come in so many chunks."""
    if chunks > tokens:
        raise PlanError(
            f"loss_chunks must be at most the {tokens} tokens of a microbatch on a rank, got {chunks}"
        )


def check_shard(zero_stage: int, shard: int | None, topology: Topology) -> None:
    """Raise PlanError unless ``shard`` ranks can share a copy of what ``zero_stage`` shards."""
    if shard is None:
        return
    ranks = topology.dp * topology.cp
    if not is_size(shard) or ranks % shard:
        fits = ", ".join(str(size) for size in range(1, ranks + 1) if ranks % size == 0)
        raise PlanError(
            f"shard must divide the dp * cp = {ranks} data-parallel ranks, got {shown(shard)}; try {fits}"
        )
    if not zero_stage:
        raise PlanError(
            f"shard needs a zero_stage of 1, 2 or 3, got shard={shard} with zero_stage=0; leave shard out"
        )


def check_accumulate(zero_stage: int, accumulate: object) -> None:
    """Raise PlanError unless gradients can be accumulated as ``accumulate`` says."""
    if accumulate is None:
        return
    if accumulate not in ACCUMULATES:
        raise PlanError(f"accumulate must be one of {', '.join(ACCUMULATES)}, got {shown(accumulate)}")
    if zero_stage < GRADIENTS:
        raise PlanError(
            f"accumulate needs a zero_stage of 2 or 3, got accumulate={accumulate} with "
            f"zero_stage={zero_stage}; leave accumulate out"
        )


def check_reshard(zero_stage: int, reshard: object, model: ModelSpec) -> None:
    """Raise PlanError unless parameters can be gathered as ``reshard`` says."""
    if reshard is None:
        return
    if reshard not in RESHARDS:
        raise PlanError(f"reshard must be one of {', '.join(RESHARDS)}, got {shown(reshard)}")
    if zero_stage < PARAMETERS:
        raise PlanError(
            f"reshard needs a zero_stage of 3, got reshard={reshard} with zero_stage={zero_stage}; "
            "leave reshard out"
        )
    if reshard == "stage" and model.experts is not None:
        raise PlanError("reshard=stage needs a model without experts, got one with; leave reshard out")


def check_tensor_overlap(model: ModelSpec, d: Dims) -> None:
    """Raise PlanError unless tensor-parallel ranks of sizes ``d`` can compute while they communicate so."""
    way = d.tensor_overlap
    if way != "none" and d.tp == 1:
        raise PlanError(f"tensor_overlap={way} needs tp > 1, got tp=1; leave it out")
    if way != "chunked":
        return
    if model.experts is not None or model.latent_attention is not None:
        raise PlanError(
            "tensor_overlap=chunked is for layers without experts or latent attention, "
            f"got {model.name}; take weight_gradient"
        )
    if not d.sequence_parallel:
        raise PlanError(
            "tensor_overlap=chunked needs sequence_parallel=True, as nothing is gathered without it, "
            "got False; take weight_gradient"
        )
    if all(d.local_tokens % chunks for chunks in GATHER_CHUNKS):
        raise PlanError(
            f"tensor_overlap=chunked needs {min(GATHER_CHUNKS)} to divide the tokens of a microbatch on a "
            f"tensor-parallel rank, got {d.local_tokens}; change micro_batch or seq_len, "
            "or take weight_gradient"
        )


def _degree_remedy(num_devices: int, topology: Topology) -> str:
    rest = topology.pp * topology.cp * topology.tp
    if num_devices % rest == 0:
        return f"try dp={num_devices // rest}"
    return f"pp * cp * tp = {rest} does not divide {num_devices}"


def check_compile(asked: bool, model: ModelSpec) -> None:
    """Raise PlanError where the bodies have no compiled kernels."""
    if asked and (model.experts is not None or model.latent_attention is not None):
        raise PlanError(
            f"compile=True is for layers without experts or latent attention, got {model.name}, "
            "whose bodies have eager kernels alone; leave it out"
        )


def check_foreign(
    names: Sequence[str],
    segments: Mapping[str, Segment],
    topology: Topology,
    zero_stage: int,
    recompute: Sequence[Recompute],
    offload: Sequence[bool],
) -> None:
    """Raise PlanError unless a module can stand for each of ``names`` among the model's ``segments``."""
    able = [name for name, segment in segments.items() if segment.kind in FOREIGN]
    for name in names:
        if name not in able:
            raise PlanError(f"foreign must name segments among {', '.join(able)}, got {shown(name)}")
        if list(names).count(name) > 1:
            raise PlanError(f"foreign must name a segment once, got {name!r} twice; leave one out")
        layer = segments[name].layer
        assert layer is not None
        if recompute[layer] == "selective" or offload[layer]:
            saving = "offload" if offload[layer] else "selective recompute"
            raise PlanError(
                f"what the foreign {name} saves is in its graph, out of reach of {saving}, got both; "
                f"plan layer {layer} without, or with recompute=full"
            )
    if names and (topology.tp > 1 or topology.cp > 1):
        raise PlanError(
            f"foreign modules are not cut, which needs tp=1 and cp=1, got tp={topology.tp} cp={topology.cp} "
            f"for {', '.join(names)}; plan without them"
        )
    if names and zero_stage >= PARAMETERS:
        raise PlanError(
            f"the graph of a foreign module keeps parameters, which zero_stage=3 lets go of, "
            f"got {', '.join(names)}; plan a zero_stage of at most 2"
        )
