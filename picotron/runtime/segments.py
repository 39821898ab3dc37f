"""The decoder's segments by their kind in the plan."""

from __future__ import annotations

from picotron.planner.model import Segment
from picotron.runtime.attention import FusedAttention, SplitAttention
from picotron.runtime.ends import Embedding, Head
from picotron.runtime.mlp import GatedMlp, PlainMlp
from picotron.runtime.segment import Context, Saved, SegmentRunner, Tokens

__all__ = [
    "Context",
    "Embedding",
    "FusedAttention",
    "GatedMlp",
    "Head",
    "PlainMlp",
    "Saved",
    "SegmentRunner",
    "SplitAttention",
    "Tokens",
    "make_runner",
]


def make_runner(context: Context, segment: Segment) -> SegmentRunner:
    """The segment that runs ``segment`` of the plan."""
    roles = {parameter.role for parameter in segment.parameters}
    if segment.kind == "attention":
        return (FusedAttention if "fused_qkv" in roles else SplitAttention)(context, segment)
    if segment.kind == "mlp":
        return (GatedMlp if context.model.gated_mlp else PlainMlp)(context, segment)
    return {"embedding": Embedding, "head": Head}[segment.kind](context, segment)
