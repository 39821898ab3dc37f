"""Bodies of MLPs without experts, with a gate or without, forward and backward.

They mirror the runtime's segments step by step; the activation is computed again in backward.
"""

from __future__ import annotations

from picotron.planner.model import ModelSpec
from picotron.planner.operations import Operations
from picotron.planner.products import bias_gradient, biased_input_backward, output_backward
from picotron.planner.topology import Topology


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
            bias_gradient(ops, name, d.tokens, d.intermediate)
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
    biased_input_backward(ops, model, "fc", dfc, d.intermediate)
