"""The matrix multiplications of a model, from which its FLOPs follow.

A FLOP is one multiplication or one addition, so an m x k by k x n product is 2*m*n*k; nothing but
matrix products is counted (no norm, softmax, activation, rotation or optimizer). Backward multiplies twice
for each forward product, once for the gradient of either operand.

Attention is counted full by default: every query against every position, as eager attention computes it and
as the papers' MFU counts it. ``attention="causal"`` counts only the s*(s+1)/2 pairs that the mask leaves.
Routed experts are counted at ``top_k`` experts a token, whichever they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, get_args

from attrs import field, frozen

from picotron.errors import PlanError
from picotron.planner.model import Experts, LatentAttention, ModelSpec, Segment, SegmentKind
from picotron.planner.validators import is_size

AttentionCount = Literal["full", "causal"]


def _check_size(name: str, value: object) -> None:
    if not is_size(value):
        raise PlanError(f"{name} must be a positive integer, got {value!r}")


@frozen(kw_only=True)
class Matmul:
    """``batch`` products of an [m, k] and a [k, n] matrix."""

    name: str
    m: int = field()
    n: int = field()
    k: int = field()
    batch: int = field(default=1)

    @batch.validator
    def _check_sizes(self, *_: object) -> None:
        for name in ("m", "n", "k", "batch"):
            _check_size(name, getattr(self, name))

    @property
    def flops(self) -> int:
        """Multiplications and additions together."""
        return 2 * self.m * self.n * self.k * self.batch


@frozen(kw_only=True)
class _Shape:
    """What one rank multiplies: its tokens, its share of heads, and how attention is counted."""

    batch: int
    seq_len: int
    tp: int
    attention: AttentionCount

    @property
    def tokens(self) -> int:
        return self.batch * self.seq_len

    def share(self, size: int) -> int:
        """The largest part of ``size`` cut ``tp`` ways."""
        return -(-size // self.tp)

    def linear(self, name: str, n: int, k: int) -> Matmul:
        return Matmul(name=name, m=self.tokens, n=n, k=k)


def matmuls(
    model: ModelSpec,
    segment: Segment,
    *,
    batch: int,
    seq_len: int,
    tp: int = 1,
    attention: AttentionCount = "full",
) -> tuple[Matmul, ...]:
    """The forward products of one segment on one tensor-parallel rank, in order.

    Heads, MLP columns and vocabulary are cut ``tp`` ways (a rank keeps one key/value head at least);
    latent projections and the router are whole on each rank. ``experts_*`` rows are those of all experts
    together: ``batch * seq_len * top_k``.
    Raises PlanError if the heads do not divide by ``tp``, or a size is not a positive integer.
    """
    shape = _shape(model, batch=batch, seq_len=seq_len, tp=tp, attention=attention)
    return _MATMULS[segment.kind](model, shape)


def forward_flops(model: ModelSpec, *, batch: int, seq_len: int, attention: AttentionCount = "full") -> int:
    """FLOPs of one forward pass over ``batch`` sequences of ``seq_len`` tokens."""
    shape = _shape(model, batch=batch, seq_len=seq_len, tp=1, attention=attention)
    return sum(
        times * matmul.flops
        for kind, times in _segment_counts(model).items()
        if times
        for matmul in _MATMULS[kind](model, shape)
    )


def backward_flops(model: ModelSpec, *, batch: int, seq_len: int, attention: AttentionCount = "full") -> int:
    """FLOPs of one full backward pass (B = I + W), without recomputation: twice the forward's."""
    return 2 * forward_flops(model, batch=batch, seq_len=seq_len, attention=attention)


def _segment_counts(model: ModelSpec) -> dict[SegmentKind, int]:
    sparse = model.num_moe_layers
    return {"attention": model.num_layers, "mlp": model.num_layers - sparse, "moe": sparse, "head": 1}


def _shape(model: ModelSpec, *, batch: int, seq_len: int, tp: int, attention: AttentionCount) -> _Shape:
    for name, value in (("batch", batch), ("seq_len", seq_len), ("tp", tp)):
        _check_size(name, value)
    if attention not in get_args(AttentionCount):
        raise PlanError(f"attention must be one of {get_args(AttentionCount)}, got {attention!r}")
    if model.num_heads % tp:
        raise PlanError(f"tp must divide num_heads = {model.num_heads}, got {tp}")
    if model.num_kv_heads % tp and tp % model.num_kv_heads:
        raise PlanError(f"tp must divide num_kv_heads = {model.num_kv_heads}, or be its multiple, got {tp}")
    return _Shape(batch=batch, seq_len=seq_len, tp=tp, attention=attention)


