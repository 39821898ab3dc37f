"""Bodies of the model's ends, forward and backward: embedding, and head with the loss over the vocabulary.

They mirror the runtime's segments step by step. Under tensor parallelism each rank has a slice of the
vocabulary: the loss meets twice, for the highest logit and for the sums.

A loss in chunks of tokens never has all logits: each chunk's are made, become their gradient and are
multiplied at once, into the gradients of the normed input (which is all that stays) and of the table. So a
head's products for its weight stand in F, and its B, or I, has the norm alone.
"""

from __future__ import annotations

from collections.abc import Iterable

from picotron.planner.body import INDEX_BYTES, Tensor
from picotron.planner.layout import even_ranges
from picotron.planner.model import ModelSpec
from picotron.planner.operations import Operations
from picotron.planner.products import input_backward
from picotron.planner.topology import Topology


def _token_ids(ops: Operations) -> Tensor:
    return ops.tensor("token_ids", ops.d.tokens, "data", INDEX_BYTES)


def embedding_forward(ops: Operations, model: ModelSpec, topology: Topology) -> None:
    """Embedding, forward."""
    d, y = ops.d, ops.x(1)
    ops.kernel("load tokens", d.tokens, creates=[_token_ids(ops)])
    full = ops.partial_sum(y)
    if d.tp == 1:
        ops.kernel("lookup", d.tokens * d.hidden, creates=[full])
    else:
        masks = _vocabulary_masks(ops, d.tokens)
        ops.kernel("lookup", d.tokens * d.hidden, passes=4, kernels=2, creates=[full], frees=masks)
    ops.reduced("reduce embedding", full, y)
    if model.rope_theta is None:
        rows = ops.tensor("positions", d.local_tokens * d.hidden)
        ops.kernel(
            "add positions", d.local_tokens * d.hidden, passes=5, kernels=2, creates=[rows], frees=[rows]
        )


def _vocabulary_masks(ops: Operations, tokens: int, reads: Iterable[Tensor] = ()) -> list[Tensor]:
    """Which of ``tokens`` fall into this rank's slice of the vocabulary."""
    local, outside = (
        ops.tensor("local_ids", tokens, itemsize=INDEX_BYTES),
        ops.tensor("outside", tokens, itemsize=1),
    )
    below = ops.tensor("below", tokens, itemsize=1)
    ops.kernel(
        "vocabulary slice",
        tokens,
        passes=4,
        kernels=5,
        creates=[local, outside, below],
        frees=[below],
        reads=reads,
    )
    return [local, outside]


def embedding_backward(ops: Operations, model: ModelSpec, topology: Topology) -> None:
    """Embedding, backward: weight gradients alone."""
    d, incoming, ids = ops.d, ops.g(1), _token_ids(ops)
    if model.rope_theta is None:
        wide = _wide(ops, "wide position gradient", d.local_tokens)
        size = d.local_tokens * d.hidden
        ops.kernel("position gradient", size, passes=3, creates=wide, frees=wide, reads=[incoming])
    full = ops.gathered("gather gradient", incoming, keep=True, for_weights=True)
    masks = _vocabulary_masks(ops, d.tokens, reads=[ids]) if d.tp > 1 else []
    held = [*dict.fromkeys((full, incoming)), *masks, ids]
    wide = _wide(ops, "wide gradient", d.tokens)
    ops.kernel(
        "table gradient", d.tokens * d.hidden, passes=3, creates=wide, frees=[*wide, *held], reads=held
    )


def _wide(ops: Operations, name: str, tokens: int) -> list[Tensor]:
    """A gradient of ``tokens`` in the format in which a table's is accumulated, where that is another."""
    d = ops.d
    return [ops.tensor(name, tokens * d.hidden, itemsize=d.gradient_itemsize)] if d.casts_gradients else []


def head_forward(ops: Operations, model: ModelSpec, topology: Topology) -> None:
    """Head, forward."""
    d = ops.d
    labels = ops.tensor("labels", d.tokens, "data", INDEX_BYTES)
    ops.kernel("load labels", d.tokens, creates=[labels])
    source = ops.gathered("gather head input", ops.norm(model))
    if d.loss_chunks == 1:
        _logit_gradient(ops, d.tokens, ops.saved("logits", d.tokens * d.vocab), [source])
        ops.kernel("free", 0, kernels=0, frees=[labels])
        return
    full = ops.dnormed() if d.sequence_parallel else _saved_gradient(ops)
    ops.kernel("room for gradients", 0, kernels=0, creates=[full])
    for first, stop in even_ranges(d.tokens, d.loss_chunks):
        tokens = stop - first
        logits = ops.tensor("logits", tokens * d.vocab)
        _logit_gradient(ops, tokens, logits)
        ops.matmul("head weight", d.vocab, tokens, d.hidden, adds=True)
        ops.matmul("head input", tokens, d.vocab, d.hidden, frees=[logits])
    ops.kernel("free", 0, kernels=0, frees=[source])
    ops.reduced("reduce gradient", full, _saved_gradient(ops))
    ops.kernel("free", 0, kernels=0, frees=[labels])


