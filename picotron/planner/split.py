"""Layers cut into stages, so that the dearest stage costs least."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

from picotron.errors import PlanError


def stage_split(
    layer_costs: Sequence[float], num_stages: int, *, first: float = 0.0, last: float = 0.0
) -> tuple[int, ...]:
    """Layers a stage, in order, so that the dearest stage costs least; every layer is in exactly one.

    ``first`` and ``last`` are what the embedding and the head add to the end stages, in the unit of
    ``layer_costs``. Among the splits with the least maximum it takes one with the least sum of squares.
    Exact, by dynamic programming over prefixes: O(layers² · stages).
    Raises PlanError when there are more stages than layers.
    """
    num_layers = len(layer_costs)
    if not 1 <= num_stages <= num_layers:
        raise PlanError(
            f"stages must be in [1, {num_layers}], one layer at least in each, got {num_stages}; lower pp"
        )
    sums = [0.0, *accumulate(layer_costs)]

    def cost(start: int, stop: int, stage: int) -> float:
        ends = first * (stage == 0) + last * (stage == num_stages - 1)
        return sums[stop] - sums[start] + ends

    limit, _ = _best_cuts(num_layers, num_stages, cost, max)
    tolerance = limit * (1 + 1e-12)

    def squared(start: int, stop: int, stage: int) -> float:
        value = cost(start, stop, stage)
        return value * value if value <= tolerance else float("inf")

    _, cuts = _best_cuts(num_layers, num_stages, squared, lambda left, right: left + right)
    return tuple(stop - start for start, stop in zip([0, *cuts[:-1]], cuts, strict=True))


def _best_cuts(
    num_layers: int,
    num_stages: int,
    cost: Callable[[int, int, int], float],
    join: Callable[[float, float], float],
) -> tuple[float, list[int]]:
    """Least joined cost of cutting the layers into stages, and where each stage stops."""
    best = {0: (0.0, [])}  # type: dict[int, tuple[float, list[int]]]
    for stage in range(num_stages):
        left = num_stages - stage - 1
        stops = range(stage + 1, num_layers - left + 1) if left else [num_layers]
        best = {
            stop: min(
                (
                    (join(total, cost(start, stop, stage)), [*cuts, stop])
                    for start, (total, cuts) in best.items()
                    if start < stop
                ),
                key=lambda found: found[0],
            )
            for stop in stops
        }
    return best[num_layers]
