"""Schedules with a full backward on looping stages: AFAB, 1F1B, interleaved 1F1B and breadth-first.

All of them, and the zero-bubble ones, are one formula. A rank runs its forwards in some order and its
backwards in some order; row n of its schedule is the n-th forward, and then the backward ``lag`` places
behind it. The lag is the memory: a rank holds one activation more.

Sources: Huang et al. 2019, GPipe, arXiv:1811.06965; Narayanan et al. 2019, PipeDream, and 2021, Megatron-LM,
arXiv:2104.04473, for 1F1B and its interleaving; Lamy-Poirier 2022, arXiv:2211.05953, for breadth-first.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from attrs import frozen

from picotron.errors import PlanError
from picotron.planner.actions import B, F, stack_orders
from picotron.planner.pipeline import Schedule, check_sizes, loop_ranks


def afab(num_ranks: int, num_microbatches: int) -> Schedule:
    """All forwards, then all backwards (GPipe): the smallest program, m activations held."""
    sizes = loop_sizes(num_ranks, num_microbatches)
    return skewed("afab", sizes, depth_first(sizes), lambda rank: {F: 0, B: num_microbatches})


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Schedule:
    """1F1B (PipeDream-flush): rank s holds at most min(m, p - s) activations."""
    sizes = loop_sizes(num_ranks, num_microbatches)
    return skewed("1f1b", sizes, depth_first(sizes), lambda rank: {F: 0, B: num_ranks - 1 - rank})


def interleaved(num_ranks: int, num_microbatches: int, virtual_stages: int = 2) -> Schedule:
    """Interleaved 1F1B: rank s holds min(mv, 2(p - s - 1) + (v - 1)p + 1) chunks' activations.

    That is Megatron-LM's, whose microbatches go round the ranks in groups of p. A remainder of m by p is
    spread over the groups, so that no rank waits between rounds; the largest, g > p, sets the least memory
    with which a rank reaches its first backward in time: (p - s - 1) + (v - 1)g + 1 chunks, should that be
    more.
    """
    sizes = loop_sizes(num_ranks, num_microbatches, virtual_stages)
    rounds = virtual_stages - 1

    def held_before(rank: int) -> int:
        behind = num_ranks - 1 - rank
        return max(2 * behind + rounds * num_ranks, behind + rounds * largest_group(sizes))

    return skewed("interleaved", sizes, depth_first(sizes), lambda rank: {F: 0, B: held_before(rank)})


def bfs(num_ranks: int, num_microbatches: int, virtual_stages: int = 2) -> Schedule:
    """Looped breadth-first: all microbatches through a stage before any goes round; mv activations held."""
    sizes = loop_sizes(num_ranks, num_microbatches, virtual_stages)
    rounds = VirtualOrder(
        chunk=np.repeat(np.arange(virtual_stages), num_microbatches),
        microbatch=np.tile(np.arange(num_microbatches), virtual_stages),
    )
    return skewed("bfs", sizes, rounds, lambda rank: {F: 0, B: num_microbatches * virtual_stages})


@frozen(kw_only=True)
class LoopSizes:
    """How many ranks, microbatches and stages a rank a looping schedule has."""

    num_ranks: int
    num_microbatches: int
    virtual_stages: int = 1


def loop_sizes(num_ranks: int, num_microbatches: int, virtual_stages: int = 1) -> LoopSizes:
    """The sizes, checked. Raises PlanError unless all are at least 1 and the schedule is not too large."""
    if not isinstance(virtual_stages, int) or isinstance(virtual_stages, bool) or virtual_stages < 1:
        raise PlanError(f"virtual_stages must be a whole number, at least 1, got {virtual_stages!r}")
    stages = virtual_stages * (num_ranks if isinstance(num_ranks, int) else 1)
    check_sizes(num_ranks, num_microbatches, actions_per_microbatch=3 * stages)
    return LoopSizes(num_ranks=num_ranks, num_microbatches=num_microbatches, virtual_stages=virtual_stages)


@frozen(kw_only=True, eq=False)
class VirtualOrder:
    """The order in which every rank runs forwards: which of its stages (chunk), which microbatch.

    Backwards run in the same order with the chunks counted from the last.
    """

    chunk: np.ndarray
    microbatch: np.ndarray


def depth_first(sizes: LoopSizes) -> VirtualOrder:
    """Group after group; within a group, chunk after chunk (Megatron-LM)."""
    microbatch = np.arange(sizes.num_microbatches)
    groups = num_groups(sizes)
    group = (microbatch * groups + groups - 1) // sizes.num_microbatches
    chunks = np.repeat(np.arange(sizes.virtual_stages), sizes.num_microbatches)
    microbatches = np.tile(microbatch, sizes.virtual_stages)
    order = np.lexsort((microbatches, chunks, group[microbatches]))
    return VirtualOrder(chunk=chunks[order], microbatch=microbatches[order])


def num_groups(sizes: LoopSizes) -> int:
    """Groups of microbatches that go round together: as many as hold p each, at least one."""
    return max(1, sizes.num_microbatches // sizes.num_ranks)


def largest_group(sizes: LoopSizes) -> int:
    """Microbatches of the largest group."""
    return -(-sizes.num_microbatches // num_groups(sizes))


def skewed(
    name: str, sizes: LoopSizes, order: VirtualOrder, lags: Callable[[int], dict[int, int]]
) -> Schedule:
    """Row n of a rank runs, phase by phase, what stands ``lags(rank)[phase]`` places earlier in the order."""
    num_ranks, last_chunk = sizes.num_ranks, sizes.virtual_stages - 1

    def rank_order(rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        phase, place = skewed_rows(len(order.chunk), lags(rank))
        chunk = order.chunk[place]
        stage = np.where(phase == F, chunk, last_chunk - chunk) * num_ranks + rank
        return phase, stage, order.microbatch[place]

    return Schedule(
        name=name,
        num_microbatches=sizes.num_microbatches,
        stage_ranks=loop_ranks(num_ranks, sizes.virtual_stages),
        orders=stack_orders([rank_order(rank) for rank in range(num_ranks)]),
    )


def skewed_rows(length: int, lags: dict[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(phase, place) of each action: row n holds place n - lag of each phase, where there is one."""
    lag = np.minimum(list(lags.values()), length)  # a longer one changes nothing: the rows between are empty
    place = np.arange(length + lag.max())[:, None] - lag
    there = (place >= 0) & (place < length)
    return np.broadcast_to(np.array(list(lags)), place.shape)[there], place[there]
