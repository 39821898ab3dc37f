"""What forward leaves for backward, by name, in every kind of block: bytes of one microbatch on one rank.

Three kernel sets. *eager* is what this package's own runtime keeps (``attention``, ``mlp``, ``sparse``): a
block's input, not its normed form, and the two halves of a gated MLP, not their product; both are computed
again. *compiled* keeps the same, as a compiler that fuses pointwise work into its neighbours recomputes it in
backward. *fused* keeps what Transformer Engine and Megatron-Core keep: also each norm's output and the MLP's
product, in the format in which products read them. Attention keeps its softmax (unfused) or one number a row
(flash).

Sources: Korthikanti et al. 2022, arXiv:2205.05198, section 4 (by name and size, the unfused block); Dao et
al. 2022, arXiv:2205.14135 (log-sum-exp); DeepSeek-AI 2024, arXiv:2405.04434 (latent attention).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from attrs import frozen

from picotron.planner.body import INDEX_BYTES
from picotron.planner.cases import (
    ATTENTIONS,
    KERNEL_SETS,
    PRODUCT_FORMATS,
    RECOMPUTES,
    Cases,
    Column,
    ModelColumns,
)
from picotron.planner.held_weights import Widths

EAGER, FUSED, COMPILED = range(len(KERNEL_SETS))
UNFUSED, FUSED_SOFTMAX = ATTENTIONS.index("unfused"), ATTENTIONS.index("fused-softmax")
NARROW_FORMATS = ("fp8", "mxfp8", "fp8-blockwise", "nvfp4")
BEFORE_NORMS = "queries and keys before their norms"
Tensors = Mapping[str, Column]


@frozen(kw_only=True, eq=False)
class Tokens:
    """Tokens of a microbatch, and bytes of an element."""

    whole: Column  # in the products of a tensor-parallel group
    local: Column  # between blocks: a share of them under sequence parallelism
    rows: Column  # copies that this rank's experts see
    seq_len: Column  # of one sequence over all context-parallel ranks
    item: Column  # bytes of an element
    wide: Column  # bytes of a softmax statistic
    product: Column  # bytes of an element that a product reads


def tokens(cases: Cases, *, imbalance: float = 1.0) -> Tokens:
    """The tokens; ``imbalance`` is what the fullest expert rank sees over the mean."""
    work, layout, model = cases.work, cases.layout, cases.model
    whole = layout.micro_batch * work.seq_len / layout.cp
    local = np.where((layout.sequence_parallel > 0) & (layout.tp > 1), whole / layout.tp, whole)
    narrow = np.isin(work.product_format, [PRODUCT_FORMATS.index(name) for name in NARROW_FORMATS])
    busiest = np.minimum(layout.ep, np.maximum(1.0, imbalance))
    return Tokens(
        whole=whole,
        local=local,
        rows=local * model.top_k * layout.etp * busiest,
        seq_len=np.asarray(work.seq_len),
        item=np.asarray(work.compute_bytes),
        wide=np.maximum(4.0, work.compute_bytes),
        product=np.where(narrow & (cases.software.kernels == FUSED), 1.0, work.compute_bytes),
    )


@frozen(kw_only=True, eq=False)
class SavedTensors:
    """Bytes that one microbatch leaves in one block of each kind, by the tensors' names."""

    attention: Tensors
    core: Tensors  # of the attention core alone, which selective recompute drops
    dense: Tensors
    sparse: Tensors
    embedding: Tensors
    boundary: Column  # a block's input


def saved_tensors(cases: Cases, t: Tokens, w: Widths) -> SavedTensors:
    """The tables of all kinds of blocks. The input of a block is counted in the block before it."""
    model, kernels = cases.model, cases.software.kernels
    fused = kernels == FUSED
    narrow = fused & (t.product < t.item)
    boundary = t.local * model.hidden * t.item
    # a norm's row statistics: fp32, in eager fp64 beside activations of that width
    row = t.local * np.where(kernels == EAGER, t.wide, 4.0) * (1 + model.layer_norm)
    normed = fused * t.local * model.hidden * t.product
    masks = t.local * model.hidden * (fused & _has_dropout(cases))  # dropout: a byte an element
    norm = {"row statistics": row, "normed input": normed}
    return SavedTensors(
        attention={
            "input": boundary,
            **norm,
            **_latent(cases, t, w),
            "query": t.whole * w.query * t.item,
            "key": t.whole * w.key * t.item,
            "value": t.whole * w.value * t.item,
            "context": t.whole * w.context * t.item,
            "context in the product's format": narrow * t.whole * w.context * t.product,
            "dropout mask": masks,
            BEFORE_NORMS: model.head_norms
            * t.whole
            * ((w.query + w.key) * t.item + _heads(model, w) * t.wide),
        },
        core=_core(cases, t),
        dense={
            "input": boundary,
            **norm,
            "up": t.whole * w.up * t.item,
            "product": fused * t.whole * w.product * t.product,
            "dropout mask": masks,
        },
        sparse={"input": boundary, **norm, **_experts(cases, t, w)},
        embedding={"token ids": t.whole * INDEX_BYTES},
        boundary=boundary,
    )


