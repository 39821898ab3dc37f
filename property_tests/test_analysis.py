"""Theorems about what times tell: parts sum to the whole, and the critical path is tight."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from picotron.errors import PlanError
from picotron.planner.analysis import (
    CAUSES,
    bubble_fraction,
    bubble_seconds,
    critical_path,
    exposed_seconds,
    idle_causes,
    work_seconds,
)
from picotron.planner.flow import WORK, Times, program_times, row_seconds, times_at
from picotron.planner.lower import with_frame, with_reductions, with_transfers
from picotron.planner.passes import with_batches, with_offloading, with_recomputing, with_unsharding
from picotron.planner.pipeline import Schedule
from picotron.planner.program import Kind, Program
from picotron.planner.schedule_times import idle_seconds, schedule_times, unit_costs
from property_tests.strategies import quarters
from property_tests.strategies_lower import costs, drawn_schedules, stage_buckets

Made = tuple[Program, np.ndarray, Times]


@st.composite
def timed(draw: st.DrawFn) -> Made:
    """A program with anything a pass may add, and when it runs at any prices."""
    schedule = draw(drawn_schedules())
    try:
        program = with_transfers(schedule, 3)
    except PlanError:
        assume(False)
    sizes = [1 + stage for stage in range(schedule.num_stages)]
    if draw(st.booleans()):
        program = with_recomputing(program, draw(st.sets(st.integers(0, schedule.num_stages - 1))))
    if draw(st.booleans()):
        program = with_offloading(program, sizes)
    if draw(st.booleans()):
        program = with_unsharding(program, sizes, keep=draw(st.integers(1, 3)))
    if draw(st.booleans()):
        program = with_batches(program)
    if draw(st.booleans()) and not schedule.bidirectional:
        buckets = draw(stage_buckets(schedule))
        program = with_reductions(program, buckets, [[1 + b.index for b in own] for own in buckets])
    if draw(st.booleans()):
        program = with_frame(program, schedule, count_bytes=8, statistics_bytes=24)
    priced = draw(costs(schedule.num_stages, overlap=True))
    kinds = (Kind.REDUCE, Kind.NORM, Kind.COUNT, Kind.UNSHARD, Kind.OFFLOAD, Kind.RELOAD)
    rates = {kind: draw(st.sampled_from([0.5, 1.0, 4.0])) for kind in kinds}
    seconds = row_seconds(program, priced, bytes_per_second=rates, update_seconds=draw(quarters()))
    return program, seconds, times_at(program, seconds)


@given(timed())
def test_the_critical_path_is_tight_and_as_long_as_the_step(made: Made) -> None:
    """It starts at 0 and ends with the step, and nothing on it waits for anything else."""
    program, _, times = made
    path = critical_path(program, times)
    rows = [program.offsets[rank] + row for rank, row in path]
    assert times.start[rows[0]] == 0.0 and times.end[rows[-1]] == times.makespan_seconds
    for one, following in pairwise(rows):
        assert times.end[one] == times.start[following]
    assert (times.end - times.start)[rows].sum() == pytest.approx(times.makespan_seconds)
    assert len(set(path)) == len(path)


@given(timed(), st.integers(0, 2**16))
def test_what_is_not_on_the_path_may_be_quicker_for_nothing(made: Made, seed: int) -> None:
    """Taking any time off the rows beside the path leaves the step as long, off a row on it may not."""
    program, seconds, times = made
    on_path = np.zeros(program.num_rows, dtype=np.bool_)
    for rank, row in critical_path(program, times):
        on_path[program.offsets[rank] + row] = True
    met = times.how.met
    on_path[met.second[on_path[met.first]]] = True
    for operation, rows in met.further.items():
        on_path[list(rows)] = on_path[met.first[operation]]
    share = np.random.default_rng(seed).choice([0.0, 0.5, 1.0], program.num_rows)
    quicker = times_at(program, np.where(on_path, seconds, seconds * share))
    assert quicker.makespan_seconds == times.makespan_seconds


@given(timed())
def test_causes_sum_to_the_bubble(made: Made) -> None:
    """Every idle second has one cause, and none is negative; what is exposed is idle."""
    program, _, times = made
    bubbles = bubble_seconds(program, times)
    for rank, causes in enumerate(idle_causes(program, times)):
        assert tuple(causes) == CAUSES
        assert sum(causes.values()) == pytest.approx(bubbles[rank])
        assert all(seconds >= 0.0 for seconds in causes.values())
        assert 0.0 <= exposed_seconds(program, times)[rank] <= bubbles[rank] + 1e-9
    work = sum(work_seconds(program, times))
    whole = times.makespan_seconds * program.num_ranks
    assert bubble_fraction(program, times) == pytest.approx(1 - work / whole)


@given(drawn_schedules(), st.data())
def test_where_messages_are_free_only_inputs_and_the_end_are_waited_for(
    schedule: Schedule, data: st.DataObject
) -> None:
    """Nothing is exposed, and the bubble of each rank is that of the schedule by itself, at equal costs."""
    try:
        program = with_transfers(schedule, 3)
    except PlanError:
        return
    priced = unit_costs(schedule.num_stages)
    times = program_times(program, priced)
    alone = idle_seconds(schedule, priced, schedule_times(schedule, priced))
    assert bubble_seconds(program, times) == pytest.approx(alone)
    assert set(exposed_seconds(program, times)) == {0.0}
    for causes in idle_causes(program, times):
        assert causes["send"] == causes["collective"] == causes["copy"] == 0.0


@given(timed())
def test_a_rank_does_one_thing_at_a_time(made: Made) -> None:
    """Computing rows of a rank follow each other, in order; a post never starts before its row is come to."""
    program, seconds, times = made
    for rank in range(program.num_ranks):
        own = np.arange(program.offsets[rank], program.offsets[rank + 1])
        works = own[program.is_kind(*WORK)[own]]
        assert (times.start[works[1:]] >= times.end[works[:-1]]).all()
        assert (times.end[works] == times.start[works] + seconds[works]).all()
        waits = own[program.kind[own] == Kind.WAIT]
        targets = program.target[waits] + program.offsets[rank]
        assert (times.end[waits] >= times.end[targets]).all()
        came = times.how.step_end[times.how.steps.before[targets]]
        assert (times.start[targets] >= came).all()
