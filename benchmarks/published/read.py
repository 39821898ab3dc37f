"""From a CSV with the header of ``benchmarks/data/measured.csv`` to rows in base units.

A row that contradicts itself, lacks what no rule can give, or is not a number where it should be, is skipped
with a reason; nothing in a file raises but a file that is no such table.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from picotron.errors import PlanError
from picotron.planner.cases import ORDERS, PRODUCT_FORMATS, RECOMPUTES, SCHEDULE_NAMES

from . import models, text
from .conventions import flops_per_token, printed_peak
from .fit import FIT, fitted
from .impute import complete
from .machines import known_machine, machine_values
from .row import PublishedRow
from .text import RowError

Facts = dict[str, Any]
_NEEDED = ("model_name", "gpu", "n_gpus", "seq_len", "global_batch")


def read_rows(path: str | os.PathLike[str]) -> list[PublishedRow]:
    """Every row of the file, in order. Raises PlanError if it cannot be read or has another header."""
    try:
        with Path(path).open(encoding="utf-8-sig", newline="", errors="replace") as file:
            reader = csv.DictReader(file)
            names = [name.strip() for name in reader.fieldnames or ()]
            if missing := [name for name in _NEEDED if name not in names]:
                raise PlanError(f"{os.fspath(path)} must have the header of measured.csv, missing {missing}")
            reader.fieldnames = names
            return fitted([_row(cells, number) for number, cells in enumerate(reader, start=1)])
    except (OSError, csv.Error) as error:
        raise PlanError(f"rows must be a readable CSV file: {error}") from error


def _row(cells: Mapping[Any, Any], number: int) -> PublishedRow:
    words = {name: str(cells.get(name) or "").strip() for name in text.COLUMNS}
    named = {
        "id": words["id"] or f"row-{number}",
        "family": words["family"] or "unnamed",
        "trust": words["trust"].upper() or "unstated",
        "model_name": words["model_name"],
    }
    facts: Facts = {}
    try:
        facts = _facts(words)
        return _completed(named, facts)
    except RowError as reason:
        return PublishedRow(**named, gpu=words["gpu"], skipped=str(reason), facts=facts)


def _facts(words: Mapping[str, str]) -> Facts:
    facts: Facts = {name: words[name] for name in text.TEXTS}
    facts |= {name: text.count(name, words[name]) for name in text.COUNTS}
    facts |= {name: text.amount(name, words[name]) for name in text.AMOUNTS}
    facts["year"] = text.year_of(words["year"]) or text.year_of(words["source"])
    facts["chunked_loss"] = "liger" in words["notes"].lower()
    facts["zero"], facts["shard"], facts["optimizer_on_host"] = text.sharding(words["zero_stage_or_fsdp"])
    facts["recompute_mode"], facts["recompute_layers"] = text.recomputation(words["recompute"])
    flag = words["sequence_parallel"].lower()
    facts["sequence_parallel_flag"] = None if not flag else int(flag in ("yes", "true", "1", "on"))
    return facts


def _completed(named: Mapping[str, str], facts: Facts) -> PublishedRow:
    measured = [facts[name] for name in ("step_time_s", "tokens_per_s_per_gpu", "tflops_per_gpu", "mfu")]
    if not any(measured) and not facts["peak_mem_gib"]:
        raise RowError("no step time, tokens/s, TFLOP/s, utilisation or peak memory is printed")
    if "lora" in (facts["model_name"] + facts["notes"]).lower():
        raise RowError("adapters alone are trained (LoRA), which no plan says")
    machine = known_machine(facts["gpu"])
    if machine is None:
        raise RowError(f"unknown GPU {facts['gpu'][:40]!r}" if facts["gpu"] else "the GPU is not stated")
    facts["precision"] = facts["precision"] or None
    imputed = complete(facts)
    _check(facts)
    product = text.product_format(facts["precision"], machine["architecture"])
    model = _model(facts)
    seconds, source = _seconds(facts, model, product)
    return PublishedRow(
        **named,
        gpu=facts["gpu"],
        precision=facts["precision"],
        num_gpus=facts["n_gpus"],
        profile=facts["profile"],
        architecture=machine["architecture"],
        model=model,
        work=_work(facts, product),
        machine=_machine(facts, machine_values(machine, product)),
        layout=_layout(facts, model),
        measured_step_seconds=seconds,
        time_from=source,
        measured_peak_bytes=facts["peak_mem_gib"] * facts["memory_unit"] if facts["peak_mem_gib"] else None,
        memory_kind=facts["memory_kind"] if facts["peak_mem_gib"] else "",
        imputed=imputed,
        facts=facts,
    )


def _check(facts: Facts) -> None:
    """Raises RowError where two cells cannot both be true."""
    dp, tp, pp, cp, ep = (facts[name] for name in ("dp", "tp", "pp", "cp", "ep"))
    if dp * tp * pp * cp != facts["n_gpus"]:
        if cp > 1 and dp * tp * pp == facts["n_gpus"] and dp % cp == 0:  # printed with cp inside
            facts["dp"] = dp = dp // cp
        else:
            raise RowError(f"dp tp pp cp = {dp * tp * pp * cp} contradicts {facts['n_gpus']} GPUs")
    batch, passed = facts["global_batch"], dp * facts["micro_batch"]
    if batch % passed:
        raise RowError(f"global_batch {batch} is no multiple of dp micro_batch = {passed}")
    if pp * facts["vpp"] > facts["layers"] + 2:
        raise RowError(f"{pp} stages of {facts['vpp']} parts are more than {facts['layers']} layers")
    if ep > 1 and (dp * cp * tp) % ep:
        raise RowError(f"ep = {ep} does not divide dp cp tp = {dp * cp * tp}")
    if facts.get("num_experts") and facts["num_experts"] < facts["top_k"]:
        raise RowError(f"top_k = {facts['top_k']} of {facts['num_experts']} experts")
    if facts["kv_heads"] > facts["heads"]:
        raise RowError(f"{facts['kv_heads']} key-value heads of {facts['heads']} heads")
    if facts.get("params_b") and facts["params_b"] > 1e5:
        raise RowError(f"params_b must be in billions, got {facts['params_b']:g}")


def _model(facts: Facts) -> dict[str, float]:
    style = models.style(facts["style"])
    experts = facts.get("num_experts") or 0
    head_dim = facts.get("head_dim") or facts["hidden"] / facts["heads"]
    tied = facts.get("tied")
    latent = facts["hidden"] / (facts.get("latent") or facts["hidden"])
    windowed = round((facts.get("windowed_share") or 0) * facts["layers"])
    if facts.get("window") and facts["window"] >= facts["seq_len"]:
        windowed = 0
    return {
        "hidden": facts["hidden"],
        "layers": facts["layers"],
        "heads": facts["heads"],
        "kv_heads": facts["kv_heads"],
        "head_dim": head_dim,
        "value_dim": facts.get("value_dim") or head_dim,
        "intermediate": facts["ffn_hidden"],
        "gated": style["gated"],
        "vocab": facts["vocab"],
        "tied": style["tied"] if tied is None else tied,
        "learned_positions": facts["seq_len"] if style["learned_positions"] else 0,
        "layer_norm": style["layer_norm"],
        "biases": style["biases"],
        "head_norms": facts.get("head_norms") or 0,
        "query_rank": facts.get("query_rank") or 0,
        "kv_rank": facts.get("kv_rank") or 0,
        "rope_dim": facts.get("rope_dim") or 0,
        "moe_layers": facts["layers"] - (facts.get("dense_layers") or 0) if experts else 0,
        # experts in a latent width: fewer of the full width have as many weights, FLOPs and bytes dispatched
        "expert_latent": latent,
        "experts": experts / latent,
        "top_k": (facts.get("top_k") or 0) / latent if experts else 0,
        "expert_intermediate": (facts.get("expert_intermediate") or 0) if experts else 0,
        "shared_intermediate": (facts.get("shared_intermediate") or 0) if experts else 0,
        "windowed_layers": windowed,
        "window": (facts.get("window") or 0) if windowed else 0,
    }


def _work(facts: Facts, product: str) -> dict[str, float]:
    wide = product in ("fp32", "fp64", "tf32")
    on_host = facts["optimizer_on_host"]
    return {
        "global_batch": facts["global_batch"],
        "seq_len": facts["seq_len"],
        "compute_bytes": 4 if wide else 2,
        "product_format": PRODUCT_FORMATS.index(product),
        "gradient_bytes": 4 if wide else facts["gradient_bytes"],
        "wire_bytes": 4 if wide else facts["wire_bytes"],
        "main_bytes": 0 if wide or on_host else 4,
        "moment_bytes": 0 if on_host else 8,
        "trained_head": 1,
    }


def _machine(facts: Facts, values: dict[str, float]) -> dict[str, float]:
    node = facts.get("devices_per_node")
    network: dict[str, float] = {}
    if node:
        network["devices_per_node"] = max(1, min(node, values["devices_per_node"]) if node > 8 else node)
    if bits := facts.get("network_bits_per_gpu"):
        network["inter_bytes_per_second"] = bits / 8
    elif bits := facts.get("network_bits_per_node"):
        network["inter_bytes_per_second"] = bits / 8 / (node or values["devices_per_node"])
    return {**values, **network}


def _layout(facts: Facts, model: Mapping[str, float]) -> dict[str, float]:
    ranks = facts["dp"] * facts["cp"]
    mode, layers = facts["recompute_mode"], facts["recompute_layers"]
    share = 1.0 if layers is None else layers if layers < 1 else min(1.0, layers / facts["layers"])
    sparse = model["moe_layers"] > 0
    return {
        **{name: facts[name] for name in ("dp", "pp", "cp", "tp")},
        "ep": facts["ep"] if sparse else 1,
        "etp": facts["etp"] if sparse else 1,
        "virtual_stages": facts["vpp"],
        "schedule": SCHEDULE_NAMES.index(facts["schedule_index"]),
        "micro_batch": facts["micro_batch"],
        "zero_stage": facts["zero"],
        "shard": min(facts["shard"] or ranks, ranks) if facts["zero"] else 1,
        "sequence_parallel": facts["sequence_parallel_flag"] if facts["tp"] > 1 else 0,
        "recompute": RECOMPUTES.index("none" if mode == FIT else mode),
        "recompute_layers": 0.0 if mode in ("none", FIT) else share,
        "offload": min(1.0, (facts.get("offload_layers") or 0) / facts["layers"]),
        "ends": facts["ends"],
        "order": ORDERS.index(("pp", "dp", "cp", "tp")),
    }


def _seconds(facts: Facts, model: Mapping[str, float], product: str) -> tuple[float | None, str]:
    """Step time and what it was read from: the most direct of what is printed."""
    tokens = facts["global_batch"] * facts["seq_len"]
    if facts["step_time_s"] and not facts.get("batch_is_guessed"):
        seconds, source = facts["step_time_s"], "step"
    elif facts["tokens_per_s_per_gpu"]:
        seconds, source = tokens / (facts["tokens_per_s_per_gpu"] * facts["n_gpus"]), "tokens"
    elif facts["tflops_per_gpu"] or facts["mfu"]:
        rate = (facts["tflops_per_gpu"] or 0) * 1e12 or facts["mfu"] * printed_peak(facts["gpu"], product)
        source = "flops" if facts["tflops_per_gpu"] else "mfu"
        work = flops_per_token(
            model,
            facts["seq_len"],
            facts["convention"],
            recompute=facts["recompute_mode"],
            params=(facts.get("params_b") or 0) * 1e9,
        )
        seconds = tokens * work / (rate * facts["n_gpus"])
    elif facts["peak_mem_gib"]:
        return None, ""
    else:
        raise RowError("a step time is printed, but not how many sequences a step has")
    if not math.isfinite(seconds) or not 1e-6 < seconds < 1e7:
        raise RowError(f"a step of {seconds:g} seconds is not credible")
    return seconds, source
