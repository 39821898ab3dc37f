"""The machine we run on as a ClusterSpec: found by name, or measured (``calibration``)."""

from __future__ import annotations

import os

import torch
from attrs import evolve

from picotron.errors import PlanError
from picotron.planner.cluster import ClusterSpec
from picotron.runtime.calibration import calibrate as calibrate
from picotron.runtime.machine import cpu_name, memory_bytes

# Names as the driver prints them. PCIe cards have other peaks and links, so they are not here.
PRESET_BY_DEVICE_NAME = {
    "Tesla V100-SXM2-16GB": "v100-16gb",
    "Tesla V100-SXM2-32GB": "v100",
    "NVIDIA A100-SXM4-40GB": "a100-40gb",
    "NVIDIA A100-SXM4-80GB": "a100-80gb",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "NVIDIA GB200": "gb200",
    "AMD Instinct MI300X": "mi300x",
    "AMD Instinct MI300X OAM": "mi300x",
}


def detect(num_ranks: int, *, kind: str | None = None) -> ClusterSpec:
    """The machine we run on, as one node of ``num_ranks`` devices.

    The accelerators that torch sees, when there are enough for one a rank, else CPU cores; ``kind`` "cuda" or
    "cpu" asks for one of them. Accelerators take the peaks of the preset with their name and the memory that
    torch reports; CPU cores take the assumptions of the "cpu" preset (``calibrate`` measures instead) and an
    equal share of the machine's memory. Raises PlanError if there are too few devices or no such preset.
    """
    if num_ranks < 1:
        raise PlanError(f"num_ranks must be at least 1, got {num_ranks}")
    if kind not in (None, "cuda", "cpu"):
        raise PlanError(f"kind must be None, 'cuda' or 'cpu', got {kind!r}")
    num_accelerators = torch.cuda.device_count()
    if kind == "cpu" or (kind is None and num_accelerators < num_ranks):
        return _cpu_cluster(num_ranks)
    if num_accelerators < num_ranks:
        raise PlanError(
            f"there must be a device for each of {num_ranks} ranks, got {num_accelerators}; use kind='cpu'"
        )
    properties = torch.cuda.get_device_properties(0)
    return accelerator_cluster(properties.name, properties.total_memory, num_ranks)


def accelerator_cluster(device_name: str, memory_bytes: int, num_ranks: int) -> ClusterSpec:
    """One node of the preset for a device's name, with the memory that was found."""
    if device_name not in PRESET_BY_DEVICE_NAME:
        raise PlanError(
            f"a device must have one of the names {tuple(PRESET_BY_DEVICE_NAME)}, got {device_name!r}; "
            "describe it in a JSON file for load_cluster, or use kind='cpu'"
        )
    cluster = ClusterSpec.preset(PRESET_BY_DEVICE_NAME[device_name], devices_per_node=num_ranks)
    source = f"{cluster.device.source}. Memory found here: torch.cuda total_memory of {device_name}"
    return evolve(cluster, device=evolve(cluster.device, memory_bytes=memory_bytes, source=source))


def _cpu_cluster(num_ranks: int) -> ClusterSpec:
    assumed = ClusterSpec.preset("cpu", devices_per_node=num_ranks)
    device = evolve(
        assumed.device,
        name=cpu_name(),
        memory_bytes=memory_bytes() // num_ranks,
        source=f"{assumed.device.source}. Memory found here: 1/{num_ranks} of {os.cpu_count()} cores' memory",
    )
    return evolve(assumed, name="this-cpu", device=device)
