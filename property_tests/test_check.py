"""The checker agrees with an oracle that replays and explores every interleaving; garbage is refused."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import event, given
from hypothesis import strategies as st

from picotron.errors import PlanError
from picotron.planner.actions import PHASES, Action, Orders, cells, make_orders, parse_action, parse_cell
from picotron.planner.check import Verdict, check
from picotron.planner.order_waits import SEMANTICS, find_deadlock, order_waits
from picotron.planner.pipeline import orders_from_csv, schedule_from_csv
from picotron.planner.schedule_memory import ScheduleMemory
from picotron.planner.validity import Where, first_offence
from picotron.planner.waits import shortest_cycle
from property_tests import oracle_check as oracle
from property_tests.oracle_check import Case
from property_tests.strategies_orders import Shape, cells_text, draw_case

NUM_CASES = 10_000


def _agrees(case: Case, shape: Shape | None = None, *, peaks: bool = True) -> str:
    """Assert that the checker says of a case what the oracle says; returns what that is."""
    texts = cells_text(case)
    verdict = check(texts)
    if shape is not None:
        _same_offence(case, shape, make_orders(texts))
    if not oracle.is_valid(case):
        assert verdict.invalid is not None and not verdict.ok
        return "invalid"
    assert verdict.invalid is None, verdict.invalid
    runs = tuple(semantics for semantics in SEMANTICS if _runs(case, semantics, verdict))
    assert verdict.runs_under == runs
    assert verdict.ok == ("buffered" in runs)
    if peaks:
        _same_peaks(case, texts, verdict)
    return f"runs {runs[-1]}" if runs else "stuck"


def _same_offence(case: Case, shape: Shape, orders: Orders) -> None:
    """For the placement that the orders were made for, the first action to blame is the same."""
    stage_ranks = tuple(shape.stage_ranks)
    both_ways = shape.kind == "both"
    where = Where(stage_ranks=stage_ranks, num_microbatches=shape.num_microbatches, bidirectional=both_ways)
    offence, expected = first_offence(orders, where), oracle.first_wrong(case, shape.owner)
    if expected is None or offence is None:
        assert expected is None and offence is None, (expected, offence)
        return
    rank, position = expected
    assert offence.rank == rank
    assert offence.index == (-1 if position < 0 else orders.offsets[rank] + position)


def _runs(case: Case, semantics: str, verdict: Verdict) -> bool:
    """What the oracle says of one semantics; a deadlock's circle must be a shortest one of those it finds."""
    waits = oracle.waits_at_end(case, semantics)
    deadlock = verdict.deadlock(semantics)  # type: ignore[arg-type]
    assert (deadlock is None) == (not waits)
    if deadlock is not None:
        assert deadlock.cycle == shortest_cycle({rank: tuple(on) for rank, on in waits.items()})
        for wait, index in zip(deadlock.waits, deadlock.indices, strict=True):
            assert set(wait.absent) <= waits[wait.rank]
            assert verdict.orders.rank_of(index) == wait.rank
    return deadlock is None


def _same_peaks(case: Case, texts: list[list[str]], verdict: Verdict) -> None:
    """Counts and bytes, where sizes differ by stage and sends count."""
    num_stages = 1 + max(stage for own in case for cell in own for stage, _, _ in cell)
    activation, weight = [7 + 5 * s for s in range(num_stages)], [9 * (s + 1) for s in range(num_stages)]
    memory = ScheduleMemory(activation_bytes=tuple(activation), weight_bytes=tuple(weight))
    for semantics, boundary in (("buffered", 0), ("batched", 11)):
        found = check(texts, semantics=semantics, memory=memory, boundary_bytes=11).peaks  # type: ignore[arg-type]
        expected = oracle.peaks(case, activation, weight, boundary)
        assert [(peak.most_activations, peak.bytes) for peak in found] == expected
    for own, peak in zip(case, verdict.peaks, strict=True):
        assert (peak.activations, peak.weights) == oracle.most_held(own)


def test_the_checker_agrees_with_the_oracle_on_ten_thousand_cases() -> None:
    """Of each placement, valid and spoilt: validity, offence, deadlocks, circles; of a quarter, peaks."""
    rng = np.random.default_rng(20240)
    seen: Counter[str] = Counter()
    for number in range(NUM_CASES):
        shape, case = draw_case(rng)
        seen[_agrees(case, shape, peaks=number % 4 == 0)] += 1
        seen[shape.kind] += 1
    assert sum(seen[kind] for kind in ("line", "loop", "v", "both")) == NUM_CASES
    classes = ("invalid", "stuck", "runs buffered", "runs batched", "runs rendezvous")
    assert min(seen[name] for name in (*classes, "line", "loop", "v", "both")) >= 500, seen


