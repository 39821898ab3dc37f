"""Where the seconds of a simulated step go, on plans whose causes are known from elsewhere."""

from __future__ import annotations

import pytest
from attrs import evolve

from picotron.planner.body import COLLECTIVES
from picotron.planner.cluster import ClusterSpec
from picotron.planner.columns_of import cases_of_plan
from picotron.planner.cost import compute_seconds, of_kind
from picotron.planner.estimate import estimate_seconds
from picotron.planner.explain import explain, what_if
from picotron.planner.model import ModelSpec
from picotron.planner.plan import TrainingPlan, plan
from picotron.planner.predict import predict
from picotron.planner.program import Kind
from picotron.planner.workload import Workload

LLAMA = ModelSpec.from_hf("llama-3.1-8b")


def made(cluster: str = "h100:1x8", *, batch: int = 16, **options: object) -> TrainingPlan:
    """Llama 8B, 16 sequences a step."""
    work = Workload(global_batch=batch, seq_len=4096)
    return plan(LLAMA, ClusterSpec.parse(cluster), work, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("options", [{"tp": 4, "cp": 2, "dp": 1}, {"cluster": "a100-80gb:1x1", "batch": 2}])
def test_on_accelerators_work_is_told_as_the_time_model_prices_it(
    options: dict[str, object], recompute: str
) -> None:
    """One stage of equal layers: the causes of its bodies are the closed form's own, but for launches."""
    one = made(recompute=recompute, **options)  # type: ignore[arg-type]
    told, estimated = dict(predict(one).seconds_by_cause), estimate_seconds(cases_of_plan(one)).causes
    for cause in ("matmul", "attention", "elementwise", "recompute", "tensor", "context"):
        assert told[cause] == pytest.approx(float(estimated[cause][0]), rel=1e-6), cause


def test_half_of_the_layers_recomputed_is_half_of_the_recomputation() -> None:
    """Per layer, where the columns of a closed form know only a share of one mode."""
    mixed = made(tp=8, recompute=("full",) * 8 + ("selective",) * 16 + ("none",) * 8)
    whole = {
        mode: dict(predict(made(tp=8, recompute=mode)).seconds_by_cause) for mode in ("full", "selective")
    }
    told = dict(predict(mixed).seconds_by_cause)
    wanted = whole["full"]["recompute"] / 4 + whole["selective"]["recompute"] / 2
    assert told["recompute"] == pytest.approx(wanted, rel=1e-6)


def test_the_bubble_is_the_step_less_the_work_of_the_fullest_stage() -> None:
    """Twenty layers on one rank and twelve on the other: the products told are those of twenty."""
    even, uneven = (made(tp=4, pp=2, stage_layers=layers) for layers in ((16, 16), (20, 12)))
    layer = dict(predict(made(tp=4, dp=2)).seconds_by_cause)
    told = dict(predict(uneven).seconds_by_cause)
    assert told["attention"] == pytest.approx(2 * 20 / 32 * layer["attention"], rel=1e-6)
    bubble = {
        one.stage_layers: dict(predict(one).seconds_by_cause)["pipeline_bubble"] for one in (even, uneven)
    }
    assert 0 < bubble[20, 12] < bubble[16, 16]


def test_a_split_backward_keeps_the_causes_of_the_whole() -> None:
    """I and W of a stage share what the time model says of its B."""
    whole, split = (made(tp=4, pp=2, stage_layers=(16, 16), schedule=name) for name in ("1f1b", "zb-h1"))
    before, after = (dict(predict(one).seconds_by_cause) for one in (whole, split))
    for cause in ("matmul", "attention", "elementwise", "tensor"):
        assert after[cause] == pytest.approx(before[cause], rel=0.02), cause


def test_on_a_cpu_every_operation_is_told_by_its_kind() -> None:
    """One rank: two microbatches of F and B, by the price of each operation."""
    cluster = ClusterSpec.preset("cpu", devices_per_node=1)
    work = Workload(global_batch=2, seq_len=16, precision="fp32")
    one = plan(ModelSpec.from_hf("llama-tiny"), cluster, work)
    bodies, told = one.bodies(0), dict(predict(one).seconds_by_cause)
    operations = [
        operation
        for kind in (Kind.FORWARD, Kind.BACKWARD)
        for segment in of_kind(bodies, kind).segments
        for operation in segment.operations
        if operation.kind not in COLLECTIVES
    ]
    launch = cluster.efficiency.kernel_seconds * cluster.efficiency.compute_scale
    for kind, cause in (("matmul", "matmul"), ("attention", "attention"), ("kernel", "elementwise")):
        own = [operation for operation in operations if operation.kind == kind]
        priced = sum(compute_seconds(one, operation) - launch * operation.kernels for operation in own)
        assert told[cause] == pytest.approx(2 * priced)
    assert told["launch"] == pytest.approx(2 * launch * sum(operation.kernels for operation in operations))


def test_another_profile_is_that_of_the_cluster() -> None:
    """Explained under a profile, a plan takes what it is predicted to take on a cluster that has it."""
    one = made(tp=2, dp=4)
    other = evolve(one, cluster=evolve(one.cluster, profile="megatron-2021"))
    assert explain(one, profile="megatron-2021", changes=0).step_seconds == predict(other).step_seconds
    found = what_if(one, profile_after="megatron-2021")
    assert found.before.step_seconds == predict(one).step_seconds
    assert found.after.step_seconds == predict(other).step_seconds
