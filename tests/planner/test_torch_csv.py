"""Torch's text with communication, written and read, by torch's own parser, validator and simulation."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from picotron.errors import PlanError
from picotron.planner.catalogue import SCHEDULES, make_schedule
from picotron.planner.lower import with_transfers
from picotron.planner.passes import with_offloading, with_unsharding
from picotron.planner.pipeline import (
    Schedule,
    orders_from_csv,
    schedule_from_csv,
    schedule_of,
    schedule_to_csv,
)
from picotron.planner.schedules import one_f_one_b
from picotron.planner.torch_csv import orders_from_program_csv, program_to_csv

ONE_RANK_A_STAGE = sorted(name for name, row in SCHEDULES.items() if not row.bidirectional)
PEERS = {
    "afab": "GPipe",
    "1f1b": "1F1B",
    "interleaved": "Interleaved1F1B",
    "bfs": "LoopedBFS",
    "interleaved-zb": "InterleavedZeroBubble",
    "zb-v": "ZBVZeroBubble",
    "dualpipe-v": "DualPipeV",
}


def _torch() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("torch.distributed.pipelining.schedules")


def _parsed(text: str) -> dict[int, list[Any]]:
    """As torch's runtime loads the file."""
    return {
        rank: [_torch()._Action.from_str(cell) for cell in line.split(",")]
        for rank, line in enumerate(text.splitlines())
    }


def _simulated(schedule: Schedule, text: str) -> dict[int, list[str]]:
    """What torch's simulation runs.

    It knows no UNSHARD, RESHARD, REDUCE_GRAD nor pairs: those are left out and taken apart.
    """
    plain = {
        rank: [
            half
            for action in own
            if action.computation_type.value not in ("UNSHARD", "RESHARD", "REDUCE_GRAD")
            for half in action.sub_actions or (action,)
        ]
        for rank, own in _parsed(text).items()
    }
    done = _torch()._simulate_comms_compute(
        plain, lambda stage: schedule.stage_ranks[stage], schedule.num_stages
    )
    return {rank: [str(action) for action in own if action is not None] for rank, own in done.items()}


def test_two_stages_two_microbatches_cell_by_cell() -> None:
    """1F1B on two ranks: receives where they are used, sends behind, gradients reduced at the end."""
    assert program_to_csv(with_transfers(one_f_one_b(2, 2), 4)) == (
        "0F0,0SEND_F0,0F1,0SEND_F1,0RECV_B0,0B0,0RECV_B1,0B1,0REDUCE_GRAD\n"
        "1RECV_F0,1F0,1B0,1SEND_B0,1RECV_F1,1F1,1B1,1SEND_B1,1REDUCE_GRAD\n"
    )


def test_a_pair_is_one_cell_and_parameters_are_gathered() -> None:
    """UNSHARD and RESHARD carry the stage; both halves of a pair receive before and send behind it."""
    pair = schedule_from_csv("0F0,0F1,0B0,0B1\n1F0,(1F1;1B0)OVERLAP_F_B,1B1\n2F0,2B0,2F1,2B1\n")
    program = with_unsharding(with_transfers(pair, 4), [1, 1, 1], weights_use=True)
    assert program_to_csv(program).splitlines()[1] == (
        "1UNSHARD,1RECV_F0,1F0,1SEND_F0,1RECV_F1,1RECV_B0,(1F1;1B0)OVERLAP_F_B,1SEND_F1,1SEND_B0,"
        "1RECV_B1,1B1,1SEND_B1,1REDUCE_GRAD,1RESHARD"
    )


