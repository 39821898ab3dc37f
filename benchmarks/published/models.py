"""The sizes of a named model, and what its sizes come to in weights and FLOPs.

``models.json`` lists public configurations, each with a pattern that its names match: names are compared in
lower case with one hyphen for every run of other characters. A model whose printed sizes, or the billions in
whose name, contradict the listed ones (its number of layers aside: proxies are cut) is not that model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

_COMPARED = ("hidden", "heads", "kv_heads", "ffn_hidden", "vocab", "num_experts")
_CLOSE = 1.12  # of vocabularies, which are padded
_AS_LARGE = 1.35  # of the billions in two names of one model, which are rounded


def hyphened(name: str) -> str:
    """``name`` as the patterns of ``models.json`` are written: "LLAMA3.1_405B" is "llama3.1-405b"."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def known_model(name: str, printed: Mapping[str, Any]) -> dict[str, Any] | None:
    """The first listed model that ``name`` matches and the printed sizes do not contradict."""
    text = hyphened(name)
    named = (m for m in _table()["models"] if re.search(m["pattern"], text) and _is_as_large(m, text))
    return next((m for m in named if _agrees(m, printed)), None)


def billions(name: str) -> tuple[int, float] | None:
    """Experts and billions of weights that a name says: (8, 7.0) of "mixtral-8x7b", (1, 30.0) of "30b"."""
    found = re.search(r"(?<![a-z0-9.])(?:(\d+)x)?(\d+(?:\.\d+)?)(b|t|m)(?![a-z0-9])", hyphened(name))
    if found is None:
        return None
    return int(found[1] or 1), float(found[2]) * {"t": 1e3, "b": 1.0, "m": 1e-3}[found[3]]


def is_sparse_by_name(name: str) -> bool:
    """Whether a name speaks of experts, or of fewer active weights than all: "Qwen3-30B-A3B"."""
    return re.search(r"moe|-a\d+(\.\d+)?b\b", hyphened(name)) is not None


def model_of_sizes(printed: Mapping[str, Any]) -> dict[str, Any] | None:
    """The first listed model whose hidden size, layers, heads and experts are the printed ones."""
    if not all(printed.get(name) for name in ("hidden", "layers", "heads")):
        return None

    def equal(model: Mapping[str, Any]) -> bool:
        names = ("hidden", "layers", "heads", "num_experts")
        return all(model.get(name) == printed.get(name) for name in names) and _agrees(model, printed)

    return next((model for model in _table()["models"] if equal(model)), None)


def style(name: str) -> Mapping[str, Any]:
    """What the models of one lineage have in common: gates, norms, biases, tables."""
    return dict(_table()["styles"][name])


def style_names() -> tuple[str, ...]:
    return tuple(_table()["styles"])


def _is_as_large(model: Mapping[str, Any], name: str) -> bool:
    """Whether the sizes in both names, and experts in either, may be one model's."""
    if is_sparse_by_name(name) and not model.get("num_experts"):
        return False
    ours, theirs = billions(model["name"]), billions(name)
    if ours is None and theirs is not None and model.get("params_b"):
        ours = (1, model["params_b"])
    if ours is None or theirs is None:
        return True
    (own, large), (other, size) = ours, theirs
    return own == other and max(large, size) <= _AS_LARGE * min(large, size)


def _agrees(model: Mapping[str, Any], printed: Mapping[str, Any]) -> bool:
    def same(name: str) -> bool:
        ours, theirs = model.get(name), printed.get(name)
        if ours is None or theirs is None:
            return True
        if name == "vocab":
            return bool(max(ours, theirs) <= _CLOSE * min(ours, theirs))
        return bool(ours == theirs)

    return all(same(name) for name in _COMPARED if name != "kv_heads" or not model.get("kv_rank"))


def attention_weights(m: Mapping[str, float]) -> float:
    """Weights of one layer's attention projections, from the columns of ``ModelColumns``."""
    hidden, heads = m["hidden"], m["heads"]
    if m["kv_rank"]:
        query = hidden * m["query_rank"] + m["query_rank"] * heads * m["head_dim"]
        query = query if m["query_rank"] else hidden * heads * m["head_dim"]
        down = hidden * (m["kv_rank"] + m["rope_dim"])
        up = m["kv_rank"] * heads * (m["head_dim"] - m["rope_dim"] + m["value_dim"])
        return query + down + up + heads * m["value_dim"] * hidden
    return hidden * (
        heads * (m["head_dim"] + m["value_dim"]) + m["kv_heads"] * (m["head_dim"] + m["value_dim"])
    )


def matmul_weights(m: Mapping[str, float], *, active: bool = True, head: bool = True) -> float:
    """Weights used in products: those a token visits (``active``) or all; the embedding's table is none."""
    matrices = 3 if m["gated"] else 2
    dense = m["layers"] - m["moe_layers"]
    routed = (m["top_k"] if active else m["experts"]) * m["expert_intermediate"] + m["shared_intermediate"]
    layers = m["layers"] * attention_weights(m) + matrices * m["hidden"] * (
        dense * m["intermediate"] + m["moe_layers"] * routed
    )
    layers += m["moe_layers"] * m["hidden"] * m["experts"]
    return layers + (m["hidden"] * m["vocab"] if head else 0)


def total_weights(m: Mapping[str, float]) -> float:
    """All weights but norms and biases."""
    tables = m["hidden"] * (m["vocab"] * (1 if m["tied"] else 2) + m["learned_positions"])
    return matmul_weights(m, active=False, head=False) + tables


def score_flops(m: Mapping[str, float], seq_len: float) -> float:
    """Forward FLOPs a token of scores and values over the whole sequence (no mask): 2 products."""
    width = m["heads"] * (m["head_dim"] + m["value_dim"])
    seen = (m["layers"] - m["windowed_layers"]) * seq_len
    seen += m["windowed_layers"] * min(seq_len, 2 * m["window"] if m["window"] else seq_len)
    return 2 * width * seen


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads((Path(__file__).parent / "models.json").read_text(encoding="utf-8"))
    return table
