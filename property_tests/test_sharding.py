"""Theorems about ZeRO: parts of a whole, never more bytes, and programs that end as they began."""

from __future__ import annotations

from itertools import pairwise

from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from picotron.planner.collectives import wire_bytes
from picotron.planner.deadlock import check_channels, check_no_deadlock
from picotron.planner.flat import counted_ranges, flat_bucket
from picotron.planner.flow import program_times
from picotron.planner.memory import memory_timeline, static_bytes
from picotron.planner.plan import TrainingPlan
from picotron.planner.predict import planned_payloads
from picotron.planner.program import COLLECTIVES, COPIES, Kind, rows
from picotron.planner.schedule_times import unit_costs
from picotron.planner.sharding import DATA_GROUPS
from picotron.planner.simulate import durations, moved
from picotron.planner.topology import coordinate, group_size, groups
from property_tests.strategies import DENSE, SPARSE, divisors, saving_plans, topologies

EVERY = DENSE + SPARSE
_POSTED = (Kind.REDUCE_SCATTER, Kind.ALL_GATHER, Kind.UNSHARD, Kind.OFFLOAD, Kind.RELOAD, Kind.REDUCE)


@given(topologies(), st.data())
def test_runs_and_what_crosses_them_partition_the_world(topology, data) -> None:
    """Each rank is in one run and in one group across, which meet in that rank alone."""
    axis = data.draw(st.sampled_from(DATA_GROUPS))
    size = data.draw(st.sampled_from(divisors(group_size(topology, axis))))
    runs, across = groups(topology, f"{axis}:{size}"), groups(topology, f"{axis}/{size}")
    for found in (runs, across):
        assert sorted(rank for group in found for rank in group) == list(range(topology.world_size))
    assert {len(run) for run in runs} == {size}
    for whole in groups(topology, axis):
        own = [run for run in runs if set(run) & set(whole)]
        assert all(set(run) <= set(whole) for run in own)
        for group in across:
            assert [len(set(run) & set(group)) for run in own] in ([0] * len(own), [1] * len(own))


@given(saving_plans(families=EVERY))
def test_parts_make_up_the_whole(made: TrainingPlan) -> None:
    """The parts of all ranks that share a bucket are its buffer without a gap; little of it is padding."""
    where = coordinate(made.topology, 0)
    for bucket in (bucket for own in made.stage_buckets for bucket in own):
        flat = flat_bucket(made, bucket, where)
        parts = [flat.part(place) for place in range(flat.ranks)]
        assert (parts[0][0], parts[-1][1]) == (0, flat.padded_numel)
        assert all(one[1] == two[0] for one, two in pairwise(parts))
        assert flat.numel <= flat.padded_numel < flat.numel + flat.ranks
        assert [flat.range_of(name) for name in flat.names] == list(pairwise(flat.offsets))
        assert all(flat.ranks == 1 or len(shape) > 1 for shape in flat.shapes)


@given(saving_plans())
def test_every_parameter_is_counted_once(made: TrainingPlan) -> None:
    """Over all ranks of the world the ranges that each counts are every element of the model."""
    counted = 0
    for rank in range(made.topology.world_size):
        where = coordinate(made.topology, rank)
        for stage in made.rank_stages(where.pp):
            for bucket in made.stage_buckets[stage]:
                for first, stop in counted_ranges(made, flat_bucket(made, bucket, where), where):
                    assert 0 <= first < stop
                    counted += stop - first
    assert counted == made.model.num_parameters


@given(saving_plans(families=EVERY))
def test_a_higher_stage_keeps_no_more(made: TrainingPlan) -> None:
    """Stage by stage nothing that always stands grows, but for less than an element a bucket and rank."""
    asked = {"shard": made.shard if made.zero_stage else None}
    stages = [evolve(made, zero_stage=0, shard=None, accumulate=None, reshard=None)]
    stages += [evolve(made, zero_stage=stage, accumulate=None, reshard=None, **asked) for stage in (1, 2, 3)]
    ranks = made.topology.world_size
    padding = ranks * 8 * max(sum(map(len, one.stage_buckets)) for one in stages)
    for rank in {0, ranks - 1}:
        found = [static_bytes(one, coordinate(made.topology, rank)) for one in stages]
        for lower, higher in pairwise(found):
            assert all(higher[name] <= size + padding for name, size in lower.items())


@given(saving_plans(families=EVERY), st.integers(0, 1000))
def test_a_step_returns_to_where_it_began(made: TrainingPlan, number: int) -> None:
    """Whatever is sharded, recomputed or offloaded: the last level is what always stands, none is below."""
    rank = number % made.topology.world_size
    timeline = memory_timeline(made, rank)
    standing = sum(static_bytes(made, coordinate(made.topology, rank)).values())
    assert timeline.live_bytes[-1] == standing
    assert timeline.live_bytes.min() >= standing
    assert (timeline.peak_bytes >= timeline.live_bytes).all()
    assert sum(size for _, size in timeline.peak_by_category) == timeline.max_bytes
    assert all(size > 0 for _, size in timeline.peak_by_category)


@given(saving_plans(families=EVERY))
def test_every_rank_comes_to_its_end(made: TrainingPlan) -> None:
    """Under any semantics; every row that moves bytes has a price, and every WAIT something to wait for."""
    program = made.program()
    check_channels(program)
    for semantics in ("buffered", "rendezvous", "batched"):
        check_no_deadlock(program, semantics)
    prices = durations(made).move_seconds
    assert set(prices) == set(moved(program))
    rates = dict.fromkeys((*COPIES, *(kind for kind in COLLECTIVES if kind is not Kind.COUNT)), 1e9)
    assert program_times(program, unit_costs(made.num_stages), bytes_per_second=rates).makespan_seconds > 0
    for rank in range(program.num_ranks):
        own = rows(program, rank)
        ended = [row.target for row in own if row.kind is Kind.WAIT]
        posts = [at for at, row in enumerate(own) if row.kind in _POSTED]
        assert len(set(ended)) == len(ended) and set(posts) <= set(ended)


@given(saving_plans(families=EVERY))
def test_members_of_a_group_hand_over_the_same_bytes(made: TrainingPlan) -> None:
    """In every group that a plan names."""
    found = planned_payloads(made)
    named = {name for own in found for _, name, _ in own}
    for axis in sorted(name for name in named if name.startswith(("dp_cp", "tp", "cp", "world"))):
        for group in groups(made.topology, axis):
            handed = [{(kind, size) for kind, name, size in found[rank] if name == axis} for rank in group]
            assert all(own == handed[0] for own in handed)


@given(saving_plans())
def test_two_halves_send_what_the_whole_did(made: TrainingPlan) -> None:
    """With equal formats a bucket's reduce-scatter and gather are an all-reduce, each over all ranks."""
    form = made.format
    made = evolve(made, zero_stage=1, shard=None, accumulate=None, reshard=None)
    size = group_size(made.topology, "dp_cp")
    columns = (made.stage_buckets[0], made.bucket_sums(0), made.bucket_gathers(0))
    for bucket, sums, gather in zip(*columns, strict=True):
        is_shared = size > 1 and len(made.placement(bucket.names[0]).shape) > 1
        assert (gather is not None) == is_shared
        if gather is not None:
            assert gather.bytes * form.gradient == sums[0].bytes * form.compute
            halves = [wire_bytes(kind, sums[0].bytes, size) for kind in ("reduce_scatter", "all_gather")]
            assert sum(halves) == wire_bytes("all_reduce", sums[0].bytes, size)
