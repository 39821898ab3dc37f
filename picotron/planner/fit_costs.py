"""Numbers of ``MeasuredCosts`` from timings: least squares of relative errors, with nothing below 0.

A cost is a sum of causes, each a known amount (FLOPs, bytes, calls) times an unknown price. Every timing is
divided by itself, so that a small work counts as much as a large one. Where timings cannot tell causes apart,
a prior holds their prices: a row of its own that asks a price to stay near what it was measured as elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from attrs import evolve, frozen

from picotron.errors import PlanError
from picotron.planner.measured import CallCost, KernelCost, ProductCost

OBSERVED_TOLERANCE = 0.1  # relative error of a timing that is no outlier; a prior's is weighed against it
_ROUNDS_OF_TRUST = 30
CACHE_SIZES = tuple(2**power for power in range(15, 25))  # of which a fit takes the best


@frozen
class ProductTiming:
    """Seconds of a call that multiplies, and what it multiplied: shape (m, n, k, batch)."""

    flops: int
    shape: tuple[int, ...]
    seconds: float


@frozen
class Observation:
    """Seconds of a piece of a training step, and the amounts of its causes by name."""

    amounts: Mapping[str, float]
    seconds: float


@frozen
class Prior:
    """What the price of a cause is expected to be, and the relative error that this may have."""

    price: float
    tolerance: float


def nonnegative_least_squares(rows: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The x >= 0 of least squared ``rows @ x - values`` (Lawson and Hanson 1974, chapter 23)."""
    scale = np.linalg.norm(rows, axis=0)
    scale[scale == 0] = 1.0
    rows = rows / scale
    taken = np.zeros(rows.shape[1], dtype=bool)
    x = np.zeros(rows.shape[1])
    for _ in range(10 * rows.shape[1]):
        slope = np.where(taken, -np.inf, rows.T @ (values - rows @ x))
        if taken.all() or slope.max() <= 1e-12 * np.linalg.norm(values):
            break
        taken[slope.argmax()] = True
        while True:
            best = np.zeros_like(x)
            best[taken] = np.linalg.lstsq(rows[:, taken], values, rcond=None)[0]
            if (best[taken] > 0).all():
                x = best
                break
            falling = taken & (best <= 0)
            step = (x[falling] / (x[falling] - best[falling])).min()
            x += step * (best - x)
            taken &= x > 1e-15
    found: np.ndarray = x / scale
    return found


def fit_prices(
    observations: Sequence[Observation], priors: Mapping[str, Prior] | None = None
) -> dict[str, float]:
    """The price of each cause that occurs, none below 0.

    A timing that the others contradict counts less the farther off it is (Huber 1964, Annals of Mathematical
    Statistics 35(1)). Raises PlanError unless there are timings, all of them positive.
    """
    held = priors or {}
    names = sorted({name for seen in observations for name in seen.amounts} | set(held))
    _check_seconds([seen.seconds for seen in observations])
    rows = np.array([[seen.amounts.get(name, 0.0) / seen.seconds for name in names] for seen in observations])
    weights = OBSERVED_TOLERANCE / np.array([held[name].tolerance for name in names if name in held])
    places = [position for position, name in enumerate(names) if name in held]
    expected = np.zeros((len(places), len(names)))
    expected[range(len(places)), places] = weights / [held[names[place]].price for place in places]
    trust = np.ones(len(rows))
    for _ in range(_ROUNDS_OF_TRUST):
        found = nonnegative_least_squares(
            np.concatenate([rows * trust[:, None], expected]), np.concatenate([trust, weights])
        )
        off = np.abs(rows @ found - 1)
        trust = np.sqrt(np.minimum(1, OBSERVED_TOLERANCE / np.maximum(off, OBSERVED_TOLERANCE)))
    return dict(zip(names, map(float, found), strict=True))


def fit_product(timings: Sequence[ProductTiming]) -> ProductCost:
    """Rate, half-rate sizes and fixed seconds of products, the sizes only as far as the shapes vary.

    Of timings that do not grow with the FLOPs, the rate of all together.
    """
    amounts = []
    for timing in timings:
        sizes = dict(zip("mnk", timing.shape, strict=False))
        halves = {f"half_{name}": timing.flops / size for name, size in sizes.items()}
        amounts.append({"flop": float(timing.flops), **halves, "call": 1.0})
    kept = {"flop", "call", *_varying([timing.shape for timing in timings])}
    prices = fit_prices(
        [
            Observation({name: amount for name, amount in own.items() if name in kept}, timing.seconds)
            for own, timing in zip(amounts, timings, strict=True)
        ]
    )
    flop = prices["flop"]
    if flop <= 0:
        return ProductCost(flops_per_second=_total_rate([(t.flops, t.seconds) for t in timings]))
    halves = {name: prices[name] / flop for name in kept if name.startswith("half_")}
    return ProductCost(flops_per_second=1 / flop, fixed_seconds=prices["call"], **halves)


