"""Steps with slow and pausing parts, where pen and paper suffice."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from attrs import evolve

from picotron.errors import PlanError
from picotron.planner.cluster import ClusterSpec
from picotron.planner.cost import CollectiveCost, SegmentCost, StageCost
from picotron.planner.faults import Corrupt, Drop, Fault, Kill, OutOfMemory, Pause, Slow
from picotron.planner.model import ModelSpec
from picotron.planner.plan import TrainingPlan, plan
from picotron.planner.predict import predict
from picotron.planner.program import Kind, rows
from picotron.planner.simulate import (
    Durations,
    SimulatedStep,
    durations,
    pipeline_timeline,
    priced_step,
    simulate_step,
    slices,
    summed,
)
from picotron.planner.topology import coordinate
from picotron.planner.workload import Workload

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 12,
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
MIXTRAL = LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}


def _plan(devices: int, *, batch: int = 12, config: dict[str, Any] = LLAMA, **asked: Any) -> TrainingPlan:
    return plan(
        ModelSpec.from_hf(config),
        ClusterSpec.preset("cpu", devices_per_node=devices),
        Workload(global_batch=batch, seq_len=4, precision="fp32"),
        sequence_parallel=False,
        **asked,
    )


def _one_microbatch(devices: int, dp: int = 1, **asked: Any) -> TrainingPlan:
    return _plan(devices, batch=dp, dp=dp, **asked)


def _round(made: TrainingPlan, *, send: float = 0.0, reduce: float = 0.0, inside: float = 0.0) -> Durations:
    """F takes 1 s and B 2 s, in the first stretch of their first segment; the update takes nothing."""

    def costs(segments: tuple[SegmentCost, ...], seconds: float) -> tuple[SegmentCost, ...]:
        def free(collective: CollectiveCost) -> CollectiveCost:
            return evolve(collective, seconds=inside)

        first = [seconds if index == 0 else 0.0 for index in range(len(segments))]
        return tuple(
            SegmentCost(
                compute=(own, *[0.0] * len(segment.collectives)),
                collectives=map(free, segment.collectives),
            )
            for own, segment in zip(first, segments, strict=True)
        )

    stages = [
        StageCost(forward=costs(stage.forward, 1.0), backward=costs(stage.backward, 2.0), update_seconds=0.0)
        for stage in durations(made).stages
    ]
    sums = {key: reduce if key[0] == "dp_cp" and key[1] > 8 else 0.0 for key in summed(made.program())}
    return Durations(stages=tuple(stages), send_seconds=send, reduce_seconds=sums)


def _step(made: TrainingPlan, *faults: Fault, **prices: float) -> SimulatedStep:
    return priced_step(made, faults, {0: _round(made, **prices)})


def _row(step: SimulatedStep, rank: int, name: str) -> tuple[float, float]:
    """Start and end of the only row of that name."""
    where, timeline = coordinate(step.plan.topology, rank), step.rank_timeline(rank)
    names = [str(row) for row in rows(step.plan.program(where.tp), where.pp)]
    return float(timeline.start[names.index(name)]), float(timeline.end[names.index(name)])


def test_a_slow_rank_holds_up_its_tensor_group_and_then_all() -> None:
    """Twice as slow, F ends at 2 s on rank 0, and on rank 1 which comes to the same collectives; not on 2."""
    step = _step(_one_microbatch(4, dp=2, tp=2), Slow(rank=0, factor=2.0))
    assert [_row(step, rank, "0F0")[1] for rank in range(4)] == [2, 2, 1, 1]
    assert [_row(step, rank, "NORM") for rank in range(4)] == [(6, 6)] * 4
    assert step.step_seconds == 6
    assert step.compute_seconds == (6, 3, 3, 3)
    assert step.idle_seconds == (0, 3, 3, 3)


def test_a_faster_rank_waits() -> None:
    """Half the computing on rank 0 changes nothing but its idling."""
    step = _step(_one_microbatch(2, dp=2), Slow(rank=0, factor=0.5))
    assert (_row(step, 0, "0F0"), _row(step, 1, "0F0")) == ((0, 0.5), (0, 1))
    assert step.step_seconds == 3
    assert step.idle_seconds == (1.5, 0)


def test_factors_of_one_rank_multiply() -> None:
    """Slow twice: 2 * 1.5 = 3 times as long."""
    step = _step(_one_microbatch(1), Slow(rank=0, factor=2.0), Slow(rank=0, factor=1.5))
    assert step.step_seconds == 9


def test_a_slow_link_between_stages_holds_up_its_pipeline() -> None:
    """pp 2, dp 2, transfers of 1 s: 0 and 2 take 3 s each way, so that their step ends at 12 s, not 8."""
    made = _one_microbatch(4, dp=2, pp=2)
    step = _step(made, Slow(link=(2, 0), factor=3.0), send=1.0)
    assert (_row(step, 0, "0SEND_F0"), _row(step, 1, "0SEND_F0")) == ((1, 4), (1, 2))
    assert (_row(step, 0, "0RECV_B0"), _row(step, 1, "0RECV_B0")) == ((7, 10), (5, 6))
    assert step.step_seconds == 12
    assert _step(made, send=1.0).step_seconds == 8


def test_a_slow_link_slows_every_group_with_both_its_ranks() -> None:
    """dp 2, tp 2: ranks 0 and 2 share a dp_cp group, ranks 0 and 3 only the world, whose sum is free."""
    made = _one_microbatch(4, dp=2, tp=2, bucket_bytes=2**40)
    healthy = _step(made, reduce=1.0)
    assert healthy.step_seconds == pytest.approx(3 + 1 * _num_sums(made))
    step = _step(made, Slow(link=(0, 2), factor=3.0), reduce=1.0)
    assert step.step_seconds == pytest.approx(3 + 3 * _num_sums(made))
    assert _step(made, Slow(link=(0, 3), factor=3.0), reduce=1.0).step_seconds == healthy.step_seconds


def _num_sums(made: TrainingPlan) -> int:
    """Bucket sums over dp_cp, all posted once backward is over."""
    dp_cp = made.program().groups.index("dp_cp")
    return sum(row.kind is Kind.REDUCE and row.group == dp_cp for row in rows(made.program(), 0))


def test_a_pause_delays_its_row() -> None:
    """Before B, rank 1 does nothing from 1 s to 5 s; its partner waits at the end."""
    made = _one_microbatch(2, dp=2)
    backward = [str(row) for row in rows(made.program(), 0)].index("0B0")
    step = _step(made, Pause(rank=1, at=backward, seconds=4.0))
    assert (_row(step, 0, "0B0"), _row(step, 1, "0B0")) == ((1, 3), (5, 7))
    assert step.step_seconds == 7
    assert _step(made, *[Pause(rank=1, at=0, seconds=2.0)] * 2).step_seconds == 7


def test_a_pause_at_a_sum_holds_up_the_rest_of_its_backward() -> None:
    """It strikes where the sum is posted: inside backward, after which another 1 s passes."""
    made = _one_microbatch(2, dp=2)
    sums = [i for i, row in enumerate(rows(made.program(), 0)) if row.kind is Kind.REDUCE]
    step = _step(made, Pause(rank=0, at=sums[0], seconds=1.0))
    assert _row(step, 0, "0B0") == (1, 4)
    assert _row(step, 0, "0REDUCE0") == _row(step, 1, "0REDUCE0") == (4, 4)


def test_a_pause_where_there_is_slack_costs_nothing() -> None:
    """The second stage waits for 1 s anyway before its first row with work."""
    made = _one_microbatch(2, pp=2)
    assert _step(made, Pause(rank=1, at=0, seconds=1.0)).step_seconds == _step(made).step_seconds == 6


def test_ranks_that_nothing_tells_apart_share_a_class() -> None:
    """dp 3, tp 2, rank 0 slow: itself, its neighbour in tp, its two in dp, and the other two."""
    step = simulate_step(_plan(6, dp=3, tp=2), [Slow(rank=0, factor=2.0)])
    assert [step.class_of(rank) for rank in range(6)] == [0, 1, 2, 3, 2, 3]
    assert (step.num_classes, step.classes.ranks, step.classes.sizes) == (4, (0, 1, 2, 3), (1, 1, 2, 2))
    assert simulate_step(_plan(6, dp=3, tp=2)).num_classes == 1


def test_an_uneven_vocabulary_tells_slices_apart() -> None:
    """Eleven words on four ranks: three hold three, the last holds two."""
    made = _plan(4, tp=4, config=LLAMA | {"vocab_size": 11, "num_key_value_heads": 4})
    assert slices(made) == (0, 0, 0, 3)
    step = simulate_step(made)
    assert [step.class_of(rank) for rank in range(4)] == [0, 0, 0, 1]
    assert step.compute_seconds[0] > step.compute_seconds[1]


def test_copies_of_heads_tell_their_holders_apart() -> None:
    """Two key/value heads on four ranks: rank 2 sums their gradients with rank 3, which holds fewer words."""
    step = simulate_step(_plan(4, tp=4, config=LLAMA | {"vocab_size": 11}))
    assert [step.class_of(rank) for rank in range(4)] == [0, 0, 1, 2]


def test_experts_are_told_apart_by_their_own_groups() -> None:
    """dp 4 in two groups of two for the experts: a slow rank's partner in ep differs from the others."""
    made = _plan(4, dp=4, ep=2, config=MIXTRAL)
    step = simulate_step(made, [Slow(rank=0, factor=2.0)])
    assert [step.class_of(rank) for rank in range(4)] == [0, 1, 2, 3]  # 1 in ep, 2 in edp, 3 with neither
    assert simulate_step(made).num_classes == 1


