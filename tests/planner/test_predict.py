"""What a plan will do, on plans whose numbers a reader can work out."""

from __future__ import annotations

import time
from typing import Any

import pytest
from attrs import evolve

from picotron.planner.cluster import ClusterSpec
from picotron.planner.cost import stage_cost
from picotron.planner.memory import memory_timeline
from picotron.planner.model import ModelSpec
from picotron.planner.plan import TrainingPlan, plan
from picotron.planner.predict import model_flops, planned_payloads, predict
from picotron.planner.program import Kind
from picotron.planner.rank_bytes import alike
from picotron.planner.workload import Workload

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 10,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 2,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def _plan(
    *, batch: int = 4, seq_len: int = 4, devices: int = 1, config: dict[str, Any] = LLAMA, **asked: Any
) -> TrainingPlan:
    return plan(
        ModelSpec.from_hf(config),
        ClusterSpec.preset("cpu", devices_per_node=devices),
        Workload(global_batch=batch, seq_len=seq_len, precision="fp32"),
        **asked,
    )


def _with_memory(made: TrainingPlan, memory_bytes: int) -> TrainingPlan:
    return evolve(
        made,
        cluster=evolve(made.cluster, device=evolve(made.cluster.device, memory_bytes=memory_bytes)),
    )


def test_mfu_of_one_device_by_hand() -> None:
    """Six FLOPs a token and matrix element, and full attention of 4 * 4 pairs, over the step and the peak."""
    layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 12  # q, k and v, o, gate up down
    tokens, elements = 4 * 4, 2 * layer + 8 * 10
    attention = (
        4 * 2 * 4 * (4 * 4) * 2 * 2 * 2
    )  # batch, layers, heads, pairs, head_dim, two products, 2 FLOPs
    assert model_flops(_plan(), "full") == 6 * tokens * elements + 3 * attention
    assert model_flops(_plan(), "causal") == 6 * tokens * elements + 3 * attention * 10 // 16
    predicted = predict(_plan())
    peak = 100e9
    assert predicted.mfu == pytest.approx(model_flops(_plan(), "full") / predicted.step_seconds / peak)
    assert predicted.mfu_causal == pytest.approx(
        model_flops(_plan(), "causal") / predicted.step_seconds / peak
    )
    executed = model_flops(_plan(), "causal") + attention // 2 * 10 // 16  # the scores once more
    assert predicted.hfu == pytest.approx(executed / predicted.step_seconds / peak)


def test_the_step_of_one_device_is_its_work() -> None:
    """Four F and B, then the update: no bubble, no communication."""
    made = _plan()
    predicted, cost = predict(made), stage_cost(made, 0)
    step = 4 * (cost.forward_seconds + cost.backward_seconds) + cost.update_seconds
    assert predicted.step_seconds == pytest.approx(step)
    assert predicted.compute_seconds_by_rank == pytest.approx((step,))
    assert predicted.tokens_per_second == pytest.approx(16 / step)
    assert predicted.exposed_communication_seconds == pytest.approx(0.0, abs=1e-12)
    assert predicted.bubble_fraction == pytest.approx(0.0, abs=1e-12)
    assert predicted.payload_bytes_by_rank == ((),)


@pytest.mark.parametrize("axis", ["dp", "pp", "tp"])
def test_rates_are_of_the_cluster_unless_they_say_per_device(axis: str) -> None:
    """However two devices share the work, all tokens count once and both devices' peaks."""
    made = _plan(devices=2, **{axis: 2})
    predicted = predict(made)
    assert predicted.tokens_per_second == pytest.approx(2 * predicted.tokens_per_second_per_device)
    assert predicted.tokens_per_second == pytest.approx(16 / predicted.step_seconds)
    assert predicted.mfu == pytest.approx(model_flops(made, "full") / predicted.step_seconds / 200e9)
    executed = predict(_plan()).hfu / predict(_plan()).mfu_causal  # of one device
    assert predicted.hfu / predicted.mfu_causal == pytest.approx(executed)


def test_equal_stages_have_the_textbook_bubble() -> None:
    """Two stages that only differ by their ends: with one microbatch about half of the step is idle."""
    predicted = predict(_plan(batch=1, devices=2, pp=2))
    assert 0.4 < predicted.bubble_fraction < 0.6
    assert len(predicted.bubble_seconds) == 2


