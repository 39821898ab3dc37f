"""Live bytes of a step, counted by hand on a model of 196 parameters."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
import pytest

from picotron.planner.cluster import ClusterSpec
from picotron.planner.memory import memory_timeline, static_bytes
from picotron.planner.model import ModelSpec
from picotron.planner.plan import TrainingPlan, plan
from picotron.planner.program import Kind, rows
from picotron.planner.topology import Coordinate
from picotron.planner.workload import Workload

TINY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 8,
    "hidden_size": 4,
    "intermediate_size": 6,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 2,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
FOUR_LAYERS = TINY | {"num_hidden_layers": 4}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 8,
    "n_embd": 4,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 16,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
}


def _plan(config: dict[str, Any], *, batch: int = 1, seq_len: int = 4, **asked: Any) -> TrainingPlan:
    kept = {name: asked.pop(name) for name in ("precision", "optimizer") if name in asked}
    degrees = [asked.get(axis, 1) for axis in ("dp", "pp", "cp", "tp")]
    devices = degrees[0] * degrees[1] * degrees[2] * degrees[3]
    return plan(
        ModelSpec.from_hf(config),
        ClusterSpec.preset("cpu", devices_per_node=devices),
        Workload(global_batch=batch, seq_len=seq_len, **kept),
        **asked,
    )


def test_static_bytes_by_hand() -> None:
    """bf16 with AdamW: 2 + 4 + 4 + 8 bytes for each of 196 elements, a count of steps, and constants."""
    embedding, head, norms = 8 * 4, 8 * 4, 3 * 4
    attention = 4 * 4 + 2 * 4 + 2 * 4 + 4 * 4  # q, k, v, o
    mlp = 3 * 6 * 4
    numel = embedding + head + norms + attention + mlp
    assert numel == 196
    assert static_bytes(_plan(TINY), Coordinate()) == {
        "parameters": 2 * numel,
        "gradients": 4 * numel,
        "optimizer": (4 + 4 + 4) * numel + 4,
        "constants": 24 + 2 * 4 * 1 * 4,  # the angles' cosines and sines in fp32
    }


@pytest.mark.parametrize(
    ("precision", "optimizer", "parameters", "gradients", "state"),
    [
        ("bf16", "sgd", 2, 4, 4),
        ("fp32", "adamw", 4, 4, 8),
        ("fp32", "sgd", 4, 4, 0),
        ("fp64", "adamw", 8, 8, 16),
    ],
)
def test_formats(precision: str, optimizer: str, parameters: int, gradients: int, state: int) -> None:
    """fp32 and fp64 weights are their own main copy; SGD keeps no moments and counts no steps."""
    found = static_bytes(_plan(TINY, precision=precision, optimizer=optimizer), Coordinate())
    counters = 4 if optimizer == "adamw" else 0
    assert (found["parameters"], found["gradients"]) == (196 * parameters, 196 * gradients)
    assert found["optimizer"] == 196 * state + counters


def test_learned_positions_keep_their_indices_on_the_first_stage() -> None:
    """Four int64 indices, and none on the second stage; the gradient statistics are three fp64."""
    made = _plan(GPT2, pp=2)
    assert static_bytes(made, Coordinate())["constants"] == 24 + 4 * 8
    assert static_bytes(made, Coordinate(pp=1))["constants"] == 24


def test_stages_hold_their_own_parameters() -> None:
    """The two stages' parameters are the model's, with one more copy of a tied table."""
    made = _plan(GPT2, pp=2, precision="fp32", optimizer="sgd")
    stages = [static_bytes(made, Coordinate(pp=stage))["parameters"] for stage in range(2)]
    assert sum(stages) == 4 * (made.model.num_parameters + 8 * 4)


def _held_after_forwards(made: TrainingPlan, rank: int) -> list[int]:
    """Live bytes over the start after every F and B of ``rank``."""
    timeline, own = memory_timeline(made, rank), rows(made.program(), rank)
    start = sum(static_bytes(made, Coordinate(pp=rank)).values())
    return [
        int(live) - start
        for row, operation, live in zip(timeline.row, timeline.operation, timeline.live_bytes, strict=True)
        if operation == -1 and own[row].kind in (Kind.FORWARD, Kind.BACKWARD)
    ]


def test_the_last_stage_of_one_f_one_b_holds_one_microbatch() -> None:
    """Four microbatches on four stages: F fills the last stage, B empties it, four times the same."""
    made = _plan(FOUR_LAYERS, batch=4, pp=4)
    levels, gradient_in_flight = _held_after_forwards(made, 3), made.dims().local_bytes
    assert levels[0::2] == [levels[0], *[levels[0] + gradient_in_flight] * 3]
    one = memory_timeline(_plan(FOUR_LAYERS, batch=1, pp=4), 3).max_bytes
    boundary = made.dims().local_bytes
    assert memory_timeline(made, 3).max_bytes <= one + 2 * boundary  # the next input, the last gradient


def test_stage_s_of_one_f_one_b_holds_p_minus_s() -> None:
    """Two stages in, rank 1 of 4 holds three microbatches at its peak, and AFAB all six."""
    one = _held_after_forwards(_plan(FOUR_LAYERS, batch=1, pp=4), 1)[0]
    boundary = _plan(FOUR_LAYERS, pp=4).dims().local_bytes
    for schedule, held in (("1f1b", 3), ("afab", 6)):
        made = _plan(FOUR_LAYERS, batch=6, pp=4, schedule=schedule)
        highest = max(_held_after_forwards(made, 1))
        kept = one - 2 * boundary  # without output in flight and gradient to come
        assert highest // kept == held


def test_the_step_ends_as_it_began() -> None:
    """Everything that a step makes it frees."""
    made = _plan(GPT2, batch=4, dp=2, pp=2, tp=2)
    for rank in range(8):
        timeline = memory_timeline(made, rank)
        assert timeline.rank == rank
        assert timeline.live_bytes[-1] == sum(static_bytes(made, Coordinate(pp=rank // 4)).values())
        assert sum(size for _, size in timeline.peak_by_category) == timeline.max_bytes


def test_entries_name_every_segment_and_every_row() -> None:
    """One entry a segment of each F and B, and one for the row itself."""
    made = _plan(TINY)
    timeline = memory_timeline(made, 0)
    entries = list(zip(timeline.row.tolist(), timeline.operation.tolist(), strict=True))
    segments = [0, 1, 2, 3, -1]  # embedding, attention, MLP, head, the row
    forward, backward = [(1, s) for s in segments], [(2, s) for s in segments]
    assert entries == [(0, -1), *forward, *backward, (3, -1), (4, -1)]
    assert timeline.peak_row in (1, 2)


def test_an_anchored_reduction_allocates_nothing() -> None:
    """Data parallelism adds no bytes of its own: gradients are reduced where they stand."""
    alone, pair = _plan(TINY), _plan(TINY, batch=2, dp=2)
    assert memory_timeline(pair, 1).max_bytes == memory_timeline(alone, 0).max_bytes


def test_the_norm_needs_one_number() -> None:
    """NORM's peak stands 8 bytes over what is live."""
    timeline = memory_timeline(_plan(TINY), 0)
    assert timeline.peak_bytes[-2] - timeline.live_bytes[-2] == 8


