"""The training plan: one immutable value with everything a rank needs.

What follows from its fields (schedule, layout, bodies, buckets, program) is derived by pure functions on
demand. ``plan.plan`` makes one from a request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import numpy as np
from attrs import Attribute, Converter, field, frozen

from picotron.errors import PlanError
from picotron.planner import plan_buckets, plan_program
from picotron.planner.body import Bodies, Dims, TensorOverlap, dims
from picotron.planner.catalogue import make_schedule
from picotron.planner.cluster import ClusterSpec, peak_flops_per_second
from picotron.planner.context import ContextParallel, check_context, token_positions
from picotron.planner.data import DEFAULT_BUCKET_BYTES, Bucket
from picotron.planner.layout import Placement, is_held, layout, stage_segments
from picotron.planner.model import ModelSpec, Segment
from picotron.planner.pipeline import Schedule, schedule_from_csv
from picotron.planner.plan_rules import (
    check_accumulate,
    check_actions,
    check_compile,
    check_degrees,
    check_foreign,
    check_loss_chunks,
    check_parts,
    check_reshard,
    check_schedule,
    check_shard,
    check_stage_layers,
    check_stages,
    check_tensor_overlap,
)
from picotron.planner.program import Program
from picotron.planner.recompute import Recompute, flags_by_layer, modes_by_layer
from picotron.planner.sharding import (
    DATA_GROUPS,
    Accumulate,
    Exchange,
    Reshard,
    Sharding,
)
from picotron.planner.stage import Variant, segment_name, stage_bodies
from picotron.planner.topology import Coordinate, Topology
from picotron.planner.validators import FLAG, are_words, as_tuple, must_be, one_of, whole
from picotron.planner.workload import Format, Workload

SCHEMA_VERSION = 1


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
    the optimizer's state (1), gradients too (2), parameters too (3). ``accumulate`` says whether the
    gradients of stages 2 and 3 are reduced into parts in every microbatch ("sharded", if None) or add up
    whole until the last one ("full"); ``reshard`` whether the parameters of stage 3 are gathered for a unit
    at a time ("unit", if None) or for a stage, which keeps them while consecutive cells use it ("stage").
    ``recompute`` and ``offload`` have one value for each decoder layer; one value given for all is repeated.
    ``loss_chunks``: in so many parts of a microbatch's tokens logits are made and lost again.
    ``tensor_overlap``: what multiplies while tp ranks communicate: the weights' gradients while an input's is
    summed ("weight_gradient"); that, and the products of a chunk of tokens while the next is gathered
    ("chunked").
    ``compile``: RMS norms, gates and the loss over a whole vocabulary are compiled into one kernel each.
    ``context``: how the cp ranks that share sequences reach each other's keys and values (``context``).
    ``foreign``: segments ("mlp 1") that modules of the caller's compute, by autograd. Their split backward
    walks a graph twice and is priced so; their bytes are those of the segments they stand for, not exact.
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
    context: ContextParallel = "ring"
    loss_chunks: int = field(default=1, validator=whole(1))
    tensor_overlap: TensorOverlap = field(default="none", validator=one_of(TensorOverlap))
    compile: bool = field(default=False, validator=FLAG)
    stage_layers: tuple[int, ...] = field(converter=_layers)
    bucket_bytes: int = field(default=DEFAULT_BUCKET_BYTES, validator=whole(1))
    zero_stage: int = field(default=0, validator=whole(0, 3))
    shard: int | None = None
    accumulate: Accumulate | None = None
    reshard: Reshard | None = None
    recompute: tuple[Recompute, ...] = _by_layer("none", modes_by_layer)
    offload: tuple[bool, ...] = _by_layer(False, flags_by_layer)
    foreign: tuple[str, ...] = field(
        default=(), converter=as_tuple, validator=must_be("a sequence of names of segments", are_words)
    )
    chosen: tuple[str, ...] = field(
        default=(), converter=as_tuple, validator=must_be("a sequence of texts", are_words)
    )

    @chosen.validator
    def _consistent(self, _: Attribute[object], __: object) -> None:
        check_parts(self.model, self.cluster, self.workload, self.topology)
        if not isinstance(self.sequence_parallel, bool):
            raise PlanError(f"sequence_parallel must be True or False, got {self.sequence_parallel!r}")
        check_degrees(self.model, self.cluster, self.workload, self.topology, self.micro_batch)
        check_shard(self.zero_stage, self.shard, self.topology)
        check_accumulate(self.zero_stage, self.accumulate)
        check_reshard(self.zero_stage, self.reshard, self.model)
        check_stages(self.model, self.topology.pp, self.virtual_stages)
        num_stages = self.topology.pp * self.virtual_stages
        check_stage_layers(self.stage_layers, num_stages, self.model.num_layers)
        check_context(self.context, self.model, self.topology, self.workload.seq_len)
        check_loss_chunks(self.loss_chunks, self.micro_batch * self.workload.seq_len // self.topology.cp)
        check_compile(self.compile, self.model)
        named = {segment_name(segment): segment for stage in self.stage_segments for segment in stage}
        check_foreign(self.foreign, named, self.topology, self.zero_stage, self.recompute, self.offload)
        if self.sequence_parallel and self.topology.tp == 1:
            raise PlanError("sequence_parallel needs tp > 1, got tp=1; leave it out")
        for index in range(self.topology.tp):
            self.dims(index)
        check_tensor_overlap(self.model, self.dims())
        peak_flops_per_second(self.cluster.device, self.format.product)
        check_actions(2 * num_stages * self.num_microbatches)
        check_schedule(self.schedule, self.topology.pp, self.virtual_stages, self.num_microbatches)
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
        """Bytes per element of everything that is kept, and of gradients on their way."""
        return self.workload.format

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

    def placement(self, name: str) -> Placement:
        """Where the parameter ``name`` lives."""
        return self._placements[name]

    @cached_property
    def _placements(self) -> dict[str, Placement]:
        return {placement.name: placement for placement in self.layout}

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
        return tuple(plan_buckets.stage_buckets(self, stage) for stage in range(self.num_stages))

    def dims(self, tp_index: int = 0) -> Dims:
        """Local sizes on tensor-parallel rank ``tp_index``.

        A GPU adds a 16-bit product to a wider gradient in one kernel; a CPU makes the product first.
        """
        form = self.format
        return dims(
            self.model,
            self.topology,
            micro_batch=self.micro_batch,
            seq_len=self.workload.seq_len,
            sequence_parallel=self.sequence_parallel,
            itemsize=form.compute,
            gradient_itemsize=form.gradient,
            adds_products=form.gradient != form.compute and self.cluster.device.kind == "cpu",
            tp_index=tp_index,
            context=self.context,
            loss_chunks=self.loss_chunks,
            tensor_overlap=self.tensor_overlap,
            compiled=self.compile,
        )

    def token_positions(self, cp_index: int) -> np.ndarray:
        """Where the tokens of context-parallel rank ``cp_index`` stand in their sequence, ascending."""
        return token_positions(self.workload.seq_len, self.topology.cp, cp_index, self.context)

    def bodies(self, stage: int, tp_index: int = 0) -> Bodies:
        """What ``stage`` does with one microbatch, phase by phase."""
        own, local = self.stage_segments[stage], self.dims(tp_index)
        return stage_bodies(self.model, self.topology, stage, own, local, self.variant(stage, tp_index))

    def variant(self, stage: int, tp_index: int = 0) -> Variant:
        """What recomputing, offloading, sharding and modules change in the bodies of ``stage``."""
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
            gathered_bytes=() if self.reshard == "stage" else tuple(map(sum, zip(*gathered, strict=True))),
            fillings=plan_buckets.fillings(self, stage, tp_index),
            foreign=self.foreign,
        )

    def bucket_payload_bytes(self, stage: int, tp_index: int = 0) -> tuple[int, ...]:
        """Bytes of each bucket of ``stage``."""
        return plan_buckets.payload_bytes(self, stage, tp_index)

    def bucket_sums(self, stage: int, tp_index: int = 0) -> tuple[tuple[Exchange, ...], ...]:
        """What is done with the gradients of each bucket of ``stage``, in order."""
        return plan_buckets.sums(self, stage, tp_index)

    def bucket_gathers(self, stage: int, tp_index: int = 0) -> tuple[Exchange | None, ...]:
        """How the parameters of each bucket of ``stage`` are gathered after the update, where they are."""
        return plan_buckets.gathers(self, stage, tp_index)

    def is_scattered(self, bucket: Bucket) -> bool:
        """Whether each B and W reduces the bucket into the parts that ranks keep of it (ZeRO-2, 3)."""
        return plan_buckets.is_scattered(self, bucket)

    def kept_numel(self, stage: int, where: Coordinate, what: int) -> int:
        """Elements at ``where`` of OPTIMIZER, GRADIENTS or PARAMETERS (of ``sharding``) of ``stage``."""
        return plan_buckets.kept_numel(self, stage, where, what)

    def gathered_bytes(self, stage: int, group: str, tp_index: int = 0) -> tuple[int, ...]:
        """Of each unit of ``stage``, the parameters gathered over ``group`` (of DATA_GROUPS) under ZeRO-3."""
        return plan_buckets.gathered_bytes(self, stage, group, tp_index)

    @cached_property
    def _programs(self) -> dict[int, Program]:
        return {}

    def program(self, tp_index: int = 0) -> Program:
        """The rows of one step, as tensor-parallel rank ``tp_index`` of each stage runs them."""
        if tp_index not in self._programs:
            self._programs[tp_index] = plan_program.lowered(self, tp_index)
        return self._programs[tp_index]
