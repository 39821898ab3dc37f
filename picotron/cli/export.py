"""``picotron export``: the arguments or configuration with which another framework runs a plan."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from picotron.cli.common import STANDARD, Subparsers, command, read_plan, write_json, write_out, write_result
from picotron.planner import megatron, torchtitan
from picotron.planner.megatron import MegatronArguments, to_megatron
from picotron.planner.plan import TrainingPlan
from picotron.planner.torchtitan import CSV_NAME, TorchtitanConfig, to_torchtitan

FRAMEWORKS = ("megatron", "torchtitan")


def add_parser(subparsers: Subparsers) -> None:
    """Declare ``picotron export``."""
    parser = command(
        subparsers,
        "export",
        _execute,
        summary="write the arguments with which another framework runs a saved plan",
        example="picotron export plan.json --to megatron -o train.sh\n"
        "  picotron export plan.json --to torchtitan -o plan.toml",
        json_help="print arguments or settings as JSON, with what cannot be expressed",
    )
    parser.add_argument("plan", metavar="PLAN", help="a plan's file, or -")
    parser.add_argument("--to", required=True, choices=FRAMEWORKS, help="the framework")
    parser.add_argument(
        "-o", "--output", metavar="FILE", default=STANDARD, help="save it (default: print it)"
    )
    parser.add_argument(
        "--profile",
        metavar="NAME",
        help="the software profile that decides kernels and overlaps (default: the cluster's own if it is "
        f"the framework's, else {megatron.PROFILE} or {torchtitan.PROFILE})",
    )
    parser.add_argument("--steps", type=_steps, metavar="N", help="how many steps are trained")


def _steps(text: str) -> int:
    """A positive whole number."""
    if not (text.isdecimal() and 0 < int(text) < 2**48):
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _execute(arguments: argparse.Namespace) -> None:
    made = _exported(read_plan(arguments.plan), arguments)
    for sentence in made.unexpressed:
        print("picotron: not expressed:", sentence, file=sys.stderr)
    csv = made.schedule_csv if isinstance(made, TorchtitanConfig) else None
    if csv is not None and arguments.output != STANDARD:
        write_result(str(Path(arguments.output).with_name(CSV_NAME)), csv, "a schedule")
    elif csv is not None:
        print(
            f"picotron: note: {CSV_NAME} is written beside a saved configuration (-o FILE)", file=sys.stderr
        )
    if arguments.output != STANDARD:
        write_result(arguments.output, str(made), "a configuration")
    if arguments.json:
        write_json(_data(made))
    elif arguments.output == STANDARD:
        write_out(str(made))


def _exported(plan: TrainingPlan, arguments: argparse.Namespace) -> MegatronArguments | TorchtitanConfig:
    if arguments.to == "megatron":
        return to_megatron(plan, profile=arguments.profile, steps=arguments.steps)
    return to_torchtitan(plan, profile=arguments.profile, steps=arguments.steps)


def _data(made: MegatronArguments | TorchtitanConfig) -> dict[str, object]:
    """What was exported as values that JSON has."""
    said = {"unexpressed": list(made.unexpressed), "notes": list(made.notes)}
    if isinstance(made, MegatronArguments):
        return {"arguments": list(made.words), "environment": list(made.environment), **said}
    return {"settings": made.sections, "launch": made.launch, "schedule_csv": made.schedule_csv, **said}
