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
    """A third of each tensor, padded: 4 elements are 2, 8 are 3, 16 are 6, 24 are 8, 32 are 11."""
    part = sum(-(-size // 3) * count for size, count in SHAPES.items())
    counters = 4 * sum(SHAPES.values())
    found = [static_bytes(_plan(zero_stage=stage), Coordinate()) for stage in range(4)]
    assert [own["optimizer"] for own in found] == [8 * NUMEL + counters] + [8 * part + counters] * 3
    assert [own["gradients"] for own in found] == [4 * NUMEL] * 2 + [4 * part] * 2
    assert [own["parameters"] for own in found] == [4 * NUMEL] * 3 + [4 * part]


def test_fewer_ranks_share_a_copy() -> None:
    """Of four ranks 0 and 1 share, and 2 and 3, half of each tensor; copies are on 0 and 2, and 1 and 3."""
    made = _plan(4, zero_stage=3, shard=2)
    assert static_bytes(made, Coordinate())["parameters"] == 4 * NUMEL // 2
    assert groups(made.topology, "dp_cp:2") == ((0, 1), (2, 3))
    assert groups(made.topology, "dp_cp/2") == ((0, 2), (1, 3))
    (sums,) = {tuple(exchange.group for exchange in own) for own in made.bucket_sums(0)}
    assert sums == ("dp_cp:2", "dp_cp/2")


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
        "0COUNT 0F0 0B0 0REDUCE_SCATTER0 WAIT(0REDUCE_SCATTER0) NORM UPDATE 0ALL_GATHER0 WAIT(0ALL_GATHER0)"
    )
    before, after = (payload_bytes(made.program(), 0) for made in (plain, sharded))
    halves = [("reduce_scatter", "dp_cp"), ("all_gather", "dp_cp")]
    assert [after[half] for half in halves] == [4 * NUMEL] * 2
    sent = sum(wire_bytes(half[0], after[half], 4) for half in halves)
    assert sent == wire_bytes("all_reduce", before["all_reduce", "dp_cp"] - 8, 4)


def test_gathered_parameters_have_their_own_format() -> None:
    """bf16 parameters are half of their fp32 gradients."""
    totals = payload_bytes(_plan(4, zero_stage=1, precision="bf16").program(), 0)
    assert totals["reduce_scatter", "dp_cp"] == 2 * totals["all_gather", "dp_cp"]


def test_gradients_are_reduced_in_every_microbatch() -> None:
    """Each is over before the next B begins; the optimizer finds this rank's part."""
    made = _plan(4, batch=2, zero_stage=2, bucket_bytes=2**20)
    assert _text(made) == (
        "0COUNT 0F0 0B0 0REDUCE_SCATTER0 0F1 WAIT(0REDUCE_SCATTER0) 0B1 0REDUCE_SCATTER0 "
        "WAIT(0REDUCE_SCATTER0) NORM UPDATE 0ALL_GATHER0 WAIT(0ALL_GATHER0)"
    )
    assert made.buffer_bytes(0) == 4 * NUMEL  # one bucket: less than two of the largest


def test_two_buckets_stand_while_gradients_are_reduced() -> None:
    """One fills while the other travels: in B, and until the last one is waited for."""
    made = _plan(4, zero_stage=2, bucket_bytes=1)
    largest = 4 * 8 * 4
    assert made.buffer_bytes(0) == 2 * largest
    timeline, standing = memory_timeline(made, 0), sum(static_bytes(made, Coordinate()).values())
    own = rows(made.program(), 0)
    backward = [own[row].kind is Kind.BACKWARD for row in timeline.row.tolist()].index(True) + 6
    waits = [own[row].kind is Kind.WAIT for row in timeline.row.tolist()].index(True)
    assert (timeline.operation[backward], timeline.live_bytes[backward]) == (-1, standing + 2 * largest)
    assert waits == backward + 1 and len(made.stage_buckets[0]) == 21
    assert timeline.live_bytes[waits : waits + 21].tolist() == [standing + 2 * largest] * 20 + [standing]


def test_parameters_are_gathered_beside_each_f_and_b() -> None:
    """One row for all layers, two of which stand at a time; none is gathered after the update."""
    made = _plan(4, zero_stage=3, bucket_bytes=2**20)
    assert _text(made) == (
        "0COUNT 0UNSHARD 0F0 WAIT(0UNSHARD) 0RESHARD 0UNSHARD 0B0 0REDUCE_SCATTER0 WAIT(0UNSHARD) "
        "0RESHARD WAIT(0REDUCE_SCATTER0) NORM UPDATE"
    )
    assert payload_bytes(made.program(), 0)["all_gather", "dp_cp"] == 2 * 4 * NUMEL
    units = [4 * size for size in (8 * 4, *[2 * 16 + 2 * 8 + 3 * 24 + 2 * 4] * 2, 8 * 4 + 4)]
    assert made.gathered_bytes(0, "dp_cp") == tuple(units)
    ahead = [sum(pair) for pair in pairwise(units)]
    seen, level = [], 0
    for segment in made.bodies(0).forward.segments:
        left, highest = (own[CATEGORIES.index("parameters")] for own in segment_memory(segment))
        seen.append(level + highest)
        level += left
    assert seen == [ahead[0], ahead[1], ahead[1], ahead[2], ahead[2], units[3]]
    peak = dict(memory_timeline(made, 0).peak_by_category)["parameters"]
    assert peak - 4 * NUMEL // 4 == max(ahead)


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
    buffers = [made.buffer_bytes(stage) for stage in made.rank_stages(1)]
    peak = dict(memory_timeline(made, rank).peak_by_category)["gradients"]
    assert peak <= standing + max(buffers) < standing + sum(buffers)
