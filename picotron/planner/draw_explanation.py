"""Explanations and what-ifs as charts: a bar for each cause and class, as text and as HTML."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from picotron.planner.causes import ROUNDING
from picotron.planner.chart import human_bytes, human_seconds
from picotron.planner.draw import interval_words
from picotron.planner.explain import Explanation, Items, WhatIf
from picotron.planner.grid import WIDTH, joined
from picotron.planner.profile_prices import has_time_model

MEANINGS = {  # cause: what it is, for people; transfers as far as nothing hides them
    "matmul": "matrix products",
    "attention": "attention core",
    "elementwise": "norms, activations, loss",
    "launch": "kernel launches and gaps",
    "recompute": "recomputation",
    "tensor": "tensor-parallel transfers",
    "context": "context-parallel transfers",
    "expert": "expert all-to-alls",
    "pipeline_bubble": "pipeline bubble",
    "pipeline_transfer": "stage to stage transfers",
    "data": "gradients and parameters",
    "optimizer": "update and step overhead",
    "offload": "offloading",
    "schedule": "waits for other ranks",
}
_COMPUTING, _SENDING, _WAITING, _OTHER = 110, 168, 218, 141  # of the 256 colours of terminals
_COLOURS = {
    **dict.fromkeys(("matmul", "attention", "elementwise", "activations", "workspace"), _COMPUTING),
    **dict.fromkeys(("tensor", "context", "expert", "data", "pipeline_transfer", "buffers"), _SENDING),
    **dict.fromkeys(
        ("pipeline_bubble", "launch", "recompute", "offload", "schedule", "fragmentation"), _WAITING
    ),
}
_HTML = {_COMPUTING: "#7fb2f0", _SENDING: "#d0436f", _WAITING: "#ef9db5", _OTHER: "#9b7be0"}
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_BAR = 28  # columns of the longest bar
_NAME = 20


def draw_explanation(one: Explanation, *, width: int = WIDTH, colour: bool = False) -> str:
    """Headline, seconds, bytes and changes, a bar each; at most ``width`` columns wide."""
    lines = [
        _title(one),
        *(f"  {line}" for line in _headline(one)),
        "",
        f"where {human_seconds(one.step_seconds)} go (transfers: what nothing hides)",
        *_bars(one.seconds, human_seconds, colour=colour, meanings=MEANINGS),
        "",
        f"where {human_bytes(one.peak_bytes)} go, on the fullest rank: pipeline rank {one.rank}",
        *_bars(one.bytes, _whole_bytes, colour=colour),
    ]
    if one.worst_dispatch_bytes:
        more = human_bytes(one.worst_dispatch_bytes)
        lines.append(f"  experts are balanced; with every token for one rank's, {more} more")
    if one.changes:
        words = "save time" if one.margin_bytes >= 0 else "make it fit"
        lines += [
            "",
            f"single changes that {words}, {_found(one)}",
            *(f"  {line}" for line in _change_lines(one)),
        ]
    return joined(lines, width)


def _found(one: Explanation) -> str:
    """How its changes were found: without a time model nothing is quicker than predicting all."""
    return "found by estimate, each predicted" if has_time_model(one.plan.cluster) else "each predicted"


def draw_what_if(one: WhatIf, *, width: int = WIDTH, colour: bool = False) -> str:
    """Both headlines and the terms of the difference, the largest first."""
    before, after = one.before, one.after
    change = one.difference_seconds
    lines = [
        f"{_title(before)}, with {', '.join(one.asked) or 'nothing changed'}",
        *(f"  follows: {sentence}" for sentence in one.followed),
        "",
        *(f"  before: {line}" for line in _headline(before)),
        *(f"  after:  {line}" for line in _headline(after)),
        "",
        f"a step takes {_signed(change, human_seconds)} "
        f"({_percent(change / before.step_seconds, '+')}), of which",
        *_difference_bars(
            one.seconds,
            human_seconds,
            colour=colour,
            meanings=MEANINGS,
            least=ROUNDING * max(before.step_seconds, after.step_seconds),
        ),
        "",
        f"the fullest rank holds {_signed(after.peak_bytes - before.peak_bytes, _whole_bytes)}, of which",
        *_difference_bars(one.bytes, _whole_bytes, colour=colour),
    ]
    return joined(lines, width)


def _title(one: Explanation) -> str:
    plan, topology = one.plan, one.plan.topology
    degrees = " ".join(
        f"{axis}={getattr(topology, axis)}"
        for axis in ("dp", "pp", "cp", "tp", "ep", "etp")
        if axis in ("dp", "pp", "tp") or getattr(topology, axis) > 1
    )
    return f"{plan.model.name} on {plan.cluster.name}, {degrees}, under {one.profile}"


def _headline(one: Explanation) -> list[str]:
    step = human_seconds(one.step_seconds)
    device = one.tokens_per_second / one.plan.cluster.num_devices
    state = "left" if one.margin_bytes >= 0 else "TOO MUCH"
    return [
        f"step {step}, {one.tokens_per_second:,.0f} tokens/s ({device:,.0f} a device), "
        f"MFU {_percent(one.mfu)}",
        interval_words(one.interval, one.step_seconds),
        f"memory {human_bytes(one.peak_bytes)} of {human_bytes(one.capacity_bytes)}, "
        f"{human_bytes(abs(one.margin_bytes))} {state}",
    ]


def _bars(items: Items, human: Any, *, colour: bool, meanings: Mapping[str, str] = {}) -> list[str]:
    """A bar for each item that is something, with its amount and share."""
    whole = sum(value for _, value in items) or 1.0
    longest = max((value for _, value in items), default=0.0) or 1.0
    return [
        f"  {name.ljust(_NAME)}{human(value).rjust(10)}  {_percent(value / whole).rjust(7)}  "
        + _painted(_bar(value / longest), name, colour)
        + (f"  {meanings[name]}" if name in meanings else "")
        for name, value in items
        if value
    ]


def _difference_bars(
    items: Items, human: Any, *, colour: bool, meanings: Mapping[str, str] = {}, least: float = 0.0
) -> list[str]:
    """A bar for each difference, the largest first; what rounding alone made is left out."""
    longest = max((abs(value) for _, value in items), default=0.0) or 1.0
    ordered = sorted((item for item in items if abs(item[1]) > least), key=lambda item: -abs(item[1]))
    return [
        f"  {name.ljust(_NAME)}{_signed(value, human).rjust(11)}  "
        + _painted(_bar(abs(value) / longest), name, colour)
        + (f"  {meanings[name]}" if name in meanings else "")
        for name, value in ordered
    ] or ["  nothing"]


def _bar(share: float) -> str:
    """``share`` of the longest bar, to an eighth of a column, padded to its width."""
    eighths = max(1, round(share * _BAR * 8)) if share > 0 else 0
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(_BAR)


def _painted(bar: str, name: str, colour: bool) -> str:
    return f"\x1b[38;5;{_COLOURS.get(name, _OTHER)}m{bar}\x1b[0m" if colour else bar


def _percent(share: float, sign: str = "") -> str:
    return f"{share:{sign}.1%}".replace("%", " %")


def _whole_bytes(size: float) -> str:
    return human_bytes(round(size))


def _signed(value: float, human: Any) -> str:
    return f"{'+' if value > 0 else '-' if value < 0 else ''}{human(abs(value))}"


def _change_lines(one: Explanation) -> list[str]:
    room = max(len(change.setting) for change in one.changes)
    return [
        f"{change.setting.ljust(room)}  {human_seconds(change.step_seconds).rjust(8)}  "
        f"{_percent(change.step_seconds / one.step_seconds - 1, '+').rjust(8)}  "
        f"{human_bytes(change.peak_bytes)}"
        for change in one.changes
    ]


def explanation_html(one: Explanation) -> str:
    """The headline and both charts, in HTML without script or style sheet."""
    return "".join(
        [
            f"<p><b>{escape(_title(one))}</b><br>{'<br>'.join(map(escape, _headline(one)))}</p>",
            _html_bars(one.seconds, human_seconds),
            _html_bars(one.bytes, _whole_bytes),
        ]
    )


def _html_bars(items: Items, human: Any) -> str:
    """A table of bars."""
    whole = sum(value for _, value in items) or 1.0
    longest = max((value for _, value in items), default=0.0) or 1.0
    rows = [
        f"<tr><td>{escape(MEANINGS.get(name, name))}</td><td style='text-align:right'>{human(value)}</td>"
        f"<td style='text-align:right'>{value / whole:.1%}</td><td><div style='height:1em;"
        f"width:{300 * value / longest:.1f}px;"
        f"background:{_HTML[_COLOURS.get(name, _OTHER)]}'></div></td></tr>"
        for name, value in items
        if value
    ]
    return f"<table>{''.join(rows)}</table>"
