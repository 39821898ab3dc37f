"""Bodies of the dense decoder segments: embedding, attention, MLP and head, forward and backward.

They mirror the runtime's segments step by step. Causal attention is counted as flash kernels run it: half
of the score matrix, and the scores once more in backward (Dao et al. 2022, arXiv:2205.14135).
"""

from __future__ import annotations

from collections.abc import Iterable

from picotron.planner.body import INDEX_BYTES, Dims, Operation, Tensor
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
        ops.kernel("position gradient", d.local_tokens * d.hidden, passes=3, reads=[incoming])
    full = ops.gathered("gather gradient", incoming, keep=True, for_weights=True)
    masks = _vocabulary_masks(ops, reads=[ids]) if d.tp > 1 else []
    held = [*dict.fromkeys((full, incoming)), *masks, ids]
    ops.kernel("table gradient", d.tokens * d.hidden, passes=3, frees=held, reads=held)


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

    def vector(name: str, times: int = 1) -> Tensor:
        return ops.tensor(name, times * d.tokens, itemsize=d.statistics_itemsize)

    top, target, total = vector("top"), vector("target"), vector("total")
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
    if d.tp > 1:
        stacked = vector("target and total", 2)
        ops.kernel("stack", 2 * d.tokens, creates=[stacked], frees=[target, total])
        ops.collective("all_reduce", "sum over vocabulary", stacked.bytes)
        target_and_total = [stacked]
    else:
        target_and_total = [target, total]
    valid, loss = ops.tensor("valid", d.tokens, itemsize=1), vector("loss")
    scalar = ops.tensor("loss_sum", 1, itemsize=8)
    ops.kernel(
        "token loss", d.tokens, passes=6, kernels=5, creates=[valid, loss, scalar], frees=[loss, scalar]
    )
    minus = vector("minus_one")
    ops.kernel(
        "softmax", d.tokens * d.vocab, passes=2, creates=[minus], frees=[minus, *target_and_total, *masks]
    )
    weight = vector("weight")
    ops.kernel(
        "logit gradient",
        d.tokens * d.vocab,
        passes=2,
        kernels=3,
        creates=[weight],
        frees=[weight, valid, labels],
    )
    if work is not logits:
        ops.kernel("from fp32", d.tokens * d.vocab, passes=3, creates=[logits], frees=[work])


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


def _projections(model: ModelSpec, d: Dims) -> list[tuple[str, int]]:
    return [
        ("q", d.heads * d.head_dim),
        ("k", d.kv_heads * d.head_dim),
        ("v", d.kv_heads * d.head_dim),
    ]


def attention_forward(ops: Operations, model: ModelSpec, topology: Topology) -> None:
    """Attention, forward."""
    d = ops.d
    source = ops.gathered("gather attention input", ops.norm(model))
    sizes = _projections(model, d)
    for name, width in sizes:
        label = f"{name}_raw" if model.qk_norm and name != "v" else name
        frees = [source] if name == "v" else []
        ops.matmul(
            f"{name}_proj",
            d.tokens,
            d.hidden,
            width,
            creates=[ops.saved(label, d.tokens * width)],
            frees=frees,
        )
    if model.qk_norm:
        for name, heads in (("q", d.heads), ("k", d.kv_heads)):
            statistics, normed = _head_norm_tensors(ops, name, heads)
            ops.kernel(
                f"{name}_norm",
                d.tokens * heads * d.head_dim,
                passes=5,
                kernels=7,
                creates=[statistics, normed],
            )
    _rotate(ops, model)
    context = ops.saved("context", d.tokens * d.heads * d.head_dim)
    attend(ops, forward=True, creates=[context, log_sum_exp(ops)])
    output_projection(ops, d.heads * d.head_dim)


def _head_norm_tensors(ops: Operations, name: str, heads: int) -> tuple[Tensor, Tensor]:
    d = ops.d
    return ops.saved(f"{name}_inverse", d.tokens * heads), ops.saved(name, d.tokens * heads * d.head_dim)


