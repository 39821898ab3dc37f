"""Schedules as pictures: the classic grid as text and as SVG, several under one scale, and a Chrome trace.

Every action stands where ``schedule_times`` puts it. An overlapped pair is drawn as its halves one after the
other within the time that it takes. The same schedule and costs give the same text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence

import numpy as np
from attrs import frozen

from picotron.errors import PlanError
from picotron.planner.actions import PHASES
from picotron.planner.chart import Bar, round_values
from picotron.planner.grid import (
    MEANINGS,
    WIDTH,
    axis,
    by_rank,
    joined,
    legend,
    nearest,
    shown_strip,
    strips,
    windows_of,
)
from picotron.planner.pipeline import Schedule, peak_microbatches
from picotron.planner.schedule_times import (
    PipelineCosts,
    Spans,
    action_seconds,
    bubble_fraction,
    schedule_times,
    stage_span_fraction,
    unit_costs,
)
from picotron.planner.svg import LANE, LETTER, PADDING, Chart, legend_parts, opening
from picotron.planner.svg import WIDTH as PAGE_WIDTH
from picotron.planner.validity import rank_column

_MOST_COLUMNS = 1_000_000  # of a chart, shown or not
_MOST_ROWS = 128  # ranks of a chart
_ACTIVITY = dict(zip(PHASES, ("forward", "backward", "input gradient", "weight gradient"), strict=True))


@frozen(kw_only=True)
class ScheduleFigures:
    """What one compares schedules by. Peaks are in activations of a rank for one microbatch.

    ``peak_activations``: by rank, held from F until B or W. ``stage_span_fraction`` is the zero-bubble
    papers' own rate, ``bubble_fraction`` that of the whole makespan.
    """

    name: str
    virtual_stages: int
    makespan: float
    bubble_fraction: float
    stage_span_fraction: float
    peak_activations: tuple[float, ...]
    parameter_copies: int


def schedule_figures(schedule: Schedule, costs: PipelineCosts | None = None) -> ScheduleFigures:
    """The figures of a schedule; costs are one unit for each of F, I and W unless given."""
    costs = costs or unit_costs(schedule.num_stages)
    spans = schedule_times(schedule, costs)
    held = schedule.num_stages / schedule.num_ranks
    return ScheduleFigures(
        name=schedule.name,
        virtual_stages=schedule.num_stages // schedule.num_ranks,
        makespan=spans.makespan_seconds,
        bubble_fraction=bubble_fraction(schedule, costs, spans),
        stage_span_fraction=stage_span_fraction(schedule, costs, spans),
        peak_activations=tuple(
            peak_microbatches(schedule, rank) / held for rank in range(schedule.num_ranks)
        ),
        parameter_copies=2 if schedule.bidirectional else 1,
    )


def rank_costs(
    schedule: Schedule, *, f: float = 1.0, i: float = 1.0, w: float = 1.0, transfer: float = 0.0
) -> PipelineCosts:
    """Costs of a stage, from those of all that a microbatch computes on a rank; a rank's stages share them.

    So schedules with different numbers of stages do the same work.
    """
    share = schedule.num_ranks / schedule.num_stages
    return unit_costs(schedule.num_stages, f=f * share, i=i * share, w=w * share, transfer=transfer)


def schedule_bars(
    schedule: Schedule,
    costs: PipelineCosts | None = None,
    *,
    spans: Spans | None = None,
    shown: Sequence[tuple[float, float]] | None = None,
) -> tuple[Bar, ...]:
    """The schedule run as early as it can be, in order of rank and time; only what is ``shown``, if given.

    Raises PlanError where the ranks wait for each other.
    """
    costs = costs or unit_costs(schedule.num_stages)
    spans = spans or schedule_times(schedule, costs)
    start, end = _halves(schedule, costs, spans)
    visible = np.zeros(len(start), dtype=bool)
    for first, stop in shown or [(-math.inf, math.inf)]:
        visible |= (start < stop) & (end > first)
    index = np.flatnonzero(visible & (end > start))
    orders, several = schedule.orders, schedule.num_stages > schedule.num_ranks or schedule.bidirectional
    columns = (rank_column(orders), orders.stage, orders.phase, orders.microbatch, start, end)
    bars = (
        Bar(
            rank=rank,
            activity=_ACTIVITY[PHASES[phase]],
            start_seconds=first,
            end_seconds=stop,
            label=f"{stage if several else ''}{PHASES[phase]}{microbatch}",
        )
        for rank, stage, phase, microbatch, first, stop in zip(
            *(column[index].tolist() for column in columns), strict=True
        )
    )
    return tuple(bars)


def _halves(schedule: Schedule, costs: PipelineCosts, spans: Spans) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends in which the halves of a pair follow each other, in proportion to their costs."""
    start, end = spans.start.copy(), spans.end.copy()
    seconds = action_seconds(schedule, costs)
    first = np.flatnonzero(schedule.orders.joined)
    share = seconds[first] / (seconds[first] + seconds[first + 1])
    middle = start[first] + (end[first] - start[first]) * share
    end[first] = start[first + 1] = middle
    return start, end


