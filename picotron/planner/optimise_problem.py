"""What the optimiser works on: numbers alone, and each rank's order as a list of codes.

Microbatches are interchangeable, so an order need only say what kind of action of which stage comes next: the
k-th F of a stage is of microbatch k, and so are its k-th I or B, and the k-th W of those that I left. Nothing
is lost. Take any schedule and give each stage's actions new numbers in order of time. When the k-th F of a
stage starts, k microbatches have ended theirs on the stage before, so the k-th F there has ended; likewise
for I down from the stage after, for I after F and for W after I. Times and bytes held stay as they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from attrs import frozen

from picotron.planner.actions import B, F, I, W, stack_orders
from picotron.planner.pipeline import Schedule
from picotron.planner.schedule_memory import ScheduleMemory
from picotron.planner.schedule_times import PipelineCosts

NUM_PHASES = 4
UNLIMITED = float("inf")

Order = list[int]
"""What a rank runs: 4 times the stage, plus the index of the phase."""


@frozen(kw_only=True)
class Problem:
    """Costs, bytes and limits of stages on ranks; ``lags[r]`` is taken off rank r's end in the objective."""

    costs: PipelineCosts
    memory: ScheduleMemory
    stage_ranks: tuple[int, ...]
    num_microbatches: int
    limits: tuple[float, ...]
    lags: tuple[float, ...]
    heads: tuple[float, ...]
    rank_stages: tuple[tuple[int, ...], ...]

    @property
    def num_ranks(self) -> int:
        """Pipeline ranks."""
        return len(self.limits)

    @property
    def num_stages(self) -> int:
        """Stages over all ranks."""
        return len(self.stage_ranks)

    def hop(self, stage: int, other: int) -> float:
        """Seconds from one stage's rank to another's."""
        apart = self.stage_ranks[stage] != self.stage_ranks[other]
        return self.costs.transfer_seconds if apart else 0.0

    def work_seconds(self, rank: int) -> float:
        """What a rank computes for all microbatches."""
        c = self.costs
        each = (
            c.forward_seconds[s] + c.input_seconds[s] + c.weight_seconds[s] for s in self.rank_stages[rank]
        )
        return self.num_microbatches * sum(each)

    def code_seconds(self) -> list[float]:
        """Seconds of the action of each code."""
        return self.costs.table().T.ravel().tolist()

    def code_bytes(self) -> list[int]:
        """Bytes that the action of each code adds."""
        return self.memory.changes().T.ravel().tolist()


def make_problem(
    costs: PipelineCosts,
    memory: ScheduleMemory,
    stage_ranks: tuple[int, ...],
    num_microbatches: int,
    limits: tuple[float, ...],
    *,
    own_spans: bool,
) -> Problem:
    """The problem of the least makespan or, with ``own_spans``, of the least longest own span of a rank.

    A rank's first action is the first F of its lowest stage, whose start no order can change: each rank on
    the way to it has nothing else to begin with. So an own span is an end less a constant.
    """
    num_ranks = len(limits)
    hops = [
        costs.transfer_seconds if stage_ranks[s] != stage_ranks[s - 1] else 0.0
        for s in range(1, len(stage_ranks))
    ]
    arrival = [0.0, *accumulate(f + hop for f, hop in zip(costs.forward_seconds, hops, strict=False))]
    rank_stages = tuple(tuple(s for s, r in enumerate(stage_ranks) if r == rank) for rank in range(num_ranks))
    heads = tuple(arrival[own[0]] for own in rank_stages)
    return Problem(
        costs=costs,
        memory=memory,
        stage_ranks=stage_ranks,
        num_microbatches=num_microbatches,
        limits=limits,
        lags=heads if own_spans else (0.0,) * num_ranks,
        heads=heads,
        rank_stages=rank_stages,
    )


