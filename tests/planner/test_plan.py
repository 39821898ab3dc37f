"""What a plan chooses, and every request that it refuses: the rule, the value and any remedy."""

from __future__ import annotations

import re
from typing import Any

import attrs
import pytest

from picotron.errors import PlanError
from picotron.planner.catalogue import SCHEDULES, make_schedule
from picotron.planner.cluster import ClusterSpec
from picotron.planner.model import ModelSpec
from picotron.planner.pipeline import Schedule, schedule_from_csv
from picotron.planner.plan import TrainingPlan, plan
from picotron.planner.schedules import one_f_one_b
from picotron.planner.topology import Coordinate
from picotron.planner.workload import Workload

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 10,
    "hidden_size": 12,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 2,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
MIXTRAL = LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 10,
    "n_embd": 12,
    "n_layer": 4,
    "n_head": 6,
    "n_positions": 16,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
}


def _plan(
    devices: int = 1,
    *,
    config: dict[str, Any] = LLAMA,
    batch: int = 8,
    seq_len: int = 8,
    **asked: Any,
) -> TrainingPlan:
    return plan(
        ModelSpec.from_hf(config),
        ClusterSpec.preset("cpu", devices_per_node=devices),
        Workload(global_batch=batch, seq_len=seq_len),
        **asked,
    )


def _refusal(*args: Any, **asked: Any) -> str:
    with pytest.raises(PlanError) as caught:
        _plan(*args, **asked)
    return str(caught.value)


def test_what_is_left_out_is_chosen_by_a_stated_rule() -> None:
    """dp takes the devices left, sequence parallelism is on where it can be, layers are balanced."""
    made = _plan(8, pp=2, tp=2)
    assert (made.topology.dp, made.sequence_parallel, made.stage_layers) == (2, True, (2, 2))
    assert made.chosen == (
        "dp=2: the devices that pp * cp * tp leave",
        "sequence_parallel=True: on when tp > 1 and tp divides the tokens",
        "stage_layers=2,2: least FLOPs on the dearest rank",
    )
    assert made.num_microbatches == 4


def test_what_is_asked_for_is_not_chosen() -> None:
    """Nothing is said about what the caller gave."""
    made = _plan(4, dp=1, pp=2, tp=2, sequence_parallel=False, stage_layers=(1, 3))
    assert (made.chosen, made.stage_layers, made.sequence_parallel) == ((), (1, 3), False)


def test_sequence_parallelism_is_off_where_tokens_cannot_be_cut() -> None:
    """Seven tokens on two ranks."""
    made = _plan(2, tp=2, seq_len=7)
    assert not made.sequence_parallel
    assert any(line.startswith("sequence_parallel=False") for line in made.chosen)


def test_a_dear_head_gets_fewer_layers() -> None:
    """A vocabulary as dear as layers moves a layer to the first stage."""
    assert _plan(2, pp=2, config=LLAMA | {"vocab_size": 240}).stage_layers == (3, 1)


def test_a_schedule_of_ones_own() -> None:
    """A Schedule is kept as its CSV and read back."""
    mine = attrs.evolve(one_f_one_b(2, 8), name="mine")
    made = _plan(2, pp=2, schedule=mine)
    assert (made.schedule, made.schedule_name, made.schedule_csv) == (mine, "mine", str(mine))
    assert _plan(2, pp=2).schedule == one_f_one_b(2, 8)


