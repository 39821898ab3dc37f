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


def test_experts_are_summed_each_microbatch_under_zero_2() -> None:
    """Four microbatches: three sums more than under ZeRO-1, in columns as in the program."""
    model, work = ModelSpec.from_hf("mixtral-8x7b"), Workload(global_batch=128, seq_len=4096)
    one, two = (
        plan(model, ClusterSpec.parse("h100:4x8"), work, dp=32, ep=4, zero_stage=stage) for stage in (1, 2)
    )
    estimated = float(np.ravel(estimate_seconds(cases_of_plan(two)).step_seconds)[0])
    assert predict(two).step_seconds == pytest.approx(estimated, rel=0.01)
    assert predict(two).step_seconds > 1.03 * predict(one).step_seconds


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


def test_gathers_that_queue_are_counted_once() -> None:
    """Small microbatches over 128 devices: the program itself waits for its gathers longer than estimated."""
    work = Workload(global_batch=1024, seq_len=512)
    made = plan(LLAMA, ClusterSpec.parse("h100:16x8"), work, dp=128, zero_stage=3)
    told = dict(predict(made).seconds_by_cause)
    once = float(default_constants()["step_seconds"])
    assert predict(made).step_seconds == pytest.approx(simulate_step(made).step_seconds + once)
    assert told["schedule"] < 0.01 * told["data"]


def test_launches_lengthen_the_computing_that_they_are_of() -> None:
    """Small kernels under tensor parallelism: what the host launches counts whole beside the transfers."""
    work = Workload(global_batch=64, seq_len=512)
    made = plan(LLAMA, ClusterSpec.parse("h100:1x8"), work, tp=8)
    causes = estimate_seconds(cases_of_plan(made)).causes
    told = dict(predict(made).seconds_by_cause)
    assert told["launch"] == pytest.approx(float(np.ravel(causes["launch"])[0]), rel=0.05)


def test_experts_of_another_order_of_axes_cross_the_network() -> None:
    """Eight expert ranks a stage lie in one node where pp is outermost, and in four where dp is."""
    model, work = ModelSpec.from_hf("mixtral-8x7b"), Workload(global_batch=64, seq_len=4096)
    inner, outer = (
        plan(model, ClusterSpec.parse("h100:4x8"), work, pp=4, dp=8, ep=8, order=order)
        for order in (("pp", "dp", "cp", "tp"), ("dp", "pp", "cp", "tp"))
    )
    near, far = (
        float(np.ravel(estimate_seconds(cases_of_plan(one)).causes["expert"])[0]) for one in (inner, outer)
    )
    assert far > 3 * near
    assert predict(outer).step_seconds == pytest.approx(
        float(np.ravel(estimate_seconds(cases_of_plan(outer)).step_seconds)[0]), rel=0.05
    )
