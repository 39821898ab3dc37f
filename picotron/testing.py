"""For tests of parallel code: a pytest fixture that runs simulated ranks, and a strategy that draws faults.

Installed with Picotron, pytest finds the fixture by itself. Seeds are printed on failure, and
``pytest --picotron-seed N`` has the fixture run its worlds under seed N.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

    from picotron.planner.faults import Fault


def pytest_addoption(parser: pytest.Parser) -> None:
    """The seed of every world that the fixture runs."""
    parser.getgroup("picotron").addoption(
        "--picotron-seed", type=int, default=0, help="seed of simulated worlds: who of the ranks goes next"
    )


@pytest.fixture
def simulated_ranks(request: pytest.FixtureRequest) -> Callable[..., list[Any]]:
    """``picotron.simulate_ranks`` under the seed of ``--picotron-seed``, unless a call names its own."""
    from picotron.runtime.ranks import simulate_ranks

    def run(function: Callable[..., Any], world_size: int, **settings: Any) -> list[Any]:
        settings.setdefault("seed", request.config.getoption("--picotron-seed"))
        return simulate_ranks(function, world_size, **settings)

    return run


def fault_scripts(
    world_size: int, *, max_faults: int = 3, max_at: int = 20, max_step: int = 0
) -> SearchStrategy[tuple[Fault, ...]]:
    """A Hypothesis strategy of fault scripts for a world; it shrinks to none."""
    from hypothesis import strategies as st

    from picotron.planner.faults import Corrupt, Drop, Kill, Pause, Slow

    ranks = st.integers(0, world_size - 1)
    place = {"at": st.integers(0, max_at), "step": st.integers(0, max_step)}
    factors = st.sampled_from((1.5, 2.0, 4.0))
    kinds: list[SearchStrategy[Any]] = [
        st.builds(Pause, rank=ranks, seconds=st.sampled_from((0.25, 1.0, 8.0)), **place),
        st.builds(Slow, rank=ranks, factor=factors),
        st.builds(Corrupt, rank=ranks, element=st.integers(0, 8), bit=st.integers(0, 63), **place),
        st.builds(Kill, rank=ranks, **place),
    ]
    if world_size > 1:
        pairs = st.permutations(range(world_size)).map(lambda order: (order[0], order[1]))
        kinds += [
            st.builds(Slow, link=pairs, factor=factors),
            pairs.flatmap(
                lambda p: st.builds(Drop, sender=st.just(p[0]), receiver=st.just(p[1]), at=place["at"])
            ),
        ]
    return st.lists(st.one_of(kinds), max_size=max_faults).map(tuple)
