"""Recomputing and offloading what forward saves: variants of a layer's bodies, exact in every tensor.

Selective recompute drops what the attention core leaves (its context and the statistics of its softmax) and
runs the core again in backward, from queries, keys and values that are kept (Korthikanti et al. 2022,
arXiv:2205.05198, section 5). Full recompute keeps the layer's input alone: its whole forward, collectives
too, runs again at the head of the layer's backward, which begins with its last segment (Chen et al. 2016,
arXiv:1604.06174). What is dropped is freed at the end of its segment; the layer's output, computed again, is
freed at once. Split in two, a backward has the forward in its I.

What an offloaded layer leaves is copied to the host while the next layer (or the head) computes, freed at
that one's end, and back when that one's backward begins; of the last in a stage at the end of the F and at
the beginning of the B or I. The row of the copy stands for all layers of its stage, beside the F, B or I: the
next cell waits for its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Literal, TypeVar, cast, get_args

from attrs import evolve

from picotron.errors import PlanError
from picotron.planner.body import Body, Operation, SegmentBody, Tensor
from picotron.planner.model import Segment
from picotron.planner.validators import shown

Recompute = Literal["none", "selective", "full"]
MODES: tuple[Recompute, ...] = get_args(Recompute)  # from the fastest to the smallest
T = TypeVar("T")


def modes_by_layer(value: object, num_layers: int) -> tuple[Recompute, ...]:
    """How each layer recomputes. Raises PlanError for what is no mode, nor one for each layer."""
    return _spread(
        value,
        num_layers,
        lambda one: isinstance(one, str) and one in MODES,
        f"recompute must be one of {', '.join(MODES)}, or one of them",
    )


def flags_by_layer(value: object, num_layers: int) -> tuple[bool, ...]:
    """Whether each layer offloads. Raises PlanError for other than truth values."""
    return _spread(
        value, num_layers, lambda one: isinstance(one, bool), "offload must be True or False, or one of them"
    )


def _spread(value: object, num_layers: int, fits: Callable[[object], bool], rule: str) -> tuple[T, ...]:
    """One value a layer."""
    if fits(value):
        return (cast(T, value),) * num_layers
    if isinstance(value, tuple | list) and len(value) == num_layers and all(map(fits, value)):
        return tuple(value)
    counted = f" ({len(value)} of them)" if isinstance(value, tuple | list) else ""
    raise PlanError(f"{rule} for each of the model's {num_layers} layers, got {shown(value)}{counted}")


Steps = list[list[Operation]]  # of each segment, by its place in the stage


def units(own: Sequence[Segment]) -> tuple[tuple[int, ...], ...]:
    """The places of a stage's segments by what is recomputed, copied and gathered at a time.

    Each decoder layer, and the embedding and the head by themselves.
    """
    keys = [segment.kind if segment.layer is None else segment.layer for segment in own]
    places = groupby(range(len(own)), key=keys.__getitem__)
    return tuple(tuple(members) for _, members in places)


def with_recomputing(
    own: Sequence[Segment], modes: Sequence[Recompute], forward: Body, backward: Body
) -> tuple[Body, Body]:
    """F and B of the segments ``own`` with each layer recomputed as ``modes`` say, by layer of the model."""
    plain = [list(segment.operations) for segment in forward.segments]
    first, again = [list(steps) for steps in plain], [list(s.operations) for s in backward.segments[::-1]]
    for unit in units(own):
        layer = own[unit[0]].layer
        if layer is not None and modes[layer] == "selective":
            _without_core(unit[0], plain, first, again)
        elif layer is not None and modes[layer] == "full":
            _without_layer(unit, plain, first, again)
    return _with_steps(forward, first), _with_steps(backward, again[::-1])


def saved(unit: Sequence[int], forward: Body, boundary: Tensor) -> tuple[Tensor, ...]:
    """What the F of a unit keeps for its backward: its input ``boundary``, what it leaves, not its output."""
    steps = [operation for place in unit for operation in forward.segments[place].operations]
    left = (tensor for tensor in _left(steps) if tensor.category == "activations")
    return boundary, *(tensor for tensor in left if tensor.name != f"{unit[-1] + 1}.x")


def _without_core(place: int, plain: Steps, forward: Steps, backward: Steps) -> None:
    """Drop what the attention core of one segment leaves, and run the core before its backward."""
    core = [step for step in plain[place] if step.core]
    left = set(_left(plain[place]))
    dropped = [tensor for step in core for tensor in step.creates if tensor in left]
    forward[place].append(_free("drop attention core", dropped))
    backward[place][:0] = map(_repeated, core)


def _without_layer(unit: Sequence[int], plain: Steps, forward: Steps, backward: Steps) -> None:
    """Drop what a layer leaves but its input and output, and run it before its last segment's backward.

    What the second run leaves again has its old name; all else has one of its own, as a W may make it anew.
    """
    steps = [step for place in unit for step in plain[place]]
    output = next(tensor for tensor in _left(steps) if tensor.name == f"{unit[-1] + 1}.x")
    kept = {tensor for tensor in _left(steps) if tensor != output}
    for place in unit:
        inputs = {tensor for tensor in kept if tensor.name == f"{place + 1}.x"}  # of the next segment
        passed = [tensor for tensor in kept if tensor.name == f"{place}.x"]
        dropped = [tensor for tensor in _left(plain[place]) if tensor in kept - inputs]
        forward[place].append(_free("drop what is recomputed", [*dropped, *passed]))
    passing = (tensor for step in steps for tensor in step.creates if tensor not in kept)
    names = {tensor: Tensor(f"{tensor.name} again", tensor.bytes, tensor.category) for tensor in passing}
    names[output] = Tensor(f"{output.name} again", output.bytes, "workspace")
    repeated = [_renamed(_repeated(step), names) for step in steps]
    backward[unit[-1]][:0] = [*repeated, _free("drop recomputed output", [names[output]])]


def _left(steps: Iterable[Operation]) -> tuple[Tensor, ...]:
    """What is created and not freed, in order."""
    live: dict[Tensor, None] = {}
    for step in steps:
        live |= dict.fromkeys(step.creates)
        for tensor in step.frees:
            live.pop(tensor, None)
    return tuple(live)


def _free(name: str, tensors: Sequence[Tensor]) -> Operation:
    return Operation(name=name, kind="kernel", kernels=0, frees=tuple(tensors))


def _repeated(step: Operation) -> Operation:
    return evolve(step, name=f"recompute {step.name}")


def _renamed(step: Operation, names: Mapping[Tensor, Tensor]) -> Operation:
    def named(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(names.get(tensor, tensor) for tensor in tensors)

    return evolve(step, creates=named(step.creates), frees=named(step.frees))


def _with_steps(body: Body, steps: Steps) -> Body:
    segments = (
        segment if segment.operations == tuple(own) else SegmentBody(name=segment.name, operations=tuple(own))
        for segment, own in zip(body.segments, steps, strict=True)
    )
    return evolve(body, segments=tuple(segments))
