"""When rows start and end, where pen and paper suffice."""

from __future__ import annotations

import json

import numpy as np
import pytest

from picotron.errors import PlanError
from picotron.planner.catalogue import make_schedule
from picotron.planner.cost import CollectiveCost, SegmentCost, StageCost
from picotron.planner.data import Bucket
from picotron.planner.lower import lower
from picotron.planner.pipeline import Schedule, schedule_from_csv
from picotron.planner.program import Kind, Program, Row, rows
from picotron.planner.schedules import afab, one_f_one_b
from picotron.planner.simulate import Durations, simulate_program
from picotron.planner.timeline import STREAMS, Timeline, bubble_seconds, chrome_trace, make_timeline

FREE = {("dp_cp", 0): 0.0, ("world", 0): 0.0, ("world", 24): 0.0}


def _stage(forward: list[float], backward: list[float], update: float = 0.0) -> StageCost:
    def costs(seconds: list[float]) -> tuple[SegmentCost, ...]:
        return tuple(SegmentCost(compute=(s,)) for s in seconds)

    return StageCost(forward=costs(forward), backward=costs(backward), update_seconds=update)


def _lower(schedule: Schedule, buckets: tuple[Bucket, ...] = (), *, data_parallel: bool = False) -> Program:
    """A program whose last stage alone has buckets, of 16 bytes each."""
    none = ((),) * (schedule.num_stages - 1)
    return lower(
        schedule,
        boundary_bytes=1,
        buckets=(*none, buckets),
        bucket_bytes=(*none, (16,) * len(buckets)),
        data_parallel=data_parallel,
        world_size=schedule.num_ranks,
    )


def _times(timeline: Timeline, program: Program) -> dict[str, tuple[float, float]]:
    """Start and end of every row but WAITs, by its name."""
    return {
        str(rows(program, rank)[row]): (start, end)
        for rank, row, start, end in zip(
            timeline.rank.tolist(),
            timeline.row.tolist(),
            timeline.start.tolist(),
            timeline.end.tolist(),
            strict=True,
        )
        if rows(program, rank)[row].kind is not Kind.WAIT
    }


@pytest.mark.parametrize("name", ["1f1b", "afab"])
@pytest.mark.parametrize(("p", "m"), [(1, 1), (1, 5), (2, 1), (2, 4), (4, 8), (4, 2), (6, 9)])
def test_the_step_of_equal_stages(name: str, p: int, m: int) -> None:
    """(m + p - 1)(f + b) exactly, and a bubble of (p - 1)(f + b) on every rank: (p - 1)/(m + p - 1) of it."""
    f, b = 2.0, 4.5
    schedule, stages = make_schedule(name, p, m), (_stage([f], [b]),) * p
    timeline = simulate_program(
        _lower(schedule), Durations(stages=stages, send_seconds=0.0, reduce_seconds=FREE)
    )
    assert timeline.makespan_seconds == (m + p - 1) * (f + b)
    bubbles = bubble_seconds(schedule, stages)
    assert bubbles == ((p - 1) * (f + b),) * p
    assert bubbles[0] / timeline.makespan_seconds == pytest.approx((p - 1) / (m + p - 1))


def test_a_transfer_delays_the_next_stage() -> None:
    """Two stages, one microbatch, f 1, b 2, transfers 0.5: F F B B with two halves between."""
    program = _lower(one_f_one_b(2, 1))
    seconds = Durations(stages=(_stage([1], [2]),) * 2, send_seconds=0.5, reduce_seconds=FREE)
    assert _times(simulate_program(program, seconds), program) == {
        "0F0": (0, 1), "0SEND_F0": (1, 1.5), "1COUNT": (0, 0), "1RECV_F0": (1, 1.5),
        "1F0": (1.5, 2.5), "1B0": (2.5, 4.5), "1SEND_B0": (4.5, 5), "0RECV_B0": (4.5, 5),
        "0B0": (5, 7), "NORM": (7, 7), "UPDATE": (7, 7),
    }  # fmt: skip


