"""Which layers to recompute and to offload: the cheapest choice with which every rank keeps within a budget.

A layer has six options: none, selective or full recompute, and what it saves on the device or offloaded. Its
added seconds are what recompute runs again and, of an offload's two copies, what is longer than the F and the
B of the layer, which they run beside. Layers of a kind cost the same, so only counts are chosen. Layers with
equal options stand next to each other, in whichever order of the options fits, beginning in the stages with
most microbatches in flight.

Counts are tried in order of their seconds, without those that are proven too large (``recompute_counts``);
the first that fits is the least.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from attrs import evolve, field, frozen

from picotron.errors import PlanError
from picotron.planner.memory import static_bytes
from picotron.planner.plan import TrainingPlan
from picotron.planner.recompute import modes_by_layer
from picotron.planner.recompute_counts import Kinds, ascending
from picotron.planner.recompute_options import OPTIONS, Option, RankOptions, rank_options
from picotron.planner.topology import Coordinate
from picotron.planner.validators import is_size, shown


@frozen(kw_only=True)
class RecomputeChoice:
    """A plan with the choice made, and by pipeline rank what it adds to a step and the highest moment."""

    plan: TrainingPlan = field(repr=False)
    added_seconds: tuple[float, ...]
    peak_bytes: tuple[int, ...]


def choose_recompute(
    plan: TrainingPlan, budget_bytes: int, options: Sequence[Option] = OPTIONS
) -> RecomputeChoice:
    """``plan`` with the cheapest recompute and offload of each layer that fit ``budget_bytes`` on every rank.

    Whatever the plan recomputed and offloaded before is forgotten. ``options``: those that layers may have.
    Raises PlanError, naming the rank and the bytes it lacks, where nothing fits.
    """
    if not is_size(budget_bytes):
        raise PlanError(f"budget_bytes must be a whole number of at least 1, got {shown(budget_bytes)}")
    if not options or not set(options) <= set(OPTIONS):
        raise PlanError(f"options must be some of {OPTIONS}, got {shown(options)}")
    layers = plan.model.num_layers
    bare = evolve(plan, recompute=modes_by_layer("none", layers), offload=(False,) * layers)
    chosen: list[Option] = [("none", False)] * layers
    seconds, peaks = [], []
    for pp in range(plan.topology.pp):
        rank = rank_options(bare, pp, tuple(dict.fromkeys(options)))
        found = least(rank, budget_bytes)
        if found is None:
            raise _too_small(bare, rank, budget_bytes)
        for layer, option in zip(rank.layers, found, strict=True):
            chosen[layer] = rank.options[option]
        seconds.append(rank.added_seconds(found) * plan.num_microbatches)
        peaks.append(rank.peak_bytes(found))
    return RecomputeChoice(
        plan=evolve(
            plan, recompute=tuple(mode for mode, _ in chosen), offload=tuple(away for _, away in chosen)
        ),
        added_seconds=tuple(seconds),
        peak_bytes=tuple(peaks),
    )


def least(rank: RankOptions, budget_bytes: int) -> tuple[int, ...] | None:
    """The cheapest options of the rank's layers that fit, by index; None if none do."""
    for counts in ascending(kinds_of(rank), budget_bytes):
        for chosen in rank.spreads(counts):
            if rank.peak_bytes(chosen) <= budget_bytes:
                return chosen
    return None


def _too_small(bare: TrainingPlan, rank: RankOptions, budget_bytes: int) -> PlanError:
    """What the rank lacks with whichever one option for all its layers needs least."""
    every = range(len(rank.options))
    peaks = [rank.peak_bytes([option] * len(rank.layers)) for option in every]
    best = min(every, key=peaks.__getitem__)
    mode, away = rank.options[best]
    standing = sum(static_bytes(bare, Coordinate(pp=rank.pp)).values())
    remedy = (
        "raise tp, pp or zero_stage: parameters, gradients and optimizer state alone exceed the budget"
        if standing > budget_bytes
        else "lower micro_batch, raise tp or cp, or raise zero_stage"
    )
    return PlanError(
        f"budget_bytes must hold the fullest moment of every rank, got {budget_bytes:,}: "
        f"pipeline rank {rank.pp} lacks {peaks[best] - budget_bytes:,} bytes even with {mode} recompute"
        f"{' and offload' * away} of all its layers ({standing:,} bytes always stand); {remedy}"
    )


def kinds_of(rank: RankOptions) -> Kinds:
    """A rank's layers by kind, with bytes that no choice can be below.

    At the moments that are the highest where all layers have the same option.
    """
    kinds = np.array(rank.kinds)
    several = range(int(kinds.max()) + 1)
    floor = np.stack([rank.changes[kinds == kind].min(axis=0) for kind in several])
    base = rank.standing + (rank.changes - floor[kinds]).min(axis=1).sum(axis=0)
    num_layers = np.bincount(kinds)
    uniform = base + np.einsum("k,kot->ot", num_layers, floor)
    at = sorted(set(uniform.argmax(axis=1).tolist()))
    firsts = [int(np.flatnonzero(kinds == kind)[0]) for kind in several]
    seconds = [tuple(rank.seconds[first].tolist()) for first in firsts]
    return Kinds(
        num_layers=tuple(num_layers.tolist()),
        seconds=tuple(seconds),
        sizes=tuple(tuple(tuple(option) for option in floor[kind][:, at].tolist()) for kind in several),
        base=tuple(base[at].tolist()),
        copied=tuple(away for _, away in rank.options),
    )
