"""The cheapest recompute and offload on pipelines small enough to see why."""

from __future__ import annotations

from typing import Any

import attrs
import pytest

from picotron.errors import PlanError
from picotron.planner.cluster import ClusterSpec
from picotron.planner.memory import memory_timeline
from picotron.planner.model import ModelSpec
from picotron.planner.plan import TrainingPlan, plan
from picotron.planner.predict import predict
from picotron.planner.recompute import MODES
from picotron.planner.recompute_choice import choose_recompute, least
from picotron.planner.recompute_counts import MAX_STATES
from picotron.planner.recompute_options import OPTIONS, rank_options
from picotron.planner.workload import Workload

MIB = 2**20
STAYS = tuple((mode, False) for mode in MODES)  # without offload


def _plan(pp: int = 2, *, layers: int = 8, **asked: Any) -> TrainingPlan:
    config = {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    cluster = ClusterSpec.preset("h100", devices_per_node=pp)
    work = Workload(global_batch=4, seq_len=2048)
    return plan(ModelSpec.from_hf(config), cluster, work, pp=pp, **asked)


def _peaks(made: TrainingPlan) -> tuple[int, ...]:
    return tuple(memory_timeline(made, rank).max_bytes for rank in range(made.topology.pp))


def test_what_fits_is_left_alone() -> None:
    """A budget of the peak itself costs nothing."""
    made = _plan()
    found = choose_recompute(made, max(_peaks(made)))
    assert found.plan == made
    assert found.added_seconds == (0.0, 0.0)
    assert found.peak_bytes == _peaks(made)


def test_earlier_stages_recompute_more() -> None:
    """Of a 1F1B pipeline the first rank has most microbatches in flight; the peaks are the plan's own."""
    made = _plan(4)
    found = choose_recompute(made, 3 * max(_peaks(made)) // 4, STAYS)
    full = [found.plan.recompute[first : first + 2].count("full") for first in range(0, 8, 2)]
    assert full == sorted(full, reverse=True) and full[0] > full[2]
    assert found.peak_bytes == _peaks(found.plan)
    assert max(found.peak_bytes) <= 3 * max(_peaks(made)) // 4
    assert found.added_seconds[0] >= found.added_seconds[3]


def test_the_cheaper_of_two_ways_is_taken() -> None:
    """A few bytes too many: the attention core of one layer runs again, not a whole layer."""
    made = _plan(1)
    budget = max(_peaks(made)) - 1
    found = choose_recompute(made, budget, STAYS)
    assert sorted(found.plan.recompute) == ["none"] * 7 + ["selective"]
    assert predict(found.plan).step_seconds > predict(made).step_seconds


def test_a_copy_that_hides_is_free() -> None:
    """With a host so near that copies end before the layer nothing is recomputed; with one afar, no copy."""
    made = _plan(1)
    device = made.cluster.device
    near, far = (
        attrs.evolve(
            made, cluster=attrs.evolve(made.cluster, device=attrs.evolve(device, host_bytes_per_second=rate))
        )
        for rate in (1e15, 1e6)
    )
    budget = 4 * max(_peaks(made)) // 5
    hidden, shown = choose_recompute(near, budget), choose_recompute(far, budget)
    assert hidden.added_seconds == (0.0,) and any(hidden.plan.offload)
    assert not any(shown.plan.offload) and shown.added_seconds[0] > 0


def test_what_fits_nowhere_is_told() -> None:
    """Which rank lacks how much, with what, and what would help; by what always stands or by what moves."""
    made = _plan(2)
    with pytest.raises(
        PlanError, match=r"got 1,000: pipeline rank 0 lacks [\d,]+ bytes even with .*raise tp, pp"
    ):
        choose_recompute(made, 1000)
    smallest = choose_recompute(made, max(_peaks(made)), OPTIONS[-1:])
    standing = max(smallest.peak_bytes) - 1
    with pytest.raises(
        PlanError, match=r"lacks 1 bytes even with full recompute and offload of all .*lower micro_batch"
    ):
        choose_recompute(made, standing, OPTIONS[-1:])


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"budget_bytes": 0}, "budget_bytes must be a whole number of at least 1, got 0"),
        ({"budget_bytes": 1.5e9}, "budget_bytes must be a whole number of at least 1, got 1500000000.0"),
        ({"budget_bytes": MIB, "options": ()}, "options must be some of"),
        ({"budget_bytes": MIB, "options": (("half", False),)}, "options must be some of"),
    ],
)
def test_nonsense_is_refused(asked: dict[str, Any], words: str) -> None:
    """By rule and value."""
    with pytest.raises(PlanError, match=words):
        choose_recompute(_plan(), **asked)


def test_a_search_that_grows_too_large_settles_for_two_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """It still fits, costs no less, and takes no more than two options."""
    assert MAX_STATES > 10_000
    rank = rank_options(_plan(1), 0)
    budget = 2 * rank.peak_bytes([0] * 8) // 3
    best = least(rank, budget)
    monkeypatch.setattr("picotron.planner.recompute_counts.MAX_STATES", 3)
    found = least(rank, budget)
    assert best is not None and found is not None
    assert rank.peak_bytes(found) <= budget and len(set(found)) <= 2
    assert rank.added_seconds(found) >= rank.added_seconds(best) > 0
