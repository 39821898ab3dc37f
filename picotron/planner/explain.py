"""Where each millisecond and each byte of a plan goes, and what one change would do to them.

Seconds by cause are ``estimate_seconds``' own, bytes by class ``estimate_bytes``' on the fullest rank; both
sum to the whole. A difference between two plans is told cause by cause, so that its terms sum to it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from attrs import field, frozen

from picotron.errors import PlanError
from picotron.planner.chart import human_bytes, human_seconds
from picotron.planner.cluster import ClusterSpec, peak_flops_per_second
from picotron.planner.columns_of import cases_of_plan
from picotron.planner.estimate import estimate_seconds
from picotron.planner.estimate_memory import estimate_bytes
from picotron.planner.grid import WIDTH, joined
from picotron.planner.plan import TrainingPlan
from picotron.planner.predict import model_flops
from picotron.planner.search import relative_interval
from picotron.planner.serialize import fingerprint
from picotron.planner.software import SoftwareProfile, software_columns, software_profile
from picotron.planner.validators import is_between, shown
from picotron.planner.what_if import changed, single_changes

MOST_CHANGES = 3
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
}
_COMPUTING, _SENDING, _WAITING, _OTHER = 110, 168, 218, 141  # of the 256 colours of terminals
_COLOURS = {
    **dict.fromkeys(("matmul", "attention", "elementwise", "activations", "logits", "workspace"), _COMPUTING),
    **dict.fromkeys(("tensor", "context", "expert", "data", "pipeline_transfer", "communication"), _SENDING),
    **dict.fromkeys(("pipeline_bubble", "launch", "recompute", "offload", "fragmentation"), _WAITING),
}
_HTML = {_COMPUTING: "#7fb2f0", _SENDING: "#d0436f", _WAITING: "#ef9db5", _OTHER: "#9b7be0"}
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_BAR = 28  # columns of the longest bar
_NAME = 20

Items = tuple[tuple[str, float], ...]


@frozen(kw_only=True)
class Change:
    """What one change would do: the seconds of the step, and the bytes of the fullest rank."""

    setting: str
    step_seconds: float
    peak_bytes: int


@frozen(kw_only=True)
class Explanation:
    """Seconds of a step by cause and bytes of the fullest rank by class; each sums to its whole.

    ``interval`` is the relative error to expect of the seconds. ``rank`` is the fullest position of the
    pipeline. ``changes`` are the single changes that save most, of plans that fit.
    """

    plan: TrainingPlan = field(repr=False)
    profile: str
    step_seconds: float
    interval: float
    seconds: Items
    bytes: Items
    rank: int
    tokens_per_second: float
    mfu: float
    changes: tuple[Change, ...] = ()

    @property
    def peak_bytes(self) -> int:
        """Bytes of the fullest rank, all classes."""
        return int(sum(size for _, size in self.bytes))

    @property
    def capacity_bytes(self) -> int:
        """What the device has."""
        return self.plan.cluster.device.memory_bytes

    @property
    def margin_bytes(self) -> int:
        """What the fullest rank has left; negative if the plan does not fit."""
        return self.capacity_bytes - self.peak_bytes

    @property
    def data(self) -> dict[str, Any]:
        """The explanation as values that JSON has, in seconds and bytes."""
        return {
            "profile": self.profile,
            "step_seconds": self.step_seconds,
            "interval": self.interval,
            "seconds": dict(self.seconds),
            "bytes": {name: int(size) for name, size in self.bytes},
            "rank": self.rank,
            "peak_bytes": self.peak_bytes,
            "capacity_bytes": self.capacity_bytes,
            "margin_bytes": self.margin_bytes,
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
            "changes": [
                {"setting": one.setting, "step_seconds": one.step_seconds, "peak_bytes": one.peak_bytes}
                for one in self.changes
            ],
            "fingerprint": fingerprint(self.plan),
        }

    def to_json(self) -> str:
        """The explanation as JSON text, in seconds and bytes."""
        return json.dumps(self.data, sort_keys=True, indent=2, allow_nan=False) + "\n"

    def __str__(self) -> str:
        return draw_explanation(self)

    def _repr_html_(self) -> str:
        """Both charts, for notebooks."""
        return "".join(
            [
                f"<p><b>{escape(_title(self))}</b><br>{'<br>'.join(map(escape, _headline(self)))}</p>",
                _html_bars(self.seconds, human_seconds),
                _html_bars(self.bytes, _whole_bytes),
            ]
        )


@frozen(kw_only=True)
class WhatIf:
    """Two explanations, what was ``asked`` to differ and what ``followed``."""

    before: Explanation
    after: Explanation
    asked: tuple[str, ...]
    followed: tuple[str, ...]

    @property
    def seconds(self) -> Items:
        """What each cause adds to the difference of the step's seconds."""
        return _differences(self.before.seconds, self.after.seconds)

    @property
    def bytes(self) -> Items:
        """What each class adds to the difference of the fullest ranks' bytes."""
        return _differences(self.before.bytes, self.after.bytes)

    @property
    def difference_seconds(self) -> float:
        """How much longer the step takes; the sum of its terms."""
        return sum(value for _, value in self.seconds)

    @property
    def data(self) -> dict[str, Any]:
        """The comparison as values that JSON has."""
        return {
            "asked": list(self.asked),
            "followed": list(self.followed),
            "before": self.before.data,
            "after": self.after.data,
            "difference_seconds": self.difference_seconds,
            "seconds": dict(self.seconds),
            "bytes": {name: int(size) for name, size in self.bytes},
        }

    def __str__(self) -> str:
        return draw_what_if(self)