@st.composite
def _cases(draw: st.DrawFn) -> Case:
    """AFAB on a line, a loop or a V, its cells then swapped and moved: it shrinks to what matters."""
    num_ranks, num_microbatches = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    line = list(range(num_ranks))
    stage_ranks = draw(st.sampled_from([line, line * 2, line + line[::-1]]))
    case: Case = [[] for _ in line]
    for stage, rank in enumerate(stage_ranks):
        case[rank] += [((stage, "F", index),) for index in range(num_microbatches)]
    for stage, rank in reversed(list(enumerate(stage_ranks))):
        for index in range(num_microbatches):
            split = draw(st.booleans())
            case[rank] += [((stage, phase, index),) for phase in ("IW" if split else "B")]
    for _ in range(draw(st.integers(0, 4))):
        own = case[draw(st.integers(0, num_ranks - 1))]
        own.insert(draw(st.integers(0, len(own))), own.pop(draw(st.integers(0, len(own) - 1))))
    return case


@given(_cases())
def test_the_checker_agrees_with_the_oracle(case: Case) -> None:
    """The same, on cases that shrink."""
    event(_agrees(case))


@given(_cases())
def test_what_runs_under_a_stricter_semantics_runs_under_a_weaker_one(case: Case) -> None:
    """Each semantics decided by itself, without the short cut of ``check``."""
    verdict = check(cells_text(case))
    if verdict.where is None or verdict.invalid:
        return
    waits = order_waits(verdict.orders, verdict.where)
    runs = [find_deadlock(verdict.orders, waits, semantics) is None for semantics in SEMANTICS]
    assert runs == sorted(runs, reverse=True)


_texts = st.text(st.sampled_from("0123459FBIW,;()\n\r\"' _OVERLAP²٣\x00\ud800é-")) | st.text()


@given(_texts)
def test_no_text_raises_anything_but_a_plan_error(text: str) -> None:
    """Actions, cells, CSV and schedules; what is read is what would be written."""
    for read in (parse_action, parse_cell, orders_from_csv, schedule_from_csv, check):
        try:
            found = read(text)
        except PlanError as error:
            assert str(error)
            continue
        if isinstance(found, Action):
            assert parse_action(str(found)) == found
        if isinstance(found, Orders):
            assert make_orders([cells(found, rank) for rank in range(len(found))]) == found
        if isinstance(found, Verdict):
            assert str(found)


@st.composite
def _any_orders(draw: st.DrawFn) -> Orders:
    """Columns that fit together and nothing else; of small numbers mostly."""
    sizes = draw(st.lists(st.integers(0, 5), max_size=4))
    count = sum(sizes)
    numbers = st.integers(-1, 3) | st.integers(-(2**31), 2**31 - 1)

    def column(values: st.SearchStrategy[int]) -> np.ndarray:
        found = draw(st.lists(values, min_size=count, max_size=count))
        return np.array(found, dtype=np.int64)

    return Orders(
        offsets=tuple(np.cumsum([0, *sizes]).tolist()),
        phase=column(st.integers(0, len(PHASES) - 1)),
        stage=column(numbers),
        microbatch=column(numbers),
        joined=column(st.integers(0, 1)),
    )


@given(_any_orders())
def test_any_columns_have_a_verdict(orders: Orders) -> None:
    """And a picture of it; what is not valid names a rank and an action that are there."""
    verdict = check(orders)
    assert str(verdict)
    if verdict.invalid:
        assert -1 <= verdict.invalid.rank < len(orders)
        assert -1 <= verdict.invalid.index < orders.num_actions
    texts = [cells(orders, rank) for rank in range(len(orders))]
    assert orders.joined.any() or sum(map(len, texts)) == orders.num_actions


@given(_cases())
def test_orders_round_trip(case: Case) -> None:
    """Orders are what their cells and their CSV parse to, pairs too."""
    texts = cells_text(case)
    orders = make_orders(texts)
    assert [cells(orders, rank) for rank in range(len(orders))] == texts
    assert make_orders(list(map(list, orders))) == orders
    assert orders_from_csv("".join(",".join(own) + "\n" for own in texts)) == orders
