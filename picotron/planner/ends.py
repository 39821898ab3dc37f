"""Bodies of the model's ends, forward and backward: embedding, and head with the loss over the vocabulary.

They mirror the runtime's segments step by step. Under tensor parallelism each rank has a slice of the
vocabulary: the loss meets twice, for the highest logit and for the sums.
"""

from __future__ import annotations

from collections.abc import Iterable

from picotron.planner.body import INDEX_BYTES, Tensor
from picotron.planner.model import ModelSpec
from picotron.planner.operations import Operations
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
        masks = _vocabulary_masks(ops)
        ops.kernel("lookup", d.tokens * d.hidden, passes=4, kernels=2, creates=[full], frees=masks)
    ops.reduced("reduce embedding", full, y)
    if model.rope_theta is None:
        rows = ops.tensor("positions", d.local_tokens * d.hidden)
        ops.kernel(
            "add positions", d.local_tokens * d.hidden, passes=5, kernels=2, creates=[rows], frees=[rows]
        )


def _vocabulary_masks(ops: Operations, reads: Iterable[Tensor] = ()) -> list[Tensor]:
    """Which tokens fall into this rank's slice of the vocabulary."""
    d = ops.d
    local, outside = (
        ops.tensor("local_ids", d.tokens, itemsize=INDEX_BYTES),
        ops.tensor("outside", d.tokens, itemsize=1),
    )
    below = ops.tensor("below", d.tokens, itemsize=1)
    ops.kernel(
        "vocabulary slice",
        d.tokens,
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
        reads = [incoming, *wide]
        ops.kernel(
            "position gradient", d.local_tokens * d.hidden, passes=3, creates=wide, frees=wide, reads=reads
        )
    full = ops.gathered("gather gradient", incoming, keep=True, for_weights=True)
    masks = _vocabulary_masks(ops, reads=[ids]) if d.tp > 1 else []
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
    logits = ops.saved("logits", d.tokens * d.vocab)
    ops.matmul("head", d.tokens, d.hidden, d.vocab, creates=[logits], frees=[source])
    work = logits
    if d.statistics_itemsize != d.itemsize:
        work = ops.tensor("logits32", d.tokens * d.vocab, itemsize=d.statistics_itemsize)
        ops.kernel("to fp32", d.tokens * d.vocab, passes=3, creates=[work], frees=[logits])
    _loss(ops, labels)
    if work is not logits:
        ops.kernel("from fp32", d.tokens * d.vocab, passes=3, creates=[logits], frees=[work])


def _vector(ops: Operations, name: str, times: int = 1) -> Tensor:
    """A number of each token, in the precision of statistics."""
    return ops.tensor(name, times * ops.d.tokens, itemsize=ops.d.statistics_itemsize)


def _loss(ops: Operations, labels: Tensor) -> None:
    """From logits to their gradient, in their place."""
    d = ops.d
    target_and_total, masks = _softmax_sums(ops)
    valid, loss = ops.tensor("valid", d.tokens, itemsize=1), _vector(ops, "loss")
    scalar = ops.tensor("loss_sum", 1, itemsize=8)
    ops.kernel(
        "token loss", d.tokens, passes=6, kernels=5, creates=[valid, loss, scalar], frees=[loss, scalar]
    )
    minus = _vector(ops, "minus_one")
    spent = [minus, *target_and_total, *masks]
    ops.kernel("softmax", d.tokens * d.vocab, passes=2, creates=[minus], frees=spent)
    weight = _vector(ops, "weight")
    spent = [weight, valid, labels]
    ops.kernel("logit gradient", d.tokens * d.vocab, passes=2, kernels=3, creates=[weight], frees=spent)


def _softmax_sums(ops: Operations) -> tuple[list[Tensor], list[Tensor]]:
    """Each token's own logit and sum of exponentials over the whole vocabulary; and what labels became."""
    d = ops.d
    top, target, total = _vector(ops, "top"), _vector(ops, "target"), _vector(ops, "total")
    ops.kernel("row maximum", d.tokens * d.vocab, passes=1, creates=[top])
    if d.tp > 1:
        ops.collective("all_reduce", "maximum over vocabulary", top.bytes)
    ops.kernel("shift", d.tokens * d.vocab, frees=[top])
    if d.tp > 1:
        masks = _vocabulary_masks(ops)
    else:
        masks = [ops.tensor("safe_labels", d.tokens, itemsize=INDEX_BYTES)]
        ops.kernel("labels", d.tokens, creates=masks)
    ops.kernel("target logit", d.tokens, creates=[target])
    ops.kernel("exponentials", d.tokens * d.vocab, passes=3, kernels=2, creates=[total])
    if d.tp == 1:
        return [target, total], masks
    stacked = _vector(ops, "target and total", 2)
    ops.kernel("stack", 2 * d.tokens, creates=[stacked], frees=[target, total])
    ops.collective("all_reduce", "sum over vocabulary", stacked.bytes)
    return [stacked], masks


def head_backward(ops: Operations, model: ModelSpec, topology: Topology) -> None:
    """Head, backward."""
    d = ops.d
    ops.is_last = True
    logits = ops.saved("logits", d.tokens * d.vocab)
    source = ops.gathered("gather head input", ops.norm_again(model), for_weights=True)
    ops.matmul("head weight", d.vocab, d.tokens, d.hidden, frees=[source], reads=[logits, source])
    full = ops.dnormed(model)
    ops.matmul("head input", d.tokens, d.vocab, d.hidden, creates=[full], frees=[logits])
    ops.norm_backward(model, full)
