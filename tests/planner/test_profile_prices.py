"""On accelerators a stage takes what the time model says of its layers, under the cluster's profile."""

from __future__ import annotations

import pytest
from attrs import evolve

from picotron.planner.cluster import ClusterSpec
from picotron.planner.columns_of import cases_of_plan
from picotron.planner.cost import stage_costs
from picotron.planner.estimate import estimate_seconds
from picotron.planner.model import ModelSpec
from picotron.planner.plan import TrainingPlan, plan
from picotron.planner.predict import predict
from picotron.planner.profile_prices import profile_seconds
from picotron.planner.workload import Workload

LLAMA = ModelSpec.from_hf("llama-3.1-8b")


def made(cluster: str = "h100:1x8", **options: object) -> TrainingPlan:
    """Llama 8B, 16 sequences a step."""
    work = Workload(global_batch=16, seq_len=4096)
    return plan(LLAMA, ClusterSpec.parse(cluster), work, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_the_stage_takes_what_its_layers_take(recompute: str) -> None:
    """32 layers and both ends, forward and backward: nothing is lost or counted twice in scaling."""
    one = made(tp=4, dp=2, recompute=recompute)
    seconds = profile_seconds(one)
    assert seconds is not None
    (stage,) = stage_costs(one)
    ends = [seconds.forward[kind] for kind in ("embedding", "head")]
    layer = seconds.forward["mlp"]
    forward = 32 * (layer.compute + layer.communication) + sum(e.compute + e.communication for e in ends)
    assert stage.forward_seconds == pytest.approx(forward)
    ends = [seconds.backward[kind, "none"] for kind in ("embedding", "head")]
    layer = seconds.backward["mlp", recompute]
    backward = 32 * (layer.compute + layer.communication) + sum(e.compute + e.communication for e in ends)
    assert stage.backward_seconds == pytest.approx(backward)


def test_input_and_weight_gradients_take_what_the_whole_backward_takes() -> None:
    """I and W of a stage together, but for kernels that either begins with."""
    (stage,) = stage_costs(made(tp=4, dp=2))
    both = stage.backward_input_seconds + stage.backward_weight_seconds
    assert both == pytest.approx(stage.backward_seconds, rel=0.02)


def test_full_recompute_costs_about_a_forward() -> None:
    """Of the layers: less what the ends take."""
    (without,), (full,) = stage_costs(made(tp=2, dp=4)), stage_costs(made(tp=2, dp=4, recompute="full"))
    again = full.backward_seconds - without.backward_seconds
    assert 0.85 < again / without.forward_seconds < 1.0


@pytest.mark.parametrize(
    "options",
    [
        {"tp": 2, "dp": 4},
        {"tp": 2, "dp": 2, "pp": 2, "schedule": "interleaved", "virtual_stages": 2, "stage_layers": (8,) * 4},
        {"tp": 1, "dp": 8, "zero_stage": 1},
        {"tp": 1, "dp": 2, "pp": 4, "schedule": "zb-h1", "stage_layers": (8,) * 4},
        {"tp": 1, "dp": 4, "pp": 2, "schedule": "zb-v", "stage_layers": (8,) * 4},  # one rank has both ends
    ],
)
@pytest.mark.parametrize("profile", ["picotron", "megatron-2025"])
def test_simulated_and_estimated_steps_agree(options: dict[str, object], profile: str) -> None:
    """Within 5 % where layers are cut evenly: the closed form knows no single bucket."""
    one = made(**options)
    one = evolve(one, cluster=evolve(one.cluster, profile=profile))
    estimated = float(estimate_seconds(cases_of_plan(one)).step_seconds[0])
    assert predict(one).step_seconds == pytest.approx(estimated, rel=0.05)


def test_a_newer_profile_is_quicker_and_a_cpu_has_none() -> None:
    """A processor whose operations are priced one by one keeps their seconds, whatever the profile."""
    one = made(tp=2, dp=4)
    old, new = (evolve(one, cluster=evolve(one.cluster, profile=f"megatron-{year}")) for year in (2021, 2025))
    assert predict(new).step_seconds < predict(old).step_seconds
    work = Workload(global_batch=4, seq_len=16, precision="fp32")
    slow = plan(ModelSpec.from_hf("llama-tiny"), ClusterSpec.preset("cpu", devices_per_node=2), work, dp=2)
    assert profile_seconds(slow) is None
    other = evolve(slow, cluster=evolve(slow.cluster, profile="megatron-2025"))
    assert predict(other).step_seconds == predict(slow).step_seconds
