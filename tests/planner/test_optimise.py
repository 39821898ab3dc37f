"""The optimiser on questions whose answer is known: drawn by hand, or published."""

from __future__ import annotations

import pytest

from picotron.errors import PlanError
from picotron.planner.actions import make_orders
from picotron.planner.optimise import OptimisedSchedule, optimise
from picotron.planner.optimise_bound import lower_bound, most_seconds
from picotron.planner.optimise_greedy import Policy, dispatch, refill, skeleton_of
from picotron.planner.optimise_problem import UNLIMITED, Player, make_problem, to_schedule
from picotron.planner.pipeline import Schedule, loop_ranks, v_ranks
from picotron.planner.schedule_memory import ScheduleMemory, held_bytes, peak_bytes, unit_memory
from picotron.planner.schedule_times import PipelineCosts, schedule_times, unit_costs


def lines(best: OptimisedSchedule) -> list[str]:
    """Each rank's order, stages left out."""
    return [" ".join(f"{a.phase}{a.microbatch}" for a in own) for own in best.schedule.orders]


def test_two_stages_and_two_microbatches() -> None:
    """With F = I = W = 1 seven slots are the least: rank 1 starts one late and has six to do.

    slot     0  1  2  3  4  5  6
    rank 0  F0 F1  . I0 W0 I1 W1
    rank 1   . F0 I0 F1 I1 W0 W1
    """
    best = optimise(unit_costs(2), 2, 2, memory=unit_memory(2), memory_limit_bytes=2)
    assert (best.makespan_seconds, best.lower_bound_seconds, best.gap) == (7.0, 7.0, 0.0)
    assert best.proven_optimal
    assert lines(best) == ["F0 F1 I0 W0 I1 W1", "F0 I0 F1 I1 W0 W1"]
    assert best.bubble_fraction == pytest.approx(1 / 7)


def test_a_limit_of_one_microbatch_takes_turns() -> None:
    """With memory for one microbatch until its W, the second starts when the first is gone.

    slot     0  1  2  3  4  5  6  7  8  9
    rank 0  F0  .  . I0 W0 F1  .  . I1 W1
    rank 1   . F0 I0 W0  .  . F1 I1 W1  .
    """
    best = optimise(unit_costs(2), 2, 2, memory=unit_memory(2), memory_limit_bytes=1)
    assert best.makespan_seconds == best.lower_bound_seconds == 10.0
    assert best.peak_bytes == (1, 1)


def test_weights_that_hold_nothing_make_room() -> None:
    """If nothing is left after I, the next F goes before W: one slot less.

    slot     0  1  2  3  4  5  6  7  8
    rank 0  F0  .  . I0 F1 W0  . I1 W1
    rank 1   . F0 I0 W0  . F1 I1 W1  .
    """
    best = optimise(unit_costs(2), 2, 2, memory=unit_memory(2, weight=0), memory_limit_bytes=1)
    assert best.makespan_seconds == best.lower_bound_seconds == 9.0
    assert lines(best)[0] == "F0 I0 F1 W0 I1 W1"


def test_what_grows_in_i_goes_back_at_once() -> None:
    """Where I leaves more than fits, a full B does the work, for it never holds that."""
    best = optimise(unit_costs(2), 2, 1, memory=unit_memory(2, weight=3), memory_limit_bytes=2)
    assert lines(best) == ["F0 B0", "F0 B0"]
    assert best.peak_bytes == (1, 1)


def test_exact_search_finds_what_rules_do_not() -> None:
    """Two stages a rank up and back, room for three: no named schedule and no simple rule finds 21."""
    best = optimise(unit_costs(4), 2, 3, memory=unit_memory(4), memory_limit_bytes=3, placement="v")
    assert (best.source, best.makespan_seconds) == ("exact search", 21.0)
    assert best.proven_optimal
    assert best.lower_bound_seconds == 21.0


def test_stage_span_lets_ranks_be_skewed() -> None:
    """A middle stage twice as slow never waits within its own span, while the makespan has its head start."""
    costs = PipelineCosts(
        forward_seconds=(1, 2, 1), input_seconds=(1, 2, 1), weight_seconds=(1, 2, 1), transfer_seconds=0
    )
    best = optimise(costs, 3, 4, memory=unit_memory(3), memory_limit_bytes=3, objective="stage_span")
    assert best.stage_span_fraction == 0.0
    assert (best.stage_span_seconds, best.stage_span_bound_seconds) == (24.0, 24.0)
    assert best.makespan_seconds >= 25.0


