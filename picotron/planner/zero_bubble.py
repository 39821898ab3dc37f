"""Zero-bubble schedules on looping stages: ZB-H1, ZB-H2 and their interleaving.

Backward is split: the next rank waits for the input gradient I only, so that the weight gradients W fill what
would be the bubble at the end. W follows at a distance that gives every rank as many microbatches in flight.
With F = I = W a rank of any of them idles (p - 1)F if m >= p, and no schedule of the same stages idles less:
the last rank cannot start before.

Source: Qi et al. 2023, Zero Bubble Pipeline Parallelism, arXiv:2401.10241, sections 2 and 4.
"""

from __future__ import annotations

from picotron.planner.actions import F, I, W
from picotron.planner.pipeline import Schedule
from picotron.planner.schedules import depth_first, largest_group, loop_sizes, skewed


def zb_h1(num_ranks: int, num_microbatches: int) -> Schedule:
    """ZB-H1: 1F1B's memory, a third of its bubble. Rank s holds (p - s) A + s A_W.

    Idle per rank is (p - 1)(F + I - W).
    """
    sizes, last = loop_sizes(num_ranks, num_microbatches), num_ranks - 1
    return skewed("zb-h1", sizes, depth_first(sizes), lambda rank: {F: 0, I: last - rank, W: last})


def zb_h2(num_ranks: int, num_microbatches: int) -> Schedule:
    """ZB-H2: twice 1F1B's memory. Rank s holds (2(p - s) - 1) A + 2s A_W.

    No rank idles within its own span if F = I = W and m >= 2p - 1; the step takes (3m + p - 1)F.
    """
    sizes, last = loop_sizes(num_ranks, num_microbatches), num_ranks - 1
    return skewed("zb-h2", sizes, depth_first(sizes), lambda rank: {F: 0, I: 2 * (last - rank), W: 2 * last})


def interleaved_zb(num_ranks: int, num_microbatches: int, virtual_stages: int = 2) -> Schedule:
    """Interleaved ZB-H1: v stages a rank, the bubble that of one chunk."""
    sizes, last = loop_sizes(num_ranks, num_microbatches, virtual_stages), num_ranks - 1
    rounds = (virtual_stages - 1) * largest_group(sizes)
    return skewed(
        "interleaved-zb",
        sizes,
        depth_first(sizes),
        lambda rank: {F: 0, I: rounds + last - rank, W: rounds + last},
    )
