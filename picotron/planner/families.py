"""Reading each family's Hugging Face ``config.json`` into a ``ModelSpec``; ``export`` writes it back.

A family (``model_type``) is a row in a table of functions that read its keys. Sizes must be in the
configuration; a default stands only for a key that published configurations leave out, and is then the
default of transformers. Keys that change the architecture in a way no ``ModelSpec`` can say (sliding windows,
partial rotation, cross attention) are refused by name; keys that do not shape the trained model (token ids,
dropout, caches, multi-token prediction) are passed over.

SOURCES: ``presets/models/*.json`` are public Hugging Face model configurations by their published names, cut
down to the keys that shape the model; DeepSeek-V3's carries no rotary scaling. gpt3-175b is
Brown et al. 2020, arXiv:2005.14165, table 2.1, in GPT-2's keys with a vocabulary of 51,200. llama-tiny is
our own: 2.5 million parameters over bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from picotron.errors import PlanError
from picotron.planner.config_rope import rope_of
from picotron.planner.config_values import (
    REQUIRED,
    Config,
    divided,
    flag_of,
    must_equal,
    number_of,
    size_of,
    value_of,
)
from picotron.planner.export import write
from picotron.planner.model import (
    FAMILIES,
    Activation,
    Experts,
    LatentAttention,
    ModelSpec,
)
from picotron.planner.records import hint
from picotron.planner.validators import is_size, shown

__all__ = ["preset_names", "read", "write"]


_PRESETS = Path(__file__).parent / "presets" / "models"
_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def preset_names() -> tuple[str, ...]:
    """The names of the shipped configurations, sorted."""
    return tuple(sorted(path.stem for path in _PRESETS.glob("*.json")))


def read(source: str | os.PathLike[str] | Config, *, name: str | None = None) -> ModelSpec:
    """The model of a preset's name, of a ``config.json`` or the folder that holds it, or of its dict."""
    if isinstance(source, Mapping):
        config, found_name = source, source.get("_name_or_path") or source.get("model_type")
    elif isinstance(source, str | os.PathLike):
        path = _find(source)
        config = _load(path)
        found_name = path.resolve().parent.name if path.name == "config.json" else path.stem
    else:
        raise PlanError(
            f"a model must be a preset's name, a path to config.json or its dict, got {type(source).__name__}"
        )
    family = config.get("model_type")
    if not isinstance(family, str) or family not in _READERS:
        raise PlanError(f"model_type must be one of {FAMILIES}, got {shown(family)}{hint(family, FAMILIES)}")
    chosen_name = found_name if name is None else name
    fields = {"name": chosen_name, "family": family, **_READERS[family](config)}
    return ModelSpec(**fields)


def _find(source: str | os.PathLike[str]) -> Path:
    """The file that ``source`` names: a preset first, then a file, then a folder's config.json."""
    if isinstance(source, str) and source in preset_names():
        return _PRESETS / f"{source}.json"
    path = Path(source)
    if os.path.isdir(source):
        return path / "config.json"
    is_name = isinstance(source, str) and path.name == source and path.suffix != ".json"
    if is_name and not os.path.exists(source):
        raise PlanError(
            f"a model must be the name of a preset or a path to config.json, got {shown(source)}"
            f"{hint(source, preset_names())}; presets: {', '.join(preset_names())}"
        )
    return path


