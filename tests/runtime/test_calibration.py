"""A machine of known costs, whose timings are made up, is found again; no clock is asked."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from attrs import evolve

from picotron.planner.cluster import ClusterSpec
from picotron.planner.cost import compute_seconds, of_kind, update_seconds
from picotron.planner.fit_costs import ProductTiming
from picotron.planner.host_seconds import cpu_seconds_by_rank
from picotron.planner.measured import CallCost, KernelCost, ProductCost
from picotron.planner.program import COMPUTE, Kind
from picotron.runtime import hand_overs
from picotron.runtime.calibrated_calls import SIZES, Calls, Taken, calls_from
from picotron.runtime.calibrated_steps import TRAININGS, InPlace, StepTimings, fit_in_place, training_plan
from picotron.runtime.calibration import apart_from, measured_cluster, with_calls

ROLES = ("output", "input", "weight")
APART = ProductCost(flops_per_second=1e11, half_m=5, half_n=40, half_k=12, fixed_seconds=1e-6)
ATTENTION = ProductCost(flops_per_second=3e10, half_m=50, fixed_seconds=1e-4)
BACKWARD = ProductCost(flops_per_second=1e9, half_m=20, fixed_seconds=2e-4)
KERNEL = KernelCost(cached_bytes_per_second=4e10, memory_bytes_per_second=2e10, cache_bytes=2**19)
COPIES = {4: 1e-6, 2**18: 2e-5, 2**20: 1e-4, 2**22: 5e-4}


def _timings(cost: ProductCost, shapes: list[tuple[int, int, int, int]]) -> list[ProductTiming]:
    flops = [2 * m * n * k * batch for m, n, k, batch in shapes]
    return [ProductTiming(f, s, cost.seconds(f, s)) for f, s in zip(flops, shapes, strict=True)]


def _apart() -> Any:
    """What fits timings of the costs above."""
    grid = [(m, n, k, 1) for m, n, k in product((32, 128, 512), repeat=3)]
    heads = [(size, size, width, 4) for size, width in product((32, 128, 512), (32, 64))]
    kernels = [(2**power, KERNEL.seconds(2**power) + 5e-6) for power in range(12, 25)]
    attention = {"forward": _timings(ATTENTION, heads), "backward": _timings(BACKWARD, heads)}
    return apart_from(dict.fromkeys(ROLES, _timings(APART, grid)), attention, kernels)


def _machine(in_place: InPlace) -> ClusterSpec:
    """The cluster of what was measured apart, and of what it is in place."""
    return measured_cluster("fp32", 4, _apart(), in_place, COPIES)


TRUTH = InPlace(
    product_scale=1.2,
    operand_seconds=3e-11,
    attention_scale=0.9,
    kernel_scale=1.7,
    kernel_seconds=6e-6,
    segment_seconds=2e-5,
    update_element_seconds=4e-9,
    update_tensor_seconds=2e-5,
    step_seconds=5e-4,
)


def test_steps_of_a_machine_tell_its_costs_in_place() -> None:
    """Rows and steps that take what a machine's prices say: the same prices are fitted, within 5 percent."""
    machine = _machine(TRUTH)
    timings = []
    for training in TRAININGS:
        made = training_plan(training, "fp32", machine)
        by_kind = {
            kind: sum(
                2e-5 + sum(compute_seconds(made, operation) for operation in segment.operations)
                for segment in of_kind(made.bodies(0), kind).segments
            )
            for kind in (Kind.FORWARD, Kind.BACKWARD)
        }
        timings.append(StepTimings(made, by_kind, update_seconds(made, 0)))
    found = _machine(fit_in_place(timings, _apart().costs))
    for training in (*TRAININGS, evolve(TRAININGS[-1], hidden=384, heads=6, seq_len=96, micro_batch=3)):
        true, fitted = (
            cpu_seconds_by_rank(training_plan(training, "fp32", cluster)) for cluster in (machine, found)
        )
        assert fitted == pytest.approx(true, rel=0.05)


