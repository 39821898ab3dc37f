"""Theorems about lowering: complete, in order, matched, no circles, no more in flight than needed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
from hypothesis import assume, event, given
from hypothesis import strategies as st

from picotron.errors import PlanError
from picotron.planner.actions import Action, Phase
from picotron.planner.catalogue import make_schedule
from picotron.planner.deadlock import check_channels, check_no_deadlock
from picotron.planner.flow import Semantics, program_times
from picotron.planner.lower import (
    messages,
    send_depths,
    with_mirror_sums,
    with_reductions,
    with_transfers,
)
from picotron.planner.pipeline import Schedule
from picotron.planner.program import (
    COMPUTE,
    RECEIVES,
    SENDS,
    Kind,
    Program,
    Row,
    matching_sends,
    rows,
    with_rows,
)
from picotron.planner.schedule_times import unit_costs
from picotron.planner.schedules import afab, one_f_one_b
from property_tests.oracle_programs import verdict
from property_tests.strategies import schedules, warmups
from property_tests.strategies_lower import drawn_schedules, in_batches, spoilt, stage_buckets
from property_tests.strategies_programs import Collective, End, Post, Wait
from property_tests.strategies_programs import Program as Acts

SEMANTICS: tuple[Semantics, ...] = ("buffered", "rendezvous", "batched")


def _own(program: Program) -> list[tuple[Row, ...]]:
    return [rows(program, rank) for rank in range(program.num_ranks)]


def _cells(schedule: Schedule, rank: int) -> list[tuple[Action, ...]]:
    """The actions of a rank, those of a pair together."""
    own, joined = schedule.orders[rank], schedule.orders.joined[schedule.orders.span(rank)].tolist()
    found: list[tuple[Action, ...]] = []
    for index, action in enumerate(own):
        if index and joined[index - 1]:
            found[-1] += (action,)
        else:
            found.append((action,))
    return found


def _needs(schedule: Schedule, action: Action) -> Action | None:
    """What an action takes from another stage."""
    if action.phase is Phase.WEIGHT:
        return None
    before = action.stage + (-1 if action.phase is Phase.FORWARD else 1)
    if not 0 <= before < schedule.num_stages:
        return None
    phases = (Phase.FORWARD,) if action.phase is Phase.FORWARD else (Phase.BACKWARD, Phase.INPUT)
    everything = {action for own in schedule.orders for action in own}
    return next(found for p in phases if (found := Action(before, p, action.microbatch)) in everything)


def _runs(schedule: Schedule) -> bool:
    """Whether cells need each other in no circle, by the order of ranks and by data."""
    cell_of = {
        action: (rank, at)
        for rank in range(schedule.num_ranks)
        for at, cell in enumerate(_cells(schedule, rank))
        for action in cell
    }
    graph: dict[tuple[int, int], set[tuple[int, int]]] = defaultdict(set)
    for action, (rank, at) in cell_of.items():
        needed = _needs(schedule, action)
        graph[rank, at] |= {(rank, at - 1)} if at else set()
        if needed is not None:
            graph[rank, at].add(cell_of[needed])
    try:
        TopologicalSorter(graph).prepare()
    except CycleError:
        return False
    return True


@given(drawn_schedules())
def test_a_schedule_is_lowered_exactly_if_it_can_run(schedule: Schedule) -> None:
    """Whatever can run at all is lowered, and runs under any semantics; a circle is told."""
    if not _runs(schedule):
        event("circle")
        with pytest.raises(PlanError, match="the ranks of this schedule wait for each other: rank"):
            with_transfers(schedule, 4)
        return
    program = with_transfers(schedule, 4)
    check_channels(program)
    for semantics in SEMANTICS:
        check_no_deadlock(program, semantics)
        assert verdict(as_acts(program), semantics).well


def as_acts(program: Program) -> Acts:
    """The program as the oracle of deadlocks reads it: channels by name, as the runtime names them."""
    everyone = tuple(range(program.num_ranks))
    world = 0
    acts = []
    for rank in everyone:
        own: list[Post | Wait] = []
        batches: dict[int, int] = {}
        of_row: dict[int, int] = {}
        for index, row in enumerate(rows(program, rank)):
            if row.kind in SENDS or row.kind in RECEIVES:
                end = End("send" if row.kind in SENDS else "recv", row.peer, channel(row, rank))
                before = own[-1] if own else None
                if row.batch >= 0 and row.batch in batches and isinstance(before, Post):
                    own[-1] = Post(before.key, (*before.what, end))  # type: ignore[misc]
                    of_row[index] = batches[row.batch]
                else:
                    own.append(Post(index, (end,)))
                    of_row[index] = index
                    if row.batch >= 0:
                        batches[row.batch] = index
            elif row.kind is Kind.WAIT:
                own.append(Wait(of_row[row.target]))
            elif row.kind is Kind.NORM:
                own += [Post(index, Collective("all_reduce", world)), Wait(index)]
        acts.append(tuple(own))
    return Acts(len(everyone), (everyone,), tuple(acts))


def channel(row: Row, rank: int) -> str:
    """Of a pair of ranks, one name for each sender and direction."""
    up = (rank < row.peer) == (row.kind in SENDS)  # from the lower rank to the higher one
    forward = row.kind in (Kind.SEND_F, Kind.RECV_F)
    return ("forward" if forward else "backward") + ("" if up == forward else " return")


@given(drawn_schedules())
def test_every_cell_has_its_rows_around_it(schedule: Schedule) -> None:
    """Arrivals before a cell, sends after it, computing as scheduled; nothing between stages of one rank."""
    assume(_runs(schedule))
    program = with_transfers(schedule, 9)
    for rank, own in enumerate(_own(program)):
        computed: list[Row] = []
        arrived: set[tuple[bool, int, int]] = set()
        ended: list[int] = []
        for at, row in enumerate(own):
            assert (row.part, row.group, row.anchor_row) == (-1, -1, -1)
            if row.kind in COMPUTE:
                computed.append(row)
            elif row.kind is Kind.WAIT:
                target = own[row.target]
                assert row.target < at
                ended.append(row.target)
                assert row == Row(
                    Kind.WAIT, target.stage, target.microbatch, peer=target.peer, target=row.target
                )
                if target.kind in RECEIVES:
                    arrived.add((target.kind is Kind.RECV_F, row.stage, row.microbatch))
            else:
                assert row.bytes == 9 and row.peer != rank
        assert sorted(ended) == [at for at, row in enumerate(own) if row.kind in (*SENDS, *RECEIVES)]
        cells = _cells(schedule, rank)
        assert [f"{row}" for row in computed] == [str(action) for cell in cells for action in cell]
        pairs = [row.batch for row in computed if row.batch >= 0]
        assert pairs[::2] == pairs[1::2] and len(set(pairs)) == len(pairs) // 2
        _check_around(schedule, rank, own, cells)


def _check_around(
    schedule: Schedule, rank: int, own: Sequence[Row], cells: Sequence[Sequence[Action]]
) -> None:
    """Walk rows and cells side by side."""
    position = {str(row): at for at, row in enumerate(own) if row.kind in COMPUTE}
    waits = {row.target: at for at, row in enumerate(own) if row.kind is Kind.WAIT}
    posts = [(at, row, (row.stage, row.microbatch)) for at, row in enumerate(own) if row.bytes]
    sends = {(row.kind is Kind.SEND_F, *what): at for at, row, what in posts if row.kind in SENDS}
    receives = {(row.kind is Kind.RECV_F, *what): at for at, row, what in posts if row.kind in RECEIVES}
    expected_sends, expected_receives = set(), set()
    starts = [position[str(cell[0])] for cell in cells]
    ends = [position[str(cell[-1])] for cell in cells]
    for number, cell in enumerate(cells):
        assert ends[number] - starts[number] == len(cell) - 1
        following = starts[number + 1] if number + 1 < len(cells) else len(own)
        before = starts[number - 1] if number else 0
        for action in cell:
            forward = action.phase is Phase.FORWARD
            key = forward, action.stage, action.microbatch
            needed = _needs(schedule, action)
            if needed is not None and schedule.owner(needed.stage, needed.microbatch) != rank:
                expected_receives.add(key)
                assert receives[key] < waits[receives[key]] < starts[number]
                assert number == 0 or ends[number - 1] < waits[receives[key]]
                assert receives[key] < max(before, 1) or number <= 1 or receives[key] <= before
            taker = action.stage + (1 if forward else -1)
            inside = 0 <= taker < schedule.num_stages and action.phase is not Phase.WEIGHT
            if inside and schedule.owner(taker, action.microbatch) != rank:
                expected_sends.add(key)
                assert ends[number] < sends[key] < following
                assert own[sends[key]].peer == schedule.owner(taker, action.microbatch)
    assert (set(sends), set(receives)) == (expected_sends, expected_receives)


@given(drawn_schedules())
def test_a_channel_delivers_in_the_order_sent(schedule: Schedule) -> None:
    """The n-th receive is of what the n-th send sends, and as many sends are open as was found necessary."""
    assume(_runs(schedule))
    program = with_transfers(schedule, 4)
    matched = matching_sends(program)
    sent: dict[tuple[Kind, int, int], list[tuple[int, int]]] = defaultdict(list)
    for (rank, index), (sender, at) in sorted(matched.items()):
        sent[rows(program, rank)[index].kind, sender, rank].append((at, index))
    for pairs in sent.values():
        assert pairs == sorted(pairs)
    assert len(set(matched.values())) == len(matched) == program.is_kind(*SENDS).sum()
    depths = send_depths(schedule, messages(schedule))
    most: dict[tuple[int, int, Kind], int] = {}
    for rank, own in enumerate(_own(program)):
        open_: dict[tuple[int, int, Kind], int] = defaultdict(int)
        for row in own:
            if row.kind in SENDS:
                key = rank, row.peer, row.kind
                open_[key] += 1
                most[key] = max(most.get(key, 0), open_[key])
            elif row.kind is Kind.WAIT and own[row.target].kind in SENDS:
                open_[rank, row.peer, own[row.target].kind] -= 1
        assert not any(open_.values())
    by_channel = [depth for _, depth in sorted(zip(sorted(most), depths.tolist(), strict=True))]
    assert [most[key] for key in sorted(most)] == [
        min(depth, len(sent[_received(key[2]), key[0], key[1]]))
        for key, depth in zip(sorted(most), by_channel, strict=True)
    ]


def _received(kind: Kind) -> Kind:
    return Kind.RECV_F if kind is Kind.SEND_F else Kind.RECV_B


@st.composite
def crowded(draw: st.DrawFn) -> Schedule:
    """Schedules whose channels hold several sends, most of them."""
    p, m = draw(st.integers(2, 4)), draw(st.integers(4, 12))
    name = draw(st.sampled_from(["interleaved", "interleaved-zb"]))
    looped = make_schedule(name, p, p * m, draw(st.integers(2, 3)))
    return draw(warmups(p, m) | st.just(looped) | st.just(_all_then_one(m)))


def _all_then_one(num_microbatches: int) -> Schedule:
    """Rank 0 runs all forwards before it takes a gradient, rank 1 hands it one after each forward."""
    return Schedule(
        name="mixed",
        num_microbatches=num_microbatches,
        stage_ranks=(0, 1),
        orders=(afab(2, num_microbatches).orders[0], one_f_one_b(2, num_microbatches).orders[1]),
    )


@given(crowded(), st.data())
def test_one_send_less_in_flight_holds_somebody_up(schedule: Schedule, data: st.DataObject) -> None:
    """A channel that may hold several sends needs them: with one less a rank waits, or for ever."""
    depths = send_depths(schedule, messages(schedule))
    several = np.flatnonzero(depths > 1).tolist()
    assume(several)
    less = depths.copy()
    less[data.draw(st.sampled_from(several))] -= 1
    priced = unit_costs(schedule.num_stages)
    free = program_times(with_transfers(schedule, 4), priced)
    with mock.patch("picotron.planner.transfers.send_depths", lambda *_: less):
        program = with_transfers(schedule, 4)
    posted = program.is_kind(*SENDS)
    try:
        tight = program_times(program, priced)
    except PlanError:
        event("deadlock")
        return
    waits = np.flatnonzero(program.is_kind(Kind.WAIT))
    targets = program.target[waits] + program.first_row[waits]
    held = tight.end[waits] - tight.start[waits] > 0
    at_the_brink = tight.start[waits] == tight.end[targets]
    assert (held | at_the_brink)[posted[targets]].any()
    assert tight.makespan_seconds >= free.makespan_seconds


@given(st.integers(1, 6), st.integers(1, 12), st.sampled_from([afab, one_f_one_b]))
def test_of_one_stage_a_rank_at_most_one_send_is_in_flight(
    num_ranks: int, num_microbatches: int, make: Callable[[int, int], Schedule]
) -> None:
    """AFAB and 1F1B, row by row, as written by hand: receive ahead, wait, compute, wait for room, send."""
    schedule = make(num_ranks, num_microbatches)
    assert _own(with_transfers(schedule, 5)) == [
        _by_hand(schedule, rank, own) for rank, own in enumerate(schedule.orders)
    ]


def _by_hand(schedule: Schedule, rank: int, order: Sequence[Action]) -> tuple[Row, ...]:
    out: list[Row] = []
    posted: dict[Action, int] = {}
    in_flight: dict[Kind, int] = {}

    def receive(action: Action) -> None:
        source = rank + (-1 if action.phase is Phase.FORWARD else 1)
        if 0 <= source < schedule.num_ranks:
            posted[action] = len(out)
            kind = Kind.RECV_F if action.phase is Phase.FORWARD else Kind.RECV_B
            out.append(Row(kind, rank, action.microbatch, peer=source, bytes=5))

    def wait(target: int) -> None:
        row = out[target]
        out.append(Row(Kind.WAIT, row.stage, row.microbatch, peer=row.peer, target=target))

    receive(order[0])
    for action, following in pairwise([*order, None]):
        assert action is not None
        if following is not None:
            receive(following)
        if action in posted:
            wait(posted[action])
        forward = action.phase is Phase.FORWARD
        out.append(Row(Kind.FORWARD if forward else Kind.BACKWARD, rank, action.microbatch))
        target, send = rank + (1 if forward else -1), Kind.SEND_F if forward else Kind.SEND_B
        if 0 <= target < schedule.num_ranks:
            if send in in_flight:
                wait(in_flight[send])
            in_flight[send] = len(out)
            out.append(Row(send, rank, action.microbatch, peer=target, bytes=5))
    for target in in_flight.values():
        wait(target)
    return tuple(out)


@given(drawn_schedules(), st.data())
def test_a_spoilt_program_is_refused_exactly_if_it_is_stuck(schedule: Schedule, data: st.DataObject) -> None:
    """Rows moved about, some posted together: the oracle, which counts and polls, says the same of each."""
    assume(_runs(schedule))
    program = data.draw(in_batches(data.draw(spoilt(with_transfers(schedule, 4)))))
    for semantics in SEMANTICS:
        stuck = bool(verdict(as_acts(program), semantics).stuck)
        event(f"{semantics} {'stuck' if stuck else 'ends'}")
        try:
            check_no_deadlock(program, semantics)
        except PlanError as error:
            assert stuck and str(error).startswith("the ranks of this program wait for each other: rank ")
        else:
            assert not stuck


@given(schedules(), st.data())
def test_gradients_are_summed_as_early_as_may_be(schedule: Schedule, data: st.DataObject) -> None:
    """Each bucket first inside its stage's last B or W, further sums after the wait for the one before."""
    buckets = data.draw(stage_buckets(schedule))
    sizes = [[1 + bucket.index for bucket in own] for own in buckets]
    before = with_transfers(schedule, 4)
    program = with_reductions(before, buckets, sizes)
    assert without(program, Kind.REDUCE) == without(before, Kind.REDUCE)
    for rank, own in enumerate(_own(program)):
        for stage in schedule.rank_stages(rank):
            last = max(
                i for i, row in enumerate(own)
                if row.stage == stage and row.kind in (Kind.BACKWARD, Kind.BACKWARD_WEIGHT)
            )  # fmt: skip
            for bucket in buckets[stage]:
                sums = [
                    (i, row) for i, row in enumerate(own)
                    if row.kind is Kind.REDUCE and (row.stage, row.part) == (stage, bucket.index)
                ]  # fmt: skip
                assert tuple(program.groups[row.group] for _, row in sums) == bucket.partial
                for number, (i, row) in enumerate(sums):
                    assert row.bytes == 1 + bucket.index
                    if number == 0:
                        assert last < i and (row.anchor_row, row.anchor_segment) == (last, 0)
                        assert all(r.kind is Kind.REDUCE for r in own[last + 1 : i])
                    else:
                        waited = own[i - 1]
                        assert (waited.kind, waited.target) == (Kind.WAIT, sums[number - 1][0])


