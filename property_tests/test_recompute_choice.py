"""Theorems about the cheapest recompute and offload, against trying everything."""

from __future__ import annotations

import itertools

import numpy as np
from attrs import evolve
from hypothesis import assume, event, given
from hypothesis import strategies as st

from picotron.planner.memory import memory_timeline
from picotron.planner.plan import TrainingPlan
from picotron.planner.recompute_choice import least
from picotron.planner.recompute_counts import Kinds, ascending
from picotron.planner.recompute_options import OPTIONS, RankOptions, rank_options
from picotron.planner.topology import Coordinate, rank_of
from property_tests.strategies import DENSE, SPARSE, quarters, saving_plans

EVERY = DENSE + SPARSE


def _bare(made: TrainingPlan) -> TrainingPlan:
    layers = made.model.num_layers
    return evolve(made, recompute=("none",) * layers, offload=(False,) * layers)


@given(saving_plans(families=EVERY), st.data())
def test_what_options_need_is_what_the_timeline_says(made: TrainingPlan, data: st.DataObject) -> None:
    """The highest moment of a rank whose layers have any options is that of the plan with them."""
    pp = data.draw(st.integers(0, made.topology.pp - 1))
    rank = rank_options(_bare(made), pp)
    chosen = [rank.options.index(pair) for pair in zip(made.recompute, made.offload, strict=True)]
    timeline = memory_timeline(made, rank_of(made.topology, Coordinate(pp=pp)))
    assert rank.peak_bytes([chosen[layer] for layer in rank.layers]) == timeline.max_bytes


def _cheapest(rank: RankOptions, budget_bytes: int) -> float | None:
    """By trying every option of every layer, equal ones next to each other."""
    best = None
    for chosen in itertools.product(range(len(rank.options)), repeat=len(rank.layers)):
        if len(list(itertools.groupby(chosen))) > len(set(chosen)):
            continue
        seconds = rank.added_seconds(chosen)
        if (best is None or seconds < best) and rank.peak_bytes(chosen) <= budget_bytes:
            best = seconds
    return best


@given(saving_plans(families=EVERY), st.floats(0, 1), st.data())
def test_nothing_cheaper_fits(made: TrainingPlan, share: float, data: st.DataObject) -> None:
    """The choice on a rank costs what the cheapest of runs of layers costs; none exactly if nothing fits."""
    pp = data.draw(st.integers(0, made.topology.pp - 1))
    rank = rank_options(_bare(made), pp)
    assume(len(rank.layers) <= 3)
    every = itertools.product(range(len(OPTIONS)), repeat=len(rank.layers))
    peaks = sorted({rank.peak_bytes(chosen) for chosen in every})
    budget = peaks[round(share * (len(peaks) - 1))] - data.draw(st.integers(0, 1))
    found, best = least(rank, budget), _cheapest(rank, budget)
    event(f"fits: {best is not None}, free: {best == 0}")
    assert (found is None) == (best is None)
    if found is not None:
        assert rank.peak_bytes(found) <= budget
        assert np.isclose(rank.added_seconds(found), best, rtol=1e-9, atol=0)


@st.composite
def kinds_of_layers(draw: st.DrawFn) -> Kinds:
    """Up to two kinds of up to four layers, with three options, at two moments."""
    num_kinds, num_options = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    sizes = st.tuples(*[st.integers(-9, 9)] * 2)
    return Kinds(
        num_layers=tuple(draw(st.integers(1, 4)) for _ in range(num_kinds)),
        seconds=tuple(tuple(draw(quarters(8)) for _ in range(num_options)) for _ in range(num_kinds)),
        sizes=tuple(tuple(draw(sizes) for _ in range(num_options)) for _ in range(num_kinds)),
        base=draw(sizes),
        copied=tuple(draw(st.booleans()) for _ in range(num_options)),
    )


@given(kinds_of_layers(), st.integers(-20, 40))
def test_counts_ascend_and_none_that_fits_is_left_out(kinds: Kinds, budget: int) -> None:
    """What fits by its sizes comes in order of seconds, then of offloads, each once; nothing else does."""
    width = range(len(kinds.copied))
    splits = [
        [c for c in itertools.product(range(many + 1), repeat=len(width)) if sum(c) == many]
        for many in kinds.num_layers
    ]
    found = {}
    for counts in itertools.product(*splits):
        every = [(kind, option) for kind in range(len(counts)) for option in width]
        taken = [
            base + sum(counts[kind][option] * kinds.sizes[kind][option][moment] for kind, option in every)
            for moment, base in enumerate(kinds.base)
        ]
        if max(taken) <= budget:
            seconds = sum(counts[kind][option] * kinds.seconds[kind][option] for kind, option in every)
            found[counts] = (
                seconds,
                sum(counts[kind][option] * kinds.copied[option] for kind, option in every),
            )
    given = list(ascending(kinds, budget))
    assert [found[counts] for counts in given] == sorted(found.values())
    assert len(set(given)) == len(given) == len(found)
