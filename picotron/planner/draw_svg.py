"""A step over time as a self-contained SVG: no script, font or file from elsewhere.

One lane a pipeline rank, coloured by what the rank does; the thin lane below it shows the transfers and
reductions under way meanwhile. Colours follow the reader's light or dark preference. The same plan gives the
same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

from picotron.planner.chart import background_bars, clock_name, compute_bars, human_seconds
from picotron.planner.draw import stage_contents, stage_names
from picotron.planner.plan import TrainingPlan
from picotron.planner.predict import Prediction, predict
from picotron.planner.program import Row, rows
from picotron.planner.svg import LANE, LETTER, PADDING, WIDTH, Chart, legend_parts, opening
from picotron.planner.timeline import Timeline


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
        labels=[f"{name}|{held}" for name, held in zip(stage_names(plan), stage_contents(plan), strict=True)],
    )


def _summary(prediction: Prediction) -> str:
    return (
        f"One step takes {human_seconds(prediction.step_seconds)} "
        f"(virtual time, predicted{_range(prediction)}): "
        f"bubble {prediction.bubble_fraction:.1%}, MFU {prediction.mfu:.1%}, "
        f"{prediction.tokens_per_second:,.0f} tokens/s"
    )


def _range(prediction: Prediction) -> str:
    """What half of known runs would take, where any are known."""
    if prediction.step_seconds_range is None:
        return ", error unknown"
    low, high = map(human_seconds, prediction.step_seconds_range)
    return f", half of known runs {low} to {high}"


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
    left = PADDING + 14 + LETTER * max(len(part) for name in names for part in name.split("|"))
    chart = Chart(left, WIDTH - PADDING, max(timeline.makespan_seconds, 1e-12), len(ranks))
    computing, background = compute_bars(timeline, programs), background_bars(timeline, programs)
    caption = f"{clock_name(timeline)}, since the step began; thin lanes: transfers and reductions under way"
    parts = [*opening(chart.height, title, subtitle), *chart.axis(caption)]
    for lane, (rank, name) in enumerate(zip(ranks, names, strict=True)):
        parts += chart.label(lane, name)
        parts.append(chart.rectangle(lane, 0.0, chart.span_seconds, "idle", LANE))
        parts += chart.bars(lane, [bar for bar in computing if bar.rank == rank])
        parts += chart.thin_bars(lane, [bar for bar in background if bar.rank == rank])
    parts += [*legend_parts(chart.height), "</svg>"]
    return "\n".join(parts) + "\n"
