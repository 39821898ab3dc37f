"""Saved tensors in flight, and the highest point over them, on one pipeline rank.

``Blocks`` is what all ranks of a pipeline have in common: sizes of a layer of each kind, of the head and of
their backward. The rest counts layers and microbatches of one rank.
"""

from __future__ import annotations

import numpy as np
from attrs import frozen

from picotron.planner.cases import RECOMPUTES, SCHEDULE_NAMES, Cases, Column
from picotron.planner.held_weights import LayerWeights, Widths, layer_weights, widths
from picotron.planner.in_flight import InFlight, is_v_placed, splits_backward
from picotron.planner.saved_tensors import (
    LayerBytes,
    SavedTensors,
    Tensors,
    Tokens,
    dropped_core,
    layer_bytes,
    saved_tensors,
    tokens,
    total,
)
from picotron.planner.stage_columns import RankLayers
from picotron.planner.working_tensors import HeadBytes, Working, head_bytes, working


@frozen(kw_only=True, eq=False)
class Blocks:
    """What is the same at every position of the pipeline; ``dense`` and ``sparse`` are a layer's bytes."""

    cases: Cases
    widths: Widths
    layer: LayerWeights
    tokens: Tokens
    saved: SavedTensors
    dense: LayerBytes
    sparse: LayerBytes
    working: Working
    head: HeadBytes


def blocks_of(cases: Cases, imbalance: float) -> Blocks:
    """Of each case; ``imbalance``: what the fullest expert rank sees over the mean."""
    w = widths(cases.model, cases.layout)
    t = tokens(cases, imbalance=imbalance)
    saved = saved_tensors(cases, t, w)
    return Blocks(
        cases=cases,
        widths=w,
        layer=layer_weights(cases.model, cases.layout, w),
        tokens=t,
        saved=saved,
        dense=layer_bytes(cases, saved, saved.dense, t, t.whole * w.product * t.item),
        sparse=layer_bytes(cases, saved, saved.sparse, t, t.rows * w.expert_product * t.item),
        working=working(cases, t, w, saved),
        head=head_bytes(cases, t, w),
    )


def activations_in_flight(blocks: Blocks, layers: RankLayers, flight: InFlight) -> Column:
    """Saved tensors of all chunks in flight; a chunk is one microbatch on a v-th of the rank's layers."""
    layout, saved, dense, sparse = blocks.cases.layout, blocks.saved, blocks.dense, blocks.sparse
    v = layout.virtual_stages
    kept = (layers.dense * dense.kept + layers.sparse * sparse.kept) / v
    kept = kept + layers.first * total(saved.embedding) / v
    split = (layers.dense * dense.for_weights + layers.sparse * sparse.for_weights) / v
    head = layers.last * blocks.head.kept
    stands = flight.whole * kept + flight.split * split
    stands = stands + head * np.where(splits_backward(layout), flight.split, flight.head - 1)
    one = np.minimum(stands, (layers.dense > 0) * dense.kept + (layers.sparse > 0) * sparse.kept)
    offloaded = stands * (1 - layout.offload) + (layout.offload > 0) * 2 * one  # one leaves as one comes
    on_device: Column = np.minimum(stands, offloaded)
    return on_device


def fullest_layer(blocks: Blocks, layers: RankLayers) -> Column:
    """Highest bytes over the saved in the backward of the last layer, or of the first where W is put off."""
    top, bottom = _last_layer(blocks, layers), _first_layer(blocks, layers)
    layer: Column = np.where(splits_backward(blocks.cases.layout), np.maximum(top, bottom), top)
    return layer


def _last_layer(blocks: Blocks, layers: RankLayers) -> Column:
    """Over what is saved, in the backward of the last layer; what it dropped stands again."""
    layout, saved, work = blocks.cases.layout, blocks.saved, blocks.working
    here = layers.all / layout.virtual_stages
    again = (layout.recompute_layers > 0) * np.clip(1 - (1 - layout.recompute_layers) * here, 0, 1)
    full = again * (layout.recompute == RECOMPUTES.index("full"))
    core = again * (layout.recompute == RECOMPUTES.index("selective")) * dropped_core(blocks.cases, saved)

    def highest(mlp: Column, kept: Tensors, layer: LayerBytes) -> Column:
        top = np.maximum(mlp, work.attention + core - total(kept))
        again: Column = top + full * (layer.whole - saved.boundary)
        return again

    dense = highest(work.dense, saved.dense, blocks.dense)
    sparse = highest(work.sparse, saved.sparse, blocks.sparse)
    # dense layers stand in front: by the time of their backward those with experts have let go
    freed = layers.sparse / layout.virtual_stages * blocks.sparse.kept
    last: Column = np.where(
        layers.sparse > 0, np.maximum(sparse, (layers.dense > 0) * (dense - freed)), dense
    )
    return last


def _first_layer(blocks: Blocks, layers: RankLayers) -> Column:
    """The same in the first layer where W is put off: all others, and the head, leave what W needs."""
    layout, work = blocks.cases.layout, blocks.working
    # in a V both stages of a rank may run one after the other, but for DualPipe, which keeps most B whole
    stages = 1 + (is_v_placed(layout) & (layout.schedule != SCHEDULE_NAMES.index("dualpipe-v")))
    dense, sparse = blocks.dense, blocks.sparse
    grown = layers.dense * (dense.for_weights - dense.kept) + layers.sparse * (
        sparse.for_weights - sparse.kept
    )
    grown = stages * grown / layout.virtual_stages
    grown = np.minimum(grown, 0) + np.maximum(grown, 0) * (1 - layout.offload)

    def bottom(mlp: Column, layer: LayerBytes) -> Column:
        highest: Column = np.maximum(mlp, work.attention + layer.grown)
        of_layer: Column = layer.whole - layer.for_weights + highest
        return of_layer

    of_layer = np.where(layers.dense > 0, bottom(work.dense, dense), bottom(work.sparse, sparse))
    first: Column = grown + of_layer + layers.last * blocks.head.kept
    return first
