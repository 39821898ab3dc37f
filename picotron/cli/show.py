"""``picotron show``: the picture of a saved plan."""

from __future__ import annotations

import argparse

from picotron.cli.common import STANDARD, Subparsers, command, read_plan, write_out, write_result
from picotron.planner.draw_svg import schedule_svg
from picotron.planner.serialize import plan_to_json


def add_parser(subparsers: Subparsers) -> None:
    """Declare ``picotron show``."""
    parser = command(
        subparsers,
        "show",
        _execute,
        summary="draw a saved plan",
        example="picotron show plan.json --svg step.svg",
        json_help="print the plan's JSON in place of its picture",
    )
    parser.add_argument("plan", metavar="PLAN", help="a plan's file, or -")
    parser.add_argument("--svg", metavar="FILE", help="save a drawing of one step; - prints it alone")


def _execute(arguments: argparse.Namespace) -> None:
    plan = read_plan(arguments.plan)
    if arguments.svg is not None:
        write_result(arguments.svg, schedule_svg(plan), "a drawing")
    if arguments.svg != STANDARD:
        write_out(plan_to_json(plan) if arguments.json else str(plan))
