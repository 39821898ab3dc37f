"""The machine that a printed GPU name means, as values of ``MachineColumns``.

``machines.json`` maps names to the planner's presets, with what differs (``set``) and its source.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from picotron.planner.cases import ARCHITECTURES, PRODUCT_FORMATS
from picotron.planner.cluster import ClusterSpec

from .models import hyphened
from .text import RowError


def known_machine(gpu: str) -> dict[str, Any] | None:
    """The entry of ``machines.json`` whose pattern the name of a GPU matches."""
    return next((entry for entry in _table() if re.search(entry["pattern"], hyphened(gpu))), None)


def machine_memory(entry: dict[str, Any]) -> float:
    """Bytes of one device of an entry."""
    return float(
        entry.get("set", {}).get("memory_bytes") or ClusterSpec.preset(entry["preset"]).device.memory_bytes
    )


def machine_values(entry: dict[str, Any], product: str) -> dict[str, float]:
    """Values of every column for products of one format. Raises RowError if the device has no unit for it."""
    cluster = ClusterSpec.preset(entry["preset"])
    device, given = cluster.device, entry.get("set", {})
    peaks = {
        name: given.get(name, getattr(device.peak_flops_per_second, name)) for name in ("bf16", "fp16", "fp8")
    }
    peaks["fp16"] = given.get("bf16", peaks["fp16"])
    wide = peaks["bf16"] or peaks["fp16"]
    peak = {
        "fp64": device.peak_flops_per_second.fp64,
        "fp32": device.peak_flops_per_second.fp32,
        "tf32": device.peak_flops_per_second.tf32,
        "mxfp8": peaks["fp8"] if entry["architecture"] == "blackwell" else None,
        "fp8-blockwise": peaks["fp8"],
        "nvfp4": given.get("nvfp4"),
        **peaks,
    }[product]
    if peak is None:
        raise RowError(f"{entry['preset']} has no {product} products")
    values = {
        "architecture": ARCHITECTURES.index(entry["architecture"]),
        "peak_flops": peak,
        "peak_16bit": peak if product in ("fp32", "fp64") else wide,
        "memory_bytes": device.memory_bytes,
        "memory_bytes_per_second": device.memory_bytes_per_second,
        "processors": entry["processors"],
        "devices_per_node": cluster.devices_per_node,
        "intra_bytes_per_second": cluster.intra_node.bytes_per_second,
        "intra_seconds": cluster.intra_node.latency_seconds,
        "inter_bytes_per_second": cluster.inter_node.bytes_per_second,
        "inter_seconds": cluster.inter_node.latency_seconds,
        "intra_reduces": 0.0,
        "inter_reduces": 0.0,
        "host_bytes_per_second": entry["host"],
        "compute_scale": 1.0,
        "communication_scale": 1.0,
        "step_seconds": 0.0,
    }
    assert product in PRODUCT_FORMATS
    return {**values, **{name: value for name, value in given.items() if name in values}}


@cache
def _table() -> list[dict[str, Any]]:
    table: list[dict[str, Any]] = json.loads(
        (Path(__file__).parent / "machines.json").read_text(encoding="utf-8")
    )
    return table
