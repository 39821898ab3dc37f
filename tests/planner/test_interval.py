"""How far a prediction may be off, and where nobody knows."""

from __future__ import annotations

import math

import pytest
from attrs import evolve

from picotron.errors import PlanError
from picotron.planner.cluster import ClusterSpec
from picotron.planner.draw import draw_prediction
from picotron.planner.explain import explain
from picotron.planner.interval import Interval, interval_data, known_interval
from picotron.planner.model import ModelSpec
from picotron.planner.plan import plan
from picotron.planner.predict import predict
from picotron.planner.workload import Workload
from tests.planner.test_measured import costs


def test_half_of_the_runs_are_within_a_factor():
    """An error is a factor's logarithm: the range is as wide above as below, and never below zero."""
    interval = Interval(half=math.log(2), most=math.log(4))
    assert interval.half_range(8.0) == pytest.approx((4.0, 16.0))
    assert interval.most_range(8.0) == pytest.approx((2.0, 32.0))
    assert Interval(half=0.1).most_range(8.0) is None
    with pytest.raises(PlanError, match="half must be a number"):
        Interval(half=-0.1)


def test_an_accelerator_has_the_error_of_its_own_generation():
    """Mixtures their own; a generation without published runs that of the others, which is said."""
    dense, sparse = (known_interval(ClusterSpec.preset("h100"), experts=experts) for experts in (False, True))
    assert dense and sparse and dense.most
    assert 0 < dense.half < dense.most < sparse.half
    assert "dense runs on hopper GPUs" in dense.source
    assert "runs with experts on hopper GPUs" in sparse.source
    other = known_interval(ClusterSpec.preset("mi300x"))
    assert other and "dense runs on GPUs other than cdna3" in other.source


def test_no_gpus_error_is_lent_to_a_cpu():
    """Unknown where nothing was measured, of CPU seconds where it was, and that is written everywhere."""
    cluster = ClusterSpec.preset("cpu", devices_per_node=1)
    assert known_interval(cluster) is None
    measured = evolve(cluster, efficiency=evolve(cluster.efficiency, measured=costs()))
    found = known_interval(measured)
    assert found and "CPU seconds of 17 layouts" in found.source
    gpus = ClusterSpec.preset("h100")
    assert known_interval(evolve(gpus, efficiency=evolve(gpus.efficiency, measured=costs()))) is None
    one = plan(
        ModelSpec.from_hf("llama-tiny"), cluster, Workload(global_batch=1, seq_len=16, precision="fp32")
    )
    predicted = predict(one)
    assert predicted.interval is predicted.step_seconds_range is predicted.wide_step_seconds_range is None
    assert "unknown" in draw_prediction(predicted)
    assert "unknown" in str(explain(one, changes=0))
    data = interval_data(None, predicted.step_seconds)
    assert {value for name, value in data.items() if not name.endswith("_of")} == {None}


def test_a_prediction_carries_its_interval():
    """In its repr, its text, its range and its explanation: one error, with its quantile and source."""
    one = plan(
        ModelSpec.from_hf("llama-3.1-8b"), ClusterSpec.preset("h100"), Workload(global_batch=8, seq_len=4096)
    )
    predicted = predict(one)
    assert predicted.interval == known_interval(one.cluster)
    assert predicted.interval and predicted.step_seconds_range
    low, high = predicted.step_seconds_range
    assert low < predicted.step_seconds < high
    assert low * high == pytest.approx(predicted.step_seconds**2)
    assert "interval=Interval(half=" in repr(predicted)
    text = " ".join(str(predicted).split())
    assert "half of known runs within" in text and "80 % within" in text and "held-out" in text
    told = explain(one, changes=0)
    assert told.interval == predicted.interval
    assert told.data["step_seconds_low"] == low
    assert explain(one, changes=0, interval=0.5).interval == Interval(half=0.5, source="given by the caller")
