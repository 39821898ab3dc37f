"""Theorems about slices: nothing is lost, nothing is held twice that does not say so."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from picotron.planner.layout import (
    Cut,
    Placement,
    counts_in_norm,
    cut_ranges,
    even_ranges,
    is_held,
    local_numel,
)
from picotron.planner.plan import TrainingPlan
from picotron.planner.topology import coordinate, group_of
from property_tests.strategies import DENSE, SPARSE, plans

EVERY = DENSE + SPARSE


@given(st.integers(0, 200), st.integers(1, 20))
def test_even_ranges_partition(size: int, parts: int) -> None:
    """Neighbouring, in order, lengths within one of each other and never growing."""
    ranges = even_ranges(size, parts)
    assert [i for start, stop in ranges for i in range(start, stop)] == list(range(size))
    lengths = [stop - start for start, stop in ranges]
    assert len(lengths) == parts
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] - lengths[-1] <= 1


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 7))
def test_cut_ranges_partition_a_dimension(parts: int, copies: int, blocks: int, block: int) -> None:
    """The slices of the first of each copy cover every index once; each copy's neighbours hold the same."""
    cut = Cut(axis="tp", dim=0, degree=parts * copies, parts=parts, blocks=blocks)
    held = [cut_ranges(cut, blocks * block, index) for index in range(parts * copies)]
    first = [i for ranges in held[::copies] for start, stop in ranges for i in range(start, stop)]
    assert sorted(first) == list(range(blocks * block))
    assert all(held[index] == held[index - index % copies] for index in range(len(held)))


def _cells(placement: Placement, where: object) -> tuple[tuple[int, int], ...]:
    if placement.cut is None:
        return ()
    cut = placement.cut
    return cut_ranges(cut, placement.shape[cut.dim], getattr(where, cut.axis))


@given(plans(max_ranks=16, families=EVERY))
def test_elements_are_conserved(made: TrainingPlan) -> None:
    """Over all ranks, the slices that count in a norm have as many elements as the model."""
    places = [coordinate(made.topology, rank) for rank in range(made.topology.world_size)]
    counted = sum(
        local_numel(placement, where)
        for where in places
        for placement in made.held(where)
        if counts_in_norm(placement, where)
    )
    assert counted == made.model.num_parameters


@given(plans(max_ranks=16, families=EVERY))
def test_every_parameter_is_whole_somewhere(made: TrainingPlan) -> None:
    """Each placement is held, and each of its slices by exactly one rank that counts it."""
    places = [coordinate(made.topology, rank) for rank in range(made.topology.world_size)]
    for placement in made.layout:
        holders = [where for where in places if is_held(placement, made.topology, where)]
        assert holders
        if placement.tied_to is not None:
            continue
        counted = [_cells(placement, where) for where in holders if counts_in_norm(placement, where)]
        assert len(counted) == len(set(counted))
        assert set(counted) == {_cells(placement, where) for where in holders}


@given(plans(max_ranks=16, families=EVERY))
def test_gradients_are_summed_over_groups_that_hold_the_same_slice(made: TrainingPlan) -> None:
    """Whoever sums a gradient holds the same cells of it: of the same parameter, or of its tied copy."""
    topology = made.topology
    for rank in range(topology.world_size):
        where = coordinate(topology, rank)
        for placement in made.held(where):
            for group in placement.partial:
                members = [coordinate(topology, r) for r in group_of(topology, group, rank)]
                assert len(members) > 1
                assert {_cells(placement, member) for member in members} == {_cells(placement, where)}
                for member in members:
                    names = {p.name for p in made.held(member)} | {p.tied_to for p in made.held(member)}
                    assert placement.name in names or placement.tied_to in names


@given(plans(max_ranks=16))
def test_tied_copies_agree(made: TrainingPlan) -> None:
    """The last stage's copy of a tied table is cut, replicated and summed as the first stage's."""
    by_name = {placement.name: placement for placement in made.layout}
    tied = [placement for placement in made.layout if placement.tied_to is not None]
    assert len(tied) == (
        made.model.tied_embeddings and made.stage_rank(0) != made.stage_rank(made.num_stages - 1)
    )
    for copy in tied:
        table = by_name[copy.tied_to or ""]
        assert (copy.shape, copy.cut, copy.replicated, copy.partial) == (
            table.shape,
            table.cut,
            table.replicated,
            table.partial,
        )


@given(plans(max_ranks=16, families=EVERY))
def test_stages_hold_every_segment_once_and_in_order(made: TrainingPlan) -> None:
    """Joined, the stages' segments are the model's, and each has the layers it was given."""
    layers = [[s.layer for s in own if s.kind == "attention"] for own in made.stage_segments]
    assert [len(own) for own in layers] == list(made.stage_layers)
    assert [layer for own in layers for layer in own] == list(range(made.model.num_layers))
    names = [p.name for own in made.stage_segments for s in own for p in s.parameters]
    assert names == [placement.name for placement in made.layout if placement.tied_to is None]
