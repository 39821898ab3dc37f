"""Bodies of attention, with projections apart or fused (GPT-2), forward and backward.

They mirror the runtime's segments step by step. Causal attention is counted as flash kernels run it: half
of the score matrix, and the scores once more in backward (Dao et al. 2022, arXiv:2205.14135).
"""

from __future__ import annotations

from collections.abc import Iterable

from picotron.planner.body import Dims, Operation, Tensor
from picotron.planner.model import ModelSpec
from picotron.planner.operations import Operations
from picotron.planner.products import bias_gradient, biased_input_backward, output_backward, output_projection
from picotron.planner.topology import Topology


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
    inverse = ops.saved(f"{name}_inverse", d.tokens * heads, itemsize=d.statistics_itemsize)
    return inverse, ops.saved(name, d.tokens * heads * d.head_dim)


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
            bias_gradient(ops, f"{name}_proj", d.tokens, size)
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
    biased_input_backward(ops, model, "c_attn", fused, 3 * width)
