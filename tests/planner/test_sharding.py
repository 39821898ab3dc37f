"""ZeRO by hand: who keeps which part, and what a step exchanges."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import attrs
import pytest

from picotron.errors import PlanError
from picotron.planner.body import CATEGORIES, segment_memory
from picotron.planner.cluster import ClusterSpec
from picotron.planner.collectives import wire_bytes
from picotron.planner.memory import memory_timeline, static_bytes
from picotron.planner.model import ModelSpec
from picotron.planner.plan import TrainingPlan, plan
from picotron.planner.predict import predict
from picotron.planner.program import Kind, payload_bytes, rows
from picotron.planner.sharding import Sharding
from picotron.planner.topology import Coordinate, Topology, groups, rank_of
from picotron.planner.torch_csv import orders_from_program_csv, program_to_csv
from picotron.planner.workload import Workload
from tests.planner.test_recompute import TWO_LAYERS

SHAPES = {  # elements of each of the 20 tensors, by how many there are
    8 * 4: 2,  # embedding, head
    4: 5,  # norms
    4 * 4: 4,  # q, o
    2 * 4: 4,  # k, v
    6 * 4: 6,  # gate, up, down
}  # fmt: skip
NUMEL = sum(size * count for size, count in SHAPES.items())
VECTORS = 5 * 4  # norms, which no rank shares
MATRICES = NUMEL - VECTORS


def _plan(dp: int = 3, *, batch: int = 1, precision: str = "fp32", **asked: Any) -> TrainingPlan:
    return plan(
        ModelSpec.from_hf(TWO_LAYERS),
        ClusterSpec.preset("cpu", devices_per_node=dp * asked.get("pp", 1)),
        Workload(global_batch=dp * batch, seq_len=4, precision=precision),
        dp=dp,
        **asked,
    )


def _text(made: TrainingPlan) -> str:
    own = rows(made.program(), 0)
    return " ".join(f"WAIT({own[row.target]})" if row.kind is Kind.WAIT else str(row) for row in own)


def test_each_stage_shards_one_thing_more() -> None:
    """A third of the matrices, padded once: 304 elements are 102. Under ZeRO-3 each unit has a buffer."""
    part, counter = VECTORS + -(-MATRICES // 3), 4
    whole = VECTORS + 3 * -(-MATRICES // 3)
    units = VECTORS + 2 * -(-32 // 3) + 2 * -(-120 // 3)  # two tables, two layers
    found = [static_bytes(_plan(zero_stage=stage), Coordinate()) for stage in range(4)]
    assert [own["optimizer"] for own in found] == [8 * size + counter for size in (NUMEL, part, part, units)]
    assert [own["gradients"] for own in found] == [4 * size for size in (NUMEL, whole, part, units)]
    assert [own["parameters"] for own in found] == [4 * size for size in (NUMEL, whole, whole, units)]


def test_fewer_ranks_share_a_copy() -> None:
    """Of four ranks 0 and 1 share, and 2 and 3, half of each matrix; copies are on 0 and 2, and 1 and 3."""
    made = _plan(4, zero_stage=3, shard=2)
    assert static_bytes(made, Coordinate())["parameters"] == 4 * (VECTORS + MATRICES // 2)
    assert groups(made.topology, "dp_cp:2") == ((0, 1), (2, 3))
    assert groups(made.topology, "dp_cp/2") == ((0, 2), (1, 3))
    sums = {tuple(exchange.group for exchange in own) for own in made.bucket_sums(0)}
    assert sums == {("dp_cp:2", "dp_cp/2"), ("dp_cp",)}


def test_experts_are_shared_by_their_own_copies() -> None:
    """Eight ranks with experts over two: four copies each, in as many runs as the others' (two)."""
    topology = Topology(dp=8, ep=2)
    whole, half = (Sharding(topology=topology, zero_stage=1, shard=shard) for shard in (8, 4))
    assert [whole.size(group) for group in ("dp_cp", "edp")] == [8, 4]
    assert [half.within(group) for group in ("dp_cp", "edp")] == ["dp_cp:4", "edp:2"]
    assert groups(topology, "edp:2") == ((0, 2), (4, 6), (1, 3), (5, 7))
    assert groups(topology, "edp/2") == ((0, 4), (2, 6), (1, 5), (3, 7))


def test_optimizer_state_is_sharded_by_two_halves_of_an_all_reduce() -> None:
    """Reduce-scatter before the update and all-gather after it send as much as the all-reduce did."""
    plain, sharded = (_plan(4, zero_stage=stage, bucket_bytes=2**20) for stage in (0, 1))
    assert _text(sharded) == (
        "0COUNT 0F0 0B0 0REDUCE0 0REDUCE_SCATTER1 WAIT(0REDUCE0) WAIT(0REDUCE_SCATTER1) NORM UPDATE "
        "0ALL_GATHER1 WAIT(0ALL_GATHER1)"
    )
    before, after = (payload_bytes(made.program(), 0) for made in (plain, sharded))
    halves = [("reduce_scatter", "dp_cp"), ("all_gather", "dp_cp")]
    assert [after[half] for half in halves] == [4 * MATRICES] * 2
    sent = sum(wire_bytes(half[0], after[half], 4) for half in halves)
    vectors = after["all_reduce", "dp_cp"]
    assert sent + wire_bytes("all_reduce", vectors - 8, 4) == wire_bytes(
        "all_reduce", before["all_reduce", "dp_cp"] - 8, 4
    )


