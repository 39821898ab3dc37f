"""Theorem of parity: a plan on many ranks trains as one rank does, gradient by gradient."""

from __future__ import annotations

from attrs import evolve
from hypothesis import given, settings

from property_tests.strategies_runtime import trainings
from tests.runtime.models import (
    TOLERANCE,
    assert_as_planned,
    bf16_excess,
    distance,
    in_precision,
    random_samples,
    reference,
    single_rank,
    train,
    wide_gradients,
)


@settings(max_examples=max(10, settings().max_examples // 4))  # each trains
@given(trainings())
def test_many_ranks_train_as_one(training):
    """Loss, norm and every gradient of two steps are the single rank's, by the planned rows and bytes."""
    made = training.plan
    data = random_samples(made.model.vocab_size, made.workload.seq_len, ragged=training.ragged)
    reports = train(made, data, seed=training.seed, steps=2)
    found = distance(made, reports, reference(single_rank(made), ragged=training.ragged, steps=2))
    assert found.largest <= TOLERANCE[made.workload.precision], found
    assert_as_planned(made, reports)


@settings(max_examples=max(10, settings().max_examples // 8))
@given(trainings(precisions=("bf16",)))
def test_many_ranks_are_as_near_as_one_in_bf16(training):
    """To fp64 from the same weights: gradients, in whatever format they are kept and travel, and the loss."""
    made = training.plan
    data = random_samples(made.model.vocab_size, made.workload.seq_len, ragged=training.ragged)
    many, many_loss = wide_gradients(made, data, seed=training.seed)
    one, one_loss = wide_gradients(single_rank(in_precision(made, "bf16")), data)
    exact, loss = wide_gradients(single_rank(in_precision(made, "fp64")), data)
    assert bf16_excess(many, one, exact) <= (0.0, "")
    assert abs(many_loss - loss) <= 2 * abs(one_loss - loss) + 2.0**-9 * loss


@settings(max_examples=max(5, settings().max_examples // 8))  # each trains twice
@given(trainings())
def test_what_is_recomputed_or_copied_has_the_same_bits(training):
    """Without recomputing and offloading, the same plan has equal losses, norms and gradients."""
    made = training.plan
    kept = evolve(made, recompute="none", offload=False)
    data = random_samples(made.model.vocab_size, made.workload.seq_len, ragged=training.ragged)
    pair = (train(plan, data, seed=training.seed, steps=1) for plan in (made, kept))
    for ours, theirs in zip(*pair, strict=True):
        (own,), (other,) = ours.results, theirs.results
        assert (own.loss, own.grad_norm) == (other.loss, other.grad_norm)
        assert all(tensor.equal(theirs.gradients[0][name]) for name, tensor in ours.gradients[0].items())
