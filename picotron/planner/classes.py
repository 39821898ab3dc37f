"""Which ranks do the same at the same times, so that one of them stands for all of its class.

Ranks are told apart by a *mark*: whatever makes their own operations differ. A partition is *stable* if ranks
of one class have the same mark and, for each kind of group, groups with members of the same classes. In
a stable partition all clocks of a class are equal at all times: an operation starts at the latest of what it
waits for, and what it waits for are the clocks of the same classes. ``refined`` finds the coarsest one,
by splitting classes until nothing splits (colour refinement; Paige and Tarjan 1987, SIAM J. Comput. 16(6)).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence

import numpy as np
from attrs import field, frozen

from picotron.planner.topology import AXES, EXPERT_AXES, Topology, degrees, groups

Groups = Sequence[tuple[int, ...]]


@frozen(kw_only=True)
class RankClasses:
    """A stable partition of a world.

    ``of_rank``: the class of each rank, numbered in the order of their least ranks. ``groups``: the groups
    that the ranks meet in, by name. ``ranks``: the least rank of each class, which stands for it.
    """

    of_rank: tuple[int, ...] = field(repr=False)
    groups: Mapping[str, Groups] = field(repr=False)
    ranks: tuple[int, ...] = field(init=False)

    @ranks.default
    def _ranks(self) -> tuple[int, ...]:
        found: dict[int, int] = {}
        for rank, number in enumerate(self.of_rank):
            found.setdefault(number, rank)
        return tuple(found.values())

    @property
    def sizes(self) -> tuple[int, ...]:
        """Ranks in each class."""
        return tuple(np.bincount(self.of_rank).tolist())


def rank_classes(topology: Topology, names: Iterable[str], marks: Sequence[Hashable]) -> RankClasses:
    """The coarsest classes of a world whose ranks have ``marks`` and meet in the groups called ``names``.

    >>> classes = rank_classes(Topology(dp=3, tp=2), ["dp", "tp"], ["slow", *[""] * 5])
    >>> classes.of_rank  # rank 0, its neighbour in tp, its neighbours in dp, all others
    (0, 1, 2, 3, 2, 3)
    """
    found = {name: groups(topology, name) for name in dict.fromkeys(names)}
    telling = [kind for kind in found.values() if len(kind[0]) < topology.world_size]
    return RankClasses(of_rank=refined(marks, telling), groups=found)


def refined(marks: Sequence[Hashable], groupings: Iterable[Groups]) -> tuple[int, ...]:
    """The coarsest stable partition of ranks with ``marks``, as the class of each rank."""
    kinds = list(groupings)
    found, before = _numbered(marks), -1
    while before != len(set(found)):
        before = len(set(found))
        for kind in kinds:
            around: list[Hashable] = [None] * len(found)
            for group in kind:
                classes = frozenset([found[rank] for rank in group])
                for rank in group:
                    around[rank] = classes
            found = _numbered(list(zip(found, around, strict=True)))
    return tuple(found)


def _numbered(values: Sequence[Hashable]) -> list[int]:
    """Equal values as equal numbers, counted from 0 in order of appearance."""
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(value, len(numbers)) for value in values]


def meetings(classes: RankClasses, name: str) -> Iterator[tuple[tuple[int, ...], list[int]]]:
    """Each group of ``name`` in which classes have their least rank, and those classes."""
    least = dict(zip(classes.ranks, range(len(classes.ranks)), strict=True))
    for group in classes.groups[name]:
        found = [least[rank] for rank in group if rank in least]
        if found:
            yield group, found


def axis_indices(topology: Topology) -> dict[str, tuple[int, ...]]:
    """The index of every rank along each axis, those of the experts' cut included."""
    cells = np.arange(topology.world_size)
    found = dict(zip(topology.order, np.unravel_index(cells, degrees(topology)), strict=True))
    position = np.zeros_like(cells)
    for axis in topology.order:
        if axis != "pp":
            position = position * getattr(topology, axis) + found[axis]
    cut = topology.edp, topology.ep, topology.etp
    found |= dict(zip(EXPERT_AXES, np.unravel_index(position, cut), strict=True))
    return {axis: tuple(found[axis].tolist()) for axis in (*AXES, *EXPERT_AXES)}
