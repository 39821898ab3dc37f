"""Theorems about the optimiser: it equals brute force, keeps limits, beats the named, and its bounds hold."""

from __future__ import annotations

import os

import pytest
from attrs import evolve
from hypothesis import example, given, settings
from hypothesis import strategies as st

from picotron.planner.actions import B, F, I, W
from picotron.planner.catalogue import SCHEDULES, make_schedule
from picotron.planner.optimise import OptimisedSchedule, optimise
from picotron.planner.optimise_bound import lower_bound
from picotron.planner.optimise_exact import search
from picotron.planner.optimise_greedy import Policy, dispatch
from picotron.planner.optimise_problem import Player, Problem, make_problem
from picotron.planner.pipeline import loop_ranks, v_ranks
from picotron.planner.schedule_memory import ScheduleMemory, held_bytes, peak_bytes
from picotron.planner.schedule_times import PipelineCosts, own_spans, schedule_times
from property_tests.oracle_schedules import Case, fastest, fastest_by_orders

DEEP = os.environ.get("HYPOTHESIS_PROFILE") == "deep"
QUICK = 20_000  # effort of questions whose answer need not be the best


@st.composite
def cases(draw: st.DrawFn, sizes: tuple[tuple[str, int, int], ...]) -> Case:
    """Any small costs, bytes and limits of one of ``sizes``: (placement, ranks, microbatches)."""
    placement, ranks, microbatches = draw(st.sampled_from(sizes))
    stage_ranks = {"one": loop_ranks(ranks), "loop": loop_ranks(ranks, 2), "v": v_ranks(ranks)}[placement]
    stages = len(stage_ranks)

    def numbers(least: int, most: int = 5) -> st.SearchStrategy[tuple[int, ...]]:
        return st.tuples(*[st.integers(least, most)] * stages)

    activation = draw(numbers(1, 4))
    least = [
        sum(a for a, r in zip(activation, stage_ranks, strict=True) if r == rank) for rank in range(ranks)
    ]
    unlimited = sum(least) * microbatches + 5 * stages * microbatches  # holds anything
    return Case(
        forward=draw(numbers(1)),
        inputs=draw(numbers(0)),
        weights=draw(numbers(0)),
        transfer=draw(st.integers(0, 2)),
        activation=activation,
        left=draw(numbers(0, 4)),
        stage_ranks=stage_ranks,
        num_microbatches=microbatches,
        limits=tuple(draw(st.integers(0, 2 * low) | st.just(unlimited)) + low for low in least),
    )


def costs_of(case: Case) -> PipelineCosts:
    """The case's seconds."""
    return PipelineCosts(
        forward_seconds=case.forward,
        input_seconds=case.inputs,
        weight_seconds=case.weights,
        transfer_seconds=case.transfer,
    )


def memory_of(case: Case) -> ScheduleMemory:
    """The case's bytes."""
    return ScheduleMemory(activation_bytes=case.activation, weight_bytes=case.left)


def problem_of(case: Case, own_spans: bool) -> Problem:
    """The case as the optimiser sees it."""
    return make_problem(
        costs_of(case),
        memory_of(case),
        case.stage_ranks,
        case.num_microbatches,
        case.limits,
        own_spans=own_spans,
    )


def asked(case: Case, objective: str = "makespan", **options: object) -> OptimisedSchedule:
    """The optimiser's answer to a case of the oracle."""
    stages, ranks = len(case.stage_ranks), len(case.limits)
    v = stages > 1 and case.stage_ranks == v_ranks(ranks)
    return optimise(
        costs_of(case),
        ranks,
        case.num_microbatches,
        memory=memory_of(case),
        memory_limit_bytes=case.limits,
        placement="v" if v else "one" if stages == ranks else "loop",
        objective=objective,
        **options,
    )


