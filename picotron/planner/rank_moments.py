"""The moments of a rank's step that can be its highest, whatever its layers recompute and offload."""

from __future__ import annotations

import numpy as np
from attrs import frozen

from picotron.planner.body import Bodies, segment_memory
from picotron.planner.cost import of_kind
from picotron.planner.memory import memory_timeline
from picotron.planner.plan import TrainingPlan
from picotron.planner.program import COMPUTE, Kind, rows
from picotron.planner.topology import Coordinate, rank_of

_IN_FLIGHT = {  # what a row adds to the microbatches between F and B or I, and between I and W
    Kind.FORWARD: (1, 0),
    Kind.BACKWARD: (-1, 0),
    Kind.BACKWARD_INPUT: (-1, 1),
    Kind.BACKWARD_WEIGHT: (0, -1),
}


@frozen
class Moments:
    """Where each moment is, what is in flight there, and the bytes that stand.

    ``stage``, ``kind`` and ``place`` (of a segment in its stage) are -1 outside bodies. ``whole`` and
    ``split``: microbatches between F and B or I, and between I and W: [moment, stage of the rank].
    """

    stage: np.ndarray
    kind: np.ndarray
    place: np.ndarray
    whole: np.ndarray
    split: np.ndarray
    standing: np.ndarray


def rank_moments(plan: TrainingPlan, pp: int) -> Moments:
    """The moments of the first rank at ``pp``, without those that another one is above in every respect."""
    timeline = memory_timeline(plan, rank_of(plan.topology, Coordinate(pp=pp)))
    own, stages = rows(plan.program(), pp), plan.rank_stages(pp)
    steps = np.zeros((len(own) + 1, 2, len(stages)), dtype=np.int64)
    for index, row in enumerate(own):
        if row.kind in COMPUTE:
            steps[index + 1, :, stages.index(row.stage)] = _IN_FLIGHT[row.kind]
    in_flight = steps.cumsum(axis=0)
    inside = timeline.operation >= 0
    kind = np.array([row.kind for row in own])[timeline.row]
    stage = np.array([row.stage for row in own])[timeline.row]
    ends = np.array([len(plan.stage_segments[row.stage]) - 1 for row in own])[timeline.row]
    place = np.where(kind == Kind.FORWARD, timeline.operation, ends - timeline.operation)
    at = timeline.row + ~inside  # a row's own moment is that of its end
    every = Moments(
        np.where(inside, stage, -1),
        np.where(inside, kind, -1),
        np.where(inside, place, -1),
        in_flight[at, 0],
        in_flight[at, 1],
        timeline.peak_bytes,
    )
    return _highest(every, _saved_bytes(plan, stages))


def _saved_bytes(plan: TrainingPlan, stages: tuple[int, ...]) -> np.ndarray:
    """Bytes that a microbatch in flight keeps, whole and split, of each stage: [2, stage]."""

    def left(bodies: Bodies, kind: Kind) -> int:
        segments = of_kind(bodies, kind).segments
        return int(sum(segment_memory(segment)[0].sum() for segment in segments))

    found = []
    for stage in stages:
        bodies = plan.bodies(stage)
        whole = left(bodies, Kind.FORWARD)
        found.append((whole, whole + left(bodies, Kind.BACKWARD_INPUT)))
    return np.array(found, dtype=np.int64).T


def _highest(every: Moments, saved: np.ndarray) -> Moments:
    """Of moments in one place, those that no other one equals in what is in flight and in other bytes."""
    other = every.standing - every.whole @ saved[0] - every.split @ saved[1]
    levels = np.column_stack([every.whole, every.split, other])
    places = np.column_stack([every.stage, every.kind, every.place])
    rows_ = np.unique(np.column_stack([places, levels]), axis=0, return_index=True)[1]
    order = rows_[np.lexsort((-levels[rows_].sum(axis=1), *places[rows_].T))]
    kept: list[int] = []
    first = 0  # of ``kept``, in this place
    for index in order.tolist():
        if kept and (places[index] != places[kept[-1]]).any():
            first = len(kept)
        if not (levels[kept[first:]] >= levels[index]).all(axis=1).any():
            kept.append(index)
    columns = (every.stage, every.kind, every.place, every.whole, every.split, every.standing)
    return Moments(*(column[kept] for column in columns))
