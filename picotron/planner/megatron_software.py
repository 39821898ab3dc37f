"""Kernels and overlaps: a software profile as Megatron-LM's flags, and the profile that a run's flags make.

A flag only switches something on or off. How much of a transfer an overlap hides is no flag's: it is a share
of a software profile, measured. So reading starts from a profile, ``megatron-2025`` unless another is named:
what a flag asks for keeps that profile's share (or takes that of ``megatron-2025`` where it has none), and
what the layout would let a run ask for and no flag does is off. What a layout leaves no room for stays as the
profile has it, since it costs nothing there: so a profile written and read again prices the plan alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from attrs import evolve

from picotron.planner.exported import Note
from picotron.planner.megatron_flags import Given
from picotron.planner.megatron_write_layout import Part
from picotron.planner.software import SoftwareProfile, software_profile
from picotron.planner.training_plan import TrainingPlan

PROFILE = "megatron-2025"
BACKENDS = {"unfused": "unfused", "fused-softmax": "unfused", "cudnn": "fused"}  # others are flash's
KERNELS = {"flash": "flash-2", "fused": "cudnn", "unfused": "fused-softmax", "local": "unfused"}
# What a field of the profile needs a flag for, in the current release and in earlier ones.
SWITCHES: Mapping[str, tuple[str, ...]] = {
    "reduce_overlap": ("overlap-grad-reduce",),
    "gather_overlap": ("overlap-param-gather",),
    "tensor_overlap": ("tp-comm-overlap",),
    "expert_overlap": ("overlap-moe-expert-parallel-comm",),
    "graphs": ("cuda-graph-impl", "enable-cuda-graph", "external-cuda-graph"),
}


def possible(plan: TrainingPlan) -> dict[str, bool]:
    """For each of SWITCHES, whether ``plan`` has anything that it could be asked for."""
    full = "full" in plan.recompute
    blocks = plan.topology.pp == 1 or plan.virtual_stages > 1
    half = plan.workload.precision not in ("fp32", "fp64")
    return {
        "reduce_overlap": plan.topology.dp * plan.topology.cp > 1,
        "gather_overlap": plan.zero_stage > 0,
        "tensor_overlap": plan.sequence_parallel,
        "expert_overlap": plan.topology.ep > 1 and not full and blocks and half,
        "graphs": not full and not any(plan.offload),
    }


def kernels_of(plan: TrainingPlan, profile: SoftwareProfile) -> Iterator[Part]:
    """Kernels and overlaps, as far as the plan lets them be asked for."""
    yield "--attention-backend", BACKENDS.get(_kernel(plan, profile), "flash")
    able = possible(plan)
    if profile.reduce_overlap:
        yield ("--overlap-grad-reduce",)
    if profile.reduce_overlap and profile.gather_overlap and able["gather_overlap"]:
        yield ("--overlap-param-gather",)
    if profile.tensor_overlap and able["tensor_overlap"]:
        yield ("--tp-comm-overlap",)
    if profile.expert_overlap and able["expert_overlap"]:
        yield ("--overlap-moe-expert-parallel-comm",)
    if plan.virtual_stages > 1 and plan.topology.pp > 2 and not profile.pipeline_overlap:
        yield ("--no-overlap-p2p-communication",)
    if profile.graphs and able["graphs"]:
        yield "--cuda-graph-impl", "transformer_engine"
    elif profile.graphs:
        yield Note("graphs of layers go with neither full recomputation nor offloading: none is asked for")


def read_software(read: Given, plan: TrainingPlan, profile: SoftwareProfile) -> dict[str, Any]:
    """The fields of ``profile`` that the flags decide, each with its value."""
    found: dict[str, Any] = {}
    for field, able in possible(plan).items():
        if _given(read, field):
            found[field] = getattr(profile, field) or getattr(software_profile(PROFILE), field) or True
        elif able and getattr(profile, field):
            found[field] = type(getattr(profile, field))(0)
    if read.has("no-overlap-p2p-communication"):
        found["pipeline_overlap"] = False
    if read.has("grad-reduce-in-bf16"):
        found |= {"wire_bytes": 2.0, "gradient_bytes": 2.0}
    backend = read.text("attention-backend", default="flash" if read.has("use-flash-attn") else "auto")
    if backend in KERNELS and BACKENDS.get(_kernel(plan, profile), "flash") != backend:
        found["attention"] = KERNELS[backend]
    return found


def flagged(profile: SoftwareProfile, found: Mapping[str, Any]) -> SoftwareProfile:
    """The profile with what the flags decide; itself where they say the same."""
    made = evolve(profile, **found)
    return made if made == profile else evolve(made, name=f"{profile.name}, as flagged")


def _kernel(plan: TrainingPlan, profile: SoftwareProfile) -> str:
    return profile.attention.get(plan.cluster.device.architecture, profile.attention["default"])


def _given(read: Given, field: str) -> bool:
    """Whether a flag switches ``field`` on."""
    asked = [flag for flag in SWITCHES[field] if read.has(flag)]
    return any(flag != "cuda-graph-impl" or read.text(flag) != "none" for flag in asked)
