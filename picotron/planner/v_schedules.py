"""Zero-bubble schedules on V-shaped stages: ZB-V, V-Half and V-Min.

A microbatch goes up the ranks and comes back, forward and then backward: 4p steps. A schedule repeats one
block, the slots in which a rank runs its four steps of a microbatch, once every six slots. How long the
block keeps an activation is the memory (Qi et al. 2024, section 3). What the block leaves open, also at both
ends of the pipeline, the weight gradients W fill.

Sources: Qi et al. 2023, arXiv:2401.10241, section 6, for ZB-V; Qi et al. 2024, Pipeline Parallelism with
Controllable Memory, arXiv:2405.15362, for the blocks of V-Half and V-Min.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import count

import numpy as np

from picotron.planner.actions import F, I, W, stack_orders
from picotron.planner.pipeline import Schedule, check_sizes, v_ranks

SLOTS = 6  # of a block: F, I and W of both stages of a rank

Passes = list[tuple[int, int]]
"""What a rank runs, in order, as (microbatch, step); step k is F of stage k, then I of stage 4p - 1 - k."""


def zb_v(num_ranks: int, num_microbatches: int) -> Schedule:
    """ZB-V: 1F1B's memory, 2p chunks on every rank; no rank idles within its own span if m >= 2p - 1."""
    _check(num_ranks, num_microbatches)
    held = 2 * num_ranks
    return _v_schedule("zb-v", num_ranks, num_microbatches, _zb_v_passes, held=held, overtaking=False)


def v_half(num_ranks: int, num_microbatches: int) -> Schedule:
    """V-Half: half of 1F1B's memory, floor((p + 2) / 2) microbatches on the fullest rank.

    A rank idles 3p - 4 slots (odd p >= 3) or 3p - 7 (even p >= 4) with F = I = W = 1 and m >= 2p.
    """
    _check(num_ranks, num_microbatches)
    held = (num_ranks + 2) // 2 * 2
    return _v_schedule("v-half", num_ranks, num_microbatches, _v_half_passes, held=held, overtaking=True)


def v_min(num_ranks: int, num_microbatches: int) -> Schedule:
    """V-Min: a third of 1F1B's memory, floor((p + 4) / 3) microbatches on the fullest rank.

    A rank idles 4p - 7, 4p - 5 or 4p - 8 slots, for p = 0, 1 or 2 modulo 3, p >= 3, with F = I = W = 1 and
    m >= 2p.
    """
    _check(num_ranks, num_microbatches)
    held = (num_ranks + 4) // 3 * 2
    return _v_schedule("v-min", num_ranks, num_microbatches, _v_min_passes, held=held, overtaking=True)


def _check(num_ranks: int, num_microbatches: int) -> None:
    stages = 2 * num_ranks if isinstance(num_ranks, int) else 2
    check_sizes(num_ranks, num_microbatches, actions_per_microbatch=3 * stages)


def _v_half_passes(num_ranks: int, num_microbatches: int) -> list[Passes]:
    """Two slots a rank on the way up, one on the way back."""
    waits = ((2, 2, 1), (0, 0, 1))[num_ranks % 2]  # the published block waits (0, 3, 1) with even p
    return _repeated(_block(num_ranks, slots_up=2, waits=waits), num_microbatches)


def _v_min_passes(num_ranks: int, num_microbatches: int) -> list[Passes]:
    """One slot a rank: there is no shorter block."""
    waits = ((1, 1, 1), (0, 0, 0), (3, 3, 0))[
        num_ranks % 3
    ]  # the published block waits (0, 2, 0) for p = 0 mod 3
    return _repeated(_block(num_ranks, slots_up=1, waits=waits), num_microbatches)


def _block(num_ranks: int, *, slots_up: int, waits: tuple[int, int, int]) -> list[list[int]]:
    """The slots of each rank's four steps of microbatch 0, up and back forward and up and back backward.

    A step up the ranks starts ``slots_up`` after the one before it, a step back one. ``waits`` are slots more
    where the V turns: none are needed, these were found to leave the fewest idle slots within the memory. Two
    steps of a rank may then share a slot; whichever is first in the order runs first.
    """
    up = slots_up * (num_ranks - 1) + 1
    turns = [0, up + waits[0], up + waits[0] + num_ranks + waits[1]]
    turns.append(turns[2] + up + waits[2])
    return [
        [
            turns[0] + slots_up * rank,
            turns[1] + num_ranks - 1 - rank,
            turns[2] + slots_up * rank,
            turns[3] + num_ranks - 1 - rank,
        ]
        for rank in range(num_ranks)
    ]


def _repeated(block: list[list[int]], num_microbatches: int) -> list[Passes]:
    """A rank's steps of all microbatches, in the order of their slots."""
    return [
        [
            (microbatch, step)
            for _, step, microbatch in sorted(
                (slot + SLOTS * microbatch, step, microbatch)
                for slot, step in zip(slots, _rank_steps(rank, len(block)), strict=True)
                for microbatch in range(num_microbatches)
            )
        ]
        for rank, slots in enumerate(block)
    ]


def _rank_steps(rank: int, num_ranks: int) -> tuple[int, int, int, int]:
    """The steps of a rank: up and back forward, up and back backward."""
    num_stages = 2 * num_ranks
    return rank, num_stages - 1 - rank, num_stages + rank, 2 * num_stages - 1 - rank


def _zb_v_passes(num_ranks: int, num_microbatches: int) -> list[Passes]:
    """The order of F and I of ZB-V; with m < 2p - 1 it is what is left of the order for 2p - 1."""
    whole = max(num_microbatches, 2 * num_ranks - 1)
    return [_numbered(_zb_v_steps(rank, num_ranks, whole), num_microbatches) for rank in range(num_ranks)]