def test_timelines_compare_by_value() -> None:
    """Made twice they are equal; with another rank or another byte they are not."""
    timeline = memory_timeline(_plan(TINY), 0)
    assert timeline == memory_timeline(_plan(TINY), 0)
    assert timeline != attrs.evolve(timeline, rank=1)
    assert timeline != attrs.evolve(timeline, live_bytes=timeline.live_bytes + 1)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_multiplying_while_a_sum_is_under_way_takes_no_more(sequence_parallel: bool) -> None:
    """The gradient of the input stands earlier, when queries, keys and values are gone: never the peak."""
    asked = {"tp": 2, "sequence_parallel": sequence_parallel}
    apart, overlapped = (
        memory_timeline(_plan(FOUR_LAYERS, tensor_overlap=way, **asked), 0)
        for way in ("none", "weight_gradient")
    )
    assert overlapped.max_bytes <= apart.max_bytes
    assert np.array_equal(overlapped.live_bytes, apart.live_bytes)


def test_a_loss_in_chunks_keeps_no_logits() -> None:
    """A vocabulary of 800 over 4 tokens, in fp32: whole logits stand after F; of 4 chunks one row at a time.

    What stays is as large as the hidden states.
    """
    wide = TINY | {"vocab_size": 800}
    whole, chunked = (
        memory_timeline(_plan(wide, precision="fp32", loss_chunks=chunks), 0) for chunks in (1, 4)
    )
    after_head = 3  # embedding, attention, mlp, head
    entry = int(np.flatnonzero(whole.operation == after_head)[0])
    logits, hidden = 4 * 800 * 4, 4 * 4 * 4
    assert whole.live_bytes[entry] - chunked.live_bytes[entry] == logits - hidden
    assert whole.peak_bytes[entry] - chunked.peak_bytes[entry] > logits // 2