def log_sum_exp(ops: Operations) -> Tensor:
    """What flash attention keeps of each row of scores."""
    d = ops.d
    return ops.saved("log_sum_exp", d.tokens * d.heads, itemsize=d.statistics_itemsize)


def _rotate(ops: Operations, model: ModelSpec) -> None:
    """Rotary positions on q and k, in place but for half a tensor."""
    d = ops.d
    for name, heads in (("q", d.heads), ("k", d.kv_heads)):
        if model.rope_theta is not None:
            half = ops.tensor(f"{name} half", d.tokens * heads * d.head_dim // 2)
            ops.kernel(
                f"rotate {name}",
                d.tokens * heads * d.head_dim,
                passes=5,
                kernels=5,
                creates=[half],
                frees=[half],
            )


def attend(
    ops: Operations, *, forward: bool, creates: Iterable[Tensor], frees: Iterable[Tensor] = (), v_dim: int = 0
) -> None:
    """Causal flash attention: half of the score matrix; backward computes the scores once more."""
    d = ops.d
    if d.context > 1:
        kv_bytes = 2 * d.tokens * d.kv_heads * d.head_dim * d.itemsize
        steps = (d.context - 1) if forward else 2 * (d.context - 1)
        ops.collective("exchange", "ring of keys and values", steps * kv_bytes, group="cp")
    keys = d.seq_len * d.context
    one = d.batch * d.heads * d.seq_len * (keys + 1)  # 2 · (s · keys / 2) multiply-adds, a unit of head_dim
    widths = (d.head_dim + (v_dim or d.head_dim)) if forward else (3 * d.head_dim + 2 * (v_dim or d.head_dim))
    ops.operations.append(
        Operation(
            name="attention" if forward else "attention backward",
            kind="attention",
            flops=one * widths,
            moved_bytes=(4 if forward else 8) * d.tokens * d.heads * d.head_dim * d.itemsize,
            creates=tuple(creates),
            frees=tuple(frees),
            shape=(d.seq_len, keys, d.head_dim, d.batch * d.heads),
        )
    )


def output_projection(ops: Operations, width: int, *, biased: bool = True) -> None:
    """Row-parallel product into the residual stream."""
    d, y = ops.d, ops.x(1)
    full = ops.partial_sum(y)
    ops.matmul("output projection", d.tokens, width, d.hidden, creates=[full])
    ops.reduced("reduce output", full, y)
    ops.kernel("residual", d.local_tokens * d.hidden, passes=3)


def attention_backward(ops: Operations, model: ModelSpec, topology: Topology) -> None:
    """Attention, backward."""
    d = ops.d
    width = d.heads * d.head_dim
    context, dcontext = ops.saved("context", d.tokens * width), ops.tensor("dcontext", d.tokens * width)
    output_backward(ops, context, width, into="dcontext", bias=model.output_bias)
    sizes = _projections(model, d)
    inputs = [ops.saved(name, d.tokens * size) for name, size in sizes]
    gradients = [ops.tensor(f"d{name}", d.tokens * size) for name, size in sizes]
    attend(ops, forward=False, creates=gradients, frees=[*inputs, context, log_sum_exp(ops), dcontext])
    _rotate(ops, model)
    if model.qk_norm:
        for name, heads in (("q", d.heads), ("k", d.kv_heads)):
            ops.rms_backward(f"{name}_norm backward", d.tokens * heads, d.head_dim)
            raw = ops.saved(f"{name}_raw", d.tokens * heads * d.head_dim)
            statistics, _ = _head_norm_tensors(ops, name, heads)
            ops.kernel("free", 0, kernels=0, frees=[raw, statistics])
    source = ops.gathered("gather attention input", ops.norm_again(model), for_weights=True)
    for (name, size), gradient in zip(sizes, gradients, strict=True):
        ops.matmul(f"{name}_proj weight", size, d.tokens, d.hidden, reads=[gradient, source])
        if model.qkv_bias:
            _bias_gradient(ops, f"{name}_proj", d.tokens, size)
    ops.kernel("free", 0, kernels=0, frees=[source])
    full = ops.dnormed(model)
    for name, size in sizes:
        ops.matmul(
            f"{name}_proj input",
            d.tokens,
            size,
            d.hidden,
            creates=[full] if name == "q" else [],
            frees=gradients if name == "v" else [],
        )
    ops.norm_backward(model, full)


def _bias_gradient(ops: Operations, name: str, tokens: int, width: int) -> None:
    small = ops.tensor(f"{name} dbias", width)
    ops.kernel(f"{name} bias", tokens * width, passes=1, kernels=2, creates=[small], frees=[small])


def output_backward(
    ops: Operations, source: Tensor, width: int, *, into: str, last: bool = False, bias: bool = False
) -> None:
    """Weight and input gradients of the row-parallel product of ``source``.

    ``last``: nobody but the weight's gradient needs ``source``.
    """
    d, incoming = ops.d, ops.g(1)
    if bias:
        _bias_gradient(ops, "output", d.local_tokens, d.hidden)
    full = ops.gathered("gather gradient", incoming, keep=True)
    frees = [source] if last else []
    ops.matmul("output weight", d.hidden, d.tokens, width, frees=frees, reads=[full, source])
    frees = [full] if d.sequence_parallel else []
    ops.matmul(
        "output input", d.tokens, d.hidden, width, creates=[ops.tensor(into, d.tokens * width)], frees=frees
    )


def fused_attention_forward(ops: Operations, model: ModelSpec, topology: Topology) -> None:
    """Fused attention, forward."""
    d = ops.d
    source = ops.gathered("gather attention input", ops.norm(model))
    width = d.heads * d.head_dim
    ops.matmul(
        "c_attn",
        d.tokens,
        d.hidden,
        3 * width,
        creates=[ops.saved("qkv", d.tokens * 3 * width)],
        frees=[source],
    )
    attend(ops, forward=True, creates=[ops.saved("context", d.tokens * width), log_sum_exp(ops)])
    output_projection(ops, width)


def fused_attention_backward(ops: Operations, model: ModelSpec, topology: Topology) -> None:
    """Fused attention, backward."""
    d = ops.d
    width = d.heads * d.head_dim
    context, dcontext = ops.saved("context", d.tokens * width), ops.tensor("dcontext", d.tokens * width)
    output_backward(ops, context, width, into="dcontext", bias=True)
    qkv = ops.saved("qkv", d.tokens * 3 * width)
    parts = [ops.tensor(f"d{name}", d.tokens * width) for name in "qkv"]
    attend(ops, forward=False, creates=parts, frees=[qkv, context, log_sum_exp(ops), dcontext])
    fused = ops.tensor("dqkv", d.tokens * 3 * width)
    ops.kernel("join", d.tokens * 3 * width, creates=[fused], frees=parts)
    _biased_input_backward(ops, model, "c_attn", fused, 3 * width)


def _biased_input_backward(
    ops: Operations, model: ModelSpec, name: str, gradient: Tensor, width: int
) -> None:
    """Backward of the biased column-parallel product after the norm."""
    d = ops.d
    source = ops.gathered(f"gather {name} input", ops.norm_again(model), for_weights=True)
    ops.matmul(f"{name} weight", d.hidden, d.tokens, width, frees=[source], reads=[gradient, source])
    _bias_gradient(ops, name, d.tokens, width)
    full = ops.dnormed(model)
    ops.matmul(f"{name} input", d.tokens, width, d.hidden, creates=[full], frees=[gradient])
    ops.norm_backward(model, full)


def gated_mlp_forward(ops: Operations, model: ModelSpec, topology: Topology) -> None:
    """Gated mlp, forward."""
    d = ops.d
    size = d.tokens * d.intermediate
    source = ops.gathered("gather mlp input", ops.norm(model))
    ops.matmul("gate", d.tokens, d.hidden, d.intermediate, creates=[ops.saved("gate", size)])
    ops.matmul("up", d.tokens, d.hidden, d.intermediate, creates=[ops.saved("up", size)], frees=[source])
    y, product = ops.x(1), ops.tensor("product", size)
    full = ops.partial_sum(y)
    ops.kernel("swiglu", size, passes=5, kernels=2, creates=[product])
    ops.matmul("down", d.tokens, d.intermediate, d.hidden, creates=[full], frees=[product])
    ops.reduced("reduce output", full, y)
    ops.kernel("residual", d.local_tokens * d.hidden, passes=3)


def gated_mlp_backward(ops: Operations, model: ModelSpec, topology: Topology) -> None:
    """Gated mlp, backward."""
    d = ops.d
    size = d.tokens * d.intermediate
    gate, up = ops.saved("gate", size), ops.saved("up", size)
    active, product, dproduct, dgate = (
        ops.tensor(name, size) for name in ("active", "product", "dproduct", "dgate")
    )
    ops.kernel("swiglu again", size, passes=5, kernels=2, creates=[active, product])
    output_backward(ops, product, d.intermediate, into="dproduct", last=True, bias=model.mlp_bias)
    dup = active  # the gradient of up takes its place
    ops.kernel("up gradient", size, passes=6, kernels=2, frees=[up])
    ops.kernel("gate gradient", size, passes=3, creates=[dgate], frees=[dproduct, gate])
    source = ops.gathered("gather mlp input", ops.norm_again(model), for_weights=True)
    for name, gradient in (("gate", dgate), ("up", dup)):
        ops.matmul(f"{name} weight", d.intermediate, d.tokens, d.hidden, reads=[gradient, source])
        if model.mlp_bias:
            _bias_gradient(ops, name, d.tokens, d.intermediate)
    ops.kernel("free", 0, kernels=0, frees=[source])
    full = ops.dnormed(model)
    ops.matmul("gate input", d.tokens, d.intermediate, d.hidden, creates=[full])
    ops.matmul("up input", d.tokens, d.intermediate, d.hidden, frees=[dgate, dup])
    ops.norm_backward(model, full)


def plain_mlp_forward(ops: Operations, model: ModelSpec, topology: Topology) -> None:
    """Plain mlp, forward."""
    d = ops.d
    size = d.tokens * d.intermediate
    source = ops.gathered("gather mlp input", ops.norm(model))
    ops.matmul("fc", d.tokens, d.hidden, d.intermediate, creates=[ops.saved("fc", size)], frees=[source])
    y, active = ops.x(1), ops.tensor("active", size)
    full = ops.partial_sum(y)
    ops.kernel("gelu", size, creates=[active])
    ops.matmul("proj", d.tokens, d.intermediate, d.hidden, creates=[full], frees=[active])
    ops.reduced("reduce output", full, y)
    ops.kernel("residual", d.local_tokens * d.hidden, passes=5, kernels=2)


def plain_mlp_backward(ops: Operations, model: ModelSpec, topology: Topology) -> None:
    """Plain mlp, backward."""
    d = ops.d
    size = d.tokens * d.intermediate
    fc, active, dactive, dfc = (
        ops.saved("fc", size),
        *(ops.tensor(name, size) for name in ("active", "dactive", "dfc")),
    )
    ops.kernel("gelu again", size, creates=[active])
    output_backward(ops, active, d.intermediate, into="dactive", last=True, bias=True)
    ops.kernel("gelu gradient", size, passes=3, creates=[dfc], frees=[dactive, fc])
    _biased_input_backward(ops, model, "fc", dfc, d.intermediate)
