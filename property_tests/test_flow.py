"""Theorems about the fast timeline of a program: another simulation agrees with it to the bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from picotron.errors import PlanError
from picotron.planner.cost import SegmentCost, StageCost
from picotron.planner.flow import Times, program_times
from picotron.planner.lower import with_frame, with_reductions, with_transfers
from picotron.planner.pipeline import Schedule
from picotron.planner.program import COMPUTE, Kind, Program, rows
from picotron.planner.schedule_times import PipelineCosts, schedule_times
from picotron.planner.simulate import Durations, simulate_program, summed
from property_tests.strategies import quarters
from property_tests.strategies_lower import costs, drawn_schedules, spoilt, stage_buckets

RATES = {Kind.REDUCE: 3.0, Kind.NORM: 7.0, Kind.COUNT: 11.0}  # bytes per second, so that nothing is round


def _durations(program: Program, schedule: Schedule, priced: PipelineCosts, update: float) -> Durations:
    """The same prices as the slow simulation wants them: one segment a stage, sums by group and bytes."""
    table = priced.table()
    first = {schedule.rank_stages(rank)[0] for rank in range(schedule.num_ranks)}

    def cost(stage: int, phase: int) -> tuple[SegmentCost, ...]:
        return (SegmentCost(compute=(float(table[phase, stage]),)),)

    return Durations(
        stages=tuple(
            StageCost(
                forward=cost(stage, 0),
                backward=cost(stage, 1),
                backward_input=cost(stage, 2),
                backward_weight=cost(stage, 3),
                update_seconds=update if stage in first else 0.0,
            )
            for stage in range(schedule.num_stages)
        ),
        send_seconds=priced.transfer_seconds,
        reduce_seconds={
            (group, size): size / (RATES[Kind.REDUCE] if size not in (8, 24) else RATES[_frame(size)])
            for group, size in summed(program)
        },
    )


def _frame(size: int) -> Kind:
    return Kind.COUNT if size == 8 else Kind.NORM


def _runnable(schedule: Schedule) -> Program | None:
    try:
        return with_transfers(schedule, 100)
    except PlanError:
        event("circle")
        return None


@given(drawn_schedules(), st.data())
def test_the_slow_simulation_agrees_to_the_bit(schedule: Schedule, data: st.DataObject) -> None:
    """Every start and end of every row: of lowered programs, and of what is left of them when spoilt."""
    program = _runnable(schedule)
    if program is None:
        return
    priced, update = data.draw(costs(schedule.num_stages)), data.draw(quarters())
    if not schedule.bidirectional:
        buckets = data.draw(stage_buckets(schedule))
        sizes = [[7 if "embedding" in b.partial else 100 * b.stage + b.index for b in own] for own in buckets]
        program = with_reductions(program, buckets, sizes)
    program = data.draw(spoilt(with_frame(program, schedule, count_bytes=8, statistics_bytes=24)))
    seconds = _durations(program, schedule, priced, update)
    try:
        slow = simulate_program(program, seconds)
    except PlanError:
        event("stuck")
        with pytest.raises(PlanError, match="the ranks of this program wait for each other: rank"):
            program_times(program, priced, bytes_per_second=RATES, update_seconds=update)
        return
    fast = program_times(program, priced, bytes_per_second=RATES, update_seconds=update)
    assert _spans(program, fast.start, fast.end) == _spans(program, slow.start, slow.end)


def _spans(program: Program, start: np.ndarray, end: np.ndarray) -> list[tuple[str, float, float]]:
    """What runs when, in words."""
    names = [f"{rank}: {row}" for rank in range(program.num_ranks) for row in rows(program, rank)]
    return list(zip(names, start.tolist(), end.tolist(), strict=True))


@given(drawn_schedules(), st.data())
def test_where_messages_take_no_time_the_schedule_runs_as_by_itself(
    schedule: Schedule, data: st.DataObject
) -> None:
    """At equal costs: no rank ever waits for room in a channel, or for a receive that is posted too late."""
    program = _runnable(schedule)
    if program is None:
        return
    f = 1.0
    priced = PipelineCosts(
        forward_seconds=[f] * schedule.num_stages,
        input_seconds=[f] * schedule.num_stages,
        weight_seconds=[f] * schedule.num_stages,
    )
    _same_as_alone(program, schedule, priced, program_times(program, priced))


def _same_as_alone(program: Program, schedule: Schedule, priced: PipelineCosts, times: Times) -> None:
    alone = schedule_times(schedule, priced)
    computing = np.flatnonzero(program.is_kind(*COMPUTE))
    first = schedule.orders.joined
    second = np.concatenate([[False], first[:-1]])
    assert np.array_equal(times.start[computing][~second], alone.start[~second])
    assert np.array_equal(times.end[computing][~first], alone.end[~first])
