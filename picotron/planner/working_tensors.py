"""What stands for a moment: the highest point of a layer's backward, and of the head, over what is saved.

Each block is walked tensor by tensor. *eager* is what a plan's own bodies say (``attention``, ``mlp``,
``sparse``, ``ends``), *fused* what the autograd functions of Transformer Engine and Megatron-Core do: gate
and up are one product, nothing is computed again. *compiled* runs the eager steps.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from attrs import define, frozen

from picotron.planner.body import INDEX_BYTES
from picotron.planner.cases import LOSSES, Cases, Column
from picotron.planner.held_weights import Widths
from picotron.planner.saved_tensors import EAGER, FUSED, FUSED_SOFTMAX, SavedTensors, Tokens, total

ZERO: Column = np.zeros(())
_COPY, _CHUNKED = LOSSES.index("copy"), LOSSES.index("chunked")


@define(eq=False)
class Walk:
    """Bytes over the start of a block: those that stand now, and the most that stood."""

    live: Column = ZERO
    highest: Column = ZERO

    def make(self, *sizes: Column) -> None:
        """Tensors are born."""
        for size in sizes:
            self.live = self.live + size
        self.highest = np.maximum(self.highest, self.live)

    def free(self, *sizes: Column) -> None:
        """Tensors die."""
        for size in sizes:
            self.live = self.live - size


@frozen(kw_only=True, eq=False)
class Working:
    """Highest bytes in the backward of a block, over the saved tensors of all blocks up to it."""

    attention: Column
    dense: Column
    sparse: Column


@frozen(kw_only=True, eq=False)
class HeadBytes:
    """Of the head, over the saved tensors of the layers: highest bytes, and what it keeps after forward."""

    highest: Column
    kept: Column


@frozen(kw_only=True, eq=False)
class _Block:
    """Sizes in bytes of the tensors around a block, and which steps it takes."""

    local: Column  # a tensor between blocks
    full: Column  # the same of all tokens
    cut: Column  # 1 where the two differ (sequence parallelism)
    gated: Column


def working(cases: Cases, t: Tokens, w: Widths, saved: SavedTensors) -> Working:
    """Of each kind of block."""
    model, layout = cases.model, cases.layout
    fused = cases.software.kernels == FUSED
    block = _Block(
        local=saved.boundary,
        full=t.whole * model.hidden * t.item,
        cut=((layout.sequence_parallel > 0) & (layout.tp > 1)) * 1.0,
        gated=model.gated,
    )

    def walked(by_eager: Callable[[], Column], by_fused: Callable[[], Column]) -> Column:
        """By the kernel set of each case; a walk that no case takes is left out."""
        if fused.all():
            return by_fused()
        return np.where(fused, by_fused(), by_eager()) if fused.any() else by_eager()

    size, narrow = t.whole * w.product * t.item, t.product / t.item
    attention = walked(
        lambda: _eager_attention(cases, t, w, saved, block),
        lambda: _fused_attention(cases, t, w, saved, block),
    )
    dense = walked(lambda: _eager_mlp(size, block), lambda: _fused_mlp(size, size * narrow, block))
    if not np.any(model.moe_layers):
        return Working(attention=attention, dense=dense, sparse=dense)
    size, rows = t.rows * w.expert_product * t.item, t.rows * model.hidden * t.item
    sparse = walked(
        lambda: _eager_experts(size, rows, block), lambda: _fused_experts(size, size * narrow, rows, block)
    )
    return Working(attention=attention, dense=dense, sparse=sparse)


def _eager_mlp(size: Column, block: _Block) -> Column:
    """Backward of an MLP whose product is computed again; ``size`` is that of one of its wide tensors."""
    gated, gathered, walk = block.gated, block.cut * block.full, Walk()
    walk.make(block.local, size * (1 + gated))  # gradient of the output; activation and product again
    walk.make(gathered)
    walk.free(size)
    walk.make(size)  # the product's gradient
    walk.free(gathered, (1 + gated) * size)  # gradients take the place of gate and up, or the only product
    return _eager_norm(walk, (1 + gated) * size, block)


def _eager_experts(size: Column, rows: Column, block: _Block) -> Column:
    """Backward of experts; ``rows`` is the size of all copies of tokens, which stand for the tokens."""
    walk = Walk()
    walk.make(block.local, rows)  # gradient of the output, by token and by copy
    walk.free(rows)  # the experts' output
    walk.make(size)
    walk.free(size)  # product again
    walk.make(size)  # its gradient
    walk.free(rows)
    walk.make(block.gated * size)  # gradient of gate
    walk.free((1 + block.gated) * size)
    walk.make(rows)  # gradient of the copies
    walk.free((1 + block.gated) * size, rows)
    return _eager_norm(walk, rows, block)


def _eager_norm(walk: Walk, gradients: Column, block: _Block) -> Column:
    """From the gradients of the products that read the normed input to that of the block's input."""
    gathered = block.cut * block.full
    walk.make(block.local)  # normed again
    walk.make(gathered)
    walk.free(block.local, gathered)
    walk.make(block.full)
    walk.free(gradients)
    walk.make(block.cut * block.local)
    walk.free(gathered)
    walk.make(block.local)
    return walk.highest


