"""``picotron diff``: the fields in which two saved plans differ."""

from __future__ import annotations

import argparse

from picotron.cli.common import STANDARD, Subparsers, command, read_plan, write_json, write_out
from picotron.errors import PlanError
from picotron.planner.serialize import diff, fingerprint, to_data


def add_parser(subparsers: Subparsers) -> None:
    """Declare ``picotron diff``."""
    parser = command(
        subparsers,
        "diff",
        _execute,
        summary="list the fields in which two plans differ",
        example="picotron diff plan.json other.json",
        json_help="print a list of path, left and right",
    )
    parser.add_argument("left", metavar="LEFT", help="a plan's file, or -")
    parser.add_argument("right", metavar="RIGHT", help="another's, or -")


def _execute(arguments: argparse.Namespace) -> None:
    if arguments.left == arguments.right == STANDARD:
        raise PlanError("the standard input holds one plan, got - twice; give one of them as a file")
    left, right = read_plan(arguments.left), read_plan(arguments.right)
    found = diff(left, right)
    if arguments.json:
        write_json([to_data(difference) for difference in found])
    else:
        write_out("\n".join(map(str, found)) or f"no difference: both are {fingerprint(left)}")
