"""Every candidate of a space evaluated, or cut by a proven bound.

The tree of ``space`` is walked from its root, and each level cuts what ``bounds`` proves to be of no use:
what cannot fit, and what is neither among the fastest that are kept nor on the Pareto front of time against
memory. What a bound is compared with are candidates already found; a first look at the most promising
bodies finds some. The order of the walk never changes the result, only the number that is evaluated.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from attrs import define, field

from picotron.planner.bounds import along, body_seconds, schedule_seconds, sharded_seconds, standing_bytes
from picotron.planner.constraints import Rows
from picotron.planner.kept import Kept, Wanted
from picotron.planner.misfit import refusal
from picotron.planner.priced import Prices
from picotron.planner.search_result import Counts, Progress
from picotron.planner.space import (
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
FEW_LEAVES = 10_000  # are bounded sooner than promising ones are found
SCHEDULED_CELLS = 6_000  # those of least bounds, of which the most promising are found
PROBED_CELLS = 64  # the most promising, looked at first
PROBED_SIZES = 10  # parts of the front, and cells looked at of each


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
    seconds: np.ndarray  # bounds on each
    bytes: np.ndarray

    def __len__(self) -> int:
        return len(self.body)

    def taken(self, which: np.ndarray) -> _Leaves:
        return _Leaves(
            body=self.body[which],
            schedule=self.schedule[which],
            way=self.way[which],
            seconds=self.seconds[which],
            bytes=self.bytes[which],
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
    cell: np.ndarray = field(init=False)  # of each body
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
            if self.tally.candidates > FEW_LEAVES * len(self.modes):
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
        self.cell, self.alike = cell, 2 * cell + self.bodies["sequence_parallel"]
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
        """Look at promising cells, to have something to cut by.

        First at those that promise to be fastest, until as many as are to be kept have a plan that fits; then
        along the front, at those that do of the smallest, of the next smallest, and so on.
        """
        bodies, seconds = self._scheduled(left)
        wanted = self.kept.wanted
        for part in _parts(bodies, max(PROBED_CELLS, 2 * wanted.keep)):
            self._look(part, fits)
            if len(self.kept.fastest()) == wanted.keep:
                break
        near = bodies[seconds <= self.kept.horizon]
        smallest = near[np.argsort(self.standing[near].min(axis=1), kind="stable")]
        rank = np.empty(len(self.standing))
        rank[bodies] = np.arange(len(bodies))
        some = [
            part[np.argsort(rank[part])[:PROBED_SIZES]] for part in np.array_split(smallest, PROBED_SIZES)
        ]
        self._look(np.concatenate(some), fits)

    def _scheduled(self, left: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of the cells of least bounds the bodies that have them and what they promise, the fastest first.

        It is scheduled with as many stages a rank as can be.
        """
        least = self.floor[left].min(axis=1)
        order = np.lexsort((least, self.cell[left]))
        first = order[np.diff(self.cell[left][order], prepend=-1) != 0]
        first = first[np.argsort(least[first], kind="stable")[:SCHEDULED_CELLS]]
        bodies, least = left[first], least[first]
        seconds = np.full(len(bodies), np.inf)
        for pp, table in self.tables.items():
            own = np.flatnonzero(self.bodies["pp"][bodies] == pp)
            if not (len(own) and length(table)):
                continue
            last = np.diff(table["schedule"], append=-1) != 0
            step, pipeline = schedule_seconds(
                self.priced, taken(self.bodies, bodies[own]), taken(table, last)
            )
            seconds[own] = np.maximum(step, least[own, None] + pipeline).min(axis=1)
        order = np.argsort(seconds, kind="stable")
        return bodies[order], seconds[order]

    def _look(self, bodies: np.ndarray, fits: np.ndarray) -> None:
        """Evaluate the most promising leaf of each body and way to shard."""
        leaves = list(self._under(np.sort(bodies), fits, None))
        if leaves:
            self._finish(self._promising(_joined(leaves)), None)

    def _promising(self, leaves: _Leaves) -> _Leaves:
        """Of each body the most promising leaf of each way to shard."""
        ways = len(self.ways.zero_stage)
        order = np.argsort(leaves.seconds, kind="stable")
        _, first = np.unique((leaves.body * ways + leaves.way)[order], return_index=True)
        return leaves.taken(order[first])

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
        return _Leaves(
            body=part[body],
            schedule=schedule,
            way=way,
            seconds=seconds[body, schedule, way],
            bytes=size[body, way],
        )

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
            leaves = self._timed(self._sized(leaves, tally), tally)
            leaves = leaves.taken(np.argsort(leaves.seconds, kind="stable"))
        done, size = 0, 256 if self.bounded else BLOCK_ROWS // len(self.modes)
        while done < len(leaves):
            some = leaves.taken(np.arange(done, min(done + size, len(leaves))))
            done += size
            size = min(4 * size, max(1, BLOCK_ROWS // len(self.modes)))
            if self.bounded:
                some = self._mattering(some, tally)
            if len(some):
                self._evaluate(some, tally)

    def _mattering(self, leaves: _Leaves, tally: _Tally | None) -> _Leaves:
        """The leaves that may be kept, as far as their bounds tell."""
        matters = self.kept.may_matter(leaves.seconds, leaves.bytes)
        if tally is not None:
            self._cut(np.repeat(leaves.bytes[~matters], len(self.modes)), tally)
            self._say(tally)
        return leaves.taken(np.flatnonzero(matters))

    def _sized(self, leaves: _Leaves, tally: _Tally | None) -> _Leaves:
        """The leaves that may still matter by the least bytes of their recomputations.

        Those with the most offload stand for the others, which hold no less (``bounds``).
        """
        least = self.modes[self.modes[:, 2] == self.modes[:, 2].max()]
        found = []
        for part in _parts(np.arange(len(leaves)), BLOCK_ROWS // len(least)):
            some = leaves.taken(part)
            some.bytes = self._bytes(some, least).min(axis=1)
            found.append(self._mattering(some, tally))
        return _joined(found) if found else leaves

    def _timed(self, leaves: _Leaves, tally: _Tally | None) -> _Leaves:
        """The leaves that may still matter when each is estimated without recomputation and offload."""
        found = []
        order = np.argsort(leaves.seconds, kind="stable")
        for part in _parts(order, BLOCK_ROWS // 8):
            some = leaves.taken(part)
            some.seconds = sharded_seconds(self.priced, self._rows(some))
            found.append(self._mattering(some, tally))
        return _joined(found) if found else leaves

    def _evaluate(self, leaves: _Leaves, tally: _Tally | None) -> None:
        """Price the recomputations and offloads of some leaves, bytes first, and keep what is good.

        The steps with the least offload are bounds for the others (``bounds``).
        """
        limit = self.kept.wanted.limit_bytes
        size = self._bytes(leaves, self.modes)
        if self.bounded:
            useful = self.kept.may_matter(leaves.seconds[:, None], size).any(axis=1)
            if tally is not None:
                self._cut(size[~useful], tally)
            leaves, size = leaves.taken(np.flatnonzero(useful)), size[useful]
        if not len(leaves):
            return
        plain = self.modes[:, 2] == self.modes[:, 2].min()
        seconds = np.full(size.shape, np.inf)
        grid, shape = self._grid(leaves, self.modes[plain])
        seconds[:, plain] = np.broadcast_to(self.priced.seconds(grid).step_seconds, shape)[0]
        least = np.repeat(seconds[:, plain], len(self.modes) // plain.sum(), axis=1)  # offloads lie together
        matters = self.kept.may_matter(least, size) if self.bounded else np.ones(size.shape, dtype=bool)
        leaf, mode = np.nonzero(matters & ~plain)
        if len(leaf):
            rows = self._rows(leaves.taken(leaf)) | _with_modes(self.modes[mode])
            seconds[leaf, mode] = self.priced.seconds(along(rows, 1, 2)).step_seconds[0]
        leaf, mode = np.nonzero((size <= limit) & self.kept.may_matter(seconds, size))
        rows = self._rows(leaves.taken(leaf)) | _with_modes(self.modes[mode])
        self.kept.add(rows, seconds[leaf, mode], size[leaf, mode])
        if tally is not None:
            priced = seconds < np.inf
            tally.evaluated += int(np.count_nonzero(priced))
            tally.fit += int(np.count_nonzero(priced & (size <= limit)))
            self._cut(size[~priced], tally)
            self._say(tally)

    def _cut(self, size: np.ndarray, tally: _Tally) -> None:
        """Count candidates of known bytes as cut: by memory if these are too many, else by time."""
        beyond = int(np.count_nonzero(size > self.kept.wanted.limit_bytes))
        tally.cut_by_memory += beyond
        tally.cut_by_time += size.size - beyond

    def _bytes(self, leaves: _Leaves, modes: np.ndarray) -> np.ndarray:
        """Bytes of the fullest device, [leaf, mode]; the order of axes has no part in them."""
        key = np.stack([self.alike[leaves.body], leaves.schedule, leaves.way])
        sizes = key.max(axis=1, initial=0) + 1
        _, first, which = np.unique(np.ravel_multi_index(key, sizes), return_index=True, return_inverse=True)
        grid, shape = self._grid(leaves.taken(first), modes)
        found: np.ndarray = np.broadcast_to(self.priced.memory(grid).reserved_bytes, shape)[0][which]
        return found

    def _grid(self, leaves: _Leaves, modes: np.ndarray) -> tuple[Rows, tuple[int, ...]]:
        """Some leaves with each of some recomputations and offloads: columns of shape (1, leaf, mode)."""
        rows = along(self._rows(leaves), 1, 3) | along(_with_modes(modes), 2, 3)
        return rows, (1, len(leaves), len(modes))

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


def _with_modes(modes: np.ndarray) -> Rows:
    """Columns of some recomputations and offloads."""
    return dict(zip(("recompute", "recompute_layers", "offload"), modes.T, strict=True))


def _joined(leaves: list[_Leaves]) -> _Leaves:
    return _Leaves(
        body=np.concatenate([one.body for one in leaves]),
        schedule=np.concatenate([one.schedule for one in leaves]),
        way=np.concatenate([one.way for one in leaves]),
        seconds=np.concatenate([one.seconds for one in leaves]),
        bytes=np.concatenate([one.bytes for one in leaves]),
    )
