"""Bodies of attention, with projections apart or fused (GPT-2), forward and backward.

They mirror the runtime's segments step by step.
"""

from __future__ import annotations

from picotron.planner.attention_core import Core, log_sum_exp, mark_core, product
from picotron.planner.body import Dims, Tensor
from picotron.planner.heads import heads_backward, heads_forward
from picotron.planner.model import ModelSpec
from picotron.planner.operations import Operations
from picotron.planner.products import bias_gradient, biased_input_backward, output_backward, output_projection
from picotron.planner.ring import ring_backward, ring_forward
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
    inputs = [ops.saved(name, d.tokens * width) for name, width in sizes]
    attend(ops, Core(inputs=inputs, context=context, v_dim=d.head_dim))
    output_projection(ops, d.heads * d.head_dim)


def _head_norm_tensors(ops: Operations, name: str, heads: int) -> tuple[Tensor, Tensor]:
    d = ops.d
    return ops.saved(f"{name}_inverse", d.tokens * heads), ops.saved(name, d.tokens * heads * d.head_dim)


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


def attend(ops: Operations, core: Core) -> None:
    """The attention core, over all ranks that share sequences; ``core.inputs`` stay unless heads are sent."""
    if ops.d.context > 1:
        (ring_forward if ops.d.context_parallel == "ring" else heads_forward)(ops, core)
        return
    product(ops, core, creates=[core.context, log_sum_exp(ops)])
    mark_core(ops, len(ops.operations) - 1)


def attend_backward(ops: Operations, core: Core, dcontext: Tensor) -> None:
    """Its backward; frees all that forward has left, and ``dcontext``."""
    if ops.d.context > 1:
        (ring_backward if ops.d.context_parallel == "ring" else heads_backward)(ops, core, dcontext)
        return
    frees = [*core.inputs, core.context, log_sum_exp(ops), dcontext]
    product(ops, core, backward=True, creates=core.gradients, frees=frees)


def attention_backward(ops: Operations, model: ModelSpec, topology: Topology) -> None:
    """Attention, backward."""
    d = ops.d
    width = d.heads * d.head_dim
    context, dcontext = ops.saved("context", d.tokens * width), ops.tensor("dcontext", d.tokens * width)
    output_backward(ops, context, width, into="dcontext", bias=model.output_bias)
    sizes = _projections(model, d)
    inputs = [ops.saved(name, d.tokens * size) for name, size in sizes]
    gradients = [ops.tensor(f"d{name}", d.tokens * size) for name, size in sizes]
    core = Core(inputs=inputs, context=context, gradients=gradients, v_dim=d.head_dim)
    attend_backward(ops, core, dcontext)
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
    qkv = ops.saved("qkv", d.tokens * 3 * width)
    ops.matmul("c_attn", d.tokens, d.hidden, 3 * width, creates=[qkv], frees=[source])
    context = ops.saved("context", d.tokens * width)
    attend(ops, Core(inputs=[qkv], context=context, v_dim=d.head_dim))
    output_projection(ops, width)


def fused_attention_backward(ops: Operations, model: ModelSpec, topology: Topology) -> None:
    """Fused attention, backward."""
    d = ops.d
    width = d.heads * d.head_dim
    context, dcontext = ops.saved("context", d.tokens * width), ops.tensor("dcontext", d.tokens * width)
    output_backward(ops, context, width, into="dcontext", bias=True)
    qkv = ops.saved("qkv", d.tokens * 3 * width)
    parts = [ops.tensor(f"d{name}", d.tokens * width) for name in "qkv"]
    attend_backward(ops, Core(inputs=[qkv], context=context, gradients=parts, v_dim=d.head_dim), dcontext)
    fused = ops.tensor("dqkv", d.tokens * 3 * width)
    ops.kernel("join", d.tokens * 3 * width, creates=[fused], frees=parts)
    biased_input_backward(ops, model, "c_attn", fused, 3 * width)
