"""Schedules as the papers draw them, and the splits of layers into stages."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest

from picotron.errors import PlanError
from picotron.planner.actions import Action, Phase, parse_action
from picotron.planner.catalogue import SCHEDULES, make_schedule
from picotron.planner.pipeline import Schedule, peak_microbatches, schedule_from_csv, schedule_to_csv
from picotron.planner.schedules import afab, one_f_one_b
from picotron.planner.split import rank_split, stage_split

ONE_RANK_A_STAGE = [name for name in sorted(SCHEDULES) if not SCHEDULES[name].bidirectional]
COMPLETE = "must run an F and a B, or an F, an I and a W, of each microbatch on each of its stages"
FIGURE = """\
0F0,0F1,0F2,0F3,0B0,0F4,0B1,0F5,0B2,0F6,0B3,0F7,0B4,0B5,0B6,0B7
1F0,1F1,1F2,1B0,1F3,1B1,1F4,1B2,1F5,1B3,1F6,1B4,1F7,1B5,1B6,1B7
2F0,2F1,2B0,2F2,2B1,2F3,2B2,2F4,2B3,2F5,2B4,2F6,2B5,2F7,2B6,2B7
3F0,3B0,3F1,3B1,3F2,3B2,3F3,3B3,3F4,3B4,3F5,3B5,3F6,3B6,3F7,3B7
"""


def test_one_f_one_b_is_the_papers_figure() -> None:
    """Four stages and eight microbatches: figure 4 (top) of Narayanan et al. 2021, arXiv:2104.04473."""
    assert str(one_f_one_b(4, 8)) == FIGURE


def test_afab_runs_all_forwards_first() -> None:
    """GPipe's order."""
    assert str(afab(2, 3)) == "0F0,0F1,0F2,0B0,0B1,0B2\n1F0,1F1,1F2,1B0,1B1,1B2\n"


def test_few_microbatches_leave_no_steady_state() -> None:
    """With fewer microbatches than stages the early ranks run AFAB."""
    assert str(one_f_one_b(3, 2)) == "0F0,0F1,0B0,0B1\n1F0,1F1,1B0,1B1\n2F0,2B0,2F1,2B1\n"


@pytest.mark.parametrize(("m", "expected"), [(8, [4, 3, 2, 1]), (2, [2, 2, 2, 1]), (1, [1, 1, 1, 1])])
def test_peak_microbatches_of_one_f_one_b(m: int, expected: list[int]) -> None:
    """Rank s of p holds min(m, p - s)."""
    assert [peak_microbatches(one_f_one_b(4, m), rank) for rank in range(4)] == expected


def test_peak_microbatches_of_afab() -> None:
    """All m on every rank."""
    assert [peak_microbatches(afab(3, 5), rank) for rank in range(3)] == [5, 5, 5]


def test_actions_print_and_parse() -> None:
    """Stage, phase, microbatch, as torch writes them."""
    action = Action(12, Phase.BACKWARD, 7)
    assert str(action) == "12B7"
    assert parse_action(" 12B7 ") == action


@pytest.mark.parametrize("text", ["", "F0", "0F", "0X0", "0F0,", "-1F0", "0f0", "0Z0", "9999999999F0"])
def test_what_is_no_action_is_refused(text: str) -> None:
    """The message shows what an action looks like."""
    with pytest.raises(PlanError, match=r"an action must look like 2F0 .*got"):
        parse_action(text)


def test_csv_round_trip() -> None:
    """A schedule is read back from its CSV, and idle cells are skipped."""
    schedule = one_f_one_b(2, 3)
    assert schedule_from_csv(schedule_to_csv(schedule), name="1f1b") == schedule
    padded = "0F0,,0F1,0B0,,0B1\n,1F0,1B0,1F1,1B1,\n"
    assert str(schedule_from_csv(padded)) == "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n"


@pytest.mark.parametrize("name", ONE_RANK_A_STAGE)
def test_torch_accepts_the_csv(name: str) -> None:
    """torch's own parser reads every cell back and its own validator finds each stage on its rank."""
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    schedule = make_schedule(name, 3, 5)
    text = schedule_to_csv(schedule)
    actions = {
        rank: [schedules._Action.from_str(cell) for cell in line.split(",")]
        for rank, line in enumerate(text.splitlines())
    }
    assert "".join(",".join(map(str, own)) + "\n" for own in actions.values()) == text
    found = schedules._validate_schedule(actions, 3, schedule.num_stages, 5)
    assert found == dict(enumerate(schedule.stage_ranks))


