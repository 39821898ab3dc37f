"""When rows of small programs run, by hand, and who waits for what where a program cannot end."""

from __future__ import annotations

import numpy as np
import pytest
from attrs import evolve

from picotron.errors import PlanError
from picotron.planner.data import Bucket
from picotron.planner.deadlock import check_channels, check_no_deadlock, unbatched
from picotron.planner.flow import Semantics, program_times, row_seconds
from picotron.planner.lower import with_reductions, with_transfers
from picotron.planner.passes import with_offloading, with_recomputing
from picotron.planner.pipeline import schedule_from_csv
from picotron.planner.program import Kind, Program, Row, make_program, row_columns, rows
from picotron.planner.schedule_times import PipelineCosts, unit_costs
from picotron.planner.schedules import one_f_one_b


def _program(*ranks: list[Row]) -> Program:
    offsets = [0]
    for own in ranks:
        offsets.append(offsets[-1] + len(own))
    return make_program((), tuple(offsets), **row_columns([row for own in ranks for row in own]))


def _send(peer: int, microbatch: int = 0, batch: int = -1) -> Row:
    return Row(Kind.SEND_F, 0, microbatch, peer=peer, bytes=4, batch=batch)


def _receive(peer: int, microbatch: int = 0, batch: int = -1) -> Row:
    return Row(Kind.RECV_F, 1, microbatch, peer=peer, bytes=4, batch=batch)


def _wait(target: int) -> Row:
    return Row(Kind.WAIT, 0, 0, target=target)


def test_messages_of_a_channel_run_one_after_the_other() -> None:
    """1F1B on two ranks with transfers of a second: every row of rank 1; the receive of F1 is posted at 3."""
    program = with_transfers(one_f_one_b(2, 2), 4)
    times = program_times(program, unit_costs(2, transfer=1.0))
    first = program.offsets[1]
    found = [
        f"{row} {start:g}-{end:g}"
        for row, start, end in zip(rows(program, 1), times.start[first:], times.end[first:], strict=True)
    ]
    assert found == [
        "1RECV_F0 1-2", "1WAIT0 0-2", "1F0 2-3", "1RECV_F1 3-4", "1B0 3-5", "1SEND_B0 5-6",
        "1WAIT1 5-5", "1F1 5-6", "1B1 6-8", "1WAIT0 8-8", "1SEND_B1 8-9", "1WAIT1 8-9",
    ]  # fmt: skip
    assert times.makespan_seconds == 11.0


def test_a_bucket_that_is_complete_earlier_is_summed_earlier() -> None:
    """Two buckets of one B on one communicator: that of the later segment goes first, whatever their rows."""
    buckets = [
        Bucket(stage=0, index=index, names=(), partial=("dp_cp",), ready_segment=segment)
        for index, segment in ((0, 0), (1, 2))
    ]
    program = with_reductions(with_transfers(one_f_one_b(1, 1), 4), [buckets], [[8, 16]])
    times = program_times(program, unit_costs(1), bytes_per_second={Kind.REDUCE: 8.0})
    sums = np.flatnonzero(program.kind == Kind.REDUCE)
    assert (times.start[sums].tolist(), times.end[sums].tolist()) == ([5.0, 3.0], [6.0, 5.0])


def test_a_pair_takes_its_share_of_both() -> None:
    """Overlapped at half the time: F of 1 s and B of 2 s take 1.5 s together, an F by itself its second."""
    schedule = schedule_from_csv("0F0,(0F1;0B0)OVERLAP_F_B,0B1\n")
    priced = PipelineCosts(
        forward_seconds=[1.0], input_seconds=[1.0], weight_seconds=[1.0], overlap_factor=0.5
    )
    times = program_times(with_transfers(schedule, 4), priced)
    assert times.end.tolist() == [1.0, 1.5, 2.5, 4.5]


def test_rows_without_a_price_take_no_time() -> None:
    """Recomputing costs a forward, a copy what its bytes take at the rate that is given."""
    program = with_recomputing(with_offloading(with_transfers(one_f_one_b(1, 1), 4), [8]), [0])
    assert [str(row) for row in rows(program, 0)] == ["0F0", "0RECOMPUTE0", "0B0"]
    assert row_seconds(program, unit_costs(1, f=3.0)).tolist() == [3.0, 3.0, 2.0]
    assert row_seconds(program, unit_costs(1), recompute_seconds=0.5).tolist() == [1.0, 0.5, 2.0]
    afab = with_offloading(with_transfers(schedule_from_csv("0F0,0F1,0F2,0B0,0B1,0B2\n"), 4), [8])
    seconds = row_seconds(afab, unit_costs(1), bytes_per_second={Kind.OFFLOAD: 4.0})
    assert set(seconds[afab.kind == Kind.OFFLOAD]) == {2.0}
    assert set(seconds[afab.kind == Kind.RELOAD]) == {0.0}


