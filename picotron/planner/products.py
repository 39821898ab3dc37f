"""Products that every block has: into the residual stream, and from it back to the block's input."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from picotron.planner.body import Tensor
from picotron.planner.model import ModelSpec
from picotron.planner.operations import Operations

Projection = tuple[str, int, Tensor]  # name, columns, what it makes


def projections(ops: Operations, model: ModelSpec, name: str, made: Sequence[Projection]) -> None:
    """Norm, gather and multiply: column-parallel products of the normed input."""
    d, normed, gather = ops.d, ops.norm(model), f"gather {name} input"
    if d.tensor_overlap == "chunked":
        _projections_in_chunks(ops, normed, gather, made)
        return
    source = ops.gathered(gather, normed)
    for what, width, tensor in made:
        frees = [source] if tensor is made[-1][-1] else []
        ops.matmul(what, d.tokens, d.hidden, width, creates=[tensor], frees=frees)


def _projections_in_chunks(ops: Operations, normed: Tensor, gather: str, made: Sequence[Projection]) -> None:
    """The products of each chunk of tokens, in the rows of each rank's, while the next chunk is gathered."""
    d = ops.d
    rows, last = d.local_tokens // d.gather_chunks, d.gather_chunks - 1
    chunk = ops.gathered_chunk(f"{gather} 0", asynchronous=False)
    for index in range(d.gather_chunks):
        following = f"{gather} {index + 1}"
        coming = ops.gathered_chunk(following, asynchronous=True) if index < last else None
        for what, width, tensor in made:
            creates = [] if index else [tensor]  # the first makes room for all
            ops.matmul(f"{what} {index}", rows, d.hidden, width, batch=d.tp, creates=creates)
        if coming is None:
            _free(ops, [chunk, normed])
        else:
            ops.wait(following, group="tp", frees=[chunk])
            chunk = coming


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

    def weights(source: Tensor) -> None:
        ops.matmul(f"{name} weight", d.hidden, d.tokens, width, reads=[gradient, source])
        bias_gradient(ops, name, d.tokens, width)

    def inputs(full: Tensor) -> None:
        ops.matmul(f"{name} input", d.tokens, width, d.hidden, creates=[full])

    input_backward(ops, model, name, [gradient], weights, inputs)


def input_backward(
    ops: Operations,
    model: ModelSpec,
    name: str,
    gradients: Sequence[Tensor],
    weights: Callable[[Tensor], None],
    inputs: Callable[[Tensor], None],
) -> None:
    """Backward of column-parallel products of the normed input, from ``gradients`` of theirs to ``i.g``.

    ``weights`` multiplies with the normed input, computed again; ``inputs`` makes that one's gradient. Where
    they overlap the latter comes first, and the former while it is summed. The gathered input is then there
    before, as one communicator moves one thing at a time.
    """
    d, full = ops.d, ops.dnormed()

    def source() -> Tensor:
        return ops.gathered(f"gather {name} input", ops.norm_again(model), for_weights=True)

    if d.tensor_overlap == "none":
        _multiplied(ops, weights, source(), [])
        inputs(full)
        _free(ops, gradients)
        ops.norm_backward(model, full)
        return
    before = source() if d.sequence_parallel else None
    inputs(full)
    part = ops.dnormed_local(full)
    ops.start_reduced("reduce gradient", full, part)
    _multiplied(ops, weights, before or source(), gradients)
    ops.wait("reduce gradient", group="tp", frees=[full] if d.sequence_parallel else [])
    ops.local_norm_backward(model, part)


def _multiplied(
    ops: Operations, weights: Callable[[Tensor], None], source: Tensor, gradients: Sequence[Tensor]
) -> None:
    weights(source)
    _free(ops, [source, *gradients])


def _free(ops: Operations, tensors: Sequence[Tensor]) -> None:
    ops.kernel("free", 0, kernels=0, frees=tensors)