def _lowered_by_torch(orders: tuple[tuple[Action, ...], ...]) -> dict[int, list[str]]:
    """What each rank does as torch simulates it, one stage a rank: actions, sends and receives."""
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    actions = {
        rank: [schedules._Action.from_str(str(action)) for action in order]
        for rank, order in enumerate(orders)
    }
    where: dict[str, Any] = {"stage_to_rank": lambda stage: stage, "num_stages": len(orders)}
    simulated = schedules._simulate_comms_compute(schedules._add_send_recv(actions, **where), **where)
    return {rank: [str(action) for action in done if action] for rank, done in simulated.items()}


@pytest.mark.parametrize("name", ["afab", "1f1b", "zb-h1", "zb-h2"])
def test_torch_lowers_the_schedule_without_deadlock(name: str) -> None:
    """torch runs every action in our order, and adds a send and a receive for each crossing of a boundary."""
    schedule = make_schedule(name, 4, 8)
    done = _lowered_by_torch(schedule.orders)
    transfers = {rank: [cell for cell in cells if "_" in cell] for rank, cells in done.items()}
    for rank, order in enumerate(schedule.orders):
        assert [cell for cell in done[rank] if "_" not in cell] == [str(action) for action in order]
        assert sorted(transfers[rank]) == sorted(
            f"{rank}{kind}{microbatch}"
            for kind, present in (
                ("SEND_F", rank < 3),
                ("RECV_F", rank > 0),
                ("SEND_B", rank > 0),
                ("RECV_B", rank < 3),
            )
            for microbatch in range(8 if present else 0)
        )


def test_torch_finds_the_deadlock_of_ranks_that_wait_for_each_other() -> None:
    """Rank 0 waits for a backward before its second forward, which rank 1 wants before any backward."""
    deadlock = _schedule("0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1", num_microbatches=2)
    with pytest.raises(AssertionError, match="can't schedule sends/recvs"):
        _lowered_by_torch(deadlock.orders)


def _schedule(*lines: str, num_microbatches: int = 1, stage_ranks: tuple[int, ...] = ()) -> Schedule:
    orders = tuple(tuple(parse_action(cell) for cell in line.split()) for line in lines)
    return Schedule(
        name="mine",
        num_microbatches=num_microbatches,
        stage_ranks=stage_ranks or tuple(range(len(lines))),
        orders=orders,
    )


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("0F0 1B0",), "rank 0, position 1, action 1B0: this rank holds stages [0]"),
        (("0F0 0B0 0F1 0B1",), "rank 0, position 2, action 0F1: microbatch must be in [0, 1)"),
        (("0F0 0F0",), "rank 0, position 1, action 0F0: each action runs once"),
        (("0B0 0F0",), "rank 0, position 0, action 0B0: backward needs 0F0 before it"),
        (("0F0",), f"rank 0 {COMPLETE}: 0B0 is missing"),
        (("0F0 0I0",), f"rank 0 {COMPLETE}: 0W0 is missing"),
        (("0F0 0B0", "1F0"), f"rank 1 {COMPLETE}: 1B0 is missing"),
        (("0F0 0W0 0I0",), "rank 0, position 1, action 0W0: the weight gradient needs 0I0 before it"),
        (
            ("0F0 0I0 0B0 0W0",),
            "rank 0, position 2, action 0B0: backward is one B, or an I and a W, not both",
        ),
    ],
)
def test_schedules_that_are_not_complete_and_in_order_are_refused(
    lines: tuple[str, ...], message: str
) -> None:
    """The first offending action is named with its rank and position."""
    with pytest.raises(PlanError) as caught:
        _schedule(*lines)
    assert str(caught.value) == message


def test_every_rank_holds_a_stage() -> None:
    """A rank without a stage is refused."""
    with pytest.raises(PlanError, match=r"every rank must hold a stage: 2 ranks, stages on \(0,\)"):
        _schedule("0F0 0B0", "", stage_ranks=(0,))


