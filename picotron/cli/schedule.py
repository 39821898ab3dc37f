"""``picotron schedule``: a pipeline schedule drawn, and exported as torch's compute-only CSV."""

from __future__ import annotations

import argparse
from typing import Any

from picotron.cli.common import STANDARD, Subparsers, command, write_json, write_out, write_result
from picotron.cli.plan import read_schedule
from picotron.errors import PlanError
from picotron.planner.catalogue import SCHEDULES, make_schedule
from picotron.planner.draw import draw_schedule
from picotron.planner.pipeline import Schedule, peak_microbatches, schedule_to_csv
from picotron.planner.serialize import schedule_digest


def add_parser(subparsers: Subparsers) -> None:
    """Declare ``picotron schedule``."""
    parser = command(
        subparsers,
        "schedule",
        _execute,
        summary="draw a pipeline schedule and export its CSV",
        example="picotron schedule 1f1b --ranks 4 --microbatches 8 --csv 1f1b.csv",
        json_help="print the orders as JSON",
    )
    parser.add_argument("schedule", metavar="SCHEDULE", help=f"{', '.join(SCHEDULES)}, a .csv file, or -")
    parser.add_argument("--ranks", type=int, help="pipeline ranks")
    parser.add_argument("--microbatches", type=int, help="microbatches of a step")
    parser.add_argument("--csv", metavar="FILE", help="save what torch's pipelining reads; - prints it alone")


def schedule_data(schedule: Schedule) -> dict[str, Any]:
    """The schedule as values that JSON has."""
    return {
        "name": schedule.name,
        "num_ranks": schedule.num_ranks,
        "num_stages": schedule.num_stages,
        "num_microbatches": schedule.num_microbatches,
        "orders": [[str(action) for action in order] for order in schedule.orders],
        "peak_microbatches": [peak_microbatches(schedule, rank) for rank in range(schedule.num_ranks)],
        "sha256": schedule_digest(schedule),
    }


def _execute(arguments: argparse.Namespace) -> None:
    schedule = _schedule(arguments)
    if arguments.csv is not None:
        write_result(arguments.csv, schedule_to_csv(schedule), "a schedule")
    if arguments.csv == STANDARD:
        return
    if arguments.json:
        write_json(schedule_data(schedule))
    else:
        write_out(draw_schedule(schedule))


def _schedule(arguments: argparse.Namespace) -> Schedule:
    found = read_schedule(arguments.schedule)
    if isinstance(found, Schedule):
        return _of_size(found, arguments)
    if found in SCHEDULES and None in (arguments.ranks, arguments.microbatches):
        raise PlanError(f"{found} needs --ranks and --microbatches, as in --ranks 4 --microbatches 8")
    return make_schedule(found, arguments.ranks, arguments.microbatches)


def _of_size(schedule: Schedule, arguments: argparse.Namespace) -> Schedule:
    """A schedule that was read, if it has the sizes that were asked for."""
    sizes = (schedule.num_ranks, schedule.num_microbatches)
    for name, size, asked in zip(
        ("ranks", "microbatches"), sizes, (arguments.ranks, arguments.microbatches), strict=True
    ):
        if asked not in (None, size):
            raise PlanError(f"--{name} must be the file's own {size}, got {asked}; leave it out")
    return schedule
