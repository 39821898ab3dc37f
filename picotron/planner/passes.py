"""Passes over lowered programs: sharded parameters, recomputing, offloading, batches; fusing in a schedule.

Each takes a value and returns another one; rows that are there keep their order. A *cell* is what a rank
computes at a time: a computing row, or the two of an overlapped pair, with the waits and the recomputing just
before it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from attrs import evolve, frozen

from picotron.errors import PlanError
from picotron.planner.actions import B, I, Orders, W
from picotron.planner.deadlock import unbatched
from picotron.planner.pipeline import Schedule
from picotron.planner.program import (
    COMPUTE,
    RECEIVES,
    SENDS,
    Kind,
    Program,
    Row,
    check_bytes,
    inserted,
    with_rows,
)
from picotron.planner.schedule_times import PipelineCosts, needed, schedule_times, unit_costs
from picotron.planner.validators import is_integer, shown
from picotron.planner.validity import rank_column

BACKWARDS = (Kind.BACKWARD, Kind.BACKWARD_INPUT)


@frozen
class Cells:
    """The cells of a program, numbered through over all ranks; rows by index of the columns.

    ``rows``: the computing rows, ``of``: the cell of each. By cell: ``opens`` is the first row of the waits
    and the recomputing before it, ``closes`` the row after it, ``rank`` its rank.
    """

    rows: np.ndarray
    of: np.ndarray
    opens: np.ndarray
    closes: np.ndarray
    rank: np.ndarray

    def is_first(self, cell: np.ndarray) -> np.ndarray:
        """Which of these cells are the first of their rank."""
        return np.asarray((cell == 0) | (self.rank[cell] != self.rank[cell - 1]))

    def is_last(self, cell: np.ndarray) -> np.ndarray:
        """Which of these cells are the last of their rank."""
        return self.is_first((cell + 1) % len(self.rank))


def cells(program: Program) -> Cells:
    """The cells of ``program``."""
    rows = np.flatnonzero(program.is_kind(*COMPUTE))
    begins = np.ones(len(rows), dtype=np.bool_)
    batch, rank = program.batch[rows], program.rank[rows]
    begins[1:] = (batch[1:] < 0) | (batch[1:] != batch[:-1]) | (rank[1:] != rank[:-1])
    first = np.flatnonzero(begins)
    opens = rows[first]
    target = np.where(program.target >= 0, program.target + program.first_row, 0)
    belongs = program.is_kind(Kind.WAIT) & program.is_kind(*RECEIVES)[target]
    belongs |= program.is_kind(Kind.RECOMPUTE)
    while True:
        moved = np.flatnonzero((opens > 0) & belongs[opens - 1])
        if not len(moved):
            break
        opens[moved] -= 1
    closes = rows[np.append(first[1:], len(rows)) - 1] + 1
    return Cells(rows, np.cumsum(begins) - 1, opens, closes, rank[first])


def with_recomputing(program: Program, stages: Collection[int]) -> Program:
    """Each B or I of these stages with one more forward before it, while its gradient is under way.

    Raises PlanError for a stage that the program does not have.
    """
    known = set(program.stage[program.is_kind(*COMPUTE)].tolist())
    if not known.issuperset(stages):
        raise PlanError(f"stages must be among those of the program, {sorted(known)}, got {shown(stages)}")
    own = cells(program)
    chosen = np.flatnonzero(
        program.is_kind(*BACKWARDS)[own.rows] & np.isin(program.stage[own.rows], list(stages))
    )
    row = own.rows[chosen]
    return inserted(
        program,
        program.rank[row],
        own.opens[own.of[chosen]],
        kind=np.full(len(row), Kind.RECOMPUTE),
        stage=program.stage[row],
        microbatch=program.microbatch[row],
    )


def with_offloading(program: Program, stage_bytes: Sequence[int], *, least_idle: int = 2) -> Program:
    """What each F saves is copied to the host and back where no less than ``least_idle`` cells come between.

    The copy is waited for, and its memory freed, after the cell after the F; the one back is posted before
    the cell before the B or I, and waited for before that. ``stage_bytes``: what one microbatch saves.
    """
    if not is_integer(least_idle) or least_idle < 2:
        raise PlanError(
            f"least_idle must be at least 2, so that both copies have time, got {shown(least_idle)}"
        )
    sizes = _sizes(stage_bytes, program)
    own = cells(program)
    forward, backward = _matched(program, own)
    idle = own.of[backward] - own.of[forward] - 1 >= least_idle
    away, home = own.of[forward[idle]], own.of[backward[idle]]
    row = own.rows[forward[idle]]
    size, many = sizes[program.stage[row]], len(row)
    before = np.concatenate([own.closes[away], own.closes[away + 1], own.opens[home - 1], own.opens[home]])
    none, posted = np.full(many, -1), program.num_rows + np.arange(many)
    return inserted(
        program,
        np.tile(program.rank[row], 4),
        before,
        kind=np.repeat([Kind.OFFLOAD, Kind.WAIT, Kind.RELOAD, Kind.WAIT], many),
        stage=np.tile(program.stage[row], 4),
        microbatch=np.tile(program.microbatch[row], 4),
        bytes=np.concatenate([size, 0 * size, size, 0 * size]),
        target=np.concatenate([none, posted, none, posted + 2 * many]),
    )


def with_streams(
    program: Program,
    kind: Kind,
    beside: Collection[Kind],
    stage_bytes: Sequence[int],
    *,
    group: str | None = None,
) -> Program:
    """A row of ``kind`` beside each row of the kinds ``beside``, standing for its layers one after the other.

    It is posted before its cell, and waited for before the next cell or at the rank's end: the two take as
    long as the longer one. ``stage_bytes``: what one row moves; a stage of 0 bytes has none. ``group``: over
    which a collective runs. Gathered parameters are freed (RESHARD) once they have been waited for.
    """
    sizes = _sizes(stage_bytes, program)
    own = cells(program)
    chosen = np.flatnonzero(program.is_kind(*beside)[own.rows] & (sizes[program.stage[own.rows]] > 0))
    row, cell, many = own.rows[chosen], own.of[chosen], len(chosen)
    stops = np.array(program.offsets)[program.rank[row] + 1]
    following = own.opens[(cell + 1) % len(own.opens)] if many else stops
    after = np.where(own.is_last(cell), stops, following) if many else stops
    groups = program.groups if group is None or group in program.groups else (*program.groups, group)
    ends = [Kind.WAIT, Kind.RESHARD] if kind is Kind.UNSHARD else [Kind.WAIT]
    times = len(ends) + 1
    posted = program.num_rows + len(ends) * many + np.arange(many)
    none, nowhere = np.full(many, -1), np.full((len(ends) - 1) * many, -1)
    columns = {
        "kind": np.repeat([*ends, kind], many),
        "stage": np.tile(program.stage[row], times),
        "bytes": np.concatenate([np.zeros(len(ends) * many, dtype=np.int64), sizes[program.stage[row]]]),
        "target": np.concatenate([posted, nowhere, none]),
    }
    if group is None:
        columns["microbatch"] = np.tile(program.microbatch[row], times)
    else:
        columns["group"] = np.repeat([-1] * len(ends) + [groups.index(group)], many)
    before = np.concatenate([np.tile(after, len(ends)), own.opens[cell]])
    return inserted(program, np.tile(program.rank[row], times), before, groups, **columns)


def _sizes(stage_bytes: Sequence[int], program: Program) -> np.ndarray:
    """Bytes by stage. Raises PlanError unless every stage has a whole number of at least 0."""
    needed = int(program.stage.max(initial=-1)) + 1
    if len(stage_bytes) < needed or not all(is_integer(size) and size >= 0 for size in stage_bytes):
        raise PlanError(
            f"stage_bytes must be whole numbers of at least 0 for each of {needed} stages, "
            f"got {shown(list(stage_bytes))}"
        )
    for size in stage_bytes:
        check_bytes(size)
    return np.asarray(stage_bytes, dtype=np.int64)


def _matched(program: Program, own: Cells) -> tuple[np.ndarray, np.ndarray]:
    """Forwards and the B or I of each, as indices of ``own.rows``."""
    kind, stage, microbatch = (
        column[own.rows] for column in (program.kind, program.stage, program.microbatch)
    )
    forward = np.flatnonzero(kind == Kind.FORWARD)
    backward = np.flatnonzero(np.isin(kind, BACKWARDS))
    key = stage.astype(np.int64) * (int(microbatch.max(initial=0)) + 1) + microbatch
    forward, backward = forward[np.argsort(key[forward])], backward[np.argsort(key[backward])]
    if not np.array_equal(key[forward], key[backward]):
        raise PlanError("every forward of a program must have one backward")
    return forward, backward


def with_batches(program: Program) -> Program:
    """Neighbouring sends and receives posted together, wherever all of a batch can end before it is needed.

    A WAIT for one of them waits for the batch. Batches with which ranks would wait for each other in a circle
    under the batched semantics are taken apart again.
    """
    posts = program.is_kind(*SENDS, *RECEIVES)
    joins = np.zeros(program.num_rows, dtype=np.bool_)
    joins[1:] = posts[1:] & posts[:-1] & (program.rank[1:] == program.rank[:-1])
    run = np.cumsum(posts & ~joins) + int(program.batch.max(initial=-1))
    several = np.isin(run, run[joins]) & posts
    return unbatched(evolve(program, batch=np.where(several, run, program.batch)))


def fuse_backward(schedule: Schedule, costs: PipelineCosts | None = None) -> Schedule:
    """The schedule with each I that its own W directly follows made one B, where nobody starts later by it.

    What the stage before needs of the I then comes only after the W. Exact at ``costs`` (all equal if left
    out): all that was early enough before still is, so that no action moves.
    """
    orders = schedule.orders
    costs = costs or unit_costs(schedule.num_stages)
    spans, rank = schedule_times(schedule, costs), rank_column(orders)
    here = np.arange(orders.num_actions - 1)
    fits = (orders.phase[:-1] == I) & (orders.phase[1:] == W) & (rank[:-1] == rank[1:])
    fits &= (orders.stage[:-1] == orders.stage[1:]) & (orders.microbatch[:-1] == orders.microbatch[1:])
    fits &= ~orders.joined[:-1] & ~np.concatenate([[False], orders.joined[:-2]])
    need = needed(schedule)
    takes = np.flatnonzero(need >= 0)
    takes = takes[np.isin(need[takes], here[fits])]
    late = np.where(rank[need[takes]] == rank[takes], 0.0, costs.transfer_seconds)
    harmed = need[takes][spans.end[need[takes] + 1] + late > spans.start[takes]]
    fused = np.setdiff1d(here[fits], harmed)
    phase = orders.phase.copy()
    phase[fused] = B
    kept = np.ones(orders.num_actions, dtype=np.bool_)
    kept[fused + 1] = False
    return evolve(
        schedule,
        orders=Orders(
            offsets=tuple(np.append(0, np.cumsum(kept))[list(orders.offsets)].tolist()),
            phase=phase[kept],
            stage=orders.stage[kept],
            microbatch=orders.microbatch[kept],
            joined=orders.joined[kept],
        ),
    )


def with_unsharding(
    program: Program,
    stage_bytes: Sequence[int],
    *,
    group: str = "dp_cp",
    keep: int = 1,
    max_active: int | None = None,
    weights_use: bool = False,
) -> Program:
    """The parameters of a stage gathered before the cells that use them and freed after (ZeRO-3).

    Gathering starts one cell ahead where there is room: at most ``max_active`` stages (all, if left out) are
    gathered at once on a rank, and of those that nobody uses now, the one that is used last makes room. A
    stage is kept where it is used again within the next ``keep`` cells. ``stage_bytes``: payload of one
    gathering.
    ``weights_use``: a W uses parameters too, as in torch. Source: Rajbhandari et al. 2019, ZeRO,
    arXiv:1910.02054. Raises PlanError if a cell uses more stages than ``max_active``.
    """
    if not is_integer(keep) or keep < 1:
        raise PlanError(f"keep must be at least 1, got {shown(keep)}")
    if max_active is not None and (not is_integer(max_active) or max_active < 1):
        raise PlanError(f"max_active must be None or at least 1, got {shown(max_active)}")
    _sizes(stage_bytes, program)
    own = cells(program)
    groups = program.groups if group in program.groups else (*program.groups, group)
    new: list[tuple[int, int, Row]] = []
    first, number = 0, groups.index(group)
    for rank, used in enumerate(_used_stages(program, own, weights_use)):
        posted: dict[int, int] = {}
        for step in _gathering(used, keep, len(stage_bytes) if max_active is None else max_active):
            cell = first + step.cell
            before = int(own.closes[cell] if step.after else own.opens[cell])
            if step.kind is Kind.UNSHARD:
                posted[step.stage] = program.num_rows + len(new)
                row = Row(step.kind, step.stage, group=number, bytes=stage_bytes[step.stage])
            elif step.kind is Kind.WAIT:
                row = Row(step.kind, step.stage, target=posted[step.stage])
            else:
                row = Row(step.kind, step.stage)
            new.append((rank, before, row))
        first += len(used)
    return with_rows(program, new, groups)


class _Step(NamedTuple):
    """A row of a rank's gathering: before a cell, or after it."""

    kind: Kind
    stage: int
    cell: int
    after: bool = False


