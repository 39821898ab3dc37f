"""What offloading takes beyond the computing beside it, as the simulated program has it."""

from __future__ import annotations

import numpy as np
import pytest

from picotron.planner.cluster import ClusterSpec
from picotron.planner.columns_of import cases_of_plan
from picotron.planner.estimate import estimate_seconds
from picotron.planner.model import ModelSpec
from picotron.planner.offload_times import layer_bytes, offload_waits
from picotron.planner.plan import TrainingPlan, plan
from picotron.planner.predict import predict
from picotron.planner.stage import offloaded_bytes
from picotron.planner.workload import Workload


def offloading(model: str, every: int = 1, cluster: str = "h100:1x8", **options: object) -> TrainingPlan:
    """A plan that offloads one of ``every`` so many layers."""
    spec = ModelSpec.from_hf(model)
    work = Workload(global_batch=64, seq_len=min(4096, spec.max_positions))
    chosen = tuple(layer % every == 0 for layer in range(spec.num_layers))
    return plan(spec, ClusterSpec.parse(cluster), work, offload=chosen, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "options", "near"),
    [
        ("llama-3.1-8b", {"dp": 8}, 0.01),
        ("llama-3.1-8b", {"dp": 2, "tp": 4}, 0.01),
        ("llama-3.1-8b", {"dp": 2, "tp": 4, "sequence_parallel": False}, 0.01),
        ("llama-3.1-8b", {"dp": 4, "cp": 2}, 0.01),
        ("gpt2", {"dp": 8}, 0.01),
        ("mixtral-8x7b", {"dp": 8, "ep": 8}, 0.01),
        ("qwen3-30b-a3b", {"dp": 8, "ep": 8}, 0.1),  # norms of queries and keys keep theirs too
    ],
)
def test_a_layer_saves_what_the_bodies_say(model: str, options: dict[str, object], near: float) -> None:
    """Bytes of one layer of one microbatch, by tokens and widths alone."""
    made = offloading(model, **options)
    exact = offloaded_bytes(made.bodies(0, 0)) / made.model.num_layers
    assert float(np.ravel(layer_bytes(cases_of_plan(made)))[0]) == pytest.approx(exact, rel=near)


@pytest.mark.parametrize(
    "options",
    [
        {"dp": 8},
        {"dp": 4, "pp": 2, "schedule": "1f1b", "stage_layers": (16, 16)},
        {"dp": 4, "pp": 2, "schedule": "interleaved", "virtual_stages": 4},
        {"dp": 4, "pp": 2, "schedule": "zb-h1", "stage_layers": (16, 16)},
    ],
)
def test_what_does_not_hide_is_what_the_program_waits(options: dict[str, object]) -> None:
    """Each other layer, where a forward is computed faster than copied: out beside F, in beside B or I."""
    made, without = (offloading("llama-3.1-8b", every, "b200:1x8", **options) for every in (2, 100))
    found = estimate_seconds(cases_of_plan(made))
    longer = float(found.step_seconds[0]) / float(estimate_seconds(cases_of_plan(without)).step_seconds[0])
    exact = predict(made).step_seconds / predict(without).step_seconds
    assert exact > 1.02
    assert longer == pytest.approx(exact, rel=0.04)


def test_what_comes_back_hides_under_i_alone_where_backwards_are_split() -> None:
    """Copies of 3 s beside a forward of 2 s, a whole backward of 4 s, or an I of 1.5 s."""
    whole, split = (
        offloading("llama-3.1-8b", dp=4, pp=2, schedule=name, stage_layers=(16, 16))
        for name in ("1f1b", "zb-h1")
    )
    second = (
        float(np.ravel(layer_bytes(cases_of_plan(whole)))[0]) / whole.cluster.device.host_bytes_per_second
    )
    layers, passes = np.asarray(3.0 / second), (np.asarray(2.0), np.asarray(4.0), np.asarray(2.5))
    for made, expected in ((whole, (1.0, 0.0)), (split, (1.0, 1.5))):
        waits = offload_waits(cases_of_plan(made), layers, *passes)
        assert [float(np.ravel(each)[0]) for each in waits] == pytest.approx(expected)
