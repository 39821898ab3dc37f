"""Seconds of every operation, from a roofline with stated efficiencies.

A matmul takes the longer of its FLOPs at the reached peak and its bytes at the reached memory rate; a
kernel its bytes; each launch adds the device's fixed cost. Collectives follow latency and bandwidth over
the slowest link that their group crosses. Sources: Williams et al. 2009, Roofline; ``collectives``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, overload

from attrs import Attribute, Factory, field, frozen

from picotron.errors import PlanError
from picotron.planner.body import COLLECTIVES, Bodies, Body, Operation, SegmentBody
from picotron.planner.cluster import (
    ClusterSpec,
    LinkSpec,
    achieved_link,
    group_link,
    link_between,
    peak_flops_per_second,
)
from picotron.planner.collectives import collective_seconds
from picotron.planner.layout import local_numel
from picotron.planner.plan import TrainingPlan
from picotron.planner.program import Kind
from picotron.planner.topology import Coordinate, group_size, groups
from picotron.planner.workload import MOMENTS


def _floats(value: Iterable[float]) -> tuple[float, ...]:
    return tuple(value)


@frozen(kw_only=True)
class CollectiveCost:
    """One collective inside a segment, in whose communicator the rank waits for its end."""

    kind: str
    group: str
    payload_bytes: int
    seconds: float


def _costs(value: Iterable[CollectiveCost]) -> tuple[CollectiveCost, ...]:
    return tuple(value)


@frozen(kw_only=True)
class SegmentCost:
    """Seconds of one segment in its order: stretches of computing, and a collective between each two."""

    compute: tuple[float, ...] = field(converter=_floats)
    collectives: tuple[CollectiveCost, ...] = field(default=(), converter=_costs)

    @collectives.validator
    def _alternate(self, _: Attribute[object], value: tuple[CollectiveCost, ...]) -> None:
        if len(self.compute) != len(value) + 1:
            raise PlanError(
                f"a segment computes before, between and after its collectives: {len(value)} of them need "
                f"{len(value) + 1} stretches, got {len(self.compute)}"
            )

    @property
    def compute_seconds(self) -> float:
        """Its own computing."""
        return sum(self.compute)

    @property
    def communication_seconds(self) -> float:
        """The collectives that it blocks on."""
        return sum(collective.seconds for collective in self.collectives)

    @property
    def seconds(self) -> float:
        """Both, one after the other."""
        return self.compute_seconds + self.communication_seconds


@frozen(kw_only=True)
class StageCost:
    """Seconds of one microbatch on one stage, by segment in the order each phase runs them.

    Left out, I takes what B takes, and W nothing.
    """

    forward: tuple[SegmentCost, ...]
    backward: tuple[SegmentCost, ...]
    backward_input: tuple[SegmentCost, ...] = field(default=Factory(lambda self: self.backward, True))
    backward_weight: tuple[SegmentCost, ...] = ()
    update_seconds: float

    @property
    def forward_seconds(self) -> float:
        """One F."""
        return sum(segment.seconds for segment in self.forward)

    @property
    def backward_seconds(self) -> float:
        """One B."""
        return sum(segment.seconds for segment in self.backward)

    @property
    def backward_input_seconds(self) -> float:
        """One I."""
        return sum(segment.seconds for segment in self.backward_input)

    @property
    def backward_weight_seconds(self) -> float:
        """One W."""
        return sum(segment.seconds for segment in self.backward_weight)

    def compute_seconds(self, kind: Kind) -> float:
        """One action of ``kind`` without its collectives."""
        return sum(segment.compute_seconds for segment in of_kind(self, kind))


@overload
def of_kind(value: StageCost, kind: Kind) -> tuple[SegmentCost, ...]: ...
@overload
def of_kind(value: Bodies, kind: Kind) -> Body: ...
def of_kind(value: StageCost | Bodies, kind: Kind) -> Any:
    """What ``value``, the bodies or the cost of a stage, has for rows of ``kind``."""
    return getattr(value, kind.name.lower())


def compute_seconds(plan: TrainingPlan, operation: Operation) -> float:
    """Seconds of an operation that computes; 0 for a collective."""
    if operation.kind in COLLECTIVES:
        return 0.0
    device, reached = plan.cluster.device, plan.cluster.efficiency
    by_memory = operation.moved_bytes / (device.memory_bytes_per_second * reached.memory)
    by_flops = 0.0
    if operation.flops:
        peak = peak_flops_per_second(device, plan.workload.precision)
        by_flops = operation.flops / (peak * reached.matmul)
    return max(by_flops, by_memory) + operation.kernels * reached.kernel_seconds


def group_seconds(plan: TrainingPlan, kind: str, group: str, payload_bytes: int) -> float:
    """Seconds of a collective over one group of ``group``, on the slowest of those groups.

    A ring uses every adapter of a node at once; in an all-to-all or an exchange between ring neighbours each
    byte takes its own device's adapter, so the slowest hop sets the pace.
    """
    direct = kind in ("exchange", "all_to_all")
    link = _slowest_link(plan, groups(plan.topology, group), link_between if direct else group_link)
    size = group_size(plan.topology, group)
    if kind == "exchange" and size > 1:  # a ring all-gather's steps: each rank passes on size - 1 parts
        return collective_seconds("all_gather", payload_bytes * size // (size - 1), size, link)
    return collective_seconds(kind, payload_bytes, size, link)


def send_seconds(plan: TrainingPlan, payload_bytes: int) -> float:
    """Seconds of one transfer between neighbouring stages, on the slowest pair of ranks that hold such."""
    neighbours = {pair for pair in pairwise(plan.schedule.stage_ranks) if pair[0] != pair[1]}
    pipes = groups(plan.topology, "pp")
    pairs = [(pipe[left], pipe[right]) for pipe in pipes for left, right in sorted(neighbours)]
    if not pairs:
        return 0.0
    return collective_seconds("send", payload_bytes, 2, _slowest_link(plan, pairs, link_between))


def _slowest_link(
    plan: TrainingPlan,
    members: Iterable[tuple[int, ...]],
    link_of: Callable[[ClusterSpec, Sequence[int]], LinkSpec],
) -> LinkSpec:
    """The slowest of the groups' links, at the rate that software reaches."""
    links = (link_of(plan.cluster, ranks) for ranks in members)
    slowest = min(links, key=lambda link: link.bytes_per_second)
    return achieved_link(slowest, plan.cluster.efficiency)


