"""How many layers get which option, in order of what that adds, without what cannot fit: a small knapsack.

Layers of a kind have the same options; an option costs seconds, and takes bytes at each of a few moments.
Counts are found best first (Hart, Nilsson and Raphael 1968, IEEE Trans. SSC 4(2)), by what a linear
relaxation says that the layers without an option yet add at least.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterator
from heapq import heappop, heappush
from math import inf

from attrs import evolve, field, frozen

MAX_STATES = 100_000  # of a search, before it settles for the cheapest mixes of two options
Counts = tuple[tuple[int, ...], ...]  # layers, by kind and option
_Hulls = dict[tuple[int, int, int], list[tuple[int, float]]]  # by kind, first option and moment


@frozen(kw_only=True)
class Kinds:
    """What is to be chosen: of each kind ``num_layers``, and by option their ``seconds`` and ``sizes``.

    ``sizes``: bytes that a layer takes with an option, by kind, option and moment; they may be negative where
    ``base``, by moment, counts more than can remain. ``copied``: which options are an offload.
    """

    num_layers: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]
    sizes: tuple[tuple[tuple[int, ...], ...], ...]
    base: tuple[int, ...]
    copied: tuple[bool, ...]
    order: tuple[tuple[int, ...], ...] = field(init=False, repr=False)  # options, the cheapest first

    @order.default
    def _cheapest_first(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(sorted(range(len(own)), key=own.__getitem__)) for own in self.seconds)


@frozen
class _State:
    """Options chosen of some layers: all of the kinds before ``kind``, and of its own of those before ``at``.

    It goes on by one layer more with the option ``at`` (in ``order``), or by the next option. ``left``:
    layers of the kind still to be chosen; ``free``: bytes at each moment not taken; ``copies``: offloads.
    """

    seconds: float
    kind: int
    at: int
    left: int
    free: tuple[int, ...]
    counts: Counts
    copies: int


def ascending(kinds: Kinds, budget_bytes: int) -> Iterator[Counts]:
    """Counts in order of their seconds, of equal ones with fewest offloads first; none proven not to fit."""
    hulls: _Hulls = {}
    heap: list[tuple[tuple[float, int, int, int], _State]] = []
    number = itertools.count()
    last = len(kinds.num_layers) - 1

    def push(state: _State) -> None:
        seconds = state.seconds + _least_seconds(kinds, state, hulls)
        if seconds < inf:
            left = state.left + sum(kinds.num_layers[state.kind + 1 :])
            key = (
                float(f"{seconds:.12g}"),
                state.copies,
                left,
                next(number),
            )  # rounding makes equal ones equal
            heappush(heap, (key, state))

    free = tuple(budget_bytes - size for size in kinds.base)
    nothing = tuple((0,) * len(own) for own in kinds.seconds)
    push(_State(0.0, 0, 0, kinds.num_layers[0], free, nothing, 0))
    while heap and heap[0][0][-1] < MAX_STATES:
        state = heappop(heap)[1]
        if state.left:
            push(_with_one(kinds, state))
            if state.at + 1 < len(kinds.copied):
                push(evolve(state, at=state.at + 1))
        elif state.kind < last:
            push(evolve(state, kind=state.kind + 1, at=0, left=kinds.num_layers[state.kind + 1]))
        else:
            yield state.counts
    if heap:
        yield from _mixes(kinds)


def _with_one(kinds: Kinds, state: _State) -> _State:
    """One layer more with the option that the state is at."""
    kind, option = state.kind, kinds.order[state.kind][state.at]
    own = tuple(count + (index == option) for index, count in enumerate(state.counts[kind]))
    return _State(
        seconds=state.seconds + kinds.seconds[kind][option],
        kind=kind,
        at=state.at,
        left=state.left - 1,
        free=tuple(room - size for room, size in zip(state.free, kinds.sizes[kind][option], strict=True)),
        counts=(*state.counts[:kind], own, *state.counts[kind + 1 :]),
        copies=state.copies + kinds.copied[option],
    )


def _least_seconds(kinds: Kinds, state: _State, hulls: _Hulls) -> float:
    """Seconds that the layers still to be chosen add at least; inf where they cannot fit."""
    sizes, seconds = _rest(kinds, state.kind)
    least = 0.0
    for moment, room in enumerate(state.free):
        room -= sizes[moment]
        key = state.kind, state.at, moment
        if key not in hulls:
            hulls[key] = _hull(kinds, *key)
        least = max(least, _interpolated(hulls[key], room, state.left))
    return seconds + least


def _rest(kinds: Kinds, kind: int) -> tuple[list[int], float]:
    """At least the bytes at each moment, and the seconds, of the layers of all kinds after ``kind``."""
    sizes, seconds = [0] * len(kinds.base), 0.0
    for later in range(kind + 1, len(kinds.num_layers)):
        many = kinds.num_layers[later]
        seconds += many * min(kinds.seconds[later])
        for moment in range(len(sizes)):
            sizes[moment] += many * min(size[moment] for size in kinds.sizes[later])
    return sizes, seconds


def _hull(kinds: Kinds, kind: int, at: int, moment: int) -> list[tuple[int, float]]:
    """(size, seconds) of the options from ``at`` on that a mix by share of layers may need, by size."""
    options = kinds.order[kind][at:]
    points = sorted((kinds.sizes[kind][one][moment], kinds.seconds[kind][one]) for one in options)
    hull: list[tuple[int, float]] = []
    for size, seconds in points:
        if hull and seconds >= hull[-1][1]:
            continue
        while len(hull) > 1 and _above(hull[-2], hull[-1], (size, seconds)):
            hull.pop()
        hull.append((size, seconds))
    return hull


def _above(one: tuple[int, float], middle: tuple[int, float], other: tuple[int, float]) -> bool:
    """Whether ``middle`` is on or above the line between the two."""
    return (middle[1] - one[1]) * (other[0] - one[0]) >= (other[1] - one[1]) * (middle[0] - one[0])


def _interpolated(hull: list[tuple[int, float]], room: int, left: int) -> float:
    """Least seconds of ``left`` layers, by shares, that have ``room`` bytes."""
    if room < left * hull[0][0]:
        return inf
    if not left:
        return 0.0
    place = bisect_right(hull, room / left, key=lambda point: point[0])
    if place in (0, len(hull)):
        return left * hull[max(0, place - 1)][1]
    (small, dear), (large, cheap) = hull[place - 1], hull[place]
    return left * dear - (room - left * small) * ((dear - cheap) / (large - small))


def _mixes(kinds: Kinds) -> Iterator[Counts]:
    """Counts of at most two options a kind, the same two for all kinds, the cheapest first."""
    found: set[tuple[float, Counts]] = set()
    width = len(kinds.seconds[0])
    for one, other in itertools.combinations(range(width), 2) if width > 1 else [(0, 0)]:
        most = max(kinds.num_layers)
        for share in range(most + 1):
            counts, cost = [], 0.0
            for kind, many in enumerate(kinds.num_layers):
                own = [0] * width
                own[one] += min(share, many)
                own[other] += many - min(share, many)
                counts.append(tuple(own))
                cost += sum(a * b for a, b in zip(own, kinds.seconds[kind], strict=True))
            found.add((cost, tuple(counts)))
    return iter([counts for _, counts in sorted(found)])
