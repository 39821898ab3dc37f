"""Fits of made-up timings find the numbers they were made with."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from picotron.errors import PlanError
from picotron.planner.fit_costs import (
    Observation,
    Prior,
    ProductTiming,
    fit_call,
    fit_kernel,
    fit_prices,
    fit_product,
    nonnegative_least_squares,
    scaled_product,
)
from picotron.planner.measured import KernelCost, ProductCost


def timings(cost: ProductCost, shapes: list[tuple[int, int, int]]) -> list[ProductTiming]:
    """What ``cost`` says of products of the shapes."""
    return [
        ProductTiming(2 * m * n * k, (m, n, k, 1), cost.seconds(2 * m * n * k, (m, n, k, 1)))
        for m, n, k in shapes
    ]


def test_half_rates_are_found_again() -> None:
    """From exact timings over a grid all five numbers come back."""
    made = ProductCost(flops_per_second=1e11, half_m=5, half_n=40, half_k=12, fixed_seconds=3e-6)
    found = fit_product(timings(made, list(product((16, 128, 512), repeat=3))))
    for name in ("flops_per_second", "half_m", "half_n", "half_k", "fixed_seconds"):
        assert getattr(found, name) == pytest.approx(getattr(made, name), rel=1e-6), name


def test_sizes_that_vary_together_are_one_half_rate() -> None:
    """Queries and keys of attention are equal in number: the sum of their half-rates is what counts."""
    made = ProductCost(flops_per_second=1e10, half_m=30, half_n=20, fixed_seconds=1e-4)
    shapes = [(size, size, width) for size, width in product((32, 128, 512), (32, 64))]
    found = fit_product(timings(made, shapes))
    assert (found.half_m, found.half_n) == (pytest.approx(50, rel=1e-6), 0)
    for timing in timings(made, [(64, 64, 64), (1024, 1024, 32)]):
        assert found.seconds(timing.flops, timing.shape) == pytest.approx(timing.seconds)


def test_noise_moves_a_fit_by_no_more_than_itself() -> None:
    """With 5 % of noise on every timing, other shapes are predicted within 5 %."""
    made = ProductCost(flops_per_second=1e11, half_m=5, half_n=40, half_k=12, fixed_seconds=3e-6)
    noise = np.random.default_rng(0)
    noisy = [
        ProductTiming(t.flops, t.shape, t.seconds * noise.uniform(0.95, 1.05))
        for t in timings(made, list(product((16, 128, 512), repeat=3)))
    ]
    found = fit_product(noisy)
    for timing in timings(made, [(64, 64, 64), (1024, 300, 2000), (32, 4096, 256)]):
        assert found.seconds(timing.flops, timing.shape) == pytest.approx(timing.seconds, rel=0.05)


def test_both_rates_of_kernels_and_the_size_of_the_cache_are_found_again() -> None:
    """Kernels of 2**12 to 2**26 bytes, a cache of 2**19: rates and fixed seconds come back."""
    made = KernelCost(cached_bytes_per_second=4e10, memory_bytes_per_second=1e10, cache_bytes=2**19)
    seen = [(2**power, made.seconds(2**power) + 2e-6) for power in range(12, 27)]
    found, fixed = fit_kernel(seen)
    assert found.cache_bytes == 2**19
    assert found.cached_bytes_per_second == pytest.approx(4e10)
    assert found.memory_bytes_per_second == pytest.approx(1e10)
    assert fixed == pytest.approx(2e-6)


def test_where_no_cache_shows_kernels_have_one_rate() -> None:
    """Large kernels that are no slower a byte than small ones: the same rate throughout."""
    found, fixed = fit_kernel([(2**power, 1e-6 + 2**power / 1e10) for power in range(12, 24)])
    assert found.seconds(2**30) == pytest.approx(2**30 / 1e10)
    assert fixed == pytest.approx(1e-6)


def test_a_call_is_a_fixed_cost_and_a_rate() -> None:
    """100 us and 1 ns a byte."""
    found = fit_call("send", [(size, 1e-4 + size * 1e-9) for size in (64, 2**16, 2**20)])
    assert (found.kind, found.call_seconds, found.byte_seconds) == (
        "send",
        pytest.approx(1e-4),
        pytest.approx(1e-9),
    )


def test_no_price_is_below_zero() -> None:
    """A cause that only a negative price would explain gets none; the best of the others is what is left."""
    rows, values = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]]), np.array([3.0, 2.0, 1.0])
    assert nonnegative_least_squares(rows, values) == pytest.approx([2.0, 0.0])
    assert nonnegative_least_squares(rows, values[::-1]) == pytest.approx([0.0, 1.0])


def test_a_prior_holds_what_observations_do_not_tell() -> None:
    """Two causes that always come together: the sum is observed, and the priors divide it."""
    seen = [Observation({"a": 1.0, "b": 1.0}, 3.0)]
    found = fit_prices(seen, {"a": Prior(1.0, 0.01), "b": Prior(5.0, 100.0)})
    assert found["a"] == pytest.approx(1.0, abs=0.01)
    assert found["a"] + found["b"] == pytest.approx(3.0, abs=0.01)


def test_a_scaled_product_takes_so_many_times_longer() -> None:
    """Twice its seconds, and a second for each element of operands and result: 12 + 20 + 15 of them."""
    cost = ProductCost(flops_per_second=10, half_m=1, half_n=2, half_k=3, fixed_seconds=4)
    flops, shape = 2 * 3 * 5 * 4, (3, 5, 4, 1)
    found = scaled_product(cost, 2.0, element_seconds=1.0)
    assert found.seconds(flops, shape) == pytest.approx(2 * cost.seconds(flops, shape) + 12 + 20 + 15)


def test_one_wild_timing_does_not_bend_a_fit() -> None:
    """One of fifteen is ten times too long or too short: the others tell the price within 10 percent."""
    seen = [Observation({"byte": 2.0**power}, 2.0**power * 1e-9) for power in range(15)]
    for factor in (10, 0.1):
        wild = [*seen[:7], Observation(seen[7].amounts, factor * seen[7].seconds), *seen[8:]]
        assert fit_prices(wild)["byte"] == pytest.approx(1e-9, rel=0.1)


def test_timings_that_tell_nothing_are_refused() -> None:
    """No seconds, or none at all."""
    for seconds in ([], [0.0], [1.0, float("nan")]):
        with pytest.raises(PlanError, match="positive numbers of seconds"):
            fit_prices([Observation({"a": 1.0}, value) for value in seconds])


def test_a_disturbed_machine_still_has_rates() -> None:
    """Where seconds do not grow with the work, all work over all seconds: 1111 in 4."""
    sizes = [10**power for power in range(4)]
    cost = fit_product([ProductTiming(size, (size, 1, 1, 1), 1.0) for size in sizes])
    assert (cost.flops_per_second, cost.half_m, cost.fixed_seconds) == (1111 / 4, 0, 0)
    kernel, _ = fit_kernel([(size, 1.0) for size in sizes])
    assert kernel.seconds(1111) == pytest.approx(4)
