"""A plan's cut of layers into stages, bettered a layer at a time.

Moves are judged by the schedule itself, at the seconds that the exact simulator has for each segment; the
simulator and the memory timelines have the last word on what comes of them. Counts of layers alone, as a
search has them, know neither where the schedule waits nor what each layer takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby

import numpy as np
from attrs import evolve, frozen

from picotron.planner.chart import human_seconds
from picotron.planner.plan import TrainingPlan
from picotron.planner.predict import Prediction, predict
from picotron.planner.program import Kind
from picotron.planner.schedule_times import PipelineCosts, schedule_times
from picotron.planner.segment_costs import of_kind
from picotron.planner.simulate import Durations, durations

MOST_MOVES = 64
LEAST_GAIN = 1e-4  # of a step, below which a move is none
PHASES = (Kind.FORWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)

Cut = tuple[int, ...]


@frozen(kw_only=True)
class Refined:
    """A plan of equal choices whose stages are cut better, or the plan itself where no cut was better."""

    before: Prediction
    prediction: Prediction

    @property
    def plan(self) -> TrainingPlan:
        """The plan with the better cut."""
        return self.prediction.plan

    @property
    def gain(self) -> float:
        """By how much of its step it is faster; 0 where no cut was better."""
        return 1.0 - self.prediction.step_seconds / self.before.step_seconds

    def __str__(self) -> str:
        cut = cut_in_words(self.plan.stage_layers)
        if self.plan == self.before.plan:
            return f"no cut found is faster than stages of {cut} layers"
        gain = f"{self.gain:.1%}".replace("%", " %")
        seconds = human_seconds(self.prediction.step_seconds)
        return f"stages of {cut} layers take {seconds} simulated, {gain} less"


def cut_in_words(cut: Sequence[int]) -> str:
    """The layers of each stage, equal ones together.

    >>> cut_in_words((1, 2, 2, 2, 1))
    '1,3x2,1'
    """
    runs = [(size, len(list(same))) for size, same in groupby(cut)]
    return ",".join(f"{count}x{size}" if count > 1 else str(size) for size, count in runs)


def refined(before: Prediction, limit_bytes: int) -> Refined:
    """The plan of a prediction with a better cut that fits ``limit_bytes`` on every rank, if one is found."""
    for cut in reversed(better_cuts(before.plan)):
        after = predict(evolve(before.plan, stage_layers=cut))
        faster = after.step_seconds < before.step_seconds * (1 - LEAST_GAIN)
        if faster and after.fits and after.reserved_bytes <= limit_bytes:
            return Refined(before=before, prediction=after)
    return Refined(before=before, prediction=before)


def better_cuts(plan: TrainingPlan) -> tuple[Cut, ...]:
    """Cuts that each shorten the schedule more, by one layer moved from stage to stage; none if none does."""
    seconds = durations(plan)
    layers, ends = _layer_seconds(plan, seconds)

    def makespan(cut: Cut) -> float:
        f, i, w = _stage_seconds(cut, layers, ends).T.tolist()
        hop = seconds.send_seconds
        costs = PipelineCosts(forward_seconds=f, input_seconds=i, weight_seconds=w, transfer_seconds=hop)
        return schedule_times(plan.schedule, costs).makespan_seconds

    found: list[Cut] = []
    cut, best = plan.stage_layers, makespan(plan.stage_layers)
    for _ in range(MOST_MOVES):
        moves = sorted(set(_moves(plan.schedule.stage_ranks, cut, _stage_seconds(cut, layers, ends))))
        tried = min(((makespan(move), move) for move in moves), default=(best, cut))
        if tried[0] >= best * (1 - LEAST_GAIN):
            break
        best, cut = tried
        found.append(cut)
    return tuple(found)


def _layer_seconds(plan: TrainingPlan, seconds: Durations) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of F, I and W of every layer, [layer, phase], and of embedding and head, [end, phase]."""
    layers, ends = np.zeros((plan.model.num_layers, 3)), np.zeros((2, 3))
    for segments, cost in zip(plan.stage_segments, seconds.stages, strict=True):
        for column, kind in enumerate(PHASES):
            in_order = segments if kind == Kind.FORWARD else segments[::-1]
            for segment, priced in zip(in_order, of_kind(cost, kind), strict=True):
                own = (
                    ends[int(segment.kind != "embedding")] if segment.layer is None else layers[segment.layer]
                )
                own[column] += priced.seconds
    return layers, ends


def _stage_seconds(cut: Cut, layers: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Seconds of F, I and W of each stage of a cut, [stage, phase]."""
    found: np.ndarray = np.add.reduceat(layers, [0, *accumulate(cut[:-1])])
    found[[0, -1]] += ends
    return found


def _moves(ranks: Sequence[int], cut: Cut, seconds: np.ndarray) -> Iterator[Cut]:
    """A layer from a longest stage of a busiest rank to a shortest stage of any rank."""
    work = np.bincount(ranks, weights=seconds.sum(axis=1)).tolist()
    busy = sorted(range(len(work)), key=lambda rank: (-work[rank], rank))[:2]
    sources = {stage for rank in busy for stage in _extremes(cut, ranks, rank, longest=True)}
    for source in sorted(sources):
        for rank in range(len(work)):
            for target in _extremes(cut, ranks, rank, longest=False):
                if target != source and cut[source] > 1:
                    moved = list(cut)
                    moved[source] -= 1
                    moved[target] += 1
                    yield tuple(moved)


def _extremes(cut: Cut, ranks: Sequence[int], rank: int, *, longest: bool) -> set[int]:
    """The first and the last of a rank's stages that are its longest, or its shortest."""
    own = [stage for stage, of in enumerate(ranks) if of == rank]
    size = (max if longest else min)(cut[stage] for stage in own)
    chosen = [stage for stage in own if cut[stage] == size]
    return {chosen[0], chosen[-1]}
