"""Theorems about where seconds and bytes go: parts sum to the whole that is predicted, whatever the plan."""

from __future__ import annotations

import math

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from picotron.planner.cluster import ClusterSpec
from picotron.planner.explain import explain
from picotron.planner.memory import memory_timeline, static_bytes
from picotron.planner.plan import TrainingPlan
from picotron.planner.predict import predict
from picotron.planner.reserved import beside_tensors
from picotron.planner.simulate import simulate_step
from picotron.planner.topology import coordinate
from property_tests.strategies import DENSE, SPARSE, saving_plans

EVERY = DENSE + SPARSE
COMPUTED = ("matmul", "attention", "elementwise", "launch", "recompute", "optimizer")
ACCELERATORS = ("v100", "a100-40gb", "h100", "mi300x")


@st.composite
def accelerated(draw: st.DrawFn) -> TrainingPlan:
    """A drawn plan on as many accelerators, under any of a few profiles."""
    made = draw(saving_plans(families=EVERY).filter(lambda one: one.workload.precision != "fp64"))
    work = evolve(made.workload, precision="fp16") if made.workload.precision == "bf16" else made.workload
    cluster = made.cluster
    machine = ClusterSpec.preset(
        draw(st.sampled_from(ACCELERATORS)), nodes=cluster.nodes, devices_per_node=cluster.devices_per_node
    )
    profile = draw(st.sampled_from(["picotron", "megatron-2021", "megatron-2025"]))
    return evolve(made, cluster=evolve(machine, profile=profile), workload=work)


@given(saving_plans(families=EVERY) | accelerated())
def test_seconds_and_bytes_sum_to_what_is_predicted(made: TrainingPlan) -> None:
    """Nothing is negative or hidden: the causes are the step to the last bit, the classes every byte."""
    told, predicted = explain(made, changes=0), predict(made)
    assert sum(value for _, value in told.seconds) == told.step_seconds == predicted.step_seconds
    assert min(value for _, value in told.seconds) >= -1e-12 * told.step_seconds
    assert sum(size for _, size in told.bytes) == told.peak_bytes == max(predicted.reserved_by_rank)
    assert told.margin_bytes == predicted.margin_bytes


@given(saving_plans(families=EVERY))
def test_operations_priced_one_by_one_are_told_one_by_one(made: TrainingPlan) -> None:
    """On a processor without a profile what is told of computing is what some rank computes."""
    step, causes = simulate_step(made), dict(predict(made).seconds_by_cause)
    computed = sum(causes[name] for name in COMPUTED)
    assert any(own == pytest.approx(computed, rel=1e-9) for own in step.compute_seconds)
    assert (causes["recompute"] > 0) <= (set(made.recompute) != {"none"})
    assert (causes["tensor"] > 0) <= (made.topology.tp > 1)
    assert (causes["pipeline_bubble"] > 0) <= (made.topology.pp > 1)


@given(accelerated(), st.integers(-2, 2))
def test_what_fits_holds_framework_and_fragmentation_too(made: TrainingPlan, over: int) -> None:
    """Of every rank tensors, framework and fragmentation are within the device, to the byte."""
    beside, whole = beside_tensors(made), []
    for rank in range(made.topology.world_size):
        timeline = memory_timeline(made, rank)
        static = static_bytes(made, coordinate(made.topology, rank))
        moving = timeline.max_bytes - sum(static[name] for name in ("parameters", "gradients", "optimizer"))
        wasted = math.ceil(beside.fragmentation_share * moving)
        whole.append(timeline.max_bytes + beside.framework_bytes + wasted)
    assert beside.framework_bytes > 0 < beside.fragmentation_share
    device = evolve(made.cluster.device, memory_bytes=max(whole) - over)
    predicted = predict(evolve(made, cluster=evolve(made.cluster, device=device)))
    assert predicted.margin_bytes == -over
    assert predicted.fits == (over <= 0) == (not predicted.misfits)
    assert predicted.reserved_bytes == predicted.reserved_by_rank[predicted.peak_memory_rank] == max(whole)
