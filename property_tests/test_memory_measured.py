"""Theorem of memory: what a rank's tensors take is what the plan says, at every moment."""

from __future__ import annotations

from hypothesis import given, settings

from property_tests.strategies_runtime import trainings
from tests.runtime.models import memory_shares, random_samples, train


@settings(max_examples=max(10, settings().max_examples // 4))  # each trains
@given(trainings(optimizers=("adamw", "sgd"), precisions=("fp64", "fp32", "bf16")))
def test_live_bytes_are_the_plans_and_the_peak_nearly(training):
    """In the second step, when all state stands: equal at every entry; the peak is 98 to 100 % of it."""
    made = training.plan
    data = random_samples(made.model.vocab_size, made.workload.seq_len, ragged=training.ragged)
    shares = memory_shares(made, train(made, data, seed=training.seed, steps=2, measure_from=1))
    assert min(shares) >= 0.98
    assert max(shares) <= 1.0
