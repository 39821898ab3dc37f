"""Seconds of one microbatch through one layer of each kind on one device, forward and backward, by cause.

Attention, dense MLP, experts, embedding and head; what they are made of is in ``block_times``. Ring attention
hides its exchange of keys and values under the attention core (Liu et al. 2023, arXiv:2310.01889).
"""

from __future__ import annotations

import numpy as np
from attrs import frozen

from picotron.planner.block_times import (
    Block,
    Here,
    Product,
    casts_seconds,
    dense_mlp,
    layer_kernels,
    products_seconds,
    tensor_seconds,
    weighted,
)
from picotron.planner.cases import Cases, Column
from picotron.planner.constants import Constants
from picotron.planner.expert_times import down_seconds, expert_block
from picotron.planner.kernels import Rates, attention_seconds, matmul_seconds
from picotron.planner.network import Group, Links, group, ring_seconds, strides


@frozen(kw_only=True, eq=False)
class LayerTimes:
    """One microbatch on one device: of one layer of each kind, and of both ends."""

    attention: Block
    mlp: Block
    experts: Block
    embedding: Block
    head: Block
    last_product: Column  # of the mean layer's forward: its down projection alone
    layer: Block  # the mean decoder layer: attention and its share of dense and expert layers


def layer_times(cases: Cases, constants: Constants, rates: Rates, link: Links) -> LayerTimes:
    """Seconds of one microbatch by kind of layer."""
    layout, model = cases.layout, cases.model
    tokens = layout.micro_batch * cases.work.seq_len / layout.cp
    local = tokens / np.where(layout.sequence_parallel > 0, layout.tp, 1.0)
    here = Here(cases=cases, constants=constants, rates=rates, link=link, tokens=tokens, local=local)
    attention, mlp, experts = _attention(here), _mlp(here), expert_block(here)
    share = model.moe_layers / model.layers
    blocks = [(attention, 1.0), (mlp, 1.0 - share)]
    if np.any(model.moe_layers):
        blocks.append((experts, share))
    return LayerTimes(
        last_product=_last_product(here, share),
        attention=attention,
        mlp=mlp,
        experts=experts,
        embedding=_embedding(here),
        head=_head(here),
        layer=weighted(blocks),
    )


def _last_product(here: Here, share: Column) -> Column:
    """The mean layer's down projection, ``share`` of which are of experts; 0 where nobody leaves it out."""
    cases, model, layout = here.cases, here.cases.model, here.cases.layout
    if not np.any(cases.software.recompute_stops_early):
        return np.zeros(())
    inner = model.intermediate / layout.tp
    dense = matmul_seconds(here.rates, here.tokens, model.hidden, inner, narrow=True)
    mean: Column = dense * (1.0 - share) + down_seconds(here) * share
    return mean


def _attention(here: Here) -> Block:
    """Norm, projections, rotation, attention core, output projection and residual sum."""
    model, layout = here.cases.model, here.cases.layout
    heads, kv_heads = model.heads / layout.tp, np.maximum(model.kv_heads / layout.tp, 1.0)
    products = _projections(here, heads, kv_heads)
    forward, backward = products_seconds(here, products)
    core, core_backward = _core(here, heads)
    elements = here.tokens * (heads + kv_heads) * model.head_dim
    turned = np.where(model.learned_positions > 0, 0.15, 1.0)  # without rotation, copies of heads alone
    rotary = here.passes("rotary", turned * elements)
    moved = here.passes("norm", here.local * model.hidden) + here.passes(
        "residual", here.local * model.hidden
    )
    cast, cast_backward = casts_seconds(here, products)
    around = tensor_seconds(here)
    ring, ring_backward = _ring(here, kv_heads, core, core_backward)
    return Block(
        forward={
            "matmul": forward,
            "attention": core,
            "elementwise": 0.4 * (moved + rotary) + cast,
            "tensor": around,
            "context": ring,
        },
        backward={
            "matmul": backward,
            "attention": core_backward,
            "elementwise": 0.6 * (moved + rotary) + cast_backward,
            "tensor": around,
            "context": ring_backward,
        },
        forward_kernels=0.5 * layer_kernels(here),
        launches=0.5 * layer_kernels(here) * here.ungraphed,
    )


