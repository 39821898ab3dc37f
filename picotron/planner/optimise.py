"""The fastest schedule to be found for given costs under a memory limit, and how far it may be from optimal.

Four ways are tried, until the lower bound is met or the effort is spent: every named schedule of the
placement; list scheduling under a portfolio of policies (``optimise_greedy``), and the named schedules' F
and I with W put where they fill gaps; exact search (``optimise_exact``), which alone proves an optimum
above the bound; and policies changed at random, from a fixed seed. Effort is counted in actions, not
seconds, so the same question always has the same answer. Overlapped pairs are made by named schedules only.

Sources: Qi et al. 2023, Zero Bubble Pipeline Parallelism, arXiv:2401.10241, section 3, whose greedy search
this follows in spirit; the bounds are ours (``optimise_bound``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from random import Random
from typing import Literal, get_args

from attrs import evolve, frozen

from picotron.errors import PlanError
from picotron.planner.catalogue import SCHEDULES, make_schedule
from picotron.planner.optimise_bound import lower_bound
from picotron.planner.optimise_exact import ROUNDING, search
from picotron.planner.optimise_greedy import (
    Policy,
    changed,
    dispatch,
    fill_policies,
    policies,
    refill,
    skeleton_of,
)
from picotron.planner.optimise_problem import (
    UNLIMITED,
    Order,
    Player,
    Problem,
    from_schedule,
    make_problem,
    to_schedule,
)
from picotron.planner.pipeline import Schedule, check_sizes, loop_ranks, v_ranks
from picotron.planner.schedule_memory import ScheduleMemory, peak_bytes, unit_memory
from picotron.planner.schedule_times import (
    PipelineCosts,
    bubble_fraction,
    own_spans,
    schedule_times,
    stage_span_fraction,
)
from picotron.planner.validators import is_between, is_count, shown

Placement = Literal["one", "loop", "v"]
Objective = Literal["makespan", "stage_span"]
Progress = Callable[[int, int, float], None]

Cost = tuple[float, float]
"""The objective, and the makespan to tell equals apart."""

EFFORT = 2_000_000
LEAST_EFFORT = 20_000
SMALL = 48  # actions, up to which exact search takes all the states that it needs
STATES_OF_SMALL = 500_000  # at most; random cases took up to 52,000
DISPATCH_WEIGHT = 4  # what list scheduling of an action costs; playing it is 1
FIRST_POLICIES = 8  # of the portfolio, before exact search
CHANGED_POLICIES = 2  # that random changes begin with


@frozen(kw_only=True)
class OptimisedSchedule:
    """What ``optimise`` found.

    ``bubble_fraction`` is the idle share of the makespan; ``stage_span_fraction`` the zero-bubble papers'
    rate, under the longest own span of a rank. No schedule within the limit ends before
    ``lower_bound_seconds``, or has all own spans shorter than ``stage_span_bound_seconds``; ``gap`` is how
    much longer the makespan is than its bound, as a share of it. ``proven_optimal`` says that nothing is
    better under the objective asked for. ``source`` names the schedule or the method that won.
    """

    schedule: Schedule
    makespan_seconds: float
    stage_span_seconds: float
    bubble_fraction: float
    stage_span_fraction: float
    lower_bound_seconds: float
    stage_span_bound_seconds: float
    peak_bytes: tuple[int, ...]
    source: str
    proven_optimal: bool

    @property
    def gap(self) -> float:
        """How much longer the makespan is than its lower bound, as a share of the bound."""
        return self.makespan_seconds / self.lower_bound_seconds - 1


def optimise(
    costs: PipelineCosts,
    num_ranks: int,
    num_microbatches: int,
    *,
    memory: ScheduleMemory | None = None,
    memory_limit_bytes: int | Sequence[int] | None = None,
    placement: Placement = "one",
    objective: Objective = "makespan",
    effort: int = EFFORT,
    progress: Progress | None = None,
) -> OptimisedSchedule:
    """The fastest schedule found for these costs whose every rank stays within the limit.

    ``costs`` and ``memory`` tell of every stage: one a rank, or several that go round the ranks ("loop"), or
    two that go up the ranks and back ("v"). ``memory_limit_bytes`` is of each rank, or one for each; left
    out, there is none. ``objective`` "stage_span" makes the longest own span of a rank short, for which a
    skew between ranks is free. ``effort`` is what may be spent, roughly in simulated actions (a million take
    about a second); named schedules, one list schedule and exact search of small problems are done anyway.
    ``progress(spent, effort, best_seconds)`` is told of each step.

    Raises PlanError where no schedule fits the limit: a rank must hold one microbatch on all its stages.

    >>> from picotron.planner.schedule_times import unit_costs
    >>> best = optimise(unit_costs(4), 4, 8, memory=unit_memory(4), memory_limit_bytes=4)
    >>> best.makespan_seconds, best.proven_optimal, best.peak_bytes
    (27.0, True, (4, 4, 4, 4))
    """
    stage_ranks = _checked(costs, num_ranks, num_microbatches, placement, objective, effort)
    memory = _memory(costs, memory, memory_limit_bytes)
    limits = _limits(memory, memory_limit_bytes, stage_ranks, num_ranks)
    problems = {
        spans: make_problem(costs, memory, stage_ranks, num_microbatches, limits, own_spans=spans)
        for spans in (False, True)
    }
    problem = problems[objective == "stage_span"]
    run = _Run(problem, effort, progress)
    run.go()
    schedule = run.schedule()
    spans = schedule_times(schedule, costs)
    makespan, own = spans.makespan_seconds, max(own_spans(schedule, spans))
    bounds = {spans: _bound(problem) for spans, problem in problems.items()}
    if run.complete:  # then what was asked for is its own bound
        bounds[objective == "stage_span"] = own if objective == "stage_span" else makespan
    return OptimisedSchedule(
        schedule=schedule,
        makespan_seconds=makespan,
        stage_span_seconds=own,
        bubble_fraction=bubble_fraction(schedule, costs, spans),
        stage_span_fraction=stage_span_fraction(schedule, costs, spans),
        lower_bound_seconds=min(
            bounds[False], makespan
        ),  # where they are equal they may differ by a rounding
        stage_span_bound_seconds=min(bounds[True], own),
        peak_bytes=peak_bytes(schedule, memory),
        source=run.source,
        proven_optimal=run.complete or run.met(),
    )


class _Run:
    """One question, the best answer so far, and what was spent on it."""

    def __init__(self, problem: Problem, effort: int, progress: Progress | None) -> None:
        self.problem, self.effort, self.progress = problem, max(effort, LEAST_EFFORT), progress
        self.player = Player(problem)
        self.bound = _bound(problem)
        self.size = 3 * problem.num_stages * problem.num_microbatches
        self.spent = 0
        self.best: Cost = (UNLIMITED, UNLIMITED)
        self.found: Schedule | list[Order] | None = None
        self.source = ""
        self.complete = False  # exact search left nothing out
        self.tried: list[tuple[Cost, Policy]] = []

    def go(self) -> None:
        """Try one way after the other, until the bound is met or the effort spent."""
        named = list(named_schedules(self.problem))
        for schedule in named:
            self._offer(_cost(self.problem, schedule), schedule, schedule.name, self.size)
        portfolio = policies(self.problem)
        self._policies(islice(portfolio, 1))
        if self.done():
            return
        self._policies(islice(portfolio, FIRST_POLICIES))
        for schedule in named:
            self._refills(skeleton_of(from_schedule(schedule)), f"{schedule.name} with its W moved")
        self._exact()
        self._policies(portfolio)
        self._change()

    def schedule(self) -> Schedule:
        """The best answer."""
        if isinstance(self.found, Schedule):
            return self.found
        assert self.found is not None, "a policy always makes a schedule"
        return to_schedule(self.problem, self.found, "custom")

    def met(self) -> bool:
        """Whether the best answer is as good as the bound."""
        return self.best[0] - self.bound <= ROUNDING * self.best[1]

    def done(self) -> bool:
        """Whether nothing is left to do."""
        return self.met() or self.complete or self.spent >= self.effort

    def _offer(self, cost: Cost | None, found: Schedule | list[Order], source: str, spent: int) -> None:
        """Take an answer if it is better by more than rounding; count what it took."""
        self.spent += spent
        if cost is not None and _better(cost, self.best):
            self.best, self.found, self.source = cost, found, source
        if self.progress is not None:
            self.progress(min(self.spent, self.effort), self.effort, self.best[0])

    def _dispatched(self, policy: Policy, source: str) -> Cost:
        orders = dispatch(self.problem, policy)
        cost = self.player.cost(orders)
        assert cost is not None, "what was dispatched can be played"
        self._offer(cost, orders, source, DISPATCH_WEIGHT * self.size)
        return cost

    def _policies(self, some: Iterable[Policy]) -> None:
        for policy in some:
            self.tried.append((self._dispatched(policy, "list scheduling"), policy))
            if self.done():
                return

    def _refills(self, skeleton: list[Order], source: str) -> None:
        for policy in fill_policies():
            if self.done():
                return
            orders = refill(self.problem, skeleton, policy)
            cost = self.player.cost(orders) if orders is not None else None
            self._offer(cost, orders or [], source, DISPATCH_WEIGHT * self.size)

    def _exact(self) -> None:
        """Search exactly: small problems to the end, others with a share of the effort."""
        if self.done() and (self.met() or self.size > SMALL):
            return
        weight = 5 * self.problem.num_stages + 10
        states = STATES_OF_SMALL if self.size <= SMALL else (self.effort - self.spent) // 4 // weight
        found = search(self.problem, self.best[0], max_states=states)
        if found.orders is not None:
            self._offer(self.player.cost(found.orders), found.orders, "exact search", 0)
        self.spent += found.states * weight
        self.complete = found.complete and self.problem.costs.overlap_factor == 1.0

    def _change(self) -> None:
        """Change the best policies at random, keeping what is no worse."""
        starts = sorted(self.tried, key=lambda pair: pair[0])[:CHANGED_POLICIES]
        share = (self.effort - self.spent) // max(1, len(starts))
        for number, (cost, policy) in enumerate(starts):
            random, until = Random(number), self.spent + share
            while self.spent < until and not self.done():
                other = changed(self.problem, policy, random)
                other_cost = self._dispatched(other, "list scheduling, tuned")
                if other_cost <= cost:
                    cost, policy = other_cost, other


def named_schedules(problem: Problem) -> Iterator[Schedule]:
    """The schedules of the catalogue that have the problem's stages on its ranks, and fit its limits."""
    virtual_stages = problem.num_stages // problem.num_ranks
    for name, named in SCHEDULES.items():
        if named.bidirectional or named.virtual_stages not in ("any", virtual_stages):
            continue
        try:
            schedule = make_schedule(name, problem.num_ranks, problem.num_microbatches, virtual_stages)
        except PlanError:  # not for these sizes
            continue
        peaks = peak_bytes(schedule, problem.memory) if schedule.stage_ranks == problem.stage_ranks else ()
        if peaks and all(peak <= limit for peak, limit in zip(peaks, problem.limits, strict=True)):
            yield schedule


