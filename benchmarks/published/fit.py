"""Recompute that no source states: as few layers as make a row's tensors fit.

Tuned runs recompute no more than they must. Where a row leaves recompute open, the memory model is asked for
shares of the layers from none to all, and the least that fits is taken; all, if nothing does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from attrs import evolve

from picotron.planner.cases import RECOMPUTES
from picotron.planner.estimate_memory import estimate_bytes

from .cases import cases_of
from .row import PublishedRow

FIT = "fit"  # the mode of a row whose recompute is open
SHARES = tuple(eighth / 8 for eighth in range(9))


def fitted(rows: Sequence[PublishedRow]) -> list[PublishedRow]:
    """The rows in order; those whose recompute is open have the least share of layers that fits."""
    unsure = [row for row in rows if row.skipped is None and row.facts["recompute_mode"] == FIT]
    if not unsure:
        return list(rows)
    chosen = {id(row): share for row, share in zip(unsure, _least_shares(unsure), strict=True)}
    return [with_share(row, chosen[id(row)]) if id(row) in chosen else row for row in rows]


def with_share(row: PublishedRow, share: float) -> PublishedRow:
    """The row with that share of its layers recomputed."""
    mode = "full" if share else "none"
    changed = {"recompute": RECOMPUTES.index(mode), "recompute_layers": share}
    return evolve(row, layout={**row.layout, **changed}, facts={**row.facts, "recompute_mode": mode})


def _least_shares(rows: Sequence[PublishedRow]) -> list[float]:
    capacity = np.array([row.machine["memory_bytes"] for row in rows])
    held = np.stack([_held(rows, share) for share in SHARES])
    first = np.argmax(held <= capacity, axis=0)
    found = np.where((held <= capacity).any(axis=0), first, len(SHARES) - 1)
    return [SHARES[index] for index in found]


def _held(rows: Sequence[PublishedRow], share: float) -> np.ndarray:
    """Bytes of tensors under one share, of each row."""
    return np.broadcast_to(
        estimate_bytes(cases_of([with_share(row, share) for row in rows])).allocated_bytes, (len(rows),)
    )
