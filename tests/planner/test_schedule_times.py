"""When actions run, against figures that a reader can draw, and the bubbles of the papers."""

from __future__ import annotations

from typing import Any

import pytest

from picotron.errors import PlanError
from picotron.planner.pipeline import Schedule, schedule_from_csv
from picotron.planner.schedule_times import (
    PipelineCosts,
    bubble_fraction,
    idle_seconds,
    own_spans,
    rank_work_seconds,
    schedule_times,
    stage_span_fraction,
    unit_costs,
)
from picotron.planner.schedules import afab, one_f_one_b


def _spans(schedule: Schedule, costs: PipelineCosts) -> list[list[tuple[float, float]]]:
    """(start, end) of each action, rank by rank."""
    spans = schedule_times(schedule, costs)
    every = list(zip(spans.start.tolist(), spans.end.tolist(), strict=True))
    return [every[schedule.orders.span(rank)] for rank in range(schedule.num_ranks)]


def test_two_ranks_of_one_f_one_b() -> None:
    """F takes 1 and B 2; rank 1 has its first F when rank 0 is done with its own."""
    assert _spans(one_f_one_b(2, 2), unit_costs(2)) == [
        [(0, 1), (1, 2), (4, 6), (7, 9)],
        [(1, 2), (2, 4), (4, 5), (5, 7)],
    ]


def test_a_hop_delays_what_crosses_ranks_only() -> None:
    """Stages 0 and 1 share a rank, stage 2 does not; a transfer occupies nobody."""
    schedule = schedule_from_csv("0F0,1F0,1B0,0B0\n2F0,2B0\n")
    assert _spans(schedule, unit_costs(3, transfer=0.5)) == [
        [(0, 1), (1, 2), (6, 8), (8, 10)],
        [(2.5, 3.5), (3.5, 5.5)],
    ]


def test_weight_gradients_wait_for_nobody() -> None:
    """I hands on, W fills the time in which the other rank works; a B may meet an I next door."""
    schedule = schedule_from_csv("0F0,0F1,0I0,0W0,0B1\n1F0,1B0,1F1,1I1,1W1\n")
    assert _spans(schedule, unit_costs(2, f=1, i=2, w=3)) == [
        [(0, 1), (1, 2), (7, 9), (9, 12), (12, 17)],
        [(1, 2), (2, 7), (7, 8), (8, 10), (10, 13)],
    ]


def test_a_pair_starts_when_both_halves_have_what_they_need() -> None:
    """And takes the stated part of the sum; both are sent at its end."""
    schedule = schedule_from_csv("0F0,(0F1;0B0)OVERLAP_F_B,0B1\n1F0,1B0,1F1,1B1\n")
    costs = PipelineCosts(
        forward_seconds=(1, 1), input_seconds=(1, 1), weight_seconds=(1, 1), overlap_factor=0.5
    )
    spans = _spans(schedule, costs)
    assert spans[0] == [(0, 1), (4, 5.5), (4, 5.5), (8.5, 10.5)]
    assert spans[1] == [(1, 2), (2, 4), (5.5, 6.5), (6.5, 8.5)]
    assert rank_work_seconds(schedule, costs) == (4.5, 6.0)


@pytest.mark.parametrize(("p", "m"), [(2, 2), (4, 8), (5, 3), (1, 6)])
def test_the_bubble_of_afab_and_one_f_one_b(p: int, m: int) -> None:
    """(p - 1)(F + B) on every rank (Narayanan et al. 2021, arXiv:2104.04473, section 2.2.1)."""
    costs = unit_costs(p, f=2, i=3, w=1)
    for schedule in (afab(p, m), one_f_one_b(p, m)):
        spans = schedule_times(schedule, costs)
        assert idle_seconds(schedule, costs, spans) == ((p - 1) * 6.0,) * p
        assert bubble_fraction(schedule, costs, spans) == pytest.approx((p - 1) / (m + p - 1))


def test_the_spans_of_ranks_leave_the_skew_out() -> None:
    """The last rank of 1F1B has no bubble within its own span; the rate is that of the longest."""
    schedule, costs = one_f_one_b(4, 8), unit_costs(4)
    spans = schedule_times(schedule, costs)
    assert own_spans(schedule, spans) == (33.0, 30.0, 27.0, 24.0)
    assert stage_span_fraction(schedule, costs, spans) == pytest.approx(9 / 33)


def test_unequal_stages_wait_for_the_dearest() -> None:
    """A stage of twice the cost sets the pace."""
    costs = PipelineCosts(forward_seconds=(1, 2), input_seconds=(1, 2), weight_seconds=(0, 0))
    schedule = afab(2, 3)
    assert schedule_times(schedule, costs).makespan_seconds == 1 + 3 * 4 + 1
    assert rank_work_seconds(schedule, costs) == (6.0, 12.0)


def test_ranks_that_wait_for_each_other_are_named() -> None:
    """With the action at which each stands."""
    schedule = schedule_from_csv("0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n")
    with pytest.raises(PlanError) as caught:
        schedule_times(schedule, unit_costs(2))
    assert str(caught.value) == (
        "the ranks of this schedule wait for each other: rank 0 at 0B0; rank 1 at 1F1"
    )


def test_a_rank_that_waits_for_itself_is_named() -> None:
    """Its second stage before its first."""
    with pytest.raises(PlanError, match="wait for each other: rank 0 at 1F0"):
        schedule_times(schedule_from_csv("1F0,0F0,1B0,0B0\n"), unit_costs(2))


def test_work_that_takes_no_time_keeps_its_order() -> None:
    """A W may be free; nothing runs before what it needs."""
    schedule = schedule_from_csv("0F0,0I0,0W0\n1F0,1I0,1W0\n")
    spans = _spans(schedule, unit_costs(2, i=0, w=0))
    assert spans == [[(0, 1), (2, 2), (2, 2)], [(1, 2), (2, 2), (2, 2)]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_seconds": (1,)}, r"F, I and W must have a cost for each stage, got \[2, 2, 1\] of them"),
        ({"input_seconds": (1, -1)}, "costs must be 0, or between"),
        ({"input_seconds": (1, float("nan"))}, "costs must be 0, or between"),
        ({"transfer_seconds": float("inf")}, "costs must be 0, or between"),
        ({"forward_seconds": (1, 0)}, "an F must take time"),
        ({"overlap_factor": 0.4}, r"overlap_factor must be in \[0.5, 1\], got 0.4"),
        ({"overlap_factor": float("nan")}, r"overlap_factor must be in \[0.5, 1\], got nan"),
        ({"input_seconds": 5}, "costs must be seconds, one for each stage, got 5"),
    ],
)
def test_costs_that_are_none_are_refused(changes: dict[str, Any], message: str) -> None:
    """The message has the rule and the value."""
    good: dict[str, Any] = {
        "forward_seconds": (1, 1),
        "input_seconds": (1, 1),
        "weight_seconds": (1, 1),
    }
    with pytest.raises(PlanError, match=message):
        PipelineCosts(**{**good, **changes})


def test_costs_are_of_the_schedules_stages() -> None:
    """One more or less is refused."""
    with pytest.raises(PlanError, match="costs must be those of 2 stages, got 3"):
        schedule_times(afab(2, 1), unit_costs(3))
