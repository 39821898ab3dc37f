"""Plans on real processes, by gloo, train as one rank does and as the simulator says.

One launch of eight processes runs the whole table, each case on as many of them as its plan has ranks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from picotron.planner.memory import memory_timeline
from picotron.planner.plan import TrainingPlan
from picotron.runtime.distributed import DistributedBackend, connect
from picotron.runtime.run import least_memory
from tests.runtime.gloo import launch
from tests.runtime.models import (
    TOLERANCE,
    RankReport,
    assert_as_planned,
    distance,
    random_samples,
    reference,
    single_rank,
    tiny_model,
    tiny_plan,
    tiny_workload,
    train,
    train_rank,
)

Case = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]  # model, workload, parallelism

WORLD_SIZE = 8
STEPS = 5
FP32 = {"precision": "fp32", "max_grad_norm": 1.0}
CASES: dict[str, Case] = {
    "one rank": ({"family": "llama"}, FP32, {}),
    "dp2": ({"family": "qwen3"}, FP32, {"dp": 2, "micro_batch": 2}),
    "pp2": ({"family": "gpt2", "tied": True}, {}, {"pp": 2}),
    "tp2": ({"family": "qwen2", "tied": True}, {}, {"tp": 2, "sequence_parallel": False}),
    "pp3 afab": ({"family": "llama", "layers": 3, "tied": True}, FP32, {"pp": 3, "schedule": "afab"}),
    "tp3": (
        {"family": "gpt2", "heads": 3},
        {"seq_len": 9, "global_batch": 4},
        {"tp": 3, "sequence_parallel": True},
    ),
    "dp2 tp2": ({"family": "qwen2"}, FP32, {"dp": 2, "tp": 2, "sequence_parallel": True}),
    "dp2 pp2 afab": ({"family": "gpt2", "tied": True}, FP32, {"dp": 2, "pp": 2, "schedule": "afab"}),
    "dp5": ({"family": "llama"}, {"global_batch": 10}, {"dp": 5}),
    "dp2 pp3": ({"family": "qwen3", "layers": 3}, {}, {"dp": 2, "pp": 3}),
    "dp7": ({"family": "qwen2"}, {**FP32, "global_batch": 7}, {"dp": 7}),
    "tp8": (
        {"family": "llama", "heads": 8, "tied": True},
        {"global_batch": 1},
        {"tp": 8, "sequence_parallel": True},
    ),
    "pp8": ({"family": "llama", "layers": 8, "tied": True}, FP32, {"pp": 8}),
    "dp2 pp2 tp2": (
        {"family": "qwen3", "tied": True},
        FP32,
        {"dp": 2, "pp": 2, "tp": 2, "sequence_parallel": False},
    ),
    "dp2 pp2 tp2 sp": (
        {"family": "gpt2", "tied": True},
        {},
        {"dp": 2, "pp": 2, "tp": 2, "sequence_parallel": True, "schedule": "afab"},
    ),
    "pp2 tp4 sp": (
        {"family": "qwen2", "heads": 8, "tied": True},
        {"optimizer": "adamw", "learning_rate": 1e-3},
        {"pp": 2, "tp": 4, "sequence_parallel": True, "micro_batch": 2},
    ),
}

MEASURED = ("dp2", "pp2", "tp3", "dp2 pp2 tp2 sp")  # cases whose later steps have their memory measured


def made(name: str) -> TrainingPlan:
    """The plan of a case."""
    model, work, parallel = CASES[name]
    return tiny_plan(tiny_model(**model), tiny_workload(**work), **parallel)


def samples(plan: TrainingPlan) -> list[Any]:
    """The data of every case: some samples are short, and some of a larger batch are without a label."""
    return random_samples(plan.model.vocab_size, plan.workload.seq_len, ragged=is_ragged(plan))


def is_ragged(plan: TrainingPlan) -> bool:
    """Whether a step has so many samples that one at least has a label."""
    return plan.workload.global_batch >= 4


def run_table() -> dict[str, RankReport]:
    """In one of the processes: its report of each case that it takes part in."""
    processes, reports = connect(), {}
    for name in CASES:
        plan = made(name)
        if processes.rank < plan.topology.world_size:
            ranks = range(plan.topology.world_size)
            with DistributedBackend(processes, device="cpu", timeout_seconds=60.0, ranks=ranks) as backend:
                measure_from = 1 if name in MEASURED else None
                reports[name] = train_rank(
                    backend, plan, samples(plan), steps=STEPS, measure_from=measure_from
                )
    return reports


@pytest.fixture(scope="module")
def table() -> dict[str, list[RankReport]]:
    """For each case, every rank's report."""
    found = launch(run_table, WORLD_SIZE, timeout_seconds=300.0)
    return {name: [reports[name] for reports in found if name in reports] for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_processes_train_as_one_rank(name: str, table: dict[str, list[RankReport]]) -> None:
    """Loss, norm and every gradient of five steps are the single rank's, by the planned rows and bytes."""
    plan = made(name)
    found = distance(plan, table[name], reference(single_rank(plan), ragged=is_ragged(plan), steps=STEPS))
    assert found.largest <= TOLERANCE[plan.workload.precision], found
    assert_as_planned(plan, table[name])


@pytest.mark.parametrize("name", CASES)
def test_processes_lose_what_the_simulator_says(name: str, table: dict[str, list[RankReport]]) -> None:
    """Every step's loss is the simulated one's to 1e-6."""
    plan = made(name)
    simulated = train(plan, samples(plan), steps=STEPS)
    for ours, theirs in zip(table[name], simulated, strict=True):
        losses = [result.loss for result in theirs.results]
        assert [result.loss for result in ours.results] == pytest.approx(losses, rel=1e-6, abs=0)


@pytest.mark.parametrize("name", MEASURED)
def test_processes_hold_the_planned_memory(name: str, table: dict[str, list[RankReport]]) -> None:
    """Live bytes equal the plan's at every segment's end; the peak inside is 98 to 100 % of it.

    Gloo's threads may let go of a tensor late, so it is the least of four steps.
    """
    plan = made(name)
    for rank, report in enumerate(table[name]):
        planned = memory_timeline(plan, rank)
        found = least_memory([result.memory for result in report.results if result.memory is not None])
        np.testing.assert_array_equal(found.live_bytes, planned.live_bytes)
        shares = found.peak_bytes / planned.peak_bytes
        assert shares.min() >= 0.98 and shares.max() <= 1.0