def without(program: Program, kind: Kind) -> list[list[str]]:
    """What each rank does but for rows of a kind and the waits for them; each WAIT with what it is for."""
    found = []
    for own in _own(program):
        texts = []
        for row in own:
            target = own[row.target] if row.target >= 0 else row
            if kind not in (row.kind, target.kind):
                texts.append(f"{row} {row.bytes} {target if row.target >= 0 else ''}")
        found.append(texts)
    return found


@given(drawn_schedules())
def test_copies_of_a_stage_sum_in_one_order(schedule: Schedule) -> None:
    """Both ranks of a mirrored stage post its sum once, after its gradients, and theirs in the same order."""
    assume(schedule.bidirectional and _runs(schedule))
    program = with_mirror_sums(with_transfers(schedule, 4), schedule, range(schedule.num_stages))
    check_no_deadlock(program)
    posted: dict[int, list[int]] = {}
    for rank, own in enumerate(_own(program)):
        sums = [(i, row) for i, row in enumerate(own) if row.kind is Kind.REDUCE]
        posted[rank] = [row.stage for _, row in sums]
        for i, row in sums:
            assert row.bytes == row.stage and program.groups[row.group] == "mirror"
            mine = [j for j, r in enumerate(own) if r.stage == row.stage and r.kind in COMPUTE]
            assert max(mine) < i
            assert [r.target for r in own].count(i) == 1
    for rank, stages in posted.items():
        mirror = schedule.num_ranks - 1 - rank
        assert stages == posted[mirror]
        assert sorted(stages) == (list(schedule.rank_stages(rank)) if rank != mirror else [])


