"""What passes add to small programs, row by row."""

from __future__ import annotations

from picotron.planner.lower import with_transfers
from picotron.planner.passes import (
    fuse_backward,
    with_batches,
    with_offloading,
    with_recomputing,
    with_unsharding,
)
from picotron.planner.pipeline import schedule_from_csv
from picotron.planner.program import Kind, Program, rows
from picotron.planner.schedule_times import PipelineCosts, unit_costs
from picotron.planner.schedules import interleaved, one_f_one_b


def _text(program: Program, rank: int = 0) -> str:
    """The rows of a rank; a WAIT with what it waits for, a row of a batch with its number."""
    own = rows(program, rank)
    posts = (Kind.SEND_F, Kind.RECV_F, Kind.SEND_B, Kind.RECV_B)
    return " ".join(
        f"WAIT({own[row.target]})"
        if row.kind is Kind.WAIT
        else f"{row}" + f"#{row.batch}" * (row.batch >= 0 and row.kind in posts)
        for row in own
    )


ONE_RANK = with_transfers(schedule_from_csv("0F0,1F0,2F0,2B0,1B0,0B0\n"), 4)


def test_parameters_are_gathered_one_cell_ahead() -> None:
    """Three stages of one rank: each gathered while the one before it runs, kept if it comes next again."""
    assert _text(with_unsharding(ONE_RANK, [1, 1, 1])) == (
        "0UNSHARD 1UNSHARD WAIT(0UNSHARD) 0F0 0RESHARD 2UNSHARD WAIT(1UNSHARD) 1F0 1RESHARD "
        "WAIT(2UNSHARD) 2F0 1UNSHARD 2B0 2RESHARD "
        "0UNSHARD WAIT(1UNSHARD) 1B0 1RESHARD WAIT(0UNSHARD) 0B0 0RESHARD"
    )


def test_kept_parameters_make_room_for_others() -> None:
    """Two at most, and kept for three cells: stage 1 stays, 0 goes for 2, and 2 for 0."""
    assert _text(with_unsharding(ONE_RANK, [1, 1, 1], keep=5, max_active=2)) == (
        "0UNSHARD 1UNSHARD WAIT(0UNSHARD) 0F0 0RESHARD 2UNSHARD WAIT(1UNSHARD) 1F0 WAIT(2UNSHARD) 2F0 "
        "2B0 2RESHARD 0UNSHARD 1B0 1RESHARD WAIT(0UNSHARD) 0B0 0RESHARD"
    )


def test_one_gathered_stage_at_a_time() -> None:
    """Without room to gather ahead, a stage is gathered where it is used."""
    assert _text(with_unsharding(ONE_RANK, [1, 1, 1], max_active=1)).startswith(
        "0UNSHARD WAIT(0UNSHARD) 0F0 0RESHARD 1UNSHARD WAIT(1UNSHARD) 1F0 1RESHARD 2UNSHARD"
    )


def test_a_weight_gradient_needs_no_parameters() -> None:
    """A linear multiplies what came in by what came back; torch gathers for it all the same."""
    program = with_transfers(schedule_from_csv("0F0,1F0,1I0,0I0,1W0,0W0\n"), 4)
    assert _text(with_unsharding(program, [1, 1])).endswith("0I0 0RESHARD 1W0 0W0")
    assert _text(with_unsharding(program, [1, 1], weights_use=True)).endswith("WAIT(0UNSHARD) 0W0 0RESHARD")


def test_a_forward_is_computed_again_before_its_gradient_is_waited_for() -> None:
    """So that it may run while the gradient is under way."""
    program = with_recomputing(with_transfers(one_f_one_b(2, 1), 4), [0])
    assert _text(program) == "0RECV_B0 0F0 0SEND_F0 0RECOMPUTE0 WAIT(0RECV_B0) 0B0 WAIT(0SEND_F0)"


def test_what_a_forward_saves_is_away_while_it_idles() -> None:
    """Out beside the next cell, back beside the one before its backward; the last two idle too shortly."""
    program = with_offloading(ONE_RANK, [8, 8, 8])
    assert _text(program) == (
        "0F0 0OFFLOAD0 1F0 1OFFLOAD0 WAIT(0OFFLOAD0) 2F0 WAIT(1OFFLOAD0) 1RELOAD0 2B0 "
        "0RELOAD0 WAIT(1RELOAD0) 1B0 WAIT(0RELOAD0) 0B0"
    )


def test_neighbours_are_posted_together() -> None:
    """Of two stages a rank; not where ranks would wait for each other's batches in a circle."""
    program = with_batches(with_transfers(interleaved(2, 2, 2), 4))
    assert "2SEND_F0#2 2RECV_B0#2" in _text(program) and "0SEND_F0 2RECV_F0 0F1" in _text(program)


def test_halves_are_fused_where_nobody_waits_for_the_first() -> None:
    """The first stage sends no gradient, so fusing costs nothing; a later one only where there is slack."""
    split = schedule_from_csv("0F0,0F1,0I0,0W0,0I1,0W1\n1F0,1I0,1W0,1F1,1I1,1W1\n")
    assert str(fuse_backward(split)) == "0F0,0F1,0B0,0B1\n1F0,1I0,1W0,1F1,1I1,1W1\n"
    slack = PipelineCosts(forward_seconds=[5, 1], input_seconds=[1, 1], weight_seconds=[1, 1])
    assert str(fuse_backward(split, slack)) == "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1I1,1W1\n"


def test_half_of_a_pair_is_not_fused() -> None:
    """The pair's forward would be there later."""
    pair = schedule_from_csv("0F0,(0F1;0I0)OVERLAP_F_B,0W0,0I1,0W1\n")
    assert str(fuse_backward(pair, unit_costs(1))) == "0F0,(0F1;0I0)OVERLAP_F_B,0W0,0B1\n"
