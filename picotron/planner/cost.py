"""Seconds of every operation, from a roofline with stated efficiencies.

A matmul takes the longer of its FLOPs at the reached peak and its bytes at the reached memory rate; a
kernel its bytes; each launch adds the device's fixed cost. Collectives follow latency and bandwidth over
the slowest link that their group crosses. Sources: Williams et al. 2009, Roofline; ``collectives``.
On a machine whose costs were measured, they count instead of the roofline (``measured``); on an accelerator a
cluster's software profile scales the bodies so that they sum to the time model (``profile_prices``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from picotron.planner.body import COLLECTIVES, WAIT, Body, Operation, SegmentBody
from picotron.planner.cluster import (
    ClusterSpec,
    LinkSpec,
    achieved_link,
    group_link,
    link_between,
    peak_flops_per_second,
)
from picotron.planner.collectives import collective_seconds
from picotron.planner.plan import TrainingPlan
from picotron.planner.profile_prices import ProfileSeconds, profile_seconds, profiled
from picotron.planner.segment_costs import CollectiveCost as CollectiveCost
from picotron.planner.segment_costs import SegmentCost as SegmentCost
from picotron.planner.segment_costs import StageCost as StageCost
from picotron.planner.segment_costs import of_kind as of_kind
from picotron.planner.sharding import GRADIENTS, OPTIMIZER
from picotron.planner.topology import Coordinate, group_size, groups
from picotron.planner.workload import MOMENTS


def compute_seconds(plan: TrainingPlan, operation: Operation) -> float:
    """Seconds of an operation that computes; 0 for a collective, and for waiting for one."""
    if operation.kind in COLLECTIVES or operation.kind == WAIT:
        return 0.0
    reached = plan.cluster.efficiency
    rated = _roofline_seconds if reached.measured is None else _measured_seconds
    return (rated(plan, operation) + operation.kernels * reached.kernel_seconds) * reached.compute_scale


def launch_seconds(plan: TrainingPlan, operation: Operation) -> float:
    """The part of ``compute_seconds`` that goes into launching kernels."""
    reached = plan.cluster.efficiency
    if operation.kind in COLLECTIVES or operation.kind == WAIT:
        return 0.0
    return operation.kernels * reached.kernel_seconds * reached.compute_scale


def segment_overhead_seconds(plan: TrainingPlan) -> float:
    """What every segment begins with, where that was measured."""
    reached = plan.cluster.efficiency
    return reached.compute_scale * reached.measured.segment_seconds if reached.measured else 0.0


def _roofline_seconds(plan: TrainingPlan, operation: Operation) -> float:
    device, reached = plan.cluster.device, plan.cluster.efficiency
    by_memory = operation.moved_bytes / (device.memory_bytes_per_second * reached.memory)
    by_flops = 0.0
    if operation.flops:
        peak = peak_flops_per_second(device, plan.format.product)
        by_flops = operation.flops / (peak * reached.matmul)
    return max(by_flops, by_memory)


def _measured_seconds(plan: TrainingPlan, operation: Operation) -> float:
    measured = plan.cluster.efficiency.measured
    assert measured is not None
    if operation.kind == "kernel":
        return measured.kernel.seconds(operation.moved_bytes)
    if operation.kind == "attention":
        backward = operation.name.endswith("backward")
        product = measured.attention_backward if backward else measured.attention
    else:
        product = getattr(measured, product_role(operation))
    return product.seconds(operation.flops, operation.shape)


def product_role(operation: Operation) -> str:
    """What a layer's product makes: its "output", or the gradient of its "input" or of its "weight"."""
    if operation.for_weights:
        return "weight"
    return "input" if operation.name.endswith(" input") else "output"


def group_seconds(plan: TrainingPlan, kind: str, group: str, payload_bytes: int) -> float:
    """Seconds of a collective over one group of ``group``, on the slowest of those groups.

    A ring uses every adapter of a node at once; in an all-to-all or an exchange (a message from each rank to
    its neighbour) each byte takes its own device's adapter, so the slowest hop sets the pace. Over nodes an
    all-reduce takes a double tree where that is quicker.
    """
    direct = kind in ("exchange", "all_to_all")
    members = groups(plan.topology, group)
    link = _slowest_link(plan, members, link_between if direct else group_link)
    size = group_size(plan.topology, group)
    if kind == "exchange":
        return _scaled(plan, collective_seconds("send", payload_bytes, size, link))
    seconds = collective_seconds(kind, payload_bytes, size, link)
    if kind == "all_reduce":
        seconds = min(seconds, _tree_seconds(plan.cluster, members[0], payload_bytes, link))
    return _scaled(plan, seconds)


