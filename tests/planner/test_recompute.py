"""What recomputing and offloading change, counted by hand on a model of two layers."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest

from picotron.errors import PlanError
from picotron.planner.body import Body, segment_memory
from picotron.planner.cluster import ClusterSpec
from picotron.planner.memory import memory_timeline, static_bytes
from picotron.planner.model import ModelSpec
from picotron.planner.plan import TrainingPlan, plan
from picotron.planner.program import Kind, rows
from picotron.planner.topology import Coordinate
from picotron.planner.workload import Workload

TWO_LAYERS: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 8,
    "hidden_size": 4,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 2,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
TOKENS, HIDDEN, ITEM = 4, 4, 4
INPUT = TOKENS * HIDDEN * ITEM
STATISTICS = TOKENS * ITEM
QUERY, KEY, CONTEXT = TOKENS * 4 * ITEM, TOKENS * 2 * ITEM, TOKENS * 4 * ITEM
LOG_SUM_EXP = TOKENS * 2 * ITEM
MLP = 2 * TOKENS * 6 * ITEM
LAYER = INPUT + STATISTICS + QUERY + 2 * KEY + CONTEXT + LOG_SUM_EXP + INPUT + STATISTICS + MLP


def _plan(**asked: Any) -> TrainingPlan:
    degrees = asked.get("pp", 1) * asked.get("dp", 1)
    batch = asked.pop("batch", 1) * asked.get("dp", 1)
    return plan(
        ModelSpec.from_hf(TWO_LAYERS),
        ClusterSpec.preset("cpu", devices_per_node=degrees),
        Workload(global_batch=batch, seq_len=TOKENS, precision="fp32"),
        **asked,
    )


def _left(body: Body) -> int:
    return int(sum(segment_memory(segment)[0].sum() for segment in body.segments))


@pytest.mark.parametrize(
    ("recompute", "layer_bytes"),
    [("none", LAYER), ("selective", LAYER - CONTEXT - LOG_SUM_EXP), ("full", INPUT)],
)
def test_what_forward_leaves(recompute: str, layer_bytes: int) -> None:
    """Of a whole layer its tensors by hand; without the core's; of a recomputed layer its input."""
    made = _plan(recompute=recompute)
    token_ids, logits_and_head_input = TOKENS * 8, TOKENS * 8 * ITEM + INPUT + STATISTICS
    bodies = made.bodies(0)
    assert _left(bodies.forward) == token_ids + 2 * layer_bytes + logits_and_head_input
    assert _left(bodies.forward) + _left(bodies.backward) == 0


def test_each_layer_has_its_own_mode() -> None:
    """The first recomputed, the second not: the bytes of one of each."""
    either, both = (_left(_plan(recompute=mode).bodies(0).forward) for mode in ("none", ("full", "none")))
    assert either - both == LAYER - INPUT


def test_full_recompute_runs_the_whole_forward_again() -> None:
    """Before the backward of the layer's last segment, which then has all that it needs."""
    plain, again = _plan().bodies(0), _plan(recompute="full").bodies(0)
    assert again.forward.flops == plain.forward.flops
    layers = plain.forward.segments[1:5]
    repeated = sum(step.flops for segment in layers for step in segment.operations)
    assert again.backward.flops == plain.backward.flops + repeated
    names = [[step.name.startswith("recompute ") for step in s.operations] for s in again.backward.segments]
    assert [any(own) for own in names] == [False, True, False, True, False, False]
    assert names[1] == sorted(names[1], reverse=True)


def test_selective_recompute_runs_the_core_again() -> None:
    """One attention of each layer, and nothing else."""
    plain, again = _plan().bodies(0), _plan(recompute="selective").bodies(0)
    cores = [step for s in plain.forward.segments for step in s.operations if step.kind == "attention"]
    assert again.backward.flops - plain.backward.flops == sum(core.flops for core in cores) > 0


def test_recomputed_collectives_are_sent_again() -> None:
    """Two all-reduces of a layer's forward come once more in its backward."""
    model = ModelSpec.from_hf(TWO_LAYERS | {"num_key_value_heads": 2})
    work = Workload(global_batch=1, seq_len=TOKENS, precision="fp32")
    cluster = ClusterSpec.preset("cpu", devices_per_node=2)
    counts = [
        sum(len(segment.collectives) for segment in made.bodies(0).backward.segments)
        for made in (plan(model, cluster, work, tp=2, recompute=mode) for mode in ("none", "full"))
    ]
    assert counts[1] == counts[0] + 2 * 4  # with gathers before, and reduce-scatters after, both blocks


def test_offloaded_layers_leave_with_the_layer_after_them() -> None:
    """After F the last layer's activations are gone too, and the program copies all of them each way."""
    made = _plan(offload=(True, True), batch=2)
    kept, offloaded = (_left(one.bodies(0).forward) for one in (_plan(), made))
    assert kept - offloaded == 2 * LAYER
    forwards = [one.bodies(0).forward.segments for one in (_plan(), made)]
    levels = [accumulate(int(segment_memory(segment)[0].sum()) for segment in own) for own in forwards]
    gone = [before - after for before, after in zip(*levels, strict=True)]
    assert gone == [0, 0, 0, 0, LAYER, 2 * LAYER]
    own = rows(made.program(), 0)
    named = [str(row) for row in own]
    assert named[1:4] == ["0OFFLOAD0", "0F0", "0WAIT0"]
    assert [row.bytes for row in own if row.kind in (Kind.OFFLOAD, Kind.RELOAD)] == [2 * LAYER] * 4
    assert own[3].target == 1


def test_only_layers_that_offload_are_copied() -> None:
    """One of two, recomputed in full: its input alone."""
    made = _plan(offload=(True, False), recompute="full")
    assert [row.bytes for row in rows(made.program(), 0) if row.kind is Kind.OFFLOAD] == [INPUT]


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "afab"])
@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("offload", [False, True])
def test_the_step_ends_as_it_began(schedule: str, recompute: str, offload: bool) -> None:
    """Whatever is recomputed or copied is freed, in whole and split backwards."""
    made = _plan(pp=2, batch=3, schedule=schedule, recompute=recompute, offload=offload)
    for pp in range(2):
        standing = sum(static_bytes(made, Coordinate(pp=pp)).values())
        timeline = memory_timeline(made, pp)
        assert timeline.live_bytes[-1] == standing
        assert timeline.live_bytes.min() >= standing


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (
            {"recompute": "half"},
            "recompute must be one of none, selective, full, or one of them for each of the ",
        ),
        ({"recompute": ("full",)}, "2 layers, got \\('full',\\) \\(1 of them\\)"),
        ({"recompute": 3}, "got 3"),
        (
            {"offload": "yes"},
            "offload must be True or False, or one of them for each of the model's 2 layers",
        ),
        ({"offload": (True, 0)}, "got \\(True, 0\\)"),
    ],
)
def test_what_no_layer_can_do_is_refused(asked: dict[str, Any], words: str) -> None:
    """By rule and value."""
    with pytest.raises(PlanError, match=words):
        _plan(**asked)
