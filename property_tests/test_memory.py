"""Theorems about live bytes, against a naive set of named tensors."""

from __future__ import annotations

from itertools import accumulate

import attrs
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from picotron.planner.cost import of_kind
from picotron.planner.memory import memory_timeline, static_bytes
from picotron.planner.plan import TrainingPlan
from picotron.planner.predict import predict
from picotron.planner.program import COMPUTE, Kind, Row, rows
from picotron.planner.rank_bytes import alike
from picotron.planner.topology import coordinate
from property_tests.strategies import DENSE, SPARSE, one_stage_a_rank, plans

EVERY = DENSE + SPARSE


def _naive(made: TrainingPlan, rank: int) -> list[tuple[int, int, int, int]]:
    """(row, operation, live, peak) of every entry, from a dictionary of (microbatch, tensor's name).

    Segments are counted through from the first stage on, so what passes between two stages has one name.
    """
    where = coordinate(made.topology, rank)
    bodies = {stage: made.bodies(stage, where.tp) for stage in made.rank_stages(where.pp)}
    starts = [0, *accumulate(map(len, made.stage_segments))]
    boundary = made.dims(where.tp).local_bytes
    standing = sum(static_bytes(made, where).values())
    live: dict[tuple[int, str], int] = {}
    found = []

    def total() -> int:
        return standing + sum(live.values())

    def named(row: Row, name: str) -> tuple[int, str]:
        segment, rest = name.split(".", 1)
        return row.microbatch, f"{starts[row.stage] + int(segment)}.{rest}"

    own = rows(made.program(where.tp), where.pp)
    for index, row in enumerate(own):
        if row.anchor_row >= 0:
            continue
        body = of_kind(bodies[row.stage], row.kind) if row.kind in COMPUTE else None
        for number, segment in enumerate(body.segments if body else ()):
            peak = total()
            for operation in segment.operations:
                for tensor in operation.creates:
                    assert named(row, tensor.name) not in live
                    live[named(row, tensor.name)] = tensor.bytes
                peak = max(peak, total())
                for tensor in operation.frees:
                    assert live.pop(named(row, tensor.name)) == tensor.bytes
            found.append((index, number, total(), peak))
        peak = total()
        target = own[row.target].kind if row.kind is Kind.WAIT else None
        end = len(made.stage_segments[row.stage])
        if row.kind in (Kind.RECV_F, Kind.RECV_B):
            live[named(row, "0.x" if row.kind is Kind.RECV_F else f"{end}.g")] = boundary
        if target in (Kind.SEND_F, Kind.SEND_B):
            assert live.pop(named(row, f"{end}.x" if target is Kind.SEND_F else "0.g")) == boundary
        peak = max(peak, total()) + (8 if row.kind is Kind.NORM else 0)
        found.append((index, -1, total(), peak))
    assert not live
    return found


@given(plans(families=EVERY), st.integers(0, 1000))
def test_timelines_are_those_of_named_tensors(made: TrainingPlan, number: int) -> None:
    """Each level and each peak is the sum of what a microbatch has made and not yet freed."""
    rank = number % made.topology.world_size
    timeline = memory_timeline(made, rank)
    columns = (timeline.row, timeline.operation, timeline.live_bytes, timeline.peak_bytes)
    assert list(zip(*(c.tolist() for c in columns), strict=True)) == _naive(made, rank)


@given(plans(families=EVERY), st.integers(0, 1000))
def test_a_step_returns_to_where_it_began(made: TrainingPlan, number: int) -> None:
    """The last level is what always stands; no level is below it, and no peak below its level."""
    rank = number % made.topology.world_size
    timeline = memory_timeline(made, rank)
    standing = sum(static_bytes(made, coordinate(made.topology, rank)).values())
    assert timeline.live_bytes[-1] == standing
    assert timeline.live_bytes.min() >= standing
    assert np.all(timeline.peak_bytes >= timeline.live_bytes)
    assert sum(size for _, size in timeline.peak_by_category) == timeline.max_bytes
    assert all(size > 0 for _, size in timeline.peak_by_category)


@given(plans(families=EVERY))
def test_one_f_one_b_never_needs_more_than_afab(made: TrainingPlan) -> None:
    """Nor does any rank hold more microbatches than min(m, p - s) of what one leaves."""
    named = {name: one_stage_a_rank(made, name) for name in ("1f1b", "afab")}
    for rank in range(made.topology.world_size):
        peaks = {name: memory_timeline(p, rank).max_bytes for name, p in named.items()}
        slack = 2 * made.dims().local_bytes  # 1F1B has a gradient on its way out while the next F runs
        assert peaks["1f1b"] <= peaks["afab"] + slack


@given(plans(families=SPARSE))
def test_alike_ranks_hold_as_much_at_all_times(made: TrainingPlan) -> None:
    """One timeline stands for all ranks with equal stages and slices and as many experts."""
    found: dict[object, list[int]] = {}
    for rank, key in enumerate(alike(made)):
        levels = memory_timeline(made, rank).live_bytes.tolist()
        assert found.setdefault(key, levels) == levels


@given(plans(families=EVERY))
def test_no_rank_needs_more_than_predicted(made: TrainingPlan) -> None:
    """A rank's own peak is at most what is predicted for it (it may count fewer tensors in the norm)."""
    predicted = predict(made)
    peaks = [memory_timeline(made, rank).max_bytes for rank in range(made.topology.world_size)]
    assert all(own <= said for own, said in zip(peaks, predicted.memory_by_rank, strict=True))


@given(plans(families=EVERY))
def test_the_fullest_rank_is_predicted_exactly(made: TrainingPlan) -> None:
    """It decides whether the plan fits, also where slices or experts are uneven."""
    predicted = predict(made)
    peaks = [memory_timeline(made, rank).max_bytes for rank in range(made.topology.world_size)]
    assert predicted.peak_memory_bytes == max(peaks) == peaks[predicted.peak_memory_rank]
    assert predicted.fits == (max(peaks) <= made.cluster.device.memory_bytes)


@given(plans(), st.integers(-3, 3))
def test_a_plan_fits_to_the_byte(made: TrainingPlan, over: int) -> None:
    """A device of the peak's bytes is enough, of one byte less it is not."""
    capacity = predict(made).peak_memory_bytes - over
    device = attrs.evolve(made.cluster.device, memory_bytes=capacity)
    predicted = predict(attrs.evolve(made, cluster=attrs.evolve(made.cluster, device=device)))
    assert predicted.fits == (over <= 0) == (not predicted.misfits)
    assert predicted.margin_bytes == -over
