"""A step lowered to rows, read row by row; and schedules that can never end."""

from __future__ import annotations

import attrs
import numpy as np
import pytest

from picotron.errors import PlanError
from picotron.planner.data import Bucket
from picotron.planner.pipeline import Schedule, schedule_from_csv
from picotron.planner.program import (
    Kind,
    Program,
    Row,
    anchored,
    execution_order,
    lower,
    matching_sends,
    payload_bytes,
    rows,
)
from picotron.planner.schedules import afab, one_f_one_b


def _bucket(stage: int, index: int, partial: tuple[str, ...], ready: int) -> Bucket:
    return Bucket(stage=stage, index=index, names=(f"w{index}",), partial=partial, ready_segment=ready)


def _lower(
    schedule: Schedule,
    buckets: tuple[tuple[Bucket, ...], ...] | None = None,
    sizes: tuple[tuple[int, ...], ...] | None = None,
    *,
    data_parallel: bool = False,
) -> Program:
    buckets = buckets or ((),) * schedule.num_stages
    return lower(
        schedule,
        boundary_bytes=100,
        buckets=buckets,
        bucket_bytes=sizes or ((),) * schedule.num_stages,
        data_parallel=data_parallel,
        world_size=2 if data_parallel else schedule.num_ranks,
    )


def _text(own: tuple[Row, ...]) -> list[str]:
    """Rows as their names; a WAIT with what it waits for."""
    return [f"WAIT {own[row.target]}" if row.kind is Kind.WAIT else str(row) for row in own]


def test_two_stages_two_microbatches_row_by_row() -> None:
    """1F1B on two ranks: a receive stands one action ahead, a send is awaited before the next one."""
    program = _lower(one_f_one_b(2, 2))
    assert _text(rows(program, 0)) == [
        "0F0", "0SEND_F0",
        "0RECV_B0", "0F1", "WAIT 0SEND_F0", "0SEND_F1",
        "0RECV_B1", "WAIT 0RECV_B0", "0B0",
        "WAIT 0RECV_B1", "0B1",
        "WAIT 0SEND_F1", "NORM", "UPDATE",
    ]  # fmt: skip
    assert _text(rows(program, 1)) == [
        "1COUNT", "1RECV_F0",
        "WAIT 1RECV_F0", "1F0",
        "1RECV_F1", "1B0", "1SEND_B0",
        "WAIT 1RECV_F1", "1F1",
        "1B1", "WAIT 1SEND_B0", "1SEND_B1",
        "WAIT 1SEND_B1", "NORM", "UPDATE",
    ]  # fmt: skip


def test_transfers_name_their_peer_and_bytes() -> None:
    """Each send and receive of two ranks is with the other, of the boundary's bytes."""
    program = _lower(one_f_one_b(2, 1))
    found = [
        (str(row), row.peer, row.bytes)
        for rank in range(2)
        for row in rows(program, rank)
        if row.kind in (Kind.SEND_F, Kind.RECV_F, Kind.SEND_B, Kind.RECV_B)
    ]
    assert found == [
        ("0RECV_B0", 1, 100), ("0SEND_F0", 1, 100), ("1RECV_F0", 0, 100), ("1SEND_B0", 0, 100),
    ]  # fmt: skip


def test_each_receive_has_its_send() -> None:
    """Rank 1 receives F of microbatch 1 (row 4) from what rank 0 sends in row 5."""
    program = _lower(one_f_one_b(2, 2))
    assert matching_sends(program) == {(0, 2): (1, 6), (0, 6): (1, 11), (1, 1): (0, 1), (1, 4): (0, 5)}


def test_one_stage_only_computes() -> None:
    """Without neighbours and data parallelism nothing is sent; counting and norm hand over nothing."""
    program = _lower(one_f_one_b(1, 2))
    own = rows(program, 0)
    assert _text(own) == ["0COUNT", "0F0", "0B0", "0F1", "0B1", "NORM", "UPDATE"]
    assert sum(row.bytes for row in own) == 0
    assert payload_bytes(program, 0) == {}


def test_the_last_stage_counts_tokens_first_and_all_share_the_norm() -> None:
    """COUNT sums 8 bytes over dp_cp on the last rank only; NORM sums three fp64 over the world."""
    program = _lower(afab(2, 1), data_parallel=True)
    assert [row.kind for row in rows(program, 0)].count(Kind.COUNT) == 0
    first = rows(program, 1)[0]
    assert (first.kind, program.groups[first.group], first.bytes) == (Kind.COUNT, "dp_cp", 8)
    for rank in range(2):
        norm, update = rows(program, rank)[-2:]
        assert (norm.kind, program.groups[norm.group], norm.bytes) == (Kind.NORM, "world", 24)
        assert update == Row(Kind.UPDATE)


def test_reductions_are_anchored_in_the_last_backward() -> None:
    """Two buckets of one stage: each starts in the last B after the segment that completes it."""
    buckets = ((_bucket(0, 0, ("dp_cp",), 2), _bucket(0, 1, ("dp_cp",), 0)),)
    program = _lower(one_f_one_b(1, 2), buckets, ((40, 60),), data_parallel=True)
    own = rows(program, 0)
    assert _text(own) == [
        "0COUNT", "0F0", "0B0", "0F1", "0B1", "0REDUCE0", "0REDUCE1",
        "WAIT 0REDUCE0", "WAIT 0REDUCE1", "NORM", "UPDATE",
    ]  # fmt: skip
    assert [(row.anchor_row, row.anchor_segment, row.bytes) for row in own[5:7]] == [(4, 2, 40), (4, 0, 60)]
    assert anchored(own) == {(4, 2): (5,), (4, 0): (6,)}
    assert execution_order(own) == (0, 1, 2, 3, 5, 6, 4, 7, 8, 9, 10)
    assert payload_bytes(program, 0) == {
        ("all_reduce", "dp_cp"): 108,
        ("all_reduce", "world"): 24,
    }