def _projections(here: Here, heads: Column, kv_heads: Column) -> list[Product]:
    """Fused queries, keys and values, or the low-rank pairs of latent attention, and the output's."""
    model, tokens = here.cases.model, here.tokens
    latent = model.kv_rank > 0
    inner = np.where(latent, heads * model.head_dim, (heads + 2.0 * kv_heads) * model.head_dim)
    low_rank = latent & (model.query_rank > 0)
    products = [
        (tokens, inner, np.where(low_rank, model.query_rank, model.hidden), True),
        (tokens, model.hidden, heads * model.value_dim, True),
    ]
    if np.any(latent):
        nope = np.maximum(model.head_dim - model.rope_dim, 0.0)
        products += [
            (here.local, model.query_rank * latent, model.hidden, True),
            (here.local, (model.kv_rank + model.rope_dim) * latent, model.hidden, True),
            (tokens, heads * (nope + model.value_dim) * latent, model.kv_rank, True),
        ]
    return products


def _core(here: Here, heads: Column) -> tuple[Column, Column]:
    """The attention core of the mean layer: some layers may look back no further than a window."""
    cases, model = here.cases, here.cases.model
    full = attention_seconds(cases, here.rates, here.constants, heads)
    if not np.any(model.windowed_layers):
        return full
    near = attention_seconds(
        cases, here.rates, here.constants, heads, np.where(model.window > 0, model.window, np.inf)
    )
    share = model.windowed_layers / model.layers
    return full[0] * (1 - share) + near[0] * share, full[1] * (1 - share) + near[1] * share


def _ring(here: Here, kv_heads: Column, core: Column, core_backward: Column) -> tuple[Column, Column]:
    """What the ring's exchange of keys and values takes beyond the attention it hides under."""
    cases, layout = here.cases, here.cases.layout
    if not np.any(layout.cp > 1):
        return np.zeros(()), np.zeros(())
    where = group(cases, layout.cp, strides(cases)["cp"])
    payload = here.tokens * layout.cp * kv_heads * (cases.model.head_dim + cases.model.value_dim)
    single = np.where(where.size > where.inside, np.minimum(where.inside, 1.0), where.inside)
    alone = ring_seconds(here.link, payload * cases.work.compute_bytes, Group(size=where.size, inside=single))
    lead = here.link.start_seconds * (layout.cp - 1.0)
    forward = np.maximum(alone - core, 0.0) + lead
    backward = np.maximum(2.0 * alone - core_backward, 0.0) + 2.0 * lead
    return forward, backward


def _mlp(here: Here) -> Block:
    """Norm, dense MLP and residual sum."""
    model, tp = here.cases.model, here.cases.layout.tp
    return dense_mlp(here, model.intermediate / tp)


def _embedding(here: Here) -> Block:
    """Looking up rows, and adding their gradients: bytes alone, and the collective over a cut vocabulary."""
    model = here.cases.model
    moved = here.moved(here.tokens * model.hidden * here.cases.work.compute_bytes)
    around = 0.5 * tensor_seconds(here)
    return Block(
        forward={"elementwise": 4.0 * moved, "tensor": around},
        backward={"elementwise": 5.0 * moved, "tensor": around},
        forward_kernels=np.full((), 6.0),
        launches=6.0 * here.ungraphed,
    )


def _head(here: Here) -> Block:
    """Last norm, logits and loss over the vocabulary's part of this rank."""
    cases, model, layout = here.cases, here.cases.model, here.cases.layout
    vocab = model.vocab / layout.tp * (cases.work.trained_head > 0)
    forward, backward = products_seconds(here, [(here.tokens, vocab, model.hidden, False)])
    loss = here.moved(here.constants.by("loss_bytes", cases.software.kernels) * here.tokens * vocab)
    moved = here.passes("norm", here.local * model.hidden)
    around = tensor_seconds(here)
    return Block(
        forward={"matmul": forward, "elementwise": 0.4 * moved + 0.55 * loss, "tensor": 0.5 * around},
        backward={"matmul": backward, "elementwise": 0.6 * moved + 0.45 * loss, "tensor": 0.5 * around},
        forward_kernels=np.full((), 15.0),
        launches=15.0 * here.ungraphed,
    )