def _varying(shapes: Sequence[tuple[int, ...]]) -> list[str]:
    """Names of the half-rates that can be told: sizes that vary, one of those that vary together."""
    columns: dict[tuple[int, ...], str] = {}
    for position, name in enumerate("mnk"):
        columns.setdefault(tuple(shape[position] for shape in shapes), f"half_{name}")
    return [name for sizes, name in columns.items() if len(set(sizes)) > 1]


def fit_kernel(timings: Sequence[tuple[int, float]]) -> tuple[KernelCost, float]:
    """Rates of kernels' bytes, with the best of CACHE_SIZES, and a kernel's fixed seconds.

    ``timings`` are (bytes, seconds).
    """
    best: tuple[float, KernelCost, float] | None = None
    for cache_bytes in CACHE_SIZES:
        observations = [
            Observation(
                {
                    "call": 1.0,
                    "cached": float(min(moved_bytes, cache_bytes)),
                    "memory": float(max(0, moved_bytes - cache_bytes)),
                },
                seconds,
            )
            for moved_bytes, seconds in timings
        ]
        prices = fit_prices(observations)
        cached, memory = prices["cached"], prices["memory"]
        if not 0 < cached <= memory:
            continue
        cost = KernelCost(
            cached_bytes_per_second=1 / cached, memory_bytes_per_second=1 / memory, cache_bytes=cache_bytes
        )
        errors = [(cost.seconds(size) + prices["call"]) / seconds - 1 for size, seconds in timings]
        error = float(np.abs(errors).mean())
        if best is None or error < best[0]:
            best = error, cost, prices["call"]
    return (best[1], best[2]) if best is not None else _one_rate(timings)


def _one_rate(timings: Sequence[tuple[int, float]]) -> tuple[KernelCost, float]:
    """Where no cache shows: the same rate throughout."""
    prices = fit_prices(
        [Observation({"call": 1.0, "byte": float(size)}, seconds) for size, seconds in timings]
    )
    rate = 1 / prices["byte"] if prices["byte"] > 0 else _total_rate(timings)
    return KernelCost(cached_bytes_per_second=rate, memory_bytes_per_second=rate), prices["call"]


def _total_rate(timings: Sequence[tuple[int, float]]) -> float:
    """All amounts over all seconds: what is left to say of timings so disturbed that they do not grow."""
    return sum(amount for amount, _ in timings) / sum(seconds for _, seconds in timings)


def fit_call(kind: str, timings: Sequence[tuple[int, float]]) -> CallCost:
    """CPU seconds of a communication call from (payload bytes, seconds of a rank)."""
    prices = fit_prices(
        [Observation({"call": 1.0, "byte": float(size)}, seconds) for size, seconds in timings]
    )
    return CallCost(kind=kind, call_seconds=prices["call"], byte_seconds=prices["byte"])


def scaled_product(cost: ProductCost, scale: float, *, element_seconds: float = 0.0) -> ProductCost:
    """The cost with ``scale`` times its seconds and ``element_seconds`` more for each element of m, n and k.

    An element of an operand or of the result: mk + kn + mn of them, so that each half-rate size grows alike.
    """
    rate = cost.flops_per_second / scale
    more = element_seconds * rate / 2
    return evolve(
        cost,
        flops_per_second=rate,
        half_m=cost.half_m + more,
        half_n=cost.half_n + more,
        half_k=cost.half_k + more,
        fixed_seconds=cost.fixed_seconds * scale,
    )


def scaled_kernel(cost: KernelCost, scale: float) -> KernelCost:
    """The cost with ``scale`` times the seconds of its bytes."""
    return evolve(
        cost,
        cached_bytes_per_second=cost.cached_bytes_per_second / scale,
        memory_bytes_per_second=cost.memory_bytes_per_second / scale,
    )


def _check_seconds(seconds: Sequence[float]) -> None:
    if not seconds or not all(0 < value < float("inf") for value in seconds):
        raise PlanError(
            f"timings must be positive numbers of seconds, at least one, got {[*seconds][:8]}; measure longer"
        )
