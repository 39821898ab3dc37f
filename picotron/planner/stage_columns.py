"""Layers of each pipeline rank, for many layouts at once.

Layers are cut evenly over p * v stages, longer stages first; where ``ends`` is 1 the embedding and the head
count as a layer each, so that the first and the last stage have one less. A mixture of experts keeps its
dense layers in front (DeepSeek-AI 2024, arXiv:2405.04434).
"""

from __future__ import annotations

import numpy as np
from attrs import frozen

from picotron.planner.cases import Column, LayoutColumns, ModelColumns
from picotron.planner.in_flight import is_v_placed


@frozen(kw_only=True, eq=False)
class RankLayers:
    """What the rank at one position holds, over all its stages."""

    dense: Column
    sparse: Column  # layers whose MLP is experts
    first: Column  # 1 where it holds the embedding
    last: Column  # 1 where it holds the head

    @property
    def all(self) -> Column:
        """Decoder layers."""
        layers: Column = self.dense + self.sparse
        return layers


@frozen(kw_only=True, eq=False)
class _Cut:
    """``slots`` dealt to ``stages``; the end stages give one up for the embedding and the head."""

    stages: Column
    base: Column
    extra: Column
    ends: Column

    def start(self, stage: int) -> Column:
        """Layers in front of a stage."""
        slots = stage * self.base + np.minimum(stage, self.extra)
        layers: Column = slots - self.ends * (stage > 0) - self.ends * (stage >= self.stages)
        return layers


def _cut(model: ModelColumns, layout: LayoutColumns) -> _Cut:
    stages = layout.pp * layout.virtual_stages
    ends = (layout.ends > 0) & (stages > 1) & (model.layers + 2 >= 2 * stages)
    slots = model.layers + 2 * ends
    base = np.floor(slots / stages)
    return _Cut(stages=stages, base=base, extra=slots - base * stages, ends=ends.astype(np.float64))


def rank_layers(model: ModelColumns, layout: LayoutColumns, position: Column) -> RankLayers:
    """The layers on pipeline rank ``position``."""
    cut, p, v = _cut(model, layout), layout.pp, layout.virtual_stages
    turned = is_v_placed(layout)
    back = 2 * p - 1 - position
    first = position == 0
    last = np.where(turned, first, position == p - 1)
    longer = np.where(
        turned,
        (position < cut.extra) + (back < cut.extra) * 1.0,
        np.clip(np.ceil((cut.extra - position) / p), 0, v),
    )
    layers = v * cut.base + longer - cut.ends * first - cut.ends * last
    dense = layers
    if np.any(model.moe_layers):
        dense = np.minimum(layers, _dense_in_front(model, layout, cut, position))
        dense = np.where(model.moe_layers > 0, dense, layers)
    return RankLayers(
        dense=dense, sparse=layers - dense, first=first.astype(np.float64), last=last.astype(np.float64)
    )


def uneven_rank(model: ModelColumns, layout: LayoutColumns) -> Column:
    """The rank at the edge of those that have a layer more than others; 0 if all have as many.

    They are the first ones, of which this is the last; in a V that is longer than its way up, the last ones.
    """
    extra, p = _cut(model, layout).extra, layout.pp
    last = np.maximum(extra - 1, 0.0) % p
    rank: Column = np.where(is_v_placed(layout) & (extra > p), 2 * p - extra, last)
    return rank


def first_sparse_rank(model: ModelColumns, layout: LayoutColumns) -> Column:
    """The rank of the first stage that has experts alone."""
    cut = _cut(model, layout)
    slots = _in_front(model) + cut.ends
    in_longer = cut.extra * (cut.base + 1)
    behind = cut.extra + np.ceil((slots - in_longer) / np.maximum(1.0, cut.base))
    stage = np.where(slots <= in_longer, np.ceil(slots / (cut.base + 1)), behind)
    back = is_v_placed(layout) & (stage >= layout.pp)
    rank: Column = np.where(back, np.maximum(2 * layout.pp - 1 - stage, 0), stage % layout.pp)
    return rank


def _in_front(model: ModelColumns) -> Column:
    """Dense layers in front of the first with experts."""
    return np.where(model.moe_layers > 0, model.layers - model.moe_layers, 0.0)


def _dense_in_front(model: ModelColumns, layout: LayoutColumns, cut: _Cut, position: Column) -> Column:
    """Dense layers on the rank: those of its stages that lie among the first of the model."""
    dense, p = _in_front(model), layout.pp
    found: Column = np.zeros(np.broadcast_shapes(*(np.shape(c) for c in (position, cut.stages, cut.base))))
    stage, start = 0, np.zeros_like(found)
    while np.any((start < dense) & (stage < cut.stages)):
        stop = cut.start(stage + 1)
        rank = np.where(is_v_placed(layout) & (stage >= p), 2 * p - 1 - stage, stage % p)
        here = np.clip(np.minimum(stop, dense) - start, 0, None)
        found = found + here * (rank == position) * (stage < cut.stages)
        stage, start = stage + 1, stop
    return found
