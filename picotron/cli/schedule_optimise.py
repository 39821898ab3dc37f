"""``picotron schedule optimise``: the fastest schedule found under a memory limit, and what bounds it."""

from __future__ import annotations

import argparse
import sys
from typing import Any, get_args

from picotron.cli.schedule_inputs import stage_costs
from picotron.errors import PlanError
from picotron.planner.optimise import Objective, OptimisedSchedule, Placement, optimise
from picotron.planner.schedule_memory import unit_memory


def add_limits(parser: argparse.ArgumentParser) -> None:
    """Declare what only ``optimise`` asks for."""
    limits = parser.add_argument_group("to optimise")
    limits.add_argument(
        "--memory-limit", type=int, metavar="BYTES", help="that a rank may hold (default: any)"
    )
    limits.add_argument(
        "--activation-bytes", type=int, default=1, metavar="BYTES", help="of a stage after its forward (1)"
    )
    limits.add_argument(
        "--weight-bytes",
        type=int,
        metavar="BYTES",
        help="of a stage between input and weight gradient (default: as after its forward)",
    )
    limits.add_argument("--placement", choices=get_args(Placement), help="of stages on ranks (loop)")
    limits.add_argument(
        "--objective",
        choices=get_args(Objective),
        default="makespan",
        help="what is made short: the makespan, or the longest own span of a rank (default makespan)",
    )


def best_schedule(arguments: argparse.Namespace) -> OptimisedSchedule:
    """The fastest schedule found for what was asked."""
    if arguments.more:
        raise PlanError(f"optimise takes no schedule, got {' '.join(arguments.more)}; it makes one")
    if None in (arguments.ranks, arguments.microbatches):
        raise PlanError("optimise needs --ranks and --microbatches, as in --ranks 4 --microbatches 8")
    virtual_stages = arguments.virtual_stages or (2 if arguments.placement == "v" else 1)
    if {"one": 1, "v": 2}.get(arguments.placement, virtual_stages) != virtual_stages:
        raise PlanError(
            f"--placement {arguments.placement} has no --virtual-stages {virtual_stages}; leave one out"
        )
    stages = arguments.ranks * virtual_stages
    activation, weight = arguments.activation_bytes, arguments.weight_bytes
    told = sys.stderr.isatty()
    best = optimise(
        stage_costs(arguments.costs, stages),
        arguments.ranks,
        arguments.microbatches,
        memory=unit_memory(stages, activation=activation, weight=activation if weight is None else weight),
        memory_limit_bytes=arguments.memory_limit,
        placement=arguments.placement or ("one" if stages == arguments.ranks else "loop"),
        objective=arguments.objective,
        progress=_progress if told else None,
    )
    if told:
        print(file=sys.stderr)
    return best


def _progress(spent: int, effort: int, best: float) -> None:
    """One line on a terminal that is written over."""
    text = f"\r{spent / max(effort, 1):4.0%} of the effort, best {best:g} "
    print(text, end="", file=sys.stderr, flush=True)


def found_line(best: OptimisedSchedule) -> str:
    """Which way found the schedule, and how far it may be from the optimum."""
    proof = "proven optimal" if best.proven_optimal else f"at most {best.gap:.1%} above the optimum"
    return (
        f"found by {best.source}: {best.makespan_seconds:g}, no schedule ends before "
        f"{best.lower_bound_seconds:g}; {proof}"
    )


def found_data(best: OptimisedSchedule) -> dict[str, Any]:
    """The same as values that JSON has."""
    return {
        "source": best.source,
        "proven_optimal": best.proven_optimal,
        "lower_bound": best.lower_bound_seconds,
        "gap": best.gap,
        "peak_bytes": list(best.peak_bytes),
    }
