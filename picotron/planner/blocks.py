"""The segments of each family, with every parameter's name, shape and role."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from picotron.planner.parts import Experts, LatentAttention, Parameter, Role, Segment

if TYPE_CHECKING:
    from picotron.planner.model import ModelSpec

_BIAS_ROLES: Mapping[Role, Role] = {
    "column": "column_bias",
    "kv_column": "kv_column_bias",
    "row": "row_bias",
    "fused_qkv": "fused_qkv_bias",
    "conv_column": "column_bias",
    "conv_row": "row_bias",
}


def _matrix(name: str, shape: tuple[int, int], role: Role, *, bias_size: int = 0) -> tuple[Parameter, ...]:
    """A projection's weight and, where ``bias_size`` is not 0, its bias."""
    weight = Parameter(name=f"{name}.weight", shape=shape, role=role)
    if not bias_size:
        return (weight,)
    return weight, Parameter(name=f"{name}.bias", shape=(bias_size,), role=_BIAS_ROLES[role], init="zeros")


def _side_by_side(*projections: tuple[Parameter, ...]) -> tuple[Parameter, ...]:
    """Projections of one input: first all weights, then all biases, so that each are one piece of memory."""
    return tuple(each for kind in zip(*projections, strict=True) for each in kind)


def _norm(name: str, size: int, role: Role = "norm", *, bias: bool = False) -> tuple[Parameter, ...]:
    weight = Parameter(name=f"{name}.weight", shape=(size,), role=role, init="ones")
    if not bias:
        return (weight,)
    return weight, Parameter(name=f"{name}.bias", shape=(size,), role=role, init="zeros")


def embedding(model: ModelSpec) -> Segment:
    """Token table and, where positions are learned, theirs."""
    table = (model.vocab_size, model.hidden_size)
    if model.family != "gpt2":
        tables = _matrix("model.embed_tokens", table, "embedding")
    else:
        positions = (model.max_positions, model.hidden_size)
        tables = _matrix("transformer.wte", table, "embedding")
        tables += _matrix("transformer.wpe", positions, "position")
    return Segment(kind="embedding", layer=None, parameters=tables)


def head(model: ModelSpec) -> Segment:
    """Final norm and, where it is not tied, the output table."""
    if model.family == "gpt2":
        found = _norm("transformer.ln_f", model.hidden_size, bias=True)
    else:
        found = _norm("model.norm", model.hidden_size)
    if not model.tied_embeddings:
        found += _matrix("lm_head", (model.vocab_size, model.hidden_size), "head")
    return Segment(kind="head", layer=None, parameters=found)


def attention(model: ModelSpec, layer: int) -> Segment:
    """Input norm and projections of one layer."""
    if model.family == "gpt2":
        found = _fused_attention(model, f"transformer.h.{layer}")
    else:
        at = f"model.layers.{layer}"
        latent = model.latent_attention
        found = _norm(f"{at}.input_layernorm", model.hidden_size)
        found += (
            _latent_attention(model, latent, f"{at}.self_attn")
            if latent
            else _grouped_attention(model, f"{at}.self_attn")
        )
    return Segment(kind="attention", layer=layer, parameters=found)


def _grouped_attention(model: ModelSpec, at: str) -> tuple[Parameter, ...]:
    hidden, query, kv = (
        model.hidden_size,
        model.num_heads * model.head_dim,
        model.num_kv_heads * model.head_dim,
    )
    query_bias, kv_bias = (query, kv) if model.qkv_bias else (0, 0)
    found = _side_by_side(
        _matrix(f"{at}.q_proj", (query, hidden), "column", bias_size=query_bias),
        _matrix(f"{at}.k_proj", (kv, hidden), "kv_column", bias_size=kv_bias),
        _matrix(f"{at}.v_proj", (kv, hidden), "kv_column", bias_size=kv_bias),
    )
    if model.qk_norm:
        found += _norm(f"{at}.q_norm", model.head_dim, "head_norm")
        found += _norm(f"{at}.k_norm", model.head_dim, "head_norm")
    return found + _matrix(
        f"{at}.o_proj", (hidden, query), "row", bias_size=hidden if model.output_bias else 0
    )