def test_a_transfer_hides_behind_the_next_forward() -> None:
    """Rank 0 computes F1 while F0 travels; rank 1 computes F0 while F1 travels."""
    program = _lower(afab(2, 2))
    seconds = Durations(stages=(_stage([2], [2]),) * 2, send_seconds=1, reduce_seconds=FREE)
    times = _times(simulate_program(program, seconds), program)
    assert (times["0SEND_F0"], times["0F1"], times["0SEND_F1"]) == ((2, 3), (2, 4), (4, 5))
    assert (times["1F0"], times["1F1"]) == ((3, 5), (5, 7))


def test_a_send_starts_only_when_its_receive_is_posted() -> None:
    """Rank 1 computes B0 before it posts the receive of microbatch 2: the third transfer waits for it."""
    program = _lower(one_f_one_b(2, 4))
    seconds = Durations(stages=(_stage([1], [1]), _stage([10], [10])), send_seconds=0.0, reduce_seconds=FREE)
    times = _times(simulate_program(program, seconds), program)
    assert times["1F0"] == (1, 11)
    assert times["0SEND_F1"] == (11, 11)


def test_a_reduction_overlaps_the_rest_of_backward() -> None:
    """Segments of 1, 2 and 3 s backward, last first: a bucket ready after segment 1 travels from 5 s on."""
    bucket = Bucket(stage=0, index=0, names=("w",), partial=("dp_cp",), ready_segment=1)
    program = _lower(one_f_one_b(1, 1), (bucket,), data_parallel=True)
    for seconds, end in ((0.5, 6.0), (4.0, 9.0)):
        costs = Durations(
            stages=(_stage([0.0, 0.0, 0.0], [3.0, 2.0, 1.0]),),
            send_seconds=0.0,
            reduce_seconds=FREE | {("dp_cp", 8): 0.0, ("dp_cp", 16): seconds},
        )
        timeline = simulate_program(program, costs)
        assert _times(timeline, program)["0REDUCE0"] == (5.0, 5.0 + seconds)
        assert timeline.makespan_seconds == end


def test_sums_of_a_group_run_one_after_another() -> None:
    """Two buckets ready at 1 s and 2 s, of 5 s each, share the communicator: 1 to 6 and 6 to 11."""
    buckets = tuple(
        Bucket(stage=0, index=i, names=("w",), partial=("dp_cp",), ready_segment=1 - i) for i in range(2)
    )
    program = _lower(one_f_one_b(1, 1), buckets, data_parallel=True)
    costs = Durations(
        stages=(_stage([0.0, 0.0], [1.0, 1.0], update=2.0),),
        send_seconds=0.0,
        reduce_seconds={("dp_cp", 16): 5.0, ("world", 0): 0.25, ("dp_cp", 8): 0.0},
    )
    times = _times(simulate_program(program, costs), program)
    assert (times["0REDUCE0"], times["0REDUCE1"]) == ((1, 6), (6, 11))
    assert (times["NORM"], times["UPDATE"]) == ((11, 11.25), (11.25, 13.25))


def test_sums_of_two_groups_run_side_by_side() -> None:
    """Ready at 1 s and 2 s, of 5 s each, on communicators of their own: 1 to 6 and 2 to 7."""
    buckets = tuple(
        Bucket(stage=0, index=i, names=("w",), partial=(group,), ready_segment=1 - i)
        for i, group in enumerate(("dp_cp", "edp"))
    )
    program = _lower(one_f_one_b(1, 1), buckets, data_parallel=True)
    costs = Durations(
        stages=(_stage([0.0, 0.0], [1.0, 1.0]),),
        send_seconds=0.0,
        reduce_seconds={("dp_cp", 8): 0.0, ("dp_cp", 16): 5.0, ("edp", 16): 5.0, ("world", 0): 0.0},
    )
    times = _times(simulate_program(program, costs), program)
    assert (times["0REDUCE0"], times["0REDUCE1"]) == ((1, 6), (2, 7))
    assert times["NORM"] == (7, 7)


def _with_collectives(compute: list[float], seconds: float) -> SegmentCost:
    """A segment with a collective over tp of so many seconds between each two stretches."""
    collective = CollectiveCost(kind="all_reduce", group="tp", payload_bytes=4, seconds=seconds)
    return SegmentCost(compute=compute, collectives=[collective] * (len(compute) - 1))