PUBLISHED = [
    # F, I, W and hop in ms; rates of ZB-1p and ZB-2p with 24 microbatches on 8 ranks (arXiv:2401.10241)
    pytest.param((18.522, 18.086, 9.337, 0.601), 0.1585, 0.0433, id="1.5B"),
    pytest.param((29.718, 29.444, 19.927, 0.527), 0.1323, 0.0029, id="6.2B"),
]


@pytest.mark.parametrize(("profile", "one", "two"), PUBLISHED)
def test_published_rates_are_met(profile: tuple[float, ...], one: float, two: float) -> None:
    """At p and 2p microbatches of memory; at p the published schedules are optimal by our bound."""
    f, i, w, hop = profile
    costs, memory = unit_costs(8, f=f, i=i, w=w, transfer=hop), unit_memory(8, activation=2, weight=1)
    for microbatches, rate in ((8, one), (16, two)):
        best = optimise(
            costs,
            8,
            24,
            memory=memory,
            memory_limit_bytes=2 * microbatches,
            objective="stage_span",
            effort=300_000,
        )
        assert best.stage_span_fraction <= rate + 5e-5
        assert max(best.peak_bytes) <= 2 * microbatches
        if rate == one:
            assert best.proven_optimal
    best = optimise(costs, 8, 24, memory=memory, memory_limit_bytes=32)
    assert best.gap == pytest.approx(0.0, abs=1e-12)


def test_named_schedules_win_where_they_are_optimal() -> None:
    """ZB-V on equal costs has no bubble within a rank's span."""
    best = optimise(unit_costs(16), 8, 24, placement="v", objective="stage_span")
    assert (best.source, best.stage_span_fraction) == ("zb-v", 0.0)


def test_overlapped_pairs_count_in_the_bound() -> None:
    """Where pairs take less than their halves, no optimum is claimed that they could beat."""
    costs = PipelineCosts(
        forward_seconds=(1,) * 8,
        input_seconds=(1,) * 8,
        weight_seconds=(1,) * 8,
        overlap_factor=0.6,
    )
    best = optimise(costs, 4, 16, placement="v", effort=0)
    assert best.source == "dualpipe-v"
    assert best.makespan_seconds < 16 * 6  # a rank's work without overlap
    assert best.lower_bound_seconds <= best.makespan_seconds


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"memory": unit_memory(4, activation=3), "memory_limit_bytes": 5, "placement": "loop"},
            r"6 bytes on rank 0, got 5; the least that works for all ranks is 6",
        ),
        ({"memory_limit_bytes": 5}, "needs memory"),
        ({"memory": unit_memory(3)}, "memory must be that of 4 stages, got 3"),
        ({"memory": unit_memory(4), "memory_limit_bytes": (5, 5, 5)}, "one for each of 2 ranks"),
        ({"memory": unit_memory(4), "memory_limit_bytes": -1}, "at least 0"),
        ({"placement": "one"}, "takes the costs of 2 stages, got 4"),
        ({"placement": "w"}, "placement must be one of one, loop, v, got 'w'"),
        ({"objective": "speed"}, "objective must be one of makespan, stage_span, got 'speed'"),
        ({"effort": -1}, "effort must be an integer of at least 0, got -1"),
    ],
)
def test_refusals_say_what_would_work(options: dict[str, object], message: str) -> None:
    """An impossible question is refused with the rule, the value and the remedy."""
    with pytest.raises(PlanError, match=message):
        optimise(unit_costs(4), 2, 2, **{"placement": "v", **options})


def test_the_least_limit_works() -> None:
    """What the refusal names as the least is enough."""
    best = optimise(
        unit_costs(4), 2, 3, memory=unit_memory(4, activation=3), memory_limit_bytes=6, placement="loop"
    )
    assert best.peak_bytes == (6, 6)


def test_bytes_have_three_levels() -> None:
    """A after F, A_W after I, nothing after W or B; the F of a pair allocates before its other half frees."""
    schedule = Schedule(
        name="custom",
        num_microbatches=2,
        stage_ranks=(0,),
        orders=[["0F0", "(0F1;0I0)OVERLAP_F_B", "0W0", "0B1"]],
    )
    memory = ScheduleMemory(activation_bytes=(5,), weight_bytes=(3,))
    assert held_bytes(schedule, memory).tolist() == [5, 10, 8, 5, 0]
    assert peak_bytes(schedule, memory) == (10,)