@given(drawn_schedules(), st.data())
def test_inserted_rows_leave_the_others_as_they_are(schedule: Schedule, data: st.DataObject) -> None:
    """Old rows keep order and what they refer to; new ones stand where they were put, in order given."""
    assume(_runs(schedule))
    program = with_transfers(schedule, 4)
    new: list[tuple[int, int, Row]] = []
    for number in range(data.draw(st.integers(0, 5))):
        rank = data.draw(st.integers(0, program.num_ranks - 1))
        at = data.draw(st.integers(program.offsets[rank], program.offsets[rank + 1]))
        target = data.draw(st.integers(-1, program.num_rows + number - 1))
        own = target >= program.num_rows and new[target - program.num_rows][0] == rank
        own |= program.offsets[rank] <= target < program.offsets[rank + 1]
        new.append((rank, at, Row(Kind.RECOMPUTE, number, target=target if own else -1)))
    made = with_rows(program, new)
    assert without(made, Kind.RECOMPUTE) == without(program, Kind.RECOMPUTE)
    for rank, own_rows in enumerate(_own(made)):
        mine = [(at, row) for r, at, row in new if r == rank]
        mine.sort(key=lambda pair: pair[0])
        assert [row.stage for row in own_rows if row.kind is Kind.RECOMPUTE] == [r.stage for _, r in mine]
        old = list(rows(program, rank))
        for at, row in mine:
            named = Kind.RECOMPUTE, row.stage
            place = next(i for i, r in enumerate(own_rows) if (r.kind, r.stage) == named)
            before = [r for r in own_rows[:place] if r.kind is not Kind.RECOMPUTE]
            assert len(before) == at - program.offsets[rank]
            found = own_rows[own_rows[place].target] if own_rows[place].target >= 0 else None
            if row.target < 0:
                assert found is None
            elif row.target < program.num_rows:
                assert found is not None and str(found) == str(old[row.target - program.offsets[rank]])
            else:
                assert found is not None and found.stage == row.target - program.num_rows
