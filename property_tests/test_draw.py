"""What every picture keeps, whatever the plan."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from picotron.planner.actions import Phase
from picotron.planner.catalogue import SCHEDULES, make_schedule
from picotron.planner.chart import (
    COMPUTING,
    column_activities,
    compute_bars,
    human_bytes,
    human_seconds,
    rank_ranges,
    time_ticks,
)
from picotron.planner.cluster import ClusterSpec
from picotron.planner.draw import draw_grid, draw_memory, draw_plan, draw_timeline
from picotron.planner.draw_schedule import draw_schedule, schedule_bars
from picotron.planner.draw_svg import schedule_svg
from picotron.planner.grid import WIDTH
from picotron.planner.model import ModelSpec
from picotron.planner.pipeline import Schedule
from picotron.planner.plan import TrainingPlan, plan
from picotron.planner.predict import predict
from picotron.planner.program import rows
from picotron.planner.schedule_times import idle_seconds, schedule_times, unit_costs
from picotron.planner.topology import AXES
from picotron.planner.workload import Workload
from property_tests.strategies import SINGLE, schedules

TINY = ModelSpec.from_hf("llama-tiny")


@st.composite
def tiny_plans(draw: st.DrawFn, max_data_parallel: int = 4) -> TrainingPlan:
    """Small plans of the tiny model, in any order of axes."""
    pp, dp = draw(st.integers(1, 6)), draw(st.integers(1, max_data_parallel))
    cp, tp = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2]))
    names = [name for name in SINGLE if pp <= 3 or SCHEDULES[name].virtual_stages == 1]
    micro_batch, num_microbatches = draw(st.integers(1, 2)), draw(st.integers(1, 9))
    return plan(
        TINY,
        ClusterSpec.preset("cpu", nodes=1, devices_per_node=pp * dp * cp * tp),
        Workload(global_batch=dp * micro_batch * num_microbatches, seq_len=16, precision="fp32"),
        dp=dp,
        pp=pp,
        cp=cp,
        tp=tp,
        micro_batch=micro_batch,
        order=tuple(draw(st.permutations(AXES))),
        schedule=draw(st.sampled_from(names)),
    )


@st.composite
def named_schedules(draw: st.DrawFn) -> Schedule:
    """Every named schedule, small."""
    if draw(st.integers(0, 9)) == 0:
        ranks = 2 * draw(st.integers(1, 3))
        return make_schedule("dualpipe", ranks, 2 * ranks + 2 * draw(st.integers(0, 3)))
    return draw(schedules(max_ranks=6, max_microbatches=12))


def parsed_ranks(text: str) -> list[int]:
    """The ranks that ``rank_ranges`` wrote as ``text``."""
    found = []
    for piece in text.replace(" ", "").split(","):
        ends, _, step = piece.partition(":")
        first, _, last = ends.partition("-")
        found += range(int(first), int(last or first) + 1, int(step or 1))
    return found


@given(st.sets(st.integers(0, 60), min_size=1))
def test_ranges_name_each_rank_once(ranks: set[int]) -> None:
    """Shortening is reversible."""
    assert parsed_ranks(rank_ranges(ranks)) == sorted(ranks)


@given(tiny_plans(max_data_parallel=24))
def test_each_rank_is_in_the_grid_once(request: TrainingPlan) -> None:
    """Cells of all stages together partition the world, and each row holds its stage's ranks."""
    lines = draw_grid(request).splitlines()
    margin = lines[0].index("dp")
    assert max(map(len, lines)) <= WIDTH
    cells = " ".join(line[margin:] for line in lines[1:]).replace(", ", ",").split()
    ranks = [rank for cell in cells for rank in parsed_ranks(cell.strip(","))]
    assert sorted(ranks) == list(range(request.topology.world_size))


@settings(max_examples=30, deadline=None)
@given(tiny_plans())
def test_a_plan_fits_its_page(request: TrainingPlan) -> None:
    """No line is longer than the page, none ends in blanks, and the same plan gives the same bytes."""
    text = draw_plan(request)
    assert max(map(len, text.splitlines())) <= WIDTH
    assert all(line == line.rstrip() for line in text.splitlines())
    assert text == draw_plan(request)


@settings(max_examples=30, deadline=None)
@given(tiny_plans(), st.integers(60, 160))
def test_rows_of_a_chart_end_together(request: TrainingPlan, width: int) -> None:
    """Every rank has the same span of time, and every stage the same scale of memory."""
    program = request.program()
    programs = [rows(program, stage) for stage in range(request.topology.pp)]
    chart = draw_timeline(predict(request).timeline, programs, width=width).splitlines()
    first = next(index for index, line in enumerate(chart) if line.startswith("rank 0"))
    assert {len(line) for line in chart[first : first + request.topology.pp]} == {width}
    memory = [line for line in draw_memory(request, width=120).splitlines() if line.startswith("stage")]
    assert [len(line) for line in memory] == [120] * request.topology.pp