def test_every_rank_has_a_timeline_under_its_own_name() -> None:
    """The rows of its class, which the least rank stands for."""
    step = simulate_step(_plan(6, dp=3, tp=2), [Slow(rank=0, factor=2.0)])
    like, own = step.rank_timeline(3), step.rank_timeline(5)
    assert set(own.rank.tolist()) == {5} and set(like.rank.tolist()) == {3}
    assert np.array_equal(own.start, like.start) and np.array_equal(own.end, like.end)
    assert set(step.timeline.rank.tolist()) == {0, 1, 2, 3}
    for rank in (-1, 6, True, "0"):
        with pytest.raises(PlanError, match=r"rank must be in \[0, 6\)"):
            step.class_of(rank)  # type: ignore[arg-type]


def test_a_prediction_shows_the_first_pipeline() -> None:
    """By pipeline rank, also where the order puts its ranks elsewhere."""
    made = _plan(4, dp=2, pp=2, order=("dp", "cp", "tp", "pp"))
    step = simulate_step(made)
    shown = pipeline_timeline(step)
    assert shown == predict(made).timeline
    assert set(shown.rank.tolist()) == {0, 1}
    assert shown.end.max() == step.step_seconds == predict(made).step_seconds


@pytest.mark.parametrize(
    "fault",
    [
        Kill(rank=0, at=0),
        Corrupt(rank=0, at=0),
        Drop(sender=0, receiver=1, at=0),
        OutOfMemory(rank=0, at_bytes=1),
    ],
)
def test_what_needs_a_run_is_refused_by_name(fault: Fault) -> None:
    """Only time is simulated here."""
    with pytest.raises(PlanError, match=rf"{type(fault).__name__} needs a run: use run\(plan, ..., faults="):
        simulate_step(_plan(2, dp=2), [fault])


