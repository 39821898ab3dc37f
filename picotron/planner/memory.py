"""How many bytes are live on a rank at every moment of a step, by category.

What stands all the time (parameters, gradients, optimizer state, constants) plus what the bodies and the
transfers make and free, in the order of the program's rows. Where gradients travel in another format than
they are kept in, a sum holds a copy of what it carries from its post to its wait; where they are kept in
fewer bytes than the optimizer's main weights, the update holds a copy of them all. Bytes are those of
tensors: an allocator's rounding and the framework's own memory are not counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from attrs import cmp_using, define, field, frozen

from picotron.planner.body import CATEGORIES, INDEX_BYTES, Category, segment_memory
from picotron.planner.cost import of_kind
from picotron.planner.plan import TrainingPlan
from picotron.planner.program import COMPUTE, STATISTICS_BYTES, SUMS, Kind, Row, anchored, rows
from picotron.planner.sharding import DATA_GROUPS, GRADIENTS, OPTIMIZER, PARAMETERS
from picotron.planner.topology import Coordinate, coordinate
from picotron.planner.workload import MOMENTS

STEP_COUNTER_BYTES = 4  # Adam's count of steps, in fp32
NORM_SCRATCH_BYTES = 8  # the norm of one range of elements at a time, in fp64

_array: Any = field(eq=cmp_using(eq=np.array_equal), repr=False)


@frozen(kw_only=True)
class MemoryTimeline:
    """Live bytes of one rank, predicted or measured, at the end of every segment and row.

    ``row`` and ``operation`` say where: the row of the rank's program and the segment within it (-1: the row
    itself). ``live_bytes`` stand when it ends; ``peak_bytes`` is the most that stood inside it.
    ``peak_by_category`` splits the highest moment of all.
    """

    rank: int
    row: np.ndarray = _array
    operation: np.ndarray = _array
    live_bytes: np.ndarray = _array
    peak_bytes: np.ndarray = _array
    peak_by_category: tuple[tuple[str, int], ...] = ()

    @property
    def max_bytes(self) -> int:
        """The highest moment of the step."""
        return int(self.peak_bytes.max())

    @property
    def peak_row(self) -> int:
        """The row in which the highest moment first falls."""
        return int(self.row[int(self.peak_bytes.argmax())])


def static_bytes(plan: TrainingPlan, where: Coordinate) -> dict[Category, int]:
    """Bytes at ``where`` that stand all the time; of what is sharded, this rank's part."""
    stages = plan.rank_stages(where.pp)
    optimizer, gradients, parameters = (
        sum(plan.kept_numel(stage, where, what) for stage in stages)
        for what in (OPTIMIZER, GRADIENTS, PARAMETERS)
    )
    form, moments = plan.format, MOMENTS[plan.workload.optimizer]
    return {
        "parameters": parameters * form.compute,
        "gradients": gradients * form.gradient,
        "optimizer": optimizer * (form.main + moments * form.moment) + STEP_COUNTER_BYTES * (moments > 0),
        "constants": STATISTICS_BYTES + _position_bytes(plan, where),
    }


