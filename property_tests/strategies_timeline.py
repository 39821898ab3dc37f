"""Strategies for prices: any seconds for everything that a plan's ranks do, in quarters."""

from __future__ import annotations

from itertools import cycle

from attrs import evolve
from hypothesis import strategies as st

from picotron.planner.cost import CollectiveCost, SegmentCost, of_kind
from picotron.planner.plan import TrainingPlan
from picotron.planner.program import COMPUTE
from picotron.planner.simulate import Durations, durations, slices
from property_tests.strategies import quarters


@st.composite
def prices(draw: st.DrawFn, made: TrainingPlan) -> dict[int, Durations]:
    """By first tensor-parallel rank of a slice: the shape of what it does, at any price.

    A few drawn numbers take turns, so that the drawing stays short whatever the plan.
    """
    compute = cycle(draw(st.lists(quarters(), min_size=1, max_size=7)))
    moves = cycle(draw(st.lists(quarters(200), min_size=1, max_size=5)))
    paid: dict[object, float] = {}

    def move(*key: object) -> float:
        if key not in paid:
            paid[key] = next(moves)
        return paid[key]

    def collective(cost: CollectiveCost) -> CollectiveCost:
        return evolve(cost, seconds=move(cost.kind, cost.group, cost.payload_bytes))

    def segment(cost: SegmentCost) -> SegmentCost:
        return SegmentCost(
            compute=[next(compute) for _ in cost.compute], collectives=map(collective, cost.collectives)
        )

    def priced(own: Durations) -> Durations:
        return Durations(
            stages=tuple(
                evolve(
                    stage,
                    **{kind.name.lower(): tuple(map(segment, of_kind(stage, kind))) for kind in COMPUTE},
                    update_seconds=next(compute),
                )
                for stage in own.stages
            ),
            send_seconds=move("send"),
            reduce_seconds={key: move("all_reduce", *key) for key in sorted(own.reduce_seconds)},
        )

    return {index: priced(durations(made, index)) for index in sorted(set(slices(made)))}
