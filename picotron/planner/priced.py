"""Rows of choices priced by the vectorised estimates: seconds of a step and bytes of the fullest device.

Columns may have any shapes that broadcast. What a term does not depend on it is not computed for: with the
choices of a block on axes of their own, (1, bodies, schedules, modes), a matrix product's seconds are found
once a body. The first axis has length 1, so that a block is one case of many columns to the estimates.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from attrs import evolve, frozen

from picotron.planner.anchor import anchored
from picotron.planner.cases import (
    Cases,
    Column,
    LayoutColumns,
    MachineColumns,
    ModelColumns,
    SoftwareColumns,
    WorkColumns,
    model_columns,
)
from picotron.planner.columns_of import machine_columns, work_columns
from picotron.planner.constants import Constants, default_constants, replaced
from picotron.planner.constraints import Rows
from picotron.planner.estimate import TimeEstimate, estimate_seconds
from picotron.planner.estimate_memory import MemoryEstimate, always_bytes, estimate_bytes
from picotron.planner.space import CHOICES, Space


@frozen(kw_only=True, eq=False)
class Prices:
    """Everything that an estimate reads beside the layout, and the rows' prices."""

    model: ModelColumns
    work: WorkColumns
    machine: MachineColumns
    software: SoftwareColumns

    def cases(self, rows: Rows, *, num_microbatches: int | None = None) -> Cases:
        """The rows as cases, of the whole step or of one with so many microbatches."""
        work = self.work
        if num_microbatches is not None:
            batch = np.asarray(rows["dp"] * rows["micro_batch"] * num_microbatches, dtype=np.float64)
            work = evolve(work, global_batch=batch)
        return Cases(
            model=self.model,
            work=work,
            machine=self.machine,
            software=self.software,
            layout=LayoutColumns(**{name: np.asarray(rows[name], dtype=np.float64) for name in CHOICES}),
        )

    def seconds(
        self, rows: Rows, *, without: tuple[str, ...] = (), mean_layers: bool = False
    ) -> TimeEstimate:
        """The time of every row, with the constants named in ``without`` at 0."""
        constants = _without(without) if without else None
        return estimate_seconds(self.cases(rows), constants, mean_layers=mean_layers)

    def memory(self, rows: Rows) -> MemoryEstimate:
        """The bytes of every row."""
        return estimate_bytes(self.cases(rows))

    def always(self, rows: Rows) -> Column:
        """The bytes of every row that stand all the time, however many microbatches a step has."""
        return always_bytes(self.cases(rows, num_microbatches=1))


def prices(space: Space, software: SoftwareColumns) -> Prices:
    """What prices the candidates of one space. Raises PlanError where the device lacks the precision."""
    machine = machine_columns(space.cluster, space.work.precision)
    return Prices(
        model=model_columns(space.model),
        work=work_columns(space.work),
        machine=anchored(machine, space.model, space.cluster, space.work),
        software=software,
    )


@cache
def _without(names: tuple[str, ...]) -> Constants:
    return replaced(default_constants(), dict.fromkeys(names, 0.0))