def test_gathered_parameters_have_their_own_format() -> None:
    """bf16 parameters are half of their fp32 gradients."""
    totals = payload_bytes(_plan(4, zero_stage=1, precision="bf16").program(), 0)
    assert totals["reduce_scatter", "dp_cp"] == 2 * totals["all_gather", "dp_cp"]


def test_gradients_are_reduced_in_every_microbatch() -> None:
    """Each is over before the next B begins; the optimizer finds this rank's part."""
    made = _plan(4, batch=2, zero_stage=2, bucket_bytes=2**20)
    assert _text(made) == (
        "0COUNT 0F0 0B0 0REDUCE_SCATTER1 0F1 WAIT(0REDUCE_SCATTER1) 0B1 0REDUCE0 0REDUCE_SCATTER1 "
        "WAIT(0REDUCE0) WAIT(0REDUCE_SCATTER1) NORM UPDATE 0ALL_GATHER1 WAIT(0ALL_GATHER1)"
    )
    (filling,) = made.variant(0).fillings
    assert (filling.bytes, filling.first, filling.last) == (4 * MATRICES, 5, None)


def test_full_gradients_are_reduced_once() -> None:
    """Accumulated without communication, as under ZeRO-1: less is sent, and more stands."""
    sharded, full = (
        _plan(4, batch=2, zero_stage=2, bucket_bytes=2**20, accumulate=how) for how in (None, "full")
    )
    assert _text(full) == _text(_plan(4, batch=2, zero_stage=1, bucket_bytes=2**20))
    payloads = [payload_bytes(made.program(), 0)["reduce_scatter", "dp_cp"] for made in (sharded, full)]
    assert payloads == [2 * 4 * MATRICES, 4 * MATRICES]
    gradients = [static_bytes(made, Coordinate())["gradients"] for made in (sharded, full)]
    assert gradients == [4 * (VECTORS + MATRICES // 4), 4 * NUMEL]


def test_two_segments_stand_while_gradients_are_reduced() -> None:
    """One's buckets fill while those of the one before travel; the wait for these is inside the B."""
    made = _plan(4, zero_stage=2, bucket_bytes=1)
    head, mlp, attention, embedding = (4 * size for size in (32, 72, 48, 32))
    timeline, standing = memory_timeline(made, 0), sum(static_bytes(made, Coordinate()).values())
    own = rows(made.program(), 0)
    begin = [own[row].kind is Kind.BACKWARD for row in timeline.row.tolist()].index(True)
    activations = memory_timeline(_plan(4, zero_stage=1, bucket_bytes=1), 0)
    plain = sum(static_bytes(_plan(4, zero_stage=1), Coordinate()).values())
    buffers = (timeline.live_bytes[begin : begin + 7] - standing) - (
        activations.live_bytes[begin : begin + 7] - plain
    )
    peaks = (timeline.peak_bytes[begin : begin + 6] - standing) - (
        activations.peak_bytes[begin : begin + 6] - plain
    )
    two = [head, head + mlp, mlp + attention, attention + mlp, mlp + attention, attention + embedding]
    assert peaks.tolist() == two
    assert buffers.tolist() == [*two, embedding]
    inside = [row for row in own if row.kind is Kind.WAIT and row.anchor_row >= 0]
    assert [own[row.target].part for row in inside] == [
        bucket.index for bucket in made.stage_buckets[0] if made.is_scattered(bucket) and bucket.ready_segment
    ]
    assert memory_timeline(made, 0).live_bytes[-1] == standing


def test_parameters_are_gathered_beside_each_f_and_b() -> None:
    """One row for all units, two of which stand at a time; vectors stand always."""
    made = _plan(4, zero_stage=3, bucket_bytes=2**20)
    assert _text(made) == (
        "0COUNT 0UNSHARD 0F0 WAIT(0UNSHARD) 0RESHARD 0UNSHARD 0B0 0REDUCE_SCATTER0 0REDUCE_SCATTER1 0REDUCE2 "
        "0REDUCE_SCATTER3 0REDUCE_SCATTER4 WAIT(0UNSHARD) 0RESHARD WAIT(0REDUCE_SCATTER0) "
        "WAIT(0REDUCE_SCATTER1) WAIT(0REDUCE2) WAIT(0REDUCE_SCATTER3) WAIT(0REDUCE_SCATTER4) NORM UPDATE"
    )
    assert payload_bytes(made.program(), 0)["all_gather", "dp_cp"] == 2 * 4 * MATRICES
    units = [4 * size for size in (8 * 4, *[2 * 16 + 2 * 8 + 3 * 24] * 2, 8 * 4)]
    assert made.gathered_bytes(0, "dp_cp") == tuple(units)
    ahead = [sum(pair) for pair in pairwise(units)]
    seen, level = [], units[0]  # the row itself makes the first one's memory
    for segment in made.bodies(0).forward.segments:
        left, highest = (own[CATEGORIES.index("parameters")] for own in segment_memory(segment))
        seen.append(level + highest)
        level += left
    assert seen == [ahead[0], ahead[1], ahead[1], ahead[2], ahead[2], units[3]]
    peak = dict(memory_timeline(made, 0).peak_by_category)["parameters"]
    assert peak - 4 * (VECTORS + MATRICES // 4) == max(ahead)


def test_a_stage_may_stay_gathered() -> None:
    """While consecutive cells use it: once for F and B of a microbatch, all of it at a time."""
    made = _plan(4, batch=2, zero_stage=3, bucket_bytes=2**20, reshard="stage")
    gathered = [row.bytes for row in rows(made.program(), 0) if row.kind is Kind.UNSHARD]
    assert gathered == [4 * MATRICES]
    peak = dict(memory_timeline(made, 0).peak_by_category)["parameters"]
    assert peak == 4 * (VECTORS + MATRICES // 4) + 4 * MATRICES


def test_torch_reads_the_gathering_too() -> None:
    """As its own text has it: a stage gathered before each F and B, and freed after."""
    text = program_to_csv(_plan(4, zero_stage=3).program())
    assert text == "0UNSHARD,0F0,0RESHARD,0UNSHARD,0B0,0REDUCE_GRAD,0RESHARD\n"
    assert [str(action) for own in orders_from_program_csv(text) for action in own] == ["0F0", "0B0"]


def test_one_rank_shards_nothing() -> None:
    """Over one rank, or with a shard of one, the plan does what it does without."""
    assert _plan(1, zero_stage=3).program() == _plan(1).program()
    assert _plan(2, zero_stage=3, shard=1).program() == _plan(2).program()


def test_what_is_exchanged_takes_time() -> None:
    """Over slow links more reductions take longer, and gathering beside all computing longer still."""
    seconds = []
    for stage in range(4):
        made = _plan(4, batch=4, zero_stage=stage)
        slow = attrs.evolve(made.cluster.intra_node, bytes_per_second=1e6)
        made = attrs.evolve(made, cluster=attrs.evolve(made.cluster, intra_node=slow))
        seconds.append(predict(made).step_seconds)
    assert seconds[1] < seconds[2] < seconds[3]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"zero_stage": 4}, "zero_stage must be at most 3, got 4"),
        ({"zero_stage": "1"}, "zero_stage must be a whole number of at least 0, got '1'"),
        (
            {"zero_stage": 1, "shard": 2},
            "shard must divide the dp \\* cp = 3 data-parallel ranks, got 2; try 1, 3",
        ),
        ({"accumulate": "some", "zero_stage": 2}, "accumulate must be one of full, sharded, got 'some'"),
        ({"accumulate": "full", "zero_stage": 1}, "accumulate needs a zero_stage of 2 or 3"),
        ({"reshard": "layer", "zero_stage": 3}, "reshard must be one of unit, stage, got 'layer'"),
        ({"reshard": "unit", "zero_stage": 2}, "reshard needs a zero_stage of 3"),
        ({"shard": 3}, "shard needs a zero_stage of 1, 2 or 3, got shard=3 with zero_stage=0"),
    ],
)
def test_what_cannot_be_shared_is_refused(asked: dict[str, Any], words: str) -> None:
    """By rule, value and remedy."""
    with pytest.raises(PlanError, match=words):
        _plan(**asked)


def test_too_many_reductions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every bucket in every microbatch may be more rows than can be kept."""
    monkeypatch.setattr("picotron.planner.reductions.MAX_REDUCTIONS", 10)
    with pytest.raises(PlanError, match="at most 10 rows, got more; raise bucket_bytes"):
        _plan(2, batch=4, zero_stage=2, bucket_bytes=1).program()


def test_buffers_of_one_stage_stand_at_a_time() -> None:
    """One microbatch through eight stages of a rank: full gradients are gone before the next stage's."""
    made = plan(
        ModelSpec.from_hf("llama-3.2-1b"),
        ClusterSpec.preset("h100", devices_per_node=4),
        Workload(global_batch=2, seq_len=128),
        dp=2,
        pp=2,
        schedule="interleaved",
        virtual_stages=8,
        zero_stage=2,
    )
    rank = rank_of(made.topology, Coordinate(pp=1))
    standing = static_bytes(made, Coordinate(pp=1))["gradients"]
    buffers = [sum(f.bytes for f in made.variant(stage).fillings) for stage in made.rank_stages(1)]
    peak = dict(memory_timeline(made, rank).peak_by_category)["gradients"]
    assert peak <= standing + max(buffers) < standing + sum(buffers)