def test_what_one_rank_sends_another_is_received_in_that_order() -> None:
    """Torch has one channel a pair of ranks: a receive that is used late stands before one sent after it."""
    v = schedule_from_csv("0F0,0F1,3F0,3B0,3F1,3B1,0B0,0B1\n1F0,2F0,2B0,1F1,2F1,1B0,2B1,1B1\n")
    assert program_to_csv(with_transfers(v, 4)).splitlines()[1] == (
        "1RECV_F0,1F0,2F0,2SEND_F0,1RECV_F1,2RECV_B0,2B0,1F1,2F1,2SEND_F1,1B0,1SEND_B0,"
        "2RECV_B1,2B1,2REDUCE_GRAD,1B1,1SEND_B1,1REDUCE_GRAD"
    )
    crossed = schedule_from_csv("0F0,0F1,0B0,0B1\n1F1,1F0,1B0,1B1\n")
    line = program_to_csv(with_transfers(crossed, 4)).splitlines()[1]
    assert line == "1RECV_F0,1RECV_F1,1F1,1F0,1B0,1SEND_B0,1B1,1SEND_B1,1REDUCE_GRAD"


@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(2, 4), (3, 6), (4, 8)])
@pytest.mark.parametrize("name", ONE_RANK_A_STAGE)
def test_torch_runs_every_schedule(name: str, num_ranks: int, num_microbatches: int) -> None:
    """Torch reads every cell, finds the schedule valid, and its simulation comes to the end of every rank."""
    schedule = make_schedule(name, num_ranks, num_microbatches)
    text = program_to_csv(with_transfers(schedule, 4))
    actions = _parsed(text)
    assert "".join(",".join(map(str, own)) + "\n" for own in actions.values()) == text
    found = _torch()._validate_schedule(actions, num_ranks, schedule.num_stages, num_microbatches)
    assert found == dict(enumerate(schedule.stage_ranks))
    computed = _parsed(schedule_to_csv(schedule))
    assert _torch()._validate_schedule(computed, num_ranks, schedule.num_stages, num_microbatches) == found
    done = _simulated(schedule, text)
    plain = {rank: [half for a in own for half in a.sub_actions or (a,)] for rank, own in computed.items()}
    for rank, own in plain.items():
        assert [cell for cell in done[rank] if "_" not in cell] == list(map(str, own))
    assert orders_from_program_csv(text) == schedule.orders == orders_from_csv(schedule_to_csv(schedule))


@pytest.mark.parametrize("name", ONE_RANK_A_STAGE)
def test_receives_are_in_the_order_of_sends(name: str) -> None:
    """From one rank to another, forward and backward alike: torch tells messages by nothing else."""
    schedule = make_schedule(name, 4, 8)
    lines = program_to_csv(with_transfers(schedule, 4)).splitlines()
    sent: dict[tuple[int, int], list[str]] = {}
    received: dict[tuple[int, int], list[str]] = {}
    for rank, line in enumerate(lines):
        for cell in line.split(","):
            stage, _, rest = cell.partition("SEND_" if "SEND" in cell else "RECV_")
            if not rest:
                continue
            step = 1 if (rest[0] == "F") == ("SEND" in cell) else -1
            peer = schedule.stage_ranks[int(stage) + step]
            if "SEND" in cell:
                sent.setdefault((rank, peer), []).append(f"{int(stage) + step}{rest}")
            else:
                received.setdefault((peer, rank), []).append(f"{stage}{rest}")
    assert sent == received and sent


def _torch_orders(name: str, num_ranks: int, num_microbatches: int, stages: int) -> list[list[str]]:
    """The orders of torch's own class. Its 1F1B numbers the forwards of the last rank from 1."""
    _torch()
    from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

    per_rank = stages if stages > 1 else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        orders = get_schedule_ops(PEERS[name], num_ranks, num_microbatches, per_rank)
    cells = [["" if action is None else str(action) for action in own] for own in orders]
    if name == "1f1b":
        last = cells[-1]
        cells[-1] = [f"{c.split('F')[0]}F{int(c.split('F')[1]) - 1}" if "F" in c else c for c in last]
    return cells


