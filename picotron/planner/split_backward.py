"""A full backward cut in two: input gradients (I), which others wait for, and weight gradients (W).

Source: Qi et al. 2023, Zero Bubble Pipeline Parallelism, arXiv:2401.10241, section 2. Between the two stays
what W reads and I or forward made: the inputs of the linear layers and the gradients of their outputs. The
normed input is not among them, as W computes it again.

Of a foreign segment autograd has a graph. I walks it for the gradient of its input alone, W once more for
those of its weights, which are multiplied from gradients inside the segment: all of I but the sum at its end
is made again. With equal products that is three for two of a full backward. Tensors stay those of the split.
"""

from __future__ import annotations

from collections.abc import Collection

import attrs

from picotron.planner.body import WAIT, Body, Operation, SegmentBody, Tensor


def split_backward(body: Body) -> tuple[Body, Body]:
    """I and W of the full backward ``body``; together they do exactly what it does.

    What W reads or makes it also frees, each tensor after its last use.
    """
    halves = [_split_segment(segment) for segment in body.segments]
    return (
        Body(stage=body.stage, phase="I", segments=tuple(inputs for inputs, _ in halves)),
        Body(stage=body.stage, phase="W", segments=tuple(weights for _, weights in halves)),
    )


def walked_twice(weights: Body, whole: Body, names: Collection[str]) -> Body:
    """W in which segments of ``names`` do again what their weights need of the full backward ``whole``."""
    segments = (
        _walked(own, full) if own.name in names else own
        for own, full in zip(weights.segments, whole.segments, strict=True)
    )
    return attrs.evolve(weights, segments=tuple(segments))


def _walked(own: SegmentBody, full: SegmentBody) -> SegmentBody:
    """The steps of the full backward in order but for the last, which adds to the input's gradient alone."""
    for_weights = iter(own.operations)
    steps = [next(for_weights) if step.for_weights else _second(step) for step in full.operations[:-1]]
    return SegmentBody(name=own.name, operations=tuple(filter(_does_something, steps)))


def _second(step: Operation) -> Operation:
    return attrs.evolve(step, name=f"second {step.name}", creates=(), frees=())


def _split_segment(segment: SegmentBody) -> tuple[SegmentBody, SegmentBody]:
    weights = [operation for operation in segment.operations if operation.for_weights]
    last_use: dict[Tensor, int] = {}
    for index, operation in enumerate(weights):
        last_use |= dict.fromkeys((*operation.creates, *operation.reads), index)
    dying: list[list[Tensor]] = [[] for _ in weights]
    for tensor, index in last_use.items():
        dying[index].append(tensor)
    inputs = [
        _freeing(operation, tuple(tensor for tensor in operation.frees if tensor not in last_use))
        for operation in segment.operations
        if not operation.for_weights
    ]
    return (
        SegmentBody(name=segment.name, operations=tuple(filter(_does_something, inputs))),
        SegmentBody(name=segment.name, operations=tuple(map(_freeing, weights, map(tuple, dying)))),
    )


def _freeing(operation: Operation, frees: tuple[Tensor, ...]) -> Operation:
    return operation if frees == operation.frees else attrs.evolve(operation, frees=frees)


def _does_something(operation: Operation) -> bool:
    """A step that launches, says, frees and waits for nothing is left out."""
    sizes = operation.flops, operation.moved_bytes, operation.kernels, operation.payload_bytes
    return any(sizes) or operation.kind == WAIT or bool(operation.creates or operation.frees)
