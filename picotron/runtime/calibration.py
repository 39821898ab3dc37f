"""The machine we run on, measured into a ClusterSpec: prices by shape, and what a training step adds to them.

What is measured on a CPU is CPU seconds of one core: one intra-op thread, by the clock of the calling
thread, so that waiting for a busy core does not count. A rank is one such thread, so a prediction from
``calibrate`` is in CPU seconds a rank, whatever the number of cores that the ranks then share.

Operations are measured apart first, by shape, and fitted to the forms of ``measured``. Then small trainings
are run, and the same forms, priced over their plans, are scaled to what their rows took.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

import torch
from attrs import evolve, frozen

from picotron.errors import PlanError
from picotron.planner.cluster import MOST_DEVICES, ClusterSpec, DeviceSpec, Efficiency, LinkSpec, Peaks
from picotron.planner.fit_costs import ProductTiming, fit_kernel, fit_product, scaled_kernel, scaled_product
from picotron.planner.measured import MeasuredCosts
from picotron.runtime.calibrated_calls import BACKENDS, Calls, measure_calls
from picotron.runtime.calibrated_steps import Apart, InPlace, fit_in_place, step_timings
from picotron.runtime.calibrated_works import (
    Progress,
    attention_timings,
    kernel_timings,
    product_timings,
    take_turns,
)
from picotron.runtime.hand_overs import with_hand_overs
from picotron.runtime.machine import cpu_name, memory_bytes, one_thread

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_STEPPED = ("fp32", "fp64")  # precisions in which the runtime trains
# Shares of the time.
_SHARES = {
    "products": 0.25,
    "attention": 0.1,
    "kernels": 0.08,
    "copies": 0.02,
    "calls": 0.05,
    "steps": 0.35,
    "hand-overs": 0.15,
}
_MESSAGE_BYTES = (2**18, 2**20, 2**22)
_COPIES = 100  # of what is too short for the clock


@frozen(kw_only=True)
class _Apart:
    """What operations take by themselves in one precision, and the best rates that were seen."""

    costs: Apart
    best_flops_per_second: float
    best_bytes_per_second: float


def calibrate(
    *,
    precision: str = "fp32",
    seconds: float = 10.0,
    num_ranks: int = 1,
    backend: str = "simulated",
    progress: Progress | None = None,
) -> ClusterSpec:
    """The CPU we run on, measured for about ``seconds``, as one node named "this-cpu".

    Its efficiency has ``measured`` costs in ``precision``; the fractions beside them say the same roughly, of
    the best rates that were seen. Communication is that of ``backend``: "simulated" ranks, whose link is a
    copy in memory, or two processes over "gloo". ``progress`` is told the name of each measurement before it
    starts. Less than about 3 seconds is more than is measured in a hurry, and then tells less.
    Raises PlanError if ``precision`` is not one of DTYPES or ``backend`` not one of BACKENDS.
    """
    _check(precision, seconds, num_ranks, backend)
    share = {name: seconds * part for name, part in _SHARES.items()}
    with one_thread(), torch.no_grad():
        apart = _measure_apart(precision, share, progress)
        stepped = precision if precision in _STEPPED else "fp32"
        beside = apart if stepped == precision else _measure_apart(stepped, share, progress)
        in_place = fit_in_place(step_timings(stepped, share["steps"], progress), beside.costs)
        copies = _copy_rates(share["copies"], progress)
        if progress is not None:
            progress(f"calls of {backend} ranks")
        calls = measure_calls(backend, share["calls"])
        found = with_calls(measured_cluster(precision, num_ranks, apart, in_place, copies), calls)
        if backend == "simulated" and stepped == precision:
            if progress is not None:
                progress("hand-overs between ranks")
            found = with_hand_overs(found, precision, share["hand-overs"])
    return found


def _check(precision: str, seconds: float, num_ranks: int, backend: str) -> None:
    if precision not in DTYPES:
        raise PlanError(f"precision must be one of {tuple(DTYPES)} on a CPU, got {precision!r}")
    if backend not in BACKENDS:
        raise PlanError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if not 1 <= num_ranks <= MOST_DEVICES or not 0 < seconds < 3600:
        raise PlanError(
            f"num_ranks must be in [1, {MOST_DEVICES}] and seconds in (0, 3600), "
            f"got {num_ranks} and {seconds}"
        )


def _measure_apart(precision: str, share: Mapping[str, float], progress: Progress | None) -> _Apart:
    dtype = DTYPES[precision]
    products = product_timings(dtype, share["products"], progress)
    attention = attention_timings(dtype, share["attention"], progress)
    kernels = kernel_timings(dtype, share["kernels"], progress)
    return apart_from(products, attention, kernels)


def apart_from(
    products: Mapping[str, list[ProductTiming]],
    attention: Mapping[str, list[ProductTiming]],
    kernels: list[tuple[int, float]],
) -> _Apart:
    """The forms that fit timings; a product's fixed seconds are left to the steps."""
    kernel, kernel_seconds = fit_kernel(kernels)
    largest = max(size for size, _ in kernels) / 4
    return _Apart(
        costs=Apart(
            products={role: evolve(fit_product(own), fixed_seconds=0.0) for role, own in products.items()},
            attention=fit_product(attention["forward"]),
            attention_backward=fit_product(attention["backward"]),
            kernel=kernel,
            kernel_seconds=kernel_seconds,
        ),
        best_flops_per_second=max(t.flops / t.seconds for own in products.values() for t in own),
        best_bytes_per_second=max(size / taken for size, taken in kernels if size >= largest),
    )


