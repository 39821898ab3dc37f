"""Plans, schedules and timelines as text: pure functions from values to strings.

The same value gives the same text, at most ``width`` columns wide where a width is taken. Axes carry units.
A time chart has one row a rank and one column an equal share of time: a column shows what took most of it,
and an action bears its name (``F0``: forward of microbatch 0) where that has room.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from itertools import zip_longest

import numpy as np

from picotron.planner.chart import (
    COMPUTING,
    FILLS,
    Bar,
    clock_name,
    compute_bars,
    decimals,
    human_bytes,
    human_seconds,
    rank_ranges,
    time_ticks,
)
from picotron.planner.grid import (
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
from picotron.planner.interval import Interval
from picotron.planner.memory import MemoryTimeline, memory_timeline
from picotron.planner.plan import TrainingPlan
from picotron.planner.predict import Prediction, predict
from picotron.planner.program import Row, rows
from picotron.planner.rank_bytes import MOST_NAMED
from picotron.planner.timeline import Timeline
from picotron.planner.topology import Coordinate, Topology, rank_of

_MEMORY_LETTERS = {"parameters": "P", "gradients": "G", "optimizer": "O", "activations": "A", "other": "x"}
_MEMORY_HEADS = ("params", "grads", "optim", "activ", "other", "peak")
_CLOSE_TO_SCALE = 8  # a capacity more than this many times the peak is named, not drawn
NARROWEST = len("dp 0  ")  # of a grid's columns
LEGIBLE_COLUMNS = 4  # of a typical action where the whole step would not show it


def _percent(fraction: float) -> str:
    return f"{fraction:.1%}".replace("%", " %")


def _rate(per_second: float) -> str:
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.3g}"


def draw_timeline(
    timeline: Timeline,
    programs: Sequence[Sequence[Row]],
    *,
    width: int = WIDTH,
    labels: Sequence[str] | None = None,
) -> str:
    """The timeline to scale, one row a rank: what holds its compute stream, and when.

    Where actions would be too short to see, the beginning and the end are shown at a larger scale, and that
    is said. ``programs``: the rows of each rank that the timeline names. ``labels`` name the ranks, in order.
    """
    bars = compute_bars(timeline, programs)
    ranks = sorted(set(timeline.rank.tolist()))
    names = [f"rank {rank}" for rank in ranks] if labels is None else list(labels)
    margin = max(map(len, names)) + 2
    room, span = width - margin, max(timeline.makespan_seconds, 1e-12)
    columns = _visible_columns(bars, span_seconds=span, room=room)
    windows = windows_of(columns, room=room, unit_columns=1)
    rows = strips(by_rank(bars, ranks), span_seconds=span, columns=columns)
    ticks = [(nearest(at / span * columns), text) for at, text in time_ticks(span, columns // 12)]
    part = " (its beginning and its end)" if len(windows) > 1 else ""
    return joined(
        [
            f"one step{part}: {human_seconds(span)} ({clock_name(timeline)}); a column is "
            f"{human_seconds(span / columns)} and shows what took most of it",
            *(
                name.ljust(margin) + shown_strip(strip, windows)
                for name, strip in zip(names, rows, strict=True)
            ),
            "time".ljust(margin) + " … ".join(axis(ticks, first, stop) for first, stop in windows),
            legend(bars),
        ],
        width,
    )


def _visible_columns(bars: Iterable[Bar], *, span_seconds: float, room: int) -> int:
    """Columns of the whole span: ``room`` if a typical action has one, else LEGIBLE_COLUMNS for each."""
    lengths = [b.end_seconds - b.start_seconds for b in bars if b.activity in COMPUTING]
    typical = float(np.median(lengths)) if lengths else span_seconds
    if typical / span_seconds * room >= 1:
        return room
    return math.ceil(span_seconds / typical * LEGIBLE_COLUMNS)


def draw_grid(plan: TrainingPlan, *, width: int = WIDTH) -> str:
    """Where each rank sits: pipeline stages down, data and context parallelism across, a cell a tp group.

    Neighbouring columns are merged until the grid fits; names take half of the width at most; ``a-b`` is
    every rank from a to b, ``a-b:k`` every k-th. Each rank stands in exactly one cell.
    """
    names = [f"{name}: {held}" for name, held in zip(stage_names(plan), stage_contents(plan), strict=True)]
    margin = min(max(map(len, names)) + 2, width // 2)
    for merged in _column_merges(plan.topology, max(1, (width + 2 - margin) // NARROWEST)):
        heads, cells = _grid_cells(plan.topology, merged)
        size = max(len(text) for row in [heads, *cells] for text in row) + 2
        if margin + size * len(heads) <= width + 2:
            break
    lines = ["ranks".ljust(margin) + "".join(head.ljust(size) for head in heads)]
    for name, row in zip(names, cells, strict=True):
        text = "".join(cell.ljust(size) for cell in row).rstrip()
        pieces = (
            [text] if len(text) <= width - margin else textwrap.wrap(text.replace(",", ", "), width - margin)
        )
        held = [name] if len(name) <= margin - 2 else textwrap.wrap(name.replace(",", ", "), margin - 2)
        lines += [left.ljust(margin) + piece for left, piece in zip_longest(held, pieces, fillvalue="")]
    return joined(lines, width)


def stage_names(plan: TrainingPlan) -> tuple[str, ...]:
    """What each pipeline rank's row is called: ``stage 3``, ``stages 3,4``, or ``stages 1-29:4``."""
    digits = len(str(plan.num_stages - 1))
    several = "s" * (plan.virtual_stages > 1)

    def named(stages: Sequence[int]) -> str:
        if len(stages) > MOST_NAMED:
            return rank_ranges(stages)
        return ",".join(f"{stage:>{digits}}" for stage in stages)

    return tuple(f"stage{several} {named(plan.rank_stages(rank))}" for rank in range(plan.topology.pp))


