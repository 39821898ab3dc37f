"""The checker on schedules and on orders that are none: what it decides, and how it says so."""

from __future__ import annotations

import time
import tracemalloc
from typing import Any

import pytest

from picotron.errors import PlanError
from picotron.planner.actions import Action, Phase, make_orders
from picotron.planner.catalogue import SCHEDULES, make_schedule
from picotron.planner.check import Verdict, check
from picotron.planner.order_grid import orders_grid
from picotron.planner.order_waits import _any_cycle
from picotron.planner.schedule_memory import ScheduleMemory, unit_memory
from picotron.planner.schedules import afab, one_f_one_b
from picotron.planner.zero_bubble import zb_h1, zb_h2

STUCK = "0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n"  # rank 1 wants a second forward before the first backward

RUNS_UNDER = {
    "afab": ("buffered", "batched", "rendezvous"),
    "1f1b": ("buffered", "batched"),
    "zb-h1": ("buffered", "batched"),
}


@pytest.mark.parametrize("name", sorted(set(SCHEDULES) - {"v-min"}))  # that depends on the size
@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(2, 4), (4, 8), (6, 18)])
def test_what_the_named_schedules_run_under(name: str, num_ranks: int, num_microbatches: int) -> None:
    """All run buffered; batched needs neighbours that trade at once, and only AFAB runs under rendezvous."""
    verdict = check(make_schedule(name, num_ranks, num_microbatches))
    assert verdict.ok
    assert verdict.runs_under == RUNS_UNDER.get(name, ("buffered",))


def test_one_microbatch_runs_under_all() -> None:
    """There is nothing to be in each other's way."""
    assert check(one_f_one_b(4, 1)).runs_under == ("buffered", "batched", "rendezvous")


def test_one_f_one_b_deadlocks_under_rendezvous() -> None:
    """The last rank sends its first gradient while the rank before sends its second activation."""
    verdict = check(one_f_one_b(4, 8), semantics="rendezvous")
    deadlock = verdict.deadlock("rendezvous")
    assert deadlock is not None and not verdict.ok
    assert deadlock.cycle == (2, 3, 2)
    assert verdict.offence is not None
    assert verdict.offence.message == (
        "rank 2, position 1, action 2F1: the ranks wait for each other (rendezvous): 2 -> 3 -> 2: "
        "rank 2 waits for rank 3 to take 2F1 (position 1); rank 3 waits for rank 2 to take 3B0 (position 1)"
    )


def test_a_deadlock_shows_the_circle_and_every_cell_of_it() -> None:
    """Rank 0 waits for a backward before its second forward, which rank 1 wants before any backward."""
    verdict = check(STUCK)
    assert verdict.runs_under == ()
    assert str(verdict).splitlines() == [
        "valid: 2 ranks, 2 stages, 2 microbatches, 8 actions",
        *(
            f"{semantics}: deadlock 0 -> 1 -> 0: rank 0 waits for 1B0 of rank 1 (position 1, 0B0); "
            "rank 1 waits for 0F1 of rank 0 (position 1, 1F1)"
            for semantics in ("buffered", "batched", "rendezvous")
        ),
        "memory: most on rank 1 (2 A + 0 A_W); A+A_W by rank: 1+0, 2+0",
        "rank 0:  0F0 >0B0< 0F1  0B1",
        "rank 1:  1F0 >1F1< 1B0  1B1",
    ]


def test_a_rank_can_wait_for_itself() -> None:
    """Two stages of one rank in the wrong order need no second rank for a deadlock."""
    deadlock = check("1F0,0F0,1B0,0B0\n").deadlock("buffered")
    assert deadlock is not None
    assert str(deadlock) == "0 -> 0: rank 0 waits for 0F0 of its own, which comes later (position 0, 1F0)"


