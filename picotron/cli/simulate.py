"""``picotron simulate``: what slow or pausing parts of a cluster do to a step, on every rank of the plan."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from attrs import asdict

from picotron.cli.common import STANDARD, Subparsers, command, read_plan, write_json, write_out, write_result
from picotron.errors import PlanError
from picotron.planner.chart import human_seconds
from picotron.planner.faults import Fault, Pause, Slow
from picotron.planner.program import rows
from picotron.planner.serialize import fingerprint
from picotron.planner.simulate import SimulatedStep, simulate_step
from picotron.planner.timeline import chrome_trace
from picotron.planner.topology import coordinate

SHOWN_MOST, SHOWN_LEAST = 6, 4  # rows of the table: of those that wait most and least

T = TypeVar("T")


def add_parser(subparsers: Subparsers) -> None:
    """Declare ``picotron simulate``."""
    parser = command(
        subparsers,
        "simulate",
        _execute,
        summary="simulate one step of a saved plan with slow or pausing parts, in time only",
        example="picotron simulate plan.json --slow 3=1.5 --slow-link 0-8=4 --pause 2@10=0.5",
        json_help="print the step and the classes of ranks as JSON, in seconds",
    )
    parser.add_argument("plan", metavar="PLAN", help="a plan's file, or -")
    for flag, metavar, parse, words in (
        ("--slow", "RANK=FACTOR", slow_rank, "a rank computes FACTOR times as long"),
        (
            "--slow-link",
            "A-B=FACTOR",
            slow_link,
            "what both ranks A and B take part in lasts FACTOR times as long",
        ),
        ("--pause", "RANK@ROW=SECONDS", pause, "a rank does nothing for SECONDS before a row of its program"),
    ):
        parser.add_argument(
            flag,
            metavar=metavar,
            type=parse,
            dest="faults",
            action="append",
            default=[],
            help=f"{words}; may be repeated",
        )
    parser.add_argument(
        "--trace", metavar="FILE", help="save the timeline as a Chrome trace, for Perfetto; - prints it alone"
    )


def slow_rank(text: str) -> Slow:
    """The fault in ``3=1.5``."""
    return _parsed(
        text, r"(\d+)=(.+)", "3=1.5", lambda rank, factor: Slow(rank=int(rank), factor=float(factor))
    )


def slow_link(text: str) -> Slow:
    """The fault in ``0-8=4``."""
    return _parsed(
        text,
        r"(\d+)-(\d+)=(.+)",
        "0-8=4",
        lambda a, b, factor: Slow(link=(int(a), int(b)), factor=float(factor)),
    )


def pause(text: str) -> Pause:
    """The fault in ``2@10=0.5``."""
    return _parsed(
        text,
        r"(\d+)@(\d+)=(.+)",
        "2@10=0.5",
        lambda rank, row, seconds: Pause(rank=int(rank), at=int(row), seconds=float(seconds)),
    )


def _parsed(text: str, pattern: str, example: str, make: Callable[..., T]) -> T:
    """What ``make`` makes of the parts of ``text``."""
    match = re.fullmatch(pattern, text, re.ASCII)
    if match is None:
        raise argparse.ArgumentTypeError(f"must look like {example}, got {text!r}")
    try:
        return make(*match.groups())
    except PlanError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    except ValueError:
        raise argparse.ArgumentTypeError(f"must end with a number, as {example} does, got {text!r}") from None


def _execute(arguments: argparse.Namespace) -> None:
    plan = read_plan(arguments.plan)
    healthy = simulate_step(plan)
    step = simulate_step(plan, arguments.faults) if arguments.faults else healthy
    if arguments.trace is not None:
        write_result(arguments.trace, _trace(step), "a trace")
    if arguments.trace == STANDARD:
        return
    if arguments.json:
        write_json(_data(healthy, step))
    else:
        write_out(_text(healthy, step))


def _trace(step: SimulatedStep) -> str:
    places = {rank: coordinate(step.plan.topology, rank) for rank in step.classes.ranks}
    programs = {rank: rows(step.plan.program(where.tp), where.pp) for rank, where in places.items()}
    return chrome_trace(step.timeline, programs)


def _data(healthy: SimulatedStep, step: SimulatedStep) -> dict[str, Any]:
    topology, sizes = step.plan.topology, step.classes.sizes
    return {
        "fingerprint": fingerprint(step.plan),
        "faults": [_fault_data(fault) for fault in step.faults],
        "healthy_step_seconds": healthy.step_seconds,
        "step_seconds": step.step_seconds,
        "slowdown": step.step_seconds / healthy.step_seconds,
        "world_size": topology.world_size,
        "num_classes": step.num_classes,
        "classes": [
            {
                "rank": rank,
                "num_ranks": sizes[number],
                "stages": step.plan.rank_stages(coordinate(topology, rank).pp),
                "compute_seconds": step.compute_seconds[number],
                "idle_seconds": step.idle_seconds[number],
            }
            for number, rank in enumerate(step.classes.ranks)
        ],
    }


def _fault_data(fault: Fault) -> dict[str, Any]:
    return {"kind": type(fault).__name__, **asdict(fault)}


def _text(healthy: SimulatedStep, step: SimulatedStep) -> str:
    world_size = step.plan.topology.world_size
    more = step.step_seconds - healthy.step_seconds
    lines = [f"step time      {human_seconds(healthy.step_seconds)}"]
    if step.faults:
        change = (
            f"{more / healthy.step_seconds:+.1%}, {human_seconds(abs(more))} {'less' if more < 0 else 'more'}"
        )
        lines.append(f"with faults    {human_seconds(step.step_seconds)} ({change})")
    lines.append(f"rank classes   {step.num_classes} of {world_size:,} ranks")
    lines += ["", "who waits most (idle is all time without computing):", *_aligned(_waiting(step))]
    return "\n".join(lines)


def _waiting(step: SimulatedStep) -> list[tuple[str, ...]]:
    """A table of the ranks of equal stages that compute equally long, the most idle first."""
    counts: dict[tuple[float, int], int] = {}
    least: dict[tuple[float, int], int] = {}
    for rank, size, seconds in zip(step.classes.ranks, step.classes.sizes, step.compute_seconds, strict=True):
        key = seconds, coordinate(step.plan.topology, rank).pp
        counts[key] = counts.get(key, 0) + size
        least.setdefault(key, rank)
    found: list[tuple[str, ...]] = [
        (
            ",".join(map(str, step.plan.rank_stages(pp))),
            f"{count:,}",
            str(least[seconds, pp]),
            human_seconds(seconds),
            human_seconds(step.step_seconds - seconds),
            f"{1 - seconds / step.step_seconds:.1%}",
        )
        for (seconds, pp), count in sorted(counts.items())
    ]
    if len(found) > SHOWN_MOST + SHOWN_LEAST:
        found[SHOWN_MOST:-SHOWN_LEAST] = [("...",) * len(found[0])]
    several = "s" * (step.plan.virtual_stages > 1)
    return [(f"stage{several}", "ranks", "such as", "compute", "are idle", "of the step"), *found]


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """The rows of a table, columns flush right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
