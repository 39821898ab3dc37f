"""Theorems about groups: each is a partition of the world, and a coordinate is a rank's other name."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from picotron.planner.topology import (
    AXES,
    EXPERT_AXES,
    GROUP_AXES,
    Topology,
    coordinate,
    group_of,
    group_size,
    groups,
    rank_of,
    stage_ranks,
)
from property_tests.strategies import divisors, topologies

KINDS = st.sampled_from([*GROUP_AXES, *EXPERT_AXES])


@given(topologies(), KINDS)
def test_groups_partition_the_world(topology: Topology, axis: str) -> None:
    """Each rank is in exactly one group of each kind; groups are ascending and of one size."""
    found = groups(topology, axis)
    assert sorted(rank for group in found for rank in group) == list(range(topology.world_size))
    assert {len(group) for group in found} == {group_size(topology, axis)}
    assert all(list(group) == sorted(group) for group in found)


@given(topologies())
def test_runs_of_tensor_parallel_ranks_partition_their_groups(topology: Topology) -> None:
    """For every k that divides tp, each group of tp falls into runs of k, in order."""
    for size in divisors(topology.tp):
        runs = groups(topology, f"tp:{size}")
        assert {len(run) for run in runs} == {size}
        per_group = topology.tp // size
        joined = [sum(runs[i : i + per_group], ()) for i in range(0, len(runs), per_group)]
        assert tuple(joined) == groups(topology, "tp")


@given(topologies())
def test_a_coordinate_is_a_ranks_other_name(topology: Topology) -> None:
    """``rank_of`` undoes ``coordinate``, and no two ranks share one."""
    places = [coordinate(topology, rank) for rank in range(topology.world_size)]
    assert [rank_of(topology, place) for place in places] == list(range(topology.world_size))
    assert len(set(places)) == topology.world_size


@given(topologies(), st.sampled_from(AXES))
def test_members_of_a_group_differ_along_its_axis_alone(topology: Topology, axis: str) -> None:
    """Along the axis they count from 0; along the others they agree."""
    for group in groups(topology, axis):
        places = [coordinate(topology, rank) for rank in group]
        assert [getattr(place, axis) for place in places] == list(range(getattr(topology, axis)))
        assert len({tuple(getattr(p, other) for other in AXES if other != axis) for p in places}) == 1


@given(topologies(), st.sampled_from(EXPERT_AXES))
def test_expert_groups_stay_in_their_stage(topology: Topology, axis: str) -> None:
    """Their members share a stage and the other two expert indices, and count from 0 along their own."""
    for group in groups(topology, axis):
        places = [coordinate(topology, rank) for rank in group]
        assert [getattr(place, axis) for place in places] == list(range(len(group)))
        others = [other for other in ("pp", *EXPERT_AXES) if other != axis]
        assert len({tuple(getattr(place, other) for other in others) for place in places}) == 1


@given(topologies())
def test_stages_partition_the_world(topology: Topology) -> None:
    """Stage s is the ranks whose coordinate says so."""
    for stage in range(topology.pp):
        expected = [r for r in range(topology.world_size) if coordinate(topology, r).pp == stage]
        assert list(stage_ranks(topology, stage)) == expected


@given(topologies())
def test_embeddings_tie_first_and_last_stage(topology: Topology) -> None:
    """One pair a pipeline, of equal coordinates but for the stage; other ranks are alone."""
    pairs = groups(topology, "embedding")
    assert len(pairs) == topology.world_size // topology.pp
    for pair in pairs:
        assert [coordinate(topology, rank).pp for rank in pair] == sorted({0, topology.pp - 1})
    for rank in range(topology.world_size):
        middle = 0 < coordinate(topology, rank).pp < topology.pp - 1
        assert (group_of(topology, "embedding", rank) == (rank,)) == (middle or topology.pp == 1)
