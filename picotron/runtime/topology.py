"""Opens the plan's groups on a backend."""

from __future__ import annotations

from picotron.planner.cost import of_kind
from picotron.planner.plan import TrainingPlan
from picotron.planner.program import COMPUTE
from picotron.planner.topology import groups
from picotron.runtime.backend import Backend, Group


def group_names(plan: TrainingPlan) -> tuple[str, ...]:
    """The kinds of group that the plan's program and bodies use, in the order in which they are opened."""
    bodies = [of_kind(plan.bodies(stage), kind) for stage in range(plan.num_stages) for kind in COMPUTE]
    inside = {op.group for body in bodies for segment in body.segments for op in segment.collectives}
    return tuple(sorted({*plan.program().groups, *inside}))


def open_groups(plan: TrainingPlan, backend: Backend) -> dict[str, Group]:
    """The rank's communicator of each kind; a kind whose groups are single ranks is left out.

    Creating a group is collective: every rank opens every group, in plan order.
    """
    mine: dict[str, Group] = {}
    for name in group_names(plan):
        for ranks in groups(plan.topology, name):
            if len(ranks) > 1:
                group = backend.new_group(ranks, name)
                if backend.rank in ranks:
                    mine[name] = group
    return mine
