"""The pipeline's part of a step, in closed form: layers of a stage, the bubble of each schedule, transfers.

With ``m`` microbatches the slowest rank computes m times; before, between and after, it waits for the other
stages, a share of their seconds that depends on the schedule (``bubbles``).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from attrs import frozen

from picotron.planner.bubbles import bubble_seconds
from picotron.planner.cases import SCHEDULE_NAMES, Cases, Column
from picotron.planner.in_flight import is_v_placed
from picotron.planner.network import Links, send_seconds, strides
from picotron.planner.stage_columns import rank_layers


@frozen(kw_only=True, eq=False)
class StageLayers:
    """Layers of the first, of the fullest middle and of the last pipeline rank, over all their stages."""

    first: Column
    middle: Column
    last: Column
    turned: Column  # where stages go up and back, so that the first rank has the head too


def stage_layers(cases: Cases, *, mean: bool = False) -> StageLayers:
    """How many layers the ranks hold; with ``mean`` as if layers could be cut, so that all hold as many.

    Embedding and head still count as a layer each where ``ends`` says so.
    """
    model, layout = cases.model, cases.layout
    turned = is_v_placed(layout) & (layout.pp > 1)
    if mean:
        ends = layout.ends * (layout.pp > 1)
        middle = (model.layers + 2.0 * ends) / layout.pp
        first, last = middle - ends * np.where(turned, 2.0, 1.0), middle - ends * ~turned
        return StageLayers(first=np.maximum(first, 0.0), middle=middle, last=last, turned=turned)
    first, second, last = (
        rank_layers(model, layout, position).all
        for position in (np.zeros(()), np.minimum(1.0, layout.pp - 1.0), layout.pp - 1.0)
    )
    middle = np.where(turned, np.maximum(second, last), second)
    return StageLayers(first=first, middle=middle, last=last, turned=turned)


def bubble_share(
    cases: Cases, forward: Column, backward: Column, weight: Column, microbatches: Column
) -> Column:
    """How much of each other stage's F + B the slowest rank idles, at the start and the end together.

    ``weight`` are the seconds of the weight gradients' products, a part of ``backward``.
    """
    layout, whole = cases.layout, forward + backward
    columns = (layout.pp, layout.virtual_stages, microbatches, forward, backward - weight, weight)
    idle = _by_schedule(np.asarray(layout.schedule, dtype=np.int64), columns)
    share: Column = idle / np.maximum(layout.pp - 1.0, 1.0) / whole
    return share


def _by_schedule(schedule: Column, columns: Sequence[Column]) -> Column:
    """``bubble_seconds`` of the columns, those of each schedule apart."""
    kinds = np.unique(schedule)
    if len(kinds) == 1:
        return bubble_seconds(SCHEDULE_NAMES[int(kinds[0])], *columns)
    axis = int(np.argmax(schedule.shape)) - schedule.ndim
    if schedule.size > schedule.shape[axis]:  # schedules vary along several axes
        every = np.broadcast_arrays(schedule, *columns)
        flat = _by_schedule(every[0].ravel(), [column.ravel() for column in every[1:]])
        return flat.reshape(every[0].shape)
    found = np.empty(np.broadcast_shapes(schedule.shape, *(np.shape(column) for column in columns)))
    along = np.moveaxis(found, axis, 0)
    for kind in kinds:
        own = np.flatnonzero(schedule.ravel() == kind)
        idle = bubble_seconds(SCHEDULE_NAMES[int(kind)], *(_taken(column, own, axis) for column in columns))
        along[own] = np.moveaxis(np.broadcast_to(idle, _cut(found.shape, axis, len(own))), axis, 0)
    return found


def _taken(column: Column, which: Column, axis: int) -> Column:
    """Some places along an axis counted from the last, where the column varies along it."""
    return column.take(which, axis=axis) if column.ndim >= -axis and column.shape[axis] > 1 else column


def _cut(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    return tuple(size if place == axis + len(shape) else length for place, length in enumerate(shape))


def transfer_seconds(cases: Cases, link: Links, microbatches: Column, hidden: Column) -> Column:
    """What a rank waits for activations and their gradients on their way between stages.

    Without overlap each microbatch pays for its messages in and out, once a chunk and direction; with it only
    those that fill and drain the pipeline. Tensor-parallel ranks each send their part. ``hidden`` are bytes
    of one message before that cut.
    """
    layout = cases.layout
    if not np.any(layout.pp > 1):
        return np.zeros(())
    stride = strides(cases)["pp"]
    leaves = stride * layout.pp > cases.machine.devices_per_node
    one = send_seconds(link, hidden / layout.tp, leaves)
    filling = 2.0 * (layout.pp - 1.0)
    always = filling + 2.0 * microbatches * layout.virtual_stages
    count = np.where(cases.software.pipeline_overlap > 0, filling, always)
    return np.where(layout.pp > 1, count * one, 0.0)
