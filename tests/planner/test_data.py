"""Which gradients travel together, and which samples a step sees."""

from __future__ import annotations

import pytest

from picotron.errors import PlanError
from picotron.planner.data import Bucket, buckets, microbatch_slice, sample_indices
from picotron.planner.layout import Placement


def _placement(name: str, numel: int, segment: int, partial: tuple[str, ...] = ("dp_cp",)) -> Placement:
    return Placement(
        name=name,
        shape=(numel,),
        role="norm",
        init="ones",
        stage=0,
        rank=0,
        segment=segment,
        cut=None,
        replicated=("dp", "cp", "tp"),
        partial=partial,
    )


def test_a_bucket_closes_when_full() -> None:
    """Backward meets segment 2 first; 6 fp32 of d, c reach 24 bytes, b and a (2 + 5) the next 24."""
    places = [_placement(*p) for p in [("a", 5, 0), ("b", 2, 1), ("c", 4, 2), ("d", 2, 2)]]
    assert buckets(places, 0, itemsize=4, bucket_bytes=24) == (
        Bucket(stage=0, index=0, names=("c", "d"), partial=("dp_cp",), ready_segment=2),
        Bucket(stage=0, index=1, names=("b", "a"), partial=("dp_cp",), ready_segment=0),
    )


def test_a_bucket_of_one_byte_holds_one_gradient() -> None:
    """Each gradient is its own bucket, ready after its own segment."""
    places = [_placement("a", 5, 0), _placement("b", 2, 1)]
    found = buckets(places, 0, itemsize=4, bucket_bytes=1)
    assert [(bucket.names, bucket.ready_segment) for bucket in found] == [(("b",), 1), (("a",), 0)]


def test_gradients_with_other_sums_never_share_a_bucket() -> None:
    """A norm partial over tp as well is reduced apart, though it lies between the others."""
    places = [_placement("a", 1, 0), _placement("n", 1, 1, ("tp", "dp_cp")), _placement("b", 1, 2)]
    found = buckets(places, 0, itemsize=4, bucket_bytes=1000)
    assert [(bucket.names, bucket.partial, bucket.ready_segment) for bucket in found] == [
        (("n",), ("tp", "dp_cp"), 1),
        (("b", "a"), ("dp_cp",), 0),
    ]


def test_other_stages_are_left_out() -> None:
    """A stage's buckets hold its own placements."""
    assert buckets([_placement("a", 1, 0)], 1, itemsize=4, bucket_bytes=1000) == ()


def test_every_epoch_visits_each_sample_once_in_an_order_of_its_own() -> None:
    """Two epochs of seven samples: two different permutations."""
    order = sample_indices(num_samples=7, consumed=0, count=14, seed=3)
    assert sorted(order[:7]) == sorted(order[7:]) == list(range(7))
    assert order[:7] != order[7:]
    assert order[:7] != sample_indices(num_samples=7, consumed=0, count=7, seed=4)


def test_steps_continue_where_the_last_one_ended() -> None:
    """Three steps of five samples are the first fifteen, across the border of an epoch."""
    steps = [sample_indices(num_samples=7, consumed=5 * step, count=5, seed=0) for step in range(3)]
    assert steps[0] + steps[1] + steps[2] == sample_indices(num_samples=7, consumed=0, count=15, seed=0)


def test_no_samples_are_refused() -> None:
    """There must be something to read."""
    with pytest.raises(PlanError, match="at least one sample, got 0; add text or shorten seq_len"):
        sample_indices(num_samples=0, consumed=0, count=1, seed=0)


def test_microbatches_of_a_step() -> None:
    """Twelve samples on dp 2 with three microbatches of two: the second rank's second takes 8 and 9."""
    where = {"dp": 2, "num_microbatches": 3, "micro_batch": 2}
    assert microbatch_slice(dp_index=1, microbatch=1, **where) == slice(8, 10)
    assert microbatch_slice(dp_index=1, microbatch=0, **where) == slice(6, 8)
    assert microbatch_slice(dp_index=0, microbatch=2, **where) == slice(4, 6)


@pytest.mark.parametrize(("dp_index", "microbatch"), [(2, 0), (-1, 0), (0, 3), (0, -1)])
def test_microbatches_outside_a_step_are_refused(dp_index: int, microbatch: int) -> None:
    """dp index and microbatch lie below their counts."""
    with pytest.raises(PlanError, match=r"dp index must be in \[0, 2\) and microbatch in \[0, 3\), got"):
        microbatch_slice(dp=2, num_microbatches=3, micro_batch=2, dp_index=dp_index, microbatch=microbatch)
