"""What a time chart is made of: bars of what ranks do, their names, and numbers for people."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from attrs import frozen

from picotron.planner.program import COLLECTIVES, COMPUTE, Kind, Row
from picotron.planner.timeline import Timeline

FILLS: dict[str, str] = {
    "idle": "·",
    "forward": "░",
    "backward": "▓",
    "input gradient": "▒",
    "weight gradient": "█",
    "wait": "~",
    "collective": "=",
    "update": "u",
}
ACTIVITIES = tuple(FILLS)
COMPUTING = ("forward", "backward", "input gradient", "weight gradient")
_ACTIVITY: dict[Kind, str] = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "backward",
    Kind.BACKWARD_INPUT: "input gradient",
    Kind.BACKWARD_WEIGHT: "weight gradient",
    Kind.COUNT: "collective",
    Kind.NORM: "collective",
    Kind.UPDATE: "update",
}
_BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_SECOND_UNITS = (
    ("d", 86_400.0),
    ("h", 3600.0),
    ("min", 60.0),
    ("s", 1.0),
    ("ms", 1e-3),
    ("µs", 1e-6),
    ("ns", 1e-9),
)
_CLOCKS = {"predicted": "virtual time, predicted"}


def human_bytes(size: int) -> str:
    """Bytes for people, to three figures in binary units: ``12.0 GiB``."""
    value, unit = abs(float(size)), 0
    while round(value, decimals(value)) >= 1024 and unit < len(_BYTE_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    sign = "-" if size < 0 else ""
    return f"{sign}{value:.{decimals(value) if unit else 0}f} {_BYTE_UNITS[unit]}"


def human_seconds(seconds: float) -> str:
    """Seconds for people, to three figures: ``63.9 ms``; minutes and longer units from two of them on."""
    size = abs(seconds)
    if size == 0:
        return "0 s"
    unit, scale = next(
        (unit for unit in _SECOND_UNITS if size >= unit[1] * (2 if unit[1] > 1 else 0.9995)),
        _SECOND_UNITS[-1],
    )
    return f"{seconds / scale:.{decimals(size / scale)}f} {unit}"


def decimals(value: float) -> int:
    """Decimals that leave three figures."""
    return 2 if value < 9.995 else 1 if value < 99.95 else 0


def rank_ranges(ranks: Iterable[int]) -> str:
    """Ascending ranks, runs shortened: ``0-3`` for neighbours, ``0-12:4`` for every fourth from 0 to 12."""
    left, pieces = sorted(ranks), []
    while left:
        step = left[1] - left[0] if len(left) > 1 else 1
        count = 1
        while count < len(left) and left[count] - left[count - 1] == step:
            count += 1
        if count < 3 and step > 1:
            count = 1
        run, left = left[:count], left[count:]
        stride = f":{step}" if step > 1 else ""
        pieces.append(f"{run[0]}-{run[-1]}{stride}" if count > 1 else str(run[0]))
    return ",".join(pieces)


@frozen(kw_only=True)
class Bar:
    """What one rank does from ``start_seconds`` to ``end_seconds`` since the step began."""

    rank: int
    activity: str  # one of ACTIVITIES but "idle", which is where no bar stands
    start_seconds: float
    end_seconds: float
    label: str = ""


def compute_bars(timeline: Timeline, programs: Sequence[Sequence[Row]]) -> tuple[Bar, ...]:
    """What holds each rank's compute stream, in order of rank and time.

    ``programs``: the rows of each rank that the timeline names. Of a WAIT counts only the part in which its
    transfer or reduction was under way; before that the rank idles until another one posts.
    """
    origin, bars = float(timeline.start.min()), []
    under_way = {(rank, row): (start, end) for rank, row, stream, start, end in _spans(timeline) if stream}
    several = _several_stages(programs)
    for rank, index, stream, start, end in _spans(timeline):
        row = programs[rank][index]
        if stream == 0 and row.kind is Kind.WAIT:
            first, last = under_way.get((rank, row.target), (start, end))
            start, end = max(start, first), min(end, last)
        if stream == 0 and end > start:
            bars.append(
                Bar(
                    rank=rank,
                    activity=_ACTIVITY.get(row.kind, "wait"),
                    start_seconds=start - origin,
                    end_seconds=end - origin,
                    label=_row_label(row, several),
                )
            )
    return tuple(sorted(bars, key=lambda bar: (bar.rank, bar.start_seconds)))


def background_bars(timeline: Timeline, programs: Sequence[Sequence[Row]]) -> tuple[Bar, ...]:
    """Transfers and reductions under way beside the computing, in order of rank and time."""
    origin = float(timeline.start.min())
    found = (
        Bar(
            rank=rank,
            activity="collective" if programs[rank][index].kind in COLLECTIVES else "wait",
            start_seconds=start - origin,
            end_seconds=end - origin,
            label=str(programs[rank][index]),
        )
        for rank, index, stream, start, end in _spans(timeline)
        if stream and end > start
    )
    return tuple(sorted(found, key=lambda bar: (bar.rank, bar.start_seconds, bar.label)))


def _spans(timeline: Timeline) -> list[tuple[int, int, int, float, float]]:
    """(rank, row, stream, start, end) of whole rows."""
    whole = timeline.operation == -1
    columns = (timeline.rank, timeline.row, timeline.stream, timeline.start, timeline.end)
    return list(zip(*(column[whole].tolist() for column in columns), strict=True))


def _several_stages(programs: Sequence[Sequence[Row]]) -> bool:
    """Whether some rank holds more than one stage, so that labels must name it."""
    return any(len({row.stage for row in own if row.kind in COMPUTE}) > 1 for own in programs)


def _row_label(row: Row, several: bool) -> str:
    if row.kind in COMPUTE:
        text = str(row)
        return text if several else text.removeprefix(str(row.stage))
    return "" if row.kind is Kind.WAIT else row.kind.name.lower()


def column_activities(bars: Iterable[Bar], *, span_seconds: float, columns: int) -> list[str]:
    """For one rank's bars, the activity that takes most of each of ``columns`` equal shares of the span."""
    taken = np.zeros((len(ACTIVITIES), columns))
    for bar in bars:
        first, last = (time / span_seconds * columns for time in (bar.start_seconds, bar.end_seconds))
        for column in range(int(first), min(columns, math.ceil(last))):
            taken[ACTIVITIES.index(bar.activity), column] += min(last, column + 1) - max(first, column)
    taken[0] = 1.0 - taken[1:].sum(axis=0)
    return [ACTIVITIES[index] for index in taken.argmax(axis=0).tolist()]


def time_ticks(span_seconds: float, most: int) -> tuple[tuple[float, str], ...]:
    """At most ``most`` + 1 round times from 0 to the span, each in seconds and as text with its unit."""
    unit, scale = next((unit for unit in _SECOND_UNITS[3:] if span_seconds >= unit[1]), _SECOND_UNITS[-1])
    return tuple((value * scale, f"{value:g} {unit}") for value in round_values(span_seconds / scale, most))


def round_values(span: float, most: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten from 0 to ``span``."""
    power = math.floor(math.log10(span)) - 3
    steps = (digit * 10.0**exponent for exponent in range(power, power + 6) for digit in (1, 2, 5))
    step = next(step for step in steps if span / step <= max(1, most))
    return [index * step for index in range(math.floor(span / step * (1 + 1e-12)) + 1)]


def clock_name(timeline: Timeline) -> str:
    """What kind of seconds the timeline's are, for people."""
    return _CLOCKS.get(timeline.clock, f"{timeline.clock} clock")