def draw_schedule(
    schedule: Schedule, costs: PipelineCosts | None = None, *, width: int = WIDTH, colour: bool = False
) -> str:
    """The classic grid of a schedule: one row a rank, equal columns of time.

    ``costs`` are time units (or seconds) by stage, 1 each for F, I and W unless given. A grid wider than
    ``width`` shows its beginning and its end, and says so. ``colour`` adds ANSI colours.
    """
    costs = costs or unit_costs(schedule.num_stages)
    spans = schedule_times(schedule, costs)
    unit_columns = _columns_a_unit([schedule], [costs])
    grid = _Grid(spans.makespan_seconds, unit_columns, width, _margin(schedule))
    bars = schedule_bars(schedule, costs, spans=spans, shown=grid.shown_units)
    return joined(
        [
            f"{schedule.name}: {schedule.num_ranks} ranks, {schedule.num_microbatches} microbatches, "
            f"{spans.makespan_seconds:g} time units{grid.shown_words}",
            *grid.rows(schedule, bars, colour=colour),
            grid.axis(),
            legend(bars, colour=colour),
        ],
        width,
    )


def draw_comparison(
    schedules: Sequence[Schedule],
    costs: Sequence[PipelineCosts] | None = None,
    *,
    width: int = WIDTH,
    colour: bool = False,
) -> str:
    """Several schedules under one scale, whole, and a table of their figures, least makespan first.

    ``costs``: those of each schedule; unless given, a rank's whole share of a microbatch takes 1 time unit
    for each of F, I and W. Raises PlanError unless all have the same ranks and microbatches.
    """
    costs = list(costs) if costs is not None else [rank_costs(schedule) for schedule in schedules]
    check_comparable(schedules)
    figures = [schedule_figures(*each) for each in zip(schedules, costs, strict=True)]
    order = sorted(range(len(schedules)), key=lambda index: (figures[index].makespan, index))
    longest, room = max(each.makespan for each in figures), width - _margin(schedules[0])
    unit_columns = min(_columns_a_unit(schedules, costs), room / longest)
    grid = _Grid(longest, unit_columns, width, _margin(schedules[0]))
    lines, every = [], list[Bar]()
    for index in order:
        bars = schedule_bars(schedules[index], costs[index])
        every += bars
        lines += [_title(figures[index]), *grid.rows(schedules[index], bars, colour=colour)]
    head = f"{schedules[0].num_ranks} ranks, {schedules[0].num_microbatches} microbatches"
    table = figures_table([figures[index] for index in order])
    return joined([head, *lines, grid.axis(), legend(every, colour=colour), "", *table], width)


