"""The time model held to a machine that is priced by operation, so that a search there speaks its seconds.

On a CPU, and where costs were measured, ``predict`` prices a plan operation by operation. A search estimates
thousands of layouts from columns, whose shares of the peak are those of the architecture; two numbers make
them this machine's: how much longer one microbatch takes on one device, and a reduction between two.
"""

from __future__ import annotations

import numpy as np
from attrs import evolve

from picotron.planner.cases import MachineColumns
from picotron.planner.cluster import ClusterSpec, achieved_link
from picotron.planner.collectives import collective_seconds
from picotron.planner.columns_of import cases_of_plan
from picotron.planner.constants import default_constants
from picotron.planner.cost import stage_cost
from picotron.planner.estimate import estimate_seconds
from picotron.planner.model import ModelSpec
from picotron.planner.network import Group, all_reduce_seconds, links
from picotron.planner.plan import TrainingPlan, plan
from picotron.planner.profile_prices import has_time_model
from picotron.planner.workload import Workload

_ONCE = ("optimizer", "data")  # causes that are not of a microbatch


def anchored(
    machine: MachineColumns, model: ModelSpec, cluster: ClusterSpec, work: Workload
) -> MachineColumns:
    """``machine`` with the scales that its operations' prices ask for; itself where a profile prices."""
    if has_time_model(cluster):
        return machine
    alone = evolve(cluster, nodes=1, devices_per_node=1)
    one = plan(model, alone, evolve(work, global_batch=1))
    return evolve(
        machine,
        compute_scale=machine.compute_scale * _compute_ratio(one),
        communication_scale=machine.communication_scale * _wire_ratio(one, cluster),
    )


def _compute_ratio(one: TrainingPlan) -> float:
    """Priced over estimated seconds of one microbatch on one device."""
    cost = stage_cost(one, 0)
    causes = estimate_seconds(cases_of_plan(one)).causes
    estimated = sum(float(np.ravel(seconds)[0]) for cause, seconds in causes.items() if cause not in _ONCE)
    return (cost.forward_seconds + cost.backward_seconds) / estimated


def _wire_ratio(one: TrainingPlan, cluster: ClusterSpec) -> float:
    """Priced over estimated seconds of an all-reduce of a microbatch's activations between two devices."""
    work = one.workload
    payload = work.seq_len * one.model.hidden_size * one.format.compute
    link = achieved_link(cluster.intra_node, cluster.efficiency)
    priced = collective_seconds("all_reduce", payload, 2, link) * cluster.efficiency.communication_scale
    cases, pair = cases_of_plan(one), np.asarray(2.0)
    estimated = all_reduce_seconds(
        links(cases, default_constants()), np.asarray(float(payload)), Group(size=pair, inside=pair)
    )
    return priced / float(estimated)
