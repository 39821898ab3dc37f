"""``picotron predict``: what a saved plan will do, before anything runs."""

from __future__ import annotations

import argparse
from typing import Any

from attrs import fields

from picotron.cli.common import STANDARD, Subparsers, command, read_plan, write_json, write_out, write_result
from picotron.planner.draw import draw_prediction
from picotron.planner.interval import interval_data
from picotron.planner.plan import TrainingPlan
from picotron.planner.predict import SECONDS_PER_DAY, Prediction, predict
from picotron.planner.program import rows
from picotron.planner.serialize import fingerprint
from picotron.planner.timeline import chrome_trace

HOURS_PER_DAY = 24
_LEFT_OUT = ("plan", "payload_bytes_by_rank", "timeline")  # of what is printed as JSON


def add_parser(subparsers: Subparsers) -> None:
    """Declare ``picotron predict``."""
    parser = command(
        subparsers,
        "predict",
        _execute,
        summary="predict the time, rates and memory of a saved plan",
        example="picotron predict plan.json --tokens 15e12 --trace trace.json",
        json_help="print the prediction as JSON, in bytes and seconds",
    )
    parser.add_argument("plan", metavar="PLAN", help="a plan's file, or -")
    parser.add_argument("--tokens", type=tokens, help="also the days and device hours for so many tokens")
    parser.add_argument(
        "--trace", metavar="FILE", help="save the timeline as a Chrome trace, for Perfetto; - prints it alone"
    )


def tokens(text: str) -> float:
    """A positive number of tokens, such as 15e12."""
    try:
        count = float(text)
    except ValueError:
        count = 0.0
    if not 0 < count < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number such as 15e12, got {text!r}")
    return count


def prediction_data(plan: TrainingPlan, prediction: Prediction, total: float | None = None) -> dict[str, Any]:
    """The prediction as values that JSON has; ``total`` tokens add ``days`` and ``gpu_hours``."""
    shown = [field.name for field in fields(Prediction) if field.name not in _LEFT_OUT]
    return {
        **{name: getattr(prediction, name) for name in shown},
        **interval_data(prediction.interval, prediction.step_seconds),
        "seconds_by_cause": dict(prediction.seconds_by_cause),
        "memory_by_category": dict(prediction.memory_by_category),
        "reserved_bytes": prediction.reserved_bytes,
        "fits": prediction.fits,
        "margin_bytes": prediction.margin_bytes,
        "clock": prediction.timeline.clock,
        "fingerprint": fingerprint(plan),
        **(_duration(plan, prediction, total) if total is not None else {}),
    }


def _duration(plan: TrainingPlan, prediction: Prediction, total: float) -> dict[str, float]:
    days = total / prediction.tokens_per_second / SECONDS_PER_DAY
    return {"tokens": total, "days": days, "gpu_hours": days * HOURS_PER_DAY * plan.topology.world_size}


def _execute(arguments: argparse.Namespace) -> None:
    plan = read_plan(arguments.plan)
    prediction = predict(plan)
    if arguments.trace is not None:
        write_result(arguments.trace, _trace(plan, prediction), "a trace")
    if arguments.trace == STANDARD:
        return
    if arguments.json:
        write_json(prediction_data(plan, prediction, arguments.tokens))
    else:
        write_out(_text(plan, prediction, arguments.tokens))


def _trace(plan: TrainingPlan, prediction: Prediction) -> str:
    program = plan.program()
    return chrome_trace(prediction.timeline, [rows(program, rank) for rank in range(program.num_ranks)])


def _text(plan: TrainingPlan, prediction: Prediction, total: float | None) -> str:
    picture = draw_prediction(prediction).rstrip("\n")
    if total is None:
        return picture
    needed = _duration(plan, prediction, total)
    return f"{picture}\n{total:.4g} tokens: {needed['days']:.3g} days, {needed['gpu_hours']:.4g} device hours"
