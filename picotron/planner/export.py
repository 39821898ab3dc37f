"""A ``ModelSpec`` as the Hugging Face ``config.json`` from which transformers builds the same architecture.

``families`` reads it back into an equal model.
"""

from __future__ import annotations

from typing import Any

from picotron.planner.model import Experts, LatentAttention, ModelSpec, RopeScaling

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}
_ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}


def write(model: ModelSpec) -> dict[str, Any]:
    """The ``config.json`` from which transformers builds the same architecture."""
    written = _gpt2(model) if model.family == "gpt2" else _decoder(model)
    return {"_name_or_path": model.name, "model_type": model.family, **written}


def _gpt2(model: ModelSpec) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": model.vocab_size,
        "n_embd": model.hidden_size,
        "n_layer": model.num_layers,
        "n_head": model.num_heads,
        "n_inner": model.intermediate_size,
        "n_positions": model.max_positions,
        "layer_norm_epsilon": model.norm_eps,
        "activation_function": "gelu_new" if model.activation == "gelu_tanh" else model.activation,
        "tie_word_embeddings": model.tied_embeddings,
        "initializer_range": model.init_std,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
    }


def _decoder(model: ModelSpec) -> dict[str, Any]:
    """The keys of every family but gpt2."""
    written = {
        "architectures": [_ARCHITECTURES[model.family]],
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "intermediate_size": model.intermediate_size,
        "max_position_embeddings": model.max_positions,
        "rms_norm_eps": model.norm_eps,
        "hidden_act": _ACTIVATIONS[model.activation],
        "rope_theta": model.rope_theta,
        "rope_scaling": _rope_scaling(model.rope_scaling),
        "tie_word_embeddings": model.tied_embeddings,
        "initializer_range": model.init_std,
        "head_dim": model.head_dim,
    }
    if model.family in ("llama", "qwen3", "qwen3_moe"):
        written["attention_bias"] = model.qkv_bias
    if model.family == "llama":
        written["mlp_bias"] = model.mlp_bias
    if model.experts is not None:
        written |= _experts(model, model.experts)
    if model.latent_attention is not None:
        written |= _latent(model.latent_attention)
        del written["head_dim"]
    return written


def _rope_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """The keys that this kind reads, None left out."""
    if scaling is None:
        return None
    written = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        names = ["low_freq_factor", "high_freq_factor"]
    elif scaling.kind == "yarn":
        names = ["beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"]
    else:
        return written
    written |= {name: getattr(scaling, name) for name in names if getattr(scaling, name) is not None}
    return written | {"original_max_position_embeddings": scaling.original_max_positions}


def _experts(model: ModelSpec, experts: Experts) -> dict[str, Any]:
    if model.family == "mixtral":
        return {"num_local_experts": experts.num_experts, "num_experts_per_tok": experts.top_k}
    common = {
        "num_experts_per_tok": experts.top_k,
        "moe_intermediate_size": experts.intermediate_size,
        "norm_topk_prob": experts.normalize_scores,
    }
    if model.family == "qwen3_moe":
        return common | {
            "num_experts": experts.num_experts,
            "mlp_only_layers": list(experts.dense_layers),
            "decoder_sparse_step": 1,
        }
    return common | {
        "n_routed_experts": experts.num_experts,
        "n_shared_experts": experts.shared_intermediate_size // experts.intermediate_size,
        "first_k_dense_replace": len(experts.dense_layers),
        "n_group": experts.num_groups,
        "topk_group": experts.top_k_groups,
        "routed_scaling_factor": experts.routed_scale,
        "scoring_func": experts.score_function,
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 0,
    }


def _latent(latent: LatentAttention) -> dict[str, Any]:
    return {
        "q_lora_rank": latent.q_lora_rank,
        "kv_lora_rank": latent.kv_lora_rank,
        "qk_nope_head_dim": latent.qk_nope_head_dim,
        "qk_rope_head_dim": latent.qk_rope_head_dim,
        "v_head_dim": latent.v_head_dim,
        "rope_interleave": latent.interleaved,
        "attention_bias": False,
    }
