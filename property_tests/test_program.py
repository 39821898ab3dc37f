"""Theorems about lowered programs: complete, in order, matched, and free of circles."""

from __future__ import annotations

from hypothesis import given

from picotron.planner.plan import TrainingPlan
from picotron.planner.program import (
    COMPUTE,
    RECEIVES,
    SENDS,
    Kind,
    Program,
    Row,
    execution_order,
    matching_sends,
    payload_bytes,
    rows,
)
from property_tests.strategies import DENSE, SPARSE, plans

EVERY = DENSE + SPARSE


def _own(program: Program) -> list[tuple[Row, ...]]:
    return [rows(program, rank) for rank in range(program.num_ranks)]


@given(plans(families=EVERY))
def test_every_action_is_computed_in_the_schedules_order(made: TrainingPlan) -> None:
    """The computing rows of a rank are its schedule's actions, one for one."""
    for order, own in zip(made.schedule.orders, _own(made.program()), strict=True):
        assert [str(row) for row in own if row.kind in COMPUTE] == [str(action) for action in order]


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
def test_every_partial_gradient_is_summed(made: TrainingPlan) -> None:
    """Each bucket over each of its groups, in order, the first inside the last backward where it is ready."""
    program = made.program()
    for rank, own in enumerate(_own(program)):
        for stage in made.rank_stages(rank):
            _check_sums(made, program, own, stage)
        kinds = [row.kind for row in own]
        assert kinds[-2:] == [Kind.NORM, Kind.UPDATE]
        assert kinds.count(Kind.COUNT) == (made.num_stages - 1 in made.rank_stages(rank))


def _check_sums(made: TrainingPlan, program: Program, own: tuple[Row, ...], stage: int) -> None:
    ends = (Kind.BACKWARD, Kind.BACKWARD_WEIGHT)
    last_backward = max(i for i, row in enumerate(own) if row.kind in ends and row.stage == stage)
    for bucket, size in zip(made.stage_buckets[stage], made.bucket_payload_bytes(stage), strict=True):
        here = Kind.REDUCE, stage, bucket.index
        sums = [(i, row) for i, row in enumerate(own) if (row.kind, row.stage, row.part) == here]
        assert tuple(program.groups[row.group] for _, row in sums) == bucket.partial
        assert {row.bytes for _, row in sums} <= {size}
        for number, (i, row) in enumerate(sums):
            if number == 0:
                assert (row.anchor_row, row.anchor_segment) == (last_backward, bucket.ready_segment)
            else:
                assert row.anchor_row == -1
                assert own[i - 1] == Row(Kind.WAIT, stage, part=bucket.index, target=sums[number - 1][0])


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
        inside = [(own[i].anchor_row, -own[i].anchor_segment) for i in order if own[i].anchor_row >= 0]
        assert inside == sorted(inside)


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
