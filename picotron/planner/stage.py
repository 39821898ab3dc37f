"""The bodies of a stage: each of its segments, forward and backward, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest

from attrs import evolve, frozen

from picotron.planner import attention, ends, mlp, sparse
from picotron.planner.body import Bodies, Body, Dims, Operation, SegmentBody, Tensor
from picotron.planner.data import Filling
from picotron.planner.model import ModelSpec, Segment
from picotron.planner.operations import Operations
from picotron.planner.recompute import Recompute, saved, units, with_recomputing
from picotron.planner.split_backward import split_backward, walked_twice
from picotron.planner.topology import Topology

Standing = Sequence[tuple[int, Tensor]]  # tensors, each with the place of a segment in its stage
Builder = Callable[[Operations, ModelSpec, Topology], None]


@frozen(kw_only=True)
class Variant:
    """What recomputing, offloading, sharding and foreign modules change in a stage's bodies.

    ``recompute`` and ``offload``: by layer of the model; left out, none does. ``gathered_bytes``: of the
    parameters of each unit (``recompute.units``), where they are gathered for each F, B and I.
    ``fillings``: the full gradients that each B or W reduces. ``foreign``: names of segments whose W walks
    the graph again.
    """

    recompute: tuple[Recompute, ...] = ()
    offload: tuple[bool, ...] = ()
    gathered_bytes: tuple[int, ...] = ()
    fillings: tuple[Filling, ...] = ()
    foreign: tuple[str, ...] = ()


PLAIN = Variant()
LEAVE = "leave"


def offloaded_bytes(bodies: Bodies) -> int:
    """What one F copies to the host."""
    steps = (step for segment in bodies.forward.segments for step in segment.operations if step.name == LEAVE)
    return sum(tensor.bytes for step in steps for tensor in step.frees if tensor.category == "activations")


def stage_bodies(
    model: ModelSpec,
    topology: Topology,
    stage: int,
    own: tuple[Segment, ...],
    d: Dims,
    variant: Variant = PLAIN,
) -> Bodies:
    """What ``stage`` does with one microbatch in its segments ``own``, in every phase."""
    forward = forward_body(model, topology, stage, own, d)
    backward = plain = backward_body(model, topology, stage, own, d)
    if set(variant.recompute) - {"none"}:
        forward, backward = with_recomputing(own, variant.recompute, forward, backward)
    backward_input, backward_weight = split_backward(backward)
    bodies = Bodies(
        forward=forward,
        backward=backward,
        backward_input=backward_input,
        backward_weight=walked_twice(backward_weight, plain, variant.foreign),
    )
    if any(variant.offload):
        bodies = _offloading(bodies, own, variant.offload, d)
    if any(variant.gathered_bytes):
        bodies = _gathering(bodies, own, variant.gathered_bytes)
    if variant.fillings:
        bodies = _filling_buckets(bodies, variant.fillings)
    return bodies


def _offloading(bodies: Bodies, own: tuple[Segment, ...], offload: tuple[bool, ...], d: Dims) -> Bodies:
    """What an offloaded layer saves leaves at the end of the next unit, and is back at its beginning."""
    places = units(own)
    leaves, returns = [list[tuple[int, Tensor]]() for _ in range(2)]
    for unit, following in zip_longest(places, places[1:]):
        layer = own[unit[0]].layer
        if layer is not None and offload[layer]:
            beside = following or unit
            tensors = saved(unit, bodies.forward, Tensor(f"{unit[0]}.x", d.local_bytes))
            leaves += [(beside[-1], tensor) for tensor in tensors]
            returns += [(beside[-1], tensor) for tensor in tensors]
    return evolve(
        bodies,
        forward=_with_standing(bodies.forward, [], leaves),
        backward=_with_standing(bodies.backward, returns, []),
        backward_input=_with_standing(bodies.backward_input, returns, []),
    )


def _gathering(bodies: Bodies, own: tuple[Segment, ...], sizes: tuple[int, ...]) -> Bodies:
    """Each unit's parameters come while the unit before it computes, and go when its own work is done.

    Those of the first one come before the body begins: the row that gathers makes their memory.
    """
    places = units(own)
    tensors = [
        Tensor(f"{unit[0]}.parameters", size, "parameters") for unit, size in zip(places, sizes, strict=True)
    ]
    comes = [(before[0], tensor) for before, tensor in zip(places, tensors[1:], strict=False)]
    goes = [(unit[-1], tensor) for unit, tensor in zip(places, tensors, strict=True)]
    comes_back = [(behind[-1], tensor) for behind, tensor in zip(places[1:], tensors, strict=False)]
    goes_back = [(unit[0], tensor) for unit, tensor in zip(places, tensors, strict=True)]
    return evolve(
        bodies,
        forward=_with_standing(bodies.forward, comes, goes),
        backward=_with_standing(bodies.backward, comes_back, goes_back),
        backward_input=_with_standing(bodies.backward_input, comes_back, goes_back),
    )


def _filling_buckets(bodies: Bodies, fillings: Sequence[Filling]) -> Bodies:
    """Full gradients stand from the first segment that adds to them; the wait for their sum frees them."""
    comes = [
        (filling.first, Tensor(f"bucket {filling.index}", filling.bytes, "gradients")) for filling in fillings
    ]
    return evolve(
        bodies,
        backward=_with_standing(bodies.backward, comes, []),
        backward_weight=_with_standing(bodies.backward_weight, comes, []),
    )


def _with_standing(body: Body, comes: Standing, goes: Standing) -> Body:
    """The body with tensors made at the beginning of segments, and freed at the end of segments, by place."""
    last = len(body.segments) - 1
    segments = list(body.segments)
    for index, segment in enumerate(segments):
        place = index if body.phase == "F" else last - index
        made = tuple(tensor for at, tensor in comes if at == place)
        freed = tuple(tensor for at, tensor in goes if at == place)
        arrive = [Operation(name="arrive", kind="kernel", kernels=0, creates=made)] if made else []
        leave = [Operation(name=LEAVE, kind="kernel", kernels=0, frees=freed)] if freed else []
        steps = (*arrive, *segment.operations, *leave)
        segments[index] = SegmentBody(name=segment.name, operations=steps)
    return evolve(body, segments=tuple(segments))


def forward_body(model: ModelSpec, topology: Topology, stage: int, own: tuple[Segment, ...], d: Dims) -> Body:
    """Forward of one microbatch through the segments ``own`` of ``stage``."""
    bodies = []
    for index, segment in enumerate(own):
        ops = Operations(d, index)
        _BODIES[_variant(model, segment)][0](ops, model, topology)
        bodies.append(SegmentBody(name=segment_name(segment), operations=tuple(ops.operations)))
    return Body(stage=stage, phase="F", segments=tuple(bodies))


def backward_body(
    model: ModelSpec, topology: Topology, stage: int, own: tuple[Segment, ...], d: Dims
) -> Body:
    """Full backward of one microbatch, last segment first."""
    bodies = []
    for index, segment in reversed(list(enumerate(own))):
        ops = Operations(d, index)
        _BODIES[_variant(model, segment)][1](ops, model, topology)
        bodies.append(SegmentBody(name=segment_name(segment), operations=tuple(ops.operations)))
    return Body(stage=stage, phase="B", segments=tuple(bodies))


def segment_name(segment: Segment) -> str:
    """What its bodies are called."""
    return segment.kind if segment.layer is None else f"{segment.kind} {segment.layer}"


def _variant(model: ModelSpec, segment: Segment) -> str:
    if segment.kind == "attention":
        if model.latent_attention is not None:
            return "latent attention"
        return "fused attention" if any(p.role == "fused_qkv" for p in segment.parameters) else "attention"
    if segment.kind == "mlp":
        return "gated mlp" if model.gated_mlp else "plain mlp"
    return segment.kind


_BODIES: dict[str, tuple[Builder, Builder]] = {
    "embedding": (ends.embedding_forward, ends.embedding_backward),
    "attention": (attention.attention_forward, attention.attention_backward),
    "fused attention": (attention.fused_attention_forward, attention.fused_attention_backward),
    "latent attention": (sparse.latent_attention_forward, sparse.latent_attention_backward),
    "gated mlp": (mlp.gated_mlp_forward, mlp.gated_mlp_backward),
    "plain mlp": (mlp.plain_mlp_forward, mlp.plain_mlp_backward),
    "moe": (sparse.moe_forward, sparse.moe_backward),
    "head": (ends.head_forward, ends.head_backward),
}