def _eager_attention(cases: Cases, t: Tokens, w: Widths, saved: SavedTensors, block: _Block) -> Column:
    """Backward of attention of any kind; gradients take the place of queries, keys and values."""
    walk, inputs = _core(cases, t, w, saved, block)
    return _eager_norm(walk, inputs, block)


def _fused_mlp(size: Column, saved_product: Column, block: _Block) -> Column:
    """Backward of an MLP that kept its product and its normed input."""
    up, gathered, walk = (1 + block.gated) * size, block.cut * block.full, Walk()
    walk.make(block.local, gathered, size)
    walk.free(gathered, saved_product)
    walk.make(up)
    walk.free(size, up)
    walk.make(gathered, block.full)  # the normed input, and its gradient
    return walk.highest


def _fused_experts(size: Column, saved_product: Column, rows: Column, block: _Block) -> Column:
    """Backward of experts, whose copies of tokens stand for the tokens."""
    up, walk = (1 + block.gated) * size, Walk()
    walk.make(block.local, rows, size)  # gradient of the output, by token and by copy; of the product
    walk.free(rows, saved_product)
    walk.make(up)
    walk.free(size, up)
    walk.make(rows)  # gradient of the copies
    return walk.highest


def _fused_attention(cases: Cases, t: Tokens, w: Widths, saved: SavedTensors, block: _Block) -> Column:
    """Backward of attention whose normed input was kept."""
    walk, _ = _core(cases, t, w, saved, block)
    walk.make(block.cut * block.full, block.full)
    return walk.highest


def _core(cases: Cases, t: Tokens, w: Widths, saved: SavedTensors, block: _Block) -> tuple[Walk, Column]:
    """From the gradient of the output to those of queries, keys and values, whose size is given too."""
    context, inputs = t.whole * w.context * t.item, t.whole * (w.query + w.key + w.value) * t.item
    gathered, scores, walk = block.cut * block.full, _scores(cases, saved), Walk()
    walk.make(block.local, gathered, context)
    walk.free(gathered)
    walk.make(inputs, scores)
    walk.free(scores, inputs, 2 * context, total(saved.core))
    return walk, inputs


def _scores(cases: Cases, saved: SavedTensors) -> Column:
    """The gradient of the softmax, where attention is not flash."""
    return (cases.software.attention <= FUSED_SOFTMAX) * saved.core["softmax"]


def head_bytes(cases: Cases, t: Tokens, w: Widths) -> HeadBytes:
    """Final norm, head and loss.

    The loss is computed over the logits, on a copy in fp32, which backward scales and narrows, or for a few
    tokens at a time (then neither logits nor copy are counted). In *compiled* the gradient stands beside the
    copy. *eager* does all in forward and keeps the gradient of the logits alone.
    """
    model, software = cases.model, cases.software
    eager, fused = software.kernels == EAGER, software.kernels == FUSED
    cut = (cases.layout.sequence_parallel > 0) & (cases.layout.tp > 1)
    local, full = (count * model.hidden * t.item for count in (t.local, t.whole))
    logits = np.where(software.loss == _CHUNKED, 0.0, t.whole * w.vocab * t.item)
    copied = (software.loss == _COPY) & (t.wide > t.item)
    copy = copied * t.whole * w.vocab * t.wide
    stands = local * (1 + fused) + t.whole * INDEX_BYTES  # the norm's input and output, labels
    gathered = np.where(cut, full, np.where(fused, 0.0, local))
    forward = logits + np.maximum(gathered, copy)
    in_place = np.where(copied & ~eager, copy, logits)  # what forward leaves
    scaled = np.where(copied & ~eager, np.where(fused, logits, copy), 0.0)  # beside it, for a moment
    # eager frees what it multiplied before it makes the next; fused gathers while it multiplies
    products = np.where(eager, np.maximum(gathered + eager * cut * local, full), gathered + full)
    gradients = np.where(copied & ~eager, logits, in_place) + products
    backward = np.maximum(in_place + scaled, gradients)
    trained = cases.work.trained_head
    return HeadBytes(
        highest=trained * (stands + np.maximum(forward, backward)), kept=trained * (stands + in_place)
    )
