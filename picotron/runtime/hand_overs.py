"""What a call costs a simulated rank in a training, beyond the call itself.

A rank that goes on after others finds the caches full of their tensors. A loop of calls does not show it; a
training on several ranks beside the same training on one does: of a pipeline for messages, of tensor
parallelism for collectives.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from statistics import median

from attrs import evolve

from picotron.planner.cluster import ClusterSpec
from picotron.planner.host_seconds import calls, cpu_seconds_by_rank
from picotron.planner.plan import TrainingPlan
from picotron.runtime.backend import Backend
from picotron.runtime.calibrated_steps import Training, same_batches, training_plan
from picotron.runtime.pipeline import Session
from picotron.runtime.simulated import simulate

TRAINING = Training(2, 192, 4, 512, 128, 1, num_microbatches=4)
LAYOUTS: Mapping[str, dict[str, int]] = {"messages": {"pp": 2}, "collectives": {"tp": 2}}
_MESSAGES = ("send", "recv")
_STEPS = 3  # of a turn, of which the first does not count
_LEAST_TURNS = 1


def with_hand_overs(cluster: ClusterSpec, precision: str, seconds: float) -> ClusterSpec:
    """The cluster whose calls cost what makes the difference between ranks and a single one come out right.

    The difference is the median over turns in which the trainings follow each other.
    """
    one = training_plan(TRAINING, precision, cluster)
    many = {name: training_plan(TRAINING, precision, cluster, **layout) for name, layout in LAYOUTS.items()}
    more: dict[str, list[float]] = {name: [] for name in many}
    end, turns = time.perf_counter() + seconds, 0
    while turns < _LEAST_TURNS or time.perf_counter() < end:
        base = step_seconds(one)
        for name, made in many.items():
            more[name].append(step_seconds(made) - base)
        turns += 1
    for name, made in many.items():
        cluster = costlier_calls(cluster, name, one, made, median(more[name]))
    return cluster


def costlier_calls(
    cluster: ClusterSpec, name: str, one: TrainingPlan, many: TrainingPlan, more_seconds: float
) -> ClusterSpec:
    """The cluster whose calls of a name of LAYOUTS make ``many`` take so much more than ``one``.

    Every call costs the same more, and none costs less than in a loop.
    """
    measured = cluster.efficiency.measured
    assert measured is not None
    expected = sum(cpu_seconds_by_rank(many)) - sum(cpu_seconds_by_rank(one))
    each = max(0.0, (more_seconds - expected) / _num_calls(many, name))
    costs = tuple(
        evolve(cost, call_seconds=cost.call_seconds + each) if _is_of(name, cost.kind) else cost
        for cost in measured.communication
    )
    efficiency = evolve(cluster.efficiency, measured=evolve(measured, communication=costs))
    return evolve(cluster, efficiency=efficiency)


def _is_of(name: str, kind: str) -> bool:
    return (kind in _MESSAGES) == (name == "messages")


def _num_calls(made: TrainingPlan, name: str) -> int:
    topology = made.topology
    own = sum(
        count
        for pp in range(topology.pp)
        for (kind, _), count in calls(made, pp).items()
        if _is_of(name, kind)
    )
    return own * topology.world_size // topology.pp


def step_seconds(made: TrainingPlan) -> float:
    """CPU seconds of a step, all ranks together: the median of a turn's, without the first."""

    def rank_main(backend: Backend) -> list[float]:
        session, batches = Session(made, backend), same_batches(made)
        return [session.step(batches).cpu_seconds for _ in range(_STEPS)]

    by_rank = simulate(rank_main, made.topology.world_size, clock="cpu")
    by_step = [math.fsum(step) for step in zip(*by_rank, strict=True)]
    return median(by_step[1:])