@pytest.mark.parametrize(
    ("devices", "asked", "message"),
    [
        (
            8,
            {"dp": 3, "tp": 2},
            "pp * dp * cp * tp must equal the cluster's 8 devices, got pp=1 dp=3 cp=1 tp=2 = 6; try dp=4",
        ),
        (
            8,
            {"pp": 3},
            "pp * dp * cp * tp must equal the cluster's 8 devices, got pp=3 dp=2 cp=1 tp=1 = 6; "
            "pp * cp * tp = 3 does not divide 8",
        ),
        (3, {"dp": 3}, "dp * micro_batch must divide global_batch 8, got 3 * 1 = 3; change one of the three"),
        (
            2,
            {"dp": 2, "micro_batch": 3},
            "dp * micro_batch must divide global_batch 8, got 2 * 3 = 6; change one of the three",
        ),
        (8, {"pp": 8}, "pp must be at most the model's 4 layers, got pp=8; lower pp"),
        (5, {"pp": 5}, "pp must be at most the model's 4 layers, got pp=5; lower pp"),
        (4, {"tp": 4}, "tp must divide the 6 query heads, got tp=4; try 1, 2, 3, 6"),
        (
            3,
            {"tp": 3},
            "tp must divide the 2 key/value heads or be a multiple of them, got tp=3; try 1, 2, 6",
        ),
        (
            2,
            {"tp": 2, "config": LLAMA | {"intermediate_size": 23}},
            "tp must divide intermediate_size 23, got tp=2",
        ),
        (2, {"ep": 2}, "ep needs a model with experts, got ep=2 for llama"),
        (
            8,
            {"ep": 8, "config": MIXTRAL},
            "ep must be at most the 4 experts, got ep=8",
        ),
        (
            2,
            {"ep": 4, "config": MIXTRAL},
            "ep * etp must divide dp * cp * tp = 2, got ep=4, etp=1; "
            "expert parallelism cuts the same ranks again",
        ),
        (
            5,
            {"dp": 5, "batch": 5, "etp": 5, "config": MIXTRAL},
            "etp must divide the experts' size 24, got etp=5",
        ),
        (
            2,
            {"pp": 2, "schedule": "dualpipe"},
            "dualpipe keeps two copies of the parameters, which cannot be run yet; dualpipe-v needs one",
        ),
        (
            2,
            {"pp": 2, "schedule": make_schedule("dualpipe", 2, 8)},
            "dualpipe keeps two copies of the parameters, which cannot be run yet; dualpipe-v needs one",
        ),
        (
            2,
            {"pp": 2, "schedule": "interleaved", "virtual_stages": 3},
            "pp * virtual_stages must be at most the model's 4 layers, got 2 * 3; "
            "lower one of the two or take a schedule with fewer stages a rank",
        ),
        (
            3,
            {"pp": 3, "schedule": "zb-v"},
            "pp * virtual_stages must be at most the model's 4 layers, got 3 * 2; "
            "lower one of the two or take a schedule with fewer stages a rank",
        ),
        (
            2,
            {"pp": 2, "schedule": "1f1b", "virtual_stages": 2},
            "virtual_stages of 1f1b must be 1, got 2; interleaved, bfs, interleaved-zb take any",
        ),
        (1, {"virtual_stages": 0}, "virtual_stages must be a whole number of at least 1, got 0"),
        (1, {"virtual_stages": True}, "virtual_stages must be a whole number of at least 1, got True"),
        (
            2,
            {"pp": 2, "schedule": "zb-v", "stage_layers": (2, 2)},
            "stage_layers must give 4 stages all 4 layers, got (2, 2)",
        ),
        (
            2,
            {"pp": 2, "schedule": one_f_one_b(2, 8), "virtual_stages": 2},
            "the schedule must have virtual_stages=2 stages on each of 2 ranks, got 2 stages",
        ),
        (
            1,
            {"config": GPT2, "seq_len": 17},
            "seq_len must be at most the model's 16 learned positions, got 17",
        ),
        (1, {"sequence_parallel": True}, "sequence_parallel needs tp > 1, got tp=1; leave it out"),
        (
            1,
            {"tensor_overlap": "weight_gradient"},
            "tensor_overlap=weight_gradient needs tp > 1, got tp=1; leave it out",
        ),
        (
            2,
            {"tp": 2, "sequence_parallel": False, "tensor_overlap": "chunked"},
            "tensor_overlap=chunked needs sequence_parallel=True, as nothing is gathered without it, "
            "got False; take weight_gradient",
        ),
        (
            2,
            {"tp": 2, "seq_len": 6, "tensor_overlap": "chunked"},
            "tensor_overlap=chunked needs 2 to divide the tokens of a microbatch on a tensor-parallel rank, "
            "got 3; change micro_batch or seq_len, or take weight_gradient",
        ),
        (
            2,
            {"foreign": ["mlp 4"], "pp": 2},
            "foreign must name segments among attention 0, mlp 0, attention 1, mlp 1, attention 2, mlp 2, "
            "attention 3, mlp 3, got 'mlp 4'",
        ),
        (
            1,
            {"foreign": ("mlp 0", "mlp 0")},
            "foreign must name a segment once, got 'mlp 0' twice; leave one out",
        ),
        (1, {"foreign": "mlp 0"}, "foreign must be a sequence of names of segments, got 'mlp 0'"),
        (
            2,
            {"foreign": ("mlp 0",), "tp": 2},
            "foreign modules are not cut, which needs tp=1 and cp=1, got tp=2 cp=1 for mlp 0; plan "
            "without them",
        ),
        (
            1,
            {"foreign": ("mlp 1",), "recompute": ("none", "selective", "none", "none")},
            "what the foreign mlp 1 saves is in its graph, out of reach of selective recompute, got both; "
            "plan layer 1 without, or with recompute=full",
        ),
        (
            1,
            {"foreign": ("mlp 1",), "recompute": "full", "offload": True},
            "what the foreign mlp 1 saves is in its graph, out of reach of offload, got both; "
            "plan layer 1 without, or with recompute=full",
        ),
        (
            2,
            {"foreign": ("mlp 1",), "zero_stage": 3},
            "the graph of a foreign module keeps parameters, which zero_stage=3 lets go of, got mlp 1; "
            "plan a zero_stage of at most 2",
        ),
        (
            1,
            {"loss_chunks": 9, "seq_len": 8},
            "loss_chunks must be at most the 8 tokens of a microbatch on a rank, got 9",
        ),
        (
            2,
            {"tp": 2, "seq_len": 7, "sequence_parallel": True},
            "sequence parallelism needs tp to divide the 7 tokens of a microbatch, got tp=2; "
            "change micro_batch or seq_len, or plan with sequence_parallel=False",
        ),
        (
            2,
            {"cp": 2, "seq_len": 7},
            "2 * cp must divide seq_len 7, got cp=2: each rank of a ring has an early and a late chunk; "
            "change one of the two, or plan with context=all_to_all where cp divides both seq_len and "
            "the heads",
        ),
        (2, {"pp": 2, "stage_layers": (4,)}, "stage_layers must give 2 stages all 4 layers, got (4,)"),
        (2, {"pp": 2, "stage_layers": (2, 1)}, "stage_layers must give 2 stages all 4 layers, got (2, 1)"),
        (2, {"pp": 2, "stage_layers": (4, 0)}, "every stage needs a layer, got stage_layers=(4, 0)"),
        (1, {"bucket_bytes": 0}, "bucket_bytes must be a whole number of at least 1, got 0"),
        (1, {"dp": 0}, "dp must be a positive whole number, got 0"),
        (1, {"pp": 0}, "pp must be a positive whole number, got 0"),
        (
            2,
            {"pp": 2, "schedule": one_f_one_b(2, 3)},
            "the schedule must have 2 ranks and 8 microbatches, got 2 and 3",
        ),
        (
            2,
            {"dp": 2, "schedule": one_f_one_b(2, 4)},
            "the schedule must have 1 ranks and 4 microbatches, got 2 and 4",
        ),
    ],
)
def test_requests_that_cannot_be_met_are_refused(devices: int, asked: dict[str, Any], message: str) -> None:
    """The message gives the rule, the value, then any remedy."""
    assert _refusal(devices, **asked) == message


