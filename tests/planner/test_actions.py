"""Actions, pairs and orders as they are written, read and kept."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from picotron.errors import PlanError
from picotron.planner.actions import (
    PHASES,
    Action,
    Orders,
    Phase,
    cells,
    make_orders,
    parse_action,
    parse_cell,
    stack_orders,
)
from picotron.planner.pipeline import orders_from_csv

PAIR = "(0F1;1B0)OVERLAP_F_B"


def test_phases_are_the_index_of_their_letter() -> None:
    """Columns hold 0 to 3 for F, B, I and W."""
    orders = make_orders([["0F0", "0B0", "0I0", "0W0"]])
    assert orders.phase.tolist() == [0, 1, 2, 3]
    assert [PHASES[index] for index in orders.phase] == [phase.value for phase in Phase]


def test_a_pair_is_one_cell_and_two_actions() -> None:
    """torch's text of an overlapped forward and backward."""
    first, second = Action(0, Phase.FORWARD, 1), Action(1, Phase.BACKWARD, 0)
    assert parse_cell(PAIR) == (first, second)
    orders = make_orders([["0F0", PAIR, (first, second), Action(2, Phase.WEIGHT, 3)], []])
    assert cells(orders, 0) == ["0F0", PAIR, PAIR, "2W3"]
    assert cells(orders, 1) == []
    assert orders.joined.tolist() == [False, True, False, True, False, False]
    assert (len(orders), orders.num_actions, orders.offsets) == (2, 6, (0, 6, 6))


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "F0",
        "0F",
        "0X0",
        "0F0,",
        "-1F0",
        "+1F0",
        "0f0",
        "0F-1",
        "1.0F0",
        "2147483648F0",
        "0F2147483648",
    ],
)
def test_what_is_no_action_is_refused(text: str) -> None:
    """Numbers fit 32 bits, and nothing stands round them."""
    with pytest.raises(PlanError, match="an action must look like 2F0"):
        parse_action(text)


@pytest.mark.parametrize(
    "text",
    [
        "(0F1;1B0)",
        "(0F1;1B0;2F0)OVERLAP_F_B",
        "(;)OVERLAP_F_B",
        "(0F1)OVERLAP_F_B",
        f"({PAIR};1B0)OVERLAP_F_B",
    ],
)
def test_what_is_no_pair_is_refused(text: str) -> None:
    """A pair has two actions."""
    with pytest.raises(PlanError, match="an action must look like 2F0"):
        parse_cell(text)


def test_the_largest_numbers_are_read() -> None:
    """2^31 - 1, of stage and of microbatch."""
    (action,) = make_orders([["2147483647W2147483647"]])[0]
    assert (action.stage, action.microbatch) == (2**31 - 1, 2**31 - 1)


def test_blanks_round_a_cell_do_not_count() -> None:
    """As after the comma of a list."""
    assert orders_from_csv(f" 0F0 , {PAIR} ,\t,1B1\n")[0] == make_orders([["0F0", PAIR, "1B1"]])[0]


def test_an_order_is_a_sequence_of_actions() -> None:
    """By rank, from either end, by slice; made when looked at."""
    orders = make_orders([["0F0"], ["1F0", "1B0"]])
    assert orders[-1] == orders[1] == (Action(1, Phase.FORWARD, 0), Action(1, Phase.BACKWARD, 0))
    assert orders[0:2] == (orders[0], orders[1]) == tuple(orders)
    with pytest.raises(IndexError, match=r"rank must be in \[0, 2\), got 2"):
        orders[2]


def test_an_index_of_the_columns_has_a_rank_and_an_action() -> None:
    """Empty ranks hold no index."""
    orders = make_orders([["0F0"], [], ["1F0", "1B0"]])
    assert [orders.rank_of(index) for index in range(3)] == [0, 2, 2]
    assert str(orders.action(2)) == "1B0"
    assert orders.span(1) == slice(1, 1)


def test_orders_are_values() -> None:
    """Equal, hashed and pickled by content; joined or not is content; nobody else's array is kept."""
    joined, apart = make_orders([[PAIR]]), make_orders([["0F1", "1B0"]])
    assert joined == make_orders([[PAIR]]) and hash(joined) == hash(make_orders([[PAIR]]))
    assert joined != apart
    assert pickle.loads(pickle.dumps(joined)) == joined
    stage = np.array([0, 1], dtype=np.int32)
    kept = Orders(
        offsets=(0, 2), phase=joined.phase, stage=stage, microbatch=joined.microbatch, joined=apart.joined
    )
    stage[0] = 7
    assert kept == apart
    with pytest.raises(ValueError, match="read-only"):
        kept.stage[0] = 1


def test_columns_that_do_not_fit_are_refused() -> None:
    """All are as long as the last offset says, and no rank ends before it begins."""
    columns = {"phase": [0], "stage": [0], "microbatch": [0], "joined": [False]}
    for offsets, changed in (((0, 2), {}), ((0, 2, 1), {}), ((0, 1), {"stage": [0, 0]})):
        with pytest.raises(PlanError, match="do not fit offsets"):
            Orders(offsets=offsets, **{**columns, **changed})  # type: ignore[arg-type]


def test_stacked_arrays_are_the_same_orders() -> None:
    """With and without a column of pairs."""
    plain = (np.array([0, 1]), np.array([0, 0]), np.array([0, 0]))
    paired = (np.array([0, 1]), np.array([0, 1]), np.array([1, 0]), np.array([True, False]))
    assert stack_orders([plain, paired]) == make_orders([["0F0", "0B0"], [PAIR]])


def test_orders_pass_through_unchanged() -> None:
    """Making orders of orders is no work."""
    orders = make_orders([["0F0"]])
    assert make_orders(orders) is orders


@pytest.mark.parametrize("cell", [0, None, ("0F0", "0B1"), (Action(0, Phase.FORWARD, 0),), [], b"0F0"])
def test_what_is_no_cell_is_refused(cell: object) -> None:
    """An action, a text or a pair of actions."""
    with pytest.raises(PlanError, match="a cell must be an action, its text or a pair of actions"):
        make_orders([[cell]])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("text", "line"),
    [("0F0,x", 1), ("0F0\n\n1F0,1B\n", 3), ('"0F0,0B0"', 1), ("1" * 200_000, 1), ("0F0\r1F0", 1)],
)
def test_a_text_that_is_no_csv_of_cells_is_refused_by_line(text: str, line: int) -> None:
    """Quotes, long fields and carriage returns too."""
    with pytest.raises(PlanError, match=rf"^line {line}: "):
        orders_from_csv(text)
