"""What a step on an accelerator takes beyond its program: seconds that the time model knows and no row has.

A program's reductions and gathers run beside the computing for nothing, and its ranks are equally fast. In
published runs what is hidden slows the computing that hides it, part of it is never hidden, the slowest of
many nodes is waited for, and the host has work of its own once a step (``sharding_times``, ``constants``).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from picotron.planner.columns_of import cases_of_plan
from picotron.planner.constants import default_constants
from picotron.planner.estimate import estimate_seconds
from picotron.planner.plan import TrainingPlan
from picotron.planner.profile_prices import has_time_model


def beyond_program(plan: TrainingPlan, told: Mapping[str, float]) -> dict[str, float]:
    """Seconds of a step by cause beyond those that the simulated program has ``told``; none on a CPU."""
    if not has_time_model(plan.cluster):
        return {}
    data = float(np.ravel(estimate_seconds(cases_of_plan(plan)).causes["data"])[0])
    return {
        "data": max(0.0, data - told.get("data", 0.0)),
        "optimizer": float(default_constants()["step_seconds"]),
    }