def test_a_batch_waits_for_all_of_its_messages() -> None:
    """Rank 1 has 0F2 for 1F2, but goes on only when rank 0, which wants 1F2 first, takes 1F1 too."""
    orders = "0F0,0F1,0F2,2F0,2F2,2F1,2B0,2B1,2B2,0B0,0B1,0B2\n1F0,1F1,1F2,1B0,1B1,1B2\n"
    verdict = check(orders, semantics="batched")
    deadlock = verdict.deadlock("batched")
    assert verdict.runs_under == ("buffered",)
    assert deadlock is not None
    assert str(deadlock) == (
        "0 -> 1 -> 0: rank 0 waits for 1F2 of rank 1 (position 4, 2F2); "
        "rank 1 waits for rank 0 to take 1F1 (position 1)"
    )


def test_a_pair_receives_and_sends_for_both_halves() -> None:
    """Two ranks trade pairs: together they run batched, one after the other under rendezvous they do not."""
    pairs = [
        ["0F0", "0F1", "(0F2;0B0)OVERLAP_F_B", "0B1", "0B2"],
        ["1F0", "1B0", "1F1", "1B1", "1F2", "1B2"],
    ]
    assert check(pairs).runs_under == ("buffered", "batched")


@pytest.mark.parametrize(
    ("text", "message", "grid"),
    [
        (
            "0F0,0F1,0B0\n1F0,1B0,1F1,1B1\n",
            "rank 0 must run an F and a B, or an F, an I and a W, of each microbatch on each of its stages: "
            "0B1 is missing",
            "rank 0:  0F0  0F1  0B0 >?<\nrank 1:  1F0  1B0  1F1  1B1",
        ),
        (
            "0F0,0B0\n1F0,0F0,1B0\n",
            "rank 1, position 1, action 0F0: this rank holds stages [1]",
            "rank 0:  0F0  0B0\nrank 1:  1F0 >0F0< 1B0",
        ),
        (
            "0F0,(0F1;0B1)OVERLAP_F_B,0B0\n",
            "rank 0, position 1, action 0F1: a pair that overlaps is an F and then a B or an I, "
            "of another stage or microbatch",
            "rank 0:  0F0 >(0F1;0B1)OVERLAP_F_B< 0B0",
        ),
        (
            "0F0,0B0\n\n",
            "every rank must hold a stage: rank 1 has none",
            "rank 0:  0F0  0B0\nrank 1: >?<",
        ),
        (
            "0F0,0B0,2F0,2B0\n",
            "rank 0, position 2, action 2F0: stages must be numbered from 0 without gaps, and there is no 1",
            "rank 0:  0F0  0B0 >2F0< 2B0",
        ),
        (
            "0F1,0B1\n",
            "rank 0, position 0, action 0F1: microbatches must be numbered from 0 without gaps, "
            "and there is no 0",
            "rank 0: >0F1< 0B1",
        ),
        ("", "a schedule needs at least one action, got none", ""),
    ],
)
def test_an_offence_is_named_and_marked(text: str, message: str, grid: str) -> None:
    """The first offending action with its rule, and its cell in the grid; nothing else is decided."""
    verdict = check(text)
    assert not verdict.ok
    assert verdict.runs_under == () and verdict.peaks == ()
    assert str(verdict) == f"not valid: {message}\n{grid}"
    with pytest.raises(PlanError) as caught:
        verdict.raise_if_bad()
    assert str(caught.value) == f"{message}\n{grid}"


def test_of_both_ways_the_spoilt_action_is_blamed() -> None:
    """DualPipe's microbatches from the other end are at home; only what was moved is not."""
    orders = [[str(action) for action in own] for own in make_schedule("dualpipe", 4, 8).orders]
    assert check(orders).where == make_schedule("dualpipe", 4, 8).where
    orders[0][0], orders[1][0] = orders[1][0], orders[0][0]
    verdict = check(orders)
    assert verdict.where is not None and verdict.where.bidirectional
    assert verdict.offence is not None and verdict.offence.rank == 0
    assert "position 0, action 1F0: this rank holds stages [0] for microbatch 0" in verdict.offence.message


