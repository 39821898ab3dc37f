"""Every topology of up to eight ranks trains as one rank does, on the simulated backend."""

from __future__ import annotations

from typing import Any

import pytest

from picotron.planner.catalogue import SCHEDULES, make_schedule
from picotron.planner.pipeline import schedule_from_csv
from picotron.planner.recompute import MODES
from property_tests.strategies_runtime import degree_triples
from tests.runtime.models import (
    FAMILIES,
    TOLERANCE,
    assert_as_planned,
    distance,
    memory_shares,
    random_samples,
    reference,
    single_rank,
    tiny_model,
    tiny_plan,
    tiny_workload,
    train,
)

pytestmark = pytest.mark.no_cover  # other tests count the lines


def assert_parity(
    model: dict[str, Any], work: dict[str, Any], parallel: dict[str, Any], *, steps: int = 3
) -> None:
    """All steps of the plan have the single rank's loss, norm and gradients, by planned rows and bytes."""
    made = tiny_plan(tiny_model(**model), tiny_workload(**work), **parallel)
    data = random_samples(made.model.vocab_size, made.workload.seq_len)
    reports = train(made, data, steps=steps, measure_from=steps - 1)
    found = distance(made, reports, reference(single_rank(made), steps=steps))
    assert found.largest <= TOLERANCE[made.workload.precision], found
    assert_as_planned(made, reports)
    shares = memory_shares(made, reports)
    assert min(shares) >= 0.98
    assert max(shares) <= 1.0


def heads_for(tp: int) -> dict[str, int]:
    """Heads that ``tp`` cuts, and key/value heads of which some ranks hold copies where tp allows."""
    heads = max(tp, 4) if tp in (1, 2, 4) else tp
    return {"heads": heads, "kv_heads": 2 if heads % 2 == 0 and (tp % 2 == 0 or tp == 1) else heads}


