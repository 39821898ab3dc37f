"""A plan with something changed, and what had to follow: one value set, another network, another device.

What the caller sets is kept as asked. What follows from it is chosen again by the rules of ``plan``: dp takes
the devices that are left, layers are split again where stages change, sequence parallelism goes with tensor
parallelism; and each is said. What cannot follow is refused with the planner's own words.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import evolve, fields

from picotron.errors import PlanError
from picotron.planner.catalogue import SCHEDULES
from picotron.planner.cluster import ClusterSpec, LinkSpec
from picotron.planner.context import CONTEXTS, ContextParallel, check_context
from picotron.planner.model import ModelSpec
from picotron.planner.plan import TrainingPlan, plan
from picotron.planner.records import hint
from picotron.planner.topology import Topology
from picotron.planner.validators import is_between, is_integer, shown
from picotron.planner.workload import Workload

AXES = ("dp", "pp", "cp", "tp", "ep", "etp", "order")
OPTIONS = (
    "micro_batch",
    "bucket_bytes",
    "zero_stage",
    "shard",
    "recompute",
    "offload",
    "sequence_parallel",
    "context",
    "loss_chunks",
    "tensor_overlap",
    "compile",
    "foreign",
)
STAGES = ("schedule", "virtual_stages", "stage_layers")
WORK = tuple(attribute.name for attribute in fields(Workload))
SETTINGS = (*AXES, *OPTIONS, *STAGES, *WORK, "model", "cluster")
LARGEST_FACTOR = 1e6  # of a rate or a latency
INTERLEAVES = {
    "1f1b": "interleaved",
    "interleaved": "1f1b",
}  # what another number of stages makes of a schedule


def changed(
    base: TrainingPlan, settings: Mapping[str, Any], cluster: ClusterSpec | None = None
) -> tuple[TrainingPlan, tuple[str, ...]]:
    """``base`` with ``settings`` (of SETTINGS) and on ``cluster``, and a sentence for each that followed.

    Raises PlanError for an unknown name, or a plan that cannot be.
    """
    if not isinstance(settings, Mapping):
        raise PlanError(f"settings must be values by name, such as {{'tp': 4}}, got {shown(settings)}")
    for name in settings:
        if name not in SETTINGS:
            raise PlanError(
                f"a setting must be one of {', '.join(SETTINGS)}, got {shown(name)}"
                f"{hint(name, SETTINGS) if isinstance(name, str) else ''}"
            )
    machine = _cluster(settings.get("cluster", base.cluster) if cluster is None else cluster)
    model = _model(settings.get("model", base.model))
    work = evolve(base.workload, **{name: settings[name] for name in WORK if name in settings})
    options = {
        **{axis: settings.get(axis, getattr(base.topology, axis)) for axis in AXES},
        **{name: settings.get(name, getattr(base, name)) for name in OPTIONS},
    }
    if "dp" not in settings and _devices_differ(base, machine, settings):
        options["dp"] = None
    if "sequence_parallel" not in settings and "tp" in settings:
        options["sequence_parallel"] = _sequence_parallel(base, settings["tp"])
    if "context" not in settings:
        options["context"] = _context(base, model, options, work)
    if "tensor_overlap" not in settings:
        options["tensor_overlap"] = _tensor_overlap(base, options)
    for name in ("recompute", "offload"):
        values = getattr(base, name)
        if name not in settings and model.num_layers != base.model.num_layers:
            options[name] = max(values, key=values.count)
    ranks = _copies(base, options, machine)
    if "shard" not in settings and base.shard and (ranks % base.shard or not options["zero_stage"]):
        options["shard"] = None
    options |= _stages(base, settings, model, work, options, machine)
    made = plan(model, machine, work, **options)
    return made, _followed(base, made, settings)


def _cluster(value: object) -> ClusterSpec:
    if isinstance(value, ClusterSpec):
        return value
    if isinstance(value, str):
        return ClusterSpec.parse(value)
    raise PlanError(f"cluster must be a ClusterSpec or a cluster's name such as h100:2x8, got {shown(value)}")


def _model(value: ModelSpec | str) -> ModelSpec:
    return value if isinstance(value, ModelSpec) else ModelSpec.from_hf(value)


def _devices_differ(base: TrainingPlan, machine: ClusterSpec, settings: Mapping[str, Any]) -> bool:
    """Whether dp must be chosen again: another number of devices, or other degrees beside it."""
    return machine.num_devices != base.cluster.num_devices or any(
        axis in settings for axis in ("pp", "cp", "tp")
    )


def _tensor_overlap(base: TrainingPlan, options: Mapping[str, Any]) -> str:
    """The base's, but what is left of it where nothing is communicated, or nothing gathered."""
    if options["tp"] == 1:
        return "none"
    if base.tensor_overlap == "chunked" and options["sequence_parallel"] is False:
        return "weight_gradient"
    return base.tensor_overlap