@pytest.mark.parametrize("bad", [(-1,), (True,), (2**41,), 3])
def test_bytes_are_counts(bad: object) -> None:
    """Bytes are integers from 0 on, for each stage."""
    with pytest.raises(PlanError, match="bytes must be"):
        ScheduleMemory(activation_bytes=bad, weight_bytes=(1,))


def test_bytes_are_of_the_same_stages() -> None:
    """Both columns, and the schedule, have as many stages."""
    with pytest.raises(PlanError, match="same stages, got 2 and 1"):
        ScheduleMemory(activation_bytes=(1, 1), weight_bytes=(1,))
    schedule = Schedule(
        name="custom", num_microbatches=1, stage_ranks=(0,), orders=make_orders([["0F0", "0B0"]])
    )
    with pytest.raises(PlanError, match="those of 1 stages, got 2"):
        peak_bytes(schedule, unit_memory(2))


def test_most_seconds_is_a_knapsack() -> None:
    """Two kinds are chosen exactly, more as if they could be cut; what takes no room is free."""
    assert most_seconds([(3.0, 2), (1.0, 1)], 3, 4) == 6.0
    assert most_seconds([(3.0, 2), (1.0, 1)], 3, 5) == 7.0
    assert most_seconds([(3.0, 2), (1.0, 1), (1.0, 0)], 2, 3) == 6.0
    assert most_seconds([(3.0, 2), (1.0, 1), (2.0, 4)], 2, 4) == 6.0
    assert most_seconds([(3.0, 2)], 2, UNLIMITED) == 6.0
    assert most_seconds([(3.0, 2)], 2, -1) == 0.0


def test_bound_counts_both_waits() -> None:
    """Room for two of six microbatches on rank 0 of 4: it waits for the first backward, and for the last.

    The first F is 7 slots before its I and 2 F fit in: 5 idle. After the last F, 6 slots pass before its I,
    and one other microbatch can be finished: 4 idle. With 18 slots of work none ends before 27.
    """
    problem = make_problem(
        unit_costs(4),
        unit_memory(4),
        loop_ranks(4),
        6,
        (2.0, UNLIMITED, UNLIMITED, UNLIMITED),
        own_spans=False,
    )
    assert lower_bound(problem) == 27.0


def test_refill_keeps_forwards_and_backwards() -> None:
    """Only W move; where memory cannot hold the order there is none."""
    problem = make_problem(
        unit_costs(4), unit_memory(4), v_ranks(2), 3, (UNLIMITED, UNLIMITED), own_spans=False
    )
    orders = dispatch(problem, Policy())
    skeleton = skeleton_of(orders)
    again = refill(problem, skeleton, Policy(overrun=1.0))
    assert again is not None
    assert skeleton_of(again) == skeleton
    tight = make_problem(unit_costs(4), unit_memory(4), v_ranks(2), 3, (2.0, 2.0), own_spans=False)
    afab = [[0, 0, 0, 12, 12, 12, 14, 14, 14, 2, 2, 2], [4, 4, 4, 8, 8, 8, 10, 10, 10, 6, 6, 6]]
    assert refill(tight, afab, Policy()) is None


def test_players_agree() -> None:
    """Orders as codes take as long as the schedule they stand for."""
    costs = PipelineCosts(
        forward_seconds=(1, 3, 2, 1),
        input_seconds=(2, 1, 1, 3),
        weight_seconds=(1, 0, 2, 2),
        transfer_seconds=1,
    )
    problem = make_problem(costs, unit_memory(4), v_ranks(2), 5, (6.0, 6.0), own_spans=False)
    orders = dispatch(problem, Policy())
    cost = Player(problem).cost(orders)
    assert cost is not None
    assert cost[0] == schedule_times(to_schedule(problem, orders, "custom"), costs).makespan_seconds


def test_orders_that_wait_for_each_other_have_no_cost() -> None:
    """Rank 0 wants back what rank 1 has not been sent."""
    problem = make_problem(unit_costs(2), unit_memory(2), loop_ranks(2), 1, (9.0, 9.0), own_spans=False)
    assert Player(problem).cost([[2, 0, 3], [4, 6, 7]]) is None
