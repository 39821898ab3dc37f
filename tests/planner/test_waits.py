"""Wait-for graphs of a few ranks, and what is said of them."""

from __future__ import annotations

import pytest

from picotron.planner.waits import SHOWN_WAITS, Wait, WaitGraph, shortest_cycle


def _wait(rank: int, *absent: int, place: str = "") -> Wait:
    return Wait(rank=rank, operation="all_reduce dp", place=place, absent=absent)


@pytest.mark.parametrize(
    ("edges", "cycle"),
    [
        ({}, ()),
        ({0: (1,)}, ()),
        ({0: (0,)}, (0, 0)),
        ({0: (1,), 1: (0,)}, (0, 1, 0)),
        ({0: (1,), 1: (2,), 2: (0,)}, (0, 1, 2, 0)),
        ({0: (1,), 1: (2,), 2: (0, 1)}, (1, 2, 1)),  # the shorter one
        ({3: (2,), 2: (3,), 0: (1,), 1: (0,)}, (0, 1, 0)),  # of two, the least rank's
        ({0: (5, 6), 1: (0,)}, ()),  # 5 and 6 do not wait
    ],
)
def test_the_shortest_cycle(edges: dict[int, tuple[int, ...]], cycle: tuple[int, ...]) -> None:
    """First rank repeated at the end; nothing where nobody waits in a circle."""
    assert shortest_cycle(edges) == cycle


def test_a_cycle_is_reported_with_its_waits() -> None:
    """Head, then a line for each rank on the cycle, then the others."""
    graph = WaitGraph(
        waits=(_wait(0, 1, place="0B3, row 7"), _wait(1, 0), _wait(2, 0, 1)), others={3: "has finished"}
    )
    assert str(graph).splitlines() == [
        "wait-for cycle: 0 -> 1 -> 0",
        "rank 0 waits for all_reduce dp (0B3, row 7): rank 1 is not there",
        "rank 1 waits for all_reduce dp: rank 0 is not there",
        "rank 2 waits for all_reduce dp: ranks 0, 1 are not there",
    ]


def test_without_a_cycle_the_missing_are_named() -> None:
    """With what became of them, as far as it is known."""
    graph = WaitGraph(waits=(_wait(0, 2), _wait(1, 0)), others={2: "was killed at row 3"})
    assert (graph.cycle, graph.missing) == ((), (2,))
    assert str(graph).splitlines()[0] == "waited for: rank 2, which was killed at row 3"
    assert "rank 2, which does not come" in str(WaitGraph(waits=(_wait(0, 2),), others={}))


def test_a_large_report_is_cut() -> None:
    """So many waits are described, the rest counted; long lists of ranks end in dots."""
    waits = tuple(_wait(rank, *range(20, 40)) for rank in range(SHOWN_WAITS + 5))
    lines = str(WaitGraph(waits=waits, others={})).splitlines()
    assert len(lines) == 1 + SHOWN_WAITS + 1
    assert lines[-1] == "and 5 more ranks wait"
    assert lines[1].endswith("ranks 20, 21, 22, 23, 24, 25, 26, 27, ... are not there")
