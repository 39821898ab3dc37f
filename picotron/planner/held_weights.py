"""Elements of weights that one rank holds, by what they belong to and over how many ranks they are copied.

Column- and row-parallel matrices are cut over tp, experts over ep * etp; norms, biases of row-parallel
matrices, latent projections, routers and position tables are whole on every rank (``tensor``, ``layout``).
Sources: Shoeybi et al. 2019, arXiv:1909.08053; DeepSeek-AI 2024, arXiv:2405.04434; Lepikhin et al. 2020,
GShard, arXiv:2006.16668.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from attrs import frozen

from picotron.planner.cases import Column, LayoutColumns, ModelColumns
from picotron.planner.stage_columns import RankLayers


@frozen(kw_only=True, eq=False)
class Widths:
    """Output widths on one rank, in elements a token."""

    query: Column
    key: Column
    value: Column  # of all value heads on the rank
    context: Column
    up: Column  # of a dense MLP's first product, gate and up together
    product: Column  # of a dense MLP, which its second product reads
    shared_up: Column
    shared_product: Column
    expert_up: Column
    expert_product: Column
    vocab: Column
    latent: Column  # 1 under latent attention


def widths(model: ModelColumns, layout: LayoutColumns) -> Widths:
    """The widths on tensor-parallel rank 0, which holds the largest slices."""
    tp, etp = layout.tp, layout.etp
    latent, parts = model.kv_rank > 0, 1 + model.gated
    heads = model.heads / tp
    kv_heads = np.where(latent, heads, np.maximum(1.0, model.kv_heads / tp))
    product = np.ceil(model.intermediate / tp)
    shared, expert = np.ceil(model.shared_intermediate / tp), np.ceil(model.expert_intermediate / etp)
    return Widths(
        query=heads * model.head_dim,
        key=kv_heads * model.head_dim,
        value=kv_heads * model.value_dim,
        context=heads * model.value_dim,
        up=parts * product,
        product=product,
        shared_up=parts * shared,
        shared_product=shared,
        expert_up=parts * expert,
        expert_product=expert,
        vocab=np.ceil(model.vocab / tp),
        latent=latent.astype(np.float64),
    )


@frozen(kw_only=True, eq=False)
class LayerWeights:
    """Elements of one layer on a rank. ``matrices``: elements of each matrix, by name."""

    attention: Column
    dense: Column  # the MLP of a dense layer
    shared: Column  # router and shared experts of a sparse layer
    experts: Column  # of a sparse layer on this expert-parallel rank
    matrices: Mapping[str, Column]


def layer_weights(model: ModelColumns, layout: LayoutColumns, w: Widths) -> LayerWeights:
    """The elements of one layer's parts."""
    h, latent = model.hidden, w.latent
    head_values = model.head_dim - model.rope_dim + model.value_dim
    keys_values = np.where(latent, model.heads / layout.tp * head_values, w.key + w.value)
    compressed = model.query_rank > 0
    down = latent * (h * (model.kv_rank + model.rope_dim + compressed * model.query_rank))
    query_input = np.where(latent * compressed, model.query_rank, h)
    key_input = np.where(latent, model.kv_rank, h)
    matrices = {
        "down": down,
        "query, key and value": query_input * w.query + key_input * keys_values,
        "output": w.context * h,
        "up": h * w.up,
        "product": w.product * h,
        "shared up": h * w.shared_up,
        "shared product": w.shared_product * h,
        "expert up": h * w.expert_up,
        "expert product": w.expert_product * h,
    }
    norm = h * (1 + model.layer_norm)
    latent_norms = latent * (model.kv_rank + compressed * model.query_rank)
    attention_biases = model.biases * (w.query + w.key + w.value + h)
    attention = (
        norm + latent_norms + attention_biases + down + matrices["query, key and value"] + matrices["output"]
    )
    return LayerWeights(
        attention=attention,
        dense=norm + matrices["up"] + matrices["product"] + model.biases * (w.up + h),
        shared=norm + h * model.experts + matrices["shared up"] + matrices["shared product"],
        experts=np.ceil(model.experts / layout.ep) * (matrices["expert up"] + matrices["expert product"]),
        matrices=matrices,
    )


@frozen(kw_only=True, eq=False)
class HeldWeights:
    """Elements on one rank: ``common`` to all ranks of dp * cp, and ``experts`` of its own."""

    common: Column
    experts: Column
    table: Column  # of ``common``: embedding, head and positions
    largest_layer: Column  # of both together


def held_weights(
    model: ModelColumns, layout: LayoutColumns, w: Widths, layer: LayerWeights, layers: RankLayers
) -> HeldWeights:
    """The weights of the rank that holds ``layers``. A tied table is one where its ends share the rank."""
    table = w.vocab * model.hidden
    copies = layers.first + layers.last - model.tied * layers.first * layers.last
    ends = copies * table + layers.first * model.learned_positions * model.hidden
    final_norm = layers.last * model.hidden * (1 + model.layer_norm)
    own = layers.all * layer.attention + layers.dense * layer.dense + layers.sparse * layer.shared
    dense_size, sparse_size = layer.dense, layer.shared + layer.experts
    mlp = np.maximum((layers.dense > 0) * dense_size, (layers.sparse > 0) * sparse_size)
    return HeldWeights(
        common=own + ends + final_norm,
        experts=layers.sparse * layer.experts,
        table=ends,
        largest_layer=layer.attention + mlp,
    )