@pytest.mark.parametrize("degrees", degree_triples(), ids=lambda d: "dp{}-pp{}-tp{}".format(*d))
def test_every_topology_under_1f1b(degrees: tuple[int, int, int]) -> None:
    """Tied embeddings and sequence parallelism, the family changing from topology to topology."""
    dp, pp, tp = degrees
    family = FAMILIES[degree_triples().index(degrees) % len(FAMILIES)]
    model = {"family": family, "layers": max(2, pp), "tied": True, **heads_for(tp)}
    work = {"global_batch": 2 * dp, "seq_len": tp * -(-8 // tp)}
    assert_parity(model, work, {"dp": dp, "pp": pp, "tp": tp, "sequence_parallel": tp > 1})


@pytest.mark.parametrize("degrees", degree_triples(), ids=lambda d: "dp{}-pp{}-tp{}".format(*d))
def test_every_topology_under_all_forward_all_backward(degrees: tuple[int, int, int]) -> None:
    """An untied head, no sequence parallelism and microbatches of two, in fp32 with clipping."""
    dp, pp, tp = degrees
    family = FAMILIES[(degree_triples().index(degrees) + 2) % len(FAMILIES)]
    model = {"family": family, "layers": max(2, pp), **heads_for(tp)}
    work = {"global_batch": 4 * dp, "precision": "fp32", "max_grad_norm": 1.0}
    parallel = {"dp": dp, "pp": pp, "tp": tp, "micro_batch": 2, "schedule": "afab"}
    assert_parity(model, work, {**parallel, "sequence_parallel": False})


SINGLE = [name for name, row in SCHEDULES.items() if not row.bidirectional]


@pytest.mark.parametrize("pp", [1, 2, 3, 4])
@pytest.mark.parametrize("name", SINGLE)
def test_every_schedule(name: str, pp: int) -> None:
    """Fewer microbatches than ranks, and a number that they do not divide; with dp or tp where ranks allow.

    Family, tied embeddings, sequence parallelism, and what layers recompute and offload, change from case to
    case.
    """
    number = SINGLE.index(name) + pp
    for num_microbatches, tied in ((max(1, pp - 1), number % 2 == 0), (pp + 1, number % 2 == 1)):
        stages = make_schedule(name, pp, num_microbatches).num_stages
        dp, tp = [(1, 1), (2, 1), (1, 2), (2, 2)][number % 4] if pp <= 2 else (1, 1)
        model = {"family": FAMILIES[number // 2 % 4], "layers": max(2, stages), "tied": tied}
        work = {"global_batch": dp * num_microbatches}
        layers = range(number, number + model["layers"])
        saving = {
            "recompute": tuple(MODES[layer % 3] for layer in layers),
            "offload": tuple(layer % 4 == 0 for layer in layers),
        }
        parallel = {"dp": dp, "pp": pp, "tp": tp, "schedule": name, "virtual_stages": None}
        assert_parity(model, work, parallel | saving, steps=2)


@pytest.mark.parametrize("virtual_stages", [1, 3])
@pytest.mark.parametrize("name", [name for name in SINGLE if SCHEDULES[name].virtual_stages == "any"])
def test_any_number_of_stages_a_rank(name: str, virtual_stages: int) -> None:
    """One stage a rank, and three of unequal size."""
    layers = (1, 2, 1, 1, 1, 2)[: 2 * virtual_stages]
    model = {"family": "qwen3", "layers": sum(layers), "tied": True}
    parallel = {"pp": 2, "schedule": name, "virtual_stages": virtual_stages, "stage_layers": layers}
    assert_parity(model, {"global_batch": 3}, parallel, steps=2)


@pytest.mark.parametrize(
    "csv",
    [
        "0F0,1F0,0F1,1F1,1B0,0B0,1B1,0B1\n",
        "0F0,1F0,0F1,1F1,1I0,0I0,0W0,1I1,0I1,0W1,1W0,1W1\n",
        "0F0,1F0,0F1,1F1,1I0,0I0,1W0,1I1,0I1,1W1,0W1,0W0\n",
        "0F0,1F0,0F1,1F1,1I0,0B0,1B1,0B1,1W0\n",
        "0F0,3F0,3I0,0F1,3F1,3I1,0I0,0I1,0W0,0W1,3W1,3W0\n1F0,2F0,2I0,1I0,1F1,2F1,2I1,1I1,1W1,1W0,2W0,2W1\n",
    ],
    ids=[
        "B",
        "W of the head last",
        "W of the embedding last",
        "B and W of the head",
        "V, W of the head last",
    ],
)
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_embedding_and_head_of_one_rank_share_a_table(family: str, tp: int, csv: str) -> None:
    """Its gradient is summed over data-parallel ranks when both stages have added to it, in either order."""
    made = schedule_from_csv(csv)
    model = {"family": family, "layers": made.num_stages, "tied": True}
    parallel = {"dp": 2, "pp": made.num_ranks, "tp": tp, "schedule": made}
    assert_parity(model, {"global_batch": 4}, parallel, steps=2)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole", "sequence-parallel"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_on_all_three_axes(family: str, sequence_parallel: bool, tied: bool) -> None:
    """Two ranks on each axis."""
    parallel = {"dp": 2, "pp": 2, "tp": 2, "sequence_parallel": sequence_parallel}
    assert_parity({"family": family, "tied": tied}, {}, parallel)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_key_value_heads_may_be_fewer_than_ranks(family: str, kv_heads: int) -> None:
    """Eight ranks share one, two or four key/value heads: the copies' gradients are summed."""
    model = {"family": family, "heads": 8, "kv_heads": kv_heads}
    assert_parity(model, {"global_batch": 1}, {"tp": 8})


@pytest.mark.parametrize("num_microbatches", [1, 2, 3, 5])
def test_a_pipeline_deeper_than_its_microbatches(num_microbatches: int) -> None:
    """Three stages with fewer, as many and more microbatches."""
    assert_parity({"family": "llama", "layers": 3}, {"global_batch": num_microbatches}, {"pp": 3})


@pytest.mark.parametrize("vocab", [61, 64, 66, 67])
def test_a_vocabulary_of_any_size_is_cut(vocab: int) -> None:
    """Slices of the vocabulary that differ by one, in embedding and head, tied across stages."""
    model = {"family": "gpt2", "vocab": vocab, "tied": True}
    assert_parity(model, {}, {"tp": 4, "pp": 2, "sequence_parallel": True})


@pytest.mark.parametrize(
    "order", [("dp", "pp", "cp", "tp"), ("tp", "cp", "dp", "pp"), ("tp", "dp", "cp", "pp")]
)
def test_ranks_may_run_through_the_axes_in_any_order(order: tuple[str, ...]) -> None:
    """Where the ranks sit changes who talks to whom, never the gradients."""
    assert_parity({"family": "qwen2", "tied": True}, {}, {"dp": 2, "pp": 2, "tp": 2, "order": order})


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_projections_may_have_biases(family: str, tp: int) -> None:
    """Biases of attention, and of a llama's MLP, take the memory and the gradients that are planned."""
    more = {"mlp_bias": True} if family == "llama" else {}
    model = {"family": family, "attention_bias": True, "intermediate_size": 128, **more}
    assert_parity(model, {"global_batch": 2}, {"dp": 2, "tp": tp, "sequence_parallel": tp == 4})


def test_momentum_and_decay_train_the_same() -> None:
    """Under AdamW with decay, warm-up and clipping the weights of many ranks stay those of one."""
    work = {"optimizer": "adamw", "weight_decay": 0.1, "max_grad_norm": 1.0, "warmup_steps": 3}
    assert_parity(
        {"family": "qwen3", "tied": True}, {**work, "learning_rate": 1e-3}, {"dp": 2, "pp": 2, "tp": 2}
    )


@pytest.mark.parametrize("seed", range(4))
def test_the_interleaving_of_the_ranks_changes_no_bit(seed: int) -> None:
    """Whoever goes first, every rank ends with the same gradients to the bit."""
    made = tiny_plan(tiny_model("llama", tied=True), dp=2, pp=2, tp=2)
    data = random_samples(made.model.vocab_size, made.workload.seq_len)
    for one, other in zip(train(made, data, steps=2), train(made, data, steps=2, seed=seed + 1), strict=True):
        assert [result.loss for result in one.results] == [result.loss for result in other.results]
        for ours, theirs in zip(one.gradients, other.gradients, strict=True):
            assert all(ours[name].equal(theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("sequence_parallel", "overlap"),
    [(False, "weight_gradient"), (True, "weight_gradient"), (True, "chunked")],
    ids=["whole", "cut", "chunked"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_sums_beside_products_and_losses_in_chunks(
    family: str, sequence_parallel: bool, overlap: str
) -> None:
    """With backwards whole and in halves, buckets that end between projections, and chunks of two sizes."""
    parallel = {"tp": 2, "sequence_parallel": sequence_parallel, "tensor_overlap": overlap}
    for schedule in ("1f1b", "zb-h1"):
        more = {"micro_batch": 2, "loss_chunks": 3, "bucket_bytes": 1, "schedule": schedule}
        assert_parity({"family": family, "tied": True}, {"global_batch": 4}, parallel | more, steps=2)
