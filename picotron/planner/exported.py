"""What exports to other frameworks share: sentences beside the settings, and what of a plan both ask for."""

from __future__ import annotations

from collections.abc import Iterator

from attrs import frozen

from picotron.planner.topology import Topology

FEWEST_STEPS = 100  # that are trained, where neither the plan nor the caller says how many


@frozen
class Unexpressed:
    """A sentence on what the arguments cannot say."""

    text: str


@frozen
class Note:
    """A sentence on what the plan does not say and the arguments must."""

    text: str


def same_order(topology: Topology, order: tuple[str, ...]) -> bool:
    """Whether the ranks of ``topology`` sit as they would under ``order``: axes of one rank have no place."""
    moving = [axis for axis in order if getattr(topology, axis) > 1]
    return moving == [axis for axis in topology.order if getattr(topology, axis) > 1]


def stage_slices(stage_layers: tuple[int, ...]) -> Iterator[slice]:
    """The layers of each stage, as slices of what is listed by layer."""
    start = 0
    for layers in stage_layers:
        yield slice(start, start + layers)
        start += layers
