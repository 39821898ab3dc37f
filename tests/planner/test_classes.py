"""Classes of ranks, in worlds small enough to see through."""

from __future__ import annotations

from picotron.planner.classes import axis_indices, meetings, rank_classes, refined
from picotron.planner.topology import Topology


def test_without_marks_all_are_alike() -> None:
    """Whatever the groups."""
    topology = Topology(pp=2, dp=2, tp=2)
    assert rank_classes(topology, ["tp", "dp", "pp"], [""] * 8).of_rank == (0,) * 8


def test_marks_stay_apart() -> None:
    """Also where nobody meets."""
    assert refined(["a", "b", "a"], []) == (0, 1, 0)


def test_a_mark_is_passed_on_through_groups() -> None:
    """In a chain of pairs whose first is marked, each rank is told apart by how far away it is."""
    pairs = [((0, 1), (2, 3)), ((1, 2), (3, 4))]
    assert refined([1, 0, 0, 0, 0], pairs) == (0, 1, 2, 3, 4)
    assert refined([0, 0, 0, 0, 0], pairs[:1]) == (0, 0, 0, 0, 1)  # the last is in no group


def test_being_in_no_group_tells_apart() -> None:
    """Of three stages the first and the last tie their embeddings, also where that is the only such group."""
    assert rank_classes(Topology(pp=3), ["embedding"], [""] * 3).of_rank == (0, 1, 0)


def test_sizes_of_groups_do_not_matter() -> None:
    """An operation starts with the latest of its members; how many are as late tells nothing."""
    assert refined([0, 0, 0, 0, 0], [((0, 1), (2, 3, 4))]) == (0, 0, 0, 0, 0)


def test_tensor_blocks_are_groups_like_others() -> None:
    """tp 4 in pairs, rank 0 marked: its partner, and the other pair."""
    classes = rank_classes(Topology(tp=4), ["tp", "tp:2"], [1, 0, 0, 0])
    assert classes.of_rank == (0, 1, 2, 2)
    assert (classes.ranks, classes.sizes) == ((0, 1, 2), (1, 1, 2))


def test_who_meets_whom() -> None:
    """One group a class that has its least rank there."""
    classes = rank_classes(Topology(tp=4), ["tp", "tp:2"], [1, 0, 0, 0])
    assert list(meetings(classes, "tp:2")) == [((0, 1), [0, 1]), ((2, 3), [2])]
    assert list(meetings(classes, "tp")) == [((0, 1, 2, 3), [0, 1, 2])]


def test_indices_of_all_ranks() -> None:
    """dp 2, tp 2, tp slowest; the experts' cut runs over the stage's ranks in order."""
    indices = axis_indices(Topology(dp=2, tp=2, ep=2, order=("tp", "pp", "dp", "cp")))
    assert indices["tp"] == (0, 0, 1, 1) and indices["dp"] == (0, 1, 0, 1)
    assert indices["edp"] == (0, 0, 1, 1) and indices["ep"] == (0, 1, 0, 1)
    assert set(indices["pp"]) == {0}
