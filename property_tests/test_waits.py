"""Theorems about who waits for whom: the cycle that is reported is one, and none is shorter."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import event, given
from hypothesis import strategies as st

from picotron.planner.waits import SHOWN_WAITS, Wait, WaitGraph, shortest_cycle


@st.composite
def wait_edges(draw: st.DrawFn, max_ranks: int = 7) -> dict[int, tuple[int, ...]]:
    """Whom each waiting rank waits for, among ranks of which some do not wait."""
    ranks = st.integers(0, draw(st.integers(0, max_ranks - 1)))
    several = st.lists(ranks, min_size=1, max_size=3, unique=True).map(tuple)
    return draw(st.dictionaries(ranks, several))


def wait_graphs() -> st.SearchStrategy[WaitGraph]:
    """A graph of waits with a word on ranks that do not wait."""
    reasons = st.dictionaries(st.integers(0, 6), st.sampled_from(["finished", "was killed"]))
    return st.builds(
        lambda edges, others: WaitGraph(
            waits=tuple(
                Wait(rank=rank, operation="all_reduce", place=f"row {rank}", absent=absent)
                for rank, absent in sorted(edges.items())
            ),
            others=others,
        ),
        wait_edges(),
        reasons,
    )


def _cycles(edges: dict[int, tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Every simple cycle, from every rank on it: all paths that come back, by trying all."""
    found, paths = [], [(rank,) for rank in edges]
    while paths:
        path = paths.pop()
        for other in edges.get(path[-1], ()):
            if other == path[0]:
                found.append((*path, other))
            elif other not in path:
                paths.append((*path, other))
    return found


@given(wait_edges())
def test_the_cycle_is_one_of_the_shortest(edges: dict[int, tuple[int, ...]]) -> None:
    """None is missed; of several that are as short, it starts at the least rank of all."""
    cycle, every = shortest_cycle(edges), _cycles(edges)
    event(f"{len(cycle)} ranks long")
    if not every:
        assert cycle == ()
        return
    least = min(map(len, every))
    assert cycle in every
    assert len(cycle) == least
    assert cycle[0] == min(one[0] for one in every if len(one) == least)


@given(wait_edges())
def test_a_cycle_says_who_waits_for_whom(edges: dict[int, tuple[int, ...]]) -> None:
    """Each of its ranks waits for the next, the last for the first; no rank is on it twice."""
    cycle = shortest_cycle(edges)
    assert all(right in edges[left] for left, right in pairwise(cycle))
    assert cycle == () or cycle[0] == cycle[-1]
    assert len(set(cycle)) == max(0, len(cycle) - 1)


@given(wait_graphs())
def test_somebody_is_to_blame(graph: WaitGraph) -> None:
    """Where ranks wait, there is a cycle or one who does not wait himself."""
    assert bool(graph.waits) == bool(graph.cycle or graph.missing)
    waiting = {wait.rank for wait in graph.waits}
    awaited = {rank for wait in graph.waits for rank in wait.absent}
    assert set(graph.missing) == awaited - waiting


@given(wait_graphs().filter(lambda graph: bool(graph.waits)))
def test_a_report_names_the_cycle_or_the_missing(graph: WaitGraph) -> None:
    """Its first line says what is wrong, each other one what a rank waits for, and none is forgotten."""
    head, *lines = str(graph).splitlines()
    if graph.cycle:
        assert head == "wait-for cycle: " + " -> ".join(map(str, graph.cycle))
        concerned = set(graph.cycle)
    else:
        assert all(
            f"rank {rank}, which {graph.others.get(rank, 'does not come')}" in head for rank in graph.missing
        )
        concerned = {wait.rank for wait in graph.waits if set(wait.absent) & set(graph.missing)}
    told = [line for line in lines if line.startswith("rank ")]
    assert len(told) == min(SHOWN_WAITS, len(graph.waits))
    first = told[: len(concerned)]
    assert {int(line.split()[1]) for line in first} == concerned
