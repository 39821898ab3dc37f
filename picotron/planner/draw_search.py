"""A search's result as text and HTML: the fastest plans, the Pareto front as a small chart, the counts."""

from __future__ import annotations

from html import escape

import numpy as np

from picotron.planner.candidates import in_words
from picotron.planner.chart import human_seconds
from picotron.planner.cluster import peak_flops_per_second
from picotron.planner.flops import backward_flops, forward_flops
from picotron.planner.search_result import SearchResult
from picotron.planner.workload import FORMATS

GIB = 2**30
CHART_ROWS, CHART_COLUMNS = 8, 60
SHOWN_ROWS = 10
HEADS = ("", "step", "simulated", "tokens/s/device", "MFU", "GiB", "layout")
SIMULATED = HEADS.index("simulated")


def draw_search(result: SearchResult, count: int = SHOWN_ROWS) -> str:
    """The ``count`` fastest plans, the front, and how the space was covered."""
    space, best = result.space, result.fastest.seconds[0]
    work, cluster = space.work, space.cluster.name
    lines = [
        f"{space.model.name} on {cluster}, {work.global_batch} x {work.seq_len} tokens: "
        f"{human_seconds(float(best))} a step at best",
        table(result, count),
        *verdicts(result, count),
        *_tied(result),
        "",
        chart(result),
        "",
        str(result.counts),
    ]
    return "\n".join(lines)


def _tied(result: SearchResult) -> list[str]:
    """How many plans the known error cannot tell from the best."""
    ties = len(result.ties)
    if result.interval is None:
        return ["how far such estimates are off is not known here"]
    if ties < 2:
        return []
    error = f"{result.interval.half:.1%}".replace("%", " %")
    return [f"{ties} of the {len(result)} kept are within {error} of the best: a tie"]


def table(result: SearchResult, count: int) -> str:
    """The fastest plans, a line each, with aligned columns; simulated seconds where some were asked for."""
    rows = _cells(result, count)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    return "\n".join(
        "  ".join([*(text.rjust(width) for text, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in rows
    )


def verdicts(result: SearchResult, count: int) -> list[str]:
    """What the exact simulator says against the order of the plans shown, and the exact count of bytes."""
    shown = {index: found for index, found in sorted(result.predictions.items()) if index < count}
    lines = [
        f"{index + 1} does not fit when its bytes are counted: {why}"
        for index in shown
        if (why := result.misfit(index))
    ]
    fit = [index for index in shown if not result.misfit(index)]
    first = min(fit, key=lambda index: shown[index].step_seconds, default=0)
    return lines + [f"of those simulated, {first + 1} is the fastest that fits"] * (first > 0)


def _cells(result: SearchResult, count: int) -> list[tuple[str, ...]]:
    """The heads and the rows of a table."""
    space, plans = result.space, result.fastest[:count]
    tokens = space.work.global_batch * space.work.seq_len
    flops = sum(
        count(space.model, batch=space.work.global_batch, seq_len=space.work.seq_len)
        for count in (forward_flops, backward_flops)
    )
    peak = peak_flops_per_second(space.cluster.device, FORMATS[space.work.precision].product)
    devices = space.known.devices
    simulated = {index: human_seconds(found.step_seconds) for index, found in result.predictions.items()}
    rows: list[tuple[str, ...]] = [
        (
            str(index + 1),
            human_seconds(float(seconds)),
            simulated.get(index, ""),
            f"{tokens / seconds / devices:,.0f}",
            f"{flops / seconds / peak / devices:.1%}".replace("%", " %"),
            f"{held / GIB:.1f}",
            in_words(plans.row(index)),
        )
        for index, (seconds, held) in enumerate(zip(plans.seconds, plans.bytes, strict=True))
    ]
    table: list[tuple[str, ...]] = [HEADS, *rows]
    return table if simulated else [row[:SIMULATED] + row[SIMULATED + 1 :] for row in table]


def chart(result: SearchResult) -> str:
    """The front: time from left to right, memory from below, one mark a plan."""
    front = result.pareto
    seconds, size = front.seconds, front.bytes / GIB
    width, height = max(float(np.ptp(seconds)), 1e-12), max(float(np.ptp(size)), 1e-12)
    grid = [[" "] * CHART_COLUMNS for _ in range(CHART_ROWS)]
    for time, held in zip(seconds, size, strict=True):
        column = round((time - seconds.min()) / width * (CHART_COLUMNS - 1))
        row = round((size.max() - held) / height * (CHART_ROWS - 1))
        grid[row][column] = "o"
    labels = [f"{size.max():.1f}", *[""] * (CHART_ROWS - 2), f"{size.min():.1f}"]
    margin = max(map(len, labels))
    lines = [
        f"{label.rjust(margin)} |{''.join(row)}".rstrip() for label, row in zip(labels, grid, strict=True)
    ]
    first, last = human_seconds(float(seconds.min())), human_seconds(float(seconds.max()))
    axis = f"{' ' * margin} +{'-' * CHART_COLUMNS}"
    scale = f"{' ' * margin}  {first}{last.rjust(CHART_COLUMNS - len(first))}"
    title = f"Pareto front of {len(front)} plans: GiB of the fullest device against seconds of a step"
    return "\n".join([title, *lines, axis, scale])


def search_html(result: SearchResult) -> str:
    """The fastest plans as a table, the chart and the counts beneath."""
    first, *rows = _cells(result, SHOWN_ROWS)
    heads = "".join(f"<th>{escape(head)}</th>" for head in first)
    body = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    return (
        f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"
        f"<pre>{escape(chart(result))}</pre><p>{escape(str(result.counts))}</p>"
    )