class Player:
    """Plays orders of one problem as early as they can be; counts the actions it played."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.played = 0
        self._seconds = problem.code_seconds()
        last = problem.num_stages - 1
        # What each code waits for: forwards of the stage before are list s - 1, backwards of the one after
        # list S + s + 1; -1 is nothing. A list has one reader at most.
        self._needs, self._late, self._makes = [], [], []
        stages = problem.num_stages
        for stage in range(stages):
            before, after = stage - 1, stage + 1 + stages if stage < last else -1
            late_before = problem.hop(stage, stage - 1) if stage else 0.0
            late_after = problem.hop(stage, stage + 1) if stage < last else 0.0
            self._needs += [before, after, after, -1]
            self._late += [late_before, late_after, late_after, 0.0]
            self._makes += [stage, stages + stage, stages + stage, -1]

    def ends(self, orders: Sequence[Order]) -> list[float] | None:
        """When each rank ends; None if the ranks wait for each other."""
        seconds, needs, late, makes = self._seconds, self._needs, self._late, self._makes
        count = len(orders)
        done: list[list[float]] = [[] for _ in range(2 * self.problem.num_stages)]
        at, clock = [0] * count, [0.0] * count
        waiting = [-1] * len(done)
        ready = list(range(count))
        while ready:
            rank = ready.pop()
            order, index, now = orders[rank], at[rank], clock[rank]
            size = len(order)
            while index < size:
                code = order[index]
                need, make = needs[code], makes[code]
                if need >= 0:
                    there, nth = done[need], len(done[make])
                    if len(there) <= nth:
                        waiting[need] = rank
                        break
                    arrived = there[nth] + late[code]
                    if arrived > now:
                        now = arrived
                now += seconds[code]
                if make >= 0:
                    done[make].append(now)
                    other = waiting[make]
                    if other >= 0:
                        waiting[make] = -1
                        ready.append(other)
                index += 1
            at[rank], clock[rank] = index, now
        self.played += sum(at)
        return clock if all(i == len(o) for i, o in zip(at, orders, strict=True)) else None

    def cost(self, orders: Sequence[Order]) -> tuple[float, float] | None:
        """The objective, and the makespan to tell equals apart; None if the ranks wait for each other."""
        ends = self.ends(orders)
        if ends is None:
            return None
        lags = self.problem.lags
        return max(map(float.__sub__, ends, lags)), max(ends)


def fits(problem: Problem, rank: int, order: Order) -> bool:
    """Whether a rank stays within its limit."""
    change, limit, held = problem.code_bytes(), problem.limits[rank], 0
    for code in order:
        held += change[code]
        if held > limit:
            return False
    return True


def to_schedule(problem: Problem, orders: Sequence[Order], name: str) -> Schedule:
    """The schedule of these orders, its microbatches numbered as they come."""
    return Schedule(
        name=name,
        num_microbatches=problem.num_microbatches,
        stage_ranks=problem.stage_ranks,
        orders=stack_orders([_numbered(order) for order in orders]),
    )


def _numbered(order: Order) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    codes = np.array(order, dtype=np.int64)
    stage, phase = np.divmod(codes, NUM_PHASES)
    microbatch = np.empty_like(codes)
    for own in np.unique(stage):
        forward = np.flatnonzero((stage == own) & (phase == F))
        back = np.flatnonzero((stage == own) & ((phase == B) | (phase == I)))
        weight = np.flatnonzero((stage == own) & (phase == W))
        microbatch[forward] = np.arange(len(forward))
        microbatch[back] = np.arange(len(back))
        microbatch[weight] = np.flatnonzero(phase[back] == I)
    return phase, stage, microbatch


def from_schedule(schedule: Schedule) -> list[Order]:
    """The orders of a schedule without pairs, each B as an I and a W."""
    out = []
    for rank in range(schedule.num_ranks):
        own = schedule.orders.span(rank)
        codes: Order = []
        for phase, stage in zip(
            schedule.orders.phase[own].tolist(), schedule.orders.stage[own].tolist(), strict=True
        ):
            base = NUM_PHASES * stage
            codes += [base + I, base + W] if phase == B else [base + phase]
        out.append(codes)
    return out
