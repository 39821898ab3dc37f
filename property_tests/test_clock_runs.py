"""Theorem of time: the clock of simulated ranks that run a plan is the plan's own simulation, to the bit."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from picotron.planner.faults import Fault, Pause, Slow
from picotron.planner.plan import TrainingPlan
from picotron.planner.program import rows
from picotron.planner.simulate import simulate_step
from picotron.planner.timeline import Timeline
from picotron.planner.topology import coordinate
from picotron.runtime.run import run
from property_tests.strategies_runtime import Training, trainings
from tests.runtime.models import random_samples


@st.composite
def delays(draw: st.DrawFn, plan: TrainingPlan) -> tuple[Fault, ...]:
    """Slow ranks, slow links and pauses of a plan's world."""
    ranks = st.integers(0, plan.topology.world_size - 1)
    script: list[Fault] = []
    for _ in range(draw(st.integers(0, 3))):
        rank = draw(ranks)
        where = coordinate(plan.topology, rank)
        row = st.integers(0, len(rows(plan.program(where.tp), where.pp)) - 1)
        kinds: list[st.SearchStrategy[Fault]] = [
            st.builds(Slow, rank=st.just(rank), factor=st.floats(0.5, 4.0)),
            st.builds(Pause, rank=st.just(rank), at=row, seconds=st.floats(1e-6, 1e-3)),
        ]
        if plan.topology.world_size > 1:
            other = draw(ranks.filter(lambda r, rank=rank: r != rank))
            kinds.append(st.builds(Slow, link=st.just((rank, other)), factor=st.floats(0.5, 4.0)))
        script.append(draw(st.one_of(kinds)))
    return tuple(script)


def spans(timeline: Timeline, rank: int) -> dict[int, tuple[float, float]]:
    """Start and end of each row of one rank."""
    own = timeline.rank == rank
    columns = (timeline.row[own].tolist(), timeline.start[own].tolist(), timeline.end[own].tolist())
    return {row: (start, end) for row, start, end in zip(*columns, strict=True)}


@settings(max_examples=max(10, settings().max_examples // 4))  # each trains
@given(trainings(gathers=False), st.data())
def test_simulated_ranks_take_the_predicted_time(training: Training, data: st.DataObject) -> None:
    """Every row of every rank starts and ends when ``simulate_step`` says, whatever is slow.

    A row that gathers parameters is one operation to the plan, and to a run one for each bucket.
    """
    plan, faults = training.plan, data.draw(delays(training.plan))
    samples = random_samples(plan.model.vocab_size, plan.workload.seq_len, ragged=training.ragged)
    measured = run(plan, samples, steps=1, measure_step=0, seed=training.seed, faults=faults)
    planned = simulate_step(plan, faults)
    for rank in range(plan.topology.world_size):
        assert spans(measured.timeline, rank) == spans(planned.rank_timeline(rank), rank), rank