def explain(
    plan: TrainingPlan,
    *,
    profile: SoftwareProfile | str | None = None,
    interval: float | None = None,
    changes: int = MOST_CHANGES,
) -> Explanation:
    """Where the seconds and bytes of ``plan`` go under a software profile, the cluster's own by default.

    ``changes`` single changes that save most are looked for; ``interval`` replaces the relative error that
    predictions are known to have. Raises PlanError for what is no plan, an unknown
    profile, or numbers of a cluster from which no time can be told.
    """
    if not isinstance(plan, TrainingPlan):
        raise PlanError(f"plan must be a TrainingPlan, got {type(plan).__name__}; make one with plan(...)")
    if interval is not None and not is_between(interval, 0, 10):
        raise PlanError(f"interval must be a relative error in [0, 10], got {shown(interval)}")
    profile = plan.cluster.profile if profile is None else profile
    software = software_profile(profile) if isinstance(profile, str) else profile
    seconds, sizes, rank = _estimated(plan, software)
    step = sum(value for _, value in seconds)
    if not 0 < step < float("inf"):
        raise PlanError(f"a step must take a positive finite time, got {step}; look at the cluster's rates")
    peak = peak_flops_per_second(plan.cluster.device, plan.format.product) * plan.cluster.num_devices
    return Explanation(
        plan=plan,
        profile=software.name,
        step_seconds=step,
        interval=relative_interval(plan.cluster.device.architecture, experts=plan.model.experts is not None)
        if interval is None
        else interval,
        seconds=seconds,
        bytes=sizes,
        rank=rank,
        tokens_per_second=plan.workload.global_batch * plan.workload.seq_len / step,
        mfu=model_flops(plan, "full") / step / peak,
        changes=_best_changes(plan, software, step, sizes, changes) if changes else (),
    )


def what_if(
    plan: TrainingPlan,
    settings: Mapping[str, Any] | None = None,
    *,
    cluster: ClusterSpec | None = None,
    profile: SoftwareProfile | str | None = None,
    profile_after: SoftwareProfile | str | None = None,
    interval: float | None = None,
    asked: Sequence[str] = (),
) -> WhatIf:
    """What changes with ``settings`` of the plan, on another ``cluster`` or under another profile.

    ``asked`` says so in the caller's own words. Raises PlanError for a plan that cannot be.
    """
    other, followed = changed(plan, settings or {}, cluster)
    own = tuple(f"{name}={value}" for name, value in (settings or {}).items())
    return WhatIf(
        before=explain(plan, profile=profile, interval=interval, changes=0),
        after=explain(other, profile=profile_after or profile, interval=interval, changes=0),
        asked=tuple(asked) or own,
        followed=followed,
    )


def _estimated(plan: TrainingPlan, software: SoftwareProfile) -> tuple[Items, Items, int]:
    """Seconds by cause, whole bytes by class, and the fullest rank."""
    cases = cases_of_plan(plan, software_columns(software, plan.cluster.device.architecture))
    time, memory = estimate_seconds(cases), estimate_bytes(cases)
    return (
        tuple((cause, _one(column)) for cause, column in time.causes.items()),
        tuple((name, float(round(_one(column)))) for name, column in memory.classes.items()),
        round(_one(memory.rank)),
    )


def _one(column: np.ndarray) -> float:
    value = float(np.ravel(column)[0])
    if not np.isfinite(value):
        raise PlanError(f"an estimate must be a finite number, got {value}; look at the cluster's rates")
    return value


def _best_changes(
    plan: TrainingPlan, software: SoftwareProfile, step: float, sizes: Items, count: int
) -> tuple[Change, ...]:
    """The single changes with the fastest steps of those that fit; of any speed where nothing fits yet."""
    capacity = plan.cluster.device.memory_bytes
    fits_now = sum(size for _, size in sizes) <= capacity
    found = []
    for setting in single_changes(plan):
        try:
            other, _ = changed(plan, setting)
        except PlanError:
            continue
        seconds, own, _ = _estimated(other, software)
        words = ", ".join(f"{name}={value}" for name, value in setting.items())
        total, size = sum(value for _, value in seconds), int(sum(value for _, value in own))
        if size <= capacity and (total < step * (1 - 1e-3) or not fits_now):
            found.append(Change(setting=words, step_seconds=total, peak_bytes=size))
    return tuple(sorted(found, key=lambda one: (one.step_seconds, one.setting))[:count])


def _differences(before: Items, after: Items) -> Items:
    """After less before, name by name."""
    old, new = dict(before), dict(after)
    return tuple((name, new.get(name, 0.0) - old.get(name, 0.0)) for name in {**old, **new})


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
    if one.changes:
        words = "save most" if one.margin_bytes >= 0 else "make it fit"
        lines += ["", f"single changes that {words}", *(f"  {line}" for line in _change_lines(one))]
    return joined(lines, width)


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
        *_difference_bars(one.seconds, human_seconds, colour=colour, meanings=MEANINGS),
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
    low, high = (max(0.0, one.step_seconds * (1 + sign * one.interval)) for sign in (-1, 1))
    step += f" ({human_seconds(low)} to {human_seconds(high)})"
    device = one.tokens_per_second / one.plan.cluster.num_devices
    state = "left" if one.margin_bytes >= 0 else "TOO MUCH"
    return [
        f"step {step}, {one.tokens_per_second:,.0f} tokens/s ({device:,.0f} a device), "
        f"MFU {_percent(one.mfu)}",
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
    items: Items, human: Any, *, colour: bool, meanings: Mapping[str, str] = {}
) -> list[str]:
    """A bar for each difference, the largest first."""
    longest = max((abs(value) for _, value in items), default=0.0) or 1.0
    ordered = sorted((item for item in items if item[1]), key=lambda item: -abs(item[1]))
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


def _html_bars(items: Items, human: Any) -> str:
    """A table of bars, in HTML without script or style sheet."""
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
