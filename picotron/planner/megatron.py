"""A plan as the arguments with which Megatron-LM runs it; ``megatron_import`` reads them back.

Flags are those of Megatron-LM 0.20.0 (main, commit d98e8a64 of 2026-08-22), from
``megatron/training/arguments.py`` and the classes of configuration of which it makes flags. The facts that
the export rests on stand where they are used, in ``megatron_write_layout``, ``_model`` and ``_training``.

What the arguments cannot say is said in sentences, never left out in silence.
"""

from __future__ import annotations

import shlex

from attrs import frozen

from picotron.errors import PlanError
from picotron.planner.exported import Note, Unexpressed, same_order
from picotron.planner.megatron_write_layout import (
    ORDERS,
    Argument,
    block_modes,
    offloaded,
    ranks_of,
    recomputed,
    shards_of,
    stage_layout,
    stages_of,
)
from picotron.planner.megatron_write_model import model_of
from picotron.planner.megatron_write_training import batch_of, data_of, kernels_of, optimizer_of, precision_of
from picotron.planner.plan import TrainingPlan
from picotron.planner.software import SoftwareProfile, software_profile

__all__ = [
    "ORDERS",
    "VERSION",
    "MegatronArguments",
    "block_modes",
    "same_order",
    "stage_layout",
    "to_megatron",
]

VERSION = "Megatron-LM 0.20.0 (d98e8a64, 2026-08-22)"
PROFILE = "megatron-2025"


@frozen(kw_only=True)
class MegatronArguments:
    """The arguments of one run, each a flag and its values; ``str`` is a shell script that starts it."""

    title: str
    arguments: tuple[Argument, ...]
    nodes: int
    devices_per_node: int
    environment: tuple[str, ...]
    unexpressed: tuple[str, ...]
    notes: tuple[str, ...]

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
                *comments,
                *(f"export {setting}" for setting in self.environment),
                " \\\n    ".join([launch, *lines]),
                "",
            ]
        )


def to_megatron(
    plan: TrainingPlan, *, profile: SoftwareProfile | str = PROFILE, steps: int | None = None
) -> MegatronArguments:
    """The arguments with which Megatron-LM runs ``plan``.

    ``profile`` decides the flags of kernels and overlaps, which are no part of a plan; ``steps`` is how many
    are trained. Raises PlanError for what is no plan, or an unknown profile.
    """
    if not isinstance(plan, TrainingPlan):
        raise PlanError(f"plan must be a TrainingPlan, got {type(plan).__name__}; make one with plan(...)")
    software = software_profile(profile) if isinstance(profile, str) else profile
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
        *data_of(plan.model),
    ]
    sharded = plan.zero_stage >= 2
    return MegatronArguments(
        title=f"{plan.model.name} on {plan.cluster.name}",
        arguments=tuple(part for part in parts if isinstance(part, tuple)),
        nodes=plan.cluster.nodes,
        devices_per_node=plan.cluster.devices_per_node,
        environment=() if sharded else ("CUDA_DEVICE_MAX_CONNECTIONS=1",),
        unexpressed=tuple(part.text for part in parts if isinstance(part, Unexpressed)),
        notes=tuple(part.text for part in parts if isinstance(part, Note)),
    )
