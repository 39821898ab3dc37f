"""The columns of what a caller already has: a workload, a cluster, a plan.

What ``cases`` defines, filled from the values that the rest of the planner is written in, so that one plan, a
search's thousands and a table of published runs are estimated by the same functions.
"""

from __future__ import annotations

import numpy as np
from attrs import evolve

from picotron.planner.architectures import ARCHITECTURES
from picotron.planner.cases import (
    ORDERS,
    PRODUCT_FORMATS,
    RECOMPUTES,
    SCHEDULE_NAMES,
    Cases,
    LayoutColumns,
    MachineColumns,
    SoftwareColumns,
    WorkColumns,
    columns,
    model_columns,
)
from picotron.planner.cluster import ClusterSpec, DeviceSpec, peak_flops_per_second
from picotron.planner.plan import TrainingPlan
from picotron.planner.software import software_columns
from picotron.planner.topology import Topology
from picotron.planner.workload import FORMATS, MOMENTS, Workload


def work_columns(work: Workload) -> WorkColumns:
    """The columns of one workload, each of shape ()."""
    form = work.format
    product = work.precision if work.precision in PRODUCT_FORMATS else form.product
    return columns(
        WorkColumns,
        {
            "global_batch": work.global_batch,
            "seq_len": work.seq_len,
            "compute_bytes": form.compute,
            "product_format": PRODUCT_FORMATS.index(product),
            "gradient_bytes": form.gradient,
            "wire_bytes": form.reduce,
            "main_bytes": form.main,
            "moment_bytes": MOMENTS[work.optimizer] * form.moment,
            "trained_head": 1,
        },
    )


def machine_columns(cluster: ClusterSpec, precision: str) -> MachineColumns:
    """The columns of one machine for products of ``precision``, each of shape ().

    Raises PlanError where the device has no unit for that precision.
    """
    device, intra, inter, reached = (
        cluster.device,
        cluster.intra_node,
        cluster.inter_node,
        cluster.efficiency,
    )
    return columns(
        MachineColumns,
        {
            "architecture": ARCHITECTURES.index(device.architecture),
            "peak_flops": peak_flops_per_second(device, FORMATS[precision].product),
            "peak_16bit": _peak_16bit(device, precision),
            "memory_bytes": device.memory_bytes,
            "memory_bytes_per_second": device.memory_bytes_per_second,
            "processors": device.processors,
            "devices_per_node": cluster.devices_per_node,
            "intra_bytes_per_second": intra.bytes_per_second,
            "intra_seconds": intra.latency_seconds,
            "inter_bytes_per_second": inter.bytes_per_second,
            "inter_seconds": inter.latency_seconds,
            "intra_reduces": intra.in_network_reduction,
            "inter_reduces": inter.in_network_reduction,
            "host_bytes_per_second": device.host_bytes_per_second,
            "compute_scale": reached.compute_scale,
            "communication_scale": reached.communication_scale,
            "step_seconds": reached.step_seconds,
        },
    )


def _peak_16bit(device: DeviceSpec, precision: str) -> float:
    """What attention and the head run at: 16-bit beside narrower products, else the precision itself."""
    peaks = device.peak_flops_per_second
    wide = precision in ("fp32", "fp64")
    return peak_flops_per_second(device, precision) if wide else peaks.bf16 or peaks.fp16 or 0.0


def layout_columns(plan: TrainingPlan) -> LayoutColumns:
    """The columns of one plan's layout, each of shape ()."""
    topology, modes = plan.topology, plan.recompute
    mode = max(modes, key=RECOMPUTES.index)
    share = sum(one != "none" for one in modes) / len(modes)
    sharded = plan.shard or topology.dp * topology.cp
    return columns(
        LayoutColumns,
        {
            **{axis: getattr(topology, axis) for axis in ("dp", "pp", "cp", "tp", "ep", "etp")},
            "virtual_stages": plan.virtual_stages,
            "schedule": _schedule_index(plan),
            "micro_batch": plan.micro_batch,
            "zero_stage": plan.zero_stage,
            "shard": sharded if plan.zero_stage else 1,
            "sequence_parallel": plan.sequence_parallel,
            "recompute": RECOMPUTES.index(mode),
            "recompute_layers": share if mode != "none" else 0.0,
            "offload": sum(plan.offload) / len(plan.offload),
            "ends": _ends_count(plan),
            "order": _order_index(topology),
        },
    )


def _schedule_index(plan: TrainingPlan) -> int:
    """A custom schedule is estimated as the named one that it is nearest to by its stages."""
    if plan.schedule_name in SCHEDULE_NAMES:
        return SCHEDULE_NAMES.index(plan.schedule_name)
    return SCHEDULE_NAMES.index("interleaved" if plan.virtual_stages > 1 else "1f1b")


def _ends_count(plan: TrainingPlan) -> bool:
    """Whether the first stage has fewer layers than the fullest, to make up for the embedding."""
    layers = plan.stage_layers
    return len(layers) > 2 and layers[0] < max(layers)


def _order_index(topology: Topology) -> int:
    """Another order than those listed is taken as the listed one whose axes of more than one rank agree."""

    def moving(order: tuple[str, ...]) -> list[str]:
        return [axis for axis in order if getattr(topology, axis) > 1]

    same = (i for i, order in enumerate(ORDERS) if moving(order) == moving(topology.order))
    return next(same, 0)


def cases_of_plan(plan: TrainingPlan, software: SoftwareColumns | None = None) -> Cases:
    """One plan as cases of length 1, under the cluster's software profile where no other is given."""
    if software is None:
        profile = plan.cluster.profile
        if plan.compile and profile.kernels == "eager":
            profile = evolve(profile, kernels="compiled")
        software = software_columns(profile, plan.cluster.device.architecture)
    return Cases(
        model=model_columns(plan.model),
        work=work_columns(plan.workload),
        machine=machine_columns(plan.cluster, plan.workload.precision),
        software=evolve(software, bucket_bytes=np.asarray(float(plan.bucket_bytes))),
        layout=layout_columns(plan),
    )
