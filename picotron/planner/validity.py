"""Whether orders are a schedule: each microbatch goes forward once and back once through every stage.

Backward is one B, or an I and then a W. All rules look at whole columns at once, so that a million actions
take tens of milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from attrs import frozen

from picotron.planner.actions import PHASES, B, F, I, Orders, W

_COMPLETE = "must run an F and a B, or an F, an I and a W, of each microbatch on each of its stages"


@frozen(kw_only=True)
class Offence:
    """A rule that an order breaks: by the action at ``index`` of the columns or, at -1, by lacking one."""

    rank: int
    index: int
    message: str


@frozen(kw_only=True)
class Where:
    """Which rank runs a stage. Bidirectional, the later half of the microbatches meets the mirror image."""

    stage_ranks: tuple[int, ...]
    num_microbatches: int
    bidirectional: bool = False

    def owners(self, stage: np.ndarray, microbatch: np.ndarray) -> np.ndarray:
        """The rank of each (stage, microbatch); both within bounds."""
        ranks = np.asarray(self.stage_ranks, dtype=np.int32)
        found: np.ndarray = ranks[stage]
        if self.bidirectional:
            found = np.where(2 * microbatch < self.num_microbatches, found, ranks[::-1][stage])
        return found


def positions(orders: Orders, num_stages: int, num_microbatches: int) -> np.ndarray:
    """Where each action first stands in the columns: [phase, stage, microbatch], -1 where it is missing."""
    none = np.iinfo(np.int32).max
    table = np.full((len(PHASES), num_stages, num_microbatches), none, dtype=np.int32)
    index = np.arange(orders.num_actions, dtype=np.int32)
    np.minimum.at(table, (orders.phase, orders.stage, orders.microbatch), index)
    table[table == none] = -1
    return table


def rank_column(orders: Orders) -> np.ndarray:
    """The rank of each action."""
    return np.repeat(np.arange(len(orders), dtype=np.int32), np.diff(orders.offsets))


def first_offence(orders: Orders, where: Where) -> Offence | None:
    """The first action, by rank and position, that breaks a rule, or what is missing; None if all is well."""
    num_stages, num_microbatches = len(where.stage_ranks), where.num_microbatches
    rank, index = rank_column(orders), np.arange(orders.num_actions)
    phase, stage, microbatch = orders.phase, orders.stage, orders.microbatch
    outside = (stage < 0) | (stage >= num_stages) | (microbatch < 0) | (microbatch >= num_microbatches)
    if outside.any():
        return _blamed(orders, where, rank, int(outside.argmax()))
    if num_stages * num_microbatches > orders.num_actions:
        return _too_few(orders, where)
    table = positions(orders, num_stages, num_microbatches)
    forward, full = table[F, stage, microbatch], table[B, stage, microbatch]
    inputs, weights = table[I, stage, microbatch], table[W, stage, microbatch]
    before = np.where(phase == W, inputs, np.where(phase == F, index, forward))
    bad = where.owners(stage, microbatch) != rank
    bad |= table[phase, stage, microbatch] != index  # a second time
    bad |= (before < 0) | (before > index)
    bad |= (phase == B) & (((inputs >= 0) & (inputs < index)) | ((weights >= 0) & (weights < index)))
    bad |= ((phase == I) | (phase == W)) & (full >= 0) & (full < index)
    bad |= _bad_pairs(orders, rank)
    if bad.any():
        return _blamed(orders, where, rank, int(bad.argmax()))
    missing = np.stack([table[F] < 0, (table[B] < 0) & (table[I] < 0), (table[B] < 0) & (table[W] < 0)])
    return _missing(where, missing) if missing.any() else None


def _bad_pairs(orders: Orders, rank: np.ndarray) -> np.ndarray:
    """Which actions are joined to what they cannot overlap with: a pair is an F, then another's B or I."""
    bad = orders.joined.copy()
    first = np.flatnonzero(orders.joined[:-1])
    second = first + 1
    phase, stage, microbatch = orders.phase, orders.stage, orders.microbatch
    again = (microbatch[first] == microbatch[second]) & (stage[first] == stage[second])
    bad[first] = (
        (rank[first] != rank[second])
        | (phase[first] != F)
        | ((phase[second] != B) & (phase[second] != I))
        | orders.joined[second]
        | again
    )
    return bad


def _blamed(orders: Orders, where: Where, rank: np.ndarray, index: int) -> Offence:
    """The offence of one action, in words."""
    own = int(rank[index])
    position = index - orders.offsets[own]
    return Offence(
        rank=own,
        index=index,
        message=f"rank {own}, position {position}, action {orders.action(index)}: "
        f"{_rule(orders, where, own, index)}",
    )


def _rule(orders: Orders, where: Where, rank: int, index: int) -> str:
    stage, phase, microbatch = (int(c[index]) for c in (orders.stage, orders.phase, orders.microbatch))
    num_stages = len(where.stage_ranks)
    held = held_stages(where, rank)
    if not 0 <= stage < num_stages:
        return f"this rank holds stages {held}"
    if not 0 <= microbatch < where.num_microbatches:
        return f"microbatch must be in [0, {where.num_microbatches})"
    if int(where.owners(np.array([stage]), np.array([microbatch]))[0]) != rank:
        return f"this rank holds stages {held}"
    earlier = slice(orders.offsets[rank], index)
    same = (orders.stage[earlier] == stage) & (orders.microbatch[earlier] == microbatch)
    done = set(orders.phase[earlier][same].tolist())
    if phase in done:
        return "each action runs once"
    if phase != F and F not in done:
        return f"backward needs {stage}F{microbatch} before it"
    if (phase == B and done & {I, W}) or (phase in (I, W) and B in done):
        return "backward is one B, or an I and a W, not both"
    if phase == W and I not in done:
        return f"the weight gradient needs {stage}I{microbatch} before it"
    return "a pair that overlaps is an F and then a B or an I, of another stage or microbatch"


def held_stages(where: Where, rank: int) -> list[int]:
    """The stages that a rank holds, in either direction."""
    ranks = where.stage_ranks
    mirror = ranks[::-1] if where.bidirectional else ranks
    return [stage for stage in range(len(ranks)) if rank in (ranks[stage], mirror[stage])]


def _missing(where: Where, missing: Sequence[np.ndarray] | np.ndarray) -> Offence:
    """What is missing on the first rank that lacks something."""
    phase, stage, microbatch = np.nonzero(missing)
    owners = where.owners(stage, microbatch)
    first = int(np.lexsort((phase, microbatch, stage, owners))[0])
    name = ("F", "B", "W")[int(phase[first])]
    return Offence(
        rank=int(owners[first]),
        index=-1,
        message=f"rank {int(owners[first])} {_COMPLETE}: "
        f"{int(stage[first])}{name}{int(microbatch[first])} is missing",
    )


def _too_few(orders: Orders, where: Where) -> Offence:
    """What is missing where there are not even as many actions as forwards."""
    counts = np.diff(orders.offsets)
    for rank in range(len(orders)):
        stages = held_stages(where, rank)
        share = where.num_microbatches // 2 if where.bidirectional else where.num_microbatches
        if counts[rank] < 2 * len(stages) * share:
            return Offence(
                rank=rank,
                index=-1,
                message=f"rank {rank} {_COMPLETE}: "
                f"at least {2 * len(stages) * share:,} actions, got {counts[rank]:,}",
            )
    raise AssertionError("some rank has too few actions")
