"""Pictures of schedules: the papers' grids, colours, comparisons, SVG and traces."""

from __future__ import annotations

import json
import re
from xml.etree import ElementTree as ET

import pytest

from picotron.errors import PlanError
from picotron.planner.catalogue import SCHEDULES, make_schedule
from picotron.planner.draw_schedule import (
    comparison_svg,
    draw_comparison,
    draw_schedule,
    orders_svg,
    rank_costs,
    schedule_bars,
    schedule_figures,
    schedule_trace,
    summary,
)
from picotron.planner.pipeline import schedule_from_csv
from picotron.planner.schedule_times import schedule_times, unit_costs
from picotron.planner.schedules import afab, one_f_one_b
from picotron.planner.zero_bubble import zb_h1

ANSI = re.compile(r"\x1b\[[0-9;]*m")


def test_split_backwards_have_fills_of_their_own() -> None:
    """ZB-H1 of two ranks: rank 1 fills its wait with weight gradients."""
    assert draw_schedule(zb_h1(2, 2)).splitlines() == [
        "zb-h1: 2 ranks, 2 microbatches, 7 time units",
        "rank 0  F0F1··I0W0I1W1",
        "rank 1  ··F0I0F1I1W0W1",
        "units   |0",
        "· idle, ░ forward, ▒ input gradient, █ weight gradient",
    ]


def test_colour_changes_no_letter() -> None:
    """Without its escapes the coloured text is the plain one, and colours end where the row ends."""
    plain, coloured = (draw_schedule(zb_h1(3, 4), colour=colour) for colour in (False, True))
    assert "\x1b[" not in plain
    assert ANSI.sub("", coloured) == plain
    assert all(line.count("\x1b[0m") * 2 == line.count("\x1b[") for line in coloured.splitlines())


def test_an_overlapped_pair_is_drawn_as_its_halves() -> None:
    """On one rank, F1 with B0 in two thirds of their time: each has its share, one after the other."""
    schedule = schedule_from_csv("0F0,(0F1;0B0)OVERLAP_F_B,0B1\n")
    costs = unit_costs(1)
    bars = schedule_bars(schedule, costs)
    assert [(bar.label, bar.start_seconds, bar.end_seconds) for bar in bars] == [
        ("F0", 0, 1),
        ("F1", 1, 2),
        ("B0", 2, 4),
        ("B1", 4, 6),
    ]


def test_figures_of_1f1b() -> None:
    """Four ranks, eight microbatches: 33 units, nine of them idle, four activations on rank 0."""
    figures = schedule_figures(one_f_one_b(4, 8))
    assert (figures.makespan, figures.bubble_fraction) == (33, 9 / 33)
    assert figures.peak_activations == (4, 3, 2, 1)
    assert summary(figures) == (
        "bubble 27.3 % of the makespan, 27.3 % of the stages' own spans; "
        "activations held at most, by rank: 4, 3, 2, 1"
    )


def test_a_rank_of_several_stages_does_the_same_work() -> None:
    """Costs of a rank are shared by its stages: interleaved takes a unit of F a microbatch as 1F1B does."""
    schedule = make_schedule("interleaved", 4, 8, 2)
    assert rank_costs(schedule).forward_seconds == (0.5,) * 8
    assert schedule_figures(schedule, rank_costs(schedule)).makespan == 24 + 9 / 2


def test_a_comparison_has_one_scale() -> None:
    """The longer schedule fills the width, the other ends where its makespan says; the table is sorted."""
    text = draw_comparison([afab(2, 4), zb_h1(2, 4)], width=98)
    lines = text.splitlines()
    assert lines[0] == "2 ranks, 4 microbatches"
    assert lines[1].startswith("zb-h1: 13 time units, bubble 7.7 %")
    assert lines[4].startswith("afab: 15 time units, bubble 20.0 %")
    rows = [line.removeprefix("rank 0  ") for line in lines if line.startswith("rank 0")]
    assert len(rows[0].rstrip("·")) * 15 == len(rows[1].rstrip("·")) * 13
    assert [line.split()[0] for line in lines[-3:]] == ["schedule", "zb-h1", "afab"]


def test_only_schedules_of_one_size_are_compared() -> None:
    """Under one scale, different microbatches would mislead."""
    with pytest.raises(PlanError, match=r"same number of ranks and microbatches, got \[\(2, 3\), \(2, 4\)\]"):
        draw_comparison([afab(2, 3), afab(2, 4)])
    with pytest.raises(PlanError, match="got none"):
        draw_comparison([])


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_every_schedule_has_a_picture(name: str) -> None:
    """Text, SVG and trace hold every action once, and are the same each time."""
    schedule = make_schedule(name, 4, 8)
    count = schedule.orders.num_actions
    assert f"{name}: 4 ranks, 8 microbatches" in draw_schedule(schedule)
    picture = orders_svg(schedule)
    titles = [element.text for element in ET.fromstring(picture).iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == count + 1
    events = json.loads(schedule_trace(schedule))["traceEvents"]
    assert sum(event["ph"] == "X" for event in events) == count
    assert picture == orders_svg(make_schedule(name, 4, 8)) == schedule._repr_html_()


def test_a_comparison_in_svg_names_its_schedules() -> None:
    """Two schedules, one page."""
    text = comparison_svg([one_f_one_b(2, 4), zb_h1(2, 4)])
    assert "zb-h1 against 1f1b" in text
    ET.fromstring(text)


def test_only_what_is_shown_is_made() -> None:
    """Bars of a window: those that overlap it."""
    bars = schedule_bars(one_f_one_b(2, 8), shown=[(0.0, 2.0)])
    assert [(bar.rank, bar.label) for bar in bars] == [(0, "F0"), (0, "F1"), (1, "F0")]


def test_a_schedule_of_many_actions_is_drawn_by_its_ends() -> None:
    """64 ranks and 1024 microbatches: a text of 64 rows."""
    text = draw_schedule(one_f_one_b(64, 1024))
    assert len(text.splitlines()) == 64 + 3
    assert "shown: 0-" in text


def test_times_in_a_picture_are_those_of_the_schedule() -> None:
    """A trace has microseconds, a unit being a second."""
    schedule = zb_h1(2, 2)
    events = [e for e in json.loads(schedule_trace(schedule))["traceEvents"] if e["ph"] == "X"]
    spans = schedule_times(schedule, unit_costs(2))
    assert [event["ts"] for event in events] == [start * 1e6 for start in spans.start.tolist()]
    assert events[0]["name"] == "F0"