def _pairs(shape: _Shape) -> tuple[int, int]:
    """Two factors whose product is the query-key pairs counted: s by s, or exactly s*(s+1)/2 of them."""
    s = shape.seq_len
    if shape.attention == "full":
        return s, s
    return (s // 2, s + 1) if s % 2 == 0 else (s, (s + 1) // 2)


def _scores_and_context(model: ModelSpec, shape: _Shape) -> tuple[Matmul, Matmul]:
    queries, keys = _pairs(shape)
    latent, heads = model.latent_attention, shape.batch * (model.num_heads // shape.tp)
    value_dim = latent.v_head_dim if latent else model.head_dim
    return (
        Matmul(name="scores", m=queries, n=keys, k=model.head_dim, batch=heads),
        Matmul(name="context", m=queries, n=value_dim, k=keys, batch=heads),
    )


def _embedding(model: ModelSpec, shape: _Shape) -> tuple[Matmul, ...]:
    return ()


def _attention(model: ModelSpec, shape: _Shape) -> tuple[Matmul, ...]:
    if model.family == "gpt2":
        return _fused_attention(model, shape)
    if model.latent_attention:
        return _latent_attention(model, model.latent_attention, shape)
    query = model.num_heads // shape.tp * model.head_dim
    kv = max(1, model.num_kv_heads // shape.tp) * model.head_dim
    return (
        shape.linear("q_proj", query, model.hidden_size),
        shape.linear("k_proj", kv, model.hidden_size),
        shape.linear("v_proj", kv, model.hidden_size),
        *_scores_and_context(model, shape),
        shape.linear("o_proj", model.hidden_size, query),
    )


def _fused_attention(model: ModelSpec, shape: _Shape) -> tuple[Matmul, ...]:
    out = model.num_heads // shape.tp * model.head_dim
    return (
        shape.linear("c_attn", 3 * out, model.hidden_size),
        *_scores_and_context(model, shape),
        shape.linear("c_proj", model.hidden_size, out),
    )


def _latent_attention(model: ModelSpec, latent: LatentAttention, shape: _Shape) -> tuple[Matmul, ...]:
    heads, hidden, rank = model.num_heads // shape.tp, model.hidden_size, latent.kv_lora_rank
    query = heads * model.head_dim
    queries = [shape.linear("q_proj", query, hidden)]
    if latent.q_lora_rank is not None:
        queries = [
            shape.linear("q_a_proj", latent.q_lora_rank, hidden),
            shape.linear("q_b_proj", query, latent.q_lora_rank),
        ]
    return (
        *queries,
        shape.linear("kv_a_proj_with_mqa", rank + latent.qk_rope_head_dim, hidden),
        shape.linear("kv_b_proj", heads * (latent.qk_nope_head_dim + latent.v_head_dim), rank),
        *_scores_and_context(model, shape),
        shape.linear("o_proj", hidden, heads * latent.v_head_dim),
    )


def _mlp(model: ModelSpec, shape: _Shape) -> tuple[Matmul, ...]:
    inner = shape.share(model.intermediate_size)
    if model.gated_mlp:
        return _gated(model, shape.tokens, inner)
    return (shape.linear("fc", inner, model.hidden_size), shape.linear("proj", model.hidden_size, inner))


def _gated(model: ModelSpec, rows: int, inner: int, prefix: str = "") -> tuple[Matmul, ...]:
    hidden = model.hidden_size
    return (
        Matmul(name=f"{prefix}gate", m=rows, n=inner, k=hidden),
        Matmul(name=f"{prefix}up", m=rows, n=inner, k=hidden),
        Matmul(name=f"{prefix}down", m=rows, n=hidden, k=inner),
    )


def _moe(model: ModelSpec, shape: _Shape) -> tuple[Matmul, ...]:
    experts = model.experts
    assert experts is not None
    return (
        shape.linear("router", experts.num_experts, model.hidden_size),
        *_gated(model, shape.tokens * experts.top_k, shape.share(experts.intermediate_size), "experts_"),
        *_shared(model, experts, shape),
    )


def _shared(model: ModelSpec, experts: Experts, shape: _Shape) -> tuple[Matmul, ...]:
    if not experts.shared_intermediate_size:
        return ()
    return _gated(model, shape.tokens, shape.share(experts.shared_intermediate_size), "shared_")


def _head(model: ModelSpec, shape: _Shape) -> tuple[Matmul, ...]:
    return (shape.linear("head", shape.share(model.vocab_size), model.hidden_size),)


_MATMULS: Mapping[SegmentKind, Callable[[ModelSpec, _Shape], tuple[Matmul, ...]]] = {
    "embedding": _embedding,
    "attention": _attention,
    "mlp": _mlp,
    "moe": _moe,
    "head": _head,
}
