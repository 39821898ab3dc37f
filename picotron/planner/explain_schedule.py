"""Why a schedule takes as long as it does: its program's critical path, and for what each rank waits."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from picotron.planner.analysis import CAUSES, critical_path, exposed_seconds, idle_causes
from picotron.planner.flow import Times, program_times
from picotron.planner.grid import WIDTH, joined
from picotron.planner.lower import with_transfers
from picotron.planner.pipeline import Schedule
from picotron.planner.program import COMPUTE, Program, row_at
from picotron.planner.schedule_times import PipelineCosts, unit_costs

_SHOWN = 6  # rows of the path at each of its ends


def explain_schedule(schedule: Schedule, costs: PipelineCosts | None = None, *, width: int = WIDTH) -> str:
    """The lowered program's makespan, idle time by cause and rank, and critical path, as text.

    Unlike the schedule by itself it counts messages: a channel carries one at a time, and takes up room.
    """
    costs = costs or unit_costs(schedule.num_stages)
    program = with_transfers(schedule, 0)
    times = program_times(program, costs)
    return joined(
        [
            f"as a program: {times.makespan_seconds:g} time units; communication that shows: "
            f"{sum(exposed_seconds(program, times)) / program.num_ranks:g} a rank",
            *_idle_table(program, times),
            _path_line(program, times),
        ],
        width,
    )


def _idle_table(program: Program, times: Times) -> list[str]:
    """Idle time of each rank by cause; causes that there are not, and ranks beyond 16, are left out."""
    found = idle_causes(program, times)
    causes = [cause for cause in CAUSES if any(each[cause] > 0 for each in found)]
    rows = [["idle, waiting for", *causes, "all"]]
    for rank, each in enumerate(found[:16]):
        rows.append([f"rank {rank}", *(f"{each[cause]:g}" for cause in causes), f"{sum(each.values()):g}"])
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, sizes)) for row in rows]
    return lines + [f"... and {len(found) - 16} ranks more"] * (len(found) > 16)


def _path_line(program: Program, times: Times) -> str:
    """The critical path: its ends, and how much of it each rank computes."""
    path = critical_path(program, times)
    names = [str(row_at(program, program.offsets[rank] + row)) for rank, row in path]
    shown = names if len(names) <= 2 * _SHOWN else [*names[:_SHOWN], "...", *names[-_SHOWN:]]
    ranks = [rank for rank, row in path if program.kind[program.offsets[rank] + row] in COMPUTE]
    return f"critical path: {' '.join(shown)} (computing on {_runs(ranks)})"


def _runs(ranks: Sequence[int]) -> str:
    """Which ranks follow each other: ``rank 0 (4 actions), rank 1 (2), ...``."""
    runs = [(rank, len(list(own))) for rank, own in groupby(ranks)]
    texts = [f"rank {rank} x{count}" for rank, count in runs]
    return ", ".join(texts if len(texts) <= 2 * _SHOWN else [*texts[:_SHOWN], "...", *texts[-_SHOWN:]])