def test_bubble_fraction_is_a_share_of_the_makespan() -> None:
    """Every rank's idle time and work add up to one makespan, whose mean idle share it is."""
    made = _plan(batch=4, devices=2, pp=2)
    predicted = predict(made)
    works = [4 * (c.forward_seconds + c.backward_seconds) for c in (stage_cost(made, 0), stage_cost(made, 1))]
    makespans = [work + idle for work, idle in zip(works, predicted.bubble_seconds, strict=True)]
    assert makespans[0] == pytest.approx(makespans[1])
    assert predicted.bubble_fraction == pytest.approx(sum(predicted.bubble_seconds) / 2 / makespans[0])


def test_payloads_by_hand() -> None:
    """dp 2, tp 2, two microbatches of four tokens in fp32: every key that a rank hands over in a step."""
    made = _plan(batch=4, devices=4, dp=2, tp=2, sequence_parallel=False)
    hidden = 4 * 8 * 4
    numbers = (1 + 2) * 4 * 4  # a maximum and two sums for each of four tokens, in fp32
    forward = hidden + 4 * hidden + numbers  # embedding, two layers of two, head
    backward = 4 * hidden + hidden
    norms = 5 * 8
    parameters = 2 * (8 * 8 // 2 * 2 + 2 * 8 * 4 // 2 + 3 * 8 * 12 // 2) + 2 * 10 // 2 * 8 + norms
    assert planned_payloads(made)[0] == (
        ("all_reduce", "dp_cp", 4 * parameters + 8),
        ("all_reduce", "tp", 2 * (forward + backward)),
        ("all_reduce", "world", 24),
    )
    assert len(set(planned_payloads(made))) == 1


def test_pipeline_payloads_by_hand() -> None:
    """Three microbatches of four tokens in fp32 cross the border once each way."""
    first, last = planned_payloads(_plan(batch=3, devices=2, pp=2))
    hidden = 4 * 8 * 4
    assert first == (("all_reduce", "world", 24), ("recv", "pp", 3 * hidden), ("send", "pp", 3 * hidden))
    assert last == first


def test_an_uneven_vocabulary_differs_by_rank() -> None:
    """Eleven words on two ranks: the first holds one row of both tables more, reduced over dp."""
    config = LLAMA | {"vocab_size": 11}
    found = planned_payloads(_plan(devices=4, dp=2, tp=2, config=config))
    reduced = [{(kind, group): size for kind, group, size in own}["all_reduce", "dp_cp"] for own in found]
    assert reduced[0] - reduced[1] == 2 * 8 * 4
    assert reduced[0::2] == [reduced[0]] * 2 and reduced[1::2] == [reduced[1]] * 2


def test_memory_is_that_of_the_fullest_rank() -> None:
    """Every rank's peak is its timeline's; the margin is what the fullest leaves of the device."""
    made = _plan(devices=2, pp=2)
    predicted = predict(made)
    peaks = tuple(memory_timeline(made, rank).max_bytes for rank in range(2))
    assert predicted.memory_by_rank == peaks
    assert predicted.peak_memory_bytes == max(peaks)
    assert predicted.peak_memory_rank == peaks.index(max(peaks))
    assert predicted.margin_bytes == made.cluster.device.memory_bytes - max(peaks)
    assert predicted.capacity_bytes == 2**32
    assert sum(size for _, size in predicted.memory_by_category) == max(peaks)
    assert predicted.fits and predicted.misfits == ()


def test_the_device_is_full_to_the_byte() -> None:
    """A peak equal to the memory fits; one byte less does not, and the stage that is too much is named."""
    made = _plan(devices=2, pp=2)
    peaks = predict(made).memory_by_rank
    fullest = peaks.index(max(peaks))
    assert predict(_with_memory(made, max(peaks))).margin_bytes == 0
    assert predict(_with_memory(made, max(peaks))).fits
    short = predict(_with_memory(made, max(peaks) - 1))
    assert not short.fits
    assert short.margin_bytes == -1
    (line,) = short.misfits
    assert line.startswith(f"stage {fullest} ")


def test_seventy_billion_parameters_do_not_fit_one_v100() -> None:
    """16 bytes a parameter in fp32 against 32 GiB: stage 0 is named, with what takes most."""
    made = plan(
        ModelSpec.from_hf("llama-3.1-70b"),
        ClusterSpec.preset("v100", devices_per_node=1),
        Workload(global_batch=1, seq_len=128, precision="fp32"),
    )
    predicted = predict(made)
    assert not predicted.fits
    (line,) = predicted.misfits
    assert line.startswith("stage 0 ")
    assert "needs 105" in line and "of 32.00" in line and "most of it optimizer" in line
    assert predicted.margin_bytes < 0


def test_communication_is_exposed_where_nothing_hides_it() -> None:
    """Tensor-parallel collectives block, so all of their seconds are exposed."""
    made = _plan(devices=2, tp=2, sequence_parallel=False)
    cost = stage_cost(made, 0)
    blocking = sum(s.communication_seconds for s in (*cost.forward, *cost.backward))
    exposed = predict(made).exposed_communication_seconds
    assert exposed == pytest.approx(4 * blocking, rel=0.05)
    assert exposed > 4 * blocking  # and the norm


def test_what_each_rank_computes_follows_its_slice() -> None:
    """Eleven words on two ranks: the first has one more row of the head, and works longer."""
    made = _plan(devices=4, dp=2, tp=2, config=LLAMA | {"vocab_size": 11})
    predicted = predict(made)
    costs = [stage_cost(made, 0, index) for index in range(2)]
    own = [
        2 * (cost.compute_seconds(Kind.FORWARD) + cost.compute_seconds(Kind.BACKWARD)) + cost.update_seconds
        for cost in costs
    ]
    assert own[0] > own[1]
    assert predicted.compute_seconds_by_rank == pytest.approx((own[0], own[1], own[0], own[1]))


def test_what_is_executed_counts_every_slice_once() -> None:
    """The whole vocabulary's FLOPs, also where three ranks hold three words each and the last holds two."""
    config = LLAMA | {"vocab_size": 11, "num_key_value_heads": 4}
    whole, cut = _plan(config=config), _plan(devices=4, tp=4, config=config)
    executed = [p.hfu * p.step_seconds * p.plan.topology.world_size for p in (predict(whole), predict(cut))]
    assert executed[0] == pytest.approx(executed[1])


def test_large_worlds_are_predicted_at_once() -> None:
    """A step of 8,192 ranks; a second is what a person waits for gladly, ten are refused here."""
    made = plan(
        ModelSpec.from_hf("llama-3.1-405b"),
        ClusterSpec.preset("h100", nodes=1024),
        Workload(global_batch=64 * 128, seq_len=8192),
        tp=8,
        pp=16,
        dp=64,
    )
    started = time.process_time()
    predicted = predict(made)
    assert time.process_time() - started < 10
    assert len(predicted.compute_seconds_by_rank) == 8192
    assert sorted(set(predicted.timeline.rank.tolist())) == list(range(16))


def test_ranks_with_as_many_experts_are_alike() -> None:
    """256 experts over 32 ranks: 8 on each, so that one rank of a stage stands for all of its 128."""
    made = plan(
        ModelSpec.from_hf("deepseek-v3"),
        ClusterSpec.preset("h100", nodes=256),
        Workload(global_batch=2048, seq_len=4096),
        pp=16,
        ep=32,
        zero_stage=1,
    )
    keys = alike(made)
    assert len(keys) == 2048
    assert len(set(keys)) == 16


def test_predictions_are_equal_for_equal_plans() -> None:
    """Nothing but the plan decides."""
    assert predict(_plan(devices=4, dp=2, pp=2)) == predict(_plan(devices=4, dp=2, pp=2))


def test_a_sum_hides_under_the_weights_products() -> None:
    """On a slow link a step that multiplies while it sums is shorter, by no more than it then computes."""
    apart, overlapped = (
        predict(_plan(devices=2, tp=2, sequence_parallel=False, tensor_overlap=way))
        for way in ("none", "weight_gradient")
    )
    assert overlapped.payload_bytes_by_rank == apart.payload_bytes_by_rank
    assert overlapped.compute_seconds_by_rank == pytest.approx(apart.compute_seconds_by_rank)
    gained = apart.step_seconds - overlapped.step_seconds
    assert 0 < gained <= apart.exposed_communication_seconds


def test_a_chunk_comes_while_the_one_before_is_multiplied() -> None:
    """The same bytes as gathered whole; between the first chunk and the last product less is waited for."""
    wide = LLAMA | {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 128}
    whole, chunked = (
        _plan(devices=2, config=wide, tp=2, seq_len=256, tensor_overlap=way)
        for way in ("weight_gradient", "chunked")
    )
    assert predict(chunked).payload_bytes_by_rank == predict(whole).payload_bytes_by_rank
    before, after = (stage_cost(made, 0).forward[1:5] for made in (whole, chunked))
    for one, other in zip(before, after, strict=True):
        assert other.communication_seconds < one.communication_seconds
        assert len(other.collectives) == len(one.collectives) + 6  # three more gathers, each waited for
    assert predict(chunked).exposed_communication_seconds < predict(whole).exposed_communication_seconds
