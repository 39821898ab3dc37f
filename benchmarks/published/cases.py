"""Rows as the columns from which the planner estimates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from attrs import fields

from picotron.errors import PlanError
from picotron.planner.cases import (
    Cases,
    LayoutColumns,
    MachineColumns,
    ModelColumns,
    Part,
    SoftwareColumns,
    WorkColumns,
    columns,
)

from .row import PublishedRow
from .software import software_values


def scored(rows: Sequence[PublishedRow]) -> list[PublishedRow]:
    """The rows that are not skipped, in order: those that ``cases_of`` takes."""
    return [row for row in rows if row.skipped is None]


def cases_of(rows: Sequence[PublishedRow]) -> Cases:
    """The rows' columns, of shape (n,). Raises PlanError for skipped rows, which ``scored`` leaves out."""
    if skipped := [row.id for row in rows if row.skipped]:
        raise PlanError(f"rows must not be skipped ones, got {skipped[:5]}; take scored(rows)")
    return Cases(
        model=_part(ModelColumns, [row.model for row in rows]),
        work=_part(WorkColumns, [row.work for row in rows]),
        machine=_part(MachineColumns, [row.machine for row in rows]),
        software=_part(SoftwareColumns, [software_values(row) for row in rows]),
        layout=_part(LayoutColumns, [row.layout for row in rows]),
    )


def _part(part: type[Part], values: Sequence[Mapping[str, float]]) -> Part:
    return columns(
        part, {f.name: np.array([row[f.name] for row in values], dtype=float) for f in fields(part)}
    )
