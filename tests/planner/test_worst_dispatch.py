"""What experts may hold beyond the balanced case."""

from __future__ import annotations

import pytest

from picotron.planner.cluster import ClusterSpec
from picotron.planner.explain import explain
from picotron.planner.model import ModelSpec
from picotron.planner.plan import TrainingPlan, plan
from picotron.planner.workload import Workload
from picotron.planner.worst_dispatch import worst_dispatch_bytes, worst_imbalance


def sparse(ep: int) -> TrainingPlan:
    """Mixtral: 8 experts, 2 of them for each token."""
    work = Workload(global_batch=64, seq_len=4096)
    model = ModelSpec.from_hf("mixtral-8x7b")
    cluster = ClusterSpec.parse("h100:2x8")
    return plan(model, cluster, work, dp=16, ep=ep, zero_stage=1)


@pytest.mark.parametrize(("ep", "times"), [(1, 1.0), (2, 2.0), (4, 4.0), (8, 4.0)])
def test_a_token_goes_to_different_experts(ep: int, times: float) -> None:
    """With one expert a rank it comes once of twice, so that 8 ranks' tokens are four times the mean."""
    assert worst_imbalance(sparse(ep)) == times


def test_the_worst_case_is_said_beside_the_balanced_one() -> None:
    """At least the inputs of three times as many rows in all 32 layers; nothing where no token travels."""
    rows = 4096 * 2
    assert worst_dispatch_bytes(sparse(8)) > 3 * rows * 4096 * 2 * 32
    told = explain(sparse(8), changes=0)
    assert told.data["worst_dispatch_bytes"] == told.worst_dispatch_bytes == worst_dispatch_bytes(sparse(8))
    assert "with every token for one rank's" in str(told)
    assert worst_dispatch_bytes(sparse(1)) == 0
    assert "every token" not in str(explain(sparse(1), changes=0))
