"""Why a layout is not the best one: refused by a rule, too large, or slower, cause by cause."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
from attrs import frozen

from picotron.errors import PlanError
from picotron.planner.candidates import Row, in_words, named_choices, representative, row_of_plan, rows_of
from picotron.planner.cases import ORDERS, RECOMPUTES, SCHEDULE_NAMES
from picotron.planner.chart import human_bytes, human_seconds
from picotron.planner.constraints import Rows, broken
from picotron.planner.kept import Wanted
from picotron.planner.misfit import least_bytes
from picotron.planner.plan import TrainingPlan
from picotron.planner.priced import Prices
from picotron.planner.search_result import SearchResult
from picotron.planner.space import CHOICES, Space, make_space, memory_modes, schedule_table, stage_counts
from picotron.planner.walk import covered

Verdict = Literal["best", "tie", "slower", "too large", "refused"]
SMALLEST_SHOWN = 5e-4  # of the difference: causes below it are summed in one line


@frozen(kw_only=True)
class Change:
    """One choice changed: what it is then, and what the layout then takes and holds."""

    words: str
    row: Row
    seconds: float
    bytes: int


@frozen(kw_only=True)
class Why:
    """What became of a layout that was asked about.

    ``layout``: the candidate that stands for it, the fastest that fits with what was named. ``causes`` are
    seconds more than the best takes (less, if negative); they sum to ``slower_seconds``. ``classes`` are the
    bytes of pipeline rank ``rank``, the fullest. ``changes`` are the single changes that make it fit, the
    fastest first.
    """

    verdict: Verdict
    named: str
    layout: str
    sentence: str
    seconds: float = math.nan
    bytes: int = 0
    limit_bytes: int = 0
    rank: int = 0
    causes: Mapping[str, float] = {}
    classes: Mapping[str, int] = {}
    changes: tuple[Change, ...] = ()

    @property
    def slower_seconds(self) -> float:
        """How much longer a step is than the best one's: the sum of the causes."""
        return math.fsum(self.causes.values())

    def __str__(self) -> str:
        lines = [f"{self.named}: {self.sentence}"]
        if self.verdict == "too large":
            lines += [f"  {size / 2**30:9.2f} GiB  {name}" for name, size in _largest_first(self.classes)]
            lines += [
                f"  {change.words}: {human_seconds(change.seconds)}, {human_bytes(change.bytes)}"
                for change in self.changes[1:4]
            ]
        elif self.causes:
            lines += [f"  {1e3 * lost:+9.1f} ms  {cause}" for cause, lost in _told(self.causes)]
        return "\n".join(lines)


def why(result: SearchResult, layout: TrainingPlan | str | None, choices: Mapping[str, Any]) -> Why:
    """What became of a layout: a plan, a text such as ``"tp=4 pp=8"``, or choices by name."""
    if isinstance(layout, TrainingPlan):
        if choices:
            raise PlanError("name a plan or choices, not both")
        _check_request(result, layout)
        row = representative(result.space, row_of_plan(layout))
        return _of_row(result, "this plan", row)
    if layout is not None and not isinstance(layout, str):
        raise PlanError(f"a layout must be a plan or a text such as 'tp=4 pp=8', got {type(layout).__name__}")
    asked = {**(named_choices(layout) if layout else {}), **choices}
    if not asked:
        raise PlanError("name a layout: a plan, or choices such as tp=4 pp=8")
    named = " ".join(f"{name}={_shown(value)}" for name, value in asked.items())
    space = result.space
    narrowed = make_space(space.model, space.cluster, space.work, **{**space.asked, **asked})
    return _of_choices(result, named, narrowed)


def _of_choices(result: SearchResult, named: str, narrowed: Space) -> Why:
    """Of the fastest layout that fits with the choices named, or the one that is nearest to fitting."""
    wanted = Wanted(limit_bytes=result.limit_bytes, keep=1, reach=1.0)
    try:
        kept, _ = covered(narrowed, result.prices, wanted)
    except PlanError as error:
        return Why(verdict="refused", named=named, layout="", sentence=str(error))
    if len(kept.seconds):
        at = int(kept.fastest()[0])
        return _of_row(result, named, {name: float(kept.rows[name][at]) for name in CHOICES})
    return _of_row(result, named, least_bytes(narrowed, result.prices)[1])