CROSSED = _program([_send(1), _wait(0), _receive(1), _wait(2)], [_send(0), _wait(0), _receive(0), _wait(2)])


def test_two_sends_that_wait_for_each_other() -> None:
    """Both send first and wait: buffered they end; else each needs the other's receive, and both are told."""
    check_no_deadlock(CROSSED, "buffered")
    for semantics in ("rendezvous", "batched"):
        with pytest.raises(PlanError) as caught:
            check_no_deadlock(CROSSED, semantics)
        assert str(caught.value) == (
            "the ranks of this program wait for each other: "
            "rank 0 at 0WAIT0 of 0SEND_F0, which needs 1RECV_F0 of rank 1; "
            "rank 1 at 0WAIT0 of 0SEND_F0, which needs 1RECV_F0 of rank 0"
        )
    with pytest.raises(PlanError, match="wait for each other: rank 0 at 0WAIT0 of 0SEND_F0"):
        program_times(CROSSED, unit_costs(2))


def test_posted_together_they_end() -> None:
    """A send and a receive in one batch on both ranks need nobody's wait."""
    both = [_send(1, batch=5), _receive(1, batch=5), _wait(0), _wait(1)]
    program = _program(both, [row._replace(peer=0) if row.peer == 1 else row for row in both])
    for semantics in ("buffered", "rendezvous", "batched"):
        check_no_deadlock(program, semantics)


def _needs_apart() -> Program:
    """Rank 0 sends and asks for the answer in one batch; rank 1 answers only what it has received."""
    answer = [Row(Kind.SEND_B, 1, 0, peer=0), Row(Kind.RECV_B, 0, 0, peer=1, batch=7)]
    return _program(
        [_send(1, batch=7), answer[1], _wait(0), _wait(1)], [_receive(0), _wait(0), answer[0], _wait(2)]
    )


def test_a_batch_is_behind_the_one_before_on_its_channel() -> None:
    """Two more messages behind a batch that is not over do not run: only the batched semantics tell."""
    program = _program(
        [_send(1, 0, batch=1), _receive(2, 0, batch=1), _send(1, 1), _wait(2), Row(Kind.SEND_B, 0, 0, peer=2),
         _wait(0), _wait(4)],
        [_receive(0, 0), _receive(0, 1), _wait(0), _wait(1)],
        [Row(Kind.RECV_B, 0, 0, peer=0), _wait(0), Row(Kind.SEND_F, 0, 0, peer=0), _wait(2)],
    )  # fmt: skip
    for semantics in ("buffered", "rendezvous"):
        check_no_deadlock(program, semantics)
    with pytest.raises(
        PlanError, match="rank 0 at 0WAIT0 of 0SEND_F1, which needs 1RECV_F1 of rank 1; rank 1"
    ):
        check_no_deadlock(program, "batched")
    apart = unbatched(program)
    check_no_deadlock(apart, "batched")
    assert set(apart.batch.tolist()) == {-1}


def test_a_batch_that_can_end_stays() -> None:
    """Taking apart what does not need it would lose something."""
    program = _needs_apart()
    check_no_deadlock(program, "batched")
    assert unbatched(program) == program


@pytest.mark.parametrize("semantics", ["rendezvous", "batched"])
def test_what_nobody_posts_is_waited_for_in_vain(semantics: Semantics) -> None:
    """A receive without a send is told as that."""
    program = _program([_receive(1, batch=3), _send(1, batch=3), _wait(0)], [_receive(0), _wait(0)])
    with pytest.raises(PlanError, match="rank 0 at 0WAIT0 of 1RECV_F0, which needs what nobody posts"):
        check_no_deadlock(program, semantics)


def test_messages_that_get_mixed_up_are_told() -> None:
    """The second send meets the second receive, which is meant for the first microbatch."""
    sends = [_send(1, 0), _send(1, 1), _wait(0), _wait(1)]
    program = _program(sends, [_receive(0, 1), _receive(0, 0), _wait(0), _wait(1)])
    check_no_deadlock(program)
    with pytest.raises(PlanError, match="rank 1 receives 1RECV_F1 where rank 0 sends it 0SEND_F0"):
        check_channels(program)
    check_channels(_program(sends, [_receive(0, 0), _receive(0, 1), _wait(0), _wait(1)]))


def test_a_peer_outside_the_pipeline_is_refused() -> None:
    """Ranks are those of the program."""
    program = _program([_send(1)], [_receive(0)])
    with pytest.raises(PlanError, match=r"the peer of a message must be in \[0, 2\)"):
        check_no_deadlock(evolve(program, peer=np.array([1, 2])))