def test_peaks_of_the_zero_bubble_schedules() -> None:
    """ZB-H1 holds (p - s) A and s A_W; ZB-H2 2(p - s) - 1 and 2s (Qi et al. 2023, arXiv:2401.10241)."""
    assert [(p.activations, p.weights) for p in check(zb_h1(4, 12)).peaks] == [(4, 0), (3, 1), (2, 2), (1, 3)]
    assert [(p.activations, p.weights) for p in check(zb_h2(4, 12)).peaks] == [(7, 0), (5, 2), (3, 4), (1, 6)]


def test_peaks_in_bytes_count_sends_where_they_block() -> None:
    """The last rank sends no activation; a rank of 1F1B holds most after an F that it sends on."""
    sizes: dict[str, Any] = {"memory": unit_memory(4, activation=100, weight=30), "boundary_bytes": 7}
    batched = check(one_f_one_b(4, 8), semantics="batched", **sizes).peaks
    assert [peak.bytes for peak in batched] == [407, 307, 207, 100]
    assert [(peak.held_bytes, peak.sent_bytes) for peak in batched[2:]] == [(200, 7), (100, 0)]
    assert [peak.bytes for peak in check(one_f_one_b(4, 8), **sizes).peaks] == [400, 300, 200, 100]


def test_sizes_decide_where_the_peak_is() -> None:
    """One microbatch on stage 1 outweighs two on stage 0; and an I may leave more than an F."""
    orders = "0F0,0F1,1F0,1B0,0B0,1F1,1B1,0B1\n"
    memory = ScheduleMemory(activation_bytes=(10, 50), weight_bytes=(0, 0))
    (peak,) = check(orders, memory=memory).peaks
    assert (peak.index, peak.activations, peak.bytes) == (2, 3, 70)
    grown = ScheduleMemory(activation_bytes=(10,), weight_bytes=(25,))
    (peak,) = check("0F0,0I0,0F1,0W0,0I1,0W1\n", memory=grown).peaks
    assert (peak.index, peak.activations, peak.weights, peak.bytes) == (2, 1, 1, 35)


def test_the_limit_blames_the_first_rank_above_it() -> None:
    """The peak of that rank is marked."""
    verdict = check(afab(2, 3), memory=unit_memory(2, activation=10), limit_bytes=29)
    assert verdict.offence is not None
    assert verdict.offence.message == (
        "rank 0, position 2, action 0F2: a rank may hold 29 bytes, got 30 (3 A + 0 A_W)"
    )
    assert ">0F2<" in str(verdict) and "memory: above 29 bytes" in str(verdict)
    assert check(afab(2, 3), memory=unit_memory(2, activation=10), limit_bytes=30).ok


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"semantics": "tcp"}, "semantics must be one of buffered, batched, rendezvous, got 'tcp'"),
        ({"limit_bytes": 5}, "limit_bytes must be an integer, given beside memory, got 5"),
        ({"memory": unit_memory(3)}, "memory must be that of 2 stages, got 3"),
        ({"boundary_bytes": -1}, r"boundary_bytes must be an integer in \[0, \d+\], got -1"),
        ({"boundary_bytes": 1.5}, r"boundary_bytes must be an integer in \[0, \d+\], got 1.5"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments: dict[str, Any], message: str) -> None:
    """The message has the rule and the value."""
    with pytest.raises(PlanError, match=message):
        check(one_f_one_b(2, 2), **arguments)


@pytest.mark.parametrize("what", [5, None, b"0F0", [5], [None], "0F0,x", [["0F0"], "0F0"], [[None]]])
def test_what_is_no_order_at_all_is_refused(what: object) -> None:
    """PlanError, and no other."""
    with pytest.raises(PlanError):
        check(what)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    ["0F2000000000", "2147483647F2147483647", "0F0,0B0\n1F2147483647,1B2147483647", "\n" * 100_000 + "0F0"],
)
def test_numbers_that_no_memory_holds_are_refused_at_once(text: str) -> None:
    """What is allocated follows the actions that are there, not their numbers."""
    tracemalloc.start()
    begin = time.process_time()
    try:
        assert not check(text).ok
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()
    assert time.process_time() - begin < 5.0


