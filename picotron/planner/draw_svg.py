"""A step over time as a self-contained SVG: no script, font or file from elsewhere.

One lane a pipeline rank, coloured by what the rank does; the thin lane below it shows the transfers and
reductions under way meanwhile. Colours follow the reader's light or dark preference. The same plan gives the
same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from xml.sax.saxutils import escape

from picotron.planner.chart import (
    ACTIVITIES,
    Bar,
    background_bars,
    clock_name,
    column_activities,
    compute_bars,
    human_seconds,
    time_ticks,
)
from picotron.planner.draw import stage_contents
from picotron.planner.plan import TrainingPlan
from picotron.planner.predict import Prediction, predict
from picotron.planner.program import Row, rows
from picotron.planner.timeline import Timeline

WIDTH = 1000  # all lengths are pixels
_PADDING = 24
_TOP = 84
_LANE, _THIN_LANE, _LANE_GAP = 26, 5, 9
_BOTTOM = 84
_LETTER = 6.4
_LEGEND: dict[str, str] = {
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
    "wait": ("#ef9db5", "#c9627f"),
    "collective": ("#d0436f", "#e0648b"),
    "update": ("#9b7be0", "#8d6ad6"),
}
_ON_BAR = "#14202c"


def schedule_svg(plan: TrainingPlan) -> str:
    """The predicted step of ``plan``, over time and by pipeline stage."""
    prediction, program = predict(plan), plan.program()
    degrees = " ".join(f"{axis}={getattr(plan.topology, axis)}" for axis in ("pp", "dp", "cp", "tp"))
    return timeline_svg(
        prediction.timeline,
        [rows(program, stage) for stage in range(plan.topology.pp)],
        title=f"{plan.model.name} on {plan.cluster.name}, {plan.schedule_name}, {degrees}, "
        f"{plan.num_microbatches} microbatches",
        subtitle=_summary(prediction),
        labels=[f"stage {stage}|{held}" for stage, held in enumerate(stage_contents(plan))],
    )


def _summary(prediction: Prediction) -> str:
    return (
        f"One step takes {human_seconds(prediction.step_seconds)} (virtual time, predicted): "
        f"bubble {prediction.bubble_fraction:.1%}, MFU {prediction.mfu:.1%}, "
        f"{prediction.tokens_per_second:,.0f} tokens/s"
    )


def timeline_svg(
    timeline: Timeline,
    programs: Sequence[Sequence[Row]],
    *,
    title: str,
    subtitle: str = "",
    labels: Sequence[str] | None = None,
) -> str:
    """A timeline as SVG text, to scale from 0 to its makespan.

    ``programs``: the rows of each rank that the timeline names. ``labels`` name the ranks, in their order;
    what follows a ``|`` goes in smaller letters below.
    """
    ranks = sorted(set(timeline.rank.tolist()))
    names = [f"rank {rank}" for rank in ranks] if labels is None else list(labels)
    left = _PADDING + 14 + _LETTER * max(len(part) for name in names for part in name.split("|"))
    chart = _Chart(left, WIDTH - _PADDING, max(timeline.makespan_seconds, 1e-12), len(ranks))
    computing, background = compute_bars(timeline, programs), background_bars(timeline, programs)
    caption = f"{clock_name(timeline)}, since the step began; thin lanes: transfers and reductions under way"
    parts = [*_opening(chart.height, title, subtitle), *chart.axis(caption)]
    for lane, (rank, name) in enumerate(zip(ranks, names, strict=True)):
        parts += chart.label(lane, name)
        parts.append(chart.rectangle(lane, 0.0, chart.span_seconds, "idle", _LANE))
        parts += chart.bars(lane, [bar for bar in computing if bar.rank == rank])
        parts += chart.thin_bars(lane, [bar for bar in background if bar.rank == rank])
    parts += [*_legend(chart.height), "</svg>"]
    return "\n".join(parts) + "\n"


class _Chart:
    """Where times and lanes fall on the page."""

    def __init__(self, left: float, right: float, span_seconds: float, lanes: int) -> None:
        self.left, self.right, self.span_seconds = left, right, span_seconds
        self.bottom = _TOP + lanes * (_LANE + _THIN_LANE + _LANE_GAP)
        self.height = self.bottom + _BOTTOM

    def x(self, seconds: float) -> float:
        return self.left + seconds / self.span_seconds * (self.right - self.left)

    def y(self, lane: int) -> float:
        return _TOP + lane * (_LANE + _THIN_LANE + _LANE_GAP)

    def axis(self, caption: str) -> list[str]:
        parts = []
        for seconds, text in time_ticks(self.span_seconds, 10):
            at = _n(self.x(seconds))
            parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{_TOP - 6}" y2="{_n(self.bottom)}"/>')
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
        large, _, small = name.partition("|")
        middle = self.y(lane) + _LANE / 2
        parts = [self.label_text("ink", large, middle + (-1 if small else 4))]
        return [*parts, self.label_text("faint small", small, middle + 11)] if small else parts

    def label_text(self, style: str, text: str, y: float) -> str:
        x = _n(self.left - 10)
        return f'<text class="{style}" x="{x}" y="{_n(y)}" text-anchor="end">{escape(text)}</text>'

    def bars(self, lane: int, bars: Sequence[Bar]) -> list[str]:
        """The lane's bars, with the number of the microbatch where it has room."""
        if self.crowded(bars):
            return self.paths(lane, bars, _LANE)
        parts = []
        for bar in bars:
            parts.append(
                self.rectangle(lane, bar.start_seconds, bar.end_seconds, bar.activity, _LANE, _hint(bar))
            )
            first, last = self.x(bar.start_seconds), self.x(bar.end_seconds)
            text = bar.label[1:] if bar.label[:1] in ("F", "B") else bar.label
            if text and last - first >= _LETTER * len(text) + 3:
                y = self.y(lane) + _LANE / 2 + 4
                parts.append(f'<text class="on" x="{_n((first + last) / 2)}" y="{_n(y)}">{text}</text>')
        return parts

    def thin_bars(self, lane: int, bars: Sequence[Bar]) -> list[str]:
        """What is under way beside the lane's bars."""
        if self.crowded(bars):
            return self.paths(lane, bars, _THIN_LANE, below=_LANE + 2)
        return [
            self.rectangle(
                lane,
                bar.start_seconds,
                bar.end_seconds,
                bar.activity,
                _THIN_LANE,
                _hint(bar),
                below=_LANE + 2,
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
        return [f'<path class="{activity}" d="{shapes[activity]}"/>' for activity in sorted(shapes)]

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
        x, width = self.x(start), self.x(end) - self.x(start)
        gap = 0.8 if width > 3 else 0.0
        shape = (
            f'<rect class="{activity}" x="{_n(x)}" y="{_n(self.y(lane) + below)}" '
            f'width="{_n(max(width - gap, 0.3))}" height="{_n(height)}"'
        )
        return f"{shape}><title>{escape(hint)}</title></rect>" if hint else f"{shape}/>"


def _n(value: float) -> str:
    """A coordinate, to a hundredth of a pixel."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _hint(bar: Bar) -> str:
    times = f"{human_seconds(bar.start_seconds)} to {human_seconds(bar.end_seconds)}"
    return f"{bar.label or bar.activity}, {times}"


def _opening(height: float, title: str, subtitle: str) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {_n(height)}" width="{WIDTH}" '
        f'height="{_n(height)}" role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{_style()}</style>",
        f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{_n(height - 1)}" rx="10"/>',
        f'<text class="ink title" x="{_PADDING}" y="34">{escape(title)}</text>',
        f'<text class="faint" x="{_PADDING}" y="56">{escape(subtitle)}</text>',
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
    yield from (f".{name}{{fill:{colours[name]}}}" for name in ("ink", "faint", *ACTIVITIES))


def _legend(height: float) -> list[str]:
    parts, x, y = [], float(_PADDING), height - 28
    for activity, text in _LEGEND.items():
        parts.append(f'<rect class="{activity}" x="{_n(x)}" y="{_n(y)}" width="14" height="12"/>')
        parts.append(f'<text class="ink" x="{_n(x + 20)}" y="{_n(y + 10)}">{text}</text>')
        x += 20 + _LETTER * len(text) + 18
    return parts