def stage_cost(plan: TrainingPlan, stage: int, tp_index: int = 0) -> StageCost:
    """What one microbatch and one update cost on tensor-parallel rank ``tp_index`` of ``stage``."""
    return _stage_cost(plan, stage, tp_index, _prices(plan))


def stage_costs(plan: TrainingPlan, tp_index: int = 0) -> tuple[StageCost, ...]:
    """``stage_cost`` of every stage."""
    price = _prices(plan)
    return tuple(_stage_cost(plan, stage, tp_index, price) for stage in range(plan.num_stages))


def _prices(plan: TrainingPlan) -> Callable[[Operation], CollectiveCost]:
    """What a collective of a body costs; each kind, group and payload is priced once."""
    seen: dict[tuple[str, str, int], CollectiveCost] = {}

    def price(operation: Operation) -> CollectiveCost:
        kind, group, size = key = operation.kind, operation.group, operation.payload_bytes
        if key not in seen:
            seconds = group_seconds(plan, kind, group, size)
            seen[key] = CollectiveCost(kind=kind, group=group, payload_bytes=size, seconds=seconds)
        return seen[key]

    return price


def _stage_cost(
    plan: TrainingPlan, stage: int, tp_index: int, price: Callable[[Operation], CollectiveCost]
) -> StageCost:
    def segment_cost(segment: SegmentBody) -> SegmentCost:
        compute = [0.0]
        for operation in segment.operations:
            if operation.kind in COLLECTIVES:
                compute.append(0.0)
            else:
                compute[-1] += compute_seconds(plan, operation)
        return SegmentCost(compute=compute, collectives=map(price, segment.collectives))

    def costs(body: Body) -> tuple[SegmentCost, ...]:
        return tuple(map(segment_cost, body.segments))

    bodies = plan.bodies(stage, tp_index)
    return StageCost(
        forward=costs(bodies.forward),
        backward=costs(bodies.backward),
        backward_input=costs(bodies.backward_input),
        backward_weight=costs(bodies.backward_weight),
        update_seconds=update_seconds(plan, stage, tp_index),
    )


def update_seconds(plan: TrainingPlan, stage: int, tp_index: int = 0) -> float:
    """Seconds of gradient norm, clipping and optimizer, all bound by memory.

    Gradients are read three times and written twice; parameters, main weights and moments are read and
    written once. Of experts, those that the first expert-parallel rank holds.
    """
    where = Coordinate(pp=plan.stage_rank(stage), tp=tp_index)
    own = [local_numel(p, where) for p in plan.stage_held(stage, where)]
    form, moments = plan.format, MOMENTS[plan.workload.optimizer]
    per_element = 5 * form.gradient + 2 * (form.compute + form.main + moments * form.moment)
    device, reached = plan.cluster.device, plan.cluster.efficiency
    return (
        sum(own) * per_element / (device.memory_bytes_per_second * reached.memory)
        + 2 * len(own) * reached.kernel_seconds
    )