def same_as_brute_force(case: Case, own_spans: bool) -> None:
    """Ours is the optimum, is said to be, and no bound lies above it."""
    optimum = fastest(case, own_spans=own_spans)
    problem = problem_of(case, own_spans)
    assert lower_bound(problem) <= optimum + 1e-9
    found = search(problem, optimum + 1, max_states=500_000)
    assert found.complete
    assert found.orders is not None
    assert Player(problem).cost(found.orders)[0] == pytest.approx(optimum)
    best = asked(case, "stage_span" if own_spans else "makespan", effort=0)
    ours = best.stage_span_seconds if own_spans else best.makespan_seconds
    bound = best.stage_span_bound_seconds if own_spans else best.lower_bound_seconds
    assert ours == pytest.approx(optimum)
    assert bound <= optimum + 1e-9
    assert best.proven_optimal


SMALL = (
    ("one", 1, 3),
    ("one", 2, 2),
    ("one", 2, 3),
    ("one", 2, 4),
    ("one", 3, 2),
    ("one", 3, 3),
    ("v", 1, 2),
    ("v", 2, 1),
    ("loop", 2, 1),
)
IN_NO_TIME = Case(  # an I that takes no time and leaves more than it frees
    forward=(3, 2),
    inputs=(0, 0),
    weights=(3, 2),
    transfer=0,
    activation=(1, 2),
    left=(2, 4),
    stage_ranks=(0, 1),
    num_microbatches=3,
    limits=(4, 5),
)


@given(cases(SMALL), st.booleans())
@example(IN_NO_TIME, False)
def test_equals_brute_force(case: Case, own_spans: bool) -> None:
    """No order of the ranks' actions is faster, for any unequal costs, hop, bytes and limits."""
    same_as_brute_force(case, own_spans)


@settings(max_examples=400 if DEEP else 25)
@given(cases((("one", 3, 4), ("v", 2, 2), ("loop", 2, 2), ("v", 1, 3))), st.booleans())
def test_equals_brute_force_of_larger_ones(case: Case, own_spans: bool) -> None:
    """The same for 3 stages and 4 microbatches, and for two stages a rank."""
    same_as_brute_force(case, own_spans)


@pytest.mark.skipif(not DEEP, reason="brute force takes minutes; the deep profile has them")
@settings(max_examples=10)
@given(cases((("one", 4, 4), ("v", 2, 3), ("loop", 2, 3))), st.booleans())
def test_equals_brute_force_of_the_largest(case: Case, own_spans: bool) -> None:
    """The same for 4 stages and 4 microbatches, and for two stages a rank and 3 microbatches."""
    same_as_brute_force(case, own_spans)


@given(cases((("one", 4, 6), ("one", 6, 4), ("v", 3, 6), ("loop", 3, 6), ("v", 4, 4))), st.booleans())
def test_exact_search_agrees_with_the_bound(case: Case, own_spans: bool) -> None:
    """Beyond brute force: a complete search never ends below the bound, and never above list scheduling."""
    problem = problem_of(case, own_spans)
    listed = Player(problem).cost(dispatch(problem, Policy()))[0]
    assert lower_bound(problem) <= listed + 1e-9
    found = search(problem, listed, max_states=500)
    if found.orders is not None:
        best = Player(problem).cost(found.orders)[0]
        assert lower_bound(problem) - 1e-9 <= best < listed


@given(cases((("one", 1, 2), ("one", 2, 1), ("one", 2, 2), ("v", 1, 1), ("v", 2, 1))), st.booleans())
def test_the_oracle_is_brute_force(case: Case, own_spans: bool) -> None:
    """Leaving out states that are nowhere earlier leaves the optimum of all orders."""
    assert fastest(case, own_spans=own_spans) == fastest_by_orders(case, own_spans=own_spans)


MIDDLE = tuple(
    (placement, ranks, microbatches)
    for placement in ("one", "loop", "v")
    for ranks in (1, 2, 3, 4, 6)
    for microbatches in (1, 3, 6, 12)
)


