"""What ``picotron schedule`` is asked about: schedules by name or from files, and costs."""

from __future__ import annotations

import argparse

from picotron.cli.common import read_orders
from picotron.cli.plan import read_schedule
from picotron.errors import PlanError
from picotron.planner.catalogue import SCHEDULES, make_schedule
from picotron.planner.pipeline import Schedule, schedule_of
from picotron.planner.schedule_times import PipelineCosts

COST_NAMES = ("f", "i", "w", "transfer")


def parse_costs(text: str) -> dict[str, tuple[float, ...]]:
    """The costs of ``f=1,i=1,w=1``, and of ``f=1:1:2:1``, one for each stage."""
    try:
        pairs = [item.split("=") for item in text.split(",")]
        found = {name.strip(): tuple(map(float, value.split(":"))) for name, value in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(f"must look like f=1,i=1,w=1,transfer=0, got {text!r}") from None
    unknown = sorted(found.keys() - set(COST_NAMES))
    if unknown:
        raise argparse.ArgumentTypeError(f"must name {', '.join(COST_NAMES)}, got {', '.join(unknown)}")
    if len(found.get("transfer", (0.0,))) != 1:
        raise argparse.ArgumentTypeError(f"must give one transfer, got {text!r}")
    return found


def stage_costs(given: dict[str, tuple[float, ...]], num_stages: int) -> PipelineCosts:
    """The costs of each stage; one alone is that of every stage."""
    columns = {}
    for name in ("f", "i", "w"):
        values = given.get(name, (1.0,))
        if len(values) not in (1, num_stages):
            raise PlanError(f"--costs {name} must be one number or {num_stages}, got {len(values)} of them")
        columns[name] = values * (num_stages if len(values) == 1 else 1)
    return PipelineCosts(
        forward_seconds=columns["f"],
        input_seconds=columns["i"],
        weight_seconds=columns["w"],
        transfer_seconds=given.get("transfer", (0.0,))[0],
    )


def asked_schedule(name: str, arguments: argparse.Namespace) -> Schedule:
    """The schedule of a name or a file, of the sizes that were asked for."""
    if name == "custom":
        if arguments.source is None:
            raise PlanError("custom needs --from FILE, a file of orders; - reads the standard input")
        return _of_size(schedule_of(read_orders(arguments.source)), arguments)
    if arguments.source is not None:
        raise PlanError(f"--from is for the schedule custom, got {name}; leave one of them out")
    found = read_schedule(name)
    if isinstance(found, Schedule):
        return _of_size(found, arguments)
    if found in SCHEDULES and None in (arguments.ranks, arguments.microbatches):
        raise PlanError(f"{found} needs --ranks and --microbatches, as in --ranks 4 --microbatches 8")
    stages = arguments.virtual_stages
    if arguments.schedule == "compare" and found in SCHEDULES and SCHEDULES[found].virtual_stages != "any":
        stages = None  # the others may take it
    return make_schedule(found, arguments.ranks, arguments.microbatches, stages)


def _of_size(schedule: Schedule, arguments: argparse.Namespace) -> Schedule:
    """A schedule that was read, if it has the sizes that were asked for."""
    sizes = {
        "ranks": schedule.num_ranks,
        "microbatches": schedule.num_microbatches,
        "virtual_stages": schedule.num_stages // schedule.num_ranks,
    }
    for name, size in sizes.items():
        asked = getattr(arguments, name)
        if asked not in (None, size):
            raise PlanError(
                f"--{name.replace('_', '-')} must be the file's own {size}, got {asked}; leave it out"
            )
    return schedule
