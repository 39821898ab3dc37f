"""List scheduling: a rank that is free takes the best action that can start, by a policy of a few numbers.

Sources: Graham 1969 for list scheduling; Qi et al. 2023, Zero Bubble, arXiv:2401.10241, section 3.1, for
what to tune: how many forwards go before the first backward, and whether a W fills a gap that it overruns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from heapq import heappop, heappush
from itertools import product
from random import Random

from attrs import evolve, frozen

from picotron.planner.actions import B, F, I, W
from picotron.planner.optimise_bound import ideal_arrivals
from picotron.planner.optimise_problem import NUM_PHASES, UNLIMITED, Order, Problem

Caps = tuple[int, ...] | None
"""Per stage; None for no caps."""


@frozen(kw_only=True)
class Policy:
    """How a free rank chooses.

    ``caps``: the most microbatches between F and I, per rank and stage held. ``forward_first``: an F goes
    before an I that could start as well. ``overrun``: a W fills a gap if at most this share of it delays
    what comes next. ``patience``: an F lets an I go first that arrives within this share of the F.
    ``deep_first``: of several stages, the later one's F goes first. ``even_idle``: a rank that idled
    less than another rather waits than delays what comes next.
    """

    caps: Caps = None
    forward_first: bool = False
    overrun: float = 0.0
    patience: float = 0.0
    deep_first: bool = True
    even_idle: bool = False


def policies(problem: Problem) -> Iterator[Policy]:
    """The portfolio, those first that have won most often."""
    full = round_trip_caps(problem, "F", 0)  # forwards until the first backward comes: ZB-H2's
    short = round_trip_caps(problem, "F", -1)
    even = round_trip_caps(problem, "FI", 0)  # as many as one F and one I in turn let through: 1F1B's
    tried = {}
    for policy in (
        Policy(overrun=1.0),
        Policy(caps=even),
        Policy(caps=even, overrun=0.5),
        Policy(caps=short, overrun=1.0, even_idle=True),
        Policy(caps=full, overrun=1.0, forward_first=True),
        Policy(overrun=1.0, patience=0.5),
        Policy(caps=short, overrun=1.0, even_idle=True, forward_first=True),
        Policy(caps=full, overrun=1.0, patience=0.25),
        *_grid(problem),
    ):
        if policy not in tried:
            tried[policy] = True
            yield policy


def _grid(problem: Problem) -> Iterator[Policy]:
    """Every policy of some values of each number."""
    caps: list[Caps] = [None]
    caps += [
        round_trip_caps(problem, phases, more) for phases in ("F", "FI", "FIW") for more in (-1, 0, 1, 2)
    ]
    fills = ((0.0, False), (1.0, False), (1.0, True), (0.5, False))
    deep = (True, False) if problem.num_stages > problem.num_ranks else (True,)
    for patience, deep_first, (overrun, even_idle), forward_first, cap in product(
        (0.0, 0.25), deep, fills, (False, True), caps
    ):
        if not (forward_first and patience):
            yield Policy(
                caps=cap,
                forward_first=forward_first,
                overrun=overrun,
                patience=patience,
                deep_first=deep_first,
                even_idle=even_idle,
            )


def round_trip_caps(problem: Problem, phases: str, more: int) -> tuple[int, ...]:
    """How many microbatches a stage takes in while the first is away, if its rank runs ``phases`` of each."""
    seconds = problem.costs.table()
    columns = ["FBIW".index(phase) for phase in phases]
    caps = []
    for stage, (forward_at, backward_at) in enumerate(zip(*ideal_arrivals(problem), strict=True)):
        own = problem.rank_stages[problem.stage_ranks[stage]]
        each = sum(float(seconds[column, s]) for column in columns for s in own)
        caps.append(max(1, math.ceil((backward_at - forward_at) / each - 1e-9) + more))
    return tuple(caps)


def fill_policies() -> tuple[Policy, ...]:
    """Ways to put W into an order of F and I."""
    return (
        Policy(),
        Policy(overrun=0.5),
        Policy(overrun=1.0, even_idle=True),
        Policy(overrun=1.0),
    )


def changed(problem: Problem, policy: Policy, random: Random) -> Policy:
    """A policy beside this one: other caps of some stages, or another number."""
    kind = random.random()
    if kind < 0.5:
        caps = policy.caps or (problem.num_microbatches,) * problem.num_stages
        first = random.randrange(problem.num_stages)
        stop = first + 1 if random.random() < 0.5 else random.randrange(first, problem.num_stages) + 1
        more = random.choice((-2, -1, 1, 2))
        own = tuple(max(1, cap + more) if first <= s < stop else cap for s, cap in enumerate(caps))
        return evolve(policy, caps=own)
    if kind < 0.75:
        overrun = random.choice((0.0, 0.1, 0.25, 0.5, 0.75, 1.0))
        return evolve(policy, overrun=overrun, even_idle=random.random() < 0.5)
    if kind < 0.9:
        return evolve(policy, patience=random.choice((0.0, 0.1, 0.25, 0.5, 0.75, 1.0)))
    if problem.num_stages > problem.num_ranks and random.random() < 0.5:
        return evolve(policy, deep_first=not policy.deep_first)
    return evolve(policy, forward_first=not policy.forward_first)


def dispatch(problem: Problem, policy: Policy) -> list[Order]:
    """The orders that a policy makes. They fit the limits, if one microbatch of all its stages fits a rank.

    An F is let in only if the later stages of its rank could still hold one microbatch: so the microbatch
    that is furthest can always go on, and no rank is ever full of activations that cannot leave.
    """
    return _Dispatch(problem, policy).run()


def refill(problem: Problem, skeleton: list[Order], policy: Policy) -> list[Order] | None:
    """Orders that run F and I as ``skeleton`` says and W where the policy puts them; None if none can."""
    run = _Refill(problem, policy, skeleton)
    orders = run.run()
    return orders if run.complete() else None


def skeleton_of(orders: list[Order]) -> list[Order]:
    """The F and I of orders, and each B as an I."""
    kinds = {F: F, B: I, I: I}
    return [
        [code - code % NUM_PHASES + kinds[code % NUM_PHASES] for code in order if code % NUM_PHASES != W]
        for order in orders
    ]


class _Dispatch:
    """One run of the list scheduler."""

    def __init__(self, problem: Problem, policy: Policy) -> None:
        self.problem, self.policy = problem, policy
        stages, m = problem.num_stages, problem.num_microbatches
        memory = problem.memory
        self.forward_seconds = problem.costs.forward_seconds
        self.weight_seconds = problem.costs.weight_seconds
        self.durations, self.change = problem.code_seconds(), problem.code_bytes()
        self.held = [0] * problem.num_ranks
        self.idle = [0.0] * problem.num_ranks  # since the first action of each
        self.clock = [0.0] * problem.num_ranks
        self.orders: list[Order] = [[] for _ in range(problem.num_ranks)]
        self.forwards, self.backwards, self.weights = [0] * stages, [0] * stages, [0] * stages
        self.forward_at: list[list[float]] = [[] for _ in range(stages)]
        self.forward_at[0] = [0.0] * m
        self.backward_at: list[list[float]] = [[] for _ in range(stages)]
        self.reserve = [
            sum(memory.activation_bytes[later] for later in problem.rank_stages[rank] if later > stage)
            for stage, rank in enumerate(problem.stage_ranks)
        ]
        deep = policy.deep_first
        self.forward_turns = [own[::-1] if deep else own for own in problem.rank_stages]
        self.backward_turns = [own[::-1] for own in problem.rank_stages]
        self.hops = [problem.hop(s, s + 1) for s in range(stages - 1)]
        self.events: list[tuple[float, int]] = [(0.0, problem.stage_ranks[0])]

    def run(self) -> list[Order]:
        events, clock = self.events, self.clock
        while events:
            now, rank = heappop(events)
            if now >= clock[rank]:
                self._choose(rank, now)
        return self.orders

    def _choose(self, rank: int, now: float) -> None:
        """Start what the policy prefers at a moment when the rank is free, or wait."""
        policy = self.policy
        back, back_at = self._next_backward(rank, now)
        front, front_at, blocked = self._next_forward(rank, now)
        if front >= 0 and front_at <= now and (back < 0 or back_at > now or policy.forward_first):
            wait = policy.patience * self.forward_seconds[front]
            if back < 0 or back_at - now >= wait or policy.forward_first:
                self._forward(front, now)
                return
            front_at = UNLIMITED
        if back >= 0 and back_at <= now:
            self._backward(back, rank, now)
            return
        if blocked and self._fill(rank, now, UNLIMITED):
            return
        upcoming = min(front_at if front >= 0 else UNLIMITED, back_at if back >= 0 else UNLIMITED)
        if not self._fill(rank, now, upcoming) and upcoming < UNLIMITED:
            heappush(self.events, (upcoming, rank))

    def _next_backward(self, rank: int, now: float) -> tuple[int, float]:
        """The stage whose backward comes next, and when it can start."""
        best, best_at = -1, UNLIMITED
        for stage in self.backward_turns[rank]:
            nth = self.backwards[stage]
            if nth < len(self.backward_at[stage]):
                at = self.backward_at[stage][nth]
                if at <= now:
                    return stage, at
                if at < best_at:
                    best, best_at = stage, at
        return best, best_at

    def _next_forward(self, rank: int, now: float) -> tuple[int, float, bool]:
        """The stage whose F comes next, when it can start, and whether memory alone holds one back."""
        best, best_at, blocked = -1, UNLIMITED, False
        free = self.problem.limits[rank] - self.held[rank]
        caps = self.policy.caps
        for stage in self.forward_turns[rank]:
            nth = self.forwards[stage]
            if nth >= len(self.forward_at[stage]):
                continue
            if caps is not None and nth - self.backwards[stage] >= caps[stage]:
                continue
            at = self.forward_at[stage][nth]
            if self.problem.memory.activation_bytes[stage] + self.reserve[stage] > free:
                blocked |= at <= now
                continue
            if at <= now:
                return stage, at, blocked
            if at < best_at:
                best, best_at = stage, at
        return best, best_at, blocked

    def _forward(self, stage: int, now: float) -> None:
        end = self._run(stage, F, now)
        self.forwards[stage] += 1
        if stage + 1 < self.problem.num_stages:
            self._deliver(self.forward_at[stage + 1], end + self.hops[stage], stage + 1)
        else:
            self._deliver(self.backward_at[stage], end, stage)

    def _backward(self, stage: int, rank: int, now: float) -> None:
        """An I, or a B where what I leaves would not fit."""
        memory = self.problem.memory
        grown = self.held[rank] + memory.weight_bytes[stage] - memory.activation_bytes[stage]
        if grown > self.problem.limits[rank]:
            end = self._run(stage, B, now)
            self.weights[stage] += 1
        else:
            end = self._run(stage, I, now)
        self.backwards[stage] += 1
        if stage:
            self._deliver(self.backward_at[stage - 1], end + self.hops[stage - 1], stage - 1)

    def _fill(self, rank: int, now: float, upcoming: float) -> bool:
        """Start a W that ends soon enough after ``upcoming``, if there is one."""
        for stage in self.problem.rank_stages[rank]:
            if self.weights[stage] < self.backwards[stage]:
                gap, length = upcoming - now, self.weight_seconds[stage]
                if gap >= length * (1.0 - self.policy.overrun):
                    if self.policy.even_idle and gap < length and self.idle[rank] + gap <= max(self.idle):
                        continue
                    self.weights[stage] += 1
                    self._run(stage, W, now)
                    return True
        return False

    def _run(self, stage: int, phase: int, now: float) -> float:
        code = NUM_PHASES * stage + phase
        rank = self.problem.stage_ranks[stage]
        self.orders[rank].append(code)
        self.held[rank] += self.change[code]
        end = now + self.durations[code]
        if len(self.orders[rank]) > 1:
            self.idle[rank] += now - self.clock[rank]
        self.clock[rank] = end
        heappush(self.events, (end, rank))
        return end

    def _deliver(self, queue: list[float], at: float, stage: int) -> None:
        queue.append(at)
        rank = self.problem.stage_ranks[stage]
        heappush(self.events, (max(at, self.clock[rank]), rank))


class _Refill(_Dispatch):
    """A run that is told the order of F and I on each rank."""

    def __init__(self, problem: Problem, policy: Policy, skeleton: list[Order]) -> None:
        super().__init__(problem, policy)
        self.skeleton, self.at = skeleton, [0] * problem.num_ranks

    def complete(self) -> bool:
        """Whether everything has run."""
        m = self.problem.num_microbatches
        return all(done == m for done in self.weights)

    def _choose(self, rank: int, now: float) -> None:
        own, at = self.skeleton[rank], self.at[rank]
        if at == len(own):
            self._fill(rank, now, UNLIMITED)
            return
        stage, phase = divmod(own[at], NUM_PHASES)
        queue = self.forward_at[stage] if phase == F else self.backward_at[stage]
        nth = self.forwards[stage] if phase == F else self.backwards[stage]
        upcoming = queue[nth] if nth < len(queue) else UNLIMITED
        grown = self.held[rank] + self.change[own[at]]
        if phase == F and grown > self.problem.limits[rank]:
            self._fill(rank, now, UNLIMITED)
        elif upcoming <= now:
            self.at[rank] += 1
            if phase == F:
                self._forward(stage, now)
            else:
                self._backward(stage, rank, now)
        elif not self._fill(rank, now, upcoming) and upcoming < UNLIMITED:
            heappush(self.events, (upcoming, rank))
