"""Rules of ``imputation.json`` for a model's sizes: each a function of the row so far.

A rule returns the value of its column, a dict for several cells at once, or None where it does not apply.
"""

from __future__ import annotations

import re
from typing import Any

from . import models
from .text import RowError

Facts = dict[str, Any]

_STYLES = (("mpt", "mpt"), ("bloom", "bloom"), ("falcon", "falcon"), ("nemotron", "nemotron"), ("opt", "gpt"))
_LLAMAS = (
    "llama",
    "qwen",
    "mistral",
    "mixtral",
    "deepseek",
    "kimi",
    "glm",
    "baichuan",
    "internlm",
    "yi-",
    "moe",
)
_SPARSE = (
    r"moe|-a\d+(\.\d+)?b|nemotron-?(v?3|3\.5)|deepseek|kimi|gpt-?oss|glm-?[45]|llama-?4|minimax|ernie-?4"
)
_OTHERS = (
    r"mamba|rwkv|bert|t5|ul2|vit|clip|whisper|diffusion|jamba|-mix|switch|glam|x\d+e"  # no dense decoders
)


def known_model(facts: Facts) -> dict[str, Any] | None:
    model = models.known_model(facts["model_name"], facts)
    if model is None:
        return None
    return _listed(model)


def model_of_sizes(facts: Facts) -> dict[str, Any] | None:
    model = None if facts.get("listed") else models.model_of_sizes(facts)
    return None if model is None else _listed(model)


def _listed(model: dict[str, Any]) -> dict[str, Any]:
    sizes = {name: value for name, value in model.items() if name not in ("pattern", "source", "name")}
    return {**sizes, "listed": model["name"]}


def style_by_name(facts: Facts) -> str | None:
    name = models.hyphened(facts["model_name"])
    for start, style in _STYLES:
        if name.startswith(start):
            return style
    return "llama" if any(part in name for part in _LLAMAS) else None


def style_by_sizes(facts: Facts) -> str:
    hidden, width, heads, grouped = (facts.get(n) for n in ("hidden", "ffn_hidden", "heads", "kv_heads"))
    if grouped and heads and grouped < heads:
        return "llama"
    if facts.get("num_experts") or (hidden and width and width != 4 * hidden):
        return "llama"
    named = models.hyphened(facts["model_name"]).startswith(("gpt", "megatron", "bert", "t5"))
    return "gpt" if named or (facts["year"] or 2030) <= 2022 or (hidden and width) else "llama"


def parameters_in_name(facts: Facts) -> float | None:
    """The billions in the name of a dense decoder that is not listed."""
    name = models.hyphened(facts["model_name"])
    known = facts.get("listed") or (facts.get("hidden") and facts.get("layers"))
    if known or facts.get("num_experts") or (facts.get("ep") or 1) > 1 or re.search(_SPARSE, name):
        return None
    said = models.billions(name)
    return None if said is None or said[0] > 1 or re.search(_OTHERS, name) else said[1]


def generic_model(facts: Facts) -> dict[str, Any] | None:
    """Hidden and layers of a Llama with as many parameters: 12 h² weights a layer, h / 128 layers."""
    if facts.get("hidden") and facts.get("layers"):
        return None
    sparse = (
        facts.get("num_experts")
        or (facts.get("ep") or 1) > 1
        or re.search(_SPARSE, models.hyphened(facts["model_name"]))
    )
    if sparse or not facts.get("params_b"):
        raise RowError(f"model {facts['model_name'][:40]!r} is not listed, and its sizes are not stated")
    if facts.get("hidden"):
        return {"layers": max(1, round(facts["params_b"] * 1e9 / (12 * facts["hidden"] ** 2)))}
    hidden = max(1, round((facts["params_b"] * 1e9 * 128 / 12) ** (1 / 3) / 128)) * 128
    return {"hidden": hidden, "layers": max(1, hidden // 128)}


def heads(facts: Facts) -> int:
    return max(1, facts["hidden"] // (facts.get("head_dim") or 128), facts.get("kv_heads") or 1)


def kv_heads(facts: Facts) -> Any:
    return facts["heads"]


def mlp_width(facts: Facts) -> int:
    hidden: int = facts["hidden"]
    return -(-8 * hidden // 3 // 256) * 256 if models.style(facts["style"])["gated"] else 4 * hidden


def tied(facts: Facts) -> int | None:
    """Which of one or two tables comes nearer to the printed number of parameters."""
    if facts.get("listed") or not facts.get("params_b") or not facts.get("vocab") or facts.get("num_experts"):
        return None
    style = models.style(facts["style"])
    hidden, layers = facts["hidden"], facts["layers"]
    share = facts["kv_heads"] / facts["heads"]
    layer = (2 + 2 * share) * hidden**2 + (3 if style["gated"] else 2) * hidden * facts["ffn_hidden"]
    table = hidden * facts["vocab"]
    excess = facts["params_b"] * 1e9 - layers * layer
    return int(abs(excess - table) <= abs(excess - 2 * table))


def vocab(facts: Facts) -> int:
    if facts["style"] == "mpt":
        return 50368
    if facts["style"] in ("gpt", "bloom", "falcon"):
        return 51200
    return 32000 if (facts["year"] or 2030) <= 2023 else 128256


def expert_width(facts: Facts) -> Any:
    return facts["ffn_hidden"] if facts.get("num_experts") else None
