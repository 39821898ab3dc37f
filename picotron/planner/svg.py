"""What pictures in SVG share: a page with lanes over time, colours, axes and a legend.

Self-contained: no script, font or file from elsewhere. Colours follow the reader's light or dark preference.
The same value gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from xml.sax.saxutils import escape

from picotron.planner.chart import ACTIVITIES, Bar, column_activities, human_seconds, time_ticks

WIDTH = 1000  # all lengths are pixels
PADDING = 24
TOP = 84
LANE, THIN_LANE, LANE_GAP = 26, 5, 9
BOTTOM = 84
LETTER = 6.4
STEP_LEGEND: dict[str, str] = {
    "forward": "forward, by microbatch",
    "backward": "backward",
    "update": "optimizer update",
    "wait": "exposed transfer or reduction",
    "collective": "collective",
    "idle": "idle",
}
_COLOURS: dict[str, tuple[str, str]] = {  # light, dark
    "card": ("#ffffff", "#161b22"),
    "border": ("#d5dbe1", "#30363d"),
    "ink": ("#1f2630", "#e6edf3"),
    "faint": ("#5f6975", "#9aa5b1"),
    "grid": ("#e3e7eb", "#2b323b"),
    "idle": ("#f0f2f5", "#222933"),
    "forward": ("#7fb2f0", "#4f8fdc"),
    "backward": ("#f4b261", "#d98d36"),
    "input gradient": ("#f7d58a", "#d9ae52"),
    "weight gradient": ("#8fce9b", "#5aa469"),
    "wait": ("#ef9db5", "#c9627f"),
    "collective": ("#d0436f", "#e0648b"),
    "update": ("#9b7be0", "#8d6ad6"),
}
_ON_BAR = "#14202c"


class Chart:
    """Where times and lanes fall on the page."""

    def __init__(self, left: float, right: float, span_seconds: float, lanes: int) -> None:
        self.left, self.right, self.span_seconds = left, right, span_seconds
        self.bottom = TOP + lanes * (LANE + THIN_LANE + LANE_GAP)
        self.height = self.bottom + BOTTOM

    def x(self, seconds: float) -> float:
        """Where a time falls."""
        return self.left + seconds / self.span_seconds * (self.right - self.left)

    def y(self, lane: int) -> float:
        """Where a lane begins."""
        return TOP + lane * (LANE + THIN_LANE + LANE_GAP)

    def axis(self, caption: str, ticks: Iterable[tuple[float, str]] | None = None) -> list[str]:
        """Lines at round times (or at ``ticks``), and what the axis shows."""
        parts = []
        for seconds, text in time_ticks(self.span_seconds, 10) if ticks is None else ticks:
            at = _n(self.x(seconds))
            parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{TOP - 6}" y2="{_n(self.bottom)}"/>')
            parts.append(
                f'<text class="faint" x="{at}" y="{_n(self.bottom + 14)}" text-anchor="middle">{text}</text>'
            )
        middle = _n((self.left + self.right) / 2)
        parts.append(
            f'<text class="faint" x="{middle}" y="{_n(self.bottom + 32)}" text-anchor="middle">'
            f"{caption}</text>"
        )
        return parts

    def label(self, lane: int, name: str) -> list[str]:
        """The name of a lane; what follows a ``|`` goes below it in smaller letters."""
        large, _, small = name.partition("|")
        middle = self.y(lane) + LANE / 2
        parts = [self.label_text("ink", large, middle + (-1 if small else 4))]
        return [*parts, self.label_text("faint small", small, middle + 11)] if small else parts

    def label_text(self, style: str, text: str, y: float) -> str:
        """A text that ends before the lanes begin."""
        x = _n(self.left - 10)
        return f'<text class="{style}" x="{x}" y="{_n(y)}" text-anchor="end">{escape(text)}</text>'

    def bars(self, lane: int, bars: Sequence[Bar]) -> list[str]:
        """The lane's bars, with the number of the microbatch where it has room."""
        if self.crowded(bars):
            return self.paths(lane, bars, LANE)
        parts = []
        for bar in bars:
            parts.append(
                self.rectangle(lane, bar.start_seconds, bar.end_seconds, bar.activity, LANE, _hint(bar))
            )
            first, last = self.x(bar.start_seconds), self.x(bar.end_seconds)
            text = bar.label[1:] if bar.label[:1] in ("F", "B") else bar.label
            if text and last - first >= LETTER * len(text) + 3:
                y = self.y(lane) + LANE / 2 + 4
                parts.append(f'<text class="on" x="{_n((first + last) / 2)}" y="{_n(y)}">{text}</text>')
        return parts

    def thin_bars(self, lane: int, bars: Sequence[Bar]) -> list[str]:
        """What is under way beside the lane's bars."""
        if self.crowded(bars):
            return self.paths(lane, bars, THIN_LANE, below=LANE + 2)
        return [
            self.rectangle(
                lane,
                bar.start_seconds,
                bar.end_seconds,
                bar.activity,
                THIN_LANE,
                _hint(bar),
                below=LANE + 2,
            )
            for bar in bars
        ]

    def crowded(self, bars: Sequence[Bar]) -> bool:
        """Whether the lane has more bars than can be told apart."""
        return len(bars) > (self.right - self.left) / 3

    def paths(self, lane: int, bars: Sequence[Bar], height: int, *, below: int = 0) -> list[str]:
        """One shape an activity: what takes most of each pixel of a crowded lane."""
        pixels = int(self.right - self.left)
        activities = column_activities(bars, span_seconds=self.span_seconds, columns=pixels)
        shapes: dict[str, str] = {}
        for activity, run in groupby(range(pixels), key=lambda pixel: activities[pixel]):
            first, *rest = run
            width = len(rest) + 1
            shape = f"M{_n(self.left + first)} {_n(self.y(lane) + below)}h{width}v{height}h-{width}z"
            shapes[activity] = shapes.get(activity, "") + shape
        shapes.pop("idle", None)
        return [
            f'<path class="{_style_name(activity)}" d="{shapes[activity]}"/>' for activity in sorted(shapes)
        ]

    def rectangle(
        self,
        lane: int,
        start: float,
        end: float,
        activity: str,
        height: float,
        hint: str = "",
        *,
        below: float = 0,
    ) -> str:
        """What a lane does from one time to another; ``hint`` shows on hovering."""
        x, width = self.x(start), self.x(end) - self.x(start)
        gap = 0.8 if width > 3 else 0.0
        shape = (
            f'<rect class="{_style_name(activity)}" x="{_n(x)}" y="{_n(self.y(lane) + below)}" '
            f'width="{_n(max(width - gap, 0.3))}" height="{_n(height)}"'
        )
        return f"{shape}><title>{escape(hint)}</title></rect>" if hint else f"{shape}/>"


