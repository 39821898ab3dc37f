"""``picotron schedule``: pipeline schedules drawn, compared, checked and exported."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from picotron.cli.common import (
    STANDARD,
    Subparsers,
    command,
    read_orders,
    write_json,
    write_out,
    write_result,
)
from picotron.cli.schedule_inputs import asked_schedule, parse_costs, stage_costs
from picotron.cli.schedule_optimise import add_limits, best_schedule, found_data, found_line
from picotron.errors import PlanError
from picotron.planner.actions import cells
from picotron.planner.catalogue import SCHEDULES
from picotron.planner.check import Verdict, check
from picotron.planner.draw_schedule import (
    ScheduleFigures,
    comparison_svg,
    draw_comparison,
    draw_schedule,
    orders_svg,
    rank_costs,
    schedule_figures,
    schedule_trace,
    summary,
)
from picotron.planner.explain_schedule import explain_schedule
from picotron.planner.lower import with_transfers
from picotron.planner.order_waits import SEMANTICS
from picotron.planner.pipeline import Schedule, peak_microbatches, schedule_to_csv
from picotron.planner.schedule_times import PipelineCosts
from picotron.planner.serialize import schedule_digest
from picotron.planner.torch_csv import program_to_csv


def add_parser(subparsers: Subparsers) -> None:
    """Declare ``picotron schedule``."""
    parser = command(
        subparsers,
        "schedule",
        _execute,
        summary="draw, compare, check and export pipeline schedules",
        example="picotron schedule zb-h1 --ranks 4 --microbatches 8 --svg zb-h1.svg\n"
        "  picotron schedule compare 1f1b zb-h1 zb-v --ranks 4 --microbatches 8\n"
        "  picotron schedule check mine.csv\n"
        "  picotron schedule optimise --ranks 4 --microbatches 8 --costs f=2,i=2,w=1 --memory-limit 4",
        json_help="print JSON in place of the picture",
    )
    parser.add_argument(
        "schedule",
        metavar="SCHEDULE",
        help=f"{', '.join(SCHEDULES)}, custom (with --from), a .csv file or -; "
        "or compare, followed by several of these; or check, followed by a .csv file; or optimise",
    )
    parser.add_argument("more", metavar="...", nargs="*", help="what to compare or to check")
    parser.add_argument("--ranks", type=int, metavar="N", help="pipeline ranks")
    parser.add_argument("--microbatches", type=int, metavar="N", help="microbatches of a step")
    parser.add_argument(
        "--virtual-stages", type=int, metavar="N", help="stages a rank, where the schedule leaves a choice"
    )
    parser.add_argument(
        "--costs",
        type=parse_costs,
        default={},
        metavar="f=1,i=1,w=1,transfer=0",
        help="time units of a forward, an input and a weight gradient and a hop; of a stage, or, to compare, "
        "of all stages of a rank; f=1:1:2:1 gives each stage its own",
    )
    parser.add_argument(
        "--semantics",
        choices=SEMANTICS,
        default="buffered",
        help="of messages, under which checked orders must run to the end (default buffered)",
    )
    add_limits(parser)
    parser.add_argument("--from", dest="source", metavar="FILE", help="the orders of a custom schedule")
    parser.add_argument("--csv", metavar="FILE", help="save what torch's pipelining reads; - prints it alone")
    parser.add_argument(
        "--program-csv",
        metavar="FILE",
        help="the same with sends and receives (torch: compute_comms)",
    )
    parser.add_argument("--svg", metavar="FILE", help="save the picture; - prints it alone")
    parser.add_argument("--trace", metavar="FILE", help="save a Chrome trace, which Perfetto opens")
    parser.add_argument(
        "--explain", action="store_true", help="say for what ranks wait, and which path sets the makespan"
    )
    parser.add_argument(
        "--colour", choices=("auto", "always", "never"), default="auto", help="of the text (default auto)"
    )
    parser.add_argument("--width", type=int, default=100, metavar="N", help="columns of the text (100)")
    options = [action.dest for action in parser._actions]
    parser.set_defaults(defaults={name: parser.get_default(name) for name in options})


_SIZES = {"ranks", "microbatches", "virtual_stages"}
_PICTURE = {"costs", "svg", "colour", "width"}
_FILES = {"csv", "program_csv", "trace", "explain"}
_LIMITS = {"memory_limit", "activation_bytes", "weight_bytes", "placement", "objective"}
_TAKEN = {
    "compare": _SIZES | _PICTURE | {"source"},
    "check": _SIZES | {"semantics", "source"},
    "optimise": _SIZES | _PICTURE | _FILES | _LIMITS,
}
_TAKEN_BY_ONE = _SIZES | _PICTURE | _FILES | {"source"}


def _check_options(arguments: argparse.Namespace) -> None:
    """Raise PlanError for an option that would be ignored."""
    taken = _TAKEN.get(arguments.schedule, _TAKEN_BY_ONE)
    for name in sorted((_SIZES | _PICTURE | _FILES | _LIMITS | {"semantics", "source"}) - taken):
        if getattr(arguments, name) != arguments.defaults[name]:
            flag = "from" if name == "source" else name.replace("_", "-")
            raise PlanError(f"{arguments.schedule} takes no --{flag}; leave it out")


def _execute(arguments: argparse.Namespace) -> None:
    _check_options(arguments)
    if arguments.schedule == "compare":
        _compare(arguments)
    elif arguments.schedule == "check":
        _check(arguments)
    elif arguments.schedule == "optimise":
        best = best_schedule(arguments)
        _show(arguments, best.schedule, found_data(best), found_line(best))
    elif arguments.more:
        raise PlanError(f"one schedule at a time, got {' '.join(arguments.more)} too; see compare")
    else:
        _show(arguments, asked_schedule(arguments.schedule, arguments))


def _show(
    arguments: argparse.Namespace, schedule: Schedule, more: Mapping[str, Any] = {}, line: str = ""
) -> None:
    """Write a schedule into files, as JSON (with ``more``) or as a picture (with a ``line`` below it)."""
    costs = stage_costs(arguments.costs, schedule.num_stages)
    if _saved(arguments, schedule, costs):
        return
    if arguments.json:
        write_json(schedule_data(schedule, costs) | dict(more))
        return
    drawn = draw_schedule(schedule, costs, width=_width(arguments), colour=_coloured(arguments))
    lines = [drawn, summary(schedule_figures(schedule, costs)), *filter(None, [line])]
    if arguments.explain:
        lines.append(explain_schedule(schedule, costs, width=_width(arguments)))
    write_out("\n".join(lines))


def _saved(arguments: argparse.Namespace, schedule: Schedule, costs: PipelineCosts) -> bool:
    """Write what was asked for into files; whether the standard output was one of them."""
    results: dict[str, Callable[[], str]] = {
        "csv": lambda: schedule_to_csv(schedule),
        "program_csv": lambda: program_to_csv(with_transfers(schedule, 0)),
        "svg": lambda: orders_svg(schedule, costs),
        "trace": lambda: schedule_trace(schedule, costs),
    }
    for name, make in results.items():
        target = getattr(arguments, name)
        if target is not None:
            write_result(target, make(), "a schedule")
    return STANDARD in [getattr(arguments, name) for name in results]


def _compare(arguments: argparse.Namespace) -> None:
    if not arguments.more:
        raise PlanError("compare needs schedules, as in: picotron schedule compare 1f1b zb-h1 --ranks 4 ...")
    schedules = [asked_schedule(name, arguments) for name in arguments.more]
    given = {name: values[0] for name, values in arguments.costs.items() if len(values) == 1}
    if len(given) < len(arguments.costs):
        raise PlanError("compare takes the costs of a whole rank, one number each, as in f=1,i=1,w=1")
    costs = [rank_costs(schedule, **given) for schedule in schedules]
    if arguments.svg is not None:
        write_result(arguments.svg, comparison_svg(schedules, costs), "a picture")
    if arguments.svg == STANDARD:
        return
    if arguments.json:
        write_json([schedule_data(*each) for each in zip(schedules, costs, strict=True)])
    else:
        write_out(draw_comparison(schedules, costs, width=_width(arguments), colour=_coloured(arguments)))


def _check(arguments: argparse.Namespace) -> None:
    """Print the verdict on a file or a named schedule; what is not well is an error too."""
    if len(arguments.more) != 1:
        raise PlanError("check takes one .csv file, - or name, as in: picotron schedule check mine.csv")
    (source,) = arguments.more
    named = source in SCHEDULES
    verdict = check(
        asked_schedule(source, arguments) if named else read_orders(source), semantics=arguments.semantics
    )
    if arguments.json:
        write_json(verdict_data(verdict))
    else:
        write_out(str(verdict))
    if verdict.offence is not None:
        raise PlanError(verdict.offence.message)


def verdict_data(verdict: Verdict) -> dict[str, Any]:
    """The verdict as values that JSON has."""
    return {
        "ok": verdict.ok,
        "semantics": verdict.semantics,
        "runs_under": list(verdict.runs_under),
        "offence": None if verdict.offence is None else verdict.offence.message,
        "peaks": [
            {"rank": peak.rank, "activations": peak.activations, "weights": peak.weights}
            for peak in verdict.peaks
        ],
    }


def _width(arguments: argparse.Namespace) -> int:
    if arguments.width < 40:
        raise PlanError(f"--width must be at least 40 columns, got {arguments.width}")
    width: int = arguments.width
    return width


def _coloured(arguments: argparse.Namespace) -> bool:
    """Whether the text is for a terminal that shows colours (https://no-color.org)."""
    if arguments.colour == "auto":
        return sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return bool(arguments.colour == "always")


def schedule_data(schedule: Schedule, costs: PipelineCosts | None = None) -> dict[str, Any]:
    """The schedule as values that JSON has."""
    figures: ScheduleFigures = schedule_figures(schedule, costs)
    return {
        "name": schedule.name,
        "num_ranks": schedule.num_ranks,
        "num_stages": schedule.num_stages,
        "num_microbatches": schedule.num_microbatches,
        "stage_ranks": list(schedule.stage_ranks),
        "bidirectional": schedule.bidirectional,
        "orders": [cells(schedule.orders, rank) for rank in range(schedule.num_ranks)],
        "peak_stage_activations": [peak_microbatches(schedule, rank) for rank in range(schedule.num_ranks)],
        "peak_activations": list(figures.peak_activations),
        "makespan": figures.makespan,
        "bubble_fraction": figures.bubble_fraction,
        "stage_span_fraction": figures.stage_span_fraction,
        "sha256": schedule_digest(schedule),
    }
