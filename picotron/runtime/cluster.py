"""The machine we run on as a ClusterSpec: found by name, or measured.

What is measured on a CPU is CPU seconds of one core: one intra-op thread, by the clock of the calling
thread, so that waiting for a busy core does not count. A rank is one such thread, so a prediction from
``calibrate`` is in CPU seconds a rank, whatever the number of cores that the ranks then share.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from statistics import median

import numpy as np
import torch
from attrs import evolve

from picotron.errors import PlanError
from picotron.planner.cluster import MOST_DEVICES, ClusterSpec, DeviceSpec, Efficiency, LinkSpec, Peaks
from picotron.planner.model import ModelSpec
from picotron.planner.plan import plan
from picotron.planner.workload import Workload
from picotron.runtime.backend import Backend
from picotron.runtime.data import step_batches
from picotron.runtime.pipeline import Session
from picotron.runtime.simulated import simulate

Progress = Callable[[str], None]

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
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# (tokens, inputs, outputs) of projections, a feed-forward's two halves and a head, small enough for a CPU.
MATMULS = (
    (256, 256, 256),
    (512, 512, 512),
    (256, 512, 2048),
    (256, 2048, 512),
    (128, 256, 4096),
)
_ROWS, _WIDTH = 4096, 2048  # 32 MiB in fp32, so that a kernel's tensors exceed the caches
_MESSAGE_BYTES = (2**18, 2**20, 2**22)
_SMALLEST = {
    "model_type": "llama",
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
_CALLS = 100  # of what is too short for the clock


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


def calibrate(
    *, precision: str = "fp32", seconds: float = 2.0, num_ranks: int = 1, progress: Progress | None = None
) -> ClusterSpec:
    """The CPU we run on, measured for about ``seconds``, as one node named "this-cpu".

    The peaks are the best of a few training shapes (for ``precision`` only), memory-bound kernels and message
    sizes; the efficiencies are the median over the best. A kernel's fixed cost is that of this runtime's own,
    in a training step of tiny tensors. The link is a copy in memory, which is how simulated ranks send.
    ``progress`` is told the name of each measurement before it starts. Raises PlanError if ``precision`` is
    not one of DTYPES.
    """
    if precision not in DTYPES:
        raise PlanError(f"precision must be one of {tuple(DTYPES)} on a CPU, got {precision!r}")
    if not 1 <= num_ranks <= MOST_DEVICES or not 0 < seconds < 3600:
        raise PlanError(
            f"num_ranks must be in [1, {MOST_DEVICES}] and seconds in (0, 3600), "
            f"got {num_ranks} and {seconds}"
        )
    with _one_thread(), torch.no_grad():
        works = _works(DTYPES[precision])
        num_works = sum(map(len, works.values())) + 1
        rates = {
            group: [_rate(name, *work, seconds / num_works, progress) for name, work in members.items()]
            for group, members in works.items()
        }
        rates["kernel"] = simulate(
            lambda rank: [_rate("smallest step", *_smallest_step(rank), seconds / num_works, progress)], 1
        )[0]
    return _measured_cluster(precision, rates, num_ranks)


# A work is a call and how much it does: FLOPs, bytes or calls.
_Work = tuple[Callable[[], object], int]


def _works(dtype: torch.dtype) -> dict[str, dict[str, _Work]]:
    return {
        "matmul": {f"matmul {m}x{k}x{n}": _matmul(m, k, n, dtype) for m, k, n in MATMULS},
        "memory": _memory_works(),
        "message": {f"copy of {size} bytes": _copy(size) for size in _MESSAGE_BYTES},
        "latency": {"copies of 4 bytes": _small_copies()},
    }


def _matmul(m: int, k: int, n: int, dtype: torch.dtype) -> _Work:
    inputs, weight = torch.ones(m, k, dtype=dtype), torch.ones(n, k, dtype=dtype)
    return lambda: torch.nn.functional.linear(inputs, weight), 2 * m * n * k


def _memory_works() -> dict[str, _Work]:
    """Kernels over large tensors, with the bytes that each reads and writes."""
    a, out = torch.ones(_ROWS, _WIDTH), torch.ones(_ROWS, _WIDTH)
    size_bytes = a.numel() * a.element_size()
    return {
        "large copy": (lambda: out.copy_(a), 2 * size_bytes),
        "large add": (lambda: out.add_(a), 3 * size_bytes),
        "large activation": (lambda: torch.ops.aten.silu(a, out=out), 2 * size_bytes),
        "large softmax": (lambda: torch.softmax(a, dim=-1, out=out), 2 * size_bytes),
        "large scale": (lambda: torch.mul(a, 2.0, out=out), 2 * size_bytes),
    }


def _smallest_step(backend: Backend) -> _Work:
    """A training step whose tensors are tiny, so that what it takes is the fixed cost of its operations."""
    model = ModelSpec.from_hf(_SMALLEST)
    one = ClusterSpec.preset("cpu", devices_per_node=1)
    work = Workload(global_batch=4, seq_len=4, precision="fp32")
    smallest = plan(model, one, work)
    batches = step_batches(smallest, [np.arange(5)], consumed=0, dp_index=0)
    session = Session(smallest, backend)
    bodies = smallest.bodies(0).forward, smallest.bodies(0).backward
    operations = [op for body in bodies for segment in body.segments for op in segment.operations]
    return lambda: session.step(batches), smallest.num_microbatches * sum(op.kernels for op in operations)


def _copy(size_bytes: int) -> _Work:
    source = torch.ones(size_bytes, dtype=torch.uint8)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), size_bytes


def _small_copies() -> _Work:
    copy, _ = _copy(4)

    def copies() -> None:
        for _ in range(_CALLS):
            copy()

    return copies, _CALLS


def _rate(
    name: str, call: Callable[[], object], amount: int, seconds: float, progress: Progress | None
) -> float:
    if progress is not None:
        progress(name)
    return amount / _seconds_per_call(call, seconds)


def _seconds_per_call(call: Callable[[], object], seconds: float) -> float:
    """Median CPU seconds of the calling thread; the first call is not counted, at least three are."""
    end = time.perf_counter() + seconds
    call()
    taken: list[float] = []
    while len(taken) < 3 or time.perf_counter() < end:
        start = time.thread_time()
        call()
        taken.append(time.thread_time() - start)
    return max(median(taken), 1e-9)


def _measured_cluster(precision: str, rates: Mapping[str, list[float]], num_ranks: int) -> ClusterSpec:
    source = _measured_source()
    link = LinkSpec(
        name="copy in memory",
        bytes_per_second=max(rates["message"]),
        latency_seconds=1 / rates["latency"][0],
        source=source,
    )
    return ClusterSpec(
        name="this-cpu",
        device=DeviceSpec(
            name=_cpu_name(),
            peak_flops_per_second=Peaks(**{precision: max(rates["matmul"])}),
            memory_bytes=_memory_bytes() // num_ranks,
            memory_bytes_per_second=max(rates["memory"]),
            kind="cpu",
            source=source,
        ),
        devices_per_node=num_ranks,
        nodes=1,
        intra_node=link,
        inter_node=link,
        efficiency=Efficiency(
            matmul=_median_over_best(rates["matmul"]),
            memory=_median_over_best(rates["memory"]),
            link=_median_over_best(rates["message"]),
            kernel_seconds=1 / rates["kernel"][0],
            source=source,
        ),
    )


def _median_over_best(rates: list[float]) -> float:
    return median(rates) / max(rates)


def _measured_source() -> str:
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"measured {when}: torch {torch.__version__}, one thread, CPU seconds by time.thread_time"


def _cpu_cluster(num_ranks: int) -> ClusterSpec:
    assumed = ClusterSpec.preset("cpu", devices_per_node=num_ranks)
    device = evolve(
        assumed.device,
        name=_cpu_name(),
        memory_bytes=_memory_bytes() // num_ranks,
        source=f"{assumed.device.source}. Memory found here: 1/{num_ranks} of {os.cpu_count()} cores' memory",
    )
    return evolve(assumed, name="this-cpu", device=device)


def _cpu_name() -> str:
    return platform.processor() or platform.machine() or "cpu"


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
