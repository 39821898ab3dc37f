"""Runs what one stage does with a microbatch, segment by segment; between two of them others may act.

Between a forward and its backward stands a ``Record``: what every segment has saved, as the plan says for its
layer. Of a layer recomputed in full that is its input alone; where the core of attention is recomputed, all
but what the core leaves; of an offloaded layer, copies on the host.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from itertools import zip_longest
from typing import Protocol

import torch
from attrs import define, evolve, field, frozen

from picotron.planner.body import SegmentBody
from picotron.planner.cost import of_kind, stage_cost
from picotron.planner.model import Segment
from picotron.planner.plan import TrainingPlan
from picotron.planner.program import COPIES, Kind
from picotron.planner.recompute import Recompute, units
from picotron.planner.segment_costs import SegmentCost
from picotron.planner.stage import segment_name
from picotron.runtime.copies import Copied, Copies
from picotron.runtime.foreign import ForeignSegment, Modules
from picotron.runtime.segments import Context, Saved, SegmentRunner, Tokens, make_runner


class Around(Protocol):
    """What stands around each segment of a row: planned collectives, clock, memory, and what follows."""

    def __call__(self, order: int, place: int) -> AbstractContextManager[None]:
        """Of the segment that runs as number ``order`` and is number ``place`` of its stage."""


@frozen(kw_only=True)
class Unit:
    """Segments of a stage that are recomputed and copied at a time: a layer, the embedding or the head.

    What an offloaded one saves is gone after the segment ``beside``, and comes back before its backward.
    """

    places: tuple[int, ...]
    recompute: Recompute = "none"
    offload: bool = False
    beside: int


def stage_units(plan: TrainingPlan, stage: int) -> tuple[Unit, ...]:
    """The units of a stage, in order."""
    own = plan.stage_segments[stage]
    places = units(own)
    found = []
    for unit, following in zip_longest(places, places[1:]):
        made = Unit(places=unit, beside=(following or unit)[-1])
        layer = own[unit[0]].layer
        if layer is not None:
            made = evolve(made, recompute=plan.recompute[layer], offload=plan.offload[layer])
        found.append(made)
    return tuple(found)


@define
class Record:
    """What one microbatch's forward has left: by place what its segment saved, by unit what was copied."""

    tokens: Tokens
    saved: dict[int, Saved] = field(factory=dict)
    copied: dict[Unit, Copied] = field(factory=dict)


class Stage:
    """One stage on one rank: its segments, their planned bodies and costs, and what forwards have saved."""

    def __init__(
        self, plan: TrainingPlan, stage: int, tp_index: int, context: Context, modules: Modules | None = None
    ) -> None:
        self.segments = [
            _runner(context, segment, (modules or {}).get(segment_name(segment)))
            for segment in plan.stage_segments[stage]
        ]
        self.units = stage_units(plan, stage)
        self.bodies = plan.bodies(stage, tp_index)
        self.costs = stage_cost(plan, stage, tp_index)
        self._communicator = context.communicator
        self._copies = Copies(context.statistics.device)
        self._unit_of = {place: unit for unit in self.units for place in unit.places}
        self._nothing = torch.empty(
            0, dtype=next(iter(context.weights.values())).dtype, device=context.statistics.device
        )
        self._records: dict[int, Record] = {}

    def planned(self, kind: Kind, order: int) -> tuple[SegmentBody, SegmentCost]:
        """Body and cost of the segment that runs as number ``order`` of a row of ``kind``."""
        return of_kind(self.bodies, kind).segments[order], of_kind(self.costs, kind)[order]

    def forward(
        self, microbatch: int, tokens: Tokens, x: torch.Tensor | None, around: Around
    ) -> torch.Tensor:
        """The stage's output; ``x`` is None where nothing comes before it."""
        y = self._nothing if x is None else x
        del x
        record = self._records[microbatch] = Record(tokens)
        for place, segment in enumerate(self.segments):
            with around(place, place):
                made, saved = segment.forward(y, tokens)
                record.saved[place] = _kept(self._unit_of[place], place, y, saved)
                y = made
                del made, saved
                self._begin_to_leave(record, place)
                self._leave(record, place)
        return y

    def backward(
        self, kind: Kind, microbatch: int, gradient: torch.Tensor | None, around: Around
    ) -> torch.Tensor:
        """A full backward, or one of its halves, last segment first; the gradient of the stage's input."""
        dy = self._nothing if gradient is None else gradient
        del gradient
        record = self._records[microbatch]
        for order, place in enumerate(reversed(range(len(self.segments)))):
            with around(order, place):
                if kind is not Kind.BACKWARD_WEIGHT:
                    self._begin_to_return(record, place)
                    self._restore(record, place)
                if kind is Kind.BACKWARD:
                    dy = self.segments[place].backward(record.saved.pop(place), dy)
                elif kind is Kind.BACKWARD_INPUT:
                    dy = self.segments[place].backward_input(record.saved[place], dy)
                else:
                    self.segments[place].backward_weight(record.saved.pop(place))
        if kind is not Kind.BACKWARD_INPUT:
            del self._records[microbatch]
        return dy

    def _begin_to_leave(self, record: Record, place: int) -> None:
        """Copy what a unit has saved to the host, once its last segment has run."""
        unit = self._unit_of[place]
        if unit.offload and place == unit.places[-1]:
            copied = self._copies.to_host([record.saved[own] for own in unit.places])
            self._communicator.copied(COPIES[Kind.OFFLOAD], copied.bytes)
            record.copied[unit] = copied

    def _leave(self, record: Record, place: int) -> None:
        """Let go, after the segment at ``place``, of what has been copied beside it."""
        for unit in self._copied_beside(place):
            self._copies.arrive(record.copied[unit])
            for own in unit.places:
                del record.saved[own]

    def _begin_to_return(self, record: Record, place: int) -> None:
        """Copy back, before the segment at ``place``, what units before it have on the host."""
        for unit in self._copied_beside(place):
            copied = record.copied[unit] = self._copies.to_device(record.copied[unit])
            self._communicator.copied(COPIES[Kind.RELOAD], copied.bytes)

    def _copied_beside(self, place: int) -> list[Unit]:
        return [unit for unit in self.units if unit.offload and unit.beside == place]

    def _restore(self, record: Record, place: int) -> None:
        """Have all that the segment at ``place`` needs: copied back, or computed again."""
        unit = self._unit_of[place]
        if place == unit.places[-1]:
            if unit in record.copied:
                copied = record.copied.pop(unit)
                self._copies.arrive(copied)
                record.saved.update(zip(unit.places, copied.value, strict=True))
            if unit.recompute == "full":
                self._run_again(record, unit)
        if unit.recompute == "selective" and place == unit.places[0]:
            record.saved[place]["attention"].run()

    def _run_again(self, record: Record, unit: Unit) -> None:
        """The forward of a unit from its input, for what its segments save; the output is let go of."""
        y = record.saved[unit.places[0]].pop("input")
        for place in unit.places:
            y, record.saved[place] = self.segments[place].forward(y, record.tokens)


def _runner(context: Context, segment: Segment, module: torch.nn.Module | None) -> SegmentRunner:
    return make_runner(context, segment) if module is None else ForeignSegment(context, segment, module)


def _kept(unit: Unit, place: int, x: torch.Tensor, saved: Saved) -> Saved:
    """What is kept of all that a segment with input ``x`` has saved."""
    if unit.recompute == "full":
        return {"input": x} if place == unit.places[0] else {}
    if unit.recompute == "selective" and place == unit.places[0]:
        saved["attention"].drop()
    return saved
