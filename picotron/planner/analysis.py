"""What a program's times tell: bubbles, the critical path, communication that shows, and why ranks idle."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from picotron.planner.flow import HOLDS, WORK, Times
from picotron.planner.program import COLLECTIVES, COMPUTE, SENDS, Kind, Program

CAUSES = ("warm-up", "forward", "backward", "send", "collective", "copy", "end")
"""Why a rank idles: it waits for the first thing it computes with, for a later forward input, for a backward
one, for room in a channel, for a sum or gathered parameters, for a copy to or from the host; or is done."""

_CAUSE_OF = {
    **dict.fromkeys((Kind.RECV_F,), "forward"),
    **dict.fromkeys((Kind.RECV_B,), "backward"),
    **dict.fromkeys(SENDS, "send"),
    **dict.fromkeys(COLLECTIVES, "collective"),
    **dict.fromkeys((Kind.OFFLOAD, Kind.RELOAD), "copy"),
}


def work_seconds(program: Program, times: Times) -> tuple[float, ...]:
    """What each rank computes."""
    taken = np.where(program.is_kind(*WORK), times.end - times.start, 0.0)
    return _by_rank(program, taken)


def bubble_seconds(program: Program, times: Times) -> tuple[float, ...]:
    """Idle seconds of each rank: the makespan less its work."""
    return tuple(times.makespan_seconds - work for work in work_seconds(program, times))


def bubble_fraction(program: Program, times: Times) -> float:
    """Idle share of the makespan, averaged over ranks."""
    bubbles = bubble_seconds(program, times)
    return sum(bubbles) / len(bubbles) / times.makespan_seconds


def exposed_seconds(program: Program, times: Times) -> tuple[float, ...]:
    """By rank, how long it waits for communication that is under way, not for somebody to come to it."""
    rows, target, came, left = _held(program, times)
    under_way = np.minimum(left, times.end[target]) - np.maximum(came, times.start[target])
    seconds = np.zeros(program.num_rows)
    seconds[rows] = np.maximum(under_way, 0.0)
    return _by_rank(program, seconds)


def idle_causes(program: Program, times: Times) -> tuple[dict[str, float], ...]:
    """By rank, the seconds it idles for each of CAUSES; they sum to its bubble.

    Once a rank has computed all of its microbatches, waiting for others to come is its end: only what is
    under way then counts as a send or a collective.
    """
    rows, target, came, left = _held(program, times)
    idle = left - came
    kinds = program.kind[target]
    computing = np.flatnonzero(program.is_kind(*COMPUTE))
    first, last = (np.full(program.num_ranks, place) for place in (program.num_rows, -1))
    first[program.rank[computing[::-1]]] = computing[::-1]
    last[program.rank[computing]] = computing
    rank = program.rank[rows]
    under_way = np.clip(left - np.maximum(came, times.start[target]), 0.0, None)
    found = []
    for own in range(program.num_ranks):
        seconds = dict.fromkeys(CAUSES, 0.0)
        mine = np.flatnonzero(rank == own)
        for kind in np.unique(kinds[mine]).tolist():
            some = mine[kinds[mine] == kind]
            done, early = rows[some] > last[own], rows[some] < first[own]
            cause = _CAUSE_OF[Kind(kind)]
            start = "warm-up" if cause == "forward" else cause
            seconds[start] += float(idle[some][early].sum())
            seconds[cause] += float(idle[some][~early & ~done].sum() + under_way[some][done].sum())
            seconds["end"] += float((idle[some] - under_way[some])[done].sum())
        over = float(left[mine].max(initial=0.0))
        works = np.flatnonzero(program.is_kind(*WORK)[program.offsets[own] : program.offsets[own + 1]])
        if len(works):
            over = max(over, float(times.end[program.offsets[own] + works[-1]]))
        seconds["end"] += times.makespan_seconds - over
        found.append(seconds)
    return tuple(found)


def _held(program: Program, times: Times) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rows that hold their rank: each, what it waits for, when its rank comes to it and when it goes on."""
    rows = np.flatnonzero(program.is_kind(*HOLDS))
    target = program.target[rows]
    target = np.where(target >= 0, target + program.first_row[rows], rows)
    steps = times.how.steps
    came = times.how.step_end[steps.before[rows]]
    return rows, target, came, np.maximum(came, times.end[rows])


def _by_rank(program: Program, seconds: np.ndarray) -> tuple[float, ...]:
    return tuple(float(seconds[first:stop].sum()) for first, stop in pairwise(program.offsets))


def critical_path(program: Program, times: Times) -> tuple[tuple[int, int], ...]:
    """The (rank, row) of what sets the makespan: computing rows, and one end of what is communicated.

    In order: the first starts at 0, each ends when the next one starts, and the last ends with the step. Of
    several such paths it stays on a rank as long as it can.
    """
    how, path = times.how, list[tuple[int, int]]()
    came, begin, started = how.step_came, how.step_begin, how.operation_start
    firsts = set(how.steps.offsets)
    step, operation = _last(times)
    while step >= 0 or operation >= 0:
        if operation >= 0:
            row = int(how.met.first[operation])
            path.append((program.rank_of(row), row))
            step, operation = _before_operation(times, operation, float(started[operation]))
            continue
        row = int(how.steps.row[step])
        if row >= 0 and program.kind[row] in WORK:
            path.append((program.rank_of(row), row))
        if step in firsts:
            break
        waits = int(how.steps.waits_for[step])
        if waits >= 0 and begin[step] > came[step]:
            step, operation = -1, waits
        else:
            step -= 1
    return tuple((rank, row - program.offsets[rank]) for rank, row in reversed(path))


def _last(times: Times) -> tuple[int, int]:
    """The step, or the operation, that ends with the makespan; -1 for the other."""
    how = times.how
    if how.step_end.max() == times.makespan_seconds:
        return int(how.step_end.argmax()), -1
    return -1, int(how.operation_end.argmax())


def _before_operation(times: Times, operation: int, start: float) -> tuple[int, int]:
    """The step or the operation that let this one start."""
    met, how = times.how.met, times.how
    ends = (int(met.first[operation]), int(met.second[operation]), *met.further.get(operation, ()))
    for step in (int(how.steps.before[row]) for row in ends):
        if how.step_end[step] == start:
            return step, -1
    return -1, operation - 1
