"""Parameters that ranks keep in parts: gathered ahead of the unit that computes, let go of after it.

A unit is an embedding, a decoder layer or a head (``planner.recompute.units``). While one computes, the next
is under way, so that two stand at a time. A stage may also be gathered as a whole and stand for several
cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from attrs import define, field, frozen

from picotron.errors import ExecutionError
from picotron.planner.layout import Placement
from picotron.planner.plan import TrainingPlan
from picotron.planner.plan_buckets import unit_buckets
from picotron.planner.recompute import units
from picotron.runtime.backend import Backend, Group, Handle
from picotron.runtime.buckets import BucketBuffers, Elastic, views
from picotron.runtime.communicator import Communicator
from picotron.runtime.parameters import Parameters


@frozen
class Source:
    """The whole parameters of a bucket, without memory until they are gathered from their parts."""

    whole: Elastic
    part: torch.Tensor
    group: str

    @property
    def num_bytes(self) -> int:
        """Payload of gathering it."""
        return self.whole.tensor.numel() * self.whole.tensor.element_size()


@frozen
class Unit:
    """What is gathered for the segments ``first`` to ``last`` of a stage."""

    first: int
    last: int
    sources: tuple[Source, ...]


def open_units(plan: TrainingPlan, stage: int, parameters: Parameters) -> tuple[Unit, ...]:
    """The units of ``stage``. A head gathers a table that it shares with the embedding for itself."""
    places = units(plan.stage_segments[stage])
    is_head = stage == plan.num_stages - 1
    found = []
    for own, buckets in zip(places, unit_buckets(plan, stage), strict=True):
        sources = []
        for bucket in buckets:
            buffers = parameters.buckets[bucket.stage, bucket.index]
            table = parameters.head_tables.get((bucket.stage, bucket.index)) if is_head else None
            apart = table is not None and own is places[-1]
            whole = table.whole if table is not None and apart else buffers.elastic_weights
            assert whole is not None
            sources.append(Source(whole, buffers.kept_weights, buffers.flat.group))
        found.append(Unit(own[0], own[-1], tuple(sources)))
    return tuple(found)


@define(eq=False)
class UnitGathers:
    """The units of a stage gathered for one cell, in the order in which it comes to them."""

    communicator: Communicator
    units: Sequence[Unit]
    backward: bool
    num_bytes: int = 0
    _under_way: dict[int, list[Handle]] = field(factory=dict)  # by the number of a unit
    _spans: list[tuple[float, float]] = field(factory=list)

    def start(self) -> None:
        """Post the gathering of the first unit."""
        self._post(len(self.units) - 1 if self.backward else 0)

    def before(self, place: int) -> None:
        """Ahead of a segment: where it is a unit's first, the next one is posted and its own waited for."""
        number = self._number(place)
        unit, step = self.units[number], -1 if self.backward else 1
        if place != (unit.last if self.backward else unit.first):
            return
        if 0 <= number + step < len(self.units):
            self._post(number + step)
        for handle in self._under_way.pop(number):
            handle.wait()
            if handle.span is not None:
                self._spans.append(handle.span)

    def after(self, place: int) -> None:
        """Behind a segment: where it is a unit's last, its parameters are let go of."""
        unit = self.units[self._number(place)]
        if place == (unit.first if self.backward else unit.last):
            for source in unit.sources:
                source.whole.release()

    @property
    def span(self) -> tuple[float, float] | None:
        """From the first gathering's start to the last one's end."""
        if not self._spans:
            return None
        return min(start for start, _ in self._spans), max(end for _, end in self._spans)

    def wait(self) -> None:
        """All have been waited for as they were needed."""
        if self._under_way:
            raise ExecutionError("every unit that was gathered must have computed, got one that has not")

    def _number(self, place: int) -> int:
        return next(number for number, unit in enumerate(self.units) if unit.first <= place <= unit.last)

    def _post(self, number: int) -> None:
        self._under_way[number] = handles = []
        for source in self.units[number].sources:
            handles.append(_gather(self.communicator, source))
            self.num_bytes += source.num_bytes


@define(eq=False)
class StageGathers:
    """All units of a stage, gathered at once and whole until they are let go of."""

    communicator: Communicator
    units: Sequence[Unit]
    num_bytes: int = 0
    _handles: list[Handle] = field(factory=list)

    def start(self) -> None:
        """Post all."""
        for source in (source for unit in self.units for source in unit.sources):
            self._handles.append(_gather(self.communicator, source))
            self.num_bytes += source.num_bytes

    def wait(self) -> None:
        """Return once all are there."""
        for handle in self._handles:
            handle.wait()

    @property
    def span(self) -> tuple[float, float] | None:
        """From the first one's start to the last one's end."""
        spans = [handle.span for handle in self._handles]
        known = [span for span in spans if span is not None]
        return (known[0][0], known[-1][1]) if known else None

    def release(self) -> None:
        """Let go of all."""
        for source in (source for unit in self.units for source in unit.sources):
            source.whole.release()


def _gather(communicator: Communicator, source: Source) -> Handle:
    return communicator.start_all_gather(source.whole.allocate(), source.part, source.group, source.num_bytes)


def gathered(
    own: BucketBuffers, part: torch.Tensor, backend: Backend, groups: Mapping[str, Group]
) -> torch.Tensor:
    """A whole buffer of a bucket from every rank's ``part`` of it. Collective over those that share it."""
    if own.flat.ranks == 1:
        return part
    whole = part.new_empty(own.flat.padded_numel)
    backend.all_gather(whole, part.contiguous(), groups[own.flat.group]).wait()
    return whole


def whole_gradients(
    parameters: Parameters, backend: Backend, groups: Mapping[str, Group]
) -> dict[str, torch.Tensor]:
    """The gradient of each parameter's slice, as the update saw it, however ranks share it. Collective."""
    return {
        name: view
        for own in parameters.buckets.values()
        for name, view in views(own.flat, gathered(own, own.kept_gradients, backend, groups)).items()
    }


def whole_weights(
    parameters: Parameters,
    backend: Backend,
    groups: Mapping[str, Group],
    wanted: Sequence[Placement] | None = None,
) -> dict[str, torch.Tensor]:
    """The slices of the parameters ``wanted`` (all, if None), however ranks share them. Collective.

    The buckets that hold one of them stand for a moment. Every rank that shares one must ask for the same.
    """
    names = {placement.name for placement in (parameters.placements if wanted is None else wanted)}
    found: dict[str, torch.Tensor] = {}
    for own in parameters.buckets.values():
        if names.isdisjoint(own.flat.names):
            continue
        keeps = own.elastic_weights is None
        whole = own.weights if keeps else gathered(own, own.kept_weights, backend, groups)
        found |= {name: view for name, view in views(own.flat, whole).items() if name in names}
    return found
