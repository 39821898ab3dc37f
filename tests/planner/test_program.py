"""Programs as values: read-only columns, rows when looked at, rows put in between."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
import pytest

from picotron.errors import PlanError
from picotron.planner.lower import lower
from picotron.planner.program import (
    Kind,
    Program,
    Row,
    inserted,
    last_backwards,
    make_program,
    row_at,
    rows,
    with_rows,
)
from picotron.planner.schedules import one_f_one_b


def _lowered(num_ranks: int, num_microbatches: int) -> Program:
    none: tuple[tuple[()], ...] = ((),) * num_ranks
    return lower(
        one_f_one_b(num_ranks, num_microbatches),
        boundary_bytes=100,
        buckets=none,
        bucket_bytes=none,
        data_parallel=False,
        world_size=num_ranks,
    )


def test_programs_compare_by_value_and_cannot_be_written() -> None:
    """Two lowerings are equal; a changed column is not; columns are read-only."""
    program = _lowered(2, 2)
    assert program == _lowered(2, 2)
    assert program != attrs.evolve(program, bytes=program.bytes + 1)
    with pytest.raises(ValueError, match="read-only"):
        program.kind[0] = 3
    assert program.num_rows == len(program.kind) == 29
    assert np.array_equal(program.offsets, [0, 14, 29])


def test_columns_are_small() -> None:
    """A kind takes one byte, bytes eight, all else four, and a column without values nothing."""
    program = _lowered(2, 2)
    sizes = {name: getattr(program, name).itemsize for name in Row._fields}
    assert sizes == {**dict.fromkeys(Row._fields, 4), "kind": 1, "bytes": 8}
    for name in ("part", "anchor_row", "anchor_segment", "batch"):
        assert getattr(program, name).strides == (0,) and set(getattr(program, name)) == {-1}


def test_a_caller_keeps_its_own_array() -> None:
    """What a program is made of is copied, unless it is given away."""
    kind = np.array([1], dtype=np.int8)
    program = Program(groups=(), offsets=(0, 1), kind=kind)
    kind[0] = 2
    assert row_at(program, 0) == Row(Kind.FORWARD)
    given = make_program((), (0, 1), kind=kind)
    assert given.kind is kind and not kind.flags.writeable


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"kind": [1, 1]}, r"columns of \[1, 2\] rows do not fit offsets \(0, 1\)"),
        ({"kind": [1], "stage": [2**31]}, "a row's numbers must fit in 32 bits, got 2147483648"),
        ({"kind": [300]}, "a row's numbers must fit in 8 bits, got 300"),
        ({"kind": [1], "bytes": [2**63]}, "a row's bytes must fit in 64 bits; the model or the batch"),
    ],
)
def test_columns_that_do_not_fit_are_refused(columns: dict[str, Any], message: str) -> None:
    """In length or in size, never cut silently."""
    with pytest.raises(PlanError, match=message):
        Program(groups=(), offsets=(0, 1), **columns)


def test_rows_print_what_they_do() -> None:
    """Stage, letter or name, and microbatch or bucket."""
    shown = [
        Row(Kind.FORWARD, 2, 0), Row(Kind.BACKWARD, 2, 0), Row(Kind.BACKWARD_INPUT, 2, 0),
        Row(Kind.BACKWARD_WEIGHT, 2, 0), Row(Kind.SEND_F, 1, 3), Row(Kind.REDUCE, 1, part=4),
        Row(Kind.REDUCE, 1), Row(Kind.UNSHARD, 1), Row(Kind.RECOMPUTE, 1, 2), Row(Kind.NORM),
    ]  # fmt: skip
    assert " ".join(map(str, shown)) == (
        "2F0 2B0 2I0 2W0 1SEND_F3 1REDUCE4 1REDUCE 1UNSHARD 1RECOMPUTE2 NORM"
    )


def test_rows_are_put_between_others() -> None:
    """A row before 0F1 that waits for a new one before 0F0: all that refers to what moved is renumbered."""
    program = _lowered(2, 2)
    size = program.num_rows
    made = with_rows(program, [(0, 3, Row(Kind.WAIT, target=size + 1)), (0, 0, Row(Kind.UNSHARD, 0))])
    before, after = rows(program, 0), rows(made, 0)
    assert [str(row) for row in after[:6]] == ["0UNSHARD", "0F0", "0SEND_F0", "0RECV_B0", "WAIT", "0F1"]
    assert after[4].target == 0
    assert [str(before[r.target]) for r in before if r.target >= 0] == [
        str(after[r.target]) for r in after if r.target > 0
    ]
    assert rows(made, 1) == rows(program, 1)


def test_the_end_of_a_rank_is_not_the_beginning_of_the_next() -> None:
    """Rows put before the same index go to the rank that is named."""
    program = _lowered(2, 1)
    stop = program.offsets[1]
    made = inserted(program, [1, 0], [stop, stop], kind=[Kind.OFFLOAD, Kind.RELOAD])
    assert rows(made, 0)[-1].kind is Kind.RELOAD and rows(made, 1)[0].kind is Kind.OFFLOAD


def test_gradients_are_complete_in_the_last_backward() -> None:
    """Of 1F1B on two ranks with two microbatches: rows 0B1 and 1B1."""
    program = _lowered(2, 2)
    found = {place: str(row_at(program, index)) for place, index in last_backwards(program).items()}
    assert found == {(0, 0): "0B1", (1, 1): "1B1"}
