"""Bodies of attention, with projections apart or fused (GPT-2), forward and backward.

They mirror the runtime's segments step by step.
"""

from __future__ import annotations

from collections.abc import Sequence

from picotron.planner.attention_core import Core, log_sum_exp, mark_core, product
from picotron.planner.body import Dims, Tensor
from picotron.planner.heads import heads_backward, heads_forward
from picotron.planner.model import ModelSpec
from picotron.planner.operations import Operations
from picotron.planner.products import (
    bias_gradient,
    biased_input_backward,
    input_backward,
    output_backward,
    output_projection,
    projections,
)
from picotron.planner.ring import ring_backward, ring_forward
from picotron.planner.topology import Topology


def _widths(d: Dims) -> tuple[int, int, int]:
    """Columns of queries, keys and values."""
    return d.heads * d.head_dim, d.kv_heads * d.head_dim, d.kv_heads * d.head_dim


def attention_forward(ops: Operations, model: ModelSpec, topology: Topology) -> None:
    """Attention, forward."""
    d = ops.d
    names = ("q_proj", "k_proj", "v_proj")
    products = [*zip(names, _widths(d), _projected(ops, model), strict=True)]
    projections(ops, model, "attention", products)
    if model.qk_norm:
        for name, heads in (("q", d.heads), ("k", d.kv_heads)):
            made = _head_norm_tensors(ops, name, heads)
            ops.rms_norm(f"{name}_norm", d.tokens * heads * d.head_dim, made)
    for name, width in zip("qk", _widths(d), strict=False) if model.rope_theta is not None else ():
        _rotate(ops, name, d.tokens * width)
    context = ops.saved("context", d.tokens * d.heads * d.head_dim)
    attend(ops, Core(inputs=_read(ops), context=context, v_dim=d.head_dim))
    output_projection(ops, d.heads * d.head_dim)


def _projected(ops: Operations, model: ModelSpec) -> list[Tensor]:
    """Queries, keys and values as they come from their projections."""
    d = ops.d
    names = ("q_raw", "k_raw", "v") if model.qk_norm else ("q", "k", "v")
    return [ops.saved(name, d.tokens * width) for name, width in zip(names, _widths(d), strict=True)]


def _read(ops: Operations) -> list[Tensor]:
    """Queries, keys and values as the attention core reads them."""
    d = ops.d
    return [ops.saved(name, d.tokens * width) for name, width in zip("qkv", _widths(d), strict=True)]


def _head_norm_tensors(ops: Operations, name: str, heads: int) -> tuple[Tensor, Tensor]:
    d = ops.d
    inverse = ops.saved(f"{name}_inverse", d.tokens * heads, itemsize=d.statistics_itemsize)
    return inverse, ops.saved(name, d.tokens * heads * d.head_dim)


def _rotate(ops: Operations, name: str, elements: int) -> None:
    """Rotary positions, in place but for half a tensor."""
    half = ops.tensor(f"{name} half", elements // 2)
    ops.kernel(f"rotate {name}", elements, passes=5, kernels=5, creates=[half], frees=[half])


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
    widths = _widths(d)
    gradients = [ops.tensor(f"d{name}", d.tokens * width) for name, width in zip("qkv", widths, strict=True)]
    core = Core(inputs=_read(ops), context=context, gradients=gradients, v_dim=d.head_dim)
    attend_backward(ops, core, dcontext)
    gradients = _before_core(ops, model, gradients)

    def weights(source: Tensor) -> None:
        for name, width, gradient in zip("qkv", widths, gradients, strict=True):
            ops.matmul(f"{name}_proj weight", width, d.tokens, d.hidden, reads=[gradient, source])
        for name, width in zip("qkv", widths, strict=True) if model.qkv_bias else ():
            bias_gradient(ops, f"{name}_proj", d.tokens, width)

    def inputs(full: Tensor) -> None:
        for name, width in zip("qkv", widths, strict=True):
            creates = [full] if name == "q" else []
            ops.matmul(f"{name}_proj input", d.tokens, width, d.hidden, creates=creates)

    input_backward(ops, model, "attention", gradients, weights, inputs)


def _before_core(ops: Operations, model: ModelSpec, gradients: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of queries, keys and values before their rotation and their norms."""
    d, found = ops.d, [*gradients]
    for place, (name, heads) in enumerate((("q", d.heads), ("k", d.kv_heads))):
        size = d.tokens * heads * d.head_dim
        if model.rope_theta is not None:
            _rotate(ops, name, size)
        if model.qk_norm:
            statistics, _ = _head_norm_tensors(ops, name, heads)
            found[place] = ops.tensor(f"d{name} before norm", size)
            ops.rms_backward(
                f"{name}_norm backward", d.tokens * heads, d.head_dim, creates=found[place], frees=statistics
            )
            raw = _projected(ops, model)[place]
            ops.kernel("free", 0, kernels=0, frees=[raw, gradients[place]])
    return found


def fused_attention_forward(ops: Operations, model: ModelSpec, topology: Topology) -> None:
    """Fused attention, forward."""
    d = ops.d
    width = d.heads * d.head_dim
    qkv = ops.saved("qkv", d.tokens * 3 * width)
    projections(ops, model, "attention", [("c_attn", 3 * width, qkv)])
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
