"""How many chunks of activations each pipeline rank holds at its fullest, for every schedule at once.

A chunk is one microbatch on one of a rank's stages. The formulas are theorems about the schedules of
``catalogue`` (and the papers named there); they hold for any number of microbatches. In V-Half and V-Min they
are those of the fullest rank: with fewer than 2p microbatches some ranks hold less.

Where W is put off, a chunk that waits for it may be larger than one that waits for I, most of all where the
latter is recomputed or offloaded. So there are two moments that can be the fullest: with most chunks of all,
and, later, with most between I and W. The second is at most what the schedule reaches, on the ranks that
reach it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from attrs import frozen

from picotron.planner.cases import SCHEDULE_NAMES, Cases, Column, LayoutColumns, WorkColumns

NONE: Column = np.zeros(())
Held = Callable[[Column, Column, Column, Column], tuple[Column, Column]]

V_PLACED = ("zb-v", "v-half", "v-min", "dualpipe-v")
"""Schedules whose stages go up the ranks and come back; in all others stages go round."""

WHOLE_BACKWARD = ("afab", "1f1b", "interleaved", "bfs")
MORE_BEHIND = ("zb-h1", "zb-h2", "interleaved-zb", *V_PLACED)


@frozen(kw_only=True, eq=False)
class InFlight:
    """Chunks on a rank at its fullest: ``whole`` between F and I (or B), ``split`` between I and W.

    ``late_whole`` and ``late_split``: when most wait for W. ``turned``: how many I end one after the other
    before the first W. ``head``: of the whole ones, those of the model's last stage, should the rank hold it.
    """

    whole: Column
    split: Column
    late_whole: Column
    late_split: Column
    turned: Column
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
    whole, split = _of_schedules(_HELD, present, chosen, (m, p, v, s))
    every = m * v
    whole = np.minimum(every, whole)
    split = np.minimum(every - whole, split)
    late_whole, late_split = whole, split
    if any(SCHEDULE_NAMES[number] in _LATE for number in present):
        late = {name: _LATE.get(name, held) for name, held in _HELD.items()}
        late_whole, late_split = _of_schedules(late, present, chosen, (m, p, v, s))
        late_whole = np.minimum(every, late_whole)
        late_split = np.minimum(every - late_whole, late_split)
    twice = np.isin(chosen, [SCHEDULE_NAMES.index(name) for name in ("v-half", "v-min")])
    return InFlight(
        whole=whole,
        split=split,
        late_whole=late_whole,
        late_split=late_split,
        turned=np.minimum(whole, 1.0 + twice),
        head=_in_head(m, p, v, chosen),
    )


def _of_schedules(
    held: Mapping[str, Held], present: Column, chosen: Column, sizes: tuple[Column, ...]
) -> tuple[Column, Column]:
    """The chunks of each case's own schedule."""
    if len(present) == 1:
        return held[SCHEDULE_NAMES[present[0]]](*sizes)
    columns = np.broadcast_arrays(*sizes, chosen)
    whole, split = np.empty(columns[0].shape), np.empty(columns[0].shape)
    for number in present:
        here = columns[-1] == number
        whole[here], split[here] = held[SCHEDULE_NAMES[number]](*(column[here] for column in columns[:-1]))
    return whole, split


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
    "zb-v": lambda m, p, v, s: (np.minimum(2 * p, m + s + 1), np.maximum(0, 2 * p - m - s - 1)),
    "interleaved-zb": lambda m, p, v, s: (_rounds(m, p, v) + p - s, s),
    "dualpipe-v": lambda m, p, v, s: (np.minimum(2 * p, m + s) + 1, NONE),
    "v-min": lambda m, p, v, s: ((p + 4) // 3 * 2, NONE),
    "v-half": lambda m, p, v, s: ((p + 2) // 2 * 2, NONE),
}


def _late_in_v(p: Column, s: Column, whole: Column, waiting: Column, turn: Column) -> tuple[Column, Column]:
    """Of V-Half and V-Min: three wait for W on the rank where the V turns, for some p."""
    turns = (s == p - 1) & turn
    return np.where(turns, 1.0, whole), (p > 1) * (waiting + turns)


# the same when most wait for W, of the schedules of which this is another moment
_LATE: dict[str, Held] = {
    "zb-h2": lambda m, p, v, s: (np.maximum(1, 2 * (p - s) - 1 - (m < 2 * p - 1)), 2 * s + (m < 2 * p - 1)),
    "zb-v": lambda m, p, v, s: (p - s, 2 * s + 1 + np.maximum(0, 2 * p - 1 - m)),
    "dualpipe-v": lambda m, p, v, s: (p - s, np.maximum(0, np.minimum(s, s + m - 2 * p))),
    "v-min": lambda m, p, v, s: _late_in_v(p, s, np.maximum(1, np.floor(p / 2)), NONE + 2, p % 3 == 2),
    "v-half": lambda m, p, v, s: _late_in_v(p, s, np.ceil((p - s) / 2) + 1, 2.0 - p % 2, p % 2 == 0),
}
