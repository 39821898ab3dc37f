"""Theorem of parity: a plan on many ranks trains as one rank does, gradient by gradient."""

from __future__ import annotations

from hypothesis import given, settings

from property_tests.strategies_runtime import trainings
from tests.runtime.models import (
    TOLERANCE,
    assert_as_planned,
    distance,
    random_samples,
    reference,
    single_rank,
    train,
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
