"""Theorems of the loss: it is a mean over the step's labelled tokens, wherever they are computed."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from picotron.runtime.data import step_batches
from property_tests.strategies_runtime import LARGEST_BATCH, degree_triples, trainings
from tests.runtime.models import (
    TOLERANCE,
    random_samples,
    reference,
    single_rank,
    tiny_model,
    tiny_plan,
    tiny_workload,
    train,
)


@settings(max_examples=max(10, settings().max_examples // 4))  # each trains
@given(trainings(least_batch=4))
def test_unequal_padding_weighs_no_token_more(training):
    """Samples of unequal length give the single rank's loss and count of tokens on every rank."""
    made = training.plan
    work = made.workload
    data = random_samples(made.model.vocab_size, work.seq_len, ragged=True)
    wanted = reference(single_rank(made), ragged=True, steps=1).results[0]
    for report in train(made, data, seed=training.seed, steps=1):
        (result,) = report.results
        assert abs(result.loss - wanted.loss) <= TOLERANCE[work.precision] * wanted.loss
        assert result.num_tokens == wanted.num_tokens < work.global_batch * work.seq_len


@given(
    st.sampled_from([t for t in degree_triples() if LARGEST_BATCH % t[0] == 0]),
    st.integers(1, 2),
    st.integers(0, 99),
)
def test_the_order_of_samples_does_not_know_the_topology(degrees, micro_batch, consumed):
    """Laid one after the other, the data-parallel ranks' microbatches are the single rank's."""
    dp, pp, tp = degrees
    model = tiny_model("llama", heads=tp, kv_heads=tp, layers=max(2, pp))
    work = tiny_workload(global_batch=LARGEST_BATCH)
    data = random_samples(model.vocab_size, work.seq_len, ragged=True)
    made = tiny_plan(model, work, dp=dp, pp=pp, tp=tp, micro_batch=micro_batch)
    alone = step_batches(tiny_plan(model, work), data, consumed=consumed, dp_index=0)
    shared = [step_batches(made, data, consumed=consumed, dp_index=index) for index in range(dp)]
    for column in ("ids", "targets"):
        one = np.concatenate([getattr(batch, column) for batch in alone])
        many = np.concatenate([getattr(batch, column) for batches in shared for batch in batches])
        np.testing.assert_array_equal(many, one)