def test_a_machine_has_what_was_measured() -> None:
    """Scaled rates, the best copy as its link, an equal share of the memory; kinds of rows are all priced."""
    machine = _machine(TRUTH)
    measured = machine.efficiency.measured
    assert measured is not None
    flops, shape = 2 * 100 * 200 * 300, (100, 200, 300, 1)
    operands = 4 * (100 * 300 + 300 * 200 + 100 * 200)
    expected = 1.2 * evolve(APART, fixed_seconds=0).seconds(flops, shape) + 3e-11 * operands
    assert [getattr(measured, role).seconds(flops, shape) for role in ROLES] == pytest.approx([expected] * 3)
    assert measured.kernel.seconds(2**24) == pytest.approx(1.7 * KERNEL.seconds(2**24))
    assert measured.attention.seconds(flops, shape) == pytest.approx(0.9 * ATTENTION.seconds(flops, shape))
    assert (machine.intra_node.bytes_per_second, machine.intra_node.latency_seconds) == (2**18 / 2e-5, 1e-6)
    assert 0 < machine.efficiency.matmul <= 1
    assert all(of_kind(training_plan(TRAININGS[0], "fp32", machine).bodies(0), kind) for kind in COMPUTE)


def _taken(call: float, byte: float, wall: float) -> Taken:
    kinds = ("all_reduce", "all_gather", "reduce_scatter", "send")
    return {(kind, size): (call + byte * size, wall + 2e-9 * size) for kind in kinds for size in SIZES}


def test_calls_cost_the_mean_of_the_ranks() -> None:
    """Of a message only its two ends count; the link makes a ring's all-reduce take its wall seconds."""
    ranks = [_taken(1e-4, 1e-9, 3e-4), _taken(3e-4, 3e-9, 2e-4), _taken(8e-4, 2e-9, 1e-4)]
    costs = {cost.kind: cost for cost in calls_from(ranks, 3).costs}
    assert costs["all_reduce"].seconds(10**6) == pytest.approx(4e-4 + 2e-3)
    for kind in ("send", "recv"):
        assert costs[kind].seconds(10**6) == pytest.approx(2e-4 + 2e-3)
    pair = calls_from(ranks[:2], 2, with_link=True)
    assert (pair.latency_seconds, pair.bytes_per_second) == (pytest.approx(1.5e-4), pytest.approx(1 / 2e-9))
    cluster = with_calls(_machine(TRUTH), pair)
    assert cluster.intra_node.name == cluster.inter_node.name == "gloo on loopback"
    assert (cluster.intra_node.latency_seconds, cluster.efficiency.link) == (pytest.approx(1.5e-4), 1)


def test_hand_overs_make_up_the_difference() -> None:
    """Calls of several ranks cost so much more that the difference to one rank is as observed, or nothing."""
    kinds = ("send", "recv", "all_reduce", "all_gather", "reduce_scatter")
    calls = Calls(costs=tuple(CallCost(kind=kind, call_seconds=1e-4) for kind in kinds))
    cluster = with_calls(_machine(TRUTH), calls)

    def difference(priced: ClusterSpec, layout: dict[str, int]) -> float:
        one, many = (
            sum(cpu_seconds_by_rank(training_plan(hand_overs.TRAINING, "fp32", priced, **own)))
            for own in ({}, layout)
        )
        return many - one

    one = training_plan(hand_overs.TRAINING, "fp32", cluster)
    for name, layout in hand_overs.LAYOUTS.items():
        many = training_plan(hand_overs.TRAINING, "fp32", cluster, **layout)
        more = difference(cluster, layout) + 0.05
        assert hand_overs.costlier_calls(cluster, name, one, many, more - 0.1) == cluster
        found = hand_overs.costlier_calls(cluster, name, one, many, more)
        assert difference(found, layout) == pytest.approx(more, rel=0.1)
