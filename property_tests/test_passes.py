"""Theorems about passes: what each adds is complete and in its place, and all else stays as it was."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from attrs import evolve
from hypothesis import assume, event, given
from hypothesis import strategies as st

from picotron.errors import PlanError
from picotron.planner.deadlock import check_no_deadlock
from picotron.planner.flow import program_times
from picotron.planner.lower import with_transfers
from picotron.planner.passes import (
    cells,
    fuse_backward,
    with_batches,
    with_offloading,
    with_recomputing,
    with_unsharding,
)
from picotron.planner.pipeline import Schedule
from picotron.planner.program import COMPUTE, RECEIVES, SENDS, Kind, Program, Row, rows
from picotron.planner.schedule_times import schedule_times, unit_costs
from property_tests.strategies import schedules
from property_tests.strategies_lower import costs, drawn_schedules

MEMORY = (Kind.UNSHARD, Kind.RESHARD, Kind.OFFLOAD, Kind.RELOAD, Kind.RECOMPUTE)
PARAMETERS = (Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.RECOMPUTE)


Drawn = tuple[Schedule, Program]


@st.composite
def programs(draw: st.DrawFn) -> Drawn:
    """A schedule that can run, lowered."""
    schedule = draw(schedules() | drawn_schedules())
    try:
        return schedule, with_transfers(schedule, 4)
    except PlanError:
        assume(False)
        raise


def _without(program: Program, rank: int, kinds: tuple[Kind, ...]) -> list[tuple[str, str, int]]:
    """What a rank does but for some kinds and the waits for them; each WAIT with what it is for."""
    own, found = rows(program, rank), []
    for row in own:
        target = own[row.target] if row.target >= 0 else row
        if row.kind not in kinds and target.kind not in kinds:
            found.append((str(row), str(target), row.bytes))
    return found


def _adds_only(before: Program, after: Program, *kinds: Kind) -> None:
    for rank in range(before.num_ranks):
        assert _without(after, rank, kinds) == _without(before, rank, kinds)
    check_no_deadlock(after)


def _cell_numbers(program: Program, rank: int) -> list[int]:
    """By row of a rank, how many cells close before or in it, counted by hand."""
    found, number, pair = [], 0, -1
    for row in rows(program, rank):
        if row.kind in COMPUTE and not (row.batch >= 0 and row.batch == pair):
            number += 1
            pair = row.batch
        found.append(number)
    return found


@given(programs(), st.data())
def test_each_backward_of_a_stage_recomputes_its_forward(drawn: Drawn, data: st.DataObject) -> None:
    """One row before each B or I of the stages chosen, in its cell, before its gradient is waited for."""
    schedule, program = drawn
    stages = data.draw(st.sets(st.integers(0, schedule.num_stages - 1)))
    made = with_recomputing(program, stages)
    _adds_only(program, made, Kind.RECOMPUTE)
    for rank in range(program.num_ranks):
        own = rows(made, rank)
        again = [(row.stage, row.microbatch) for row in own if row.kind is Kind.RECOMPUTE]
        backwards = [
            (row.stage, row.microbatch) for row in own
            if row.kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT) and row.stage in stages
        ]  # fmt: skip
        assert again == backwards
        for at, row in enumerate(own):
            if row.kind is Kind.RECOMPUTE:
                following = own[at + 1 :]
                until = next(i for i, r in enumerate(following) if r.kind in COMPUTE)
                computing = following[until : until + 2]
                waits = following[:until]
                assert all(r.kind is Kind.WAIT and own[r.target].kind in RECEIVES for r in waits)
                assert (row.stage, row.microbatch) in [(r.stage, r.microbatch) for r in computing]


@given(programs(), st.data())
def test_every_use_of_parameters_is_covered(drawn: Drawn, data: st.DataObject) -> None:
    """Gathered, waited for, used, freed, in turn; never more stages at once than allowed; one cell ahead."""
    schedule, program = drawn
    stages = data.draw(st.sets(st.integers(0, schedule.num_stages - 1)))
    program = with_recomputing(program, stages)
    keep = data.draw(st.integers(1, 4))
    most = data.draw(st.none() | st.integers(1, 3))
    weights_use = data.draw(st.booleans())
    used = PARAMETERS + (Kind.BACKWARD_WEIGHT,) * weights_use
    sizes = [10 * stage for stage in range(schedule.num_stages)]
    try:
        made = with_unsharding(program, sizes, keep=keep, max_active=most, weights_use=weights_use)
    except PlanError as error:
        event("a pair of two stages")
        assert most == 1 and "max_active must be at least 2" in str(error)
        return
    _adds_only(program, made, Kind.UNSHARD, Kind.RESHARD)
    for rank in range(program.num_ranks):
        _check_gathering(made, rank, used, keep, most)


def _check_gathering(
    program: Program, rank: int, used: tuple[Kind, ...], keep: int, most: int | None
) -> None:
    own, number = rows(program, rank), _cell_numbers(program, rank)
    gathered: dict[int, int] = {}  # stage: the row that gathers it
    there: set[int] = set()
    uses = {
        stage: [
            n
            for n, row in zip(number, own, strict=True)
            if row.stage == stage and row.kind in used and row.kind is not Kind.RECOMPUTE
        ]
        for stage in {row.stage for row in own}
    }
    for at, row in enumerate(own):
        if row.kind is Kind.UNSHARD:
            assert row.stage not in gathered and row.bytes == 10 * row.stage
            gathered[row.stage] = at
            assert most is None or len(gathered) <= most
            assert 0 < min(n for n in uses[row.stage] if n > number[at]) - number[at] <= 2
        elif row.kind is Kind.WAIT and own[row.target].kind is Kind.UNSHARD:
            assert gathered[row.stage] == row.target and row.stage not in there
            there.add(row.stage)
        elif row.kind is Kind.RESHARD:
            there.remove(row.stage)
            del gathered[row.stage]
            again = [n - number[at] for n in uses[row.stage] if n > number[at]]
            before = [r for r in own[:at] if r.kind in COMPUTE][-1]
            if again and most is None:
                assert again[0] > keep
            elif not again:
                assert before.stage == row.stage or before.batch >= 0
        elif row.kind in used:
            assert row.stage in there
    assert not gathered
    if most is None:
        for stage, cells_used in uses.items():
            distinct = sorted(set(cells_used))
            gaps = sum(b - a > keep for a, b in pairwise(distinct))
            assert [r.stage for r in own if r.kind is Kind.UNSHARD].count(stage) == (gaps + 1) * bool(
                distinct
            )


@given(programs(), st.integers(2, 6))
def test_what_idles_long_enough_is_away_for_that_time(drawn: Drawn, least_idle: int) -> None:
    """Out after F and freed a cell later; back on its way a cell ahead of the backward, and there in time."""
    schedule, program = drawn
    sizes = [10 * stage for stage in range(schedule.num_stages)]
    made = with_offloading(program, sizes, least_idle=least_idle)
    _adds_only(program, made, Kind.OFFLOAD, Kind.RELOAD)
    for rank in range(program.num_ranks):
        own, number = rows(made, rank), _cell_numbers(made, rank)
        at = {
            (row.kind, row.stage, row.microbatch): i for i, row in enumerate(own) if row.kind is not Kind.WAIT
        }
        ended = {row.target: i for i, row in enumerate(own) if row.kind is Kind.WAIT}
        for (kind, stage, microbatch), forward in at.items():
            if kind is not Kind.FORWARD:
                continue
            backward = at.get(
                (Kind.BACKWARD, stage, microbatch), at.get((Kind.BACKWARD_INPUT, stage, microbatch), -1)
            )
            away, home = (at.get((k, stage, microbatch)) for k in (Kind.OFFLOAD, Kind.RELOAD))
            if number[backward] - number[forward] - 1 < least_idle:
                assert away is None and home is None
                continue
            assert away is not None and home is not None
            assert forward < away < ended[away] < home < ended[home] < backward
            assert number[away] == number[forward] and number[ended[away]] == number[forward] + 1
            assert number[home] == number[backward] - 2 and number[ended[home]] == number[backward] - 1
            assert own[away].bytes == own[home].bytes == 10 * stage


@given(programs())
def test_what_is_posted_together_stands_together_and_ends(drawn: Drawn) -> None:
    """Batches are neighbours, whole, and nobody waits for ever under any semantics."""
    _, program = drawn
    made = with_batches(program)
    posts = program.is_kind(*SENDS, *RECEIVES)
    assert evolve(made, batch=np.where(posts, -1, made.batch)) == program
    for semantics in ("buffered", "rendezvous", "batched"):
        check_no_deadlock(made, semantics)
    event(f"batches: {len(set(made.batch[posts].tolist()) - {-1}) > 0}")
    for batch in set(made.batch[posts].tolist()) - {-1}:
        at = np.flatnonzero(made.batch == batch)
        assert len(at) > 1 and at[-1] - at[0] == len(at) - 1
        assert posts[at].all() and len(set(made.rank[at].tolist())) == 1


@given(schedules() | drawn_schedules(), st.data())
def test_fusing_moves_nobody(schedule: Schedule, data: st.DataObject) -> None:
    """Only I and its own W next to each other become B, all that may; every action starts when it did."""
    priced = data.draw(st.just(unit_costs(schedule.num_stages)) | costs(schedule.num_stages, overlap=True))
    try:
        before = schedule_times(schedule, priced)
    except PlanError:
        assume(False)
    made = fuse_backward(schedule, priced)
    after = schedule_times(made, priced)
    started = {schedule.orders.action(i): before.start[i] for i in range(schedule.orders.num_actions)}
    assert after.makespan_seconds == before.makespan_seconds
    fused = 0
    for rank, own in enumerate(made.orders):
        split: list[str] = []
        for action in own:
            if action in started:
                split.append(str(action))
            else:
                fused += 1
                split += [f"{action.stage}I{action.microbatch}", f"{action.stage}W{action.microbatch}"]
        assert split == [str(action) for action in schedule.orders[rank]]
    event(f"fused {fused > 0}")
    assert fuse_backward(made, priced) == made
    for index in range(made.orders.num_actions):
        action = made.orders.action(index)
        if action in started:
            assert after.start[index] == started[action]


def test_more_stages_in_a_cell_than_allowed_are_refused() -> None:
    """An overlapped pair of two stages needs both."""
    schedule = Schedule(
        name="pair",
        num_microbatches=2,
        stage_ranks=(0, 0),
        orders=[["0F0", "1F0", "(0F1;1B0)OVERLAP_F_B", "1F1", "1B1", "0B0", "0B1"]],
    )
    with pytest.raises(PlanError, match="max_active must be at least 2, the stages of one cell, got 1"):
        with_unsharding(with_transfers(schedule, 4), [1, 1], max_active=1)


def test_bounds_are_told() -> None:
    """A copy needs a cell each way, and something used next must be kept."""
    schedule = Schedule(name="one", num_microbatches=1, stage_ranks=(0,), orders=[["0F0", "0B0"]])
    program = with_transfers(schedule, 4)
    with pytest.raises(PlanError, match="least_idle must be at least 2"):
        with_offloading(program, [1], least_idle=1)
    with pytest.raises(PlanError, match="keep must be at least 1"):
        with_unsharding(program, [1], keep=0)
    with pytest.raises(PlanError, match="max_active must be None or at least 1, got 0"):
        with_unsharding(program, [1], max_active=0)
    for sizes in ([-1], [], [1.5], [True]):
        for make in (with_unsharding, with_offloading):
            with pytest.raises(
                PlanError, match="stage_bytes must be whole numbers of at least 0 for each of 1"
            ):
                make(program, sizes)
    with pytest.raises(PlanError, match=r"stages must be among those of the program, \[0\], got \[3\]"):
        with_recomputing(program, [3])
    assert [str(row) for row in rows(with_unsharding(program, [1]), 0)] == [
        "0UNSHARD", "0WAIT", "0F0", "0B0", "0RESHARD",
    ]  # fmt: skip
    assert Row(Kind.UNSHARD, 0, group=0, bytes=1) in rows(with_unsharding(program, [1]), 0)
    assert cells(program).opens.tolist() == [0, 1]
    assert program_times(program, unit_costs(1)).makespan_seconds == 3.0
