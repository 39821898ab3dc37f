"""Which action breaks which rule first, and where stages are as the orders tell."""

from __future__ import annotations

import numpy as np
import pytest

from picotron.planner.actions import make_orders
from picotron.planner.catalogue import SCHEDULES, make_schedule
from picotron.planner.validity import (
    Offence,
    Where,
    first_offence,
    held_stages,
    placement,
    positions,
    rank_column,
    sources,
)

LINE = Where(stage_ranks=(0, 1), num_microbatches=2)
BOTH = Where(stage_ranks=(0, 1), num_microbatches=2, bidirectional=True)


def _offence(where: Where, *lines: str) -> tuple[int, int, str] | None:
    """Rank, index and rule of the first offence."""
    offence = first_offence(make_orders([line.split() for line in lines]), where)
    return None if offence is None else (offence.rank, offence.index, offence.message.split(": ", 1)[1])


FIRST, SECOND = "0F0 0F1 0B0 0B1", "1F0 1F1 1B0 1B1"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ((FIRST, SECOND), None),
        ((FIRST, "1F0 1I0 1F1 1B1 1W0"), None),
        ((FIRST, "1F0 0F1 1F1 1B0 1B1"), (1, 5, "this rank holds stages [1]")),
        ((FIRST, "1F0 1F0 1F1 1B0 1B1"), (1, 5, "each action runs once")),
        (("0F0 0B1 0F1 0B0", SECOND), (0, 1, "backward needs 0F1 before it")),
        (("0F0 0I0 0F1 0B0 0W0 0B1", SECOND), (0, 3, "backward is one B, or an I and a W, not both")),
        (("0F0 0B0 0F1 0W0 0I0 0B1", SECOND), (0, 3, "backward is one B, or an I and a W, not both")),
        (("0F0 0W0 0F1 0I0 0B1", SECOND), (0, 1, "the weight gradient needs 0I0 before it")),
        (("0F0 0W1 0F1 0I1 0B0", SECOND), (0, 1, "backward needs 0F1 before it")),
        ((FIRST, "1F0 1F2 1F1 1B0 1B1"), (1, 5, "microbatch must be in [0, 2)")),
        ((FIRST, "1F0 2F0 1F1 1B0 1B1"), (1, 5, "this rank holds stages [1]")),
        ((FIRST + " 0F0", "1F0 1F2 1F1 1B0 1B1"), (0, 4, "each action runs once")),
    ],
)
def test_the_first_action_that_breaks_a_rule(
    lines: tuple[str, ...], expected: tuple[int, int, str] | None
) -> None:
    """By rank and position, whatever the rule."""
    assert _offence(LINE, *lines) == expected


def test_what_is_missing_is_named_last() -> None:
    """Nothing is out of place, but a W never comes; of several, the first stage and microbatch."""
    assert _offence(LINE, FIRST, "1F0 1I0 1F1 1I1") == (1, -1, "1W0 is missing")


def test_of_few_actions_the_number_is_named() -> None:
    """Fewer than there should be forwards: the first rank that is too short."""
    offence = first_offence(make_orders([["0F0", "0B0"], ["1F0"]]), LINE)
    assert offence is not None and (offence.rank, offence.index) == (0, -1)
    assert offence.message.endswith("at least 4 actions, got 2")
    odd = Where(stage_ranks=(0, 1), num_microbatches=1, bidirectional=True)
    offence = first_offence(make_orders([["0F0"], []]), odd)
    assert offence is not None and offence.message.endswith("at least 2 actions, got 1")


@pytest.mark.parametrize(
    "joined", ["0B0 (0F1;1F0)OVERLAP_F_B", "(0F1;0B1)OVERLAP_F_B", "(0B0;0F1)OVERLAP_F_B"]
)
def test_pairs_are_a_forward_and_a_backward_of_another(joined: str) -> None:
    """Two forwards, one microbatch with itself, or the wrong way round do not overlap."""
    where = Where(stage_ranks=(0, 0), num_microbatches=2)
    offence = _offence(where, f"0F0 {joined} 0B0 0B1 1F0 1F1 1B0 1B1")
    assert offence is not None
    assert offence[2].startswith("a pair that overlaps is an F and then a B or an I")


def test_both_ways_each_half_is_at_home_elsewhere() -> None:
    """Microbatch 1 meets the stages from the other end."""
    assert _offence(BOTH, "0F0 1F1 1B1 0B0", "0F1 1F0 1B0 0B1") is None
    expected = (0, 1, "this rank holds stages [1] for microbatch 1")
    assert _offence(BOTH, "0F0 0F1 0B0 0B1", "1F0 1F1 1B0 1B1") == expected
    assert [held_stages(BOTH, rank) for rank in (0, 1)] == [[0, 1], [0, 1]]
    assert BOTH.num_held(2).tolist() == [2, 2]


def test_the_middle_of_both_ways_is_held_once() -> None:
    """Three ranks: the middle one runs its stage for all microbatches."""
    where = Where(stage_ranks=(0, 1, 2), num_microbatches=5, bidirectional=True)
    assert where.num_forth == 3
    assert where.num_held(3).tolist() == [5, 5, 5]
    assert held_stages(where, 1) == [1]


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_a_schedule_tells_its_placement(name: str) -> None:
    """From the orders alone, whatever goes round, back or both ways."""
    schedule = make_schedule(name, 4, 8)
    assert placement(schedule.orders) == schedule.where
    assert first_offence(schedule.orders, schedule.where) is None


def test_the_placement_is_what_most_actions_keep_to() -> None:
    """One stray does not move its stage."""
    orders = make_orders([["0F0", "0F1", "0B0", "0B1", "1F0"], ["1F1", "1B0", "1B1"]])
    assert placement(orders) == LINE


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([], (-1, -1)),
        ([["0F0"], []], (1, -1)),
        ([["0F0"], ["2F0"]], (1, 1)),
        ([["0F0", "0F2"]], (0, 1)),
        ([["0F0"], ["0B0"]], (1, -1)),
    ],
)
def test_orders_without_a_placement(lines: list[list[str]], expected: tuple[int, int]) -> None:
    """No action at all, a rank without one or without a stage, a gap in the stages or the microbatches."""
    found = placement(make_orders(lines))
    assert isinstance(found, Offence)
    assert (found.rank, found.index) == expected


def test_positions_are_those_of_the_first() -> None:
    """Of an action that is there twice, anywhere; -1 of one that is missing."""
    orders = make_orders([["0F0", "0B0"], ["1F0", "0F0", "0B0"]])
    assert positions(orders, 2, 1).reshape(4, 2).tolist() == [[0, 2], [1, -1], [-1, -1], [-1, -1]]
    many = make_orders([["0F0", "0F1", "0F2"] * 50])
    assert positions(many, 1, 3)[0, 0].tolist() == [0, 1, 2]


def test_sources_are_the_neighbouring_stages() -> None:
    """An F needs the stage before, B and I the stage after, be that a B or an I; W and the ends nothing."""
    orders = make_orders([["0F0", "0B0"], ["1F0", "1I0", "1W0"], ["2F0", "2B0"]])
    assert sources(orders, 3, 1).tolist() == [-1, 3, 0, 6, -1, 2, -1]


def test_the_rank_of_each_action() -> None:
    """Empty ranks are passed over."""
    assert np.array_equal(rank_column(make_orders([["0F0"], [], ["1F0", "1B0"]])), [0, 2, 2])