def test_a_body_waits_for_its_collectives() -> None:
    """1 s, a collective of 0.5 s, 2 s; then 4 s: F ends at 7.5 s, B with none of it after 3 s more."""
    stage = StageCost(
        forward=(_with_collectives([1, 2], 0.5), SegmentCost(compute=(4.0,))),
        backward=(SegmentCost(compute=(1.0,)), SegmentCost(compute=(2.0,))),
        update_seconds=0.0,
    )
    program = _lower(one_f_one_b(1, 1))
    seconds = Durations(stages=(stage,), send_seconds=0.0, reduce_seconds=FREE)
    times = _times(simulate_program(program, seconds), program)
    assert (times["0F0"], times["0B0"]) == ((0, 7.5), (7.5, 10.5))


def test_a_collective_of_a_body_runs_behind_a_sum_of_its_group() -> None:
    """A tp sum of 5 s posted at 1 s holds the collective that the next segment comes to at 2 s until 6 s."""
    bucket = Bucket(stage=0, index=0, names=("w",), partial=("tp",), ready_segment=1)
    stage = StageCost(
        forward=(SegmentCost(compute=(0.0,)),) * 2,
        backward=(SegmentCost(compute=(1.0,)), _with_collectives([1, 2], 0.5)),
        update_seconds=0.0,
    )
    program = _lower(one_f_one_b(1, 1), (bucket,))
    seconds = Durations(stages=(stage,), send_seconds=0.0, reduce_seconds=FREE | {("tp", 16): 5.0})
    times = _times(simulate_program(program, seconds), program)
    assert times["0REDUCE0"] == (1, 6)
    assert times["0B0"] == (0, 6.5 + 2)


def test_activations_and_gradients_have_channels_of_their_own() -> None:
    """Two stages a rank, so that each rank sends the other both: neither is taken for the other."""
    schedule = schedule_from_csv("0F0,0F1,2F0,2F1,2B0,0B0,2B1,0B1\n1F0,1F1,3F0,3B0,1B0,3F1,3B1,1B1\n")
    program = _lower(schedule)
    seconds = Durations(stages=(_stage([1], [1]),) * 4, send_seconds=0.0, reduce_seconds=FREE)
    starts = {name: start for name, (start, _) in _times(simulate_program(program, seconds), program).items()}
    assert [starts[str(action)] for action in schedule.orders[0]] == [0, 1, 2, 3, 5, 7, 9, 11]
    assert [starts[str(action)] for action in schedule.orders[1]] == [1, 2, 3, 4, 6, 7, 8, 10]


def test_tied_ends_sum_their_embeddings_together() -> None:
    """The embedding sum of first and last rank starts when the later of them has posted it."""
    ends = tuple(
        (Bucket(stage=stage, index=0, names=("w",), partial=("embedding",), ready_segment=0),)
        for stage in range(2)
    )
    program = lower(
        one_f_one_b(2, 1),
        boundary_bytes=1,
        buckets=ends,
        bucket_bytes=((8,), (8,)),
        data_parallel=False,
        world_size=2,
    )
    reduce = FREE | {("embedding", 8): 3.0}
    seconds = Durations(stages=(_stage([1], [2]),) * 2, send_seconds=0.0, reduce_seconds=reduce)
    times = _times(simulate_program(program, seconds), program)
    assert (times["1B0"], times["0B0"]) == ((2, 4), (4, 6))
    assert times["0REDUCE0"] == times["1REDUCE0"] == (6, 9)
    assert times["NORM"] == (9, 9)


