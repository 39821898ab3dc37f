"""Looping schedules with a full backward as the papers draw them, and the names of all schedules."""

from __future__ import annotations

import pytest

from picotron.errors import PlanError
from picotron.planner.actions import PHASES
from picotron.planner.catalogue import SCHEDULES, make_schedule
from picotron.planner.pipeline import loop_ranks, peak_microbatches, v_ranks
from picotron.planner.schedules import bfs, interleaved, one_f_one_b

INTERLEAVED = """\
0F0,0F1,0F2,0F3,4F0,4F1,4F2,4F3,0F4,0F5,0F6,4B0,0F7,4B1,4F4,4B2,4F5,4B3,4F6,0B0,4F7,0B1,0B2,0B3,4B4,4B5,4B6,4B7,0B4,0B5,0B6,0B7
1F0,1F1,1F2,1F3,5F0,5F1,5F2,5F3,1F4,5B0,1F5,5B1,1F6,5B2,1F7,5B3,5F4,1B0,5F5,1B1,5F6,1B2,5F7,1B3,5B4,5B5,5B6,5B7,1B4,1B5,1B6,1B7
2F0,2F1,2F2,2F3,6F0,6F1,6F2,6B0,6F3,6B1,2F4,6B2,2F5,6B3,2F6,2B0,2F7,2B1,6F4,2B2,6F5,2B3,6F6,6B4,6F7,6B5,6B6,6B7,2B4,2B5,2B6,2B7
3F0,3F1,3F2,3F3,7F0,7B0,7F1,7B1,7F2,7B2,7F3,7B3,3F4,3B0,3F5,3B1,3F6,3B2,3F7,3B3,7F4,7B4,7F5,7B5,7F6,7B6,7F7,7B7,3B4,3B5,3B6,3B7
"""


def test_interleaved_is_the_papers_figure() -> None:
    """Four ranks, two stages each, eight microbatches: figure 4 (bottom) of Narayanan et al. 2021."""
    assert str(interleaved(4, 8, 2)) == INTERLEAVED


def test_a_remainder_goes_round_with_the_group_before() -> None:
    """Three microbatches on two ranks go round together: a third alone would wait for itself."""
    assert str(interleaved(2, 3, 2)) == (
        "0F0,0F1,0F2,2F0,2F1,2B0,2F2,2B1,2B2,0B0,0B1,0B2\n1F0,1F1,1F2,3F0,3B0,3F1,3B1,3F2,3B2,1B0,1B1,1B2\n"
    )


def test_interleaved_holds_less_on_later_ranks() -> None:
    """Chunks at the peak: 2(p - s - 1) + (v - 1)p + 1."""
    schedule = interleaved(4, 8, 2)
    assert [peak_microbatches(schedule, rank) for rank in range(4)] == [11, 9, 7, 5]


def test_one_stage_a_rank_runs_the_stages_of_1f1b() -> None:
    """With v = 1 the last rank alternates as in 1F1B; the others are twice as far ahead."""
    assert interleaved(3, 4, 1).orders[2] == one_f_one_b(3, 4).orders[2]
    assert str(interleaved(3, 4, 1)).splitlines()[1] == "1F0,1F1,1F2,1B0,1F3,1B1,1B2,1B3"


def test_bfs_runs_a_stage_before_the_next() -> None:
    """All microbatches through one stage of the rank, then through its next (Lamy-Poirier 2022, figure 3)."""
    assert str(bfs(2, 3, 2)) == (
        "0F0,0F1,0F2,2F0,2F1,2F2,2B0,2B1,2B2,0B0,0B1,0B2\n1F0,1F1,1F2,3F0,3F1,3F2,3B0,3B1,3B2,1B0,1B1,1B2\n"
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_name_tells_what_its_schedule_is(name: str) -> None:
    """Placement, split backward, direction and stages a rank are those of the schedule itself."""
    named, schedule = SCHEDULES[name], make_schedule(name, 4, 8)
    stages = 2 if named.virtual_stages == "any" else named.virtual_stages
    ranks = {"loop": loop_ranks(4, stages), "v": v_ranks(4), "mirrored": loop_ranks(4)}
    assert schedule.name == name
    assert schedule.stage_ranks == ranks[named.placement]
    assert schedule.bidirectional == named.bidirectional == (named.placement == "mirrored")
    assert named.splits_backward == (PHASES.index("W") in schedule.orders.phase)
    assert "arXiv:" in named.paper
    assert named.summary


@pytest.mark.parametrize("name", [name for name, row in SCHEDULES.items() if row.virtual_stages == "any"])
def test_virtual_stages_are_chosen(name: str) -> None:
    """Any number of stages a rank, two if left out."""
    assert make_schedule(name, 2, 4) == make_schedule(name, 2, 4, 2)
    assert make_schedule(name, 2, 4, 3).num_stages == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("interleavd", 2, 2),
            "schedule must be one of afab, .*, got 'interleavd'; did you mean interleaved",
        ),
        (("gpipe", 2, 2), "schedule must be one of afab, .*, got 'gpipe'"),
        (("1f1b", 2, 2, 2), "virtual_stages of 1f1b must be 1, got 2; interleaved, bfs, interleaved-zb take"),
        (("zb-v", 2, 2, 3), "virtual_stages of zb-v must be 2, got 3"),
        (("bfs", 2, 2, 0), "virtual_stages must be a whole number, at least 1, got 0"),
        (("bfs", 2, 2, True), "virtual_stages must be a whole number, at least 1, got True"),
        (("v-min", 0, 2), "at least one rank and one microbatch, got 0 and 2"),
        (("zb-h1", 2, 0), "at least one rank and one microbatch, got 2 and 0"),
        (("interleaved", 64, 100_000), "may have at most 4,000,000 actions"),
        (("zb-v", 64, 100_000), "may have at most 4,000,000 actions"),
        (("dualpipe-v", 64, 100_000), "may have at most 4,000,000 actions"),
        (("dualpipe", 3, 8), "even number of ranks .*, got 3 ranks and 8 microbatches; dualpipe-v takes any"),
        (("dualpipe", 4, 9), "even number of microbatches"),
        (("dualpipe", 4, 6), "at least twice the ranks"),
    ],
)
def test_what_no_schedule_takes_is_refused(arguments: tuple[object, ...], message: str) -> None:
    """The message gives the rule, the value and what else there is."""
    with pytest.raises(PlanError, match=message):
        make_schedule(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "virtual_stages", "num_actions"),
    [("interleaved", 8, 1_048_576), ("interleaved-zb", 4, 786_432), ("v-half", 2, 393_216)],
)
def test_large_schedules_are_cheap(name: str, virtual_stages: int, num_actions: int) -> None:
    """64 ranks and 1024 microbatches: about a million actions."""
    assert make_schedule(name, 64, 1024, virtual_stages).orders.num_actions == num_actions