def _load(path: Path) -> Config:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(
            f"a model's config.json must be readable, got {error.strerror} at {os.fspath(path)!r}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise PlanError(f"a model's config.json must be JSON, got {error} in {os.fspath(path)!r}") from error
    if not isinstance(config, dict):
        raise PlanError(
            f"a model's config.json must hold an object, got {type(config).__name__} in {os.fspath(path)!r}"
        )
    return config


def _activation(config: Config, key: str) -> Activation:
    value = value_of(config, key)
    if not isinstance(value, str) or value not in _ACTIVATIONS:
        raise PlanError(f"{key} must be one of {tuple(_ACTIVATIONS)}, got {shown(value)}")
    return _ACTIVATIONS[value]


def _kv_heads(config: Config, *, optional: bool) -> int:
    """Key/value heads; null, or absent where optional, means one a head."""
    heads = size_of(config, "num_attention_heads")
    if value_of(config, "num_key_value_heads", None if optional else REQUIRED) is None:
        return heads
    divided(config, "num_attention_heads", "num_key_value_heads")
    return size_of(config, "num_key_value_heads")


def _head_dim(config: Config, *, default: int | None = None) -> int:
    if value_of(config, "head_dim", default) is None:
        return divided(config, "hidden_size", "num_attention_heads", remedy="; or give head_dim")
    return size_of(config, "head_dim", default)


def _attention_bias(config: Config) -> dict[str, bool]:
    bias = flag_of(config, "attention_bias", False)
    return {"qkv_bias": bias, "output_bias": bias}


def _decoder(config: Config) -> dict[str, Any]:
    """What every family but gpt2 spells alike."""
    _check_full_attention(config)
    return {
        "vocab_size": size_of(config, "vocab_size"),
        "hidden_size": size_of(config, "hidden_size"),
        "num_layers": size_of(config, "num_hidden_layers"),
        "num_heads": size_of(config, "num_attention_heads"),
        "intermediate_size": size_of(config, "intermediate_size"),
        "max_positions": size_of(config, "max_position_embeddings"),
        "norm": "rms",
        "norm_eps": number_of(config, "rms_norm_eps"),
        "activation": _activation(config, "hidden_act"),
        "gated_mlp": True,
        "tied_embeddings": flag_of(config, "tie_word_embeddings", False),
        "init_std": number_of(config, "initializer_range", 0.02),
        **rope_of(config),
    }


def _read_llama(config: Config) -> dict[str, Any]:
    return {
        **_decoder(config),
        **_attention_bias(config),
        "num_kv_heads": _kv_heads(config, optional=True),
        "head_dim": _head_dim(config),
        "mlp_bias": flag_of(config, "mlp_bias", False),
    }


def _read_qwen2(config: Config) -> dict[str, Any]:
    return {
        **_decoder(config),
        "num_kv_heads": _kv_heads(config, optional=False),
        "head_dim": _head_dim(config),
        "qkv_bias": True,
    }


def _read_qwen3(config: Config) -> dict[str, Any]:
    return {
        **_decoder(config),
        **_attention_bias(config),
        "num_kv_heads": _kv_heads(config, optional=False),
        "head_dim": _head_dim(config, default=128),
        "qk_norm": True,
    }


def _read_qwen3_moe(config: Config) -> dict[str, Any]:
    return {
        **_decoder(config),
        **_attention_bias(config),
        "num_kv_heads": _kv_heads(config, optional=False),
        "head_dim": _head_dim(config),
        "qk_norm": True,
        "experts": Experts(
            num_experts=size_of(config, "num_experts"),
            top_k=_top_k(config, "num_experts"),
            intermediate_size=size_of(config, "moe_intermediate_size"),
            dense_layers=_dense_layers(config),
            normalize_scores=flag_of(config, "norm_topk_prob", False),
        ),
    }


def _read_mixtral(config: Config) -> dict[str, Any]:
    return {
        **_decoder(config),
        "num_kv_heads": _kv_heads(config, optional=False),
        "head_dim": _head_dim(config),
        "experts": Experts(
            num_experts=size_of(config, "num_local_experts"),
            top_k=_top_k(config, "num_local_experts"),
            intermediate_size=size_of(config, "intermediate_size"),
        ),
    }


def _read_deepseek_v3(config: Config) -> dict[str, Any]:
    for key, supported in (
        ("attention_bias", False),
        ("moe_layer_freq", 1),
        ("scoring_func", "sigmoid"),
        ("topk_method", "noaux_tc"),
    ):
        must_equal(config, key, supported)
    latent = _latent(config)
    return {
        **_decoder(config),
        "num_kv_heads": _kv_heads(config, optional=True),
        "head_dim": latent.qk_nope_head_dim + latent.qk_rope_head_dim,
        "experts": _deepseek_experts(config),
        "latent_attention": latent,
    }


def _latent(config: Config) -> LatentAttention:
    full_query = value_of(config, "q_lora_rank") is None
    return LatentAttention(
        q_lora_rank=None if full_query else size_of(config, "q_lora_rank"),
        kv_lora_rank=size_of(config, "kv_lora_rank"),
        qk_nope_head_dim=size_of(config, "qk_nope_head_dim"),
        qk_rope_head_dim=size_of(config, "qk_rope_head_dim"),
        v_head_dim=size_of(config, "v_head_dim"),
        interleaved=flag_of(config, "rope_interleave", True),
    )


def _deepseek_experts(config: Config) -> Experts:
    inner = size_of(config, "moe_intermediate_size")
    num_dense = min(size_of(config, "first_k_dense_replace", least=0), size_of(config, "num_hidden_layers"))
    divided(config, "n_routed_experts", "n_group")
    return Experts(
        num_experts=size_of(config, "n_routed_experts"),
        top_k=_top_k(config, "n_routed_experts"),
        intermediate_size=inner,
        shared_intermediate_size=inner * size_of(config, "n_shared_experts", least=0),
        dense_layers=tuple(range(num_dense)),
        score_function="sigmoid",
        normalize_scores=flag_of(config, "norm_topk_prob", True),
        routed_scale=number_of(config, "routed_scaling_factor"),
        num_groups=size_of(config, "n_group"),
        top_k_groups=size_of(config, "topk_group"),
    )


def _top_k(config: Config, experts_key: str) -> int:
    top_k, num_experts = size_of(config, "num_experts_per_tok"), size_of(config, experts_key)
    if top_k > num_experts:
        raise PlanError(f"num_experts_per_tok must be at most {experts_key} = {num_experts}, got {top_k}")
    return top_k


def _dense_layers(config: Config) -> tuple[int, ...]:
    """Layers without experts: those listed, and those that ``decoder_sparse_step`` skips."""
    listed, step = value_of(config, "mlp_only_layers", ()) or (), size_of(config, "decoder_sparse_step", 1)
    if not isinstance(listed, list | tuple) or not all(is_size(layer, 0) for layer in listed):
        raise PlanError(f"mlp_only_layers must be a list of layer indices, got {shown(listed)}")
    layers = range(size_of(config, "num_hidden_layers"))
    return tuple(layer for layer in layers if layer in listed or (layer + 1) % step)


def _check_full_attention(config: Config) -> None:
    """Refuse a configuration in which any layer attends through a sliding window."""
    types = value_of(config, "layer_types", None)
    remedy = "sliding-window attention is not supported"
    if types is not None and not isinstance(types, list | tuple):
        raise PlanError(f"layer_types must be a list of names, got {shown(types)}")
    windowed = [kind for kind in types or () if kind != "full_attention"]
    if windowed:
        raise PlanError(f"layer_types must all be 'full_attention', got {shown(windowed[0])}; {remedy}")
    window = value_of(config, "sliding_window", None)
    if config.get("model_type") == "mixtral":
        if window is not None:
            raise PlanError(f"sliding_window must be null, got {shown(window)}; {remedy}")
    elif types is None and window is not None and flag_of(config, "use_sliding_window", False):
        raise PlanError(f"use_sliding_window must be false, got true; {remedy}")


def _read_gpt2(config: Config) -> dict[str, Any]:
    for key, supported in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        must_equal(config, key, supported)
    hidden, heads = size_of(config, "n_embd"), size_of(config, "n_head")
    inner = value_of(config, "n_inner", None)
    return {
        "vocab_size": size_of(config, "vocab_size"),
        "hidden_size": hidden,
        "num_layers": size_of(config, "n_layer"),
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": divided(config, "n_embd", "n_head"),
        "intermediate_size": 4 * hidden if inner is None else size_of(config, "n_inner"),
        "max_positions": size_of(config, "n_positions"),
        "norm": "layer",
        "norm_eps": number_of(config, "layer_norm_epsilon"),
        "activation": _activation(config, "activation_function"),
        "gated_mlp": False,
        "rope_theta": None,
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "tied_embeddings": flag_of(config, "tie_word_embeddings", True),
        "init_std": number_of(config, "initializer_range", 0.02),
    }


_READERS: Mapping[str, Callable[[Config], dict[str, Any]]] = {
    "llama": _read_llama,
    "qwen2": _read_qwen2,
    "qwen3": _read_qwen3,
    "qwen3_moe": _read_qwen3_moe,
    "mixtral": _read_mixtral,
    "deepseek_v3": _read_deepseek_v3,
    "gpt2": _read_gpt2,
}