def test_a_sum_of_another_group_overtakes() -> None:
    """The last rank posts the tied sum at 3 s; its second bucket, over dp_cp, does not wait for it."""
    first = (Bucket(stage=0, index=0, names=("w",), partial=("embedding",), ready_segment=0),)
    last = (
        Bucket(stage=1, index=0, names=("w",), partial=("embedding",), ready_segment=1),
        Bucket(stage=1, index=1, names=("v",), partial=("dp_cp",), ready_segment=0),
    )
    program = lower(
        one_f_one_b(2, 1),
        boundary_bytes=1,
        buckets=(first, last),
        bucket_bytes=((8,), (8, 16)),
        data_parallel=False,
        world_size=2,
    )
    reduce = FREE | {("embedding", 8): 3.0, ("dp_cp", 16): 1.0}
    stages = (_stage([1], [2]), _stage([1, 0], [1, 1]))
    times = _times(
        simulate_program(program, Durations(stages=stages, send_seconds=0.0, reduce_seconds=reduce)), program
    )
    assert (times["1B0"], times["0B0"]) == ((2, 4), (4, 6))
    assert times["0REDUCE0"] == times["1REDUCE0"] == (6, 9)
    assert times["1REDUCE1"] == (4, 5)
    assert times["NORM"] == (9, 9)


def test_bubbles_of_unequal_stages() -> None:
    """Stages of f 1, b 1 and f 2, b 2: 0F0, then rank 1's F0 B0 F1 B1, then 0B1 ends at 10; works 4, 8."""
    assert bubble_seconds(one_f_one_b(2, 2), (_stage([1], [1]), _stage([2], [2]))) == (6.0, 2.0)


def test_a_program_that_waits_in_a_circle_is_refused() -> None:
    """A row that waits for one that never ends is named."""
    program = Program(
        groups=("world",),
        offsets=(0, 1),
        **{name: [-1] for name in Row._fields[1:] if name not in ("bytes", "target")},
        kind=[Kind.WAIT],
        bytes=[0],
        target=[0],
    )
    with pytest.raises(PlanError, match="wait for each other at WAIT"):
        simulate_program(program, Durations(stages=(_stage([1], [1]),), send_seconds=0.0, reduce_seconds={}))


def test_chrome_trace() -> None:
    """Names of ranks and streams, and one complete event a row in microseconds."""
    program = _lower(one_f_one_b(2, 1))
    seconds = Durations(stages=(_stage([1], [2]),) * 2, send_seconds=0.5, reduce_seconds=FREE)
    timeline = simulate_program(program, seconds)
    trace = json.loads(chrome_trace(timeline, [rows(program, rank) for rank in range(2)]))
    assert trace["otherData"] == {"clock": "predicted"}
    named = [event["args"]["name"] for event in trace["traceEvents"] if event["ph"] == "M"]
    assert named == ["rank 0", "rank 1", *STREAMS, *STREAMS]
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert len(events) == program.num_rows
    (received,) = [event for event in events if event["name"] == "1RECV_F0"]
    assert received == {
        "ph": "X",
        "name": "1RECV_F0",
        "cat": "RECV_F",
        "pid": 1,
        "tid": STREAMS.index("receive"),
        "ts": 1e6,
        "dur": 0.5e6,
        "args": {"row": 1, "bytes": 1},
    }


def test_timelines_are_ordered_by_rank_and_row() -> None:
    """Whatever the order of events, columns run through rank 0's rows, then rank 1's."""
    program = _lower(one_f_one_b(2, 3))
    seconds = Durations(stages=(_stage([1], [2]),) * 2, send_seconds=0.5, reduce_seconds=FREE)
    timeline = simulate_program(program, seconds)
    assert timeline == simulate_program(program, seconds)
    places = list(zip(timeline.rank.tolist(), timeline.row.tolist(), strict=True))
    assert places == [(rank, row) for rank in range(2) for row in range(len(rows(program, rank)))]
    assert np.all(timeline.end >= timeline.start)


def test_a_timeline_of_entries_is_sorted() -> None:
    """By rank and row, whoever measured first."""
    entries = [(1, 0, -1, 0, 0.0, 1.0), (0, 1, -1, 0, 2.0, 3.0), (0, 0, -1, 3, 0.5, 2.0)]
    timeline = make_timeline("virtual", entries)
    assert timeline.rank.tolist() == [0, 0, 1] and timeline.row.tolist() == [0, 1, 0]
    assert timeline.stream.tolist() == [3, 0, 0] and timeline.makespan_seconds == 3.0