def test_places_that_a_step_does_not_have_are_refused() -> None:
    """It is one step, and its ranks have so many rows."""
    made = _plan(2, pp=2)
    last = made.program().offsets[1] - 1
    assert simulate_step(made, [Pause(rank=0, at=last, seconds=1.0)]).step_seconds > 1
    with pytest.raises(PlanError, match=f"rank 0 has rows 0 to {last}, got Pause"):
        simulate_step(made, [Pause(rank=0, at=last + 1, seconds=1.0)])
    with pytest.raises(PlanError, match=r"the step of a fault must be in \[0, 1\), got Pause"):
        simulate_step(made, [Pause(rank=0, at=0, step=1, seconds=1.0)])
    with pytest.raises(PlanError, match=r"the rank of a fault must be in \[0, 2\), got 2"):
        simulate_step(made, [Slow(rank=2, factor=2.0)])


def test_a_step_without_end_is_refused() -> None:
    """The line names what may be wrong."""
    with pytest.raises(PlanError, match=r"between 0 and 1e\+15 seconds, got inf; .* and the faults"):
        simulate_step(_plan(1), [Slow(rank=0, factor=1e308)] * 2)


def test_only_plans_are_simulated() -> None:
    """A model is none."""
    with pytest.raises(PlanError, match="plan must be a TrainingPlan, got dict"):
        simulate_step(LLAMA)  # type: ignore[arg-type]


def test_a_step_of_sixteen_thousand_ranks_takes_no_patience() -> None:
    """One is slow: 4 classes a stage. Seconds on any machine; more than ten are refused here."""
    made = plan(
        ModelSpec.from_hf("llama-3.1-70b"),
        ClusterSpec.preset("h100", nodes=2048),
        Workload(global_batch=128 * 128, seq_len=8192),
        tp=8,
        pp=16,
        dp=128,
    )
    started = time.process_time()
    step = simulate_step(made, [Slow(rank=777, factor=1.5)])
    assert time.process_time() - started < 10
    assert step.num_classes == 4 * 16
    assert step.classes.sizes[step.class_of(777)] == 1
    assert step.compute_seconds[step.class_of(777)] == pytest.approx(1.5 * step.compute_seconds[0])