def stage_contents(plan: TrainingPlan) -> tuple[str, ...]:
    """What the stages of each pipeline rank hold: ``embedding, layers 0-3``."""
    out, first, last = [], 0, plan.num_stages - 1
    for stage, count in enumerate(plan.stage_layers):
        layers = f"layers {first}-{first + count - 1}" if count > 1 else f"layer {first}"
        out.append("embedding, " * (stage == 0) + layers + ", head" * (stage == last))
        first += count
    return tuple(
        "; ".join(out[stage] for stage in plan.rank_stages(rank)) for rank in range(plan.topology.pp)
    )


def _column_merges(topology: Topology, most: int) -> list[tuple[int, int]]:
    """How many dp and cp indices share a column, from none merged to all; of ``most`` columns."""
    merges = [(1, size) for size in _divisors(topology.cp)]
    merges += [(size, topology.cp) for size in _divisors(topology.dp) if size > 1]
    return [merged for merged in merges if topology.dp * topology.cp // (merged[0] * merged[1]) <= most]


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _grid_cells(topology: Topology, merged: tuple[int, int]) -> tuple[list[str], list[list[str]]]:
    """Column heads, and for each stage the ranks of each column."""
    columns = [
        (range(d, d + merged[0]), range(c, c + merged[1]))
        for d in range(0, topology.dp, merged[0])
        for c in range(0, topology.cp, merged[1])
    ]
    heads = [
        f"dp {rank_ranges(dps)}" + (f" cp {rank_ranges(cps)}" if topology.cp > 1 else "")
        for dps, cps in columns
    ]
    cells = [
        [
            rank_ranges(
                rank_of(topology, Coordinate(pp=stage, dp=dp, cp=cp, tp=tp))
                for dp in dps
                for cp in cps
                for tp in range(topology.tp)
            )
            for dps, cps in columns
        ]
        for stage in range(topology.pp)
    ]
    return heads, cells


def stage_memory(plan: TrainingPlan) -> tuple[MemoryTimeline, ...]:
    """The fullest rank at each pipeline coordinate: its first, which holds the largest slices."""
    return tuple(
        memory_timeline(plan, rank_of(plan.topology, Coordinate(pp=pp))) for pp in range(plan.topology.pp)
    )


def _memory_split(timeline: MemoryTimeline) -> dict[str, int]:
    """Bytes of the highest moment under the headings that are drawn."""
    split = dict.fromkeys(_MEMORY_LETTERS, 0)
    for name, size in timeline.peak_by_category:
        split[name if name in split else "other"] += size
    return split


def draw_memory(plan: TrainingPlan, *, width: int = WIDTH) -> str:
    """The highest moment of each stage's fullest rank, by category, as numbers and as a bar.

    All bars have one scale: to the device's capacity, marked ``|``, or to the highest peak where that is more
    than the capacity or a small part of it.
    """
    splits = [_memory_split(timeline) for timeline in stage_memory(plan)]
    capacity, peak = plan.cluster.device.memory_bytes, max(sum(split.values()) for split in splits)
    drawn = capacity <= _CLOSE_TO_SCALE * peak
    scale = max(capacity, peak) if drawn else peak
    unit, unit_bytes = ("GiB", 2**30) if peak >= 2**30 else ("MiB", 2**20)
    names = stage_names(plan)
    margin = max(map(len, names)) + 1
    bar_columns = width - margin - 8 * (len(_MEMORY_LETTERS) + 1) - 2
    mark = "| is" if drawn else f"{_percent(scale / capacity)} of"
    lines = [
        f"memory by stage in {unit}: its fullest rank at the highest moment; bars to {human_bytes(scale)}",
        " " * margin
        + "".join(head.rjust(8) for head in _MEMORY_HEADS)
        + f"  {mark} the device's {human_bytes(capacity)}",
    ]
    for name, split in zip(names, splits, strict=True):
        numbers = [*split.values(), sum(split.values())]
        texts = "".join(f"{number / unit_bytes:8.{decimals(peak / unit_bytes)}f}" for number in numbers)
        bar = _memory_bar(split, scale, bar_columns, capacity if drawn else None)
        lines.append(f"{name.ljust(margin)}{texts}  {bar}")
    apart = "; beside them the device holds its framework and fragmentation"
    kinds = ", ".join(f"{letter} {name}" for name, letter in _MEMORY_LETTERS.items())
    lines.append(kinds + apart * (plan.cluster.device.kind != "cpu"))
    return joined(lines, width)


def _memory_bar(split: dict[str, int], scale: int, columns: int, capacity: int | None) -> str:
    """``columns`` characters; a heading's share of them is that of its bytes of ``scale``."""
    bar, total = "", 0
    for name, size in split.items():
        total += size
        bar = bar.ljust(nearest(total / scale * columns), _MEMORY_LETTERS[name])
    bar = bar.ljust(columns, FILLS["idle"])
    if capacity is None:
        return bar
    at = min(columns - 1, math.floor(capacity / scale * columns))
    return f"{bar[:at]}|{bar[at + 1 :]}"


def draw_prediction(prediction: Prediction, *, width: int = WIDTH) -> str:
    """The figures of one predicted step, how sure its time is, and whether it fits; a line a misfit."""
    exposed = prediction.exposed_communication_seconds
    figures = [
        ("step time", human_seconds(prediction.step_seconds)),
        ("tokens/s", _rate(prediction.tokens_per_second)),
        ("tokens/s/device", _rate(prediction.tokens_per_second_per_device)),
        ("bubble", f"{_percent(prediction.bubble_fraction)} of the schedule"),
        (
            "exposed communication",
            f"{human_seconds(exposed)} ({_percent(exposed / prediction.step_seconds)})",
        ),
        ("MFU", f"{_percent(prediction.mfu)} (full attention)"),
        ("MFU causal", _percent(prediction.mfu_causal)),
        ("HFU", _percent(prediction.hfu)),
        (
            "peak of tensors",
            f"{human_bytes(prediction.peak_memory_bytes)} on rank {prediction.peak_memory_rank}",
        ),
        ("margin", f"{human_bytes(prediction.margin_bytes)} of {human_bytes(prediction.capacity_bytes)}"),
    ]
    half = (len(figures) + 1) // 2
    lines = [
        _figure(*left) + (_figure(*right) if right else "")
        for left, right in zip(figures[:half], [*figures[half:], None][:half], strict=True)
    ]
    verdict = (
        ["fits: yes"] if prediction.fits else ["fits: NO", *(f"  {line}" for line in prediction.misfits)]
    )
    beside = _beside_tensors(prediction)
    certainty = f"  {interval_words(prediction.interval, prediction.step_seconds)}"
    return joined(["predicted for one step, nothing has run", *lines, *beside, certainty, *verdict], width)


def _beside_tensors(prediction: Prediction) -> list[str]:
    """A line of what the device holds beside tensors, if anything."""
    framework, lost = prediction.framework_bytes, prediction.fragmentation_bytes
    if not framework + lost:
        return []
    return [
        f"  the device holds {human_bytes(prediction.reserved_bytes)} there: framework "
        f"{human_bytes(framework)}, fragmentation {human_bytes(lost)}"
    ]


def interval_words(interval: Interval | None, seconds: float) -> str:
    """Where measured seconds are to be expected, and how that is known."""
    if interval is None:
        return "how far this may be off is unknown: no run on such a machine has been compared"
    ranges = [("half of known runs", interval.half_range(seconds))]
    if most := interval.most_range(seconds):
        ranges.append(("80 %", most))
    parts = [f"{who} within {human_seconds(low)} to {human_seconds(high)}" for who, (low, high) in ranges]
    return f"{', '.join(parts)} ({interval.source})"


def _figure(name: str, value: str) -> str:
    return f"  {name.ljust(22)}{value.ljust(26)}"


def draw_plan(plan: TrainingPlan, *, width: int = WIDTH) -> str:
    """The whole plan on a page: request, choices, grid of ranks, schedule over time, memory, prediction."""
    prediction = predict(plan)
    program = plan.program()
    programs = [rows(program, stage) for stage in range(plan.topology.pp)]
    sections = [
        joined([*_headline(plan), *(f"  chosen {choice}" for choice in plan.chosen)], width),
        draw_grid(plan, width=width),
        draw_timeline(prediction.timeline, programs, width=width, labels=stage_names(plan)),
        draw_memory(plan, width=width),
        draw_prediction(prediction, width=width),
    ]
    return "\n\n".join(sections)


def _headline(plan: TrainingPlan) -> list[str]:
    work, topology, cluster = plan.workload, plan.topology, plan.cluster
    degrees = [f"{axis}={getattr(topology, axis)}" for axis in ("pp", "dp", "cp", "tp")]
    degrees += [f"{axis}={getattr(topology, axis)}" for axis in ("ep", "etp") if getattr(topology, axis) > 1]
    ways = {"ring": "ring attention", "all_to_all": "all-to-all attention"}
    parallel = " ".join(degrees) + (", sequence parallel" if plan.sequence_parallel else "")
    parallel += f", {ways[plan.context]}" if topology.cp > 1 else ""
    parallel += ", compiled" if plan.compile else ""
    parallel += f", foreign {', '.join(plan.foreign)}" if plan.foreign else ""
    tokens = work.global_batch * work.seq_len
    return [
        f"{plan.model.name} on {cluster.num_devices} x {cluster.device.name} ({cluster.name}): {parallel}",
        f"batch {work.global_batch} x {work.seq_len} = {tokens:,} tokens a step, {plan.num_microbatches} "
        f"microbatches of {plan.micro_batch}, {plan.schedule_name}, {work.precision}, {work.optimizer}",
        *_memory_savings(plan),
    ]


def _memory_savings(plan: TrainingPlan) -> list[str]:
    """A line of what is sharded, recomputed and offloaded, if anything is."""
    layers, said = plan.model.num_layers, []
    if plan.zero_stage:
        ranks = plan.shard or plan.topology.dp * plan.topology.cp
        said.append(f"ZeRO stage {plan.zero_stage} over {ranks} ranks")
        said += ["full gradients until the last microbatch"] * (plan.accumulate == "full")
        said += ["parameters gathered for a stage"] * (plan.reshard == "stage")
    counts = {mode: plan.recompute.count(mode) for mode in ("selective", "full")}
    said += [f"{mode} recompute of {count} of {layers} layers" for mode, count in counts.items() if count]
    if any(plan.offload):
        said.append(f"offload of {sum(plan.offload)} of {layers} layers")
    return [", ".join(said)] if said else []