def _of_row(result: SearchResult, named: str, row: Row) -> Why:
    """Of one candidate."""
    rows = rows_of([row, result.fastest.row(0)])
    time, memory = result.prices.seconds(rows), result.prices.memory(rows)
    classes = {name: int(_at(column, 0)) for name, column in memory.classes.items()}
    size, limit, rank = int(_at(memory.reserved_bytes, 0)), result.limit_bytes, int(_at(memory.rank, 0))
    causes = {name: _at(column, 0) - _at(column, 1) for name, column in time.causes.items()}
    seconds, best = (_at(time.step_seconds, index) for index in (0, 1))
    words = in_words(row)
    known: dict[str, Any] = {
        "named": named,
        "layout": words,
        "seconds": seconds,
        "bytes": size,
        "limit_bytes": limit,
        "rank": rank,
        "classes": classes,
    }
    if size > limit:
        changes = single_changes(result.space, result.prices, row, limit)
        return Why(verdict="too large", sentence=_too_large(known, changes), changes=changes, **known)
    lost = math.fsum(causes.values())
    share = lost / best
    if lost <= 0 and dict(row) == dict(result.fastest.row(0)):
        return Why(verdict="best", sentence=f"{words} is the best, {human_seconds(seconds)} a step", **known)
    within = result.interval is not None and seconds <= result.interval.half_range(best)[1]
    verdict: Verdict = "tie" if within else "slower"
    also = ", which is within the prediction's error" if verdict == "tie" else ""
    sentence = (
        f"{words} takes {human_seconds(seconds)} a step, {1e3 * lost:.1f} ms ({share:.1%}) more than the "
        f"best, {in_words(result.fastest.row(0))}{also}"
    ).replace("%)", " %)")
    return Why(verdict=verdict, sentence=sentence, causes=causes, **known)


def _too_large(known: Mapping[str, Any], changes: tuple[Change, ...]) -> str:
    largest = max(known["classes"].items(), key=lambda item: item[1])
    size, limit = known["bytes"], known["limit_bytes"]
    text = (
        f"{known['layout']} needs {size / 2**30:.2f} GiB of {limit / 2**30:.2f} on pipeline rank "
        f"{known['rank']}, {(size - limit) / 2**30:.2f} too much, "
        f"most of it {largest[0]} ({largest[1] / 2**30:.2f} GiB)"
    )
    if not changes:
        return f"{text}; no single change makes it fit"
    change = changes[0]
    lost = change.seconds - known["seconds"]
    return (
        f"{text}; {change.words} makes it fit in {change.bytes / 2**30:.2f} GiB, "
        f"at {human_seconds(change.seconds)} a step ({1e3 * lost:+.1f} ms)"
    )


def single_changes(space: Space, priced: Prices, row: Row, limit_bytes: int) -> tuple[Change, ...]:
    """The layouts that differ in one choice (dp follows the other degrees) and fit, the fastest first."""
    whole = make_space(space.model, space.cluster, space.work)
    found: dict[tuple[float, ...], tuple[str, Row]] = {}
    for words, changed in _neighbours(whole, row):
        plain = representative(whole, changed)
        if dict(plain) != dict(row):
            found.setdefault(tuple(plain.values()), (words, plain))
    if not found:
        return ()
    rows = rows_of([changed for _, changed in found.values()])
    allowed = ~broken(whole.known, rows).any(axis=0)
    seconds = np.broadcast_to(priced.seconds(rows).step_seconds, allowed.shape)
    size = np.broadcast_to(priced.memory(rows).reserved_bytes, allowed.shape)
    good = np.flatnonzero(allowed & (size <= limit_bytes))
    listed = list(found.values())
    order = good[np.lexsort((size[good], seconds[good]))]
    return tuple(
        Change(words=listed[i][0], row=listed[i][1], seconds=float(seconds[i]), bytes=int(size[i]))
        for i in order
    )