@pytest.mark.parametrize("order", [("pp", "dp", "cp"), ("tp", "tp", "cp", "dp")])
def test_an_order_must_name_every_axis(order: tuple[str, ...]) -> None:
    """It is refused before anything is computed."""
    assert "order must name each of" in _refusal(order=order)


@pytest.mark.parametrize("schedule", ["gpipe", "", "zb", None, 1])
def test_an_unknown_schedule_is_refused_with_those_that_there_are(schedule: object) -> None:
    """All names are listed."""
    refusal = _refusal(schedule=schedule)
    assert refusal.startswith(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")


@pytest.mark.parametrize("micro_batch", [0, -1, 1.0, True, "1"])
def test_micro_batch_is_a_whole_number(micro_batch: object) -> None:
    """Whatever else is asked for."""
    assert re.match(
        "micro_batch must be a whole number of at least 1, got", _refusal(micro_batch=micro_batch)
    )


def test_expert_tensor_parallelism_needs_experts() -> None:
    """As ep does."""
    assert re.match("etp needs a model with experts", _refusal(2, tp=2, etp=2))


@pytest.mark.parametrize(
    "text",
    [
        "1F0,1B0,1F1,1B1\n0F0,0B0,0F1,0B1\n",
        "0F0,1F0,1B0,0B0,0F1,1F1,1B1,0B1\n2F0,3F0,3B0,2B0,2F1,3F1,3B1,2B1\n",
    ],
    ids=["stage 0 on rank 1", "neighbours on one rank"],
)
def test_stages_go_round_the_ranks_or_up_and_back(text: str) -> None:
    """Any other placement is refused, whatever the orders."""
    refusal = _refusal(2, pp=2, batch=2, schedule=schedule_from_csv(text))
    assert re.match("stages must go round the pipeline ranks, or up and back, got stages on ranks", refusal)


@pytest.mark.parametrize("name", [name for name, row in SCHEDULES.items() if not row.bidirectional])
def test_every_schedule_with_one_copy_can_be_planned(name: str) -> None:
    """By its name or from its own CSV: with the same stages on the same ranks, and the same program."""
    stages = 1 if SCHEDULES[name].virtual_stages == 1 else 2
    made = _plan(2, pp=2, schedule=name)
    assert (made.virtual_stages, made.num_stages, sum(made.stage_layers)) == (stages, 2 * stages, 4)
    custom = _plan(2, pp=2, schedule=schedule_from_csv(str(made.schedule)))
    assert custom.schedule.stage_ranks == made.schedule.stage_ranks
    assert custom.program() == made.program()
    assert (f"virtual_stages=2: stages a rank of {name}" in made.chosen) == (stages == 2)


@pytest.mark.parametrize(
    ("name", "ranks", "rank_of"),
    [
        ("interleaved", ((0, 2), (1, 3)), [0, 1, 0, 1]),
        ("zb-v", ((0, 3), (1, 2)), [0, 1, 1, 0]),
        ("1f1b", ((0,), (1,)), [0, 1]),
    ],
)
def test_a_rank_holds_the_stages_that_its_schedule_places(
    name: str, ranks: tuple[tuple[int, ...], ...], rank_of: list[int]
) -> None:
    """Stages and ranks by either, and the parameters that follow."""
    made = _plan(2, pp=2, schedule=name)
    assert tuple(made.rank_stages(pp) for pp in range(2)) == ranks
    assert [made.stage_rank(stage) for stage in range(made.num_stages)] == rank_of
    for pp in range(2):
        assert {p.stage for p in made.held(Coordinate(pp=pp))} == set(ranks[pp])


@pytest.mark.parametrize(
    ("schedule", "stage"),
    [
        ("zb-v", None),
        (schedule_from_csv("0F0,1F0,1B0,0B0\n", name="B"), 0),
        (schedule_from_csv("0F0,1F0,1I0,1W0,0I0,0W0\n", name="W of the table last"), 0),
        (schedule_from_csv("0F0,1F0,1I0,0I0,0W0,1W0\n", name="W of the head last"), 1),
        (schedule_from_csv("0F0,1F0,1I0,0B0,1W0\n", name="B, then W of the head"), 1),
    ],
    ids=["zb-v", "B", "W of the embedding last", "W of the head last", "W of the head after B"],
)
def test_a_shared_table_is_reduced_with_the_stage_that_adds_to_it_last(
    schedule: str | Schedule, stage: int | None
) -> None:
    """Where one rank holds embedding and head there is one table, in one bucket, complete after both."""
    pp, batch = (2, 8) if schedule == "zb-v" else (1, 1)
    made = _plan(pp, pp=pp, batch=batch, schedule=schedule, config=GPT2)
    assert "embedding" not in made.program().groups
    assert [p.name for p in made.layout].count("transformer.wte.weight") == 1
    assert all(p.tied_to is None for p in made.layout)
    found = [
        (own, bucket.ready_segment)
        for own, several in enumerate(made.stage_buckets)
        for bucket in several
        if "transformer.wte.weight" in bucket.names
    ]
    last = made.num_stages - 1
    ready = {0: 0, last: len(made.stage_segments[last]) - 1}
    assert len(found) == 1
    assert found[0][1] <= ready[found[0][0]]
    if stage is not None:
        assert found[0][0] == stage


def test_a_schedule_that_waits_in_a_circle_is_refused() -> None:
    """A plan that exists has a program."""
    circle = schedule_from_csv("0F0,0B0,0F1,0B1\n1F1,1B1,1F0,1B0\n")
    assert "wait for each other" in _refusal(2, pp=2, batch=2, schedule=circle)


def test_a_step_of_too_many_actions_is_refused() -> None:
    """A plan stays small enough to be looked at: 250,000 actions at most."""
    assert re.match(
        r"a step may have at most 250,000 actions .*, got 250,002; raise micro_batch or dp",
        _refusal(batch=125_001),
    )
    assert _plan(batch=125_000).num_microbatches == 125_000


def test_a_device_must_have_the_precision() -> None:
    """A V100 has no bf16 matrix multiply."""
    with pytest.raises(PlanError, match="v100 has no bf16 matrix multiply; choose one of its own"):
        plan(
            ModelSpec.from_hf(LLAMA),
            ClusterSpec.preset("v100", devices_per_node=1),
            Workload(global_batch=1, seq_len=8),
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch": 0}, "global_batch must be a whole number of at least 1, got 0"),
        ({"seq_len": 2.0}, "seq_len must be a whole number of at least 1, got 2.0"),
        (
            {"precision": "fp7"},
            "precision must be one of bf16, fp16, fp32, fp64, fp8, mxfp8, nvfp4, got 'fp7'",
        ),
        ({"optimizer": "lion"}, "optimizer must be one of adamw, sgd, got 'lion'"),
        ({"beta2": -1.0}, "beta2 must be a number in [0.0, 1.0), got -1.0"),
        ({"beta1": float("nan")}, "beta1 must be a number in [0.0, 1.0), got nan"),
        ({"beta1": 1.5}, "beta1 must be a number in [0.0, 1.0), got 1.5"),
        ({"seed": True}, "seed must be a whole number of at least 0, got True"),
    ],
)
def test_workloads_are_checked_field_by_field(changes: dict[str, Any], message: str) -> None:
    """A value that exists is valid."""
    with pytest.raises(PlanError) as caught:
        Workload(**({"global_batch": 8, "seq_len": 8} | changes))
    assert str(caught.value) == message


