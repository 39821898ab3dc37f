"""What text charts share: rows of columns with their activities, axes, legends, windows and colour.

A chart has one row a rank and one column an equal share of time: a column shows what took most of it, and an
action bears its name (``F0``: forward of microbatch 0) where that has room. A row is plain text; ``painted``
gives it ANSI colours.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from attrs import frozen

from picotron.planner.chart import ACTIVITIES, COMPUTING, FILLS, Bar, column_activities

WIDTH = 100
MEANINGS: dict[str, str] = {
    "idle": "idle",
    "forward": "forward",
    "backward": "backward",
    "input gradient": "input gradient",
    "weight gradient": "weight gradient",
    "wait": "exposed transfer or reduction",
    "collective": "collective",
    "update": "update",
}
_BACKGROUNDS: dict[str, int] = {  # of the 256 colours of terminals
    "forward": 110,
    "backward": 215,
    "input gradient": 222,
    "weight gradient": 114,
    "wait": 218,
    "collective": 168,
    "update": 141,
}
_INK = 16
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


@frozen
class Strip:
    """A rank's row: a character and an activity for each column."""

    text: str
    activities: tuple[str, ...]

    def cut(self, first: int, stop: int) -> Strip:
        """Some of its columns."""
        return Strip(self.text[first:stop], self.activities[first:stop])


def strips(own: Mapping[int, Sequence[Bar]], *, span_seconds: float, columns: int) -> list[Strip]:
    """Each rank's columns. Actions bear their names if most have room for theirs, else none does."""

    def edges(bar: Bar) -> tuple[int, int]:
        first, last = (nearest(t / span_seconds * columns) for t in (bar.start_seconds, bar.end_seconds))
        return first, last

    def has_room(bar: Bar) -> bool:
        first, last = edges(bar)
        return last - first >= len(bar.label)

    actions = [has_room(bar) for bars in own.values() for bar in bars if bar.activity in COMPUTING]
    named = 2 * sum(actions) > len(actions)
    out = []
    for bars in own.values():
        activities = column_activities(bars, span_seconds=span_seconds, columns=columns)
        cells = [FILLS[name] for name in activities]
        for bar in bars:
            if named and bar.label and has_room(bar):
                first, last = edges(bar)
                cells[first:last] = bar.label.ljust(last - first, FILLS[bar.activity])
                activities[first:last] = [bar.activity] * (last - first)
        out.append(Strip("".join(cells), tuple(activities)))
    return out


def painted(strip: Strip) -> str:
    """The row in colour: letters on the colour of what the rank does."""
    out, column = [], 0
    for activity, run in groupby(strip.activities):
        stop = column + len(list(run))
        text = strip.text[column:stop]
        if activity in _BACKGROUNDS:
            text = f"\x1b[38;5;{_INK};48;5;{_BACKGROUNDS[activity]}m{text}\x1b[0m"
        out.append(text)
        column = stop
    return "".join(out)


def shown_strip(strip: Strip, windows: Sequence[tuple[int, int]], *, colour: bool = False) -> str:
    """The windows of a row, with an ellipsis between."""
    parts = [strip.cut(first, stop) for first, stop in windows]
    return " … ".join(painted(part) if colour else part.text for part in parts)


def axis(ticks: Iterable[tuple[int, str]], first: int, stop: int) -> str:
    """Tick marks with their texts, for chart columns ``first`` to ``stop``; what has no room is left out."""
    line = ""
    for column, text in ticks:
        offset, mark = column - first, f"|{text}"
        if offset >= len(line) + (offset > 0) and offset + len(mark) <= stop - first:
            line = line.ljust(offset) + mark
    return line.ljust(stop - first)


def legend(bars: Iterable[Bar], *, colour: bool = False) -> str:
    """The fills that the bars need, each with its meaning."""
    present = {"idle"} | {bar.activity for bar in bars}
    found = [(FILLS[name], name) for name in ACTIVITIES if name in present]
    return ", ".join(
        f"{painted(Strip(fill, (name,))) if colour else fill} {MEANINGS[name]}" for fill, name in found
    )


def by_rank(bars: Iterable[Bar], ranks: Iterable[int]) -> dict[int, list[Bar]]:
    """The bars of each rank."""
    found: dict[int, list[Bar]] = {rank: [] for rank in ranks}
    for bar in bars:
        found[bar.rank].append(bar)
    return found


def windows_of(columns: int, *, room: int, unit_columns: int) -> list[tuple[int, int]]:
    """The chart columns to show: all, or the first and the last whole units that fit with an ellipsis."""
    if columns <= room:
        return [(0, columns)]
    first = max(1, (room - 3) // 2 // unit_columns) * unit_columns
    last = max(1, (room - 3 - first) // unit_columns) * unit_columns
    return [(0, first), (columns - last, columns)]


def nearest(value: float) -> int:
    """The nearest whole number; a half goes up."""
    return math.floor(value + 0.5)


def joined(lines: Iterable[str], width: int) -> str:
    """The lines, each at most ``width`` wide: a longer one goes on below, indented."""
    return "\n".join(piece.rstrip() for line in lines for piece in _wrapped(line, width))


def _wrapped(line: str, width: int) -> list[str]:
    if len(_ESCAPES.sub("", line).rstrip()) <= width:
        return [line]
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    whole = line.replace(" GiB", "\0GiB")  # a number keeps its unit
    return [piece.replace("\0", " ") for piece in textwrap.wrap(whole, width, subsequent_indent=indent)]
