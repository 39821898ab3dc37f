"""What the commands share: how they are declared, and how they read and write files."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any, TypeAlias

from picotron.errors import PlanError
from picotron.planner.actions import Orders
from picotron.planner.plan import TrainingPlan
from picotron.planner.records import read_text, write_text
from picotron.planner.serialize import load_plan, plan_from_json
from picotron.planner.torch_csv import orders_from_program_csv

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

MOST_LAYERS = 10_000
STANDARD = "-"  # the standard input or output, in the place of a file


def command(
    subparsers: Subparsers,
    name: str,
    execute: Callable[[argparse.Namespace], None],
    *,
    summary: str,
    example: str,
    json_help: str | None = "print JSON",
) -> argparse.ArgumentParser:
    """The parser of one command, which runs ``execute``; it has ``--json`` unless ``json_help`` is None."""
    parser = subparsers.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(execute=execute)
    if json_help is not None:
        parser.add_argument("--json", action="store_true", help=json_help)
    return parser


def read_plan(path: str) -> TrainingPlan:
    """The plan in a file, or on the standard input."""
    if path != STANDARD:
        return load_plan(path)
    try:
        return plan_from_json(read_source(path, "a plan"))
    except PlanError as error:
        raise PlanError(f"standard input: {error}") from error


def read_source(path: str, what: str) -> str:
    """The text of a file, or of the standard input."""
    if path != STANDARD:
        return read_text(path, what)
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise PlanError(f"{what} must be UTF-8 text, got {error} on the standard input") from error


def write_result(path: str, text: str, what: str) -> None:
    """Write ``text`` to a file, whole or not at all, or to the standard output."""
    if path == STANDARD:
        write_out(text)
    else:
        write_text(path, text, what)


def write_out(text: str) -> None:
    """Print ``text`` as one or more whole lines; what the terminal cannot show is replaced."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    if not text.endswith("\n"):
        sys.stdout.write("\n")


def write_json(data: Any) -> None:
    """Print a JSON value, keys sorted."""
    write_out(json.dumps(data, sort_keys=True, indent=2, allow_nan=False))


def integers(text: str) -> tuple[int, ...]:
    """The whole numbers of ``20,20,18``."""
    try:
        return tuple(int(item) for item in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be whole numbers with commas between, got {text!r}") from None


def names(text: str) -> tuple[str, ...]:
    """The names of ``pp,dp,cp,tp``."""
    return tuple(item.strip() for item in text.split(","))


def modes(text: str) -> str | tuple[str, ...]:
    """The one word of ``full``, or the words of ``full*2,none``: ("full", "full", "none")."""
    found: list[str] = []
    for item in text.split(","):
        word, _, count = item.partition("*")
        if "*" in item and not (count.strip().isdecimal() and int(count) <= MOST_LAYERS):
            raise argparse.ArgumentTypeError(f"must be words, each with *COUNT if repeated, got {text!r}")
        found += [word.strip()] * (int(count) if count else 1)
    return found[0] if "," not in text and "*" not in text else tuple(found)


def truths(text: str) -> bool | tuple[bool, ...]:
    """Whether ``yes``, or each of ``yes*2,no``: (True, True, False)."""
    words, known = modes(text), {"yes": True, "no": False}
    several = (words,) if isinstance(words, str) else words
    if not set(several) <= known.keys():
        raise argparse.ArgumentTypeError(f"must be yes and no, each with *COUNT if repeated, got {text!r}")
    return known[words] if isinstance(words, str) else tuple(known[word] for word in words)


def read_orders(source: str) -> Orders:
    """The orders in a file or on the standard input, in either of torch's formats; maybe no schedule."""
    text = read_source(source, "a schedule")
    try:
        return orders_from_program_csv(text)
    except PlanError as error:
        raise PlanError(f"{'standard input' if source == STANDARD else source}: {error}") from error