@given(cases(MIDDLE), st.sampled_from(["makespan", "stage_span"]))
def test_never_worse_than_a_named_schedule(case: Case, objective: str) -> None:
    """Of the schedules of the catalogue with the same placement that fit the limits, none is faster."""
    best = asked(case, objective, effort=QUICK)
    memory, costs = memory_of(case), costs_of(case)
    ranks = len(case.limits)
    for name, named in SCHEDULES.items():
        stages = len(case.stage_ranks) // ranks
        if named.bidirectional or named.virtual_stages not in ("any", stages):
            continue
        try:
            schedule = make_schedule(name, ranks, case.num_microbatches, stages)
        except ValueError:
            continue
        if schedule.stage_ranks != case.stage_ranks:
            continue
        if all(p <= limit for p, limit in zip(peak_bytes(schedule, memory), case.limits, strict=True)):
            spans = schedule_times(schedule, costs)
            if objective == "makespan":
                assert best.makespan_seconds <= spans.makespan_seconds * (1 + 1e-9)
            else:
                assert best.stage_span_seconds <= max(own_spans(schedule, spans)) * (1 + 1e-9)


@given(cases(MIDDLE), st.sampled_from(["makespan", "stage_span"]))
def test_what_is_said_of_the_answer_holds(case: Case, objective: str) -> None:
    """Every rank keeps its limit, bounds are below what was found, and the figures are the schedule's own."""
    best = asked(case, objective, effort=QUICK)
    schedule = best.schedule
    memory = memory_of(case)
    assert schedule.stage_ranks == case.stage_ranks
    assert schedule.num_microbatches == case.num_microbatches
    assert best.peak_bytes == peak_bytes(schedule, memory)
    assert all(peak <= limit for peak, limit in zip(best.peak_bytes, case.limits, strict=True))
    assert best.lower_bound_seconds <= best.makespan_seconds
    assert best.stage_span_bound_seconds <= best.stage_span_seconds
    assert best.gap >= 0
    work = [0] * len(case.limits)
    for stage, rank in enumerate(case.stage_ranks):
        work[rank] += case.num_microbatches * (case.forward[stage] + case.inputs[stage] + case.weights[stage])
    assert best.bubble_fraction == pytest.approx(1 - sum(work) / len(work) / best.makespan_seconds)
    assert best.stage_span_fraction == pytest.approx(1 - max(work) / best.stage_span_seconds)


@given(cases(MIDDLE))
def test_the_same_question_has_the_same_answer(case: Case) -> None:
    """Nothing depends on a clock, a hash or what was asked before; progress is only told."""
    told: list[tuple[int, int, float]] = []
    first = asked(case, effort=QUICK)
    again = asked(case, effort=QUICK, progress=lambda *step: told.append(step))
    assert first == again
    assert told[-1][2] == pytest.approx(first.makespan_seconds)
    assert all(spent <= effort == QUICK for spent, effort, _ in told)


@given(cases(SMALL), st.integers(1, 3))
def test_more_memory_is_never_slower(case: Case, more: int) -> None:
    """What fits a limit fits a wider one."""
    wider = evolve(case, limits=tuple(limit + more for limit in case.limits))
    assert asked(wider).makespan_seconds <= asked(case).makespan_seconds + 1e-9


@given(cases(MIDDLE), st.sampled_from(list(SCHEDULES)))
def test_held_bytes_are_those_of_a_walk(case: Case, name: str) -> None:
    """Bytes after each action, added one by one: A from F to I, A_W from I to W, all gone after B."""
    ranks = len(case.limits)
    try:
        schedule = make_schedule(name, ranks, case.num_microbatches)
    except ValueError:
        return
    stages = schedule.num_stages
    activation, left = (tuple((sizes * stages)[:stages]) for sizes in (case.activation, case.left))
    found = held_bytes(schedule, ScheduleMemory(activation_bytes=activation, weight_bytes=left)).tolist()
    orders = schedule.orders
    for rank in range(ranks):
        holds: dict[tuple[int, int], int] = {}
        for index in range(orders.offsets[rank], orders.offsets[rank + 1]):
            stage, key = int(orders.stage[index]), (int(orders.stage[index]), int(orders.microbatch[index]))
            holds[key] = {F: activation[stage], B: 0, I: left[stage], W: 0}[int(orders.phase[index])]
            assert found[index] == sum(holds.values())
