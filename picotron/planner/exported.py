"""What exports to other frameworks share: sentences beside the settings, and what of a plan both ask for."""

from __future__ import annotations

from collections.abc import Iterator

from attrs import frozen

from picotron.errors import PlanError
from picotron.planner.software import SoftwareProfile, software_profile
from picotron.planner.topology import Topology
from picotron.planner.training_plan import TrainingPlan
from picotron.planner.validators import is_size, shown
from picotron.planner.workload import Workload

FEWEST_STEPS = 100  # that are trained, where neither the plan nor the caller says how many


@frozen
class Unexpressed:
    """A sentence on what the arguments cannot say."""

    text: str


@frozen
class Note:
    """A sentence on what the plan does not say and the arguments must."""

    text: str


def framework_profile(
    plan: TrainingPlan, asked: SoftwareProfile | str | None, default: str
) -> SoftwareProfile:
    """The software profile that decides a framework's kernels and overlaps.

    Left out, it is that of the plan's cluster if it is one of the framework's (its name begins alike), else
    ``default``. Raises PlanError for an unknown name.
    """
    own = plan.cluster.profile
    if asked is None:
        family = default.partition("-")[0]
        return own if own.name.startswith(family) else software_profile(default)
    made = software_profile(asked) if isinstance(asked, str) else asked
    if not isinstance(made, SoftwareProfile):
        raise PlanError(f"profile must be a SoftwareProfile or its name, got {shown(asked)}")
    return made


def other_software(plan: TrainingPlan, software: SoftwareProfile) -> Iterator[Note]:
    """That the plan is priced with other kernels and overlaps than the framework is asked for."""
    own = plan.cluster.profile
    if own != software:
        yield Note(
            f"kernels and overlaps are asked for as the profile {software.name} has them; "
            f"the plan is priced with {own.name}"
        )


def trained_steps(work: Workload, asked: int | None) -> int:
    """How many steps are trained: as asked, else all over which the learning rate changes.

    Raises PlanError for what is no number of steps.
    """
    if asked is None:
        return max(work.decay_steps, work.warmup_steps + 1, FEWEST_STEPS)
    if not is_size(asked):
        raise PlanError(f"steps must be a whole number of at least 1, got {shown(asked)}")
    return asked


def same_order(topology: Topology, order: tuple[str, ...]) -> bool:
    """Whether the ranks of ``topology`` sit as they would under ``order``: axes of one rank have no place."""
    moving = [axis for axis in order if getattr(topology, axis) > 1]
    return moving == [axis for axis in topology.order if getattr(topology, axis) > 1]


def stage_slices(stage_layers: tuple[int, ...]) -> Iterator[slice]:
    """The layers of each stage, as slices of what is listed by layer."""
    start = 0
    for layers in stage_layers:
        yield slice(start, start + layers)
        start += layers