def _latent_attention(model: ModelSpec, latent: LatentAttention, at: str) -> tuple[Parameter, ...]:
    hidden, heads, rank = model.hidden_size, model.num_heads, latent.kv_lora_rank
    query = heads * model.head_dim
    if latent.q_lora_rank is None:
        found = _matrix(f"{at}.q_proj", (query, hidden), "column")
    else:
        found = _matrix(f"{at}.q_a_proj", (latent.q_lora_rank, hidden), "latent")
        found += _norm(f"{at}.q_a_layernorm", latent.q_lora_rank, "latent_norm")
        found += _matrix(f"{at}.q_b_proj", (query, latent.q_lora_rank), "column")
    found += _matrix(f"{at}.kv_a_proj_with_mqa", (rank + latent.qk_rope_head_dim, hidden), "latent")
    found += _norm(f"{at}.kv_a_layernorm", rank, "latent_norm")
    expanded = heads * (latent.qk_nope_head_dim + latent.v_head_dim)
    found += _matrix(f"{at}.kv_b_proj", (expanded, rank), "column")
    return found + _matrix(f"{at}.o_proj", (hidden, heads * latent.v_head_dim), "row")


def _fused_attention(model: ModelSpec, at: str) -> tuple[Parameter, ...]:
    hidden = model.hidden_size
    found = _norm(f"{at}.ln_1", hidden, bias=True)
    found += _matrix(f"{at}.attn.c_attn", (hidden, 3 * hidden), "fused_qkv", bias_size=3 * hidden)
    return found + _matrix(f"{at}.attn.c_proj", (hidden, hidden), "conv_row", bias_size=hidden)


def feed_forward(model: ModelSpec, layer: int) -> Segment:
    """MLP or experts of one layer."""
    if model.experts and layer not in model.experts.dense_layers:
        return moe(model, layer)
    return mlp(model, layer)


def mlp(model: ModelSpec, layer: int) -> Segment:
    """Norm and dense MLP of one layer."""
    if model.family == "gpt2":
        found = _conv_mlp(model, f"transformer.h.{layer}")
    else:
        at = f"model.layers.{layer}"
        found = _norm(f"{at}.post_attention_layernorm", model.hidden_size)
        found += _gated_mlp(model, f"{at}.mlp", model.intermediate_size)
    return Segment(kind="mlp", layer=layer, parameters=found)


def _conv_mlp(model: ModelSpec, at: str) -> tuple[Parameter, ...]:
    hidden, inner = model.hidden_size, model.intermediate_size
    found = _norm(f"{at}.ln_2", hidden, bias=True)
    found += _matrix(f"{at}.mlp.c_fc", (hidden, inner), "conv_column", bias_size=inner)
    return found + _matrix(f"{at}.mlp.c_proj", (inner, hidden), "conv_row", bias_size=hidden)


def _gated_mlp(model: ModelSpec, at: str, inner: int) -> tuple[Parameter, ...]:
    hidden = model.hidden_size
    inner_bias, hidden_bias = (inner, hidden) if model.mlp_bias else (0, 0)
    found = _side_by_side(
        _matrix(f"{at}.gate_proj", (inner, hidden), "column", bias_size=inner_bias),
        _matrix(f"{at}.up_proj", (inner, hidden), "column", bias_size=inner_bias),
    )
    return found + _matrix(f"{at}.down_proj", (hidden, inner), "row", bias_size=hidden_bias)


def moe(model: ModelSpec, layer: int) -> Segment:
    """Norm, router, experts and shared expert of one layer."""
    experts = model.experts
    assert experts is not None
    at = f"model.layers.{layer}"
    block = f"{at}.block_sparse_moe" if model.family == "mixtral" else f"{at}.mlp"
    found = _norm(f"{at}.post_attention_layernorm", model.hidden_size)
    found += _matrix(f"{block}.gate", (experts.num_experts, model.hidden_size), "router")
    routed = tuple(
        parameter
        for expert in range(experts.num_experts)
        for parameter in _expert(model, experts, f"{block}.experts.{expert}")
    )
    shared = experts.shared_intermediate_size
    beside = _gated_mlp(model, f"{block}.shared_experts", shared) if shared else ()
    return Segment(kind="moe", layer=layer, parameters=(*found, *routed, *beside))


def _expert(model: ModelSpec, experts: Experts, at: str) -> tuple[Parameter, ...]:
    hidden, inner = model.hidden_size, experts.intermediate_size
    mixtral = model.family == "mixtral"
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    found = _matrix(f"{at}.{gate}", (inner, hidden), "expert_column")
    found += _matrix(f"{at}.{up}", (inner, hidden), "expert_column")
    return found + _matrix(f"{at}.{down}", (hidden, inner), "expert_row")
