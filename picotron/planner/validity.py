"""Whether orders are a schedule: each microbatch goes forward once and back once through every stage.

Backward is one B, or an I and then a W. All rules look at whole columns at once, so that a million actions
take tens of milliseconds.
"""

from __future__ import annotations

import numpy as np
from attrs import evolve, frozen

from picotron.planner.actions import PHASES, B, F, I, Orders, W
from picotron.planner.validators import shown

_COMPLETE = "must run an F and a B, or an F, an I and a W, of each microbatch on each of its stages"


@frozen(kw_only=True)
class Offence:
    """A rule that an order breaks: by the action at ``index`` of the columns or, at -1, by lacking one.

    ``rank`` is -1 where no rank is to blame.
    """

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
            found = np.where(microbatch < self.num_forth, found, ranks[::-1][stage])
        return found

    @property
    def num_forth(self) -> int:
        """Microbatches that run stage s on ``stage_ranks[s]``; the later ones meet the mirror image."""
        return -(-self.num_microbatches // 2) if self.bidirectional else self.num_microbatches

    def num_held(self, num_ranks: int) -> np.ndarray:
        """(stage, microbatch) pairs that each rank runs."""
        ranks = np.asarray(self.stage_ranks, dtype=np.int64)
        held: np.ndarray = np.bincount(ranks, minlength=num_ranks) * self.num_forth
        return held + np.bincount(ranks[::-1], minlength=num_ranks) * (self.num_microbatches - self.num_forth)


def positions(orders: Orders, num_stages: int, num_microbatches: int) -> np.ndarray:
    """Where each action first stands in the columns: [phase, stage, microbatch], -1 where it is missing."""
    table = np.full(len(PHASES) * num_stages * num_microbatches, orders.num_actions, dtype=np.int32)
    key = (orders.phase * np.int64(num_stages) + orders.stage) * num_microbatches + orders.microbatch
    np.minimum.at(table, key, np.arange(orders.num_actions, dtype=np.int32))
    table[table == orders.num_actions] = -1
    return table.reshape(len(PHASES), num_stages, num_microbatches)


def sources(orders: Orders, num_stages: int, num_microbatches: int) -> np.ndarray:
    """What each action needs from another stage, as an index of the columns; -1 for nothing, or if missing.

    An F needs that of the stage before, a B or an I that of the stage after (B or I), a W nothing.
    """
    table = positions(orders, num_stages, num_microbatches)
    found = np.full_like(table, -1)
    found[F, 1:] = table[F, :-1]
    found[B, :-1] = found[I, :-1] = np.maximum(table[B, 1:], table[I, 1:])
    needed: np.ndarray = found[orders.phase, orders.stage, orders.microbatch]
    return needed


def rank_column(orders: Orders) -> np.ndarray:
    """The rank of each action."""
    return np.repeat(np.arange(len(orders), dtype=np.int32), np.diff(orders.offsets))


def first_offence(orders: Orders, where: Where) -> Offence | None:
    """The first action, by rank and position, that breaks a rule, or what is missing; None if all is well.

    Of fewer actions than there should be forwards, only the ranges and the number are looked at.
    """
    num_stages, num_microbatches = len(where.stage_ranks), where.num_microbatches
    stage, microbatch = orders.stage, orders.microbatch
    outside = (stage < 0) | (stage >= num_stages) | (microbatch < 0) | (microbatch >= num_microbatches)
    rank = rank_column(orders)
    if num_stages * num_microbatches > orders.num_actions:  # a table would be larger than the orders
        return (
            _blamed(orders, where, rank, int(outside.argmax())) if outside.any() else _too_few(orders, where)
        )
    if outside.any():  # looked up as the first of all; what stands before them is judged as it is
        inside = evolve(
            orders, stage=np.where(outside, 0, stage), microbatch=np.where(outside, 0, microbatch)
        )
        bad = outside | _bad_actions(inside, where, rank, positions(inside, num_stages, num_microbatches))
        return _blamed(orders, where, rank, int(bad.argmax()))
    table = positions(orders, num_stages, num_microbatches)
    bad = _bad_actions(orders, where, rank, table)
    if bad.any():
        return _blamed(orders, where, rank, int(bad.argmax()))
    split = table[B] < 0
    missing = np.stack([table[F] < 0, split & (table[I] < 0), split & (table[W] < 0)])
    return _missing(where, missing) if missing.any() else None


def _bad_actions(orders: Orders, where: Where, rank: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Which actions break a rule by being where they are; ``table`` holds their ``positions``."""
    phase, stage, microbatch = orders.phase, orders.stage, orders.microbatch
    index = np.arange(orders.num_actions, dtype=np.int32)
    at = stage.astype(np.int64) * where.num_microbatches + microbatch
    forward, full, inputs, weights = (one[at] for one in table.reshape(len(PHASES), -1))
    before = np.where(phase == W, inputs, np.where(phase == F, index, forward))
    bad: np.ndarray = where.owners(stage, microbatch) != rank
    bad |= np.choose(phase, (forward, full, inputs, weights)) != index  # a second time
    bad |= (before < 0) | (before > index)
    bad |= (phase == B) & (((inputs >= 0) & (inputs < index)) | ((weights >= 0) & (weights < index)))
    bad |= ((phase == I) | (phase == W)) & (full >= 0) & (full < index)
    bad |= _bad_pairs(orders, rank)
    return bad


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
    return Offence(
        rank=own, index=index, message=f"{place(orders, index)}: {_rule(orders, where, own, index)}"
    )


def place(orders: Orders, index: int) -> str:
    """Rank, position and text of the action at an index of the columns."""
    rank = orders.rank_of(index)
    return f"rank {rank}, position {index - orders.offsets[rank]}, action {orders.action(index)}"


def _rule(orders: Orders, where: Where, rank: int, index: int) -> str:
    stage, phase, microbatch = (int(c[index]) for c in (orders.stage, orders.phase, orders.microbatch))
    if not 0 <= microbatch < where.num_microbatches:
        return f"microbatch must be in [0, {where.num_microbatches})"
    stages = np.arange(len(where.stage_ranks))
    held = np.flatnonzero(where.owners(stages, np.full_like(stages, microbatch)) == rank).tolist()
    if stage not in held:
        half = f" for microbatch {microbatch}" if where.bidirectional else ""
        return f"this rank holds stages {shown(held)}{half}"
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


def _missing(where: Where, missing: np.ndarray) -> Offence:
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
    counts, least = np.diff(orders.offsets), 2 * where.num_held(len(orders))
    rank = int((counts < least).argmax())
    return Offence(
        rank=rank,
        index=-1,
        message=f"rank {rank} {_COMPLETE}: at least {least[rank]:,} actions, got {counts[rank]:,}",
    )


def placement(orders: Orders) -> Where | Offence:
    """Which rank runs which stage, as the orders themselves tell; an offence where they cannot be a schedule.

    Of a schedule, one way or both ways, it is the placement; of other orders it is the one that most actions
    keep to, so that a rule blames the action that is out of place.
    """
    problem = _nobody(orders) or _unnumbered(orders, "stage") or _unnumbered(orders, "microbatch")
    if problem is not None:
        return problem
    rank, num_microbatches = rank_column(orders), int(orders.microbatch.max()) + 1
    where = Where(stage_ranks=_stage_ranks(orders, rank), num_microbatches=num_microbatches)
    if num_microbatches % 2 == 0:
        both = evolve(where, bidirectional=True)
        where = min(where, both, key=lambda way: _strays(orders, rank, way))
    idle = np.flatnonzero(where.num_held(len(orders)) == 0)
    return _without_stage(int(idle[0])) if len(idle) else where


def _strays(orders: Orders, rank: np.ndarray, where: Where) -> int:
    """Actions on another rank than their stage's."""
    return int(np.count_nonzero(where.owners(orders.stage, orders.microbatch) != rank))


def _stage_ranks(orders: Orders, rank: np.ndarray) -> tuple[int, ...]:
    """The rank that runs most of each stage; the lesser half of the microbatches counts twice."""
    key = orders.stage * np.int64(len(orders)) + rank
    lesser = 2 * orders.microbatch.astype(np.int64) <= int(orders.microbatch.max())
    keys, counts = _counted(np.concatenate([key, key[lesser]]))
    stage = keys // len(orders)
    best = np.lexsort((keys, -counts, stage))
    first = np.unique(stage[best], return_index=True)[1]
    return tuple((keys[best][first] % len(orders)).tolist())


def _counted(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The keys there are, ascending, and how often each is."""
    if int(keys.max()) > 4 * len(keys):
        return np.unique(keys, return_counts=True)
    counts = np.bincount(keys)
    there = np.flatnonzero(counts)
    return there, counts[there]


def _nobody(orders: Orders) -> Offence | None:
    """The first rank that has nothing to do."""
    if not orders.num_actions:
        return Offence(rank=-1, index=-1, message="a schedule needs at least one action, got none")
    counts = np.diff(orders.offsets)
    return None if counts.all() else _without_stage(int(counts.argmin()))


def _without_stage(rank: int) -> Offence:
    return Offence(rank=rank, index=-1, message=f"every rank must hold a stage: rank {rank} has none")


def _unnumbered(orders: Orders, name: str) -> Offence | None:
    """The first action of the stage (or microbatch) that stands after a gap."""
    column: np.ndarray = getattr(orders, name)
    numbers = _counted(column)[0] if column.min() >= 0 else np.unique(column)
    wrong = np.flatnonzero(numbers != np.arange(len(numbers)))
    if not len(wrong):
        return None
    index = int((column == numbers[wrong[0]]).argmax())
    return Offence(
        rank=orders.rank_of(index),
        index=index,
        message=f"{place(orders, index)}: {'stages' if name == 'stage' else 'microbatches'} "
        f"must be numbered from 0 without gaps, and there is no {int(wrong[0])}",
    )
