"""Strategies for the model room: valid configurations of every family, built from valid parts."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from picotron.planner.model import FAMILIES, ModelSpec


@st.composite
def rope_scalings(draw: st.DrawFn) -> dict[str, Any] | None:
    """A ``rope_scaling`` object of any supported kind, or none."""
    kind = draw(st.sampled_from([None, "default", "linear", "llama3", "yarn"]))
    if kind in (None, "default"):
        return kind and {"rope_type": kind}
    scaling: dict[str, Any] = {"rope_type": kind, "factor": draw(st.sampled_from([2, 4.0, 8.5]))}
    if kind == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": draw(st.integers(2, 4))}
    if kind == "yarn":
        scaling |= draw(
            st.fixed_dictionaries({}, optional={"mscale": st.just(0.7), "beta_fast": st.just(24)})
        )
    if kind != "linear":
        scaling["original_max_position_embeddings"] = draw(st.integers(8, 32))
    return scaling


@st.composite
def configs(draw: st.DrawFn, families: tuple[str, ...] = FAMILIES, max_layers: int = 3) -> dict[str, Any]:
    """A small Hugging Face configuration of one of ``families``."""
    family = draw(st.sampled_from(families))
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads = kv_heads if family in ("gpt2", "deepseek_v3") else kv_heads * group
    num_layers = draw(st.integers(1, max_layers))
    if family == "gpt2":
        return _gpt2(draw, heads, num_layers)
    config: dict[str, Any] = {
        "model_type": family,
        "vocab_size": draw(st.integers(1, 40)),
        "hidden_size": heads * 2 * draw(st.integers(1, 4)),
        "intermediate_size": draw(st.integers(1, 24)),
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": draw(st.integers(64, 80)),
        "rms_norm_eps": draw(st.sampled_from([1e-5, 1e-6])),
        "hidden_act": draw(st.sampled_from(["silu", "gelu_pytorch_tanh"])),
        "rope_theta": draw(st.sampled_from([10000, 500000.0])),
        "rope_scaling": draw(rope_scalings()),
        "tie_word_embeddings": draw(st.booleans()),
    }
    return config | _of_family(draw, family, num_layers)


def _gpt2(draw: st.DrawFn, heads: int, num_layers: int) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "vocab_size": draw(st.integers(1, 40)),
        "n_embd": heads * draw(st.integers(1, 8)),
        "n_layer": num_layers,
        "n_head": heads,
        "n_inner": draw(st.none() | st.integers(1, 24)),
        "n_positions": draw(st.integers(1, 80)),
        "layer_norm_epsilon": 1e-5,
        "activation_function": draw(st.sampled_from(["gelu_new", "silu"])),
        "tie_word_embeddings": draw(st.booleans()),
    }


def _of_family(draw: st.DrawFn, family: str, num_layers: int) -> dict[str, Any]:
    """The keys that only this family, or few, have."""
    own: dict[str, Any] = {}
    if family != "deepseek_v3":
        own["head_dim"] = 2 * draw(st.integers(1, 6))
    if family in ("llama", "qwen3", "qwen3_moe"):
        own["attention_bias"] = draw(st.booleans())
    if family == "llama":
        own["mlp_bias"] = draw(st.booleans())
    if family in ("mixtral", "qwen3_moe", "deepseek_v3"):
        own |= _experts(draw, family, num_layers)
    if family == "deepseek_v3":
        own |= {
            "q_lora_rank": draw(st.none() | st.integers(1, 9)),
            "kv_lora_rank": draw(st.integers(1, 9)),
            "qk_nope_head_dim": draw(st.integers(1, 9)),
            "qk_rope_head_dim": 2 * draw(st.integers(1, 4)),
            "v_head_dim": draw(st.integers(1, 9)),
        }
    return own


def _experts(draw: st.DrawFn, family: str, num_layers: int) -> dict[str, Any]:
    num_groups, group_size = draw(st.integers(1, 3)), draw(st.integers(2, 3))
    num_experts = num_groups * group_size
    top_k_groups = draw(st.integers(1, num_groups))
    limit = top_k_groups * group_size if family == "deepseek_v3" else num_experts
    top_k = {"num_experts_per_tok": draw(st.integers(1, limit))}
    if family == "mixtral":
        return top_k | {"num_local_experts": num_experts}
    common = top_k | {"moe_intermediate_size": draw(st.integers(1, 9)), "norm_topk_prob": draw(st.booleans())}
    if family == "qwen3_moe":
        return common | {
            "num_experts": num_experts,
            "decoder_sparse_step": draw(st.integers(1, 2)),
            "mlp_only_layers": sorted(draw(st.sets(st.integers(0, num_layers - 1), max_size=1))),
        }
    return common | {
        "n_routed_experts": num_experts,
        "n_shared_experts": draw(st.integers(1, 2)),
        "first_k_dense_replace": draw(st.integers(0, num_layers)),
        "n_group": num_groups,
        "topk_group": top_k_groups,
        "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5])),
    }


def models(families: tuple[str, ...] = FAMILIES, max_layers: int = 3) -> st.SearchStrategy[ModelSpec]:
    """A small model of one of ``families``."""
    return configs(families, max_layers).map(ModelSpec.from_hf)
