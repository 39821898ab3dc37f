"""Theorems about faults: scripts are data, and slowness in a step does what slowness does."""

from __future__ import annotations

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from picotron.errors import PlanError
from picotron.planner.faults import (
    Fault,
    Kill,
    Pause,
    Slow,
    check_faults,
    compute_factor,
    link_factor,
    ranks_of,
)
from picotron.planner.plan import TrainingPlan
from picotron.planner.simulate import priced_step, simulate_step
from property_tests.strategies import DENSE, SPARSE, plans
from property_tests.strategies_faults import fault_scripts, pauses, slows, step_scripts
from property_tests.strategies_timeline import prices

EVERY = DENSE + SPARSE

scripts = st.integers(1, 6).flatmap(lambda size: st.tuples(st.just(size), fault_scripts(size)))


@given(scripts)
def test_a_script_names_ranks_of_its_world(drawn: tuple[int, tuple[Fault, ...]]) -> None:
    """It is taken as it is, and in a world without one of its ranks refused."""
    world_size, script = drawn
    assert check_faults(list(script), world_size) == script
    named = [rank for fault in script for rank in ranks_of(fault)]
    assert all(0 <= rank < world_size for rank in named)
    if named and max(named) > 0:
        with pytest.raises(PlanError, match="must be in"):
            check_faults(script, max(named))


@given(scripts)
def test_faults_are_values(drawn: tuple[int, tuple[Fault, ...]]) -> None:
    """Equal ones are equal keys, and one made again from its fields is the same."""
    _, script = drawn
    assert {evolve(fault) for fault in script} == set(script)


@given(scripts, st.data())
def test_factors_multiply(drawn: tuple[int, tuple[Fault, ...]], data: st.DataObject) -> None:
    """Of one script after the other; a link is slow for groups with both its ranks."""
    world_size, script = drawn
    other = data.draw(fault_scripts(world_size))
    for rank in range(world_size):
        both = compute_factor(script, rank) * compute_factor(other, rank)
        assert compute_factor((*script, *other), rank) == pytest.approx(both)
        assert link_factor(script, [rank]) == 1.0
    everybody = range(world_size)
    slowed = [f.factor for f in script if isinstance(f, Slow) and f.link is not None]
    assert link_factor(script, everybody) == pytest.approx(
        link_factor(script[:1], everybody) * link_factor(script[1:], everybody)
    )
    assert slowed or link_factor(script, everybody) == 1.0


@given(plans(families=EVERY), st.data())
def test_what_is_slower_never_shortens_the_step(made: TrainingPlan, data: st.DataObject) -> None:
    """Whatever else is wrong, one more slow rank or link delays the step or does nothing."""
    script = data.draw(step_scripts(made, max_faults=2))
    slower = data.draw(slows(made.topology.world_size, factors=st.floats(1.0, 4.0)))
    before, after = simulate_step(made, script), simulate_step(made, [*script, slower])
    assert after.step_seconds >= before.step_seconds


@given(plans(families=EVERY), st.data())
def test_what_is_faster_never_lengthens_the_step(made: TrainingPlan, data: st.DataObject) -> None:
    """A factor below one is a better device or link."""
    faster = data.draw(slows(made.topology.world_size, factors=st.floats(0.25, 1.0)))
    assert simulate_step(made, [faster]).step_seconds <= simulate_step(made).step_seconds


@given(plans(families=EVERY), st.data())
def test_a_pause_costs_at_most_its_seconds(made: TrainingPlan, data: st.DataObject) -> None:
    """And never gains any; in quarters, so that nothing is rounded."""
    script, pause = data.draw(step_scripts(made, max_faults=2)), data.draw(pauses(made))
    seconds = data.draw(prices(made))
    try:
        before = priced_step(made, script, seconds).step_seconds
    except PlanError:
        before = 0.0  # nothing takes any time
    after = priced_step(made, (*script, pause), seconds).step_seconds
    assert before <= after <= before + pause.seconds


@given(plans(families=EVERY), st.data())
def test_ranks_share_a_class_only_as_equals(made: TrainingPlan, data: st.DataObject) -> None:
    """Slow by the same factor everywhere, all ranks of a stage are as alike as without."""
    factor = data.draw(st.sampled_from([2.0, 3.0]))
    everybody = [Slow(rank=rank, factor=factor) for rank in range(made.topology.world_size)]
    assert simulate_step(made, everybody).classes == simulate_step(made).classes


@given(plans(), st.data())
def test_only_time_is_simulated(made: TrainingPlan, data: st.DataObject) -> None:
    """What needs ranks that run is refused by name."""
    script = data.draw(fault_scripts(made.topology.world_size, max_step=0, max_at=0))
    refused = [type(fault).__name__ for fault in script if not isinstance(fault, Slow | Pause)]
    if refused:
        with pytest.raises(PlanError, match=f"{refused[0]} needs a run"):
            simulate_step(made, script)
    else:
        assert simulate_step(made, script).faults == script
    with pytest.raises(PlanError, match="Kill needs a run"):
        simulate_step(made, [Kill(rank=0, at=0)])
