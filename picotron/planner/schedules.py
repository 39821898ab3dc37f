"""Schedules with a full backward: AFAB and 1F1B.

Sources: Huang et al. 2019, GPipe, arXiv:1811.06965; Narayanan et al. 2019, PipeDream, for 1F1B.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from picotron.planner.actions import B, F, stack_orders
from picotron.planner.pipeline import Schedule, check_sizes, loop_ranks


def afab(num_ranks: int, num_microbatches: int) -> Schedule:
    """All forwards, then all backwards (GPipe): the smallest program, m activations held."""
    return _one_stage_a_rank("afab", num_ranks, num_microbatches, lambda rank: num_microbatches)


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Schedule:
    """1F1B (PipeDream-flush): rank s holds at most min(m, p - s) activations."""
    return _one_stage_a_rank(
        "1f1b", num_ranks, num_microbatches, lambda rank: min(num_ranks - rank, num_microbatches)
    )


def _one_stage_a_rank(
    name: str, num_ranks: int, num_microbatches: int, held: Callable[[int], int]
) -> Schedule:
    """Each rank runs ``held(rank)`` forwards, then alternates B and F, then the backwards left."""
    check_sizes(num_ranks, num_microbatches, actions_per_microbatch=2 * max(num_ranks, 1))
    index = np.arange(num_microbatches)

    def order(rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        turn = np.concatenate([index, index + held(rank) - 0.5])  # the k-th B comes before the F so far on
        first = np.argsort(turn, kind="stable")
        phase = np.repeat([F, B], num_microbatches)[first]
        return phase, np.full(2 * num_microbatches, rank), np.tile(index, 2)[first]

    return Schedule(
        name=name,
        num_microbatches=num_microbatches,
        stage_ranks=loop_ranks(num_ranks),
        orders=stack_orders([order(rank) for rank in range(num_ranks)]),
    )
