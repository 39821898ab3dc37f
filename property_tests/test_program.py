"""Theorems about lowered programs: complete, in order, matched, and free of circles."""

from __future__ import annotations

from collections import defaultdict
from graphlib import CycleError, TopologicalSorter

import pytest
from hypothesis import event, given

from picotron.errors import PlanError
from picotron.planner import program as room
from picotron.planner.pipeline import Schedule
from picotron.planner.plan import TrainingPlan
from picotron.planner.program import (
    COMPUTE,
    RECEIVES,
    SENDS,
    Kind,
    Program,
    Row,
    execution_order,
    lower,
    matching_sends,
    payload_bytes,
    rows,
)
from property_tests.strategies import DENSE, SPARSE, interleavings, plans

EVERY = DENSE + SPARSE


def _own(program: Program) -> list[tuple[Row, ...]]:
    return [rows(program, rank) for rank in range(program.num_ranks)]


@given(plans(families=EVERY))
def test_every_action_is_computed_in_the_schedules_order(made: TrainingPlan) -> None:
    """The F and B rows of a rank are its schedule's actions, one for one."""
    letters = {Kind.FORWARD: "F", Kind.BACKWARD: "B"}
    for order, own in zip(made.schedule.orders, _own(made.program()), strict=True):
        found = [f"{r.stage}{letters[r.kind]}{r.microbatch}" for r in own if r.kind in COMPUTE]
        assert found == [str(action) for action in order]


@given(plans(families=EVERY))
def test_every_post_has_one_wait_and_every_wait_its_target(made: TrainingPlan) -> None:
    """Sends, receives and sums are each waited for once, later; nothing else is waited for."""
    for own in _own(made.program()):
        posted = [i for i, row in enumerate(own) if row.kind in (*SENDS, *RECEIVES, Kind.REDUCE)]
        waits = [(row.target, i) for i, row in enumerate(own) if row.kind is Kind.WAIT]
        assert sorted(target for target, _ in waits) == posted
        assert all(target < i for target, i in waits)
        for target, i in waits:
            assert (own[i].stage, own[i].microbatch, own[i].part) == (
                own[target].stage,
                own[target].microbatch,
                own[target].part,
            )


@given(plans(families=EVERY))
def test_every_receive_has_its_send(made: TrainingPlan) -> None:
    """They match one to one, between each other's ranks, across one border and of the same bytes."""
    own = _own(made.program())
    matches = matching_sends(made.program())
    sends = {(rank, i) for rank, rs in enumerate(own) for i, row in enumerate(rs) if row.kind in SENDS}
    receives = {(rank, i) for rank, rs in enumerate(own) for i, row in enumerate(rs) if row.kind in RECEIVES}
    assert (set(matches), set(matches.values())) == (receives, sends)
    assert len(matches) == len(sends)
    for (at, i), (sender, j) in matches.items():
        receive, send = own[at][i], own[sender][j]
        assert (receive.peer, send.peer) == (sender, at)
        assert (receive.microbatch, receive.bytes) == (send.microbatch, send.bytes)
        forward = send.kind is Kind.SEND_F
        assert receive.stage - send.stage == (1 if forward else -1)
        assert receive.kind is (Kind.RECV_F if forward else Kind.RECV_B)


@given(plans(families=EVERY))
def test_compute_has_its_input_and_sends_follow_their_compute(made: TrainingPlan) -> None:
    """F waits for its activation and B for its gradient; what is sent has been computed."""
    last = made.schedule.num_stages - 1
    for own in _own(made.program()):
        arrived: set[tuple[Kind, int, int]] = set()
        computed: set[tuple[Kind, int, int]] = set()
        for row in own:
            if row.kind is Kind.WAIT and own[row.target].kind in RECEIVES:
                arrived.add((own[row.target].kind, row.stage, row.microbatch))
            if row.kind is Kind.FORWARD and row.stage > 0:
                assert (Kind.RECV_F, row.stage, row.microbatch) in arrived
            if row.kind is Kind.BACKWARD and row.stage < last:
                assert (Kind.RECV_B, row.stage, row.microbatch) in arrived
            if row.kind in COMPUTE:
                computed.add((row.kind, row.stage, row.microbatch))
            if row.kind in SENDS:
                kind = Kind.FORWARD if row.kind is Kind.SEND_F else Kind.BACKWARD
                assert (kind, row.stage, row.microbatch) in computed


@given(plans(families=EVERY))
def test_channels_deliver_in_order_one_at_a_time(made: TrainingPlan) -> None:
    """What a rank receives on a channel comes in the order sent, and a send is over before the next."""
    own = _own(made.program())
    sent: dict[tuple[Kind, int, int], list[int]] = defaultdict(list)
    received: dict[tuple[Kind, int, int], list[int]] = defaultdict(list)
    for rank, rs in enumerate(own):
        open_: dict[tuple[Kind, int], int] = {}
        for i, row in enumerate(rs):
            if row.kind in SENDS:
                assert (row.kind, row.peer) not in open_
                open_[row.kind, row.peer] = i
                sent[row.kind, rank, row.peer].append(row.microbatch)
            if row.kind in RECEIVES:
                kind = Kind.SEND_F if row.kind is Kind.RECV_F else Kind.SEND_B
                received[kind, row.peer, rank].append(row.microbatch)
            if row.kind is Kind.WAIT and rs[row.target].kind in SENDS:
                assert open_.pop((rs[row.target].kind, row.peer)) == row.target
    assert sent == received