def _cost(problem: Problem, schedule: Schedule) -> Cost:
    """The objective of a schedule, and its makespan."""
    end, orders = schedule_times(schedule, problem.costs).end, schedule.orders
    ends = [float(end[orders.span(rank)].max()) for rank in range(problem.num_ranks)]
    return max(end - lag for end, lag in zip(ends, problem.lags, strict=True)), max(ends)


def _better(cost: Cost, other: Cost) -> bool:
    """Whether a cost is lower by more than rounding; the makespan tells equals apart."""
    if other[0] == UNLIMITED or abs(cost[0] - other[0]) > ROUNDING * other[1]:
        return cost[0] < other[0]
    return other[1] - cost[1] > ROUNDING * other[1]


def _bound(problem: Problem) -> float:
    """The lower bound of the objective, overlapped pairs allowed.

    A pair takes no less than its halves would, one after the other, if all costs were that much lower.
    """
    costs, factor = problem.costs, problem.costs.overlap_factor
    if factor == 1.0:
        return lower_bound(problem)
    columns = (costs.forward_seconds, costs.input_seconds, costs.weight_seconds)
    f, i, w = (tuple(factor * seconds for seconds in column) for column in columns)
    lower = evolve(costs, forward_seconds=f, input_seconds=i, weight_seconds=w)
    return lower_bound(evolve(problem, costs=lower))