def _sequence_parallel(base: TrainingPlan, tp: int) -> bool | None:
    """Off with one rank, chosen by rule from one rank on to several, and else as it was."""
    if tp == 1:
        return False
    return None if base.topology.tp == 1 else base.sequence_parallel


def _context(
    base: TrainingPlan, model: ModelSpec, options: Mapping[str, Any], work: Workload
) -> ContextParallel | None:
    """As it was where it still fits, else chosen by rule."""
    if base.topology.cp == 1:
        return None
    try:
        topology = Topology(cp=options["cp"], tp=options["tp"])
        check_context(base.context, model, topology, work.seq_len)
    except PlanError:
        return None
    return base.context


def _copies(base: TrainingPlan, options: Mapping[str, Any], machine: ClusterSpec) -> int:
    """Ranks that could share a copy; 0 where the degrees are no numbers to multiply."""
    pp, cp, tp, dp = (options[axis] for axis in ("pp", "cp", "tp", "dp"))
    if not all(is_integer(degree) and degree > 0 for degree in (pp, cp, tp)):
        return 0
    dp = machine.num_devices // (pp * cp * tp) if dp is None else dp
    return int(dp * cp) if is_integer(dp) else 0


def _stages(
    base: TrainingPlan,
    settings: Mapping[str, Any],
    model: ModelSpec,
    work: Workload,
    options: Mapping[str, Any],
    machine: ClusterSpec,
) -> dict[str, Any]:
    """Schedule, stages a rank and layers a stage: kept where they still fit, chosen again where not."""
    schedule: Any = settings.get("schedule", base.schedule_name)
    virtual = settings.get("virtual_stages", base.virtual_stages)
    if base.schedule_csv is not None and "schedule" not in settings:
        same = (
            set(settings) <= set(OPTIONS) - {"micro_batch"}
            and machine.num_devices == base.cluster.num_devices
        )
        schedule = base.schedule if same else "interleaved" if virtual > 1 else "1f1b"
    if "virtual_stages" in settings and "schedule" not in settings and schedule in INTERLEAVES:
        schedule = "interleaved" if virtual != 1 else "1f1b"
    if "schedule" in settings and "virtual_stages" not in settings and isinstance(schedule, str):
        taken = SCHEDULES[schedule].virtual_stages if schedule in SCHEDULES else None
        if taken != "any" or virtual == 1:
            virtual = None
    kept = not ({"pp", *STAGES} & set(settings)) and model.num_layers == base.model.num_layers
    layers = settings.get("stage_layers", base.stage_layers if kept else None)
    return {"schedule": schedule, "virtual_stages": virtual, "stage_layers": layers}


def _followed(base: TrainingPlan, made: TrainingPlan, settings: Mapping[str, Any]) -> tuple[str, ...]:
    """A sentence for each value that differs though nobody set it."""
    before, after = _values(base), _values(made)
    return tuple(
        f"{name}={_short(after[name])} (was {_short(before[name])}){_why(name)}"
        for name in before
        if before[name] != after[name] and name not in settings
    )


