"""A plan as the configuration with which torchtitan runs it.

Keys are those of torchtitan v0.2.2 (commit 73a0e697 of 2026-02-20), the current release, which reads TOML
into ``torchtitan/config/job_config.py``; its main branch has since moved to configurations in Python. Facts
that the export rests on, from there:

- ranks run through tensor, context, data and pipeline parallelism, fastest first; parameters are sharded over
  ``data_parallel_shard_degree`` times context parallelism, and copied
  ``data_parallel_replicate_degree`` times;
- FSDP shards parameters, gradients and optimizer together: with resharding after forward that is ZeRO
  stage 3, without it stage 2. Tensor parallelism is always sequence parallelism too;
- models are chosen by flavour, from those in ``torchtitan/models``;
- pipeline schedules are PyTorch's, or orders from a CSV file, which it reads as PyTorch does.

What the configuration cannot say is said in sentences, never left out in silence.
"""

from __future__ import annotations

import json
from typing import Any

from attrs import frozen

from picotron.errors import PlanError
from picotron.planner.exported import (
    Note,
    Unexpressed,
    framework_profile,
    other_software,
)
from picotron.planner.pipeline import schedule_to_csv
from picotron.planner.plan import TrainingPlan
from picotron.planner.software import SoftwareProfile
from picotron.planner.torchtitan_settings import (
    CSV_NAME,
    FLAVORS,
    Part,
    Setting,
    compiled,
    model_of,
    needs_csv,
    optimizer_of,
    others_of,
    ranks_of,
    recomputed,
    stages_of,
    training_of,
)

__all__ = ["CSV_NAME", "FLAVORS", "PROFILE", "VERSION", "TorchtitanConfig", "to_torchtitan"]

VERSION = "torchtitan v0.2.2 (73a0e697, 2026-02-20)"
PROFILE = "torchtitan"


@frozen(kw_only=True)
class TorchtitanConfig:
    """One run's configuration, by section; ``str`` is the TOML file, its launching line in a comment.

    ``schedule_csv`` stands in the file ``schedule.csv`` beside it, where the schedule is none of PyTorch's.
    """

    title: str
    settings: tuple[Setting, ...]
    launch: str
    schedule_csv: str | None
    unexpressed: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def sections(self) -> dict[str, dict[str, Any]]:
        """The settings as TOML holds them."""
        found: dict[str, dict[str, Any]] = {}
        for section, key, value in self.settings:
            found.setdefault(section, {})[key] = value
        return found

    def __str__(self) -> str:
        lines = [
            f"# {self.title}; configuration of {VERSION}.",
            *(f"# NOT EXPRESSED: {sentence}" for sentence in self.unexpressed),
            *(f"# Note: {sentence}" for sentence in self.notes),
            f"# {self.launch}",
        ]
        for section, values in self.sections.items():
            lines += ["", f"[{section}]", *(f"{key} = {_toml(value)}" for key, value in values.items())]
        return "\n".join(lines) + "\n"


def to_torchtitan(
    plan: TrainingPlan, *, profile: SoftwareProfile | str | None = None, steps: int | None = None
) -> TorchtitanConfig:
    """The configuration with which torchtitan runs ``plan``.

    ``profile`` decides compilation and overlaps: left out, the cluster's own where it is one of torchtitan's,
    else ``torchtitan``. ``steps`` is how many are trained. Raises PlanError for what is no plan, or an
    unknown profile.
    """
    if not isinstance(plan, TrainingPlan):
        raise PlanError(f"plan must be a TrainingPlan, got {type(plan).__name__}; make one with plan(...)")
    software = framework_profile(plan, profile, PROFILE)
    parts: list[Part] = [
        *model_of(plan.model, plan.workload.precision),
        *training_of(plan, steps),
        *optimizer_of(plan.workload),
        *ranks_of(plan),
        *stages_of(plan),
        *recomputed(plan),
        *compiled(plan, software),
        *other_software(plan, software),
        *others_of(plan),
    ]
    cluster = plan.cluster
    return TorchtitanConfig(
        title=f"{plan.model.name} on {cluster.name}",
        settings=tuple(part for part in parts if isinstance(part, tuple)),
        launch=f"torchrun --nnodes {cluster.nodes} --nproc-per-node {cluster.devices_per_node} "
        '--rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:29500" '
        "-m torchtitan.train --job.config_file plan.toml",
        schedule_csv=schedule_to_csv(plan.schedule) if needs_csv(plan) else None,
        unexpressed=tuple(part.text for part in parts if isinstance(part, Unexpressed)),
        notes=tuple(part.text for part in parts if isinstance(part, Note)),
    )


def _toml(value: Any) -> str:
    """A value as TOML writes it: JSON's strings, lists and truth are its own, and so are finite numbers."""
    return json.dumps(value)