def _used_stages(program: Program, own: Cells, weights_use: bool) -> list[list[set[int]]]:
    """For each rank, the stages whose parameters each of its cells uses."""
    found: list[list[set[int]]] = [[] for _ in range(program.num_ranks)]
    for rank in own.rank.tolist():
        found[rank].append(set())
    every = [cell for cells_of_rank in found for cell in cells_of_rank]
    uses = np.flatnonzero(weights_use | (program.kind[own.rows] != Kind.BACKWARD_WEIGHT))
    for cell, stage in zip(own.of[uses].tolist(), program.stage[own.rows[uses]].tolist(), strict=True):
        every[cell].add(stage)
    return found


def _gathering(used: Sequence[set[int]], keep: int, max_active: int) -> Iterator[_Step]:
    """What a rank gathers, waits for and frees, in order; ``used``: the stages that each cell uses."""
    ahead: dict[int, list[int]] = {}  # by stage, the cells that use it, the next one last
    for cell in reversed(range(len(used))):
        for stage in used[cell]:
            ahead.setdefault(stage, []).append(cell)
    active: set[int] = set()
    under_way: set[int] = set()
    for cell, now in enumerate(used):
        if len(now) > max_active:
            raise PlanError(
                f"max_active must be at least {len(now)}, the stages of one cell, got {max_active}"
            )
        for stage in now:
            ahead[stage].pop()
        following = used[cell + 1] if cell + 1 < len(used) else set()
        for stage in (*sorted(now - active), *sorted(following - active - now)):
            idle = active - now if stage in now else active - now - following
            if len(active) == max_active and idle:
                last = max(idle, key=lambda other: ahead[other][-1])
                active.remove(last)
                yield _Step(Kind.RESHARD, last, cell)
            if len(active) < max_active:
                active.add(stage)
                under_way.add(stage)
                yield _Step(Kind.UNSHARD, stage, cell)
        for stage in sorted(now & under_way):
            yield _Step(Kind.WAIT, stage, cell)
        under_way -= now
        for stage in sorted(now):
            if not ahead[stage] or ahead[stage][-1] - cell > keep:
                active.remove(stage)
                yield _Step(Kind.RESHARD, stage, cell, after=True)