@settings(max_examples=30, deadline=None)
@given(tiny_plans())
def test_bars_neither_overlap_nor_get_lost(request: TrainingPlan) -> None:
    """A rank does one thing at a time; each F and B of the schedule has its bar; none ends after the step."""
    program = request.program()
    programs = [rows(program, stage) for stage in range(request.topology.pp)]
    timeline = predict(request).timeline
    bars = compute_bars(timeline, programs)
    for rank, order in enumerate(request.schedule.orders):
        own = [bar for bar in bars if bar.rank == rank]
        assert all(left.end_seconds <= right.start_seconds for left, right in pairwise(own))
        actions = [bar.label for bar in own if bar.activity in COMPUTING]
        several = request.virtual_stages > 1
        assert actions == [
            str(action) if several else f"{action.phase}{action.microbatch}" for action in order
        ]
    assert max(bar.end_seconds for bar in bars) <= timeline.makespan_seconds


@settings(max_examples=20, deadline=None)
@given(tiny_plans())
def test_an_svg_is_valid_xml_and_the_same_again(request: TrainingPlan) -> None:
    """A picture is a pure function of the plan."""
    text = schedule_svg(request)
    ET.fromstring(text)
    assert text == schedule_svg(request)


@given(named_schedules(), st.integers(1, 3), st.integers(1, 3))
def test_the_grid_has_the_schedules_bubble(schedule: Schedule, forward: int, backward: int) -> None:
    """Idle time in the grid is what the planner counts as bubble on each rank."""
    costs = unit_costs(schedule.num_stages, f=forward, i=backward, w=0)
    bars = schedule_bars(schedule, costs)
    units = max(bar.end_seconds for bar in bars)
    busy = [0.0] * schedule.num_ranks
    for bar in bars:
        busy[bar.rank] += bar.end_seconds - bar.start_seconds
    expected = idle_seconds(schedule, costs, schedule_times(schedule, costs))
    assert tuple(units - own for own in busy) == pytest.approx(expected)


@given(named_schedules(), st.integers(30, 200))
def test_a_schedule_fits_its_width(schedule: Schedule, width: int) -> None:
    """A grid is cut, not wrapped: each rank keeps one line, and all are equally long."""
    lines = draw_schedule(schedule, width=width).splitlines()
    assert max(map(len, lines)) <= width
    ranks = [line for line in lines if line.startswith("rank ")]
    assert len(ranks) == schedule.num_ranks
    assert len({len(line) for line in ranks}) == 1


@given(named_schedules())
def test_columns_keep_time(schedule: Schedule) -> None:
    """With a column a time unit, each rank shows one of F, two of B and one of I and W for each of them."""
    bars = schedule_bars(schedule)
    units = max(bar.end_seconds for bar in bars)
    for rank in range(schedule.num_ranks):
        own = [bar for bar in bars if bar.rank == rank]
        shown = column_activities(own, span_seconds=units, columns=int(units))
        counts = Counter(action.phase for action in schedule.orders[rank])
        assert shown.count("forward") == counts[Phase.FORWARD]
        assert shown.count("backward") == 2 * counts[Phase.BACKWARD]
        assert shown.count("input gradient") == counts[Phase.INPUT]
        assert shown.count("weight gradient") == counts[Phase.WEIGHT]


@given(st.integers(-(2**60), 2**60))
def test_bytes_read_back_to_three_figures(size: int) -> None:
    """The text is within half a unit of its last figure, or one per cent."""
    number, unit = human_bytes(size).split()
    scale = 1024 ** ("B", "KiB", "MiB", "GiB", "TiB", "PiB").index(unit)
    assert abs(float(number) * scale - size) <= abs(size) * 0.01


@given(st.floats(1e-8, 1e8))
def test_seconds_read_back_to_three_figures(seconds: float) -> None:
    """The text is within one per cent of the time."""
    number, unit = human_seconds(seconds).split()
    scale = {"d": 86_400, "h": 3600, "min": 60, "s": 1, "ms": 1e-3, "µs": 1e-6, "ns": 1e-9}[unit]
    assert abs(float(number) * scale - seconds) <= seconds * 0.01


@given(st.floats(1e-8, 1e8), st.integers(1, 20))
def test_ticks_are_even_and_few(span: float, most: int) -> None:
    """Ticks start at zero, stay within the span, do not exceed what was asked, and are at least two."""
    times = [at for at, _ in time_ticks(span, most)]
    assert times[0] == 0 and times[-1] <= span * (1 + 1e-9)
    assert len(times) <= most + 1
    steps = [right - left for left, right in pairwise(times)]
    assert all(abs(step - steps[0]) <= 1e-9 * span for step in steps)
