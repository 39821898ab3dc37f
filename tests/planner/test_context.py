"""Sequences that several ranks share: who has which tokens, what may be asked for, what goes between them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from picotron.errors import PlanError
from picotron.planner.body import WAIT
from picotron.planner.cluster import ClusterSpec
from picotron.planner.context import CONTEXTS, ContextParallel, token_positions
from picotron.planner.model import ModelSpec
from picotron.planner.plan import TrainingPlan, plan
from picotron.planner.segment_costs import CollectiveCost, SegmentCost
from picotron.planner.serialize import plan_from_json, plan_to_json
from picotron.planner.what_if import changed
from picotron.planner.workload import Workload


def made(
    cp: int, *, heads: int = 4, kv_heads: int = 4, seq_len: int = 48, tp: int = 1, **asked: Any
) -> TrainingPlan:
    """A small llama with heads of 2 elements on ``cp * tp`` CPU ranks, in fp32."""
    config = {
        "model_type": "llama",
        "vocab_size": 16,
        "hidden_size": 8,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 2,
        "max_position_embeddings": 64,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
    cluster = ClusterSpec.preset("cpu", devices_per_node=cp * tp)
    work = Workload(global_batch=2, seq_len=seq_len, precision="fp32")
    return plan(ModelSpec.from_hf(config), cluster, work, dp=1, cp=cp, tp=tp, **asked)


def payloads(plan: TrainingPlan, phase: str) -> list[int]:
    """What one layer's attention sends over cp, in elements, in order."""
    segment = next(s for s in getattr(plan.bodies(0), phase).segments if s.name.startswith("attention"))
    return [step.payload_bytes // 4 for step in segment.collectives if step.group == "cp"]


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("cp", [1, 2, 3, 4])
def test_ranks_have_each_token_once_in_order(cp: int, context: ContextParallel) -> None:
    """A partition of the sequence in equal, ascending parts."""
    parts = [token_positions(24, cp, index, context) for index in range(cp)]
    assert sorted(np.concatenate(parts).tolist()) == list(range(24))
    assert all(len(part) == 24 // cp and (np.diff(part) > 0).all() for part in parts)


def test_zigzag_gives_every_rank_as_many_scores() -> None:
    """Chunks r and 2 * cp - 1 - r: what they see of the past is the same number of chunks on every rank."""
    for cp in (2, 3, 4):
        seen = [int((token_positions(24, cp, index, "ring") + 1).sum()) for index in range(cp)]
        assert len(set(seen)) == 1
    assert token_positions(8, 2, 0, "ring").tolist() == [0, 1, 6, 7]
    assert token_positions(8, 2, 1, "all_to_all").tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"cp": 2, "context": "spiral"}, "context must be one of ring, all_to_all, got 'spiral'"),
        ({"cp": 1, "context": "all_to_all"}, "context=all_to_all needs cp > 1, got cp=1; leave it out"),
        ({"cp": 5, "seq_len": 20, "context": "all_to_all"}, "cp to divide the 4 query heads of a tensor"),
        ({"cp": 4, "tp": 2, "context": "all_to_all"}, "cp to divide the 2 query heads of a tensor-parallel"),
        (
            {"cp": 4, "heads": 12, "kv_heads": 6, "context": "all_to_all"},
            "cp to divide the 6 key/value heads of a tensor-parallel rank or be a multiple of them, got cp=4",
        ),
        ({"cp": 4, "seq_len": 6, "context": "all_to_all"}, "cp must divide seq_len 6, got cp=4"),
        ({"cp": 4, "seq_len": 12, "context": "ring"}, "2 * cp must divide seq_len 12, got cp=4"),
    ],
)
def test_what_cannot_be_cut_is_refused(asked: dict[str, Any], message: str) -> None:
    """By its rule, before anything runs."""
    with pytest.raises(PlanError) as refused:
        made(**asked)
    assert message in str(refused.value)


def test_left_out_it_is_a_ring_where_a_ring_can_be() -> None:
    """Else heads are sent, where they can be cut; and the plan says why."""
    assert made(2).context == "ring"
    assert made(4, seq_len=12).context == "all_to_all"
    assert "context=all_to_all: ring, but where cp alone divides seq_len" in made(4, seq_len=12).chosen[0]
    assert made(1).chosen == ()
    with pytest.raises(PlanError, match="cp must divide seq_len 15, got cp=5: each rank of a ring"):
        made(5, seq_len=15)


