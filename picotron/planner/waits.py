"""Who waits for whom: the graph behind a deadlock, and the shortest cycle in it.

A waiting rank needs all of those it waits for, so a cycle proves that its members wait for ever. Where there
is no cycle, somebody is waited for who will never come.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attrs import frozen

SHOWN_WAITS = 8  # ranks that a report describes; the others are counted


@frozen(kw_only=True)
class Wait:
    """``rank`` waits in ``operation``, which it entered at ``place``, for the ranks ``absent``."""

    rank: int
    operation: str
    place: str
    absent: tuple[int, ...]

    def __str__(self) -> str:
        at = f" ({self.place})" if self.place else ""
        return f"rank {self.rank} waits for {self.operation}{at}"


@frozen(kw_only=True)
class WaitGraph:
    """Every waiting rank, and why ranks that are gone (by rank) do not come."""

    waits: tuple[Wait, ...]
    others: Mapping[int, str]

    @property
    def edges(self) -> dict[int, tuple[int, ...]]:
        """From each waiting rank to those it waits for."""
        return {wait.rank: wait.absent for wait in self.waits}

    @property
    def cycle(self) -> tuple[int, ...]:
        """The shortest cycle, its first rank repeated at the end; () if there is none."""
        return shortest_cycle(self.edges)

    @property
    def missing(self) -> tuple[int, ...]:
        """Ranks that are waited for and do not wait themselves."""
        edges = self.edges
        return tuple(sorted({rank for absent in edges.values() for rank in absent if rank not in edges}))

    def __str__(self) -> str:
        """The cycle or the missing ranks, then what each concerned rank waits for."""
        cycle, missing = self.cycle, self.missing
        if cycle:
            head = "wait-for cycle: " + " -> ".join(map(str, cycle))
        else:
            head = "waited for: " + "; ".join(
                f"rank {rank}, which {self.others.get(rank, 'does not come')}" for rank in missing
            )
        concerned = set(cycle) or {w.rank for w in self.waits if set(w.absent) & set(missing)}
        first = [wait for wait in self.waits if wait.rank in concerned]
        shown = (first + [wait for wait in self.waits if wait.rank not in concerned])[:SHOWN_WAITS]
        lines = [f"{wait}: {_ranks(wait.absent)} not there" for wait in shown]
        if len(shown) < len(self.waits):
            lines.append(f"and {len(self.waits) - len(shown)} more ranks wait")
        return "\n".join([head, *lines])


def _ranks(ranks: Sequence[int]) -> str:
    named = ", ".join(map(str, ranks[:SHOWN_WAITS])) + (", ..." if len(ranks) > SHOWN_WAITS else "")
    return f"rank {named} is" if len(ranks) == 1 else f"ranks {named} are"


def shortest_cycle(edges: Mapping[int, Sequence[int]]) -> tuple[int, ...]:
    """A shortest cycle of a graph from rank to ranks, first rank repeated; of several, the least rank's.

    >>> shortest_cycle({0: (1,), 1: (2,), 2: (1, 0)})
    (1, 2, 1)
    >>> shortest_cycle({0: (1,), 1: (2,)})
    ()
    """
    best: tuple[int, ...] = ()
    for start in sorted(edges):
        found = _path_back(edges, start, len(best) - 1 if best else len(edges) + 1)
        if found:
            best = found
    return best


def _path_back(edges: Mapping[int, Sequence[int]], start: int, below: int) -> tuple[int, ...]:
    """The shortest way from ``start`` to itself with fewer than ``below`` edges, by breadth-first search."""
    came_from: dict[int, int] = {}
    frontier, length = [start], 0
    while frontier and length + 1 < below:
        length += 1
        following = []
        for rank in frontier:
            for other in sorted(edges.get(rank, ())):
                if other == start:
                    path = [rank]
                    while path[-1] != start:
                        path.append(came_from[path[-1]])
                    return (*path[::-1], start)
                if other not in came_from and other in edges:
                    came_from[other] = rank
                    following.append(other)
        frontier = following
    return ()