def _position_bytes(plan: TrainingPlan, where: Coordinate) -> int:
    """Rotary tables (cosine and sine of half a head), or the indices of learned positions."""
    model, d = plan.model, plan.dims(where.tp)
    if model.rope_theta is None:
        return d.local_tokens * INDEX_BYTES if where.pp == plan.stage_rank(0) else 0
    rotary = model.latent_attention.qk_rope_head_dim if model.latent_attention else model.head_dim
    return 2 * d.seq_len * (rotary // 2) * d.statistics_itemsize


def memory_timeline(plan: TrainingPlan, rank: int) -> MemoryTimeline:
    """Live bytes on ``rank`` over one step in the steady state.

    Every entry is one of a few *moments* (a segment of a body, a posted receive, a finished send), each with
    what it leaves and its highest point over its start; the timeline is their running sum.
    """
    where = coordinate(plan.topology, rank)
    own = rows(plan.program(where.tp), where.pp)
    moments = _moments(plan, where)
    index, operation, number = np.array(list(_entries(own, moments)), dtype=np.int64).T
    left, highest = np.stack(moments.left)[number], np.stack(moments.highest)[number]
    static = static_bytes(plan, where)
    standing = np.array([static.get(category, 0) for category in CATEGORIES])
    ends = standing + left.cumsum(axis=0)
    peaks = ends - left + highest
    totals, told = peaks.sum(axis=1), index >= 0
    return MemoryTimeline(
        rank=rank,
        row=index[told],
        operation=operation[told],
        live_bytes=ends.sum(axis=1)[told],
        peak_bytes=totals[told],
        peak_by_category=tuple(
            (name, int(size)) for name, size in zip(CATEGORIES, peaks[totals.argmax()], strict=True) if size
        ),
    )


def _entries(own: Sequence[Row], moments: _Moments) -> Iterator[tuple[int, int, int]]:
    """(row, operation, moment) in order; what is done inside another row is there with row -1."""
    posted = anchored(own)
    for index, row in enumerate(own):
        if row.anchor_row >= 0:
            continue
        entries = moments.of(index, own)
        for operation, number in entries:
            yield index, operation, number
            place = len(entries) - 2 - operation  # of a backward's segments, the last runs first
            inside = posted.get((index, place), ()) if operation >= 0 else ()
            if any(own[one].kind is Kind.REDUCE_SCATTER for one in inside):
                yield -1, operation, moments.gradients(-moments.ended.get((row.stage, place), 0))
            for one in inside:
                if own[one].kind is not Kind.WAIT:
                    yield -1, operation, moments.of(one, own)[-1][1]


@define
class _Moments:
    """What can happen to memory, numbered: bytes left and highest bytes, by category."""

    left: list[np.ndarray] = field(factory=list)
    highest: list[np.ndarray] = field(factory=list)
    segments: dict[tuple[int, Kind], list[int]] = field(factory=dict)  # by stage and phase
    changes: dict[tuple[Kind, Kind], int] = field(factory=dict)  # by row, and what it waits for
    reduced: dict[tuple[int, int], int] = field(factory=dict)  # bytes by stage and bucket, once waited for
    ended: dict[tuple[int, int], int] = field(factory=dict)  # bytes by stage and segment after which they go
    gathered: dict[tuple[int, int, bool], int] = field(factory=dict)  # by stage, group, whether for F
    freed: dict[int, int] = field(factory=dict)  # by stage
    casts: bool = False  # whether gradients are copied to travel
    sums: dict[int, int] = field(factory=dict)  # by bytes of gradients that come or go

    def add(self, left: np.ndarray, highest: np.ndarray) -> int:
        self.left.append(left)
        self.highest.append(highest)
        return len(self.left) - 1

    def gradients(self, size: int) -> int:
        """The moment at which so many bytes of gradients come, or go."""
        if size not in self.sums:
            delta = np.array([size if name == "gradients" else 0 for name in CATEGORIES])
            self.sums[size] = self.add(delta, np.maximum(delta, 0))
        return self.sums[size]

    def of(self, index: int, own: Sequence[Row]) -> list[tuple[int, int]]:
        """(operation, moment) of each entry of a row: its segments, then the row itself (-1)."""
        row = own[index]
        concerned = own[row.target].kind if row.kind is Kind.WAIT else row.kind
        change = self.changes.get((row.kind, concerned), 0)
        if concerned in SUMS:
            change = self.gradients(self._sum_bytes(row, own))
        elif row.kind is Kind.UNSHARD:
            change = self.gathered.get((row.stage, row.group, cell_kind(index, own) is Kind.FORWARD), 0)
        elif row.kind is Kind.RESHARD:
            change = self.freed.get(row.stage, 0)
        return [*enumerate(self.segments.get((row.stage, row.kind), ())), (-1, change)]

    def _sum_bytes(self, row: Row, own: Sequence[Row]) -> int:
        """Gradients that come with the post of a sum, or go with the wait for it."""
        if row.kind is not Kind.WAIT:
            return row.bytes * self.casts
        target = own[row.target]
        filled = self.reduced.get((row.stage, row.part), 0) if target.kind is Kind.REDUCE_SCATTER else 0
        return -filled - target.bytes * self.casts


def cell_kind(index: int, own: Sequence[Row]) -> Kind:
    """What the stage of a row computes next."""
    stage = own[index].stage
    return next(row.kind for row in own[index:] if row.kind in COMPUTE and row.stage == stage)


def _moments(plan: TrainingPlan, where: Coordinate) -> _Moments:
    """The moments of the rank at ``where``; number 0 changes nothing."""
    found = _Moments(casts=plan.format.reduce != plan.format.gradient)
    program = plan.program(where.tp)
    boundary = plan.dims(where.tp).local_bytes

    def change(category: Category, size: int) -> int:
        delta = np.array([size if name == category else 0 for name in CATEGORIES])
        return found.add(delta, np.maximum(delta, 0))

    change("buffers", 0)
    found.changes = {
        (Kind.RECV_F, Kind.RECV_F): change("activations", boundary),
        (Kind.RECV_B, Kind.RECV_B): change("workspace", boundary),
        (Kind.WAIT, Kind.SEND_F): change("activations", -boundary),
        (Kind.WAIT, Kind.SEND_B): change("workspace", -boundary),
    }
    for kind, size in ((Kind.NORM, NORM_SCRATCH_BYTES), (Kind.UPDATE, _cast_bytes(plan, where))):
        scratch = change("workspace", size)
        found.left[scratch] = np.zeros_like(found.left[scratch])
        found.changes[kind, kind] = scratch
    for stage in plan.rank_stages(where.pp):
        bodies = plan.bodies(stage, where.tp)
        _note_fillings(found, plan, stage, where.tp)
        for group in DATA_GROUPS:
            sizes, name = plan.gathered_bytes(stage, group, where.tp), plan.sharding.within(group)
            if not any(sizes):
                continue
            number, whole = program.groups.index(name), sum(sizes)
            first, last = (whole, whole) if plan.reshard == "stage" else (sizes[0], sizes[-1])
            found.gathered[stage, number, True] = change("parameters", first)
            found.gathered[stage, number, False] = change("parameters", last)
            found.freed[stage] = change("parameters", -whole if plan.reshard == "stage" else 0)
        for kind in COMPUTE:
            segments = of_kind(bodies, kind).segments
            found.segments[stage, kind] = [found.add(*segment_memory(segment)) for segment in segments]
    return found


def _note_fillings(found: _Moments, plan: TrainingPlan, stage: int, tp_index: int) -> None:
    """When the full gradients go that each B or W reduces, and what they travelled in."""
    wire = plan.format.reduce if found.casts else 0
    for filling in plan.variant(stage, tp_index).fillings:
        if filling.last is None:
            found.reduced[stage, filling.index] = filling.bytes
        else:
            place = stage, filling.last
            travelled = filling.bytes // plan.format.gradient * wire
            found.ended[place] = found.ended.get(place, 0) + filling.bytes + travelled
            found.reduced[stage, filling.index] = -travelled  # by its own wait, nothing is left


def _cast_bytes(plan: TrainingPlan, where: Coordinate) -> int:
    """The copy of the gradients that the optimizer takes, where its main weights have more bytes."""
    form = plan.format
    own = sum(plan.kept_numel(stage, where, OPTIMIZER) for stage in plan.rank_stages(where.pp))
    return own * form.main if form.gradient < form.main else 0
