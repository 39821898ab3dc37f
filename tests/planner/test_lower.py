"""A step lowered to rows, read row by row; and schedules that can never end."""

from __future__ import annotations

import pytest

from picotron.errors import PlanError
from picotron.planner.catalogue import make_schedule
from picotron.planner.data import Bucket
from picotron.planner.deadlock import check_channels, check_no_deadlock
from picotron.planner.lower import lower, messages, send_depths, with_transfers
from picotron.planner.pipeline import Schedule, schedule_from_csv
from picotron.planner.program import (
    SENDS,
    Kind,
    Program,
    Row,
    anchored,
    execution_order,
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
        "the ranks of this schedule wait for each other: rank 0 at 0B0; rank 1 at 1F1"
    )


@pytest.mark.parametrize(("num_microbatches", "depths"), [(3, [1, 1]), (5, [3, 1]), (9, [5, 2])])
def test_as_many_sends_are_in_flight_as_the_order_needs(num_microbatches: int, depths: list[int]) -> None:
    """Rank 0 runs a forward a second, and rank 1 takes three for each: forwards pile up on their channel."""
    m = num_microbatches
    schedule = Schedule(
        name="mixed",
        num_microbatches=m,
        stage_ranks=(0, 1),
        orders=(afab(2, m).orders[0], one_f_one_b(2, m).orders[1]),
    )
    assert send_depths(schedule, messages(schedule)).tolist() == depths
    check_no_deadlock(_lower(schedule))


def test_a_channel_delivers_in_the_order_sent() -> None:
    """Rank 0 sends microbatch 0 before 1; rank 1, which wants 1 first, posts the receive of 0 before it."""
    swapped = schedule_from_csv("0F0,0F1,0B0,0B1\n1F1,1F0,1B0,1B1\n")
    program = _lower(swapped)
    assert _text(rows(program, 1)) == [
        "1COUNT", "1RECV_F0", "1RECV_F1",
        "WAIT 1RECV_F1", "1F1",
        "WAIT 1RECV_F0", "1F0",
        "1B0", "1SEND_B0",
        "1B1", "WAIT 1SEND_B0", "1SEND_B1",
        "WAIT 1SEND_B1", "NORM", "UPDATE",
    ]  # fmt: skip
    check_channels(program)


def test_between_two_stages_of_one_rank_nothing_is_sent() -> None:
    """Rank 1 of a V holds stages 1 and 2: what passes there has no rows; I and W have one each."""
    v = schedule_from_csv("0F0,3F0,3I0,3W0,0I0,0W0\n1F0,2F0,2I0,1I0,2W0,1W0\n")
    program = with_transfers(v, 4)
    assert _text(rows(program, 1)) == [
        "1RECV_F0", "WAIT 1RECV_F0", "1F0",
        "2RECV_B0", "2F0", "2SEND_F0",
        "WAIT 2RECV_B0", "2I0",
        "1I0", "1SEND_B0",
        "2W0", "1W0", "WAIT 2SEND_F0", "WAIT 1SEND_B0",
    ]  # fmt: skip
    assert [row.peer for row in rows(program, 1) if row.kind in SENDS] == [0, 0]


def test_a_pair_waits_for_both_and_sends_after_both() -> None:
    """The rows of a pair stand together and share a batch, their arrivals before and their sends behind."""
    pair = schedule_from_csv("0F0,0F1,0B0,0B1\n1F0,(1F1;1B0)OVERLAP_F_B,1B1\n2F0,2B0,2F1,2B1\n")
    own = rows(with_transfers(pair, 4), 1)
    assert _text(own) == [
        "1RECV_F0", "1RECV_F1", "1RECV_B0",
        "WAIT 1RECV_F0", "1F0", "1SEND_F0",
        "1RECV_B1", "WAIT 1RECV_F1", "WAIT 1RECV_B0", "1F1", "1B0", "WAIT 1SEND_F0", "1SEND_F1", "1SEND_B0",
        "WAIT 1RECV_B1", "1B1", "WAIT 1SEND_B0", "1SEND_B1",
        "WAIT 1SEND_F1", "WAIT 1SEND_B1",
    ]  # fmt: skip
    assert [row.batch for row in own if row.kind in (Kind.FORWARD, Kind.BACKWARD)] == [-1, 0, 0, -1]


def test_two_copies_of_a_stage_sum_their_gradients() -> None:
    """DualPipe on two ranks: both sum stage 0 and stage 1 over "mirror", in one order, and count tokens."""
    buckets = ((_bucket(0, 0, (), 0),), (_bucket(1, 0, (), 0),))
    program = _lower(make_schedule("dualpipe", 2, 4), buckets, ((30,), (50,)))
    for rank in range(2):
        own = rows(program, rank)
        assert own[0].kind is Kind.COUNT
        sums = [(str(row), row.bytes) for row in own if row.kind is Kind.REDUCE]
        assert sorted(sums) == [("0REDUCE", 30), ("1REDUCE", 50)]
        assert {program.groups[row.group] for row in own if row.kind is Kind.REDUCE} == {"mirror"}
        assert [str(row) for row in own if row.kind is Kind.REDUCE] == [
            str(row) for row in rows(program, 0) if row.kind is Kind.REDUCE
        ]
    check_no_deadlock(program)


def test_too_many_bytes_are_refused() -> None:
    """A row counts bytes in 64 bits."""
    with pytest.raises(PlanError, match="a row's bytes must fit in 64 bits; the model or the batch"):
        with_transfers(one_f_one_b(2, 1), 2**63)
