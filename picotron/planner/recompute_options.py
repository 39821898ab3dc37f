"""What recomputing or offloading each layer of a rank costs, and what it keeps at every moment of a step.

What a layer adds to the bytes at a moment depends on its own option alone: its own steps, and its copies at
the ends of the segments beside which they run. So a rank's peak is the highest of sums over its layers,
exactly what ``memory_timeline`` counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import permutations, zip_longest

import numpy as np
from attrs import evolve, field, frozen

from picotron.planner.body import COLLECTIVES, Bodies, Operation, Tensor, segment_memory
from picotron.planner.cost import compute_seconds, group_seconds, of_kind
from picotron.planner.plan import TrainingPlan
from picotron.planner.prices import copy_seconds
from picotron.planner.program import COMPUTE, Kind
from picotron.planner.rank_moments import Moments, rank_moments
from picotron.planner.recompute import MODES, Recompute, saved, units
from picotron.planner.stage import stage_bodies

Option = tuple[Recompute, bool]  # how a layer recomputes, and whether it offloads
MOST_ORDERED = 4
OPTIONS: tuple[Option, ...] = tuple((mode, offload) for mode in MODES for offload in (False, True))


@frozen(kw_only=True, eq=False)
class RankOptions:
    """What the options of each layer on a rank cost and keep.

    ``layers``: of the model, those that save least first. ``kinds``: which of them are alike. ``seconds`` a
    microbatch, and ``saved`` bytes: [layer, option]. ``changes``: bytes over what stands at each moment where
    no layer does anything, ``standing``: [layer, option, moment].
    """

    pp: int
    options: tuple[Option, ...]
    layers: tuple[int, ...]
    kinds: tuple[int, ...]
    seconds: np.ndarray = field(repr=False)
    saved: np.ndarray = field(repr=False)
    changes: np.ndarray = field(repr=False)
    standing: np.ndarray = field(repr=False)

    def spreads(self, counts: Sequence[Sequence[int]]) -> Iterator[tuple[int, ...]]:
        """Options of the layers, by index: of each kind so many of each, equal ones next to each other.

        In every order of the options, what saves least first; of more than MOST_ORDERED in that alone.
        """
        smallest = np.argsort(self.saved[0], kind="stable").tolist()
        used = [option for option in smallest if any(wanted[option] for wanted in counts)]
        for order in permutations(used) if len(used) <= MOST_ORDERED else [used]:
            chosen = [0] * len(self.layers)
            for kind, wanted in enumerate(counts):
                places = (place for place, own in enumerate(self.kinds) if own == kind)
                for place, option in zip(places, (o for o in order for _ in range(wanted[o])), strict=True):
                    chosen[place] = option
            yield tuple(chosen)

    def added_seconds(self, chosen: Sequence[int]) -> float:
        """What these options, by index, of its layers add to one microbatch."""
        return float(self.seconds[np.arange(len(self.layers)), list(chosen)].sum())

    def peak_bytes(self, chosen: Sequence[int]) -> int:
        """The rank's highest moment with these options, by index, of its layers."""
        added = self.changes[np.arange(len(self.layers)), list(chosen)].sum(axis=0)
        return int((self.standing + added).max())


def rank_options(bare: TrainingPlan, pp: int, options: tuple[Option, ...] = OPTIONS) -> RankOptions:
    """The options of the layers on pipeline rank ``pp`` of a plan that neither recomputes nor offloads."""
    moments, found = rank_moments(bare, pp), list[_Layer]()
    for column, stage in enumerate(bare.rank_stages(pp)):
        found += _stage_layers(bare, stage, column, options, moments)
    found.sort(key=lambda layer: (-layer.in_flight, layer.index))
    names = list(dict.fromkeys(layer.kind for layer in found))
    return RankOptions(
        pp=pp,
        options=options,
        layers=tuple(layer.index for layer in found),
        kinds=tuple(names.index(layer.kind) for layer in found),
        seconds=np.stack([layer.seconds for layer in found]),
        saved=np.stack([layer.saved for layer in found]),
        changes=np.stack([layer.changes for layer in found]),
        standing=moments.standing,
    )


@frozen
class _Layer:
    """One layer: where it is, how many microbatches of its stage are in flight, and its columns by option."""

    index: int
    kind: tuple[str, ...]
    in_flight: int
    seconds: np.ndarray
    saved: np.ndarray
    changes: np.ndarray


@frozen
class _Bodies:
    """A stage's bodies under one mode, and what each segment leaves and needs, by place: [place]."""

    bodies: Bodies
    left: dict[Kind, np.ndarray]
    highest: dict[Kind, np.ndarray]


