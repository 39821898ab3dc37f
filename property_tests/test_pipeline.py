"""Theorems about schedules and about splits of layers into stages."""

from __future__ import annotations

from itertools import accumulate, combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from picotron.errors import PlanError
from picotron.planner.actions import Action, Phase, parse_action
from picotron.planner.pipeline import (
    Schedule,
    loop_ranks,
    peak_microbatches,
    schedule_from_csv,
    schedule_to_csv,
    v_ranks,
)
from picotron.planner.schedules import afab, one_f_one_b
from picotron.planner.split import rank_split, stage_split
from property_tests.strategies import interleavings, schedules

ranks = st.integers(1, 8)
counts = st.integers(1, 12)


@given(st.integers(0, 999), st.sampled_from(Phase), st.integers(0, 999))
def test_actions_round_trip(stage: int, phase: Phase, microbatch: int) -> None:
    """An action is what its text parses to."""
    action = Action(stage, phase, microbatch)
    assert parse_action(str(action)) == action


@given(schedules() | interleavings())
def test_schedules_round_trip_through_csv(schedule: Schedule) -> None:
    """A schedule is what its CSV parses to, and writes the same text again."""
    text = schedule_to_csv(schedule)
    assert schedule_from_csv(text, name=schedule.name) == schedule
    assert schedule_to_csv(schedule_from_csv(text)) == text


@given(schedules() | interleavings())
def test_torch_reads_every_schedule(schedule: Schedule) -> None:
    """torch's parser prints each cell back, and its validator finds every stage where we put it."""
    torch_schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    actions = {
        rank: [torch_schedules._Action.from_str(str(action)) for action in order]
        for rank, order in enumerate(schedule.orders)
    }
    assert [list(map(str, own)) for own in actions.values()] == [list(map(str, o)) for o in schedule.orders]
    stages = torch_schedules._validate_schedule(
        actions, schedule.num_ranks, schedule.num_stages, schedule.num_microbatches
    )
    assert stages == dict(enumerate(schedule.stage_ranks))


@given(ranks, counts)
def test_one_f_one_b_peaks_at_the_stages_behind(p: int, m: int) -> None:
    """Rank s holds min(m, p - s) microbatches, the bound of PipeDream-flush met exactly."""
    schedule = one_f_one_b(p, m)
    assert [peak_microbatches(schedule, s) for s in range(p)] == [min(m, p - s) for s in range(p)]


@given(ranks, counts)
def test_afab_peaks_at_all(p: int, m: int) -> None:
    """Every rank holds all m."""
    assert {peak_microbatches(afab(p, m), s) for s in range(p)} == {m}


@given(ranks, counts)
def test_backwards_run_in_the_order_of_forwards(p: int, m: int) -> None:
    """Neighbouring ranks agree on the order of what passes between them."""
    for schedule in (afab(p, m), one_f_one_b(p, m)):
        for order in schedule.orders:
            for phase in (Phase.FORWARD, Phase.BACKWARD):
                assert [a.microbatch for a in order if a.phase is phase] == list(range(m))


@given(interleavings(), st.data())
def test_a_schedule_with_an_action_lost_or_twice_is_refused(schedule: Schedule, data: st.DataObject) -> None:
    """Completeness is checked on every rank."""
    rank = data.draw(st.integers(0, schedule.num_ranks - 1))
    position = data.draw(st.integers(0, len(schedule.orders[rank]) - 1))
    own = schedule.orders[rank]
    for changed in ((*own[:position], *own[position + 1 :]), (*own, own[position])):
        orders = (*schedule.orders[:rank], changed, *schedule.orders[rank + 1 :])
        with pytest.raises(PlanError, match=f"rank {rank}"):
            Schedule(
                name="broken",
                num_microbatches=schedule.num_microbatches,
                stage_ranks=schedule.stage_ranks,
                orders=orders,
            )


@st.composite
def _splits(draw: st.DrawFn) -> tuple[list[int], int, int, int]:
    """Costs of up to eight layers, a number of stages, and the costs of both ends."""
    costs = draw(st.lists(st.integers(0, 9), min_size=1, max_size=8))
    return costs, draw(st.integers(1, len(costs))), draw(st.integers(0, 20)), draw(st.integers(0, 20))


@given(_splits())
def test_stage_split_is_optimal(request: tuple[list[int], int, int, int]) -> None:
    """No way to cut the layers has a cheaper dearest stage, nor, among those, a smaller sum of squares."""
    costs, num_stages, first, last = request

    def measure(split: tuple[int, ...]) -> tuple[int, int]:
        stops = [sum(split[: stage + 1]) for stage in range(num_stages)]
        totals = [sum(costs[stop - n : stop]) for stop, n in zip(stops, split, strict=True)]
        totals[0] += first
        totals[-1] += last
        return max(totals), sum(total * total for total in totals)

    every = [
        tuple(b - a for a, b in zip((0, *cuts), (*cuts, len(costs)), strict=True))
        for cuts in combinations(range(1, len(costs)), num_stages - 1)
    ]
    found = stage_split(list(map(float, costs)), num_stages, first=float(first), last=float(last))
    assert found in every
    assert measure(found) == min(map(measure, every))


@given(st.lists(st.floats(0, 1e15), min_size=1, max_size=40), st.data())
def test_stage_split_loses_no_layer(costs: list[float], data: st.DataObject) -> None:
    """Whatever the costs, every stage has a layer and every layer a stage."""
    num_stages = data.draw(st.integers(1, len(costs)))
    ends = st.floats(0, 1e15)
    split = stage_split(costs, num_stages, first=data.draw(ends), last=data.draw(ends))
    assert len(split) == num_stages
    assert min(split) >= 1
    assert sum(split) == len(costs)


@given(
    st.lists(st.integers(1, 9), min_size=8, max_size=14),
    st.integers(1, 4),
    st.booleans(),
    st.integers(0, 6),
    st.integers(0, 6),
)
def test_a_split_by_ranks_is_no_worse_than_one_by_stages(
    costs: list[int], num_ranks: int, vee: bool, first: int, last: int
) -> None:
    """The dearest rank costs at most what it does in the best split of stages; no layer is lost."""
    stage_ranks = v_ranks(num_ranks) if vee else loop_ranks(num_ranks, 2)

    def dearest(sizes: tuple[int, ...]) -> int:
        stops = list(accumulate(sizes))
        stages = [sum(costs[stop - size : stop]) for stop, size in zip(stops, sizes, strict=True)]
        stages[0] += first
        stages[-1] += last
        return max(
            sum(cost for cost, owner in zip(stages, stage_ranks, strict=True) if owner == rank)
            for rank in range(num_ranks)
        )

    sizes = rank_split(costs, stage_ranks, first=first, last=last)
    assert sum(sizes) == len(costs) and min(sizes) >= 1
    assert dearest(sizes) <= dearest(stage_split(costs, len(stage_ranks), first=first, last=last))
