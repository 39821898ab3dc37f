"""The training plan: one immutable value with everything a rank needs.

``plan`` checks a request, chooses what the caller left out by a stated rule and returns a ``TrainingPlan``.
What follows from its fields (schedule, layout, bodies, program) is derived by pure functions on demand.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

from attrs import Attribute, field, frozen

from picotron.errors import PlanError
from picotron.planner.body import Body, Dims, dims
from picotron.planner.catalogue import SCHEDULES, make_schedule
from picotron.planner.cluster import ClusterSpec, peak_flops_per_second
from picotron.planner.data import DEFAULT_BUCKET_BYTES, Bucket, buckets
from picotron.planner.flops import matmuls
from picotron.planner.layout import Placement, is_held, layout, local_numel, stage_segments
from picotron.planner.model import ModelSpec, Segment, segments
from picotron.planner.pipeline import Schedule, schedule_from_csv
from picotron.planner.program import Program, lower
from picotron.planner.split import stage_split
from picotron.planner.stage import backward_body, forward_body
from picotron.planner.tensor import check_tensor_parallel
from picotron.planner.topology import AXES, Coordinate, Topology
from picotron.planner.validators import are_words, as_tuple, is_size, must_be, whole
from picotron.planner.workload import FORMATS, Format, Workload

SCHEMA_VERSION = 1
MAX_ACTIONS = 250_000  # of one step over all pipeline ranks


def _layers(value: Iterable[int]) -> tuple[int, ...]:
    if not isinstance(value, tuple | list):
        raise PlanError(f"stage_layers must be a sequence of whole numbers, got {value!r}")
    return tuple(value)


@frozen(kw_only=True)
class TrainingPlan:
    """Everything a rank needs, in one value. Build it with ``plan``; a value that exists is valid.

    ``stage_layers``: decoder layers of each stage. ``schedule_csv`` holds the orders of a custom schedule.
    ``chosen`` says what the caller left out and by which rule it was chosen.
    """

    model: ModelSpec
    cluster: ClusterSpec
    workload: Workload
    topology: Topology
    schedule_name: str = "1f1b"
    schedule_csv: str | None = None
    micro_batch: int = field(default=1, validator=whole(1))
    sequence_parallel: bool = False
    stage_layers: tuple[int, ...] = field(converter=_layers)
    bucket_bytes: int = field(default=DEFAULT_BUCKET_BYTES, validator=whole(1))
    chosen: tuple[str, ...] = field(
        default=(), converter=as_tuple, validator=must_be("a sequence of texts", are_words)
    )

    @chosen.validator
    def _consistent(self, _: Attribute[object], __: object) -> None:
        for name, kind in (
            ("model", ModelSpec),
            ("cluster", ClusterSpec),
            ("workload", Workload),
            ("topology", Topology),
        ):
            _check_kind(name, getattr(self, name), kind, "build the plan with plan(...)")
        if not all(map(is_size, self.stage_layers)):
            raise PlanError(f"every stage needs a layer, got stage_layers={self.stage_layers}")
        if not isinstance(self.sequence_parallel, bool):
            raise PlanError(f"sequence_parallel must be True or False, got {self.sequence_parallel!r}")
        _check_degrees(self.model, self.cluster, self.workload, self.topology, self.micro_batch)
        if len(self.stage_layers) != self.topology.pp or sum(self.stage_layers) != self.model.num_layers:
            raise PlanError(
                f"stage_layers must give {self.topology.pp} stages all {self.model.num_layers} layers, "
                f"got {self.stage_layers}"
            )
        if self.sequence_parallel and self.topology.tp == 1:
            raise PlanError("sequence_parallel needs tp > 1, got tp=1; leave it out")
        for index in range(self.topology.tp):
            self.dims(index)
        peak_flops_per_second(self.cluster.device, self.workload.precision)
        _check_schedule(self.schedule, self.topology.pp, self.num_microbatches)
        if self.schedule_csv is not None:
            self.program()  # refuses orders whose ranks would wait for each other

    def __str__(self) -> str:
        from picotron.planner.draw import draw_plan

        return draw_plan(self)

    def _repr_html_(self) -> str:
        """The schedule as a picture, for notebooks."""
        from picotron.planner.draw_svg import schedule_svg

        return schedule_svg(self)

    @property
    def num_microbatches(self) -> int:
        """Microbatches of one data-parallel rank in a step."""
        return self.workload.global_batch // (self.topology.dp * self.micro_batch)

    @property
    def format(self) -> Format:
        """Bytes per element of everything that is kept."""
        return FORMATS[self.workload.precision]

    @cached_property
    def schedule(self) -> Schedule:
        """The order of actions, made again from its name or read from its CSV."""
        if self.schedule_csv is not None:
            return schedule_from_csv(self.schedule_csv, name=self.schedule_name)
        return make_schedule(self.schedule_name, self.topology.pp, self.num_microbatches)

    @cached_property
    def layout(self) -> tuple[Placement, ...]:
        """Where every parameter lives."""
        return layout(self.model, self.topology, self.stage_layers, sequence_parallel=self.sequence_parallel)

    @cached_property
    def stage_layout(self) -> tuple[tuple[Placement, ...], ...]:
        """The placements of each stage."""
        stages: tuple[list[Placement], ...] = tuple([] for _ in range(self.topology.pp))
        for placement in self.layout:
            stages[placement.stage].append(placement)
        return tuple(map(tuple, stages))

    def held(self, where: Coordinate) -> tuple[Placement, ...]:
        """The placements that the rank at ``where`` holds a slice of, in plan order."""
        return tuple(p for p in self.stage_layout[where.pp] if is_held(p, self.topology, where))

    @cached_property
    def stage_segments(self) -> tuple[tuple[Segment, ...], ...]:
        """The model's segments, by stage."""
        return stage_segments(self.model, self.stage_layers)

    @cached_property
    def stage_buckets(self) -> tuple[tuple[Bucket, ...], ...]:
        """Gradient buckets, by stage; of experts, those that the first expert-parallel rank holds."""
        return tuple(
            buckets(
                self.held(Coordinate(pp=stage)),
                stage,
                itemsize=self.format.gradient,
                bucket_bytes=self.bucket_bytes,
            )
            for stage in range(self.topology.pp)
        )

    def dims(self, tp_index: int = 0) -> Dims:
        """Local sizes on tensor-parallel rank ``tp_index``."""
        return dims(
            self.model,
            self.topology,
            micro_batch=self.micro_batch,
            seq_len=self.workload.seq_len,
            sequence_parallel=self.sequence_parallel,
            itemsize=self.format.compute,
            tp_index=tp_index,
        )

    def bodies(self, stage: int, tp_index: int = 0) -> tuple[Body, Body]:
        """Forward and backward of one microbatch on ``stage``."""
        own, local = self.stage_segments[stage], self.dims(tp_index)
        return (
            forward_body(self.model, self.topology, stage, own, local),
            backward_body(self.model, self.topology, stage, own, local),
        )

    def bucket_payload_bytes(self, stage: int, tp_index: int = 0) -> tuple[int, ...]:
        """Bytes of each bucket of ``stage``."""
        where = Coordinate(pp=stage, tp=tp_index)
        numel = {p.name: local_numel(p, where) for p in self.held(where)}
        return tuple(
            sum(numel[name] for name in bucket.names) * self.format.gradient
            for bucket in self.stage_buckets[stage]
        )

    @cached_property
    def _programs(self) -> dict[int, Program]:
        return {}

    def program(self, tp_index: int = 0) -> Program:
        """The rows of one step, as tensor-parallel rank ``tp_index`` of each stage runs them."""
        if tp_index not in self._programs:
            self._programs[tp_index] = self._lowered(tp_index)
        return self._programs[tp_index]

    def _lowered(self, tp_index: int) -> Program:
        return lower(
            self.schedule,
            boundary_bytes=self.dims(tp_index).local_bytes,
            buckets=self.stage_buckets,
            bucket_bytes=[self.bucket_payload_bytes(stage, tp_index) for stage in range(self.topology.pp)],
            data_parallel=self.topology.dp * self.topology.cp > 1,
            world_size=self.topology.world_size,
        )


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
    micro_batch: int = 1,
    sequence_parallel: bool | None = None,
    stage_layers: tuple[int, ...] | None = None,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
) -> TrainingPlan:
    """The plan that trains ``model`` on ``cluster`` as asked.

    Left out, ``dp`` takes the devices that the other degrees leave, ``sequence_parallel`` is on when tp > 1
    and the tokens can be cut, and layers are split so that the dearest stage costs least. Raises PlanError
    for a request that cannot be met.
    """
    _check_kind("model", model, ModelSpec, "use ModelSpec.from_hf(...)")
    _check_kind("cluster", cluster, ClusterSpec, "use ClusterSpec.preset(...) or ClusterSpec.parse(...)")
    _check_kind("work", work, Workload, "use Workload(global_batch=..., seq_len=...)")
    chosen = []
    if dp is None:
        rest = Topology(pp=pp, cp=cp, tp=tp).world_size
        dp = max(1, cluster.num_devices // rest)
        chosen.append(f"dp={dp}: the devices that pp * cp * tp leave")
    topology = Topology(pp=pp, dp=dp, cp=cp, tp=tp, ep=ep, etp=etp, order=order)
    _check_degrees(model, cluster, work, topology, micro_batch)
    if sequence_parallel is None:
        sequence_parallel = tp > 1 and micro_batch * work.seq_len // cp % tp == 0
        if tp > 1:
            chosen.append(f"sequence_parallel={sequence_parallel}: on when tp > 1 and tp divides the tokens")
    if stage_layers is None:
        stage_layers = _balanced_layers(model, work, topology, micro_batch)
        if pp > 1:
            chosen.append(
                f"stage_layers={','.join(map(str, stage_layers))}: least FLOPs in the dearest stage"
            )
    custom = schedule if isinstance(schedule, Schedule) else None
    if custom is None and (not isinstance(schedule, str) or schedule not in SCHEDULES):
        raise PlanError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    return TrainingPlan(
        model=model,
        cluster=cluster,
        workload=work,
        topology=topology,
        schedule_name=custom.name if custom else str(schedule),
        schedule_csv=str(custom) if custom else None,
        micro_batch=micro_batch,
        sequence_parallel=sequence_parallel,
        stage_layers=stage_layers,
        bucket_bytes=bucket_bytes,
        chosen=tuple(chosen),
    )


def _check_kind(name: str, value: object, kind: type, remedy: str) -> None:
    if not isinstance(value, kind):
        raise PlanError(f"{name} must be a {kind.__name__}, got {type(value).__name__}; {remedy}")


def _check_schedule(schedule: Schedule, num_ranks: int, num_microbatches: int) -> None:
    """Raise PlanError unless ``schedule`` has one stage a rank and runs the step's microbatches."""
    if (schedule.num_ranks, schedule.num_microbatches) != (num_ranks, num_microbatches):
        raise PlanError(
            f"the schedule must have {num_ranks} ranks and {num_microbatches} microbatches, "
            f"got {schedule.num_ranks} and {schedule.num_microbatches}"
        )
    if schedule.stage_ranks != tuple(range(num_ranks)):
        raise PlanError(f"stage s must be on pipeline rank s, got stages on ranks {schedule.stage_ranks}")


def _check_degrees(
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
    if topology.pp > model.num_layers:
        raise PlanError(
            f"pp must be at most the model's {model.num_layers} layers, got pp={topology.pp}; lower pp"
        )
    actions = 2 * topology.pp * (work.global_batch // per_step)
    if actions > MAX_ACTIONS:
        raise PlanError(
            f"a step may have at most {MAX_ACTIONS:,} actions (an F and a B for each microbatch and stage), "
            f"got {actions:,}; raise micro_batch or dp"
        )
    check_tensor_parallel(model, tp=topology.tp, etp=topology.etp)
    for name in ("ep", "etp"):
        if getattr(topology, name) > 1 and model.experts is None:
            raise PlanError(
                f"{name} needs a model with experts, got {name}={getattr(topology, name)} for {model.name}"
            )
    if model.experts is not None and topology.ep > model.experts.num_experts:
        raise PlanError(f"ep must be at most the {model.experts.num_experts} experts, got ep={topology.ep}")
    if model.rope_theta is None and work.seq_len > model.max_positions:
        raise PlanError(
            f"seq_len must be at most the model's {model.max_positions} learned positions, got {work.seq_len}"
        )


def _degree_remedy(num_devices: int, topology: Topology) -> str:
    rest = topology.pp * topology.cp * topology.tp
    if num_devices % rest == 0:
        return f"try dp={num_devices // rest}"
    return f"pp * cp * tp = {rest} does not divide {num_devices}"


def _balanced_layers(
    model: ModelSpec, work: Workload, topology: Topology, micro_batch: int
) -> tuple[int, ...]:
    """The split of layers that makes the stage with the most forward FLOPs as cheap as can be."""

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
    return stage_split(costs, topology.pp, first=ends["embedding"], last=ends["head"])