def test_a_changed_plan_is_checked_again() -> None:
    """``evolve`` to another cluster is refused where the degrees do not fit it."""
    made = _plan(4, dp=4)
    with pytest.raises(PlanError, match="must equal the cluster's 2 devices.*try dp=2"):
        attrs.evolve(made, cluster=ClusterSpec.preset("cpu", devices_per_node=2))


def test_ranks_hold_what_their_stage_and_experts_give_them() -> None:
    """Two stages of two ranks with ep 2: experts 0 and 1 on the first of a stage, 2 and 3 on the second."""
    made = _plan(4, pp=2, dp=2, ep=2, config=MIXTRAL)
    for stage in range(2):
        for ep in range(2):
            held = made.held(Coordinate(pp=stage, dp=ep, ep=ep))
            assert {p.expert[0] for p in held if p.expert} == {2 * ep, 2 * ep + 1}
            assert {p.stage for p in held} == {stage}


def test_bucket_payloads_are_those_of_the_slices() -> None:
    """fp32 gradients of all that a rank holds, whichever way they are bucketed."""
    for bucket_bytes in (1, 1000, 2**30):
        made = _plan(2, tp=2, bucket_bytes=bucket_bytes)
        whole = made.model.num_parameters
        norms = 9 * 12
        assert sum(made.bucket_payload_bytes(0)) == 4 * ((whole - norms) // 2 + norms)
    together = 3 * 4  # of each layer q, k and v are one bucket, and gate and up
    assert len(_plan(bucket_bytes=1).stage_buckets[0]) == len(_plan().held(Coordinate())) - together


def test_equal_requests_make_equal_plans() -> None:
    """Planned twice, a plan is the same value, with the same program."""
    assert _plan(4, dp=2, pp=2) == _plan(4, dp=2, pp=2)
    assert _plan(4, dp=2, pp=2).program() == _plan(4, dp=2, pp=2).program()
    assert _plan(4, dp=2, pp=2) != _plan(4, dp=4)
