"""Numbers and names out of a table's cells."""

from __future__ import annotations

import math
import re

COUNTS = (
    "hidden", "layers", "heads", "kv_heads", "ffn_hidden", "vocab", "seq_len", "num_experts", "top_k",
    "n_gpus", "tp", "pp", "vpp", "cp", "ep", "dp", "micro_batch", "global_batch",
)  # fmt: skip
AMOUNTS = ("params_b", "step_time_s", "tokens_per_s_per_gpu", "tflops_per_gpu", "mfu", "peak_mem_gib")
TEXTS = (
    "id", "family", "source", "model_name", "gpu", "zero_stage_or_fsdp", "schedule", "precision", "recompute",
    "sequence_parallel", "distributed_optimizer", "overlap", "flops_convention", "trust", "notes",
)  # fmt: skip
COLUMNS = (*TEXTS, *COUNTS, *AMOUNTS, "year")
LARGEST = 1e15
_UNITS = {"seq_len": ("k", 1024), "step_time_s": ("s", 1.0)}  # that a cell may end with; else "%"
_NOTHING = {"", "-", "none", "--", "n/a", "na", "nan", "none stated", "unknown", "?", "null"}


class RowError(ValueError):
    """A row that cannot be scored; the message is the reason shown."""


def normal(text: str) -> str:
    """Lower case, with everything but letters, digits and dots dropped: how names are compared."""
    return re.sub(r"[^a-z0-9.]+", "", text.lower())


def amount(name: str, text: str) -> float | None:
    """The positive number in a cell, None where it is empty. Raises RowError for anything else.

    "8k" is a length of 8192, "1.5 s" a step, "45" and "45 %" are utilisations of 0.45.
    """
    cell = text.strip()
    if cell.lower() in _NOTHING:
        return None
    unit, scale = _UNITS.get(name, ("%", 0.01))
    bare = cell.lstrip("~≈").replace(",", "").strip()
    if with_unit := bare.lower().endswith(unit):
        bare = bare[: -len(unit)]
    try:
        value = float(bare) * (scale if with_unit else 1.0)
    except ValueError:
        raise RowError(f"{name} must be a number, got {cell[:40]!r}") from None
    value = value / 100 if name == "mfu" and value > 1 else value
    if not math.isfinite(value) or not 0 < value < LARGEST:
        raise RowError(f"{name} must be positive and finite, got {cell[:40]!r}")
    if name == "mfu" and value > 1:
        raise RowError(f"mfu must be at most 1, or 100 %, got {cell[:40]!r}")
    return value


def count(name: str, text: str) -> int | None:
    """The positive whole number in a cell, None where it is empty. Raises RowError for anything else."""
    value = amount(name, text)
    if value is None:
        return None
    if value != int(value):
        raise RowError(f"{name} must be a whole number, got {text.strip()[:40]!r}")
    return int(value)


def year_of(text: str) -> int | None:
    """The first year in a text such as "Jul 2024", or of a release such as 24.07."""
    if found := re.search(r"(?:19|20)\d\d(?!\d)", text):
        return int(found[0])
    release = re.search(r"\b(2\d)\.(?:0[1-9]|1[0-2])\b", text)
    return 2000 + int(release[1]) if release else None


def sharding(text: str) -> tuple[int | None, int | None, bool]:
    """Stage, ranks of a shard (None: all) and whether the optimizer is on the host, from "zero1-group8"."""
    words = text.lower()
    stage: int | None = None
    if found := re.search(r"zero[ -]?(?:stage[ -]?)?([0-3])", words):
        stage = int(found[1])
    elif "fsdp" in words or "hsdp" in words or "full_shard" in words:
        stage = 2 if "grad_op" in words else 3
    elif words.strip() in ("ddp", "none", "no", "dp", "0"):
        stage = 0
    elif "distributed" in words or "dist-opt" in words:
        stage = 1
    elif words.strip() in ("1", "2", "3"):
        stage = int(words)
    group = re.search(r"(?:group|shard|hsdp)[ _=:-]?(\d+)", words)
    return stage, int(group[1]) if group else None, "offload" in words


def recomputation(text: str) -> tuple[str | None, float | None]:
    """Mode ("none", "selective", "full") and layers recomputed (None: all; below 1 a share) from a cell.

    Recomputing the MLP alone repeats most of a layer: it is taken as full recompute of 0.8 of the layers, the
    MLP's share of a large model's weights.
    """
    words = text.lower().strip()
    if not words:
        return None, None
    if words in ("none", "no", "false", "0", "off", "disabled"):
        return "none", None
    layers = re.search(r"(?:full|block|uniform)\D*(\d+)", words)
    if layers and "selective" not in words:
        return "full", float(layers[1])
    if "mlp" in words or "moe" in words.replace("moe_act", ""):
        return "full", 0.8
    if "selective" in words or "attn" in words or "attention" in words:
        return "selective", None
    return "full", None


def product_format(text: str, architecture: str) -> str:
    """The format of the large products, from a name such as "bf16-amp", "fp8-cs" or "mxfp8"."""
    words = re.sub(r"\bhalf\b", "fp16", text.lower())
    words = re.sub(r"float[-_ ]?(?=\d)", "fp", re.sub(r"b(rain)?[-_ ]?float[-_ ]?16", "bf16", words))
    if "fp4" in words:
        return "nvfp4"
    if "mx" in words:
        return "mxfp8"
    if re.search(r"fp8|e4m3|e5m2", words):
        fine = any(word in words for word in ("finer", "block", "subchannel", "fp8-sc", "fp8_sc", "fp8sc"))
        return ("mxfp8" if architecture == "blackwell" else "fp8-blockwise") if fine else "fp8"
    for name in ("bf16", "fp16", "tf32", "fp64", "fp32"):
        if name in words:
            return name
    if "mixed" in words or "amp" in words:
        return "fp16" if architecture == "volta" else "bf16"
    raise RowError(f"precision {text[:40]!r} is not a known one")


def number_in(pattern: str, text: str) -> float | None:
    """The product of the numbers that the first match of ``pattern`` captures in ``text``."""
    found = re.search(pattern, text, re.IGNORECASE)
    if found is None:
        return None
    captured = [float(group) for group in found.groups() if group]
    return math.prod(captured) if captured else None