def _stage_layers(
    bare: TrainingPlan, stage: int, column: int, options: tuple[Option, ...], moments: Moments
) -> Iterator[_Layer]:
    """The layers of one stage, which is the rank's ``column``-th."""
    own, places = bare.stage_segments[stage], units(bare.stage_segments[stage])
    modes = {mode: _with_mode(bare, stage, mode) for mode in MODES}
    in_flight = int(moments.whole[:, column].max())
    seconds: dict[tuple[str, ...], np.ndarray] = {}
    for unit, following in zip_longest(places, places[1:]):
        layer, kind = own[unit[0]].layer, tuple(own[place].kind for place in unit)
        if layer is None:
            continue
        boundary = Tensor(f"{unit[0]}.x", bare.dims().local_bytes)
        kept = {mode: saved(unit, modes[mode].bodies.forward, boundary) for mode in MODES}
        sizes = {mode: sum(tensor.bytes for tensor in kept[mode]) for mode in MODES}
        if kind not in seconds:
            taken = {mode: _layer_seconds(bare, modes[mode].bodies, unit) for mode in MODES}
            seconds[kind] = np.array([_added_seconds(bare, taken, sizes, option) for option in options])
        beside = (following or unit)[-1]
        changes = [
            _changes(moments, (stage, column), unit, modes, mode, (beside, away * sizes[mode]))
            for mode, away in options
        ]
        yield _Layer(
            index=layer,
            kind=kind,
            in_flight=in_flight,
            seconds=seconds[kind],
            saved=np.array([sizes[mode] * (not away) for mode, away in options]),
            changes=np.stack(changes),
        )


def _with_mode(bare: TrainingPlan, stage: int, mode: Recompute) -> _Bodies:
    """The bodies of a stage all of whose layers have one mode."""
    variant = evolve(bare.variant(stage), recompute=(mode,) * bare.model.num_layers)
    own, d = bare.stage_segments[stage], bare.dims()
    bodies = stage_bodies(bare.model, bare.topology, stage, own, d, variant)
    left, highest = dict[Kind, np.ndarray](), dict[Kind, np.ndarray]()
    for kind in COMPUTE:
        pairs = [segment_memory(segment) for segment in of_kind(bodies, kind).segments]
        totals = np.array([[left.sum(), highest.sum()] for left, highest in pairs]).T
        left[kind], highest[kind] = totals if kind is Kind.FORWARD else totals[:, ::-1]
    return _Bodies(bodies, left, highest)


def _layer_seconds(bare: TrainingPlan, bodies: Bodies, unit: Sequence[int]) -> tuple[float, float]:
    """One F and one B of a layer by itself."""
    segments = (bodies.forward.segments, bodies.backward.segments[::-1])
    forward, backward = (
        sum(_step_seconds(bare, step) for place in unit for step in own[place].operations) for own in segments
    )
    return forward, backward


def _step_seconds(bare: TrainingPlan, step: Operation) -> float:
    if step.kind in COLLECTIVES:
        return group_seconds(bare, step.kind, step.group, step.payload_bytes)
    return compute_seconds(bare, step)


def _added_seconds(
    bare: TrainingPlan,
    taken: dict[Recompute, tuple[float, float]],
    sizes: dict[Recompute, int],
    option: Option,
) -> float:
    """What an option adds to one microbatch: what runs again, and what of the copies shows."""
    mode, away = option
    forward, backward = taken[mode]
    again = max(0.0, backward - taken["none"][1])
    copy = copy_seconds(bare, sizes[mode]) if away else 0.0
    return again + max(0.0, copy - forward) + max(0.0, copy - backward)


def _changes(
    moments: Moments,
    where: tuple[int, int],
    unit: Sequence[int],
    modes: dict[Recompute, _Bodies],
    mode: Recompute,
    copied: tuple[int, int],
) -> np.ndarray:
    """Bytes that a layer's option adds at each moment, over those of a layer that does nothing.

    ``where``: its stage, and that one's column. ``copied``: beside which segment it is copied, and how much.
    """
    (stage, column), (beside, size) = where, copied
    left, within = dict[Kind, np.ndarray](), dict[Kind, np.ndarray]()
    for kind in COMPUTE:
        own = np.zeros_like(modes[mode].left[kind])
        own[list(unit)] = 1
        left[kind] = own * (modes[mode].left[kind] - modes["none"].left[kind])
        highest = own * (modes[mode].highest[kind] - modes["none"].highest[kind])
        if kind is Kind.FORWARD:
            left[kind][beside] -= size
        elif kind is not Kind.BACKWARD_WEIGHT:
            left[kind][beside] += size
            highest[beside] += size
        before = left[kind] if kind is Kind.FORWARD else left[kind][::-1]
        before = np.cumsum(before) - before
        within[kind] = highest + (before if kind is Kind.FORWARD else before[::-1])
    kept = left[Kind.FORWARD].sum()
    found: np.ndarray = moments.whole[:, column] * kept
    found += moments.split[:, column] * (kept + left[Kind.BACKWARD_INPUT].sum())
    for kind in COMPUTE:
        here = np.flatnonzero((moments.stage == stage) & (moments.kind == kind))
        found[here] += within[kind][moments.place[here]]
    return found