@given(plans(families=EVERY))
def test_every_partial_gradient_is_summed(made: TrainingPlan) -> None:
    """Each bucket over each of its groups, in order, the first inside the last backward where it is ready."""
    program = made.program()
    for stage, own in enumerate(_own(program)):
        last_backward = max(i for i, row in enumerate(own) if row.kind is Kind.BACKWARD)
        for bucket, size in zip(made.stage_buckets[stage], made.bucket_payload_bytes(stage), strict=True):
            sums = [
                (i, row) for i, row in enumerate(own) if row.kind is Kind.REDUCE and row.part == bucket.index
            ]
            assert tuple(program.groups[row.group] for _, row in sums) == bucket.partial
            assert {row.bytes for _, row in sums} <= {size}
            for number, (i, row) in enumerate(sums):
                if number == 0:
                    assert (row.anchor_row, row.anchor_segment) == (last_backward, bucket.ready_segment)
                else:
                    assert row.anchor_row == -1
                    assert own[i - 1] == Row(Kind.WAIT, stage, part=bucket.index, target=sums[number - 1][0])
        kinds = [row.kind for row in own]
        assert kinds[-2:] == [Kind.NORM, Kind.UPDATE]
        assert kinds.count(Kind.COUNT) == (stage == made.topology.pp - 1)


@given(plans(families=EVERY))
def test_execution_order_is_a_permutation_with_anchored_rows_first(made: TrainingPlan) -> None:
    """Every row once; one posted inside another comes just before it, earlier segments of backward first."""
    for own in _own(made.program()):
        order = execution_order(own)
        assert sorted(order) == list(range(len(own)))
        at = {row: position for position, row in enumerate(order)}
        for i, row in enumerate(own):
            if row.anchor_row >= 0:
                assert at[row.anchor_row - 1] < at[i] < at[row.anchor_row]
        plain = [i for i in order if own[i].anchor_row < 0]
        assert plain == sorted(plain)
        segments = [own[i].anchor_segment for i in order if own[i].anchor_row >= 0]
        assert segments == sorted(segments, reverse=True)


@given(plans(families=EVERY))
def test_what_is_sent_is_received(made: TrainingPlan) -> None:
    """Over all pipeline ranks, bytes sent equal bytes received."""
    program = made.program()
    totals = [payload_bytes(program, rank) for rank in range(program.num_ranks)]
    assert sum(t.get(("send", "pp"), 0) for t in totals) == sum(t.get(("recv", "pp"), 0) for t in totals)


@given(plans(families=EVERY))
def test_tensor_parallel_ranks_run_the_same_rows(made: TrainingPlan) -> None:
    """Programs of one plan differ in bytes alone."""
    first = _own(made.program())
    for tp_index in range(1, made.topology.tp):
        other = _own(made.program(tp_index))
        assert [[r._replace(bytes=0) for r in own] for own in other] == [
            [r._replace(bytes=0) for r in own] for own in first
        ]


def _lowered(schedule: Schedule) -> Program:
    none: tuple[tuple[()], ...] = ((),) * schedule.num_stages
    return lower(
        schedule,
        boundary_bytes=4,
        buckets=none,
        bucket_bytes=none,
        data_parallel=False,
        world_size=schedule.num_ranks,
    )


def _unchecked(schedule: Schedule) -> Program:
    with pytest.MonkeyPatch.context() as patch:
        for check in ("check_no_deadlock", "check_channels"):
            patch.setattr(room, check, lambda _: None)
        return _lowered(schedule)


def _can_finish(program: Program) -> bool:
    """Whether rows need each other in no circle, if a transfer ends when both of its ends are posted."""
    own = _own(program)
    matches = matching_sends(program)
    other = {**matches, **{send: receive for receive, send in matches.items()}}
    needs: dict[tuple[int, int], set[tuple[int, int]]] = {}
    for rank, rs in enumerate(own):
        for i, row in enumerate(rs):
            needs[rank, i] = {(rank, i - 1)} if i else set()
            if row.kind is Kind.WAIT and (rank, row.target) in other:
                needs[rank, i].add(other[rank, row.target])
    try:
        TopologicalSorter(needs).prepare()
    except CycleError:
        return False
    return True


def _keeps_order(program: Program) -> bool:
    """Whether each channel's microbatches and stages are received as they are sent."""
    sent: dict[tuple[bool, int, int], list[tuple[int, int]]] = defaultdict(list)
    received: dict[tuple[bool, int, int], list[tuple[int, int]]] = defaultdict(list)
    for rank, rs in enumerate(_own(program)):
        for row in rs:
            forward = row.kind in (Kind.SEND_F, Kind.RECV_F)
            if row.kind in SENDS:
                sent[forward, rank, row.peer].append((row.stage, row.microbatch))
            if row.kind in RECEIVES:
                source = row.stage + (-1 if forward else 1)
                received[forward, row.peer, rank].append((source, row.microbatch))
    return sent == received


@given(interleavings())
def test_a_schedule_is_refused_exactly_when_it_cannot_run(schedule: Schedule) -> None:
    """Any order that one worker could run is lowered, unless rows need each other or messages cross."""
    program = _unchecked(schedule)
    if not _can_finish(program):
        event("circle")
        with pytest.raises(PlanError, match="the ranks of this schedule wait for each other: rank"):
            _lowered(schedule)
    elif not _keeps_order(program):
        event("crossed")
        with pytest.raises(PlanError, match="a channel delivers in the order sent: rank"):
            _lowered(schedule)
    else:
        event("lowered")
        assert _lowered(schedule) == program
