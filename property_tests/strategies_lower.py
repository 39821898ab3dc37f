"""Schedules of every placement to be lowered, what they cost, and programs with rows moved about."""

from __future__ import annotations

import numpy as np
from attrs import evolve
from hypothesis import strategies as st

from picotron.planner.data import Bucket
from picotron.planner.pipeline import Schedule
from picotron.planner.program import RECEIVES, SENDS, Kind, Program, Row, row_columns, rows
from picotron.planner.schedule_times import PipelineCosts
from property_tests.strategies import quarters
from property_tests.strategies_orders import Shape, cells_text, draw_orders


@st.composite
def drawn_schedules(draw: st.DrawFn, *, mirrored: bool = True) -> Schedule:
    """Any valid schedule of a small pipeline: every placement, split backwards, pairs; perhaps in a circle.

    ``mirrored``: also with two copies of each stage.
    """
    while True:
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        shape = Shape(rng)
        if shape.kind != "both" or mirrored:
            return Schedule(
                name="drawn",
                num_microbatches=shape.num_microbatches,
                stage_ranks=tuple(shape.stage_ranks),
                bidirectional=shape.kind == "both",
                orders=cells_text(draw_orders(rng, shape)),
            )


@st.composite
def costs(draw: st.DrawFn, num_stages: int, *, overlap: bool = False) -> PipelineCosts:
    """Seconds in quarters, so that sums are exact."""

    def column(least: float) -> list[float]:
        return [least + draw(quarters(8)) for _ in range(num_stages)]

    return PipelineCosts(
        forward_seconds=column(0.25),
        input_seconds=column(0.0),
        weight_seconds=column(0.0),
        transfer_seconds=draw(quarters(8)),
        overlap_factor=draw(st.sampled_from([0.5, 0.75, 1.0])) if overlap else 1.0,
    )


@st.composite
def stage_buckets(draw: st.DrawFn, schedule: Schedule) -> list[list[Bucket]]:
    """Up to two buckets a stage, partial over what the ends of the pipeline may be partial over."""
    last = schedule.num_stages - 1
    ends_apart = schedule.stage_ranks[0] == 0 and schedule.stage_ranks[last] == schedule.num_ranks - 1 > 0
    tied = ends_apart and draw(st.booleans())
    own = [("dp_cp",), ("tp", "dp_cp"), ()]
    found = []
    for stage in range(schedule.num_stages):
        partial = [draw(st.sampled_from(own)) for _ in range(draw(st.integers(0, 2)))]
        if tied and stage in (0, last):
            partial.append(("dp_cp", "embedding"))
        found.append(
            [
                Bucket(stage=stage, index=index, names=(), partial=groups, ready_segment=0)
                for index, groups in enumerate(partial)
            ]
        )
    return found


@st.composite
def spoilt(draw: st.DrawFn, program: Program) -> Program:
    """The program with some rows moved past others of their rank, as long as each WAIT follows its target."""
    for _ in range(draw(st.integers(0, 4))):
        rank = draw(st.integers(0, program.num_ranks - 1))
        own = rows(program, rank)
        movable = [at for at, row in enumerate(own) if row.kind in (*SENDS, *RECEIVES, Kind.WAIT)]
        if movable:
            program = _moved(
                program, rank, draw(st.sampled_from(movable)), draw(st.integers(0, len(own) - 1))
            )
    return program


def _moved(program: Program, rank: int, at: int, to: int) -> Program:
    """The program with one row of a rank elsewhere; unchanged if a WAIT would come before its target."""
    own = list(enumerate(rows(program, rank)))
    own.insert(to, own.pop(at))
    place = {old: new for new, (old, _) in enumerate(own)}
    fixed = [
        row._replace(
            target=place[row.target] if row.target >= 0 else -1,
            anchor_row=place[row.anchor_row] if row.anchor_row >= 0 else -1,
        )
        for _, row in own
    ]
    if any(row.target >= index or row.anchor_row >= index for index, row in enumerate(fixed)):
        return program
    return with_rank(program, rank, fixed)


def with_rank(program: Program, rank: int, own: list[Row]) -> Program:
    """The program with as many other rows on one rank."""
    first, stop = program.offsets[rank : rank + 2]
    columns = {}
    for name, column in row_columns(own).items():
        columns[name] = getattr(program, name).copy()
        columns[name][first:stop] = column
    return evolve(program, **columns)


@st.composite
def in_batches(draw: st.DrawFn, program: Program) -> Program:
    """The program with some neighbouring sends and receives posted together."""
    batch = np.array(program.batch)
    together = program.is_kind(*SENDS, *RECEIVES)
    number = 100
    for index in range(program.num_rows - 1):
        same_rank = program.rank[index] == program.rank[index + 1]
        if together[index] and together[index + 1] and same_rank and draw(st.booleans()):
            if batch[index] < 0:
                number += 1
                batch[index] = number
            batch[index + 1] = batch[index]
    return evolve(program, batch=batch)
