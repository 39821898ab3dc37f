"""What experts may need beyond the balanced case: every token sent to the experts of one rank."""

from __future__ import annotations

import numpy as np

from picotron.planner.columns_of import cases_of_plan
from picotron.planner.estimate_memory import estimate_bytes
from picotron.planner.plan import TrainingPlan


def worst_imbalance(plan: TrainingPlan) -> float:
    """How many times the mean number of rows the fullest expert-parallel rank can receive.

    A token goes to ``top_k`` different experts, so that a rank with fewer of them cannot receive it so often.
    """
    experts, ep = plan.model.experts, plan.topology.ep
    if experts is None:
        return 1.0
    return ep * min(experts.top_k, experts.num_experts // ep) / experts.top_k


def worst_dispatch_bytes(plan: TrainingPlan) -> int:
    """How much more the fullest device holds if so many come in every layer and microbatch; by estimate."""
    worst = worst_imbalance(plan)
    if worst <= 1.0:
        return 0
    cases = cases_of_plan(plan)
    balanced, fullest = (estimate_bytes(cases, imbalance=each).reserved_bytes for each in (1.0, worst))
    return round(float(np.ravel(fullest - balanced)[0]))