def _n(value: float) -> str:
    """A coordinate, to a hundredth of a pixel."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _hint(bar: Bar) -> str:
    times = f"{human_seconds(bar.start_seconds)} to {human_seconds(bar.end_seconds)}"
    return f"{bar.label or bar.activity}, {times}"


def _style_name(activity: str) -> str:
    return activity.replace(" ", "-")


def opening(height: float, title: str, subtitle: str) -> list[str]:
    """The beginning of the page: its size, style, title and subtitle."""
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {_n(height)}" width="{WIDTH}" '
        f'height="{_n(height)}" role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{_style()}</style>",
        f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{_n(height - 1)}" rx="10"/>',
        f'<text class="ink title" x="{PADDING}" y="34">{escape(title)}</text>',
        f'<text class="faint" x="{PADDING}" y="56">{escape(subtitle)}</text>',
    ]


def _style() -> str:
    rules = [
        "text{font:11.5px ui-sans-serif,system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif}",
        ".title{font-size:15px;font-weight:600}.small{font-size:10px}",
        f".on{{fill:{_ON_BAR};text-anchor:middle;font-size:11px}}",
        *_colour_rules(0),
        f"@media (prefers-color-scheme:dark){{{''.join(_colour_rules(1))}}}",
    ]
    return "".join(rules)


def _colour_rules(mode: int) -> Iterable[str]:
    """Rules of one mode: 0 light, 1 dark."""
    colours = {name: pair[mode] for name, pair in _COLOURS.items()}
    yield f".card{{fill:{colours['card']};stroke:{colours['border']}}}.grid{{stroke:{colours['grid']}}}"
    yield from (f".{_style_name(name)}{{fill:{colours[name]}}}" for name in ("ink", "faint", *ACTIVITIES))


def legend_parts(height: float, meanings: Mapping[str, str] = STEP_LEGEND) -> list[str]:
    """What each colour means, at the foot of the page."""
    parts, x, y = [], float(PADDING), height - 28
    for activity, text in meanings.items():
        parts.append(
            f'<rect class="{_style_name(activity)}" x="{_n(x)}" y="{_n(y)}" width="14" height="12"/>'
        )
        parts.append(f'<text class="ink" x="{_n(x + 20)}" y="{_n(y + 10)}">{text}</text>')
        x += 20 + LETTER * len(text) + 18
    return parts