def _checked(
    costs: PipelineCosts, num_ranks: int, num_microbatches: int, placement: str, objective: str, effort: int
) -> tuple[int, ...]:
    """The rank of each stage. Raises PlanError where the question makes no sense."""
    if placement not in get_args(Placement):
        raise PlanError(f"placement must be one of {', '.join(get_args(Placement))}, got {shown(placement)}")
    if objective not in get_args(Objective):
        raise PlanError(f"objective must be one of {', '.join(get_args(Objective))}, got {shown(objective)}")
    if not is_count(effort):
        raise PlanError(f"effort must be an integer of at least 0, got {shown(effort)}")
    check_sizes(num_ranks, num_microbatches, actions_per_microbatch=3 * costs.num_stages)
    virtual_stages, rest = divmod(costs.num_stages, num_ranks)
    if rest or virtual_stages == 0 or virtual_stages != {"one": 1, "v": 2}.get(placement, virtual_stages):
        wanted = {"one": f"{num_ranks} stages", "v": f"{2 * num_ranks} stages"}
        raise PlanError(
            f"placement {placement!r} of {num_ranks} ranks takes the costs of "
            f"{wanted.get(placement, 'the same number of stages a rank')}, got {costs.num_stages}"
        )
    return v_ranks(num_ranks) if placement == "v" else loop_ranks(num_ranks, virtual_stages)


