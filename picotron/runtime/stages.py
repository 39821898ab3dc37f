"""Runs what one stage does with a microbatch, segment by segment; between two of them others may act."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import torch

from picotron.planner.body import SegmentBody
from picotron.planner.cost import of_kind, stage_cost
from picotron.planner.plan import TrainingPlan
from picotron.planner.program import Kind
from picotron.planner.segment_costs import SegmentCost
from picotron.runtime.segments import Context, Saved, Tokens, make_runner


class Around(Protocol):
    """What stands around each segment of a row: planned collectives, clock, memory, and what follows."""

    def __call__(self, order: int, place: int) -> AbstractContextManager[None]:
        """Of the segment that runs as number ``order`` and is number ``place`` of its stage."""


class Stage:
    """One stage on one rank: its segments, their planned bodies and costs, and what forwards have saved."""

    def __init__(self, plan: TrainingPlan, stage: int, tp_index: int, context: Context) -> None:
        self.segments = [make_runner(context, segment) for segment in plan.stage_segments[stage]]
        self.bodies = plan.bodies(stage, tp_index)
        self.costs = stage_cost(plan, stage, tp_index)
        self._nothing = torch.empty(
            0, dtype=next(iter(context.weights.values())).dtype, device=context.statistics.device
        )
        self._saved: dict[int, list[Saved]] = {}

    def planned(self, kind: Kind, order: int) -> tuple[SegmentBody, SegmentCost]:
        """Body and cost of the segment that runs as number ``order`` of a row of ``kind``."""
        return of_kind(self.bodies, kind).segments[order], of_kind(self.costs, kind)[order]

    def forward(
        self, microbatch: int, tokens: Tokens, x: torch.Tensor | None, around: Around
    ) -> torch.Tensor:
        """The stage's output; ``x`` is None where nothing comes before it."""
        y = self._nothing if x is None else x
        del x
        kept: list[Saved] = []
        for place, segment in enumerate(self.segments):
            with around(place, place):
                y, saved = segment.forward(y, tokens)
                kept.append(saved)
        self._saved[microbatch] = kept
        return y

    def backward(
        self, kind: Kind, microbatch: int, gradient: torch.Tensor | None, around: Around
    ) -> torch.Tensor:
        """A full backward, or one of its halves, last segment first; the gradient of the stage's input."""
        dy = self._nothing if gradient is None else gradient
        del gradient
        kept = self._saved[microbatch]
        for order, place in enumerate(reversed(range(len(self.segments)))):
            with around(order, place):
                if kind is Kind.BACKWARD:
                    dy = self.segments[place].backward(kept.pop(), dy)
                elif kind is Kind.BACKWARD_INPUT:
                    dy = self.segments[place].backward_input(kept[place], dy)
                else:
                    self.segments[place].backward_weight(kept.pop())
        if kind is not Kind.BACKWARD_INPUT:
            del self._saved[microbatch]
        return dy