def _values(one: TrainingPlan) -> dict[str, Any]:
    return {
        **{axis: getattr(one.topology, axis) for axis in AXES},
        "schedule": one.schedule_name,
        "virtual_stages": one.virtual_stages,
        "stage_layers": one.stage_layers,
        **{name: _alike(getattr(one, name)) for name in OPTIONS},
        "num_microbatches": one.num_microbatches,
    }


def _alike(value: Any) -> Any:
    """The one value of layers that are all alike; anything else as it is."""
    return value[0] if isinstance(value, tuple) and len(set(value)) == 1 else value


def _short(value: object) -> str:
    """A value for a reader."""
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _why(name: str) -> str:
    return {
        "dp": ": the devices that pp * cp * tp leave",
        "stage_layers": ": least FLOPs on the dearest rank",
        "sequence_parallel": ": on when tp > 1 and tp divides the tokens",
        "context": ": ring, but where cp alone divides seq_len and cuts the heads all_to_all",
        "num_microbatches": ": global_batch / (dp * micro_batch)",
    }.get(name, "")


def other_network(
    cluster: ClusterSpec, *, network: float = 1.0, bandwidth: float = 1.0, latency: float = 1.0
) -> ClusterSpec:
    """The cluster with other links: ``network`` times the rate between nodes, ``bandwidth`` times both rates.

    ``latency`` multiplies the seconds before the first byte, at both levels. Raises PlanError for what is no
    factor within reason.
    """
    for name, factor in (("network", network), ("bandwidth", bandwidth), ("latency", latency)):
        if not is_between(factor, 1 / LARGEST_FACTOR, LARGEST_FACTOR):
            raise PlanError(
                f"{name} must be a factor such as 2 or 0.5, in [{1 / LARGEST_FACTOR:g}, {LARGEST_FACTOR:g}], "
                f"got {shown(factor)}"
            )
    return evolve(
        cluster,
        intra_node=_scaled(cluster.intra_node, bandwidth, latency),
        inter_node=_scaled(cluster.inter_node, bandwidth * network, latency),
    )


def _scaled(link: LinkSpec, rate: float, latency: float) -> LinkSpec:
    if rate == 1 and latency == 1:
        return link
    return evolve(
        link,
        name=f"{link.name} at {rate:g} times the rate, {latency:g} times the latency",
        bytes_per_second=link.bytes_per_second * rate,
        latency_seconds=link.latency_seconds * latency,
    )


def other_device(cluster: ClusterSpec, name: str) -> ClusterSpec:
    """As many nodes of as many devices of another machine, with its own links and the same software.

    Raises PlanError for an unknown one.
    """
    machine = ClusterSpec.preset(name, nodes=cluster.nodes, devices_per_node=cluster.devices_per_node)
    return evolve(machine, profile=cluster.profile)


def single_changes(base: TrainingPlan) -> tuple[dict[str, Any], ...]:
    """Settings that change one thing: a degree doubled or halved, another mode, stage or schedule."""
    topology, found = base.topology, []
    degrees = ["tp", "pp", "cp", *(["ep"] if base.model.experts else [])]
    sizes = {**{axis: getattr(topology, axis) for axis in degrees}, "micro_batch": base.micro_batch}
    for name, size in sizes.items():
        found += [{name: size * 2}, *([{name: size // 2}] if size % 2 == 0 else [])]
    if topology.pp > 1:
        found += [{"virtual_stages": count} for count in (1, 2, 4, 8)]
        found += [{"schedule": name} for name in ("zb-h1", "zb-v")]
    if topology.dp * topology.cp > 1:
        found += [{"zero_stage": stage} for stage in range(4)]
    found += [{"recompute": mode} for mode in ("none", "selective", "full")]
    if topology.tp > 1:
        found.append({"sequence_parallel": not base.sequence_parallel})
    if topology.cp > 1:
        found += [{"context": context} for context in CONTEXTS]
    own = _values(base)
    return tuple(setting for setting in found if all(own[name] != value for name, value in setting.items()))
