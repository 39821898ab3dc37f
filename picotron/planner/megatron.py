"""A plan as the arguments with which Megatron-LM runs it; ``megatron_import`` reads them back.

Flags are those of Megatron-LM 0.20.0 (main, commit d98e8a64 of 2026-08-22), from
``megatron/training/arguments.py`` and the classes of configuration of which it makes flags. The facts that
the export rests on stand where they are used, in ``megatron_write_layout``, ``_model`` and ``_training``.

What the arguments cannot say is said in sentences, never left out in silence.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

from attrs import frozen

from picotron.errors import PlanError
from picotron.planner.exported import Note, Unexpressed, framework_profile, other_software, same_order
from picotron.planner.megatron_software import PROFILE, kernels_of
from picotron.planner.megatron_write_layout import (
    ORDERS,
    Argument,
    Part,
    block_modes,
    offloaded,
    ranks_of,
    recomputed,
    shards_of,
    stage_layout,
    stages_of,
)
from picotron.planner.megatron_write_model import model_of
from picotron.planner.megatron_write_training import batch_of, data_of, optimizer_of, precision_of
from picotron.planner.plan import TrainingPlan
from picotron.planner.software import SoftwareProfile, preset_name

__all__ = [
    "ORDERS",
    "PROFILE",
    "VERSION",
    "MegatronArguments",
    "block_modes",
    "same_order",
    "stage_layout",
    "to_megatron",
]

PRICED_WITH = "# Priced with the software profile "
VERSION = "Megatron-LM 0.20.0 (d98e8a64, 2026-08-22)"


@frozen(kw_only=True)
class MegatronArguments:
    """The arguments of one run, each a flag and its values; ``str`` is a shell script that starts it.

    ``priced_with`` names the software profile of the plan's cluster, where it is a preset; a comment of the
    script keeps it for whoever reads the script back.
    """

    title: str
    arguments: tuple[Argument, ...]
    nodes: int
    devices_per_node: int
    environment: tuple[str, ...]
    unexpressed: tuple[str, ...]
    notes: tuple[str, ...]
    priced_with: str | None = None

    @property
    def words(self) -> tuple[str, ...]:
        """The arguments as the program receives them."""
        return tuple(word for argument in self.arguments for word in argument)

    def __str__(self) -> str:
        comments = [
            *(f"# NOT EXPRESSED: {sentence}" for sentence in self.unexpressed),
            *(f"# Note: {sentence}" for sentence in self.notes),
        ]
        lines = [" ".join((argument[0], *map(shlex.quote, argument[1:]))) for argument in self.arguments]
        launch = (
            f"torchrun --nproc-per-node {self.devices_per_node} --nnodes {self.nodes} "
            '--node-rank "${NODE_RANK:-0}" --master-addr "${MASTER_ADDR:-localhost}" '
            '--master-port "${MASTER_PORT:-29500}" pretrain_gpt.py'
        )
        return "\n".join(
            [
                "#!/bin/bash",
                f"# {self.title}; arguments of {VERSION}.",
                *([f"{PRICED_WITH}{self.priced_with}."] if self.priced_with else []),
                *comments,
                *(f"export {setting}" for setting in self.environment),
                " \\\n    ".join([launch, *lines]),
                "",
            ]
        )


def _environment(plan: TrainingPlan, parts: Sequence[Part]) -> Iterator[str]:
    """Variables without which it refuses to start, or overlaps nothing."""
    if plan.zero_stage < 2:
        yield "CUDA_DEVICE_MAX_CONNECTIONS=1"
    if ("--fine-grained-activation-offloading",) in parts:
        yield "NVTE_CPU_OFFLOAD_V1=1"


def to_megatron(
    plan: TrainingPlan, *, profile: SoftwareProfile | str | None = None, steps: int | None = None
) -> MegatronArguments:
    """The arguments with which Megatron-LM runs ``plan``.

    ``profile`` decides the flags of kernels and overlaps: left out, the cluster's own where it is one of
    Megatron-LM's, else ``megatron-2025``. ``steps`` is how many are trained. Raises PlanError for what is no
    plan, or an unknown profile.
    """
    if not isinstance(plan, TrainingPlan):
        raise PlanError(f"plan must be a TrainingPlan, got {type(plan).__name__}; make one with plan(...)")
    software = framework_profile(plan, profile, PROFILE)
    parts = [
        *ranks_of(plan),
        *stages_of(plan),
        *batch_of(plan),
        *model_of(plan.model, plan.workload.seq_len, plan.topology.tp),
        *precision_of(plan.workload),
        *shards_of(plan),
        *recomputed(plan),
        *offloaded(plan),
        *optimizer_of(plan.workload, steps),
        *kernels_of(plan, software),
        *other_software(plan, software),
        *data_of(plan.model),
    ]
    return MegatronArguments(
        title=f"{plan.model.name} on {plan.cluster.name}",
        arguments=tuple(part for part in parts if isinstance(part, tuple)),
        nodes=plan.cluster.nodes,
        devices_per_node=plan.cluster.devices_per_node,
        environment=tuple(_environment(plan, parts)),
        unexpressed=tuple(part.text for part in parts if isinstance(part, Unexpressed)),
        notes=tuple(part.text for part in parts if isinstance(part, Note)),
        priced_with=preset_name(plan.cluster.profile),
    )
