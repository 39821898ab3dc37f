"""Saved tensors in flight, and the highest point over them, on one pipeline rank.

``Blocks`` is what all ranks of a pipeline have in common: sizes of a layer of each kind, of the head and of
their backward. The rest counts layers and microbatches of one rank.
"""

from __future__ import annotations

import numpy as np
from attrs import frozen

from picotron.planner.cases import RECOMPUTES, Cases, Column
from picotron.planner.held_weights import LayerWeights, Widths, layer_weights, widths
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

ROUNDING = 1e-6  # of a layer, in a share of layers


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
    gradient = t.whole * cases.model.hidden * t.item
    dense = t.whole * w.product * t.item + gradient
    shared = (cases.model.shared_intermediate > 0) * gradient  # that of experts is as their output
    sparse = (t.rows * w.expert_product + t.whole * w.shared_product) * t.item + shared
    return Blocks(
        cases=cases,
        widths=w,
        layer=layer_weights(cases.model, cases.layout, w),
        tokens=t,
        saved=saved,
        dense=layer_bytes(cases, saved, saved.dense, gradient, beside=dense),
        sparse=layer_bytes(cases, saved, saved.sparse, gradient, beside=sparse),
        working=working(cases, t, w, saved),
        head=head_bytes(cases, t, w),
    )


@frozen(kw_only=True, eq=False)
class Chunk:
    """Bytes of one microbatch on one of a rank's stages, and the head's part of the rank.

    ``stays``: what forward leaves, ``left`` of it on the device where layers are offloaded, ``copied`` at
    most on its way to the host or back. ``for_weights`` between I and W, which no copy moves.
    """

    stays: Column
    left: Column
    copied: Column
    for_weights: Column
    head: Column


def chunk_of(blocks: Blocks, layers: RankLayers) -> Chunk:
    """Of a rank's mean stage, of which so many layers as the first stage has are recomputed and offloaded.

    Those that are offloaded are recomputed ones, as far as there are any (both are spread evenly).
    """
    layout, saved, dense, sparse = blocks.cases.layout, blocks.saved, blocks.dense, blocks.sparse
    v = layout.virtual_stages
    whole = (layers.dense * dense.whole + layers.sparse * sparse.whole) / v
    dropped = (layers.dense * dense.dropped + layers.sparse * sparse.dropped) / v
    again = _share(layout.recompute_layers, layers.all / v)
    away = _share(layout.offload, layers.all / v)
    ids = layers.first * total(saved.embedding) / v
    return Chunk(
        stays=whole - again * dropped + ids,
        left=(1 - away) * whole - np.maximum(again - away, 0) * dropped + ids,
        copied=_copied(blocks, layers, again, away) if np.any(layout.offload) else np.zeros(()),
        for_weights=(layers.dense * dense.for_weights + layers.sparse * sparse.for_weights) / v,
        head=layers.last * blocks.head.kept,
    )


def _share(of_all: Column, layers: Column) -> Column:
    """Of stages of so many ``layers`` in the mean, those that are among a share ``of_all``: whole layers."""
    layers = np.maximum(layers, 1)
    fewer = np.floor(layers + ROUNDING)
    count = np.floor(of_all * fewer + ROUNDING)
    one_more = np.floor(of_all * (fewer + 1) + ROUNDING) - count
    share: Column = (count + one_more * np.maximum(layers - fewer, 0)) / layers
    return share


def _copied(blocks: Blocks, layers: RankLayers, again: Column, away: Column) -> Column:
    """One layer on its way to the host or back, and a second where neighbours are offloaded.

    Spread evenly, it is a recomputed one as long as there are others, and two neighbours are offloaded where
    more than half of all are. Both come in by no more than a layer leaves, so that more offloaded layers
    never hold more.
    """
    layout = blocks.cases.layout
    count = np.maximum(layers.all / layout.virtual_stages, 1)
    dense, sparse = (layers.dense > 0) * 1.0, (layers.sparse > 0) * 1.0
    whole = dense * blocks.dense.whole + sparse * blocks.sparse.whole
    kept = dense * blocks.dense.kept + sparse * blocks.sparse.kept
    plain = again < 0.5
    first = kept + np.clip((away - again) * count, 0, 1) * (whole - kept)
    begins = np.where(plain, np.maximum(0.5, again + 1 / count), 0.5)
    second = np.clip((away - begins) * count, 0, 1) * np.where(plain, whole, kept)
    copied = first + second
    if np.any(dense * sparse > 0):
        copied = np.where((dense * sparse > 0) & (again < 1), 2 * whole, copied)
    offloaded: Column = (layout.offload > 0) * copied
    return offloaded


def in_flight_bytes(chunk: Chunk, whole: Column, split: Column, heads: Column, *, copies: bool) -> Column:
    """Of ``whole`` chunks between F and I, ``split`` ones between I and W, and the heads of some.

    ``copies``: whether layers of a chunk are on their way to the host or back.
    """
    left = whole * chunk.left
    on_device = np.minimum(whole * chunk.stays, left + chunk.copied) if copies else left
    held: Column = on_device + split * chunk.for_weights + heads * chunk.head
    return held


def last_layer(blocks: Blocks, layers: RankLayers) -> Column:
    """Over what is saved, in the backward of the last layer; what it dropped stands again."""
    layout, saved, work = blocks.cases.layout, blocks.saved, blocks.working
    here = layers.all / layout.virtual_stages
    any_again = _share(layout.recompute_layers, here) > 0
    full = any_again * (layout.recompute == RECOMPUTES.index("full"))
    core = any_again * (layout.recompute == RECOMPUTES.index("selective")) * dropped_core(blocks.cases, saved)

    def highest(mlp: Column, kept: Tensors, layer: LayerBytes) -> Column:
        top = np.maximum(mlp, work.attention + core - total(kept))
        stands: Column = top + full * (layer.whole - saved.boundary)
        return stands

    dense = highest(work.dense, saved.dense, blocks.dense)
    sparse = highest(work.sparse, saved.sparse, blocks.sparse)
    # dense layers stand in front: by the time of their backward those with experts have let go
    again = _share(layout.recompute_layers, here)
    freed = layers.sparse / layout.virtual_stages * (blocks.sparse.whole - again * blocks.sparse.dropped)
    last: Column = np.where(
        layers.sparse > 0, np.maximum(sparse, (layers.dense > 0) * (dense - freed)), dense
    )
    return last


def first_layer(blocks: Blocks, layers: RankLayers) -> Column:
    """Over what W needs, at the end of I in its first layer."""
    work, dense, sparse = blocks.working, blocks.dense, blocks.sparse

    def bottom(mlp: Column, layer: LayerBytes) -> Column:
        highest: Column = np.maximum(mlp, work.attention + layer.grown)
        of_layer: Column = layer.whole - layer.for_weights + highest
        return of_layer

    first: Column = np.where(layers.dense > 0, bottom(work.dense, dense), bottom(work.sparse, sparse))
    return first
