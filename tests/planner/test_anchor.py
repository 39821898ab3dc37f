"""What was observed or measured of a machine counts in a search of plans for it."""

from __future__ import annotations

import numpy as np
import pytest
from attrs import evolve

from picotron.planner.cluster import ClusterSpec
from picotron.planner.columns_of import cases_of_plan
from picotron.planner.estimate import TimeEstimate, estimate_seconds
from picotron.planner.measured import KernelCost, MeasuredCosts, ProductCost
from picotron.planner.model import ModelSpec
from picotron.planner.plan import plan
from picotron.planner.predict import predict
from picotron.planner.search import search
from picotron.planner.workload import Workload

SMALL = ModelSpec.from_hf("llama-tiny")
WORK = Workload(global_batch=16, seq_len=256, precision="fp32")


def estimated(cluster: ClusterSpec) -> TimeEstimate:
    """Llama 8B by dp 2, tp 4."""
    model, work = ModelSpec.from_hf("llama-3.1-8b"), Workload(global_batch=16, seq_len=4096)
    return estimate_seconds(cases_of_plan(plan(model, cluster, work, dp=2, tp=4)))


@pytest.mark.parametrize(
    ("scale", "longer", "as_before"),
    [
        ({"compute_scale": 2.0}, ("matmul", "attention", "elementwise"), ("tensor",)),
        ({"communication_scale": 2.0}, ("tensor",), ("matmul", "attention", "elementwise", "launch")),
    ],
)
def test_a_fitted_scale_multiplies_its_causes(
    scale: dict[str, float], longer: tuple[str, ...], as_before: tuple[str, ...]
) -> None:
    """Twice as slow at computing is twice the seconds of every product; transfers take what they took."""
    cluster = ClusterSpec.parse("h100:1x8")
    before = estimated(cluster).causes
    after = estimated(evolve(cluster, efficiency=evolve(cluster.efficiency, **scale))).causes
    for cause in longer:
        assert after[cause][0] == pytest.approx(2 * before[cause][0]), cause
    for cause in as_before:
        assert after[cause][0] == pytest.approx(before[cause][0]), cause


def test_seconds_once_a_step_count_once() -> None:
    """A quarter of a second that every step takes is a quarter more, for any layout."""
    cluster = ClusterSpec.parse("h100:1x8")
    slower = evolve(cluster, efficiency=evolve(cluster.efficiency, step_seconds=0.25))
    more = estimated(slower).step_seconds - estimated(cluster).step_seconds
    assert more[0] == pytest.approx(0.25)


def test_a_search_on_a_measured_machine_speaks_its_seconds() -> None:
    """Whether fast or slow: the best plans' estimates are near their exact prices."""
    for rate in (1.0, 9.0):
        product = ProductCost(flops_per_second=rate * 1e10)
        costs = MeasuredCosts(
            precision="fp32",
            **dict.fromkeys(("output", "input", "weight", "attention", "attention_backward"), product),
            kernel=KernelCost(
                cached_bytes_per_second=rate * 1e10, memory_bytes_per_second=rate * 5e9, cache_bytes=2**20
            ),
        )
        machine = ClusterSpec.parse("cpu:1x4")
        machine = evolve(machine, efficiency=evolve(machine.efficiency, measured=costs))
        found = search(SMALL, machine, WORK, keep=3, schedule="1f1b", zero_stage=0)
        priced = np.array([predict(one).step_seconds for one in found])
        assert found.fastest.seconds == pytest.approx(priced, rel=0.25)