def test_a_second_sum_follows_the_first() -> None:
    """A bucket partial over tp and dp_cp: the second sum is posted after the wait for the first."""
    buckets = ((_bucket(0, 0, ("tp", "dp_cp"), 1), _bucket(0, 1, ("dp_cp",), 0)),)
    program = _lower(one_f_one_b(1, 1), buckets, ((40, 60),), data_parallel=True)
    own = rows(program, 0)
    shown = [
        f"{name} over {program.groups[row.group]}" if row.kind is Kind.REDUCE else name
        for name, row in zip(_text(own), own, strict=True)
    ]
    assert shown == [
        "0COUNT", "0F0", "0B0", "0REDUCE0 over tp", "0REDUCE1 over dp_cp",
        "WAIT 0REDUCE0", "0REDUCE0 over dp_cp", "WAIT 0REDUCE0", "WAIT 0REDUCE1", "NORM", "UPDATE",
    ]  # fmt: skip
    assert [own[i].target for i in (5, 7, 8)] == [3, 6, 4]
    assert own[6].anchor_row == -1


def test_rows_after_the_last_backward_keep_their_targets() -> None:
    """The last stage still waits for its own gradient's send after the reductions are put before it."""
    buckets = ((), (_bucket(1, 0, ("dp_cp",), 0), _bucket(1, 1, ("dp_cp",), 0)))
    own = rows(_lower(one_f_one_b(2, 1), buckets, ((), (4, 4)), data_parallel=True), 1)
    assert _text(own) == [
        "1COUNT", "1RECV_F0", "WAIT 1RECV_F0", "1F0", "1B0", "1REDUCE0", "1REDUCE1", "1SEND_B0",
        "WAIT 1SEND_B0", "WAIT 1REDUCE0", "WAIT 1REDUCE1", "NORM", "UPDATE",
    ]  # fmt: skip


def test_two_stages_of_one_rank_reduce_each_in_its_own_backward() -> None:
    """Rank 0 holds stages 0 and 2: bucket 0 of stage 2 is anchored in 2B0, that of stage 0 in 0B0."""
    schedule = schedule_from_csv("0F0,2F0,2B0,0B0\n1F0,1B0\n")
    buckets = ((_bucket(0, 0, ("dp_cp",), 0),), (), (_bucket(2, 0, ("dp_cp",), 1),))
    own = rows(_lower(schedule, buckets, ((4,), (), (4,)), data_parallel=True), 0)
    anchors = {str(row): (str(own[row.anchor_row]), row.anchor_segment) for row in own if row.anchor_row >= 0}
    assert anchors == {"0REDUCE0": ("0B0", 0), "2REDUCE0": ("2B0", 1)}
    waits = [_text(own)[i] for i, row in enumerate(own) if row.kind is Kind.WAIT]
    assert sorted(waits[-2:]) == ["WAIT 0REDUCE0", "WAIT 2REDUCE0"]
    assert all(own[row.target].microbatch == row.microbatch for row in own if row.kind is Kind.WAIT)


def test_buckets_without_a_sum_make_no_rows() -> None:
    """On one data-parallel rank gradients are whole."""
    program = _lower(one_f_one_b(1, 1), ((_bucket(0, 0, (), 0),),), ((4,),))
    assert all(row.kind is not Kind.REDUCE for row in rows(program, 0))


def test_a_circle_is_refused() -> None:
    """Rank 0 wants B0 before it sends F1, and rank 1 F1 before it sends B0: both are named."""
    circle = schedule_from_csv("0F0,0B0,0F1,0B1\n1F1,1B1,1F0,1B0\n")
    with pytest.raises(PlanError) as caught:
        _lower(circle)
    assert str(caught.value) == (
        "the ranks of this schedule wait for each other: "
        "rank 0 at 0WAIT0 of 0RECV_B0; rank 1 at 1WAIT1 of 1RECV_F1"
    )


def test_a_send_that_ends_only_when_received_can_close_a_circle() -> None:
    """Rank 0 runs six forwards before it posts B0, rank 1 sends B0 before it posts F3; five still go."""
    for m in (5, 6):
        schedule = Schedule(
            name="mixed",
            num_microbatches=m,
            stage_ranks=(0, 1),
            orders=(afab(2, m).orders[0], one_f_one_b(2, m).orders[1]),
        )
        if m == 5:
            _lower(schedule)
            continue
        with pytest.raises(PlanError, match="rank 0 at 0WAIT3 of 0SEND_F3; rank 1 at 1WAIT0 of 1SEND_B0"):
            _lower(schedule)


def test_a_channel_delivers_in_the_order_sent() -> None:
    """Rank 0 sends microbatch 0 before 1; a schedule that receives 1 first would mix them up."""
    swapped = schedule_from_csv("0F0,0F1,0B0,0B1\n1F1,1F0,1B0,1B1\n")
    with pytest.raises(PlanError, match="a channel delivers in the order sent: rank 1 receives 1RECV_F0"):
        _lower(swapped)


def test_programs_compare_by_value_and_cannot_be_written() -> None:
    """Two lowerings are equal; a changed column is not; columns are read-only."""
    program = _lower(one_f_one_b(2, 2))
    assert program == _lower(one_f_one_b(2, 2))
    assert program != attrs.evolve(program, bytes=program.bytes + 1)
    with pytest.raises(ValueError, match="read-only"):
        program.kind[0] = 3
    assert program.num_rows == len(program.kind) == 29
    assert np.array_equal(program.offsets, [0, 14, 29])