def _copy_rates(seconds: float, progress: Progress | None) -> dict[int, float]:
    """Seconds of a copy in memory by bytes; of four bytes it is the fixed cost."""
    pairs = {size: (torch.ones(size // 4), torch.ones(size // 4)) for size in (4, *_MESSAGE_BYTES)}

    def copies(size: int, times: int) -> None:
        source, target = pairs[size]
        for _ in range(times):
            target.copy_(source)

    times = {size: _COPIES if size == 4 else 1 for size in pairs}
    works = {f"copy of {size} bytes": lambda size=size: copies(size, times[size]) for size in pairs}
    taken = take_turns(works, seconds, progress)
    return {size: taken[f"copy of {size} bytes"] / times[size] for size in pairs}


def measured_cluster(
    precision: str, num_ranks: int, apart: _Apart, in_place: InPlace, copies: Mapping[int, float]
) -> ClusterSpec:
    """Everything but the calls of a backend, as a cluster whose link is a copy in memory."""
    source, costs = _measured_source(), apart.costs
    element_seconds = in_place.operand_seconds * DTYPES[precision].itemsize
    products = {
        role: scaled_product(cost, in_place.product_scale, element_seconds=element_seconds)
        for role, cost in costs.products.items()
    }
    kernel = scaled_kernel(costs.kernel, in_place.kernel_scale)
    best_flops, best_bytes = apart.best_flops_per_second, apart.best_bytes_per_second
    rates = sorted(size / copies[size] for size in _MESSAGE_BYTES)
    link = LinkSpec(
        name="copy in memory", bytes_per_second=rates[-1], latency_seconds=copies[4], source=source
    )
    return ClusterSpec(
        name="this-cpu",
        device=DeviceSpec(
            name=cpu_name(),
            peak_flops_per_second=Peaks(**{precision: best_flops}),
            memory_bytes=memory_bytes() // num_ranks,
            memory_bytes_per_second=best_bytes,
            kind="cpu",
            source=source,
        ),
        devices_per_node=num_ranks,
        nodes=1,
        intra_node=link,
        inter_node=link,
        efficiency=Efficiency(
            matmul=min(1.0, products["output"].flops_per_second / best_flops),
            memory=min(1.0, kernel.memory_bytes_per_second / best_bytes),
            link=rates[len(rates) // 2] / rates[-1],
            kernel_seconds=in_place.kernel_seconds,
            source=source,
            step_seconds=in_place.step_seconds,
            measured=MeasuredCosts(
                precision=precision,
                output=products["output"],
                input=products["input"],
                weight=products["weight"],
                attention=scaled_product(costs.attention, in_place.attention_scale),
                attention_backward=scaled_product(costs.attention_backward, in_place.attention_scale),
                kernel=kernel,
                segment_seconds=in_place.segment_seconds,
                update_element_seconds=in_place.update_element_seconds,
                update_tensor_seconds=in_place.update_tensor_seconds,
            ),
        ),
    )


def with_calls(cluster: ClusterSpec, calls: Calls) -> ClusterSpec:
    """A measured cluster whose ranks communicate as ``calls`` do, over their link where it was measured."""
    measured = cluster.efficiency.measured
    assert measured is not None
    efficiency = evolve(cluster.efficiency, measured=evolve(measured, communication=calls.costs))
    if calls.bytes_per_second is None or calls.latency_seconds is None:
        return evolve(cluster, efficiency=efficiency)
    link = LinkSpec(
        name="gloo on loopback",
        bytes_per_second=calls.bytes_per_second,
        latency_seconds=calls.latency_seconds,
        source=f"{_measured_source()}; wall seconds of an all-reduce of two processes",
    )
    return evolve(cluster, intra_node=link, inter_node=link, efficiency=evolve(efficiency, link=1.0))


def _measured_source() -> str:
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"measured {when}: torch {torch.__version__}, one thread, CPU seconds by time.thread_time"