def test_two_stages_on_a_rank_are_a_schedule() -> None:
    """Virtual stages: four stages on two ranks, read from their CSV."""
    schedule = schedule_from_csv("0F0,2F0,2B0,0B0\n1F0,3F0,3B0,1B0\n")
    assert schedule.stage_ranks == (0, 1, 0, 1)
    assert (schedule.num_stages, schedule.num_ranks) == (4, 2)
    assert peak_microbatches(schedule, 0) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a schedule needs at least one action, got none"),
        ("0F0,oops\n", "line 1: an action must look like 2F0 (stage, F, B, I or W, microbatch), got 'oops'"),
        (
            "0F0,0B0\n2F0,2B0\n",
            "rank 1, position 0, action 2F0: stages must be numbered from 0 without gaps, and there is no 1",
        ),
    ],
)
def test_texts_that_are_no_schedule_are_refused(text: str, message: str) -> None:
    """The message names the line and the cell."""
    with pytest.raises(PlanError) as caught:
        schedule_from_csv(text)
    assert str(caught.value) == message


def test_unknown_and_empty_schedules_are_refused() -> None:
    """Names are those of SCHEDULES; a schedule has ranks and microbatches."""
    with pytest.raises(
        PlanError, match="schedule must be one of afab, 1f1b, .*got 'GPipe'; did you mean afab?"
    ):
        make_schedule("GPipe", 2, 2)
    with pytest.raises(PlanError, match="at least one rank and one microbatch, got 0 and 2"):
        one_f_one_b(0, 2)
    with pytest.raises(PlanError, match="at least one rank and one microbatch, got 2 and 0"):
        afab(2, 0)


def _dearest(costs: list[float], split: tuple[int, ...], first: float, last: float) -> tuple[float, float]:
    """The dearest stage of a split, and the sum of its stages' squares."""
    rest, totals = list(costs), []
    for layers in split:
        totals.append(sum(rest[:layers]))
        rest = rest[layers:]
    totals[0] += first
    totals[-1] += last
    return max(totals), sum(total * total for total in totals)


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
@pytest.mark.parametrize(("first", "last"), [(0, 0), (3, 0), (0, 9), (2, 5)])
def test_stage_split_is_the_best_of_all(num_stages: int, first: int, last: int) -> None:
    """Against every way to cut seven layers of costs 1 to 7 (in some order) into stages."""
    costs = [3.0, 1.0, 7.0, 2.0, 6.0, 4.0, 5.0]
    every = [
        tuple(stop - start for start, stop in zip((0, *cuts), (*cuts, 7), strict=True))
        for cuts in combinations(range(1, 7), num_stages - 1)
    ]
    best = min(_dearest(costs, split, first, last) for split in every)
    found = stage_split(costs, num_stages, first=first, last=last)
    assert _dearest(costs, found, first, last) == best


def test_the_dearest_stage_counts_before_the_balance_of_the_rest() -> None:
    """1 | 4 | 2 2 | 1 3 costs 4 at most; 1 4 | 2 | 2 1 | 3 has the smaller squares but a stage of 5."""
    assert stage_split([1.0, 4.0, 2.0, 2.0, 1.0, 3.0], 4) == (1, 1, 2, 2)


def test_a_dear_head_gets_fewer_layers() -> None:
    """Eight equal layers and a head as dear as two: five layers before, three beside the head."""
    assert stage_split([1.0] * 8, 2, last=2.0) == (5, 3)
    assert stage_split([1.0] * 8, 4) == (2, 2, 2, 2)


@pytest.mark.parametrize("num_stages", [0, 4])
def test_every_stage_needs_a_layer(num_stages: int) -> None:
    """More stages than layers, or none, are refused."""
    with pytest.raises(PlanError, match=rf"stages must be in \[1, 3\], .* got {num_stages}; lower pp"):
        stage_split([1.0] * 3, num_stages)


def test_ranks_of_several_stages_are_balanced_together() -> None:
    """A V of two ranks and six layers: three each, though the stages' own split gives rank 0 but two."""
    assert stage_split([1.0] * 6, 4, last=0.5) == (1, 2, 2, 1)
    sizes = rank_split([1.0] * 6, (0, 1, 1, 0), last=0.5)
    assert sizes[0] + sizes[3] == sizes[1] + sizes[2] == 3
    assert rank_split([1.0] * 8, (0, 1, 2, 3), last=1.5) == stage_split([1.0] * 8, 4, last=1.5)
