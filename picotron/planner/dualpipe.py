"""DualPipe and DualPipeV: two flows of microbatches; a forward of one overlaps a backward of the other.

DualPipe feeds both ends of p ranks, and every rank holds two stages. DualPipeV is one half of it: p/2 ranks,
where one flow goes up the ranks and comes back as the other. What a rank runs is the same in both.

Sources: DeepSeek-V3, 2024, arXiv:2412.19437, section 3.2.1, and the DualPipe repository; the cut in half is
by Qi et al. 2025, Sea AI Lab.
"""

from __future__ import annotations

import numpy as np

from picotron.errors import PlanError
from picotron.planner.actions import B, F, I, W, stack_orders
from picotron.planner.pipeline import Schedule, check_sizes, v_ranks

Cell = tuple[int, int, int]
"""(phase, flow, whether joined to the next): what stands at one place of a rank's order."""


def dualpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """DualPipe: p + 1 activations a rank and twice the parameters. Pairs F+B run overlapped.

    Microbatches from m/2 on enter at the last rank. A rank idles (p/2 - 1)(F&B + B - 3W), where F&B is what a
    pair takes. Raises PlanError unless p and m are even and m >= 2p.
    """
    check_sizes(num_ranks, num_microbatches, actions_per_microbatch=3 * num_ranks)
    if num_ranks % 2 or num_microbatches % 2 or num_microbatches < 2 * num_ranks:
        raise PlanError(
            "dualpipe needs an even number of ranks and an even number of microbatches, at least twice the "
            f"ranks, got {num_ranks} ranks and {num_microbatches} microbatches; dualpipe-v takes any"
        )
    half, share = num_ranks // 2, num_microbatches // 2
    orders = []
    for rank in range(num_ranks):
        near = min(rank, num_ranks - 1 - rank)
        phase, flow, place, joined = _flows(near, half, share)
        microbatch = place + share * ((flow == 1) == (rank < half))  # the flow that entered at the far end
        orders.append((phase, np.where(flow == 0, near, num_ranks - 1 - near), microbatch, joined))
    return Schedule(
        name="dualpipe",
        num_microbatches=num_microbatches,
        stage_ranks=tuple(range(num_ranks)),
        bidirectional=True,
        orders=stack_orders(orders),
    )


def dualpipe_v(num_ranks: int, num_microbatches: int) -> Schedule:
    """DualPipeV: stages go up the ranks and back, 2p + 1 chunks' activations. Pairs F+B run overlapped.

    With fewer than 2p microbatches it is what is left of the order for 2p. Else a rank idles 2(p - 1) chunks'
    forwards with F = I = W and nothing gained by overlap.
    """
    check_sizes(num_ranks, num_microbatches, actions_per_microbatch=6 * num_ranks)
    orders = []
    for rank in range(num_ranks):
        phase, flow, place, joined = _flows(rank, num_ranks, max(num_microbatches, 2 * num_ranks))
        there = place < num_microbatches  # if the forward of a pair is, its backward is: that one is older
        stage = np.where(flow == 0, rank, 2 * num_ranks - 1 - rank)
        orders.append((phase[there], stage[there], place[there], joined[there]))
    return Schedule(
        name="dualpipe-v",
        num_microbatches=num_microbatches,
        stage_ranks=v_ranks(num_ranks),
        orders=stack_orders(orders),
    )


def _flows(rank: int, num_ranks: int, num_microbatches: int) -> tuple[np.ndarray, ...]:
    """(phase, flow, microbatch of the flow, joined) of each action of a rank of DualPipeV; m >= 2p."""
    steps = _steps(rank, num_ranks, num_microbatches)
    phase, flow, joined = np.concatenate([np.tile(cells, (times, 1)) for times, cells in steps if times]).T
    place = np.empty(len(phase), dtype=np.int64)
    backward = (phase == B) | (phase == I)
    for own in (0, 1):
        for kind in (phase == F, backward):
            chosen = np.flatnonzero(kind & (flow == own))
            place[chosen] = np.arange(len(chosen))
    inputs, weights = np.flatnonzero(phase == I), np.flatnonzero(phase == W)
    place[weights], flow[weights] = place[inputs], flow[inputs]  # weight gradients in the order of the inputs
    return phase, flow, place, joined.astype(np.bool_)


def _steps(rank: int, num_ranks: int, num_microbatches: int) -> list[tuple[int, list[Cell]]]:
    """(times, cells) of the steps of the published schedule; flow 0 enters at rank 0 and returns as 1."""
    behind, overlapped = num_ranks - 1 - rank, num_microbatches - 2 * num_ranks + rank + 1
    f0, f1, b0, b1, i0, i1 = ((phase, flow, 0) for phase in (F, B, I) for flow in (0, 1))
    weight = (W, 0, 0)  # of whichever input gradient waits longest
    pair01, pair10 = [(F, 0, 1), b1], [(F, 1, 1), b0]
    first = [f0, b1] if not behind else pair01  # where the flow turns, these follow each other too closely
    whole0, whole1 = (rank + 1) // 2, (rank + 2) // 2  # backwards of each flow that stay whole at the end
    return [
        (2 * behind, [f0]),
        (rank + 1, [f0, f1]),
        (behind, [i1, weight, f1]),
        (1, [*first, *pair10]),
        (overlapped - 1, [*pair01, *pair10]),
        (behind, [b1, *pair10]),
        (whole0, [b1, b0]),
        (whole1 - whole0, [b1, i0]),
        (rank + 1 - whole1, [i1, i0]),
        (behind, [weight, i0]),
        (rank + 1, [weight]),
    ]
