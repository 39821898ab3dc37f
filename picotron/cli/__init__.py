"""The ``picotron`` command: plans made, shown, priced and compared from a shell.

Each command is a module with ``add_parser(subparsers)``; what it prints, the others read ("-" is the standard
input or output). Exit codes: 0, 2 for a request or plan that cannot be met, 3 when the world departs from a
plan, 130 for an interrupt. An error is one line on the standard error.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

from picotron import __version__
from picotron.cli import (
    calibrate,
    compare,
    diff,
    explain,
    export,
    import_,
    plan,
    predict,
    schedule,
    search,
    show,
    simulate,
    train,
)
from picotron.errors import ExecutionError, PlanError

COMMANDS = (
    plan,
    search,
    show,
    predict,
    simulate,
    train,
    compare,
    schedule,
    diff,
    calibrate,
    explain,
    export,
    import_,
)

REQUEST_ERROR, EXECUTION_ERROR, INTERRUPTED = 2, 3, 130


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are PlanErrors."""

    def error(self, message: str) -> NoReturn:
        raise PlanError(f"{message}; see {self.prog} --help")


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; the chosen one leaves its function in ``execute``."""
    parser = _Parser(
        prog="picotron",
        description="Training plans as values: make, show, price and compare them.",
        epilog="example:\n  picotron plan llama-3.1-8b --cluster h100 --global-batch 64 --seq-len 8192",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"picotron {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        arguments = _parsed(argv)
        arguments.execute(arguments)
        sys.stdout.flush()
    except SystemExit as stop:  # argparse, after --help or --version
        return stop.code if isinstance(stop.code, int) else 0
    except BrokenPipeError:
        _drop_output()
    except ExecutionError as error:
        return _complain(error, EXECUTION_ERROR)
    except (PlanError, OSError) as error:
        return _complain(error, REQUEST_ERROR)
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)
    return 0


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """What was asked for; where a command takes several names, some may stand after its options."""
    parser = make_parser()
    arguments, left = parser.parse_known_args(argv)
    flags = [word for word in left if word.startswith("-") and word != "-"]
    if left and (flags or not hasattr(arguments, "more")):
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    if left:
        arguments.more += left
    return arguments


def _complain(error: object, code: int) -> int:
    """One line on the standard error, or a whole report with its notes; and the exit code."""
    text = " ".join(str(error).split())
    if isinstance(error, ExecutionError):
        text = "\n".join([str(error), *getattr(error, "__notes__", ())])
    print("picotron:", text, file=sys.stderr)
    return code


def _drop_output() -> None:
    """Send what is still to be printed nowhere: its reader has gone."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
