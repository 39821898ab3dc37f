"""The training plan: one immutable value with everything a rank needs.

``plan`` checks a request, chooses what the caller left out by a stated rule and returns a ``TrainingPlan``.
What follows from its fields (schedule, layout, bodies, program) is derived by pure functions on demand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from attrs import Attribute, Converter, evolve, field, frozen

from picotron.errors import PlanError
from picotron.planner.actions import B, W
from picotron.planner.body import Bodies, Dims, dims
from picotron.planner.catalogue import known, make_schedule
from picotron.planner.cluster import ClusterSpec, peak_flops_per_second
from picotron.planner.data import DEFAULT_BUCKET_BYTES, Bucket, buckets
from picotron.planner.flops import matmuls
from picotron.planner.layout import Placement, is_held, layout, stage_segments
from picotron.planner.lower import NOTHING_SHARDED, Sharded, Stream, lower
from picotron.planner.model import ModelSpec, Segment, segments
from picotron.planner.pipeline import Schedule, loop_ranks, schedule_from_csv, v_ranks
from picotron.planner.program import Kind, Program
from picotron.planner.recompute import Recompute, flags_by_layer, modes_by_layer, units
from picotron.planner.sharding import (
    DATA_GROUPS,
    GRADIENTS,
    OPTIMIZER,
    PARAMETERS,
    Exchange,
    Sharding,
    data_group,
    gradient_sums,
)
from picotron.planner.split import rank_split
from picotron.planner.stage import Variant, offloaded_bytes, stage_bodies
from picotron.planner.tensor import check_tensor_parallel
from picotron.planner.topology import AXES, Coordinate, Topology
from picotron.planner.validators import are_words, as_tuple, is_size, must_be, shown, whole
from picotron.planner.workload import FORMATS, Format, Workload

SCHEMA_VERSION = 1
MAX_ACTIONS = 250_000  # of one step over all pipeline ranks


def _layers(value: Iterable[int]) -> tuple[int, ...]:
    if not isinstance(value, tuple | list):
        raise PlanError(f"stage_layers must be a sequence of whole numbers, got {value!r}")
    return tuple(value)


def _num_layers(made: Any) -> int:
    """Decoder layers of a plan that is being made, whose model may yet turn out to be none."""
    return int(getattr(getattr(made, "model", None), "num_layers", 1))


def _by_layer(default: object, taken: Callable[[object, int], tuple[Any, ...]]) -> Any:
    """A field with a value for each decoder layer; one value stands for all."""

    def convert(value: object, made: Any) -> tuple[Any, ...]:
        return taken(value, _num_layers(made))

    converter: Any = Converter(convert, takes_self=True)
    return field(default=default, converter=converter)


@frozen(kw_only=True)
class TrainingPlan:
    """Everything a rank needs, in one value. Build it with ``plan``; a value that exists is valid.

    A pipeline rank holds ``virtual_stages`` stages, which the schedule places. ``stage_layers``: decoder
    layers of each stage. ``schedule_csv`` holds the orders of a custom schedule.
    ``zero_stage``: what ``shard`` of the dp * cp ranks (all, if None) share rather than copy: nothing (0),
    the optimizer's state (1), gradients too (2), parameters too (3). ``recompute`` and ``offload`` have one
    value for each decoder layer; one value given for all is repeated.
    ``chosen`` says what the caller left out and by which rule it was chosen.
    """

    model: ModelSpec
    cluster: ClusterSpec
    workload: Workload
    topology: Topology
    schedule_name: str = "1f1b"
    schedule_csv: str | None = None
    virtual_stages: int = field(default=1, validator=whole(1))
    micro_batch: int = field(default=1, validator=whole(1))
    sequence_parallel: bool = False
    stage_layers: tuple[int, ...] = field(converter=_layers)
    bucket_bytes: int = field(default=DEFAULT_BUCKET_BYTES, validator=whole(1))
    zero_stage: int = field(default=0, validator=whole(0, 3))
    shard: int | None = None
    recompute: tuple[Recompute, ...] = _by_layer("none", modes_by_layer)
    offload: tuple[bool, ...] = _by_layer(False, flags_by_layer)
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
        _check_shard(self.zero_stage, self.shard, self.topology)
        _check_stages(self.model, self.topology.pp, self.virtual_stages)
        num_stages = self.topology.pp * self.virtual_stages
        if len(self.stage_layers) != num_stages or sum(self.stage_layers) != self.model.num_layers:
            raise PlanError(
                f"stage_layers must give {num_stages} stages all {self.model.num_layers} layers, "
                f"got {self.stage_layers}"
            )
        if self.sequence_parallel and self.topology.tp == 1:
            raise PlanError("sequence_parallel needs tp > 1, got tp=1; leave it out")
        for index in range(self.topology.tp):
            self.dims(index)
        peak_flops_per_second(self.cluster.device, self.format.product)
        _check_actions(2 * num_stages * self.num_microbatches)
        _check_schedule(self.schedule, self.topology.pp, self.virtual_stages, self.num_microbatches)
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
    def sharding(self) -> Sharding:
        """Which part of parameters, gradients and optimizer state a rank keeps."""
        ranks = self.topology.dp * self.topology.cp
        return Sharding(topology=self.topology, zero_stage=self.zero_stage, shard=self.shard or ranks)

    @property
    def format(self) -> Format:
        """Bytes per element of everything that is kept."""
        return FORMATS[self.workload.precision]

    @cached_property
    def schedule(self) -> Schedule:
        """The order of actions, made again from its name or read from its CSV."""
        if self.schedule_csv is not None:
            return schedule_from_csv(self.schedule_csv, name=self.schedule_name)
        return make_schedule(self.schedule_name, self.topology.pp, self.num_microbatches, self.virtual_stages)

    @property
    def num_stages(self) -> int:
        """Stages over all pipeline ranks."""
        return len(self.stage_layers)

    def rank_stages(self, pp: int) -> tuple[int, ...]:
        """The stages that pipeline rank ``pp`` holds, ascending."""
        return tuple(stage for stage, rank in enumerate(self.schedule.stage_ranks) if rank == pp)

    def stage_rank(self, stage: int) -> int:
        """The pipeline rank that holds ``stage``."""
        return self.schedule.stage_ranks[stage]

    @cached_property
    def layout(self) -> tuple[Placement, ...]:
        """Where every parameter lives."""
        return layout(
            self.model,
            self.topology,
            self.stage_layers,
            sequence_parallel=self.sequence_parallel,
            stage_ranks=self.schedule.stage_ranks,
        )

    @cached_property
    def stage_layout(self) -> tuple[tuple[Placement, ...], ...]:
        """The placements of each stage."""
        stages: tuple[list[Placement], ...] = tuple([] for _ in self.stage_layers)
        for placement in self.layout:
            stages[placement.stage].append(placement)
        return tuple(map(tuple, stages))

    def stage_held(self, stage: int, where: Coordinate) -> tuple[Placement, ...]:
        """The placements of ``stage`` that the rank at ``where`` holds a slice of, in plan order."""
        return tuple(p for p in self.stage_layout[stage] if is_held(p, self.topology, where))

    def held(self, where: Coordinate) -> tuple[Placement, ...]:
        """The placements that the rank at ``where`` holds a slice of, in plan order."""
        return tuple(p for stage in self.rank_stages(where.pp) for p in self.stage_held(stage, where))

    @cached_property
    def stage_segments(self) -> tuple[tuple[Segment, ...], ...]:
        """The model's segments, by stage."""
        return stage_segments(self.model, self.stage_layers)

    @cached_property
    def stage_buckets(self) -> tuple[tuple[Bucket, ...], ...]:
        """Gradient buckets, by stage; of experts, those that the first expert-parallel rank holds.

        A table that embedding and head of one rank share is with the stage that adds to it last.
        """
        return tuple(
            buckets(
                self._completed(stage), stage, itemsize=self.format.gradient, bucket_bytes=self.bucket_bytes
            )
            for stage in range(self.num_stages)
        )

    def _completed(self, stage: int) -> tuple[Placement, ...]:
        """The placements whose gradients are complete after the last W or B of ``stage``."""
        own = self.stage_held(stage, Coordinate(pp=self.stage_rank(stage)))
        last = self.num_stages - 1
        if (
            stage not in (0, last)
            or last == 0
            or not self._shares_table
            or not _later(self.schedule, last, 0)
        ):
            return own
        tables = tuple(p for p in self.stage_layout[0] if p.role == "embedding")
        if stage == 0:
            return tuple(p for p in own if p not in tables)
        head = len(self.stage_segments[last]) - 1
        return (*own, *(evolve(table, stage=last, segment=head) for table in tables))

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

    def bodies(self, stage: int, tp_index: int = 0) -> Bodies:
        """What ``stage`` does with one microbatch, phase by phase."""
        own, local = self.stage_segments[stage], self.dims(tp_index)
        return stage_bodies(self.model, self.topology, stage, own, local, self.variant(stage, tp_index))

    def variant(self, stage: int, tp_index: int = 0) -> Variant:
        """What recomputing, offloading and sharding change in the bodies of ``stage``."""
        if (stage, tp_index) not in self._variants:
            self._variants[stage, tp_index] = self._variant(stage, tp_index)
        return self._variants[stage, tp_index]

    @cached_property
    def _variants(self) -> dict[tuple[int, int], Variant]:
        return {}

    def _variant(self, stage: int, tp_index: int) -> Variant:
        gathered = [self.gathered_bytes(stage, group, tp_index) for group in DATA_GROUPS]
        return Variant(
            recompute=self.recompute,
            offload=self.offload,
            gathered_bytes=tuple(map(sum, zip(*gathered, strict=True))),
            bucket_bytes=self.buffer_bytes(stage, tp_index),
        )

    def bucket_payload_bytes(self, stage: int, tp_index: int = 0) -> tuple[int, ...]:
        """Bytes of each bucket of ``stage``."""
        where = Coordinate(pp=self.stage_rank(stage), tp=tp_index)
        numel = {p.name: self.sharding.padded_numel(p, where) for p in self.held(where)}
        return tuple(
            sum(numel[name] for name in bucket.names) * self.format.gradient
            for bucket in self.stage_buckets[stage]
        )

    def bucket_sums(self, stage: int, tp_index: int = 0) -> tuple[tuple[Exchange, ...], ...]:
        """What is done with the gradients of each bucket of ``stage``, in order."""
        sizes = self.bucket_payload_bytes(stage, tp_index)
        return tuple(
            gradient_sums(self.sharding, bucket.partial, size)
            for bucket, size in zip(self.stage_buckets[stage], sizes, strict=True)
        )

    def bucket_gathers(self, stage: int, tp_index: int = 0) -> tuple[Exchange | None, ...]:
        """How the parameters of each bucket of ``stage`` are gathered after the update, where they are."""
        if self.zero_stage not in (OPTIMIZER, GRADIENTS):
            return (None,) * len(self.stage_buckets[stage])
        return tuple(
            Exchange(
                kind=Kind.ALL_GATHER,
                group=sums[0].group,
                bytes=sums[0].bytes // self.format.gradient * self.format.compute,
            )
            if sums and sums[0].kind is Kind.REDUCE_SCATTER
            else None
            for sums in self.bucket_sums(stage, tp_index)
        )

    def buffer_bytes(self, stage: int, tp_index: int = 0) -> int:
        """Full gradients that stand while those of ``stage`` are reduced in every microbatch (ZeRO-2, 3)."""
        if self.zero_stage < GRADIENTS:
            return 0
        sums = [own[0] for own in self.bucket_sums(stage, tp_index) if own]
        sizes = [first.bytes for first in sums if first.kind is Kind.REDUCE_SCATTER]
        return min(2 * max(sizes, default=0), sum(sizes))

    def gathered_bytes(self, stage: int, group: str, tp_index: int = 0) -> tuple[int, ...]:
        """Of each unit of ``stage``, the parameters gathered over ``group`` (of DATA_GROUPS) under ZeRO-3."""
        places = units(self.stage_segments[stage])
        if self.zero_stage < PARAMETERS or self.sharding.size(group) == 1:
            return (0,) * len(places)
        where = Coordinate(pp=self.stage_rank(stage), tp=tp_index)
        numel = [0] * len(self.stage_segments[stage])
        own = [(p.segment, p) for p in self.stage_held(stage, where)]
        if stage == self.num_stages - 1 and self._shares_table:
            own += [(len(numel) - 1, p) for p in self.stage_layout[0] if p.role == "embedding"]
        for segment, placement in own:
            if data_group(placement) == group:
                numel[segment] += self.sharding.padded_numel(placement, where)
        return tuple(sum(numel[place] for place in unit) * self.format.compute for unit in places)

    @property
    def _shares_table(self) -> bool:
        """Whether embedding and head use the same table on one rank."""
        return self.model.tied_embeddings and self.stage_rank(0) == self.stage_rank(self.num_stages - 1)

    @cached_property
    def _programs(self) -> dict[int, Program]:
        return {}

    def program(self, tp_index: int = 0) -> Program:
        """The rows of one step, as tensor-parallel rank ``tp_index`` of each stage runs them."""
        if tp_index not in self._programs:
            self._programs[tp_index] = self._lowered(tp_index)
        return self._programs[tp_index]

    def _lowered(self, tp_index: int) -> Program:
        stages = range(self.num_stages)
        sharded = Sharded(
            sums=[self.bucket_sums(stage, tp_index) for stage in stages],
            gathers=[self.bucket_gathers(stage, tp_index) for stage in stages],
            each_microbatch=self.zero_stage >= GRADIENTS,
        )
        return lower(
            self.schedule,
            boundary_bytes=self.dims(tp_index).local_bytes,
            buckets=self.stage_buckets,
            bucket_bytes=[self.bucket_payload_bytes(stage, tp_index) for stage in range(self.num_stages)],
            data_parallel=self.topology.dp * self.topology.cp > 1,
            world_size=self.topology.world_size,
            sharded=sharded if self.zero_stage else NOTHING_SHARDED,
            streams=tuple(self._streams(tp_index)),
        )

    def _streams(self, tp_index: int) -> Iterator[Stream]:
        """What is gathered and copied beside the computing."""
        stages, backwards = range(self.num_stages), (Kind.BACKWARD, Kind.BACKWARD_INPUT)
        for group in DATA_GROUPS:
            sizes = [sum(self.gathered_bytes(stage, group, tp_index)) for stage in stages]
            if any(sizes):
                beside, name = (Kind.FORWARD, *backwards), self.sharding.within(group)
                yield Stream(kind=Kind.UNSHARD, beside=beside, stage_bytes=sizes, group=name)
        if any(self.offload):
            sizes = [offloaded_bytes(self.bodies(stage, tp_index)) for stage in stages]
            yield Stream(kind=Kind.OFFLOAD, beside=(Kind.FORWARD,), stage_bytes=sizes)
            yield Stream(kind=Kind.RELOAD, beside=backwards, stage_bytes=sizes)


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
    stage_layers: tuple[int, ...] | None = None,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    zero_stage: int = 0,
    shard: int | None = None,
    recompute: Recompute | Sequence[Recompute] = "none",
    offload: bool | Sequence[bool] = False,
) -> TrainingPlan:
    """The plan that trains ``model`` on ``cluster`` as asked.

    Left out, ``dp`` takes the devices that the other degrees leave, ``virtual_stages`` (stages of a pipeline
    rank) is what the schedule has by itself, ``sequence_parallel`` is on when tp > 1 and the tokens can be
    cut, and layers are split so that the dearest stage costs least. Raises PlanError for a request that
    cannot be met.
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
    num_microbatches = work.global_batch // (dp * micro_batch)
    made = _scheduled(schedule, model, pp, virtual_stages, num_microbatches)
    num_stages = made.num_stages
    if virtual_stages is None:
        virtual_stages = num_stages // made.num_ranks
        if virtual_stages > 1:
            chosen.append(f"virtual_stages={virtual_stages}: stages a rank of {made.name}")
    _check_schedule(made, pp, virtual_stages, num_microbatches)
    if sequence_parallel is None:
        sequence_parallel = tp > 1 and micro_batch * work.seq_len // cp % tp == 0
        if tp > 1:
            chosen.append(f"sequence_parallel={sequence_parallel}: on when tp > 1 and tp divides the tokens")
    if stage_layers is None:
        _check_stages(model, pp, virtual_stages)
        stage_layers = _balanced_layers(model, work, made.stage_ranks, micro_batch)
        if num_stages > 1:
            chosen.append(f"stage_layers={','.join(map(str, stage_layers))}: least FLOPs on the dearest rank")
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
        stage_layers=stage_layers,
        bucket_bytes=bucket_bytes,
        zero_stage=zero_stage,
        shard=shard,
        recompute=modes_by_layer(recompute, model.num_layers),
        offload=flags_by_layer(offload, model.num_layers),
        chosen=tuple(chosen),
    )


def _check_kind(name: str, value: object, kind: type, remedy: str) -> None:
    if not isinstance(value, kind):
        raise PlanError(f"{name} must be a {kind.__name__}, got {type(value).__name__}; {remedy}")


def _scheduled(
    schedule: str | Schedule, model: ModelSpec, pp: int, virtual_stages: int | None, num_microbatches: int
) -> Schedule:
    """The schedule of a request. Raises PlanError for an unknown name and for sizes that it cannot have."""
    if virtual_stages is not None and not is_size(virtual_stages):
        raise PlanError(f"virtual_stages must be a whole number of at least 1, got {virtual_stages!r}")
    if isinstance(schedule, Schedule):
        return schedule
    if known(schedule).bidirectional:
        raise _two_copies(schedule)
    _check_stages(model, pp, virtual_stages or 1)
    _check_actions(2 * pp * (virtual_stages or 1) * num_microbatches)
    return make_schedule(schedule, pp, num_microbatches, virtual_stages)


def _two_copies(name: str) -> PlanError:
    return PlanError(
        f"{name} keeps two copies of the parameters, which cannot be run yet; dualpipe-v needs one"
    )


def _later(schedule: Schedule, one: int, other: int) -> bool:
    """Whether ``one`` of two stages on a rank adds its last weight gradients after the ``other`` has."""
    orders = schedule.orders
    adds = (orders.phase == B) | (orders.phase == W)
    one_last, other_last = (np.flatnonzero(adds & (orders.stage == stage))[-1] for stage in (one, other))
    return bool(one_last > other_last)


def _check_stages(model: ModelSpec, num_ranks: int, virtual_stages: int) -> None:
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


def _check_actions(num_actions: int) -> None:
    if num_actions > MAX_ACTIONS:
        raise PlanError(
            f"a step may have at most {MAX_ACTIONS:,} actions (an F and a B, or an F, an I and a W, "
            f"of each microbatch and stage), "
            f"got {num_actions:,}; raise micro_batch or dp"
        )


def _check_schedule(schedule: Schedule, num_ranks: int, virtual_stages: int, num_microbatches: int) -> None:
    """Raise PlanError unless ``schedule`` has the plan's ranks, stages and microbatches, and can be run."""
    if schedule.bidirectional:
        raise _two_copies(schedule.name)
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
    _check_actions(schedule.orders.num_actions)


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


def _check_shard(zero_stage: int, shard: int | None, topology: Topology) -> None:
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


def _degree_remedy(num_devices: int, topology: Topology) -> str:
    rest = topology.pp * topology.cp * topology.tp
    if num_devices % rest == 0:
        return f"try dp={num_devices // rest}"
    return f"pp * cp * tp = {rest} does not divide {num_devices}"


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
