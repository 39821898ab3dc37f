"""What no schedule of a problem can beat: proven lower bounds of the objective.

Each bound looks at one rank r; the greatest of all holds. Microbatches come in turn on each stage, which
loses nothing, and a stage's round trip is the least time from the start of an F there to that of its
backward.

- Work: r's own, from the earliest that it can begin.
- Idle at first: no backward of r starts before the first microbatch has come back to r's last stage. Until
  then r can only run forwards, and of those only what fits its limit.
- Idle at last: after the last F of a stage starts, its backward is a round trip away. Until then r can only
  work on what it held, which fits its limit, and on its later stages. Both waits add up where a limit keeps
  the last F from going before the first backward.
- Tail: r's last backward, of its lowest stage, comes after all else but those W that fit beside it; from
  there the gradient still goes down to stage 0, and each stage on the way ends with a W.
- Bytes times seconds: a microbatch holds its activations from F until it can have come back. A rank's limit,
  times the seconds that it has, must be enough for all microbatches.
"""

from __future__ import annotations

from itertools import accumulate

from picotron.planner.optimise_problem import UNLIMITED, Problem

Kind = tuple[float, int]
"""Seconds and bytes of one item."""


def lower_bound(problem: Problem) -> float:
    """No schedule of the problem has a lower objective: an end of a rank, less its lag."""
    arrivals = ideal_arrivals(problem)
    return max(_rank_bound(problem, rank, *arrivals) for rank in range(problem.num_ranks))


def ideal_arrivals(problem: Problem) -> tuple[list[float], list[float]]:
    """The earliest start of any F, and of any backward, of each stage."""
    c, last = problem.costs, problem.num_stages - 1
    hops = [problem.hop(s, s + 1) for s in range(last)]
    up = [f + hop for f, hop in zip(c.forward_seconds, [*hops, 0.0], strict=True)]
    *forward, turn = accumulate(up, initial=0.0)
    down = [i + hop for i, hop in zip(c.input_seconds[:0:-1], hops[::-1], strict=True)]
    return forward, list(accumulate(down, initial=turn))[::-1]


def tails(problem: Problem) -> list[float]:
    """After the last backward of each stage ends, the least objective less that end."""
    c, lags = problem.costs, problem.lags
    out = [c.weight_seconds[0] - lags[problem.stage_ranks[0]]]
    for stage in range(1, problem.num_stages):
        below = problem.hop(stage - 1, stage) + c.input_seconds[stage - 1] + out[-1]
        out.append(max(below, c.weight_seconds[stage] - lags[problem.stage_ranks[stage]]))
    return out


def seconds_after_last_backward(problem: Problem, rank: int) -> float:
    """The most seconds of W that a rank can leave for after its last backward: what fits beside it."""
    c, memory, m = problem.costs, problem.memory, problem.num_microbatches
    own = problem.rank_stages[rank]
    kinds = [(c.weight_seconds[s], memory.weight_bytes[s]) for s in own]
    beside = most_seconds(kinds, m, problem.limits[rank] - memory.activation_bytes[own[0]])
    return min(beside + c.weight_seconds[own[0]], m * sum(c.weight_seconds[s] for s in own))


def most_seconds(kinds: list[Kind], each: int, room: float) -> float:
    """No choice of at most ``each`` items of every kind that fits ``room`` takes longer.

    Exact for two kinds that take room; for more as if items could be cut.

    >>> most_seconds([(3.0, 2), (1.0, 1)], 5, 7)
    10.0
    """
    free = each * sum(seconds for seconds, size in kinds if size == 0)
    paid = sorted(((seconds / size, size) for seconds, size in kinds if size > 0), reverse=True)
    if room == UNLIMITED:
        return free + each * sum(rate * size for rate, size in paid)
    room = max(room, 0.0)
    if not paid:
        return free
    if len(paid) > 2:
        total = free
        for rate, size in paid:
            taken = min(each * size, room)
            total, room = total + rate * taken, room - taken
        return total
    (rate, size), (other_rate, other_size) = paid[0], paid[-1]
    others = each if len(paid) == 2 else 0
    return free + max(
        count * rate * size + min(others, (room - count * size) // other_size) * other_rate * other_size
        for count in range(int(min(each, room // size)) + 1)
    )


def _rank_bound(problem: Problem, rank: int, forward_at: list[float], backward_at: list[float]) -> float:
    c, memory, m = problem.costs, problem.memory, problem.num_microbatches
    own, limit = problem.rank_stages[rank], problem.limits[rank]
    head, lag, lowest = problem.heads[rank], problem.lags[rank], own[0]
    work = problem.work_seconds(rank)

    first_backward = backward_at[own[-1]]
    kinds = [(c.forward_seconds[s], memory.activation_bytes[s]) for s in own]
    idle = first_backward - head - min(most_seconds(kinds, m, limit), first_backward - head)
    waits = idle
    for stage in own:
        last_wait = _idle_at_last(problem, rank, stage, backward_at[stage] - forward_at[stage])
        apart = m * _bytes_up_to(problem, rank, stage) > limit  # the last F comes after the first backward
        waits = max(waits, idle + last_wait if apart else last_wait)

    ready = head + waits + work
    by_work = ready - lag
    by_tail = ready - seconds_after_last_backward(problem, rank) + tails(problem)[lowest]
    if not 0 < limit < UNLIMITED:
        return max(by_work, by_tail)
    area = 0.0
    for s in own:
        held = backward_at[s] - forward_at[s] + c.input_seconds[s]
        left = min(memory.activation_bytes[s], memory.weight_bytes[s])
        area += m * (memory.activation_bytes[s] * held + left * c.weight_seconds[s])
    return max(by_work, by_tail, head + area / limit - lag)


def _bytes_up_to(problem: Problem, rank: int, stage: int) -> int:
    """What a rank holds of a microbatch that has come as far as ``stage``."""
    return sum(problem.memory.activation_bytes[s] for s in problem.rank_stages[rank] if s <= stage)


def _idle_at_last(problem: Problem, rank: int, stage: int, round_trip: float) -> float:
    """The least that a rank idles between the last F of a stage and its backward."""
    c, memory, m = problem.costs, problem.memory, problem.num_microbatches
    own = problem.rank_stages[rank]
    later = sum(
        c.forward_seconds[s] + c.input_seconds[s] + c.weight_seconds[s] for s in own if s > stage
    )  # of a microbatch that is at this stage, on the stages after it
    kinds: list[Kind] = []
    for s in own:
        weight = c.weight_seconds[s]
        kinds.append((weight, memory.weight_bytes[s]))
        if s <= stage:
            rest = later if s == stage else 0.0
            kinds.append((c.input_seconds[s] + weight + rest, memory.activation_bytes[s]))
    room = problem.limits[rank] - _bytes_up_to(problem, rank, stage)
    busy = c.forward_seconds[stage] + later + most_seconds(kinds, m - 1, room)
    return max(0.0, round_trip - busy)
