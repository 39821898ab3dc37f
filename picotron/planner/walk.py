"""Every candidate of a space evaluated, or cut by a proven bound.

The tree of ``space`` is walked from its root, and each level cuts what ``bounds`` proves to be of no use:
what cannot fit, and what is neither among the fastest that are kept nor on the Pareto front of time against
memory. What a bound is compared with are candidates already found; a first look at the most promising
bodies finds some. The order of the walk never changes the result, only the number that is evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from attrs import define, field

from picotron.planner.bounds import along, body_seconds, schedule_seconds, sharded_seconds, standing_bytes
from picotron.planner.constraints import Rows
from picotron.planner.kept import Kept, Wanted
from picotron.planner.misfit import refusal
from picotron.planner.priced import Prices
from picotron.planner.search_result import Counts
from picotron.planner.space import (
    CHOICES,
    Shardings,
    Space,
    cells,
    length,
    memory_modes,
    schedulable,
    schedule_table,
    shardings,
    taken,
    with_bodies,
)

BLOCK_ROWS = 100_000  # of columns made at once
PROBED_BODIES = 96  # the most promising, looked at first
PROBED_LEAVES = 384

Progress = Callable[[str], None]


@define(kw_only=True)
class _Tally:
    candidates: int = 0
    evaluated: int = 0
    cut_by_memory: int = 0
    cut_by_time: int = 0
    fit: int = 0


def covered(
    space: Space,
    priced: Prices,
    wanted: Wanted,
    *,
    bounded: bool = True,
    progress: Progress | None = None,
) -> tuple[Kept, Counts]:
    """Every candidate evaluated or cut. ``bounded=False`` evaluates them all: the oracle of the tests."""
    roots, refused = cells(space)
    if not length(roots):
        raise refusal(space)
    walk = _Walk(space=space, priced=priced, kept=Kept(wanted=wanted), bounded=bounded, tell=progress)
    walk.run(roots)
    if not walk.tally.candidates:
        raise refusal(space)
    return walk.kept, Counts(
        candidates=walk.tally.candidates,
        evaluated=walk.tally.evaluated,
        cut_by_memory=walk.tally.cut_by_memory,
        cut_by_time=walk.tally.cut_by_time,
        fit=walk.tally.fit,
        refused=dict(refused),
    )


@define(kw_only=True, eq=False)
class _Leaves:
    """Groups of candidates that differ in recomputation and offload alone: indices of body, schedule, way."""

    body: np.ndarray
    schedule: np.ndarray
    way: np.ndarray
    seconds: np.ndarray  # a bound on each

    def __len__(self) -> int:
        return len(self.body)

    def taken(self, which: np.ndarray) -> _Leaves:
        return _Leaves(
            body=self.body[which],
            schedule=self.schedule[which],
            way=self.way[which],
            seconds=self.seconds[which],
        )


@define(kw_only=True, eq=False)
class _Walk:
    """One pass over the tree of a space."""

    space: Space
    priced: Prices
    kept: Kept
    bounded: bool
    tell: Progress | None
    tally: _Tally = field(factory=_Tally)
    modes: np.ndarray = field(init=False)
    tables: dict[int, Rows] = field(init=False, factory=dict)
    bodies: Rows = field(init=False)
    alike: np.ndarray = field(init=False)  # bodies that differ in the order of axes alone have one number
    ways: Shardings = field(init=False)
    standing: np.ndarray = field(init=False)  # [body, way], infinite where there is no such way
    floor: np.ndarray = field(init=False)  # seconds, [body, way]
    told: int = field(init=False, default=0)

    def run(self, roots: Rows) -> None:
        """Cover everything under the cells."""
        self.modes = np.array(memory_modes(self.space)).reshape(-1, 3)
        roots = roots | {"cell": np.arange(length(roots))}
        self.bodies = with_bodies(self.space, roots)
        self._state_bytes(roots)
        self.tables = {int(pp): schedule_table(self.space, int(pp)) for pp in np.unique(self.bodies["pp"])}
        under = self._schedules_under()
        counted = under[:, None] * self.ways.valid * len(self.modes)
        self.tally.candidates = int(counted.sum())
        fits = self.standing <= self.kept.wanted.limit_bytes
        if not self.bounded:
            fits = self.ways.valid
        self.tally.cut_by_memory += int(counted[self.ways.valid & ~fits].sum())
        left = np.flatnonzero(fits.any(axis=1) & (under > 0))
        self.floor = np.full(fits.shape, np.inf)
        for part in _parts(left, BLOCK_ROWS // 8):
            some = Shardings(zero_stage=self.ways.zero_stage, shard=self.ways.shard[part], valid=fits[part])
            found = body_seconds(self.priced, taken(self.bodies, part), some)
            self.floor[part] = np.where(fits[part], found, np.inf)
        if self.bounded:
            self._probe(left, fits)
            matters = fits & self.kept.may_matter(self.floor, self.standing)
            self.tally.cut_by_time += int(counted[fits & ~matters].sum())
            fits = matters
        leaves = list(self._under(np.flatnonzero(fits.any(axis=1)), fits, self.tally))
        if leaves:
            self._finish(_joined(leaves), self.tally)

    def _state_bytes(self, roots: Rows) -> None:
        """The bound on bytes of every body's cell, and the ways to shard."""
        ways = shardings(self.space, roots)
        found = np.full(ways.valid.shape, np.inf)
        size = max(1, BLOCK_ROWS // (4 * len(ways.zero_stage)))
        for part in _parts(np.arange(length(roots)), size):
            some = Shardings(zero_stage=ways.zero_stage, shard=ways.shard[part], valid=ways.valid[part])
            found[part] = standing_bytes(self.priced, taken(roots, part), some)
        cell = self.bodies.pop("cell")
        self.alike = 2 * cell + self.bodies["sequence_parallel"]
        self.standing = np.where(ways.valid, found, np.inf)[cell]
        self.ways = Shardings(zero_stage=ways.zero_stage, shard=ways.shard[cell], valid=ways.valid[cell])

    def _schedules_under(self) -> np.ndarray:
        """How many schedules each body can take."""
        found = np.zeros(length(self.bodies), dtype=np.int64)
        for pp, table in self.tables.items():
            own = np.flatnonzero(self.bodies["pp"] == pp)
            batch = (self.bodies["dp"] * self.bodies["micro_batch"])[own]
            _, first, which = np.unique(batch, return_index=True, return_inverse=True)
            alike = schedulable(self.space, taken(self.bodies, own[first]), table)
            found[own] = alike.sum(axis=1)[which]
        return found

    def _probe(self, left: np.ndarray, fits: np.ndarray) -> None:
        """Look at the most promising bodies of each pipeline depth, to have something to cut by."""
        best, least = [], self.floor.min(axis=1)
        for pp in self.tables:
            own = left[self.bodies["pp"][left] == pp]
            best.append(own[np.argsort(least[own], kind="stable")[: PROBED_BODIES // 2]])
        ordered = left[np.argsort(least[left], kind="stable")[:PROBED_BODIES]]
        chosen = np.unique(np.concatenate([*best, ordered])) if best else ordered
        leaves = list(self._under(chosen, fits, None))
        if not leaves:
            return
        found = _joined(leaves)
        size = self.standing[found.body, found.way]
        picked: list[np.ndarray] = []
        for way in range(len(self.ways.zero_stage)):
            own = np.flatnonzero(found.way == way)
            picked.append(own[np.argsort(found.seconds[own], kind="stable")[: PROBED_LEAVES // 4]])
        by_size = np.argsort(size, kind="stable")
        for some in np.array_split(by_size, 8):
            picked.append(some[np.argsort(found.seconds[some], kind="stable")[: PROBED_LEAVES // 8]])
        self._finish(found.taken(np.unique(np.concatenate(picked))), None)

    def _under(self, chosen: np.ndarray, fits: np.ndarray, tally: _Tally | None) -> Iterator[_Leaves]:
        """The leaves under some bodies that may matter."""
        for pp, table in self.tables.items():
            own = chosen[self.bodies["pp"][chosen] == pp]
            for part in _parts(own, max(1, BLOCK_ROWS // max(1, length(table)))):
                yield self._leaves(part, table, fits[part], tally)

    def _leaves(self, part: np.ndarray, table: Rows, fits: np.ndarray, tally: _Tally | None) -> _Leaves:
        """The leaves of a block of bodies with one number of pipeline ranks."""
        bodies = taken(self.bodies, part)
        can = schedulable(self.space, bodies, table)
        step, pipeline = schedule_seconds(self.priced, bodies, table)
        seconds = np.maximum(step[:, :, None], self.floor[part][:, None, :] + pipeline[:, :, None])
        size = np.where(fits, self.standing[part], np.inf)
        live = can[:, :, None] & fits[:, None, :]
        every = int(live.sum())
        if self.bounded:
            live &= self.kept.may_matter(seconds, size[:, None, :])
        if tally is not None:
            tally.cut_by_time += (every - int(live.sum())) * len(self.modes)
            self._say(tally)
        body, schedule, way = np.nonzero(live)
        return _Leaves(body=part[body], schedule=schedule, way=way, seconds=seconds[body, schedule, way])

    def _rows(self, leaves: _Leaves) -> Rows:
        """Every choice of some leaves but recomputation and offload."""
        rows = taken(self.bodies, leaves.body)
        for name in ("schedule", "virtual_stages", "ends"):
            column = np.zeros(len(leaves), dtype=np.int64)
            for pp, table in self.tables.items():
                own = rows["pp"] == pp
                column[own] = table[name][leaves.schedule[own]]
            rows[name] = column
        rows["zero_stage"] = self.ways.zero_stage[leaves.way]
        rows["shard"] = self.ways.shard[leaves.body, leaves.way]
        return rows

    def _finish(self, leaves: _Leaves, tally: _Tally | None) -> None:
        """Bound each leaf by itself, then evaluate what is left, the most promising first."""
        if self.bounded:
            leaves = self._bounded(leaves, tally)
            leaves = leaves.taken(np.argsort(leaves.seconds, kind="stable"))
        done, size = 0, 256 if self.bounded else BLOCK_ROWS // len(self.modes)
        while done < len(leaves):
            some = leaves.taken(np.arange(done, min(done + size, len(leaves))))
            done += size
            size = min(4 * size, max(1, BLOCK_ROWS // len(self.modes)))
            if self.bounded:
                matters = self.kept.may_matter(some.seconds, self.standing[some.body, some.way])
                if tally is not None:
                    tally.cut_by_time += int(np.count_nonzero(~matters)) * len(self.modes)
                some = some.taken(np.flatnonzero(matters))
            if len(some):
                self._evaluate(some, tally)

    def _bounded(self, leaves: _Leaves, tally: _Tally | None) -> _Leaves:
        """The leaves that may still matter when each is estimated without recomputation and offload."""
        found = []
        order = np.argsort(leaves.seconds, kind="stable")
        for part in _parts(order, BLOCK_ROWS // 8):
            some = leaves.taken(part)
            some.seconds = sharded_seconds(self.priced, self._rows(some))
            matters = self.kept.may_matter(some.seconds, self.standing[some.body, some.way])
            if tally is not None:
                tally.cut_by_time += int(np.count_nonzero(~matters)) * len(self.modes)
                self._say(tally)
            found.append(some.taken(np.flatnonzero(matters)))
        return _joined(found) if found else leaves

    def _evaluate(self, leaves: _Leaves, tally: _Tally | None) -> None:
        """Price every recomputation and offload of some leaves, bytes first, and keep what is good."""
        limit = self.kept.wanted.limit_bytes
        size = self._bytes(leaves)
        if self.bounded:
            useful = self.kept.may_matter(leaves.seconds[:, None], size).any(axis=1)
            if tally is not None:
                beyond = int(np.count_nonzero(size[~useful] > limit))
                tally.cut_by_memory += beyond
                tally.cut_by_time += size[~useful].size - beyond
            leaves, size = leaves.taken(np.flatnonzero(useful)), size[useful]
        if not len(leaves):
            return
        grid, shape = self._grid(leaves)
        seconds = np.broadcast_to(self.priced.seconds(grid).step_seconds, shape).ravel()
        size = size.ravel()
        which = np.flatnonzero((size <= limit) & self.kept.may_matter(seconds, size))
        every = {name: np.broadcast_to(grid[name], shape).ravel()[which] for name in CHOICES}
        self.kept.add(every, seconds[which], size[which])
        if tally is not None:
            tally.evaluated += len(seconds)
            tally.fit += int(np.count_nonzero(size <= limit))
            self._say(tally)

    def _bytes(self, leaves: _Leaves) -> np.ndarray:
        """Bytes of the fullest device, [leaf, mode]; the order of axes has no part in them."""
        key = np.stack([self.alike[leaves.body], leaves.schedule, leaves.way])
        sizes = key.max(axis=1, initial=0) + 1
        _, first, which = np.unique(np.ravel_multi_index(key, sizes), return_index=True, return_inverse=True)
        grid, shape = self._grid(leaves.taken(first))
        found: np.ndarray = np.broadcast_to(self.priced.memory(grid).reserved_bytes, shape)[0][which]
        return found

    def _grid(self, leaves: _Leaves) -> tuple[Rows, tuple[int, ...]]:
        """Every recomputation and offload of some leaves: columns of shape (1, leaf, mode)."""
        modes = {
            name: self.modes[None, None, :, column]
            for column, name in enumerate(("recompute", "recompute_layers", "offload"))
        }
        return along(self._rows(leaves), 1, 3) | modes, (1, len(leaves), len(self.modes))

    def _say(self, tally: _Tally) -> None:
        """Tell how far the walk is, each time that another tenth is covered."""
        done = tally.evaluated + tally.cut_by_memory + tally.cut_by_time
        tenth = 10 * done // max(1, tally.candidates)
        if self.tell is not None and tenth > self.told:
            self.told = tenth
            self.tell(f"{done:,} of {tally.candidates:,} candidates covered")


def _parts(indices: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(indices), max(1, size)):
        yield indices[start : start + max(1, size)]


def _joined(leaves: list[_Leaves]) -> _Leaves:
    return _Leaves(
        body=np.concatenate([one.body for one in leaves]),
        schedule=np.concatenate([one.schedule for one in leaves]),
        way=np.concatenate([one.way for one in leaves]),
        seconds=np.concatenate([one.seconds for one in leaves]),
    )
