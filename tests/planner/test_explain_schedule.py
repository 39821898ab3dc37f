"""The words in which a schedule's makespan is explained."""

from __future__ import annotations

from picotron.planner.catalogue import make_schedule
from picotron.planner.explain_schedule import explain_schedule
from picotron.planner.schedule_times import unit_costs
from picotron.planner.schedules import afab


def test_two_ranks_by_hand() -> None:
    """AFAB of one microbatch: rank 1 warms up, rank 0 waits for its F and B, then rank 1 is done."""
    assert explain_schedule(afab(2, 1)).splitlines() == [
        "as a program: 6 time units; communication that shows: 0 a rank",
        "idle, waiting for  warm-up  backward  end  all",
        "rank 0             0        3         0    3",
        "rank 1             1        0         2    3",
        "critical path: 0F0 0SEND_F0 1F0 1B0 1SEND_B0 0B0 (computing on rank 0 x1, rank 1 x2, rank 0 x1)",
    ]


def test_transfers_show() -> None:
    """A quarter of a unit a hop: rank 0 waits for one transfer, rank 1 for both, since a send is seen off."""
    text = explain_schedule(afab(2, 1), unit_costs(2, transfer=0.25))
    assert text.startswith("as a program: 6.5 time units; communication that shows: 0.375 a rank")


def test_long_paths_and_many_ranks_are_shortened() -> None:
    """Only the ends of a path, and the first 16 ranks."""
    text = explain_schedule(make_schedule("zb-v", 20, 40), width=200)
    assert "... and 4 ranks more" in text
    assert " ... " in text[text.index("critical path") :]
