"""The software profile of a row, as values of ``SoftwareColumns``."""

from __future__ import annotations

from functools import cache
from typing import Any

from attrs import fields

from picotron.planner.cases import ATTENTIONS, LOSSES, SoftwareColumns
from picotron.planner.software import software_columns, software_profile

from .row import PublishedRow


def software_values(row: PublishedRow) -> dict[str, float]:
    """The values of every column; a row that says nothing overlaps has no overlap at all."""
    values = dict(_of_profile(row.profile, row.architecture))
    values |= {
        name: float(row.facts[name])
        for name in ("graphs", "tensor_overlap", "expert_overlap", "expert_dedup", "expert_neighbours")
        if row.facts.get(name) is not None
    }
    if row.facts.get("attention"):
        values["attention"] = float(ATTENTIONS.index(row.facts["attention"]))
    if row.facts["optimizer_on_host"]:
        values["optimizer_on_host"] = 1.0
    if row.facts["chunked_loss"]:
        values["loss"] = float(LOSSES.index("chunked"))
    overlap = row.facts["overlap"].lower()
    if overlap in ("none", "no", "off"):
        values |= dict.fromkeys((name for name in values if name.endswith("_overlap")), 0.0)
    if "grad-reduce" in overlap:
        values["reduce_overlap"] = 1.0
    if "param-gather" in overlap:
        values["gather_overlap"] = 1.0
    return values


@cache
def _of_profile(name: str, architecture: str) -> dict[str, Any]:
    columns = software_columns(software_profile(name), architecture)
    return {field.name: float(getattr(columns, field.name)) for field in fields(SoftwareColumns)}
