"""The pipeline's part of a step, in closed form: layers of a stage, the bubble of each schedule, transfers.

With ``m`` microbatches the slowest rank computes m times; before and after, it waits for the other
stages, a share of their seconds that depends on the schedule. The shares are the theorems of ``schedules``,
for F, I and W of a rank's stages together: Narayanan et al. 2021, arXiv:2104.04473 (1F1B, interleaved);
Lamy-Poirier 2022, arXiv:2211.05953 (breadth first); Qi et al. 2023, arXiv:2401.10241, and 2024,
arXiv:2405.15362 (zero bubble, V-shaped); DeepSeek-AI 2024, arXiv:2412.19437 (DualPipe). V-Half and V-Min idle
about 3/2 and 2 forwards of a rank for each rank but the first two (a mean over the depths, for slots of equal
length: where F, I and W are far from equal they idle more).
"""

from __future__ import annotations

import numpy as np
from attrs import frozen

from picotron.planner.cases import SCHEDULE_NAMES, Cases, Column
from picotron.planner.in_flight import is_v_placed
from picotron.planner.network import Links, send_seconds, strides
from picotron.planner.stage_columns import rank_layers

_WHOLE_BACKWARD = ("afab", "1f1b", "interleaved", "bfs")


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

    ``weight`` are the seconds of the weight gradients' products, a part of ``backward``. With fewer
    microbatches than ranks a step is as long as the last microbatch's way through all stages, which starts
    when the others have left the first one.
    """
    layout = cases.layout
    names = [SCHEDULE_NAMES[int(i)] for i in np.unique(layout.schedule)]
    whole, inputs = forward + backward, backward - weight
    chunks, others = layout.virtual_stages, np.maximum(layout.pp - 1.0, 1.0)
    shares: Column = np.zeros(())
    for name in names:
        idle = {
            "afab": whole,
            "1f1b": whole / chunks,
            "interleaved": whole / chunks,
            "bfs": whole / chunks,
            "zb-h1": np.maximum(forward + inputs - weight, forward),
            "zb-h2": np.maximum(forward, forward + inputs - 2.0 * weight),
            "zb-v": forward / 2.0,
            "interleaved-zb": forward / chunks,
            "dualpipe-v": np.maximum(forward + 2.0 * inputs - weight, forward) / 2.0,
            "v-half": forward * np.maximum(1.5 * layout.pp - 2.75, 0.75) / others,
            "v-min": forward * np.maximum(2.0 * layout.pp - 3.3, 0.75) / others,
        }[name]
        late = 0.0 if name in _WHOLE_BACKWARD else weight  # what nobody waits for
        way = whole - late
        alone = layout.pp * way + (microbatches - 1.0) * way / chunks + late / chunks
        idle = np.maximum(idle, (alone - microbatches * whole) / others)
        shares = np.where(layout.schedule == SCHEDULE_NAMES.index(name), idle, shares)
    found: Column = shares / whole
    return found


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
