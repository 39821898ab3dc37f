"""Bodies of MLPs without experts, with a gate or without, forward and backward.

They mirror the runtime's segments step by step; the activation is computed again in backward, and gradients
take the memory of what they are the gradients of.
"""

from __future__ import annotations

from picotron.planner.body import Tensor
from picotron.planner.model import ModelSpec
from picotron.planner.operations import Operations
from picotron.planner.products import (
    bias_gradient,
    biased_input_backward,
    input_backward,
    output_backward,
    projections,
)
from picotron.planner.topology import Topology


def gated_mlp_forward(ops: Operations, model: ModelSpec, topology: Topology) -> None:
    """Gated mlp, forward."""
    d = ops.d
    size = d.tokens * d.intermediate
    made = [(name, d.intermediate, ops.saved(name, size)) for name in ("gate", "up")]
    projections(ops, model, "mlp", made)
    y, product = ops.x(1), ops.tensor("product", size)
    full = ops.partial_sum(y)
    passes, kernels = (3, 1) if d.compiled else (5, 2)
    ops.kernel("swiglu", size, passes=passes, kernels=kernels, creates=[product])
    ops.matmul("down", d.tokens, d.intermediate, d.hidden, creates=[full], frees=[product])
    ops.reduced("reduce output", full, y)
    ops.kernel("residual", d.local_tokens * d.hidden, passes=3)


def gated_mlp_backward(ops: Operations, model: ModelSpec, topology: Topology) -> None:
    """Gated mlp, backward."""
    d = ops.d
    size = d.tokens * d.intermediate
    gate, up = ops.saved("gate", size), ops.saved("up", size)
    active, product, dproduct = (ops.tensor(name, size) for name in ("active", "product", "dproduct"))
    if d.compiled:
        ops.kernel("swiglu again", size, passes=3, creates=[product])
    else:
        ops.kernel("swiglu again", size, passes=5, kernels=2, creates=[active, product])
    output_backward(ops, product, d.intermediate, into="dproduct", last=True, bias=model.mlp_bias)
    if d.compiled:
        ops.kernel("swiglu gradient", size, passes=5, frees=[dproduct])  # in the memory of gate and up
    else:
        ops.kernel("gate gradient", size, passes=6, kernels=2)  # in the memory of gate, as up has that of up
        ops.kernel("up gradient", size, passes=3, frees=[active, dproduct])

    def weights(source: Tensor) -> None:
        for name, gradient in (("gate", gate), ("up", up)):
            ops.matmul(f"{name} weight", d.intermediate, d.tokens, d.hidden, reads=[gradient, source])
        for name in ("gate", "up") if model.mlp_bias else ():
            bias_gradient(ops, name, d.tokens, d.intermediate)

    def inputs(full: Tensor) -> None:
        ops.matmul("gate input", d.tokens, d.intermediate, d.hidden, creates=[full])
        ops.matmul("up input", d.tokens, d.intermediate, d.hidden)

    input_backward(ops, model, "mlp", [gate, up], weights, inputs)


def plain_mlp_forward(ops: Operations, model: ModelSpec, topology: Topology) -> None:
    """Plain mlp, forward."""
    d = ops.d
    size = d.tokens * d.intermediate
    projections(ops, model, "mlp", [("fc", d.intermediate, ops.saved("fc", size))])
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
    fc, active, dactive = (
        ops.saved("fc", size),
        *(ops.tensor(name, size) for name in ("active", "dactive")),
    )
    ops.kernel("gelu again", size, creates=[active])
    output_backward(ops, active, d.intermediate, into="dactive", last=True, bias=True)
    ops.kernel("gelu gradient", size, passes=3, frees=[dactive])  # in the memory of fc
    biased_input_backward(ops, model, "fc", fc, d.intermediate)
