"""``picotron show``: the picture of a saved plan."""

from __future__ import annotations

import argparse

from picotron.cli.common import Subparsers, command, read_plan, write_out
from picotron.planner.serialize import plan_to_json


def add_parser(subparsers: Subparsers) -> None:
    """Declare ``picotron show``."""
    parser = command(
        subparsers,
        "show",
        _execute,
        summary="draw a saved plan",
        example="picotron show plan.json",
        json_help="print the plan's JSON in place of its picture",
    )
    parser.add_argument("plan", metavar="PLAN", help="a plan's file, or -")


def _execute(arguments: argparse.Namespace) -> None:
    plan = read_plan(arguments.plan)
    write_out(plan_to_json(plan) if arguments.json else str(plan))
