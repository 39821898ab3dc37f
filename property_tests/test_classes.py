"""Theorems about classes of ranks: stable, never finer than symmetry asks for, numbered by least ranks."""

from __future__ import annotations

from hypothesis import event, given
from hypothesis import strategies as st

from picotron.planner.classes import axis_indices, meetings, rank_classes, refined
from picotron.planner.faults import ranks_of
from picotron.planner.plan import TrainingPlan
from picotron.planner.simulate import simulate_step
from picotron.planner.topology import AXES, EXPERT_AXES, Topology, coordinate, groups
from property_tests.strategies import DENSE, SPARSE, plans, topologies
from property_tests.strategies_faults import step_scripts

NAMES = ("dp", "cp", "tp", "dp_cp", "pp", "world", "embedding", *EXPERT_AXES)


@st.composite
def groupings(draw: st.DrawFn, size: int) -> tuple[tuple[int, ...], ...]:
    """Some ranks of a world, each in one group at most."""
    labels = draw(st.lists(st.none() | st.integers(0, 2), min_size=size, max_size=size))
    found = {label: tuple(r for r in range(size) if labels[r] == label) for label in labels}
    return tuple(group for label, group in found.items() if label is not None)


def _around(of_rank: tuple[int, ...], kind: tuple[tuple[int, ...], ...], rank: int) -> frozenset[int] | None:
    found = [frozenset(of_rank[other] for other in group) for group in kind if rank in group]
    return found[0] if found else None


def _coarsest(marks: list[int], kinds: list[tuple[tuple[int, ...], ...]]) -> set[tuple[int, int]]:
    """Pairs of ranks that nothing tells apart: all pairs, less those that differ, again and again."""
    ranks = range(len(marks))
    alike = {(a, b) for a in ranks for b in ranks if marks[a] == marks[b]}

    def same_company(a: int, b: int) -> bool:
        for kind in kinds:
            mine = next((group for group in kind if a in group), None)
            other = next((group for group in kind if b in group), None)
            if (mine is None) != (other is None):
                return False
            if mine is not None and other is not None:
                pairs = {(x, y) for x in mine for y in other if (x, y) in alike}
                if {x for x, _ in pairs} != set(mine) or {y for _, y in pairs} != set(other):
                    return False
        return True

    while differing := {pair for pair in alike if not same_company(*pair)}:
        alike -= differing
    return alike


@given(st.data(), st.integers(1, 7))
def test_the_partition_is_the_coarsest_stable_one(data: st.DataObject, size: int) -> None:
    """Two ranks share a class if and only if an oracle that compares all pairs cannot tell them apart."""
    marks = data.draw(st.lists(st.integers(0, 1), min_size=size, max_size=size))
    kinds = data.draw(st.lists(groupings(size), max_size=3))
    of_rank = refined(marks, kinds)
    event(f"{len(set(of_rank))} classes")
    same = {(a, b) for a in range(size) for b in range(size) if of_rank[a] == of_rank[b]}
    assert same == _coarsest(marks, kinds)


@given(topologies(max_degree=3), st.sets(st.sampled_from(NAMES)), st.data())
def test_classes_meet_the_same_classes(topology: Topology, names: set[str], data: st.DataObject) -> None:
    """Stable, also for the groups of experts; a class's least rank stands for it."""
    size = topology.world_size
    marked = data.draw(st.sets(st.integers(0, size - 1), max_size=3))
    marks = [rank if rank in marked else -1 for rank in range(size)]
    classes = rank_classes(topology, names, marks)
    for rank, number in enumerate(classes.of_rank):
        like = classes.ranks[number]
        assert like <= rank and marks[like] == marks[rank]
        for name in names:
            kind = groups(topology, name)
            assert _around(classes.of_rank, kind, rank) == _around(classes.of_rank, kind, like)
    assert classes.ranks == tuple(sorted(classes.ranks))
    assert sum(classes.sizes) == size
    for name in names:
        least = [number for group, numbers in meetings(classes, name) for number in numbers]
        assert len(least) == len(set(least))
        assert all(
            {classes.ranks[number] for number in numbers} <= set(group)
            for group, numbers in meetings(classes, name)
        )


@given(topologies())
def test_indices_are_those_of_the_coordinates(topology: Topology) -> None:
    """Along every axis, all ranks at once."""
    indices = axis_indices(topology)
    for rank in range(topology.world_size):
        where = coordinate(topology, rank)
        assert all(indices[axis][rank] == getattr(where, axis) for axis in (*AXES, *EXPERT_AXES))


@given(plans(families=DENSE + SPARSE))
def test_without_faults_a_stage_has_a_class_a_slice(made: TrainingPlan) -> None:
    """The ranks of a stage are alike but for the rows of the vocabulary that they hold.

    Where slices differ, those who share experts or copies of heads may be told apart by their partners.
    """
    sizes = {made.dims(index).vocab for index in range(made.topology.tp)}
    found = simulate_step(made).num_classes
    assert found >= made.topology.pp * len(sizes)
    partners = made.model.experts is not None or any(":" in name for name in made.program().groups)
    if len(sizes) == 1 or not partners:
        assert found == made.topology.pp * len(sizes)


@given(plans(), st.data())
def test_faults_tell_no_more_apart_than_their_places(made: TrainingPlan, data: st.DataObject) -> None:
    """Ranks with equal indices wherever one of them is a faulty rank's share a class, tensor ranks apart."""
    script = data.draw(step_scripts(made))
    step, indices = simulate_step(made, script), axis_indices(made.topology)
    named = {rank for fault in script for rank in ranks_of(fault)}
    marked = {axis: {indices[axis][rank] for rank in named} for axis in ("dp", "cp")}
    found: dict[tuple[int | None, ...], int] = {}
    for rank in range(made.topology.world_size):
        place = [indices[axis][rank] for axis in ("pp", "tp")]
        place += [i if (i := indices[axis][rank]) in marked[axis] else None for axis in ("dp", "cp")]
        assert found.setdefault(tuple(place), step.class_of(rank)) == step.class_of(rank)
