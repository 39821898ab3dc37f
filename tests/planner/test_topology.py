"""Where ranks sit and who talks to whom, in tables that a reader can fill in by hand."""

from __future__ import annotations

import pytest

from picotron.errors import PlanError
from picotron.planner.topology import (
    AXES,
    Coordinate,
    Topology,
    coordinate,
    degrees,
    group_of,
    group_size,
    groups,
    rank_of,
    stage_ranks,
)

EIGHT = Topology(dp=2, pp=2, tp=2)


@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        ("tp", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("dp", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("pp", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("cp", ((0,), (1,), (2,), (3,), (4,), (5,), (6,), (7,))),
        ("dp_cp", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("tp_pp", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("world", ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ("embedding", ((0, 4), (1, 5), (2, 6), (3, 7))),
    ],
)
def test_groups_of_eight_ranks(axis: str, expected: tuple[tuple[int, ...], ...]) -> None:
    """With pp, dp, tp of two, tensor-parallel ranks are neighbours, dp strides by 2 and pp by 4."""
    assert groups(EIGHT, axis) == expected
    assert group_size(EIGHT, axis) == len(expected[0])


def test_another_order_of_the_axes() -> None:
    """With tp slowest and pp fastest the strides are 4 and 1."""
    topology = Topology(dp=2, pp=2, tp=2, order=("tp", "cp", "dp", "pp"))
    assert groups(topology, "pp") == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert groups(topology, "dp") == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert groups(topology, "tp") == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert stage_ranks(topology, 1) == (1, 3, 5, 7)
    assert degrees(topology) == (2, 1, 2, 2)


def test_context_parallel_ranks_lie_between_data_and_tensor() -> None:
    """dp 2, cp 2, tp 2: cp strides by 2, and dp_cp joins the ranks of equal tp."""
    topology = Topology(dp=2, cp=2, tp=2)
    assert groups(topology, "cp") == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert groups(topology, "dp_cp") == ((0, 2, 4, 6), (1, 3, 5, 7))


def test_coordinates_of_a_rank() -> None:
    """Rank 6 = 1*4 + 1*2 + 0 of pp, dp, tp; the second stage's third rank of four expert copies."""
    assert coordinate(EIGHT, 6) == Coordinate(pp=1, dp=1, tp=0, edp=2)
    assert rank_of(EIGHT, Coordinate(pp=1, dp=1, tp=0)) == 6


def test_experts_cut_a_stage_again() -> None:
    """Two stages of 8 ranks (dp 4, tp 2) as ep 4: two copies, each of four neighbours with an expert part."""
    topology = Topology(pp=2, dp=4, tp=2, ep=4)
    assert topology.world_size == 16
    assert topology.edp == 2
    assert groups(topology, "ep") == ((0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11), (12, 13, 14, 15))
    assert groups(topology, "edp")[:4] == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert coordinate(topology, 14) == Coordinate(pp=1, dp=3, tp=0, edp=1, ep=2)


def test_expert_tensor_parallel_ranks_are_neighbours() -> None:
    """ep 2 and etp 2 of 8 ranks: etp strides by 1, ep by 2, copies by 4."""
    topology = Topology(dp=4, tp=2, ep=2, etp=2)
    assert groups(topology, "etp") == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert groups(topology, "ep") == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert groups(topology, "edp") == ((0, 4), (1, 5), (2, 6), (3, 7))


def test_embedding_ends_skip_the_middle() -> None:
    """Of three stages the first and the last tie their embeddings; one stage is its own end."""
    assert groups(Topology(pp=3, tp=2), "embedding") == ((0, 4), (1, 5))
    assert groups(Topology(dp=2), "embedding") == ((0,), (1,))
    assert group_of(Topology(pp=3, tp=2), "embedding", 2) == (2,)


def test_runs_of_tensor_parallel_neighbours() -> None:
    """tp 4 with two ranks to a key/value head: runs of two within each tensor-parallel group."""
    topology = Topology(dp=2, tp=4)
    assert groups(topology, "tp:2") == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert groups(topology, "tp:4") == groups(topology, "tp")
    assert group_size(topology, "tp:2") == 2
    strided = Topology(dp=2, tp=4, order=("tp", "pp", "cp", "dp"))
    assert groups(strided, "tp:2") == ((0, 2), (4, 6), (1, 3), (5, 7))


@pytest.mark.parametrize("axis", ["tp:3", "tp:0", "tp:", "tp:x", "data", ""])
def test_unknown_groups_are_refused(axis: str) -> None:
    """A name that is no group of this topology is refused with the names that are."""
    with pytest.raises(PlanError, match=f"axis must be one of .*dp_cp.*tp:k.*got '{axis}'"):
        groups(Topology(tp=4), axis)


def test_ranks_outside_the_world_are_refused() -> None:
    """Ranks are 0 to world_size - 1, and an index lies below its degree."""
    for rank in (-1, 8):
        with pytest.raises(PlanError, match=rf"rank must be in \[0, 8\), got {rank}"):
            coordinate(EIGHT, rank)
    with pytest.raises(PlanError, match=r"tp index must be in \[0, 2\), got 2"):
        rank_of(EIGHT, Coordinate(tp=2))


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "2"])
@pytest.mark.parametrize("axis", [*AXES, "ep", "etp"])
def test_degrees_are_positive_whole_numbers(axis: str, value: object) -> None:
    """A degree counts ranks."""
    with pytest.raises(PlanError, match=f"{axis} must be a positive whole number, got"):
        Topology(**{axis: value})  # type: ignore[arg-type]


def test_an_order_names_each_axis_once() -> None:
    """An order that repeats or leaves out an axis is refused."""
    with pytest.raises(PlanError, match="order must name each of .* once, slowest first, got"):
        Topology(order=("pp", "dp", "cp", "cp"))


def test_experts_must_divide_a_stage() -> None:
    """ep * etp must divide dp * cp * tp; stages do not count."""
    with pytest.raises(PlanError, match=r"ep \* etp must divide dp \* cp \* tp = 4, got ep=2, etp=4"):
        Topology(pp=2, dp=2, tp=2, ep=2, etp=4)