@pytest.mark.parametrize("name", PEERS)
def test_torchs_own_schedules_are_read(name: str) -> None:
    """Orders of each of torch's classes are a schedule here too, its idle cells and pairs included."""
    stages = make_schedule(name, 4, 8).num_stages // 4
    cells = _torch_orders(name, 4, 8, stages)
    text = "".join(",".join(own) + "\n" for own in cells)
    read = schedule_of(orders_from_program_csv(text))
    assert read.num_microbatches == 8 and read.num_stages == 4 * stages
    assert read.stage_ranks == make_schedule(name, 4, 8).stage_ranks


@pytest.mark.parametrize("name", PEERS)
def test_what_torch_lowers_is_read(name: str) -> None:
    """Torch's own sends, receives, gatherings and sums around our orders: all of it is dropped again."""
    schedule, torch = make_schedule(name, 4, 8), _torch()
    actions = _parsed(schedule_to_csv(schedule))
    lowered = {
        rank: torch._add_reduce_grad(torch._add_unshard_reshard(own), 8) for rank, own in actions.items()
    }
    lowered = torch._add_send_recv(lowered, schedule.stage_ranks.__getitem__, schedule.num_stages)
    text = "".join(",".join(map(str, own)) + "\n" for own in lowered.values())
    assert orders_from_program_csv(text) == schedule.orders


def test_two_copies_of_a_stage_are_refused_by_name() -> None:
    """DualPipe has two ranks for each stage, for which torch has no word."""
    program = with_transfers(make_schedule("dualpipe", 2, 4), 4)
    with pytest.raises(PlanError, match="two copies of each, as DualPipe does; DualPipeV has one"):
        program_to_csv(program)


def test_what_torch_has_no_action_for_is_refused() -> None:
    """Copies to the host are Picotron's own."""
    program = with_offloading(with_transfers(one_f_one_b(4, 8), 4), [1] * 4)
    with pytest.raises(PlanError, match="torch's text has no OFFLOAD; leave it out"):
        program_to_csv(program)


GOOD = ["0F0,0SEND_F0,0RECV_B0,0B0,0REDUCE_GRAD", "1RECV_F0,1F0,1B0,1SEND_B0"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("0F0,0SEND_F0", "0SEND_F0,0F0", "line 1: 0SEND_F0 must stand after 0F0 on its line"),
        ("1RECV_F0,1F0", "1F0,1RECV_F0", "line 2: 1RECV_F0 must stand before 1F0 on its line"),
        ("0SEND_F0,", "", "line 1: 0SEND_F0 is missing"),
        ("1RECV_F0,", "", "line 2: 1RECV_F0 is missing"),
        ("0SEND_F0", "0SEND_F0,0SEND_F0", "line 1: 0SEND_F0 must stand once"),
        ("0SEND_F0", "0SEND_F1", "line 1: 0SEND_F1 must stand after 0F1 on its line"),
        (",1SEND_B0", ",1SEND_B0,1SEND_F0", "line 2: 1SEND_F0 has no other end"),
        ("0B0,0REDUCE_GRAD", "0REDUCE_GRAD,0B0", "line 1: 0REDUCE_GRAD must stand after 0B0"),
        ("0REDUCE_GRAD", "0REDUCE_GRAD,0REDUCE_GRAD", "line 1: 0REDUCE_GRAD must stand once"),
        ("0F0", "0RESHARD,0F0", "line 1: UNSHARD and RESHARD of stage 0 must take turns"),
        ("0F0", "0UNSHARD,0UNSHARD,0F0", "line 1: UNSHARD and RESHARD of stage 0 must take turns"),
        ("0SEND_F0", "0SEND_F", "line 1: an action must look like 2F0 .*got '0SEND_F'"),
        ("1B0", "1X0", "line 2: an action must look like 2F0 .*got '1X0'"),
    ],
)
def test_communication_without_sense_is_refused(old: str, new: str, message: str) -> None:
    """Line and cell are named."""
    text = "\n".join(GOOD)
    assert [len(own) for own in orders_from_program_csv(text)] == [2, 2]
    with pytest.raises(PlanError, match=f"^{message}"):
        orders_from_program_csv(text.replace(old, new, 1))
