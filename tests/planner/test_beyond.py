"""Predictions count what no row of a program has, and then say what a search's estimate says."""

from __future__ import annotations

import numpy as np
import pytest

from picotron.planner.beyond import beyond_program
from picotron.planner.cluster import ClusterSpec
from picotron.planner.columns_of import cases_of_plan
from picotron.planner.constants import default_constants
from picotron.planner.estimate import estimate_seconds
from picotron.planner.model import ModelSpec
from picotron.planner.plan import plan
from picotron.planner.predict import predict
from picotron.planner.search import search
from picotron.planner.simulate import simulate_step
from picotron.planner.workload import Workload

LLAMA = ModelSpec.from_hf("llama-3.1-8b")
WORK = Workload(global_batch=64, seq_len=4096)


def test_what_is_hidden_slows_what_hides_it() -> None:
    """ZeRO-3 over 64 devices: the program hides most gathers for nothing, the prediction does not."""
    made = plan(LLAMA, ClusterSpec.parse("h100:8x8"), WORK, dp=64, zero_stage=3)
    predicted, simulated = predict(made), simulate_step(made).step_seconds
    told = dict(predicted.seconds_by_cause)
    estimated = float(np.ravel(estimate_seconds(cases_of_plan(made)).causes["data"])[0])
    assert told["data"] == pytest.approx(estimated)
    assert predicted.step_seconds > simulated + 0.5 * estimated


def test_more_than_the_estimate_is_never_taken_back() -> None:
    """Where the program itself waits longer than the estimate says, only the host's work is added."""
    made = plan(LLAMA, ClusterSpec.parse("h100:8x8"), WORK, dp=64, zero_stage=3)
    assert beyond_program(made, {"data": 1e9}) == {
        "data": 0.0,
        "optimizer": float(default_constants()["step_seconds"]),
    }


def test_a_cpu_has_nothing_beyond_its_program() -> None:
    """Its operations are priced one by one, and the prediction is the simulated step."""
    made = plan(
        ModelSpec.from_hf("llama-tiny"),
        ClusterSpec.parse("cpu:1x4"),
        Workload(global_batch=8, seq_len=64),
        dp=4,
    )
    assert beyond_program(made, {}) == {}
    assert predict(made).step_seconds == simulate_step(made).step_seconds


@pytest.mark.parametrize(
    ("model", "cluster", "profile"),
    [("llama-3.1-8b", "h100:2x8", "megatron-2025"), ("mixtral-8x7b", "a100-80gb:4x8", "picotron")],
)
def test_a_search_says_what_the_exact_prediction_says(model: str, cluster: str, profile: str) -> None:
    """The best plans of a search, estimated in columns and simulated row by row: within a thirtieth."""
    found = search(
        ModelSpec.from_hf(model),
        ClusterSpec.parse(cluster),
        Workload(global_batch=128, seq_len=4096),
        profile=profile,
    )
    exact = [predict(made).step_seconds for made in found[:3]]
    assert found.fastest.seconds[:3] == pytest.approx(exact, rel=1 / 30)
