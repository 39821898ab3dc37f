"""The bodies of a stage: each of its segments, forward and backward, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable

from picotron.planner import dense, sparse
from picotron.planner.body import Bodies, Body, Dims, SegmentBody
from picotron.planner.model import ModelSpec, Segment
from picotron.planner.operations import Operations
from picotron.planner.split_backward import split_backward
from picotron.planner.topology import Topology

Builder = Callable[[Operations, ModelSpec, Topology], None]


def stage_bodies(
    model: ModelSpec, topology: Topology, stage: int, own: tuple[Segment, ...], d: Dims
) -> Bodies:
    """What ``stage`` does with one microbatch in its segments ``own``, in every phase."""
    backward = backward_body(model, topology, stage, own, d)
    backward_input, backward_weight = split_backward(backward)
    return Bodies(
        forward=forward_body(model, topology, stage, own, d),
        backward=backward,
        backward_input=backward_input,
        backward_weight=backward_weight,
    )


def forward_body(model: ModelSpec, topology: Topology, stage: int, own: tuple[Segment, ...], d: Dims) -> Body:
    """Forward of one microbatch through the segments ``own`` of ``stage``."""
    bodies = []
    for index, segment in enumerate(own):
        ops = Operations(d, index)
        _BODIES[_variant(model, segment)][0](ops, model, topology)
        bodies.append(SegmentBody(name=_segment_name(segment), operations=tuple(ops.operations)))
    return Body(stage=stage, phase="F", segments=tuple(bodies))


def backward_body(
    model: ModelSpec, topology: Topology, stage: int, own: tuple[Segment, ...], d: Dims
) -> Body:
    """Full backward of one microbatch, last segment first."""
    bodies = []
    for index, segment in reversed(list(enumerate(own))):
        ops = Operations(d, index)
        _BODIES[_variant(model, segment)][1](ops, model, topology)
        bodies.append(SegmentBody(name=_segment_name(segment), operations=tuple(ops.operations)))
    return Body(stage=stage, phase="B", segments=tuple(bodies))


def _segment_name(segment: Segment) -> str:
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
    "embedding": (dense.embedding_forward, dense.embedding_backward),
    "attention": (dense.attention_forward, dense.attention_backward),
    "fused attention": (dense.fused_attention_forward, dense.fused_attention_backward),
    "latent attention": (sparse.latent_attention_forward, sparse.latent_attention_backward),
    "gated mlp": (dense.gated_mlp_forward, dense.gated_mlp_backward),
    "plain mlp": (dense.plain_mlp_forward, dense.plain_mlp_backward),
    "moe": (sparse.moe_forward, sparse.moe_backward),
    "head": (dense.head_forward, dense.head_backward),
}