def _memory(costs: PipelineCosts, memory: ScheduleMemory | None, limit: object) -> ScheduleMemory:
    """What the stages hold: nothing where it is left out."""
    if memory is None:
        if limit is not None:
            raise PlanError("memory_limit_bytes needs memory, the bytes that each stage holds, got None")
        return unit_memory(costs.num_stages, activation=0, weight=0)
    if memory.num_stages != costs.num_stages:
        raise PlanError(f"memory must be that of {costs.num_stages} stages, got {memory.num_stages}")
    return memory


def _limits(
    memory: ScheduleMemory, limit: int | Sequence[int] | None, stage_ranks: tuple[int, ...], num_ranks: int
) -> tuple[float, ...]:
    """The limit of each rank. Raises PlanError where a rank cannot hold a microbatch on all its stages.

    It must: the backward of its lowest stage comes after that of its highest, so after all their forwards.
    """
    if limit is None:
        return (UNLIMITED,) * num_ranks
    limits = tuple(limit) if isinstance(limit, Sequence) else (limit,) * num_ranks
    if len(limits) != num_ranks or not all(is_between(value, 0, 2**63) for value in limits):
        raise PlanError(
            f"memory_limit_bytes must be a number of at least 0, or one for each of {num_ranks} ranks, "
            f"got {shown(limit)}"
        )
    least = [0] * num_ranks
    for stage, rank in enumerate(stage_ranks):
        least[rank] += memory.activation_bytes[stage]
    for rank, (value, need) in enumerate(zip(limits, least, strict=True)):
        if value < need:
            raise PlanError(
                f"memory_limit_bytes must let a rank hold one microbatch on its stages, {need} bytes on "
                f"rank {rank}, got {value}; the least that works for all ranks is {max(least)}"
            )
    return limits