def _neighbours(space: Space, row: Row) -> Iterator[tuple[str, Row]]:
    """Every layout with one choice changed, allowed or not."""
    for name in ("tp", "cp", "pp"):
        for value in space.domains[name]:
            others = math.prod(row[axis] for axis in ("tp", "cp", "pp") if axis != name) * value
            if value != row[name] and space.known.devices % others == 0:
                yield f"{name}={value:.0f}", _with_dp(row, {name: value}, space.known.devices // others)
    for name in ("micro_batch", "ep", "etp", "sequence_parallel", "ends"):
        for value in space.domains[name]:
            yield f"{name}={value:.0f}", {**row, name: value}
    ranks = row["dp"] * row["cp"]
    for value in space.domains["zero_stage"]:
        shard = 1.0 if not value else row["shard"] if row["zero_stage"] else ranks
        yield f"zero_stage={value:.0f}", {**row, "zero_stage": value, "shard": shard}
    if row["zero_stage"]:
        yield f"shard={ranks:.0f}", {**row, "shard": ranks}
    for mode, share, offload in memory_modes(space):
        if offload == space.domains["offload"][0]:
            kept = {"recompute": mode, "recompute_layers": share}
            yield (
                f"recompute={RECOMPUTES[int(mode)]} of {share:.0%} of the layers".replace("%", " %"),
                {**row, **kept},
            )
    for value in space.domains["offload"]:
        yield f"offload={value:g}", {**row, "offload": value}
    yield from _schedules(space, row)
    for index, order in enumerate(ORDERS):
        yield f"order={','.join(order)}", {**row, "order": index}


def _schedules(space: Space, row: Row) -> Iterator[tuple[str, Row]]:
    table: Rows = schedule_table(space, int(row["pp"]))
    for schedule, stages in zip(table["schedule"].tolist(), table["virtual_stages"].tolist(), strict=True):
        words = f"schedule={SCHEDULE_NAMES[schedule]}" + f" virtual_stages={stages}" * (stages > 1)
        yield words, {**row, "schedule": schedule, "virtual_stages": stages}
    for stages in stage_counts(space, int(row["pp"])):
        yield f"virtual_stages={stages}", {**row, "virtual_stages": stages}


def _with_dp(row: Row, changed: Mapping[str, float], dp: float) -> Row:
    """The row with other degrees; what was shared over all ranks of dp * cp still is."""
    whole = row["shard"] == row["dp"] * row["cp"]
    found = {**row, **changed, "dp": dp}
    ranks = found["dp"] * found["cp"]
    return {**found, "shard": 1.0 if not row["zero_stage"] else ranks if whole else row["shard"]}


def _check_request(result: SearchResult, layout: TrainingPlan) -> None:
    """Raise PlanError for a plan of another request: its numbers could not be compared."""
    space = result.space
    for name, own, other in (
        ("model", space.model, layout.model),
        ("cluster", space.cluster, layout.cluster),
        ("workload", space.work, layout.workload),
    ):
        if own != other:
            raise PlanError(f"the plan must have the search's own {name}, got another; search for that one")


def _at(column: np.ndarray, index: int) -> float:
    return float(np.broadcast_to(column, (2,))[index])


def _largest_first(classes: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(((n, s) for n, s in classes.items() if s), key=lambda item: (-item[1], item[0]))


def _told(causes: Mapping[str, float]) -> list[tuple[str, float]]:
    """The causes that matter, the greatest first, and the sum of the others."""
    total = sum(map(abs, causes.values()))
    large = {name: lost for name, lost in causes.items() if abs(lost) > SMALLEST_SHOWN * total}
    lines = sorted(large.items(), key=lambda item: -abs(item[1]))
    rest = math.fsum(lost for name, lost in causes.items() if name not in large)
    return [*lines, ("all others", rest)] if rest else lines


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
