"""How many chunks of activations each pipeline rank holds at its fullest, for every schedule at once.

A chunk is one microbatch on one of a rank's stages. The formulas are theorems about the schedules of
``catalogue`` (and the papers named there); they hold for any number of microbatches. In V-Half and V-Min they
are those of the fullest rank: with fewer than 2p microbatches some ranks hold less.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from attrs import frozen

from picotron.planner.cases import SCHEDULE_NAMES, Cases, Column, LayoutColumns, WorkColumns

NONE: Column = np.zeros(())

V_PLACED = ("zb-v", "v-half", "v-min", "dualpipe-v")
"""Schedules whose stages go up the ranks and come back; in all others stages go round."""

WHOLE_BACKWARD = ("afab", "1f1b", "interleaved", "bfs")
MORE_BEHIND = ("zb-h1", "zb-h2", "interleaved-zb", *V_PLACED)


@frozen(kw_only=True, eq=False)
class InFlight:
    """Chunks on a rank at its fullest: ``whole`` between F and I (or B), ``split`` between I and W.

    ``head``: of the whole ones, those of the model's last stage, should the rank hold it.
    """

    whole: Column
    split: Column
    head: Column


def microbatches(work: WorkColumns, layout: LayoutColumns) -> Column:
    """Microbatches that a data-parallel rank runs in a step, at least one."""
    count: Column = np.maximum(1.0, np.floor(work.global_batch / (layout.dp * layout.micro_batch)))
    return count


def is_v_placed(layout: LayoutColumns) -> Column:
    """Where the stages of a rank go up and come back."""
    return np.isin(layout.schedule, [SCHEDULE_NAMES.index(name) for name in V_PLACED])


def splits_backward(layout: LayoutColumns) -> Column:
    """Where weight gradients are computed apart from input gradients, and later."""
    return ~np.isin(layout.schedule, [SCHEDULE_NAMES.index(name) for name in WHOLE_BACKWARD])


def holds_more_behind(layout: LayoutColumns) -> Column:
    """Where ranks may hold more towards the end of the pipeline: layers, chunks, or what waits for W."""
    return np.isin(layout.schedule, [SCHEDULE_NAMES.index(name) for name in MORE_BEHIND])


def in_flight(cases: Cases, position: Column) -> InFlight:
    """What the pipeline rank at ``position`` holds."""
    layout = cases.layout
    m, p, v, s = microbatches(cases.work, layout), layout.pp, layout.virtual_stages, position
    chosen = np.asarray(layout.schedule, dtype=np.int64)
    present = np.flatnonzero(np.bincount(chosen.ravel(), minlength=len(SCHEDULE_NAMES)))
    if len(present) == 1:
        whole, split = _HELD[SCHEDULE_NAMES[present[0]]](m, p, v, s)
    else:
        sizes = np.broadcast_arrays(m, p, v, s, chosen)
        whole, split = np.empty(sizes[0].shape), np.empty(sizes[0].shape)
        for number in present:
            here = sizes[-1] == number
            whole[here], split[here] = _HELD[SCHEDULE_NAMES[number]](*(size[here] for size in sizes[:-1]))
    every = m * v
    whole = np.minimum(every, whole)
    return InFlight(whole=whole, split=np.minimum(every - whole, split), head=_in_head(m, p, v, chosen))


def _in_head(m: Column, p: Column, v: Column, schedule: Column) -> Column:
    """Microbatches between F and B of the model's last stage, on the rank that holds it.

    One, but for schedules that run all forwards first, and where interleaving waits for rounds of p that few
    microbatches do not fill.
    """
    at_once = (schedule == SCHEDULE_NAMES.index("afab")) | (schedule == SCHEDULE_NAMES.index("bfs"))
    waits = (schedule == SCHEDULE_NAMES.index("interleaved")) * np.maximum(
        0.0, (v - 1) * p - _rounds(m, p, v)
    )
    head: Column = np.where(at_once, m, np.minimum(m, 1 + waits))
    return head


Held = Callable[[Column, Column, Column, Column], tuple[Column, Column]]


def _rounds(m: Column, p: Column, v: Column) -> Column:
    """Chunks that pass before a microbatch comes round: of the largest group, where m is dealt in groups."""
    chunks: Column = (v - 1) * np.ceil(m / np.maximum(1.0, np.floor(m / p)))
    return chunks


# (whole, split) chunks on rank s of p, before the cap of all that there are; a rank has v chunks a microbatch
_HELD: dict[str, Held] = {
    "afab": lambda m, p, v, s: (m, NONE),
    "1f1b": lambda m, p, v, s: (p - s, NONE),
    "interleaved": lambda m, p, v, s: (
        p - s + np.maximum(p - 1 - s + (v - 1) * p, _rounds(m, p, v)),
        NONE,
    ),
    "bfs": lambda m, p, v, s: (m * v, NONE),
    "zb-h1": lambda m, p, v, s: (p - s, s),
    "zb-h2": lambda m, p, v, s: (2 * (p - s) - 1, 2 * s),
    "zb-v": lambda m, p, v, s: (2 * (p - s), 2 * s),
    "interleaved-zb": lambda m, p, v, s: (_rounds(m, p, v) + p - s, s),
    "dualpipe-v": lambda m, p, v, s: (np.minimum(2 * p, m + s) + 1, NONE),
    "v-min": lambda m, p, v, s: ((p + 4) // 3 * 2, NONE),
    "v-half": lambda m, p, v, s: ((p + 2) // 2 * 2, NONE),
}