def _saved_gradient(ops: Operations) -> Tensor:
    """What a head whose loss comes in chunks leaves: the gradient of the normed input."""
    return ops.saved("head gradient", ops.d.local_tokens * ops.d.hidden)


def _logit_gradient(ops: Operations, tokens: int, logits: Tensor, frees: Iterable[Tensor] = ()) -> None:
    """Logits of ``tokens``, then their gradient in ``logits``; ``frees`` die with the product."""
    d = ops.d
    ops.matmul("head", tokens, d.hidden, d.vocab, creates=[logits], frees=frees)
    if d.compiled and d.tp == 1:
        ops.kernel("loss", tokens * d.vocab, passes=3)
        return
    work = logits
    if d.statistics_itemsize != d.itemsize:
        work = ops.tensor("logits32", tokens * d.vocab, itemsize=d.statistics_itemsize)
        ops.kernel("to fp32", tokens * d.vocab, passes=3, creates=[work], frees=[logits])
    _loss(ops, tokens)
    if work is not logits:
        ops.kernel("from fp32", tokens * d.vocab, passes=3, creates=[logits], frees=[work])


def _vector(ops: Operations, name: str, elements: int) -> Tensor:
    """Numbers of tokens, in the precision of statistics."""
    return ops.tensor(name, elements, itemsize=ops.d.statistics_itemsize)


def _loss(ops: Operations, tokens: int) -> None:
    """From logits of ``tokens`` to their gradient, in their place."""
    d = ops.d
    target_and_total, masks = _softmax_sums(ops, tokens)
    valid, loss = ops.tensor("valid", tokens, itemsize=1), _vector(ops, "loss", tokens)
    scalar = ops.tensor("loss_sum", 1, itemsize=8)
    ops.kernel("token loss", tokens, passes=6, kernels=5, creates=[valid, loss, scalar], frees=[loss, scalar])
    minus = _vector(ops, "minus_one", tokens)
    spent = [minus, *target_and_total, *masks]
    ops.kernel("softmax", tokens * d.vocab, passes=2, creates=[minus], frees=spent)
    weight = _vector(ops, "weight", tokens)
    ops.kernel(
        "logit gradient", tokens * d.vocab, passes=2, kernels=3, creates=[weight], frees=[weight, valid]
    )


def _softmax_sums(ops: Operations, tokens: int) -> tuple[list[Tensor], list[Tensor]]:
    """Each token's own logit and sum of exponentials over the whole vocabulary; and what labels became."""
    d = ops.d
    top, target, total = (_vector(ops, name, tokens) for name in ("top", "target", "total"))
    ops.kernel("row maximum", tokens * d.vocab, passes=1, creates=[top])
    if d.tp > 1:
        ops.collective("all_reduce", "maximum over vocabulary", top.bytes)
    ops.kernel("shift", tokens * d.vocab, frees=[top])
    if d.tp > 1:
        masks = _vocabulary_masks(ops, tokens)
    else:
        masks = [ops.tensor("safe_labels", tokens, itemsize=INDEX_BYTES)]
        ops.kernel("labels", tokens, creates=masks)
    ops.kernel("target logit", tokens, creates=[target])
    ops.kernel("exponentials", tokens * d.vocab, passes=3, kernels=2, creates=[total])
    if d.tp == 1:
        return [target, total], masks
    stacked = _vector(ops, "target and total", 2 * tokens)
    ops.kernel("stack", 2 * tokens, creates=[stacked], frees=[target, total])
    ops.collective("all_reduce", "sum over vocabulary", stacked.bytes)
    return [stacked], masks


def head_backward(ops: Operations, model: ModelSpec, topology: Topology) -> None:
    """Head, backward; of a loss in chunks the norm's alone."""
    d = ops.d
    ops.is_last = True
    if d.loss_chunks > 1:
        ops.local_norm_backward(model, _saved_gradient(ops))
        return
    logits = ops.saved("logits", d.tokens * d.vocab)

    def weights(source: Tensor) -> None:
        ops.matmul("head weight", d.vocab, d.tokens, d.hidden, reads=[logits, source])

    def inputs(full: Tensor) -> None:
        ops.matmul("head input", d.tokens, d.vocab, d.hidden, creates=[full])

    input_backward(ops, model, "head", [logits], weights, inputs)
