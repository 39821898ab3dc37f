"""What is found and measured on the machine that runs the tests."""

from __future__ import annotations

import os

import pytest
import torch

from picotron.errors import PlanError
from picotron.planner.cluster import ClusterSpec, cluster_from_json, cluster_to_json, peak_flops_per_second
from picotron.planner.host_seconds import cpu_seconds_by_rank
from picotron.runtime.calibrated_steps import TRAININGS, training_plan
from picotron.runtime.cluster import PRESET_BY_DEVICE_NAME, accelerator_cluster, calibrate, detect


def test_detected_cores_share_the_memory() -> None:
    """Each of four ranks has a quarter of the machine's memory, in one node."""
    cluster = detect(4, kind="cpu")
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert (cluster.nodes, cluster.devices_per_node, cluster.device.kind) == (1, 4, "cpu")
    assert cluster.device.memory_bytes == memory_bytes // 4
    assert cluster.device.peak_flops_per_second == ClusterSpec.preset("cpu").device.peak_flops_per_second


def test_a_machine_without_accelerators_is_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the cores is found where torch sees no device, and asking for one is an error."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert detect(2) == detect(2, kind="cpu")
    with pytest.raises(PlanError, match=r"a device for each of 2 ranks, got 0; use kind='cpu'"):
        detect(2, kind="cuda")


def test_accelerators_are_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A known device has its preset's peaks and the memory that torch reports."""
    properties = type("Properties", (), {"name": "NVIDIA H200", "total_memory": 150 * 10**9})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    cluster = detect(2)
    assert (cluster.name, cluster.device.name, cluster.device.memory_bytes) == (
        "h200:1x2",
        "h200",
        150 * 10**9,
    )
    assert cluster.device.peak_flops_per_second == ClusterSpec.preset("h200").device.peak_flops_per_second
    assert detect(3).device.kind == "cpu"


@pytest.mark.parametrize(("device_name", "preset"), PRESET_BY_DEVICE_NAME.items())
def test_every_known_device_has_a_preset_of_its_size(device_name: str, preset: str) -> None:
    """The names of devices lead to presets; what the driver reports is about their capacity."""
    cluster = accelerator_cluster(device_name, 10**9, 3)
    assert (cluster.device.name, cluster.num_devices) == (preset, 3)


def test_an_unknown_device_is_refused_with_a_remedy() -> None:
    """A card that no preset describes is not taken for another."""
    with pytest.raises(PlanError, match=r"got 'NVIDIA H100 PCIe'; describe it in a JSON file"):
        accelerator_cluster("NVIDIA H100 PCIe", 80 * 10**9, 1)


@pytest.mark.parametrize(("num_ranks", "kind"), [(0, None), (1, "tpu")])
def test_detect_refuses_what_is_no_machine(num_ranks: int, kind: str | None) -> None:
    """There is at least one rank, on a kind of device that torch can find."""
    with pytest.raises(PlanError):
        detect(num_ranks, kind=kind)


def test_calibration_describes_this_cpu() -> None:
    """What is measured is a valid cluster with costs in the format asked for, and says when and how.

    It can price a plan, whose calls cost something too.
    """
    told: list[str] = []
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
    cluster = calibrate(precision="fp32", seconds=0.01, num_ranks=2, progress=told.append)
    assert (torch.get_num_threads(), torch.is_grad_enabled()) == (threads, grad)
    assert (cluster.name, cluster.num_devices, cluster.device.kind) == ("this-cpu", 2, "cpu")
    assert cluster.device.memory_bytes == detect(2, kind="cpu").device.memory_bytes
    assert 1e8 < peak_flops_per_second(cluster.device, "fp32") < 1e13
    assert 1e8 < cluster.device.memory_bytes_per_second < 1e13
    assert 0 <= cluster.efficiency.kernel_seconds < 1e-3
    assert cluster.device.source.startswith("measured 20")
    assert cluster_from_json(cluster_to_json(cluster)) == cluster
    with pytest.raises(PlanError, match="has no bf16"):
        peak_flops_per_second(cluster.device, "bf16")
    assert {name.split()[0] for name in told} == {
        "matmul", "attention", "scale", "add", "activation", "step", "copy", "calls", "hand-overs",
    }  # fmt: skip
    assert len(told) == len(set(told))
    pair = training_plan(TRAININGS[2], "fp32", cluster, tp=2)
    alone = training_plan(TRAININGS[2], "fp32", cluster)
    assert 0 < sum(cpu_seconds_by_rank(alone)) < sum(cpu_seconds_by_rank(pair)) < 10


def test_the_threads_come_back_after_a_failure() -> None:
    """Whatever happens in the middle, torch keeps the threads it had."""

    def fail(name: str) -> None:
        assert torch.get_num_threads() == 1
        raise RuntimeError(name)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(RuntimeError, match="matmul"):
            calibrate(seconds=0.05, progress=fail)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("precision", "seconds", "num_ranks"), [("fp8", 1.0, 1), ("fp32", 0.0, 1), ("fp32", 1.0, 0)]
)
def test_calibration_refuses_what_it_cannot_measure(precision: str, seconds: float, num_ranks: int) -> None:
    """A CPU multiplies no fp8, and nothing is measured in no time or for no rank."""
    with pytest.raises(PlanError):
        calibrate(precision=precision, seconds=seconds, num_ranks=num_ranks)
    with pytest.raises(PlanError, match="backend must be one of"):
        calibrate(backend="nccl")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_accelerator_of_a_gpu_machine_is_known() -> None:
    """On a machine with a device of the table, its memory is within 3 percent of the preset's."""
    found = detect(1, kind="cuda")
    assert found.device.memory_bytes == pytest.approx(
        ClusterSpec.parse(found.name).device.memory_bytes, rel=0.03
    )