def check_comparable(schedules: Sequence[Schedule]) -> None:
    """Raise PlanError unless there are schedules, all of the same ranks and microbatches."""
    sizes = {(each.num_ranks, each.num_microbatches) for each in schedules}
    if len(sizes) != 1:
        raise PlanError(
            "schedules are compared at the same number of ranks and microbatches, "
            f"got {sorted(sizes) or 'none'}"
        )


def figures_table(figures: Iterable[ScheduleFigures]) -> list[str]:
    """One line a schedule, aligned."""
    heads = ("schedule", "stages/rank", "time", "bubble", "stage span", "peak activations", "parameters")
    rows = [
        (
            each.name,
            str(each.virtual_stages),
            f"{each.makespan:g}",
            _percent(each.bubble_fraction),
            _percent(each.stage_span_fraction),
            f"{max(each.peak_activations):g}",
            f"x{each.parameter_copies}",
        )
        for each in figures
    ]
    sizes = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    return [
        "  ".join(cell.ljust(size) for cell, size in zip(row, sizes, strict=True)) for row in (heads, *rows)
    ]


def summary(figures: ScheduleFigures) -> str:
    """The figures of one schedule in words."""
    peaks = ", ".join(f"{peak:g}" for peak in _shortened(figures.peak_activations))
    copies = " (two copies of the parameters)" if figures.parameter_copies == 2 else ""
    return (
        f"bubble {_percent(figures.bubble_fraction)} of the makespan, "
        f"{_percent(figures.stage_span_fraction)} of the stages' own spans; "
        f"activations held at most, by rank: {peaks}{copies}"
    )


def _shortened(peaks: tuple[float, ...]) -> tuple[float, ...]:
    return peaks if len(peaks) <= 16 else (max(peaks),)


def _percent(fraction: float) -> str:
    return f"{max(fraction, 0.0):.1%}".replace("%", " %")


def _title(figures: ScheduleFigures) -> str:
    return f"{figures.name}: {figures.makespan:g} time units, bubble {_percent(figures.bubble_fraction)}"


def _margin(schedule: Schedule) -> int:
    return len(f"rank {schedule.num_ranks - 1}") + 2


def _columns_a_unit(schedules: Sequence[Schedule], costs: Sequence[PipelineCosts]) -> float:
    """Columns of a time unit, such that the shortest action has room for its name."""
    found = []
    for schedule, own in zip(schedules, costs, strict=True):
        digits = len(str(schedule.num_microbatches - 1)) + 1
        if schedule.num_stages > schedule.num_ranks or schedule.bidirectional:
            digits += len(str(schedule.num_stages - 1))
        used = np.unique(schedule.orders.phase)
        least = float(own.table()[used].min(where=own.table()[used] > 0, initial=math.inf))
        found.append(digits / least)
    most = max(found)
    return float(math.ceil(most)) if most >= 1 else most


