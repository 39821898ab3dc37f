"""What ranks idle under each schedule, in closed form: seconds of a step beyond a rank's own work.

A step takes as long as its longest chain of actions that wait for each other, on whichever ranks. Of each
schedule the chains are listed that can be the longest one, each by how many F, I and W of a rank it has more
than the m of each that every rank runs anyhow; ranks idle what the longest has more, or nothing.

The chains were read off the schedules of ``catalogue`` on equal stages (by following what each action waited
for, from the last one back), for up to 16 ranks, 6 stages a rank and 6 times as many microbatches as ranks.
Where I takes no less than F and W no more they give a schedule's own time exactly, up to the 32 ranks that
were tried (``benchmarks/bubbles.py``). For many microbatches most are published: Narayanan et al. 2021,
arXiv:2104.04473 (1F1B, interleaved); Lamy-Poirier 2022, arXiv:2211.05953 (breadth first); Qi et al. 2023,
arXiv:2401.10241, and 2024, arXiv:2405.15362 (zero bubble, V-shaped); DeepSeek-AI 2024, arXiv:2412.19437
(DualPipe).

No chain has fewer I than m, but where it has fewer of all three and is shorter than what a rank runs: the
longer I takes, as with recomputation, the longer ranks idle, or as long.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from picotron.planner.cases import Column

Chain = tuple[Column | float, Column | float, Column | float]
"""How many F, I and W of a rank, all its stages together, a chain has more than m of each."""
Chains = Sequence[Chain]
NONE: Chain = (0.0, 0.0, 0.0)


def bubble_seconds(
    name: str,
    ranks: Column,
    stages: Column,
    microbatches: Column,
    forward: Column,
    inputs: Column,
    weights: Column,
) -> Column:
    """Seconds that a rank idles in a step of the schedule ``name``, at least 0.

    ``forward``, ``inputs``, ``weights``: seconds of F, I and W of a microbatch on all ``stages`` of a rank.
    """
    found: Column = np.zeros(())
    for f, i, w in _CHAINS[name](ranks, stages, microbatches):
        found = np.maximum(found, f * forward + i * inputs + w * weights)
    return found


def _few(p: Column, m: Column) -> Column:
    """How many microbatches are wanting to p."""
    few: Column = np.maximum(p - m, 0.0)
    return few


def _whole(p: Column, v: Column, m: Column) -> Chains:
    """1F1B and its like: the way up and back through the stages of a chunk."""
    way = (p - 1) / v + _few(p, m) * (1 - 1 / v)
    return [(way, way, way)]


def _zb_h1(p: Column, v: Column, m: Column) -> Chains:
    q = p - 1
    return [(q, 0.0, 0.0), (q, q, -np.minimum(m - 1, q))]


def _zb_h2(p: Column, v: Column, m: Column) -> Chains:
    q = p - 1
    return [
        (q, 0.0, 0.0),
        (q, q, -np.minimum(m - 1, 2 * q)),
        (p - m, q, 0.0),
        _where(m <= 2 * q, (q, 1.0, -1.0), NONE),
    ]


def _interleaved_zb(p: Column, v: Column, m: Column) -> Chains:
    q, more = (p - 1) / v, _few(p, m) * (1 - 1 / v)
    return [
        (q + more, q, -np.minimum(m - 1, p - 1) / v),
        (q + more, q + more, 1 / v - m),
        (_few(p, m), q, 0.0),
        (_few(p, m), q + more, -m * (1 - 1 / v)),
    ]


def _zb_v(p: Column, v: Column, m: Column) -> Chains:
    q = p - 1
    return [
        (0.0, q / 2, 0.0),
        (p - m, q / 2, 0.0),
        (0.0, q, -q),
        (0.0, q, (1 - m) / 2),
        (p - m, q, m / 2 + 0.5 - p),
        (p - m, q, 0.5 - m),
    ]


def _dualpipe_v(p: Column, v: Column, m: Column) -> Chains:
    """An order for 2p microbatches, less those that there are not."""
    q, few = p - 1, m <= p
    last = np.maximum(p + 1 - m + q / 2, -q / 2)
    turn, rest = p - (m + 1) / 2, np.maximum(p - m / 2, 0.0)
    return [
        _where(few, (p - m, q, q / 2), (p / 2 - 1, q, last)),
        _where(few, (turn, turn, q / 2), (q, q / 2, last)),
        _where(few, NONE, (q, rest, rest)),
    ]


def _of_two_or_three(p: Column, m: Column) -> Chains:
    """V-Half and V-Min, which are one where ranks are two or three."""
    two = p <= 2
    return [
        (p - m, p - 1, 0.5 - m),
        _where(two, (2 - m, m - 1, 1.5 - m), (3 - m, m + 1, 0.5 - m)),
        _where(two, (0.0, 1.0, -0.5), _where(m > 1, (1.0, 3.0, -1.5), NONE)),
        NONE,
        NONE,
    ]


def _v_half(p: Column, v: Column, m: Column) -> Chains:
    """Where I is longer than F ranks wait in every repeat of the block, m times."""
    turn = p - 0.75 * m - 0.25
    even: Chains = [
        (p - m, p + m - 3, 0.5 - m),
        (turn, turn, -m / 2),
        (0.75 * p - m / 2 + 1, p + m - 4.5, -p / 4 - m / 2),
        (0.75 * p - m / 2 - 1, p + m - 3, -p / 4 - m / 2 - 0.5),
        _where(m >= p / 2 + 2, (p / 2 - 1, 1.5 * p - 2, -p / 2 - 0.5), NONE),
    ]
    odd: Chains = [
        (p - m, p + m - 2, 0.5 - m),
        (p - m, p + m - 2, -p / 4 - m / 2 - 0.25),
        _where(m > p / 2, ((p - 1) / 2, 1.5 * (p - 1), -p / 2), NONE),
        NONE,
        NONE,
    ]
    return [(p - m, p - 1, 0.5 - m), *_by_ranks(p, m, [p % 2 == 0], [even, odd])]


def _v_min(p: Column, v: Column, m: Column) -> Chains:
    """Where I is longer than F ranks wait twice in every repeat of the block."""
    turn, near = p - m / 2 - 0.5, p / 3
    by_remainder: list[Chains] = [
        [
            (p - m + 1.5, p + 2 * m - 5.5, 0.5 - m),
            _where((m > 1) & (m <= near + 1), (p - m, p + 2 * m - 4, 0.5 - m), NONE),
            _where(m == near + 2, (p - m + 0.5, p + 2 * m - 5, 1 - m), NONE),
            NONE,
            NONE,
        ],
        [(p - m, p + 2 * m - 3, 0.5 - m), (turn, turn, -m / 4 - 0.25), NONE, NONE, NONE],
        [(p - m, p + 2 * m - 5, np.where(m > (p + 4) / 3, 1.0, 0.5) - m), NONE, NONE, NONE, NONE],
    ]
    return [(p - m, p - 1, 0.5 - m), *_by_ranks(p, m, [p % 3 == 0, p % 3 == 1], by_remainder)]


def _by_ranks(p: Column, m: Column, kinds: list[Column], chains: list[Chains]) -> Chains:
    """The chains of the first kind of p that holds, or of the last; those of two and three ranks apart."""
    found = chains[-1]
    for kind, own in zip(reversed(kinds), reversed(chains[:-1]), strict=True):
        found = [_where(kind, one, other) for one, other in zip(own, found, strict=True)]
    few = _of_two_or_three(p, m)
    return [_where(p <= 3, one, other) for one, other in zip(few, found, strict=True)]


def _where(condition: Column, one: Chain, other: Chain) -> Chain:
    f, i, w = (np.where(condition, a, b) for a, b in zip(one, other, strict=True))
    return f, i, w


_CHAINS: dict[str, Callable[[Column, Column, Column], Chains]] = {
    "afab": _whole,
    "1f1b": _whole,
    "interleaved": _whole,
    "bfs": _whole,
    "zb-h1": _zb_h1,
    "zb-h2": _zb_h2,
    "interleaved-zb": _interleaved_zb,
    "zb-v": _zb_v,
    "dualpipe-v": _dualpipe_v,
    "v-half": _v_half,
    "v-min": _v_min,
}
