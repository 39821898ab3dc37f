"""Theorems about buckets and about who sees which sample."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from picotron.planner.data import microbatch_slice, sample_indices
from picotron.planner.layout import local_numel
from picotron.planner.plan import TrainingPlan
from picotron.planner.topology import Coordinate
from property_tests.strategies import DENSE, SPARSE, plans


@given(plans(families=DENSE + SPARSE))
def test_buckets_hold_every_parameter_once(made: TrainingPlan) -> None:
    """Each parameter of a pipeline rank's first rank is in one bucket, with its own sums and no others'."""
    for pp in range(made.topology.pp):
        held = {p.name: p for p in made.held(Coordinate(pp=pp))}
        stages = {stage: made.stage_buckets[stage] for stage in made.rank_stages(pp)}
        reduced = [name for own in stages.values() for bucket in own for name in bucket.names]
        assert sorted(reduced) == sorted(held)
        for stage, own in stages.items():
            for index, bucket in enumerate(own):
                assert (bucket.stage, bucket.index) == (stage, index)
                assert {held[name].partial for name in bucket.names} == {bucket.partial}


@given(plans(families=DENSE + SPARSE))
def test_buckets_are_ready_when_all_that_add_to_them_have(made: TrainingPlan) -> None:
    """After the first segment of a bucket, the last in backward.

    A table that embedding and head share may be with the head, whose stage then adds to it last.
    """
    last = made.num_stages - 1
    for stage, own in enumerate(made.stage_buckets):
        held = {p.name: p for p in made.stage_layout[stage]}
        head = len(made.stage_segments[stage]) - 1
        for bucket in own:
            moved = set(bucket.names) - set(held)
            assert not moved or (stage == last and made.model.tied_embeddings)
            segments = [held[name].segment for name in bucket.names if name in held]
            assert bucket.ready_segment == min([*segments, *[head] * len(moved)])


@given(plans())
def test_buckets_are_filled_in_the_order_of_backward(made: TrainingPlan) -> None:
    """They complete one after another; a full one takes no more, but the rest of what reads one input.

    Such a group has three members at most: queries, keys and values.
    """
    for stage, own in enumerate(made.stage_buckets):
        where = Coordinate(pp=made.stage_rank(stage))
        numel = {p.name: local_numel(p, where) for p in made.held(where)}
        assert [b.ready_segment for b in own] == sorted((b.ready_segment for b in own), reverse=True)
        for bucket in own:
            sizes = [numel[name] * made.format.gradient for name in bucket.names]
            assert sum(sorted(sizes)[:-3]) < made.bucket_bytes


@given(plans(), st.integers(0, 3))
def test_every_rank_forms_buckets_of_the_same_parameters(made: TrainingPlan, seed: int) -> None:
    """A bucket's payload is the sum of its slices on every tensor-parallel rank."""
    tp_index = seed % made.topology.tp
    for pp in range(made.topology.pp):
        where = Coordinate(pp=pp, tp=tp_index)
        total = sum(local_numel(p, where) for p in made.held(where)) * made.format.gradient
        payloads = [made.bucket_payload_bytes(stage, tp_index) for stage in made.rank_stages(pp)]
        assert list(map(len, payloads)) == [len(made.stage_buckets[stage]) for stage in made.rank_stages(pp)]
        assert sum(map(sum, payloads)) == total


@given(st.integers(1, 30), st.integers(0, 3), st.integers(0, 2**32))
def test_every_epoch_is_a_permutation(num_samples: int, epoch: int, seed: int) -> None:
    """Each epoch visits each sample once."""
    consumed = epoch * num_samples
    order = sample_indices(num_samples=num_samples, consumed=consumed, count=num_samples, seed=seed)
    assert sorted(order) == list(range(num_samples))


@given(st.integers(1, 30), st.integers(0, 60), st.lists(st.integers(0, 20), max_size=6), st.integers(0, 99))
def test_sample_order_depends_on_what_was_consumed_alone(
    num_samples: int, consumed: int, steps: list[int], seed: int
) -> None:
    """However it is cut into steps, the order is the same."""
    found: list[int] = []
    for count in steps:
        at = consumed + len(found)
        found += sample_indices(num_samples=num_samples, consumed=at, count=count, seed=seed)
    whole = sample_indices(num_samples=num_samples, consumed=consumed, count=sum(steps), seed=seed)
    assert tuple(found) == whole


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4))
def test_microbatches_partition_a_step(dp: int, num_microbatches: int, micro_batch: int) -> None:
    """Every sample of the global batch goes to one microbatch of one rank, whatever dp."""
    samples = range(dp * num_microbatches * micro_batch)
    taken = [
        samples[
            microbatch_slice(
                dp=dp,
                dp_index=index,
                num_microbatches=num_microbatches,
                microbatch=microbatch,
                micro_batch=micro_batch,
            )
        ]
        for index in range(dp)
        for microbatch in range(num_microbatches)
    ]
    assert {len(own) for own in taken} == {micro_batch}
    assert sorted(sample for own in taken for sample in own) == list(samples)
