"""Products that every block has: into the residual stream, and from it back to the block's input."""

from __future__ import annotations

from picotron.planner.body import Tensor
from picotron.planner.model import ModelSpec
from picotron.planner.operations import Operations


def output_projection(ops: Operations, width: int, *, biased: bool = True) -> None:
    """Row-parallel product into the residual stream."""
    d, y = ops.d, ops.x(1)
    full = ops.partial_sum(y)
    ops.matmul("output projection", d.tokens, width, d.hidden, creates=[full])
    ops.reduced("reduce output", full, y)
    ops.kernel("residual", d.local_tokens * d.hidden, passes=3)


def bias_gradient(ops: Operations, name: str, tokens: int, width: int) -> None:
    """The sum over tokens that is a bias's gradient."""
    small = ops.tensor(f"{name} dbias", width, itemsize=ops.d.statistics_itemsize)
    ops.kernel(f"{name} bias", tokens * width, passes=1, kernels=2, creates=[small], frees=[small])


def output_backward(
    ops: Operations, source: Tensor, width: int, *, into: str, last: bool = False, bias: bool = False
) -> None:
    """Weight and input gradients of the row-parallel product of ``source``.

    ``last``: nobody but the weight's gradient needs ``source``.
    """
    d, incoming = ops.d, ops.g(1)
    if bias:
        bias_gradient(ops, "output", d.local_tokens, d.hidden)
    full = ops.gathered("gather gradient", incoming, keep=True)
    frees = [source] if last else []
    ops.matmul("output weight", d.hidden, d.tokens, width, frees=frees, reads=[full, source])
    frees = [full] if d.sequence_parallel else []
    ops.matmul(
        "output input", d.tokens, d.hidden, width, creates=[ops.tensor(into, d.tokens * width)], frees=frees
    )


def biased_input_backward(ops: Operations, model: ModelSpec, name: str, gradient: Tensor, width: int) -> None:
    """Backward of the biased column-parallel product after the norm."""
    d = ops.d
    source = ops.gathered(f"gather {name} input", ops.norm_again(model), for_weights=True)
    ops.matmul(f"{name} weight", d.hidden, d.tokens, width, frees=[source], reads=[gradient, source])
    bias_gradient(ops, name, d.tokens, width)
    full = ops.dnormed(model)
    ops.matmul(f"{name} input", d.tokens, width, d.hidden, creates=[full], frees=[gradient])
    ops.norm_backward(model, full)