def _tree_seconds(cluster: ClusterSpec, ranks: Sequence[int], payload_bytes: int, link: LinkSpec) -> float:
    """An all-reduce up and down two trees of nodes, a chain in each (Sanders, Speck and Traeff 2009)."""
    nodes = len({rank // cluster.devices_per_node for rank in ranks})
    if nodes == 1:
        return float("inf")  # a ring is as quick
    inside = len(ranks) / nodes
    up = (
        math.log2(nodes) * cluster.inter_node.latency_seconds
        + (inside - 1) * cluster.intra_node.latency_seconds
    )
    return 2 * (payload_bytes / link.bytes_per_second + up)


def _scaled(plan: TrainingPlan, seconds: float) -> float:
    return seconds * plan.cluster.efficiency.communication_scale


def send_seconds(plan: TrainingPlan, payload_bytes: int) -> float:
    """Seconds of one transfer between neighbouring stages, on the slowest pair of ranks that hold such."""
    neighbours = {pair for pair in pairwise(plan.schedule.stage_ranks) if pair[0] != pair[1]}
    pipes = groups(plan.topology, "pp")
    pairs = [(pipe[left], pipe[right]) for pipe in pipes for left, right in sorted(neighbours)]
    if not pairs:
        return 0.0
    seconds = collective_seconds("send", payload_bytes, 2, _slowest_link(plan, pairs, link_between))
    return _scaled(plan, seconds)


def _slowest_link(
    plan: TrainingPlan,
    members: Sequence[tuple[int, ...]],
    link_of: Callable[[ClusterSpec, Sequence[int]], LinkSpec],
) -> LinkSpec:
    """The slowest of the groups' links, at the rate that software reaches.

    Groups that lie over their nodes alike have equal links: one of each kind is asked for.
    """
    nodes = np.array(members) // plan.cluster.devices_per_node
    patterns = np.ascontiguousarray(nodes - nodes[:, :1])
    whole_rows = patterns.view(np.dtype((np.void, patterns.itemsize * patterns.shape[1])))
    _, firsts = np.unique(whole_rows.ravel(), return_index=True)
    links = [link_of(plan.cluster, members[first]) for first in sorted(firsts.tolist())]
    slowest = min(links, key=lambda link: link.bytes_per_second)
    return achieved_link(slowest, plan.cluster.efficiency)


def stage_cost(plan: TrainingPlan, stage: int, tp_index: int = 0) -> StageCost:
    """What one microbatch and one update cost on tensor-parallel rank ``tp_index`` of ``stage``."""
    return _stage_cost(plan, stage, tp_index, _prices(plan), profile_seconds(plan))


def stage_costs(plan: TrainingPlan, tp_index: int = 0) -> tuple[StageCost, ...]:
    """``stage_cost`` of every stage."""
    price, seconds = _prices(plan), profile_seconds(plan)
    return tuple(_stage_cost(plan, stage, tp_index, price, seconds) for stage in range(plan.num_stages))


def _prices(plan: TrainingPlan) -> Callable[[Operation], CollectiveCost]:
    """What a collective of a body costs; each kind, group and payload is priced once."""
    seen: dict[tuple[str, str, int, bool], CollectiveCost] = {}

    def price(operation: Operation) -> CollectiveCost:
        kind, group, size = operation.kind, operation.group, operation.payload_bytes
        key = kind, group, size, operation.asynchronous
        if key not in seen:
            seconds = 0.0 if kind == WAIT else group_seconds(plan, kind, group, size)
            seen[key] = CollectiveCost(
                kind=kind,
                group=group,
                payload_bytes=size,
                seconds=seconds,
                asynchronous=operation.asynchronous,
            )
        return seen[key]

    return price


def _stage_cost(
    plan: TrainingPlan,
    stage: int,
    tp_index: int,
    price: Callable[[Operation], CollectiveCost],
    seconds: ProfileSeconds | None,
) -> StageCost:
    overhead = segment_overhead_seconds(plan)

    def segment_cost(segment: SegmentBody) -> SegmentCost:
        compute = [overhead]
        for operation in segment.operations:
            if operation.kind in COLLECTIVES or operation.kind == WAIT:
                compute.append(0.0)
            else:
                compute[-1] += compute_seconds(plan, operation)
        return SegmentCost(compute=compute, collectives=map(price, segment.communication))

    def costs(body: Body) -> tuple[SegmentCost, ...]:
        return tuple(map(segment_cost, body.segments))

    bodies = plan.bodies(stage, tp_index)
    cost = StageCost(
        forward=costs(bodies.forward),
        backward=costs(bodies.backward),
        backward_input=costs(bodies.backward_input),
        backward_weight=costs(bodies.backward_weight),
        update_seconds=update_seconds(plan, stage, tp_index),
    )
    return cost if seconds is None else profiled(cost, bodies, seconds)


def update_seconds(plan: TrainingPlan, stage: int, tp_index: int = 0) -> float:
    """Seconds of gradient norm, clipping and optimizer, and the stage's share of what its rank spends once.

    By the roofline, all of it is bound by memory: gradients are read three times and written twice;
    parameters, main weights and moments are read and written once. Of experts, those that the first
    expert-parallel rank holds.
    """
    where = Coordinate(pp=plan.stage_rank(stage), tp=tp_index)
    num_elements, num_tensors = plan.kept_numel(stage, where, OPTIMIZER), len(plan.stage_held(stage, where))
    reached = plan.cluster.efficiency
    once = reached.step_seconds / len(plan.rank_stages(where.pp)) if reached.step_seconds else 0.0
    return _optimizer_seconds(plan, num_elements, num_tensors) * reached.compute_scale + once


def _optimizer_seconds(plan: TrainingPlan, num_elements: int, num_tensors: int) -> float:
    device, reached = plan.cluster.device, plan.cluster.efficiency
    if reached.measured is not None:
        measured = reached.measured
        return num_elements * measured.update_element_seconds + num_tensors * measured.update_tensor_seconds
    form, moments = plan.format, MOMENTS[plan.workload.optimizer]
    per_element = 5 * form.gradient + 2 * (form.compute + form.main + moments * form.moment)
    if form.gradient < form.main:  # the optimizer reads a copy
        per_element += form.gradient + 2 * form.main
    if form.reduce != form.gradient and plan.topology.world_size > 1:  # copied to travel, and back
        sums = plan.num_microbatches if plan.zero_stage >= GRADIENTS else 1
        per_element += 2 * sums * (form.gradient + form.reduce)
    return (
        num_elements * per_element / (device.memory_bytes_per_second * reached.memory)
        + 2 * num_tensors * reached.kernel_seconds
    )