class _Grid:
    """The columns of one or several charts under one scale, and which of them are shown."""

    def __init__(self, units: float, unit_columns: float, width: int, margin: int) -> None:
        self.units, self.margin = units, margin
        self.unit_columns = min(unit_columns, _MOST_COLUMNS / units)
        self.columns = max(1, math.ceil(self.units * self.unit_columns - 1e-9))
        step = max(1, round(self.unit_columns))
        self.windows = windows_of(self.columns, room=width - margin, unit_columns=step)

    @property
    def shown_units(self) -> list[tuple[float, float]]:
        return [(first / self.unit_columns, stop / self.unit_columns) for first, stop in self.windows]

    @property
    def shown_words(self) -> str:
        texts = " and ".join(f"{first:g}-{stop:g}" for first, stop in self.shown_units)
        return f", shown: {texts}" if len(self.windows) > 1 else ""

    def rows(self, schedule: Schedule, bars: Sequence[Bar], *, colour: bool) -> list[str]:
        """A line for each of the first ranks."""
        shown = range(min(schedule.num_ranks, _MOST_ROWS))
        own = by_rank((bar for bar in bars if bar.rank < _MOST_ROWS), shown)
        found = strips(own, span_seconds=self.columns / self.unit_columns, columns=self.columns)
        lines = [
            f"rank {rank}".ljust(self.margin) + shown_strip(strip, self.windows, colour=colour)
            for rank, strip in enumerate(found)
        ]
        more = schedule.num_ranks - len(lines)
        return [*lines, f"... and {more:,} ranks more"] if more else lines

    def axis(self) -> str:
        ticks = [
            (nearest(at * self.unit_columns), f"{at:g}")
            for at in round_values(self.units, self.columns // 10)
        ]
        return "units".ljust(self.margin) + " … ".join(
            axis(ticks, first, stop) for first, stop in self.windows
        )


def orders_svg(schedule: Schedule, costs: PipelineCosts | None = None) -> str:
    """The schedule as a self-contained SVG, to scale."""
    return comparison_svg([schedule], None if costs is None else [costs])


def comparison_svg(schedules: Sequence[Schedule], costs: Sequence[PipelineCosts] | None = None) -> str:
    """Several schedules under one scale as SVG, least makespan first."""
    check_comparable(schedules)
    if costs is None:
        alone = len(schedules) == 1
        costs = [unit_costs(each.num_stages) if alone else rank_costs(each) for each in schedules]
    figures = [schedule_figures(*each) for each in zip(schedules, costs, strict=True)]
    order = sorted(range(len(schedules)), key=lambda index: (figures[index].makespan, index))
    ranks = schedules[0].num_ranks
    span = max(each.makespan for each in figures)
    names = {index: f"{schedules[index].name}|" for index in order}
    left = PADDING + 14 + LETTER * max(len("rank 000"), *(len(name) for name in names.values()))
    chart = Chart(left, PAGE_WIDTH - PADDING, span, ranks * len(order) + len(order) - 1)
    title = " against ".join(schedules[index].name for index in order)
    subtitle = f"{ranks} ranks, {schedules[0].num_microbatches} microbatches. " + "; ".join(
        f"{_title(figures[index])}, {max(figures[index].peak_activations):g} activations at most"
        for index in order
    )
    every = set[str]()
    ticks = [(value, f"{value:g}") for value in round_values(span, 10)]
    parts = [*opening(chart.height, title, subtitle[:160]), *chart.axis("time units", ticks)]
    for place, index in enumerate(order):
        bars = schedule_bars(schedules[index], costs[index])
        every |= {bar.activity for bar in bars}
        for rank, own in by_rank(bars, range(ranks)).items():
            lane = place * (ranks + 1) + rank
            small = schedules[index].name if len(order) > 1 and rank == 0 else ""
            parts += chart.label(lane, f"rank {rank}|{small}")
            parts.append(chart.rectangle(lane, 0.0, figures[index].makespan, "idle", LANE))
            parts += chart.bars(lane, own)
    meanings = {name: text for name, text in MEANINGS.items() if name in every or name == "idle"}
    return "\n".join([*parts, *legend_parts(chart.height, meanings), "</svg>"]) + "\n"


def schedule_trace(schedule: Schedule, costs: PipelineCosts | None = None) -> str:
    """The schedule as Chrome trace JSON, which Perfetto opens; one process a rank, a unit is a second."""
    events: list[dict[str, object]] = [
        {"ph": "M", "name": "process_name", "pid": rank, "tid": 0, "args": {"name": f"rank {rank}"}}
        for rank in range(schedule.num_ranks)
    ]
    for bar in schedule_bars(schedule, costs):
        events.append(
            {
                "ph": "X",
                "name": bar.label,
                "cat": bar.activity,
                "pid": bar.rank,
                "tid": 0,
                "ts": bar.start_seconds * 1e6,
                "dur": (bar.end_seconds - bar.start_seconds) * 1e6,
            }
        )
    return json.dumps({"traceEvents": events, "otherData": {"clock": "predicted"}}, separators=(",", ":"))