def _zb_v_steps(rank: int, num_ranks: int, num_microbatches: int) -> list[int]:
    behind = num_ranks - rank
    f0, f1, i1, i0 = _rank_steps(rank, num_ranks)
    first = 2 * num_ranks - 1 - rank  # forwards before the first I of the lower stage
    return [
        *[f0] * (2 * behind - 1),
        *[f1, f0] * rank,
        *[f1, i1] * behind,
        *[f0, i0, f1, i1] * (num_microbatches - first),
        *[i0, f1, i1] * (behind - 1),
        *[i0, i1] * rank,
        *[i0] * behind,
    ]


def _numbered(steps: list[int], num_microbatches: int) -> Passes:
    """Each kind of step runs the microbatches in order; later ones than there are drop out."""
    counters = {step: count() for step in set(steps)}
    passes = [(next(counters[step]), step) for step in steps]
    return [place for place in passes if place[0] < num_microbatches]


def _v_schedule(
    name: str,
    num_ranks: int,
    num_microbatches: int,
    passes: Callable[[int, int], list[Passes]],
    *,
    held: int,
    overtaking: bool,
) -> Schedule:
    """The schedule that runs F and I in the order of ``passes``, filled up with W.

    Only what happens at both ends is filled slot by slot; the block between them repeats.
    """
    filled_microbatches = min(num_microbatches, 3 * num_ranks)
    filling = _Filling(passes(num_ranks, filled_microbatches), held=held, overtaking=overtaking)
    more = num_microbatches - filled_microbatches
    return Schedule(
        name=name,
        num_microbatches=num_microbatches,
        stage_ranks=v_ranks(num_ranks),
        orders=stack_orders([_columns(num_ranks, _stretched(order, more)) for order in filling.filled()]),
    )


class _Filling:
    """Ranks that run their F and I in a given order, and W in between, in slots of one F, I or W each.

    A rank runs its next F or I if what that needs is there, an F only with fewer than ``held`` activations on
    the rank. While that waits it runs, if ``overtaking``, an I that is due later, which brings memory back
    sooner; else its oldest W.
    """

    def __init__(self, orders: list[Passes], *, held: int, overtaking: bool) -> None:
        num_ranks, num_microbatches = len(orders), max(max(order)[0] for order in orders) + 1
        self.num_stages, self.count = 2 * num_ranks, num_microbatches
        self.orders, self.at, self.overtaking = orders, [0] * num_ranks, overtaking
        self.inputs = [_rank_steps(rank, num_ranks)[2:] for rank in range(num_ranks)]
        self.room = [held] * num_ranks  # for activations
        self.weights: list[deque[tuple[int, int]]] = [deque() for _ in orders]  # W that can run
        self.reached = [0] * num_microbatches  # the next step of each microbatch,
        self.since = [0] * num_microbatches  # and the first slot in which it can run
        self.done = [0] * (2 * self.num_stages)  # microbatches that have run each step

    def filled(self) -> list[Passes]:
        """Each rank's order with its W, which are steps 4p and on."""
        filled: list[Passes] = [[] for _ in self.orders]
        left, slot = 3 * self.num_stages * self.count, 0
        while left:
            ran = [self._run(rank, slot) for rank in range(len(filled))]
            for order, place in zip(filled, ran, strict=True):
                if place is not None:
                    order.append(place)
            assert any(ran), "a slot in which no rank can run is like the next"
            left -= len(ran) - ran.count(None)
            slot += 1
        return filled

    def _run(self, rank: int, slot: int) -> tuple[int, int] | None:
        """What the rank runs in this slot; None if it idles."""
        for microbatch, step in self._next_up(rank):
            is_forward = step < self.num_stages
            here = self.reached[microbatch] == step and self.since[microbatch] <= slot
            if here and (self.room[rank] or not is_forward):
                self.done[step] += 1
                self.reached[microbatch], self.since[microbatch] = step + 1, slot + 1
                if is_forward:
                    self.room[rank] -= 1
                else:
                    self.weights[rank].append((microbatch, step + self.num_stages))
                return microbatch, step
        if not self.weights[rank]:
            return None
        self.room[rank] += 1
        return self.weights[rank].popleft()

    def _next_up(self, rank: int) -> Iterator[tuple[int, int]]:
        """The rank's next F or I, then the I that may overtake it: the next of each of its stages."""
        order, done, at = self.orders[rank], self.done, self.at[rank]
        while at < len(order) and done[order[at][1]] > order[at][0]:
            at += 1  # it has run ahead of its turn
        self.at[rank] = at
        if at < len(order):
            yield order[at]
            if self.overtaking:
                yield from ((done[step], step) for step in self.inputs[rank] if done[step] < self.count)


def _stretched(order: Passes, more: int) -> np.ndarray:
    """[action, (microbatch, step)]: the block before the last new microbatch repeats ``more`` times."""
    columns = np.array(order)
    start, stop = np.append(np.flatnonzero(columns[:, 1] == columns[0, 1]), 0)[-3:-1] if more else (0, 0)
    repeats = np.tile(columns[start:stop], (more, 1))
    repeats[:, 0] += np.repeat(np.arange(1, more + 1), stop - start)
    return np.concatenate([columns[:stop], repeats, columns[stop:] + np.array([more, 0])])


def _columns(num_ranks: int, order: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(phase, stage, microbatch) of steps: F up to 2p, I back again, and W back again too."""
    num_stages = 2 * num_ranks
    microbatch, (turn, place) = order[:, 0], np.divmod(order[:, 1], num_stages)
    return np.array([F, I, W])[turn], np.where(turn == 0, place, num_stages - 1 - place), microbatch