def test_a_plan_keeps_it_and_old_files_are_rings() -> None:
    """Round trip through JSON; a file without the field is read as a ring."""
    for context in CONTEXTS:
        kept = made(2, context=context)
        assert plan_from_json(plan_to_json(kept)) == kept
    old = plan_to_json(made(2, context="ring")).replace('  "context": "ring",\n', "")
    assert 'context"' not in old
    assert plan_from_json(old).context == "ring"


def test_what_if_keeps_it_where_it_fits() -> None:
    """With other heads a rank it is chosen again."""
    base = made(2, context="all_to_all")
    other, _ = changed(base, {"micro_batch": 2})
    assert other.context == "all_to_all"
    assert changed(base, {"context": "ring"})[0].context == "ring"
    assert changed(base, {"cp": 1}, ClusterSpec.preset("cpu", devices_per_node=1))[0].context == "ring"


@pytest.mark.parametrize("cp", [2, 3, 4, 6])
def test_a_ring_sends_keys_and_values_three_times(cp: int) -> None:
    """Once forward and twice backward, to cp - 1 others: with 2 of 4 heads, 2 * 2 * 2 elements a token."""
    block = 48 // cp * 2 * 2 * 2
    ring = made(cp, kv_heads=2)
    assert payloads(ring, "forward") == [block] * (cp - 1)
    assert sum(payloads(ring, "backward")) == 2 * (cp - 1) * block
    assert len(payloads(ring, "backward")) == cp + (cp > 2)


@pytest.mark.parametrize(("cp", "kv_heads", "sent"), [(2, 4, 4), (2, 2, 2), (4, 2, 4), (4, 1, 4)])
def test_heads_are_sent_once_for_each_rank_that_needs_them(cp: int, kv_heads: int, sent: int) -> None:
    """Queries, keys and values there and the context back; in backward their gradients, the other way."""
    by_head = made(cp, kv_heads=kv_heads, context="all_to_all")
    tokens = 48 // cp
    there, back = tokens * 2 * (4 + 2 * sent), tokens * 2 * 4
    assert payloads(by_head, "forward") == [there, back]
    assert payloads(by_head, "backward") == [back, there]


def test_both_multiply_as_one_rank_does() -> None:
    """FLOPs of all ranks together, forward and backward."""
    alone = made(1).bodies(0)
    for context in CONTEXTS:
        shared = made(4, context=context).bodies(0)
        assert 4 * shared.forward.flops == alone.forward.flops
        assert 4 * shared.backward.flops == alone.backward.flops


def test_a_ring_computes_while_blocks_are_on_their_way() -> None:
    """Between the start of each exchange and its end stands a product; the last hop home has none."""
    for phase in ("forward", "backward"):
        steps = next(
            s for s in getattr(made(4).bodies(0), phase).segments if s.name.startswith("attention")
        ).operations
        starts = [index for index, step in enumerate(steps) if step.asynchronous]
        for start in starts:
            end = next(index for index in range(start, len(steps)) if steps[index].kind == WAIT)
            assert any(step.kind == "attention" for step in steps[start:end])
        assert len(starts) == (3 if phase == "forward" else 4)


def test_what_is_hidden_is_not_waited_for() -> None:
    """Of 3 s computing hides 1: 2 are waited for. A blocking exchange after that is waited for in full."""
    hop = CollectiveCost(kind="exchange", group="cp", payload_bytes=4, seconds=3.0, asynchronous=True)
    end = CollectiveCost(kind=WAIT, group="cp", payload_bytes=0, seconds=0.0)
    last = CollectiveCost(kind="exchange", group="cp", payload_bytes=4, seconds=0.5)
    cost = SegmentCost(compute=(1.0, 1.0, 4.0, 0.0), collectives=(hop, end, last))
    assert cost.exposed == (0.0, 2.0, 0.5)
    assert (cost.seconds, cost.transfer_seconds) == (8.5, 3.5)
    hidden = SegmentCost(compute=(1.0, 4.0, 0.0), collectives=(hop, end))
    assert (hidden.exposed, hidden.seconds) == ((0.0, 0.0), 5.0)