def _heads(model: ModelColumns, w: Widths) -> Column:
    """Heads of queries and of keys on a rank: as many statistics of their norms a token."""
    heads: Column = (w.query + w.key) / model.head_dim
    return heads


def _has_dropout(cases: Cases) -> Column:
    """GPT-like models are trained with dropout where attention is not flash (Narayanan et al. 2021)."""
    return (cases.model.biases > 0) & (cases.software.attention <= FUSED_SOFTMAX)


def _latent(cases: Cases, t: Tokens, w: Widths) -> Tensors:
    """The compressed query and keys, and in *fused* their normed forms, which the next products read."""
    model = cases.model
    fused = cases.software.kernels == FUSED
    per_token = w.latent * t.whole
    return {
        "compressed query": per_token * model.query_rank * t.item,
        "compressed keys": per_token * (model.kv_rank + model.rope_dim) * t.item,
        "normed compressed query": fused * per_token * model.query_rank * t.product,
        "normed compressed keys": fused * per_token * model.kv_rank * t.product,
    }


def _core(cases: Cases, t: Tokens) -> Tensors:
    """What the attention core keeps beside query, key, value and context."""
    model, layout, attention = cases.model, cases.layout, cases.software.attention
    rows = t.whole * model.heads / layout.tp
    unfused = attention <= FUSED_SOFTMAX
    scores = unfused * rows * t.seq_len
    dropout = scores * _has_dropout(cases)
    return {
        "softmax": scores * t.item,
        "scores": scores * (attention == UNFUSED) * t.item,
        "dropped softmax": dropout * t.item,
        "softmax dropout mask": dropout,
        "log-sum-exp": ~unfused * rows * t.wide,
    }


def _experts(cases: Cases, t: Tokens, w: Widths) -> Tensors:
    """Router, copies of tokens by expert, and the experts' products (``rows`` copies in all)."""
    model, kernels = cases.model, cases.software.kernels
    fused = kernels == FUSED
    return {
        "router scores": t.local * model.experts * t.wide,
        "dispatched": t.rows * model.hidden * t.product,
        "expert up": t.rows * w.expert_up * t.item,
        "expert product": fused * t.rows * w.expert_product * t.product,
        # where the router's weight is applied in the experts' activation their output need not be kept
        "expert output": ~fused * t.rows * model.hidden * t.item,
        "shared up": t.whole * w.shared_up * t.item,
        "shared product": fused * t.whole * w.shared_product * t.product,
    }


def total(tensors: Tensors) -> Column:
    """All bytes of a table."""
    return sum(tensors.values(), start=np.zeros(()))


@frozen(kw_only=True, eq=False)
class LayerBytes:
    """Bytes that one layer keeps of a microbatch.

    ``whole`` after forward without recompute, ``dropped`` of it where it is recomputed; ``for_weights``
    between I and W of a split backward (inputs of products, gradients of outputs). ``grown`` is by how much
    that is more than ``whole`` in the MLP alone.
    """

    whole: Column
    dropped: Column
    for_weights: Column
    grown: Column

    @property
    def kept(self) -> Column:
        """After forward, of a layer that is recomputed if any is."""
        left: Column = self.whole - self.dropped
        return left


def layer_bytes(
    cases: Cases, saved: SavedTensors, mlp: Tensors, gradient: Column, *, beside: Column
) -> LayerBytes:
    """Of the layer whose MLP keeps ``mlp``.

    W needs ``gradient``, that of attention's output, and of the MLP what stands ``beside`` its saved tensors
    or their gradients, which are as large.
    """
    layout, core = cases.layout, total(saved.core)
    fused = cases.software.kernels == FUSED
    whole = total(saved.attention) + core + total(mlp)
    selective = layout.recompute == RECOMPUTES.index("selective")
    full = layout.recompute == RECOMPUTES.index("full")
    dropped = np.where(full, whole - saved.boundary, selective * dropped_core(cases, saved))
    return LayerBytes(
        whole=whole,
        dropped=dropped * 1.0,
        for_weights=whole - core - saved.attention[BEFORE_NORMS] + ~fused * (beside + gradient),
        grown=~fused * (beside + 2 * saved.boundary),
    )


def dropped_core(cases: Cases, saved: SavedTensors) -> Column:
    """What selective recompute drops: the core's own tensors, and the context.

    In *fused* the next product keeps the context, unless it keeps a narrower copy.
    """
    copied = saved.attention["context in the product's format"] > 0
    again = (cases.software.kernels != FUSED) | copied
    dropped: Column = total(saved.core) + again * saved.attention["context"]
    return dropped
