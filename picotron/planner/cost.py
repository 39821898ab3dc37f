"""Seconds of every operation, from a roofline with stated efficiencies.

A matmul takes the longer of its FLOPs at the reached peak and its bytes at the reached memory rate; a
kernel its bytes; each launch adds the device's fixed cost. Collectives follow latency and bandwidth over
the slowest link that their group crosses. Sources: Williams et al. 2009, Roofline; ``collectives``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

from attrs import frozen

from picotron.planner.body import COLLECTIVES, Body, Operation, SegmentBody
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
from picotron.planner.topology import Coordinate, group_size, groups
from picotron.planner.workload import MOMENTS


@frozen(kw_only=True)
class SegmentCost:
    """Seconds of one segment: its own computing, and the collectives it blocks on."""

    compute_seconds: float
    communication_seconds: float

    @property
    def seconds(self) -> float:
        """Both, one after the other."""
        return self.compute_seconds + self.communication_seconds


@frozen(kw_only=True)
class StageCost:
    """Seconds of one microbatch on one stage, by segment in the order each phase runs them."""

    forward: tuple[SegmentCost, ...]
    backward: tuple[SegmentCost, ...]
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
    def compute_seconds(self) -> float:
        """One F and one B without their collectives."""
        return sum(segment.compute_seconds for segment in (*self.forward, *self.backward))


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
    """Seconds of one transfer between neighbouring stages, on the slowest such pair."""
    pipes = groups(plan.topology, "pp")
    pairs = [pair for pipe in pipes for pair in pairwise(pipe)]
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


def stage_cost(plan: TrainingPlan, stage: int) -> StageCost:
    """What one microbatch and one update cost on ``stage``."""
    forward, backward = plan.bodies(stage)
    seen: dict[tuple[str, str, int], float] = {}

    def communication(operation: Operation) -> float:
        key = operation.kind, operation.group, operation.payload_bytes
        if key not in seen:
            seen[key] = group_seconds(plan, *key)
        return seen[key]

    def segment_cost(segment: SegmentBody) -> SegmentCost:
        return SegmentCost(
            compute_seconds=sum(compute_seconds(plan, operation) for operation in segment.operations),
            communication_seconds=sum(communication(operation) for operation in segment.collectives),
        )

    def costs(body: Body) -> tuple[SegmentCost, ...]:
        return tuple(segment_cost(segment) for segment in body.segments)

    return StageCost(
        forward=costs(forward), backward=costs(backward), update_seconds=update_seconds(plan, stage)
    )


def update_seconds(plan: TrainingPlan, stage: int) -> float:
    """Seconds of gradient norm, clipping and optimizer, all bound by memory.

    Gradients are read three times and written twice; parameters, main weights and moments are read and
    written once.
    """
    where = Coordinate(pp=stage)
    own = [local_numel(p, where) for p in plan.held(where)]
    form, moments = plan.format, MOMENTS[plan.workload.optimizer]
    per_element = 5 * form.gradient + 2 * (form.compute + form.main + moments * form.moment)
    device, reached = plan.cluster.device, plan.cluster.efficiency
    return (
        sum(own) * per_element / (device.memory_bytes_per_second * reached.memory)
        + 2 * len(own) * reached.kernel_seconds
    )
