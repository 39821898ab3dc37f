"""Strategies for faults: one a kind, scripts of several, and those that a step can be simulated with."""

from __future__ import annotations

from hypothesis import strategies as st

from picotron.planner.faults import Corrupt, Drop, Fault, Kill, OutOfMemory, Pause, Slow
from picotron.planner.plan import TrainingPlan
from picotron.planner.topology import coordinate

FACTORS = (2.0, 1.0, 0.5, 3.0, 1.25)  # sums of powers of two: quarters stay exact


def two_ranks(world_size: int) -> st.SearchStrategy[tuple[int, int]]:
    """Two different ranks, in any order."""
    first, step = st.integers(0, world_size - 1), st.integers(1, world_size - 1)
    return st.tuples(first, step).map(lambda drawn: (drawn[0], sum(drawn) % world_size))


def slows(world_size: int, factors: st.SearchStrategy[float] | None = None) -> st.SearchStrategy[Slow]:
    """A slow rank or, in a world of several, a slow link."""
    chosen = factors if factors is not None else st.sampled_from(FACTORS)
    slow_rank = st.builds(Slow, rank=st.integers(0, world_size - 1), factor=chosen)
    if world_size == 1:
        return slow_rank
    return slow_rank | st.builds(Slow, link=two_ranks(world_size), factor=chosen)


def faults(world_size: int, max_step: int = 2, max_at: int = 20) -> st.SearchStrategy[Fault]:
    """One fault of any kind."""
    rank, at, step = st.integers(0, world_size - 1), st.integers(0, max_at), st.integers(0, max_step)
    pause = st.builds(
        Pause, rank=rank, at=at, step=step, seconds=st.integers(1, 40).map(lambda count: count / 4)
    )
    element, bit = st.integers(0, 1000), st.integers(0, 63)
    one_rank = st.one_of(
        slows(world_size),
        pause,
        st.builds(Kill, rank=rank, at=at, step=step),
        st.builds(Corrupt, rank=rank, at=at, step=step, element=element, bit=bit),
        st.builds(OutOfMemory, rank=rank, at_bytes=st.integers(0, 2**30)),
    )
    if world_size == 1:
        return one_rank
    return one_rank | st.tuples(two_ranks(world_size), at).map(
        lambda drawn: Drop(sender=drawn[0][0], receiver=drawn[0][1], at=drawn[1])
    )


def fault_scripts(
    world_size: int, max_faults: int = 3, max_step: int = 2, max_at: int = 20
) -> st.SearchStrategy[tuple[Fault, ...]]:
    """Up to ``max_faults`` faults in a world; the simplest script is empty."""
    return st.lists(faults(world_size, max_step, max_at), max_size=max_faults).map(tuple)


def pauses(made: TrainingPlan) -> st.SearchStrategy[Pause]:
    """A pause at a row of the first step that its rank has."""

    def at_a_row(rank: int) -> st.SearchStrategy[Pause]:
        stage, offsets = coordinate(made.topology, rank).pp, made.program().offsets
        return st.builds(
            Pause,
            rank=st.just(rank),
            at=st.integers(0, offsets[stage + 1] - offsets[stage] - 1),
            seconds=st.integers(1, 40).map(lambda count: count / 4),
        )

    return st.integers(0, made.topology.world_size - 1).flatmap(at_a_row)


def step_scripts(made: TrainingPlan, max_faults: int = 3) -> st.SearchStrategy[tuple[Fault, ...]]:
    """Slow parts and pauses: what a step of ``made`` is simulated with."""
    return st.lists(slows(made.topology.world_size) | pauses(made), max_size=max_faults).map(tuple)
