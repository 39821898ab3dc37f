"""The constants of the memory model that are no sizes of tensors, read from one table with their sources."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
from attrs import frozen

from picotron.planner.cases import ARCHITECTURES, Column

TABLE = "presets/memory_constants.json"


@frozen(kw_only=True, eq=False)
class MemoryConstants:
    """Bytes by architecture (in the order of ARCHITECTURES), and shares."""

    context_bytes: Column
    library_workspace_bytes: Column
    communicator_bytes: float
    fragmentation_share: float
    recomputed_fragmentation_share: float


@cache
def memory_constants() -> MemoryConstants:
    """The table as the package holds it."""
    table = json.loads(files("picotron.planner").joinpath(TABLE).read_text(encoding="utf-8"))
    return MemoryConstants(
        context_bytes=_by_architecture(table["context_bytes"]),
        library_workspace_bytes=_by_architecture(table["library_workspace_bytes"]),
        communicator_bytes=float(table["communicator_bytes"]["value"]),
        fragmentation_share=float(table["fragmentation_share"]["value"]),
        recomputed_fragmentation_share=float(table["recomputed_fragmentation_share"]["value"]),
    )


def _by_architecture(entry: Mapping[str, Any]) -> Column:
    return np.array([float(entry["values"][name]) for name in ARCHITECTURES])