def test_a_circle_of_very_many_ranks_is_found_in_linear_time() -> None:
    """Every rank wants of the rank before what it has not begun: 3,000 ranks, and each waits for the next."""
    num_ranks = 3000
    orders = [[f"{s}F0", f"{s}F1", f"{s}B0", f"{s}B1"] for s in range(num_ranks)]
    orders[-1] = [f"{num_ranks - 1}{cell}" for cell in ("F0", "B0", "F1", "B1")]
    orders[0] = ["0F0", "0B0", "0F1", "0B1"]
    begin = time.process_time()
    verdict = check(orders)
    assert not verdict.ok
    text = str(verdict)
    assert len(text) < 20_000
    assert time.process_time() - begin < 5.0


def test_any_cycle_is_one() -> None:
    """It begins where the path comes back, not at its tail."""
    assert _any_cycle({5: (0,), 0: (1,), 1: (2, 0), 2: (1,)}) == (1, 2, 1)


def test_a_large_schedule_is_checked_in_under_a_second() -> None:
    """64 ranks and 1024 microbatches, 131,072 actions (about 0.1 s)."""
    schedule = one_f_one_b(64, 1024)
    begin = time.process_time()
    verdict = check(schedule.orders)
    assert time.process_time() - begin < 1.0
    assert verdict.runs_under == ("buffered", "batched")
    assert [peak.activations for peak in verdict.peaks] == list(range(64, 0, -1))


def test_forms_of_the_same_orders_have_the_same_verdict() -> None:
    """A schedule, its columns, its actions, its texts and its CSV."""
    schedule = zb_h1(3, 4)
    verdicts = [
        check(form)
        for form in (
            schedule,
            schedule.orders,
            [list(own) for own in schedule.orders],
            [[str(action) for action in own] for own in schedule.orders],
            str(schedule),
        )
    ]
    assert len(set(map(repr, verdicts))) == 1
    assert all(verdict == verdicts[0] for verdict in verdicts)
    assert isinstance(verdicts[0], Verdict)


def test_a_verdict_that_is_good_raises_nothing() -> None:
    """And its lines end with the memory."""
    verdict = check(afab(12, 2))
    verdict.raise_if_bad()
    assert str(verdict).splitlines() == [
        "valid: 12 ranks, 12 stages, 2 microbatches, 48 actions",
        "buffered: no deadlock",
        "batched: no deadlock",
        "rendezvous: no deadlock",
        "memory: most on rank 0 (2 A + 0 A_W); A+A_W by rank: " + ", ".join(["2+0"] * 8) + ", ...",
    ]


def test_a_wide_grid_is_cut_round_the_marked_cell() -> None:
    """Within the width, with an ellipsis where something is left out, and the mark in sight."""
    orders = afab(20, 100).orders
    text = orders_grid(orders, rank=10, index=orders.offsets[10] + 90, width=60, height=5)
    lines = text.splitlines()
    assert lines[0] == lines[-1] == "…"
    assert [line[: line.index(":")] for line in lines[1:-1]] == [f"rank {r}" for r in (8, 9, 10, 11, 12)]
    assert all(len(line) <= 60 for line in lines)
    assert all(line[7:9].endswith("…") and line.endswith("…") for line in lines[1:-1])
    assert lines[3].count(">") == 1 and ">10F90<" in lines[3]
    assert orders_grid(orders, rank=10, index=orders.offsets[10], width=60).count("…\n") > 0


def test_the_marked_cell_is_shown_however_narrow() -> None:
    """A width of nothing leaves that cell."""
    orders = make_orders([["0F0", "0F1", "(0F2;0B0)OVERLAP_F_B", "0B1", "0B2"]])
    assert orders_grid(orders, rank=0, index=3, width=0) == "rank 0:…>(0F2;0B0)OVERLAP_F_B<…"


def test_an_unmarked_grid_shows_the_beginning() -> None:
    """Nothing is marked without an index."""
    assert orders_grid(make_orders([[Action(0, Phase.FORWARD, 0)], []])) == "rank 0:  0F0\nrank 1:"
