"""``picotron import``: the plan that another framework's arguments run."""

from __future__ import annotations

import argparse
import sys

from picotron.cli.common import STANDARD, Subparsers, command, read_source, write_out, write_result
from picotron.errors import PlanError
from picotron.planner.megatron import PROFILE
from picotron.planner.megatron_import import ImportedPlan, from_megatron
from picotron.planner.serialize import plan_to_json


def add_parser(subparsers: Subparsers) -> None:
    """Declare ``picotron import``."""
    parser = command(
        subparsers,
        "import",
        _execute,
        summary="read another framework's arguments into a plan, to price what already runs",
        example="picotron import train.sh --from megatron --cluster h100:8x8 -o plan.json\n"
        '  picotron import --args "--num-layers 32 ..." --from megatron --cluster h100 --vocab-size 32000',
        json_help="print the plan's JSON in place of its picture",
    )
    parser.add_argument(
        "source", metavar="FILE", nargs="?", help="a shell script, a file of arguments, YAML of them, or -"
    )
    parser.add_argument("--args", metavar="TEXT", help="the arguments themselves, in place of a file")
    parser.add_argument(
        "--from", dest="framework", required=True, choices=("megatron",), help="the framework"
    )
    parser.add_argument(
        "--cluster",
        required=True,
        help="h100:16x8 (nodes x devices) or a .json file; h100 alone has the shape of the launching line",
    )
    parser.add_argument(
        "--vocab-size", type=int, metavar="N", help="of the model, where it is in a tokenizer's file"
    )
    parser.add_argument("--name", default="megatron", metavar="NAME", help="what to call the model")
    parser.add_argument(
        "--profile",
        metavar="NAME",
        help="the software profile whose overlaps the flags switch on and off "
        f"(default {PROFILE}; a .json cluster keeps its own)",
    )
    parser.add_argument(
        "--var",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="what a variable stands for that the script takes from its caller; again for each",
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="save the plan; - prints its JSON")


def _execute(arguments: argparse.Namespace) -> None:
    if (arguments.source is None) == (arguments.args is None):
        raise PlanError("import needs a FILE or --args, one of the two; see picotron import --help")
    text = (
        arguments.args if arguments.source is None else read_source(arguments.source, "a list of arguments")
    )
    found = from_megatron(
        text,
        arguments.cluster,
        vocab_size=arguments.vocab_size,
        name=arguments.name,
        variables=dict(map(_variable, arguments.var)),
        profile=arguments.profile,
    )
    for line in _remarks(found):
        print("picotron:", line, file=sys.stderr)
    made = plan_to_json(found.plan)
    if arguments.output is not None:
        write_result(arguments.output, made, "a plan")
    if arguments.output != STANDARD:
        write_out(made if arguments.json else str(found.plan))


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise PlanError(f"--var must look like NAME=VALUE, got {text!r}")
    return name, value


def _remarks(found: ImportedPlan) -> list[str]:
    """What became of the flags that a plan does not hold."""
    lines = [f"note: {note}" for note in found.notes]
    lines += [f"unknown: {sentence}" for sentence in found.unknown]
    if found.software:
        fields = ", ".join(f"{name}={value}" for name, value in found.software)
        lines.append(f"software profile {found.plan.cluster.profile.name}; the flags say {fields}")
    if found.ignored:
        lines.append(f"ignored, no matter to a plan: {', '.join(found.ignored)}")
    return lines
