"""torchtitan's configuration: what a plan becomes, as TOML that its release reads."""

from __future__ import annotations

import tomllib

import pytest

from picotron.errors import PlanError
from picotron.planner.cluster import ClusterSpec
from picotron.planner.model import ModelSpec
from picotron.planner.pipeline import schedule_from_csv
from picotron.planner.plan import TrainingPlan, plan
from picotron.planner.torchtitan import FLAVORS, to_torchtitan
from picotron.planner.workload import Workload

ALWAYS = ("weight decay", "buckets of")  # what its FSDP and optimizer do otherwise in every plan


def made(name: str = "llama-3.1-70b", cluster: str = "h100:16x8", **options: object) -> TrainingPlan:
    """A plan of a well-known model."""
    work = options.pop("work", Workload(global_batch=512, seq_len=8192))
    return plan(ModelSpec.from_hf(name), ClusterSpec.parse(cluster), work, **options)


def said(one: TrainingPlan) -> list[str]:
    """The sentences that are not said of every plan."""
    return [text for text in to_torchtitan(one).unexpressed if not text.startswith(ALWAYS)]


def test_a_dense_plan_is_told_whole():
    """Degrees, batch, stages and recomputation, in sections that TOML reads back."""
    one = made(tp=8, pp=2, zero_stage=3, shard=4, micro_batch=2, recompute="full", schedule="zb-v")
    exported = to_torchtitan(one)
    read = tomllib.loads(str(exported))
    assert read == exported.sections
    assert read["model"] == {"name": "llama3", "flavor": "70B"}
    assert read["training"]["local_batch_size"] == 64  # of a data-parallel rank, in 32 microbatches
    assert read["activation_checkpoint"] == {"mode": "full"}
    degrees = read["parallelism"]
    expected = {
        "data_parallel_replicate_degree": 2,
        "data_parallel_shard_degree": 4,
        "fsdp_reshard_after_forward": "always",
        "tensor_parallel_degree": 8,
        "pipeline_parallel_degree": 2,
        "pipeline_parallel_schedule": "ZBVZeroBubble",
        "pipeline_parallel_microbatch_size": 2,
    }
    assert expected.items() <= degrees.items()
    stages = degrees["module_fqns_per_model_part"]
    assert [sum(name.startswith("layers.") for name in own) for own in stages] == list(one.stage_layers)
    assert (stages[0][0], stages[-1][-2:]) == ("tok_embeddings", ["norm", "output"])
    assert said(one) == []


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tp": 8}, "copies beside other kinds of parallelism (zero_stage=0)"),
        ({"zero_stage": 1}, "optimizer states sharded alone (zero_stage=1)"),
        ({"zero_stage": 3, "tp": 8, "sequence_parallel": False}, "without sequence parallelism"),
        ({"zero_stage": 3, "recompute": ("full", "none") * 40}, "one layer in 2, in full"),
        ({"zero_stage": 3, "tp": 2, "pp": 2, "order": ("dp", "pp", "cp", "tp")}, "ranks in the order dp,pp"),
        ({"zero_stage": 2, "cp": 2}, "round a ring"),
        ({"zero_stage": 2, "offload": True}, "activations of 80 layers in host memory"),
        ({"zero_stage": 2, "recompute": "selective"}, "recomputation of the attention core alone"),
    ],
)
def test_what_cannot_be_said_is_said(options: dict[str, object], sentence: str):
    """A sentence for it, and for nothing else."""
    (only,) = said(made(**options))
    assert sentence in only


def test_context_parallel_ranks_share_a_copy():
    """FSDP shards over dp_shard * cp ranks: 8 of 16 that share are dp_shard 4 under cp 2."""
    told = to_torchtitan(made(tp=8, cp=2, zero_stage=3, shard=8)).sections["parallelism"]
    assert (told["data_parallel_replicate_degree"], told["data_parallel_shard_degree"]) == (2, 4)


def test_a_schedule_that_torch_has_no_name_for_comes_as_csv():
    """The orders that PyTorch reads are those of the plan."""
    one = made(pp=4, tp=8, zero_stage=2, schedule="zb-h1")
    exported = to_torchtitan(one)
    assert exported.sections["parallelism"]["pipeline_parallel_schedule_csv"] == "schedule.csv"
    assert exported.schedule_csv is not None
    assert schedule_from_csv(exported.schedule_csv).orders == one.schedule.orders
    assert to_torchtitan(made(pp=4, tp=8)).schedule_csv is None


def test_flavours_have_the_sizes_of_the_models_of_their_names():
    """A model's own sizes find its flavour; other sizes are told in a sentence."""
    for name, flavor in (
        ("llama-3.1-8b", ("llama3", "8B")),
        ("llama-3.1-405b", ("llama3", "405B")),
        ("deepseek-v3", ("deepseek_v3", "671B")),
        ("qwen3-30b-a3b", ("qwen3", "30B-A3B")),
    ):
        one = made(name, zero_stage=3, work=Workload(global_batch=128, seq_len=4096))
        section = to_torchtitan(one).sections["model"]
        assert (section["name"], section["flavor"]) == flavor
        assert flavor in FLAVORS
        assert said(one) == []
    (other,) = said(made("llama-tiny", "h100:1x8", zero_stage=3, work=Workload(global_batch=8, seq_len=64)))
    assert "a flavour of that name must be added" in other


def test_what_is_no_plan_is_refused():
    """As is a profile of no name."""
    with pytest.raises(PlanError, match="plan must be a TrainingPlan, got str"):
        to_torchtitan("plan.json")
    with pytest.raises(PlanError, match="a software profile must be one of"):
        to_torchtitan(made(), profile="none")
