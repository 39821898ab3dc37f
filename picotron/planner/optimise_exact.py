"""Exact search, level by level: all partial schedules of n actions, then those of n + 1.

A partial schedule is how much of every stage has run, when each rank is free, and when what is on its way
arrives. Of two that ran the same, one that is nowhere later makes the other superfluous (Gromicho et al.
2012, Solving the job-shop scheduling problem optimally by dynamic programming). One whose bound is no
better than the best schedule known is dropped. How a partial schedule goes on follows Giffler and Thompson
1960: of all actions that may come next on their ranks, take the one that would end first, at time t. Its
rank must begin something before t, for else this action would have fitted in before. So only this rank's
choices branch. Where an action put in earlier may keep something else out of a limited memory, the rank may
also wait until t.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

from attrs import frozen

from picotron.planner.actions import B, F, I, W
from picotron.planner.optimise_bound import seconds_after_last_backward, tails
from picotron.planner.optimise_problem import NUM_PHASES, UNLIMITED, Order, Problem

ROUNDING = 1e-12  # of a cost: what is closer is equal


@frozen(kw_only=True)
class Found:
    """What a search found: orders better than those known, or None.

    ``complete``: nothing was left out, so no schedule is better than the better of both. ``states`` counts
    the partial schedules that were looked at.
    """

    orders: list[Order] | None
    complete: bool
    states: int


class _Node(NamedTuple):
    """A partial schedule. Arrivals are those of F, and of I, that nothing has used yet."""

    counts: tuple[int, ...]  # how many F, then backwards, then W of each stage have run
    clock: tuple[float, ...]
    forward_at: tuple[tuple[float, ...], ...]
    backward_at: tuple[tuple[float, ...], ...]
    path: tuple[object, int] | None  # (what came before, code)


class _Choice(NamedTuple):
    end: float
    start: float
    code: int


def search(
    problem: Problem,
    known: float,
    *,
    max_states: int,
) -> Found:
    """Look for orders that cost less than ``known``, at ``max_states`` partial schedules at most."""
    return _Search(problem, max_states).run(known)


class _Search:
    def __init__(self, problem: Problem, max_states: int) -> None:
        self.problem, self.m = problem, problem.num_microbatches
        self.max_states, self.looked = max_states, 0
        self.seconds, self.change = problem.code_seconds(), problem.code_bytes()
        costs, memory, stages = problem.costs, problem.memory, problem.num_stages
        self.f, self.i, self.w = costs.forward_seconds, costs.input_seconds, costs.weight_seconds
        self.hops = [problem.hop(s, s + 1) for s in range(stages - 1)]
        self.tails = tails(problem)
        self.late = [seconds_after_last_backward(problem, rank) for rank in range(problem.num_ranks)]
        self.grows = [w > a for a, w in zip(memory.activation_bytes, memory.weight_bytes, strict=True)]
        self.safe_forward = [
            limit == UNLIMITED or (len(own) == 1 and not self.grows[own[0]])
            for own, limit in zip(problem.rank_stages, problem.limits, strict=True)
        ]
        self.waits_end = all(i > 0.0 or not grows for i, grows in zip(self.i, self.grows, strict=True))

    def run(self, known: float) -> Found:
        stages, levels = self.problem.num_stages, 3 * self.problem.num_stages * self.m
        start = _Node(
            counts=(0,) * (3 * stages),
            clock=(0.0,) * self.problem.num_ranks,
            forward_at=((0.0,) * self.m, *((),) * (stages - 1)),
            backward_at=((),) * stages,
            path=None,
        )
        frontier: dict[int, _Level] = {0: {start.counts: [_Ranked((), -UNLIMITED, start)]}}
        best, best_path = known, None
        for level in range(levels):
            for group in frontier.pop(level, {}).values():
                for ranked in group:
                    for child in self._children(ranked.node, best):
                        size = sum(child.node.counts)
                        if size < levels:
                            _keep(frontier.setdefault(size, {}).setdefault(child.node.counts, []), child)
                        elif child.bound < best * (1 - ROUNDING):
                            best, best_path = child.bound, child.node.path
                    if self.looked > self.max_states:
                        return Found(
                            orders=_orders(self.problem, best_path), complete=False, states=self.looked
                        )
        return Found(orders=_orders(self.problem, best_path), complete=True, states=self.looked)

    def _children(self, node: _Node, best: float) -> Iterator[_Ranked]:
        """What a partial schedule becomes by one more action (a B is two), if it may still beat ``best``."""
        todo = [node]
        while todo and self.looked <= self.max_states:
            node = todo.pop()
            choices = self._choices(node)
            if not choices:
                continue
            first = min(choices)
            rank = self.problem.stage_ranks[first.code // NUM_PHASES]
            own = [c for c in choices if self.problem.stage_ranks[c.code // NUM_PHASES] == rank]
            branches = own if self.waits_end else choices  # all ranks' where waiting would take no time
            for choice in branches:
                if choice.start < first.end or choice is first or not self.waits_end:
                    ranked = self._ranked(self._after(node, choice))
                    if ranked.bound < best * (1 - ROUNDING):
                        yield ranked
            if not self.waits_end:
                continue
            now = node.clock[rank]
            waits = len(own) < len(choices) or any(choice.start > now for choice in own)
            if waits and not self._safe(first.code, rank):
                clock = (*node.clock[:rank], first.end, *node.clock[rank + 1 :])
                later = node._replace(clock=clock)
                if self._ranked(later).bound < best * (1 - ROUNDING):
                    todo.append(later)

    def _safe(self, code: int, rank: int) -> bool:
        """Whether an action put in earlier can keep nothing else out of the rank's memory."""
        stage, phase = divmod(code, NUM_PHASES)
        if phase == F:
            return self.safe_forward[rank]
        return phase != I or not self.grows[stage] or self.problem.limits[rank] == UNLIMITED

    def _choices(self, node: _Node) -> list[_Choice]:
        """All actions that may come next on their ranks, earliest end first in the end's order."""
        problem, counts, stages = self.problem, node.counts, self.problem.num_stages
        out = []
        for rank, own in enumerate(problem.rank_stages):
            room = problem.limits[rank] - self._held(counts, own)
            now = node.clock[rank]
            for s in own:
                code = NUM_PHASES * s
                if node.forward_at[s] and self.change[code + F] <= room:
                    start = max(now, node.forward_at[s][0])
                    out.append(_Choice(start + self.f[s], start, code + F))
                if node.backward_at[s]:
                    start = max(now, node.backward_at[s][0])
                    if self.change[code + I] <= room:
                        out.append(_Choice(start + self.i[s], start, code + I))
                    if self.grows[s]:
                        out.append(_Choice(start + self.seconds[code + B], start, code + B))
                if counts[2 * stages + s] < counts[stages + s]:
                    out.append(_Choice(now + self.w[s], now, code + W))
        return out

    def _held(self, counts: tuple[int, ...], own: tuple[int, ...]) -> int:
        stages, memory = self.problem.num_stages, self.problem.memory
        return sum(
            memory.activation_bytes[s] * (counts[s] - counts[stages + s])
            + memory.weight_bytes[s] * (counts[stages + s] - counts[2 * stages + s])
            for s in own
        )

    def _after(self, node: _Node, choice: _Choice) -> _Node:
        """The partial schedule with one more action."""
        stages = self.problem.num_stages
        stage, phase = divmod(choice.code, NUM_PHASES)
        rank = self.problem.stage_ranks[stage]
        counts, end = list(node.counts), choice.end
        forward_at, backward_at = node.forward_at, node.backward_at
        if phase == F:
            counts[stage] += 1
            used = list(forward_at)
            used[stage] = used[stage][1:]
            if stage + 1 < stages:
                used[stage + 1] = (*used[stage + 1], end + self.hops[stage])
            else:
                backward_at = (*backward_at[:-1], (*backward_at[-1], end))
            forward_at = tuple(used)
        elif phase == W:
            counts[2 * stages + stage] += 1
        else:
            counts[stages + stage] += 1
            counts[2 * stages + stage] += phase == B
            used = list(backward_at)
            used[stage] = used[stage][1:]
            if stage:
                used[stage - 1] = (*used[stage - 1], end + self.hops[stage - 1])
            backward_at = tuple(used)
        clock = (*node.clock[:rank], end, *node.clock[rank + 1 :])
        return _Node(tuple(counts), clock, forward_at, backward_at, (node.path, choice.code))

    def _ranked(self, node: _Node) -> _Ranked:
        """A node with its lower bound, and all its times for comparing."""
        self.looked += 1
        problem, m, stages = self.problem, self.m, self.problem.num_stages
        counts, clock = node.counts, node.clock
        forward, backward = self._earliest(node)
        bound = -UNLIMITED
        for rank, own in enumerate(problem.rank_stages):
            now, rest, weights, idle = clock[rank], 0.0, 0.0, UNLIMITED
            pending = False
            for s in own:
                left = (m - counts[2 * stages + s]) * self.w[s]
                rest += (m - counts[s]) * self.f[s] + (m - counts[stages + s]) * self.i[s] + left
                weights += left
                idle = min(idle, forward[s], backward[s])
                pending |= counts[2 * stages + s] < counts[stages + s]
            if not pending and idle < UNLIMITED:
                now = idle
            bound = max(bound, now + rest - problem.lags[rank])
            if counts[stages + own[0]] < m:
                bound = max(bound, now + rest - min(weights, self.late[rank]) + self.tails[own[0]])
        for s in range(stages):
            if backward[s] < UNLIMITED:
                bound = max(bound, backward[s] + (m - counts[stages + s]) * self.i[s] + self.tails[s])
        times = clock
        for s, rank in enumerate(problem.stage_ranks):
            now = clock[rank]
            times += tuple([at if at > now else now for at in node.forward_at[s]])
            times += tuple([at if at > now else now for at in node.backward_at[s]])
        return _Ranked(times, bound, node)

    def _earliest(self, node: _Node) -> tuple[list[float], list[float]]:
        """When the next F and the next backward of each stage can start at the earliest; never for none."""
        ranks, counts, m = self.problem.stage_ranks, node.counts, self.m
        last = self.problem.num_stages - 1
        forward, backward = [], [UNLIMITED] * (last + 1)
        for s in range(last + 1):
            if counts[s] == m:
                forward.append(UNLIMITED)
                continue
            at = (
                node.forward_at[s][0]
                if node.forward_at[s]
                else forward[-1] + self.f[s - 1] + self.hops[s - 1]
            )
            forward.append(max(at, node.clock[ranks[s]]))
        for s in range(last, -1, -1):
            if counts[last + 1 + s] == m:
                continue
            if node.backward_at[s]:
                at = node.backward_at[s][0]
            elif s == last:
                at = forward[s] + self.f[s]
            else:
                at = backward[s + 1] + self.i[s + 1] + self.hops[s]
            backward[s] = max(at, node.clock[ranks[s]])
        return forward, backward


class _Ranked(NamedTuple):
    times: tuple[float, ...]
    bound: float
    node: _Node


_Level: TypeAlias = dict[tuple[int, ...], list[_Ranked]]
"""Partial schedules of as many actions, by what has run."""


def _keep(group: list[_Ranked], child: _Ranked) -> None:
    """Add a partial schedule to those that ran the same, unless one of them is nowhere later."""
    times = child.times
    for other in group:
        if all(map(float.__le__, other.times, times)):
            return
    group[:] = [other for other in group if not all(map(float.__le__, times, other.times))]
    group.append(child)


def _orders(problem: Problem, path: tuple[object, int] | None) -> list[Order] | None:
    """Each rank's order out of a linked path, None for none."""
    if path is None:
        return None
    codes: Order = []
    step: object = path
    while isinstance(step, tuple):
        step, code = step
        codes.append(code)
    out: list[Order] = [[] for _ in range(problem.num_ranks)]
    for code in reversed(codes):
        out[problem.stage_ranks[code // NUM_PHASES]].append(code)
    return out
