"""The fastest schedule by brute force, apart from all that the optimiser knows.

``fastest`` walks every state that any order of the ranks' actions can reach: nothing is estimated, preferred
or cut, but for states that are nowhere earlier than another in which the very same actions have run. From
there on whatever one can do the other can do as early, so the optimum stays.

``fastest_by_orders`` does not even do that: it plays all orders of all ranks, each by repeated passes until
nothing moves. It is for the smallest cases, and vouches for ``fastest``.

Microbatches are taken in turn on each stage. That loses nothing: they cost the same, so take any schedule
and number each stage's F, its backwards and its W anew in order of time. If k backwards have started on a
stage, k different microbatches have gone through the stage after, so the k-th backward there ended in time;
F, and W after I, likewise. No start changes, nor what a rank holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from attrs import frozen


@frozen(kw_only=True)
class Case:
    """Small numbers: seconds and bytes per stage, a limit per rank."""

    forward: tuple[int, ...]
    inputs: tuple[int, ...]
    weights: tuple[int, ...]
    transfer: int
    activation: tuple[int, ...]
    left: tuple[int, ...]  # bytes between I and W
    stage_ranks: tuple[int, ...]
    num_microbatches: int
    limits: tuple[float, ...]

    @property
    def num_stages(self) -> int:
        return len(self.stage_ranks)

    def hop(self, stage: int, other: int) -> int:
        return self.transfer if self.stage_ranks[stage] != self.stage_ranks[other] else 0


def held(case: Case, done: tuple[tuple[int, int, int], ...], rank: int) -> int:
    """Bytes that a rank holds, from how many F, backwards and W each stage has run."""
    return sum(
        (f - b) * case.activation[s] + (b - w) * case.left[s]
        for s, (f, b, w) in enumerate(done)
        if case.stage_ranks[s] == rank
    )


def steps(done: tuple[int, int, int]) -> Iterator[tuple[str, tuple[int, int, int]]]:
    """What a stage may run next, by its own counts."""
    f, b, w = done
    yield "F", (f + 1, b, w)
    if b < f:
        yield "I", (f, b + 1, w)
        yield "B", (f, b + 1, w + 1)
    if w < b:
        yield "W", (f, b, w + 1)


def seconds(case: Case, stage: int, kind: str) -> int:
    parts = {"F": case.forward, "I": case.inputs, "W": case.weights}
    return sum(parts[part][stage] for part in {"F": "F", "I": "I", "W": "W", "B": "IW"}[kind])


def fastest(case: Case, *, own_spans: bool = False) -> float | None:
    """The least makespan or, with ``own_spans``, the least longest span of a rank; None if none fits."""
    stages, m = case.num_stages, case.num_microbatches
    nothing = ((0, 0, 0),) * stages
    # A state: counts -> set of (clock of each rank, ends of F and of backwards of each stage).
    level = {nothing: [((0,) * len(case.limits), ((),) * stages, ((),) * stages)]}
    best: float | None = None
    heads = [sum(case.forward[:s]) + sum(case.hop(t, t + 1) for t in range(s)) for s in range(stages)]
    first = [
        min(heads[s] for s in range(stages) if case.stage_ranks[s] == r) for r in range(len(case.limits))
    ]
    levels: list[dict] = [level] + [{} for _ in range(3 * stages * m)]
    for number in range(3 * stages * m):
        for done, times in levels[number].items():
            for stage, counts in enumerate(done):
                for kind, after in steps(counts):
                    if max(after) > m:
                        continue
                    now = (*done[:stage], after, *done[stage + 1 :])
                    rank = case.stage_ranks[stage]
                    if held(case, now, rank) > case.limits[rank]:
                        continue
                    bucket = levels[number + (2 if kind == "B" else 1)].setdefault(now, [])
                    for time in times:
                        step = advance(case, time, stage, kind, counts)
                        if step is not None:
                            insert(bucket, step, now)
    for clock, _, _ in levels[-1].get(((m, m, m),) * stages, []):
        value = max(end - start for end, start in zip(clock, first, strict=True)) if own_spans else max(clock)
        best = value if best is None else min(best, value)
    return best


def advance(case, time, stage, kind, counts):
    """The state after one more action, as early as it may; None if it must wait for what has not run."""
    clock, forwards, backwards = time
    f, b, _ = counts
    rank = case.stage_ranks[stage]
    ready = clock[rank]
    if kind == "F" and stage:
        if len(forwards[stage - 1]) <= f:
            return None
        ready = max(ready, forwards[stage - 1][f] + case.hop(stage - 1, stage))
    if kind in "IB" and stage + 1 < case.num_stages:
        if len(backwards[stage + 1]) <= b:
            return None
        ready = max(ready, backwards[stage + 1][b] + case.hop(stage + 1, stage))
    end = ready + seconds(case, stage, kind)
    clock = (*clock[:rank], end, *clock[rank + 1 :])
    if kind == "F":
        forwards = (*forwards[:stage], (*forwards[stage], end), *forwards[stage + 1 :])
    elif kind in "IB":
        backwards = (*backwards[:stage], (*backwards[stage], end), *backwards[stage + 1 :])
    return clock, forwards, backwards


def insert(bucket, step, done):
    """Keep a state unless one in the bucket is nowhere later in anything that still counts."""
    mine = relevant(step, done)
    for other in bucket:
        if all(a <= b for a, b in zip(relevant(other, done), mine, strict=True)):
            return
    bucket[:] = [o for o in bucket if not all(a <= b for a, b in zip(mine, relevant(o, done), strict=True))]
    bucket.append(step)


def relevant(state, done):
    """Clocks, and ends that a neighbour has not used."""
    clock, forwards, backwards = state
    out = list(clock)
    for stage in range(len(done) - 1):
        out += forwards[stage][done[stage + 1][0] :]
    for stage in range(1, len(done)):
        out += backwards[stage][done[stage - 1][1] :]
    return out


def fastest_by_orders(case: Case, *, own_spans: bool = False) -> float | None:
    """As ``fastest``, by playing every order of every rank."""
    best: float | None = None
    ranks = range(len(case.limits))
    for orders in product(*(list(rank_orders(case, rank)) for rank in ranks)):
        spans = play(case, orders)
        if spans is not None:
            value = max(end - start for start, end in spans) if own_spans else max(end for _, end in spans)
            best = value if best is None else min(best, value)
    return best


def rank_orders(case: Case, rank: int) -> Iterator[tuple[tuple[int, str, int], ...]]:
    """Every order of a rank's (stage, kind, microbatch) that fits its limit."""
    own = [s for s in range(case.num_stages) if case.stage_ranks[s] == rank]
    m = case.num_microbatches

    def walk(done, order):
        if all(done[s] == (m, m, m) for s in own):
            yield tuple(order)
            return
        for s in own:
            f, b, w = done[s]
            for kind, after in steps(done[s]):
                now = (*done[:s], after, *done[s + 1 :])
                if max(after) <= m and held(case, now, rank) <= case.limits[rank]:
                    number = {"F": f, "I": b, "B": b, "W": w}[kind]
                    yield from walk(now, [*order, (s, kind, number)])

    yield from walk(((0, 0, 0),) * case.num_stages, [])


def play(case, orders):
    """Start and end of each rank, by passes over all ranks until nothing moves; None if they are stuck."""
    ended: dict[tuple[int, str, int], int] = {}
    at, clock, start = [0] * len(orders), [0] * len(orders), [None] * len(orders)
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(orders):
            if at[rank] == len(order):
                continue
            stage, kind, number = order[at[rank]]
            other = stage - 1 if kind == "F" else stage + 1
            ready = clock[rank]
            if kind != "W" and 0 <= other < case.num_stages:
                key = (other, "F" if kind == "F" else "back", number)
                if key not in ended:
                    continue
                ready = max(ready, ended[key] + case.hop(stage, other))
            start[rank] = ready if start[rank] is None else start[rank]
            clock[rank] = ready + seconds(case, stage, kind)
            ended[stage, "F" if kind == "F" else "W" if kind == "W" else "back", number] = clock[rank]
            at[rank], moved = at[rank] + 1, True
    if any(a < len(order) for a, order in zip(at, orders, strict=True)):
        return None
    return list(zip(start, clock, strict=True))
