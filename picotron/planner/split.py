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


def rank_split(
    layer_costs: Sequence[float], stage_ranks: Sequence[int], *, first: float = 0.0, last: float = 0.0
) -> tuple[int, ...]:
    """Layers a stage, in order, so that the dearest *rank* costs little; a rank pays for all its stages.

    With one stage a rank this is ``stage_split``, exactly. Otherwise it begins there and takes a layer from
    the dearest rank, as long as that lowers (dearest rank, sum of squares over ranks, dearest stage): not
    always the best split, and never a worse one than ``stage_split``.
    """
    sizes = list(stage_split(layer_costs, len(stage_ranks), first=first, last=last))
    if len(set(stage_ranks)) == len(stage_ranks):
        return tuple(sizes)
    sums = [0.0, *accumulate(layer_costs)]

    def costs(sizes: Sequence[int]) -> tuple[list[float], float]:
        stops = list(accumulate(sizes))
        stages = [sums[stop] - sums[stop - size] for stop, size in zip(stops, sizes, strict=True)]
        stages[0] += first
        stages[-1] += last
        ranks = [0.0] * (max(stage_ranks) + 1)
        for rank, cost in zip(stage_ranks, stages, strict=True):
            ranks[rank] += cost
        return ranks, max(stages)

    def figure(sizes: Sequence[int]) -> tuple[float, float, float]:
        ranks, dearest = costs(sizes)
        return max(ranks), sum(cost * cost for cost in ranks), dearest

    best = figure(sizes)
    while True:
        ranks, _ = costs(sizes)
        sources = [
            stage for stage, rank in enumerate(stage_ranks) if ranks[rank] == max(ranks) and sizes[stage] > 1
        ]
        targets = range(len(sizes))
        moves = [
            _moved(sizes, source, target) for source in sources for target in targets if source != target
        ]
        found = min(((figure(move), move) for move in moves), default=(best, sizes))
        if found[0] >= best or _nearly(found[0], best):
            return tuple(sizes)
        best, sizes = found


def _moved(sizes: Sequence[int], source: int, target: int) -> list[int]:
    """One layer less in ``source``, one more in ``target``; those between keep their number."""
    moved = list(sizes)
    moved[source] -= 1
    moved[target] += 1
    return moved


def _nearly(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Whether they differ by rounding only."""
    return all(abs(a - b) <= 1e-12 * max(abs(a), abs(b)) for a, b in zip(one, other, strict=True))


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
