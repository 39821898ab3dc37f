"""How many bytes are live on a rank at every moment of a step, by category.

What stands all the time (parameters, gradients, optimizer state, constants) plus what the bodies and the
transfers make and free, in the order of the program's rows. Bytes are those of tensors: an allocator's
rounding and the framework's own memory are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from attrs import cmp_using, field, frozen

from picotron.planner.body import CATEGORIES, INDEX_BYTES, Category, segment_memory
from picotron.planner.layout import counts_in_norm, local_numel
from picotron.planner.plan import MOMENTS, TrainingPlan
from picotron.planner.program import STATISTICS_BYTES, Kind, Program, Row, rows
from picotron.planner.topology import Coordinate, coordinate

STEP_COUNTER_BYTES = 4  # Adam keeps one fp32 step count a parameter tensor

_array = field(eq=cmp_using(eq=np.array_equal), repr=False)


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
    """Bytes at ``where`` that stand all the time."""
    own = plan.held(where)
    numel = sum(local_numel(p, where) for p in own)
    form, moments = plan.format, MOMENTS[plan.workload.optimizer]
    return {
        "parameters": numel * form.compute,
        "gradients": numel * form.gradient,
        "optimizer": numel * (form.main + moments * form.moment)
        + STEP_COUNTER_BYTES * len(own) * (moments > 0),
        "constants": STATISTICS_BYTES + _position_bytes(plan, where),
    }


def _position_bytes(plan: TrainingPlan, where: Coordinate) -> int:
    """Rotary tables (cosine and sine of half a head), or the indices of learned positions."""
    model, d = plan.model, plan.dims(where.tp)
    if model.rope_theta is None:
        return d.local_tokens * INDEX_BYTES if where.pp == 0 else 0
    rotary = model.latent_attention.qk_rope_head_dim if model.latent_attention else model.head_dim
    return 2 * d.seq_len * (rotary // 2) * d.itemsize


def memory_timeline(plan: TrainingPlan, rank: int, *, program: Program | None = None) -> MemoryTimeline:
    """Live bytes on ``rank`` over one step in the steady state.

    The gradient norm makes three fp64 numbers for each tensor it counts.
    """
    where = coordinate(plan.topology, rank)
    forward, backward = plan.bodies(where.pp, where.tp)
    bodies = {
        kind: [segment_memory(segment) for segment in body.segments]
        for kind, body in ((Kind.FORWARD, forward), (Kind.BACKWARD, backward))
    }
    boundary = plan.dims(where.tp).local_bytes
    live = np.zeros(len(CATEGORIES), dtype=np.int64)
    for category, size in static_bytes(plan, where).items():
        live[CATEGORIES.index(category)] = size
    entries: list[tuple[int, int, int, int]] = []
    peak = live.copy()
    norm_scratch = 8 * max(1, 3 * sum(counts_in_norm(p, where) for p in plan.held(where)))
    own = rows(program or plan.program(where.tp), where.pp)
    for index, row in enumerate(own):
        if row.anchor_row >= 0:
            continue  # posted inside another row; it allocates nothing
        for operation, (left, highest) in enumerate(bodies.get(row.kind, ())):
            if (live + highest).sum() > peak.sum():
                peak = live + highest
            entries.append((index, operation, int((live + left).sum()), int((live + highest).sum())))
            live = live + left
        change = _row_change(row, own, boundary)
        before, live = live, live + change
        if live.sum() > peak.sum():
            peak = live.copy()
        total = int(live.sum())
        scratch = norm_scratch if row.kind is Kind.NORM else 0
        entries.append((index, -1, total, max(total, int(before.sum())) + scratch))
    return _timeline(rank, entries, peak)


def _row_change(row: Row, own: Sequence[Row], boundary_bytes: int) -> np.ndarray:
    """A posted receive makes its buffer; a finished send frees the one it sent."""
    change = np.zeros(len(CATEGORIES), dtype=np.int64)
    if row.kind is Kind.RECV_F:
        change[CATEGORIES.index("activations")] = boundary_bytes
    elif row.kind is Kind.RECV_B:
        change[CATEGORIES.index("workspace")] = boundary_bytes
    elif row.kind is Kind.WAIT:
        sent = own[row.target].kind
        if sent is Kind.SEND_F:
            change[CATEGORIES.index("activations")] = -boundary_bytes
        elif sent is Kind.SEND_B:
            change[CATEGORIES.index("workspace")] = -boundary_bytes
    return change


def _timeline(rank: int, entries: list[tuple[int, int, int, int]], peak: np.ndarray) -> MemoryTimeline:
    columns = np.array(entries, dtype=np.int64).reshape(-1, 4).T
    return MemoryTimeline(
        rank=rank,
        row=columns[0],
        operation=columns[1],
        live_bytes=columns[2],
        peak_bytes=columns[3],
        peak_by_category=tuple(
            (name, int(size)) for name, size in zip(CATEGORIES, peak, strict=True) if size
        ),
    )
