"""PyTorch's own pipeline runtime reads our schedules from a file and trains by them, on real processes.

One launch of four processes runs the whole table over gloo: a Llama of stock modules, cut into the plan's
stages, is trained by ``_PipelineScheduleRuntime`` in the order of the plan's compute-only CSV. What it must
equal is plain autograd over the same microbatches in one process, and Picotron's training by the same plan.

Of torch 2.13, so that nobody wonders: its own checker refuses the order that its Schedule1F1B tells (whose
last rank counts forwards from 1), so 1F1B runs here because the order is ours. Its simulator refuses
overlapped pairs; its runtime runs them one after the other. It finds a microbatch's loss by how many
forwards the last stage ran before, so every last stage here runs forwards in the order of microbatches.
"""

from __future__ import annotations

from datetime import timedelta
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from attrs import frozen
from torch.nn.functional import cross_entropy

from picotron.planner.actions import cells
from picotron.planner.optimise import optimise
from picotron.planner.pipeline import Schedule, schedule_from_csv
from picotron.planner.plan import TrainingPlan
from picotron.planner.schedule_memory import unit_memory
from picotron.planner.schedule_times import unit_costs
from picotron.planner.topology import coordinate
from picotron.runtime.data import HostBatch, step_batches
from picotron.runtime.layout import assemble
from tests.runtime.gloo import launch
from tests.runtime.models import (
    TOLERANCE,
    gradient_errors,
    random_samples,
    random_weights,
    tiny_model,
    tiny_plan,
    train,
)

pytestmark = pytest.mark.no_cover  # other tests count the lines

pytest.importorskip("torch.distributed.pipelining", reason="this torch has no pipelining")

WORLD_SIZE = 4
STEPS = 2

# Made by hand: one rank splits its backwards, or most of them, and the other does not.
BY_HAND = """\
0F0,0F1,2F0,2F1,0F2,2B0,0B0,2B1,0F3,2F2,0B1,2B2,2F3,0B2,2B3,0B3
1F0,1F1,3F0,3I0,3F1,3I1,1I0,3W0,1F2,1I1,3W1,1F3,3F2,3B2,1W0,1B2,3F3,3I3,3W3,1W1,1B3
"""


def optimised() -> Schedule:
    """One that no name gives: five microbatches may be held, a backward of the input costs most."""
    costs = unit_costs(2, f=2, i=3, w=1, transfer=0.5)
    found = optimise(costs, 2, 8, memory=unit_memory(2), memory_limit_bytes=5, effort=20_000)
    return found.schedule


CASES: dict[str, dict[str, Any]] = {
    "1f1b": {"pp": 2, "schedule": "1f1b"},
    "interleaved": {"pp": 2, "schedule": "interleaved", "virtual_stages": 2},
    "zb-h1": {"pp": 2, "schedule": "zb-h1"},
    "zb-v": {"pp": 2, "schedule": "zb-v"},
    "dualpipe-v": {"pp": 2, "schedule": "dualpipe-v"},
    "optimised": {"pp": 2, "schedule": optimised()},
    "by hand": {"pp": 2, "schedule": schedule_from_csv(BY_HAND, name="by hand"), "micro_batch": 2},
    "1f1b of 3": {"pp": 3, "schedule": "1f1b", "micro_batch": 2},
    "interleaved-zb of 4": {"pp": 4, "schedule": "interleaved-zb"},
    "v-half of 4": {"pp": 4, "schedule": "v-half"},
}

Gradients = dict[str, torch.Tensor]


@frozen(kw_only=True)
class Trained:
    """Each step's loss and the gradients that it used; of a rank, its own parameters' and what it walked."""

    losses: list[float]
    gradients: list[Gradients]
    walked: tuple[str, ...] = ()


def made(name: str) -> TrainingPlan:
    """The plan of a case: one layer a stage or more."""
    return tiny_plan(tiny_model("llama", layers=8), **CASES[name])


def samples(plan: TrainingPlan) -> list[np.ndarray]:
    """Samples of which every token has a label, so that the mean of microbatches' means is the mean."""
    return random_samples(plan.model.vocab_size, plan.workload.seq_len)


def batches(plan: TrainingPlan, step: int) -> tuple[HostBatch, ...]:
    """The microbatches of a step."""
    consumed = step * plan.workload.global_batch
    return step_batches(plan, samples(plan), consumed=consumed, dp_index=0)


def sgd_step(parameters: dict[str, torch.nn.Parameter], rate: float) -> Gradients:
    """Descend, and give the gradients away."""
    gradients = {}
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        gradients[name], parameter.grad = parameter.grad, None
        parameter.data.sub_(gradients[name], alpha=rate)
    return gradients


def train_stages(plan: TrainingPlan, rank: int, group: Any) -> Trained:
    """One rank's part, run by torch's pipeline runtime; losses are known where the last stage is."""
    from benchmarks.peers import llama, pipeline_runtime, stages

    def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return cross_entropy(logits.flatten(0, 1), targets.flatten()) / plan.num_microbatches

    every = stages(llama(plan, random_weights), plan.stage_layers)
    own = {stage: every[stage] for stage in plan.rank_stages(rank)}
    runtime = pipeline_runtime(plan.schedule, own, loss, group)
    parameters = {name: p for module in own.values() for name, p in module.named_parameters()}
    walked = tuple(str(a) for a in runtime.pipeline_order_with_comms[rank] if a.is_compute_op)
    trained = Trained(losses=[], gradients=[], walked=walked)
    for step in range(STEPS):
        given = batches(plan, step)
        losses: list[torch.Tensor] = []
        ids, targets = (torch.from_numpy(np.concatenate(a)) for a in zip(*map(_arrays, given), strict=True))
        runtime.step(
            *([ids] if 0 in own else []),
            target=targets if plan.num_stages - 1 in own else None,
            losses=losses,
            return_outputs=False,
        )
        if losses:
            trained.losses.append(sum(loss.item() for loss in losses))
        trained.gradients.append(sgd_step(parameters, plan.workload.learning_rate))
    return trained


def _arrays(batch: HostBatch) -> tuple[np.ndarray, np.ndarray]:
    return batch.ids, batch.targets


def run_table() -> dict[str, Trained]:
    """In one of the processes: each case that it takes part in."""
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    rank, found = dist.get_rank(), {}
    groups = {size: dist.new_group(list(range(size))) for size in (2, 3, 4)}
    for name in CASES:
        plan = made(name)
        if rank < plan.topology.pp:
            found[name] = train_stages(plan, rank, groups[plan.topology.pp])
    dist.barrier()
    dist.destroy_process_group()
    return found


@pytest.fixture(scope="module")
def table() -> dict[str, list[Trained]]:
    """For each case, what every rank has of it."""
    launched = launch(run_table, WORLD_SIZE, timeout_seconds=120.0)
    return {name: [ranks[name] for ranks in launched if name in ranks] for name in CASES}


@lru_cache
def alone(micro_batch: int) -> Trained:
    """Plain autograd in this process, microbatch after microbatch."""
    from benchmarks.peers import llama

    plan = tiny_plan(tiny_model("llama", layers=8), micro_batch=micro_batch)
    module = llama(plan, random_weights)
    trained = Trained(losses=[], gradients=[])
    for step in range(STEPS):
        losses = []
        for batch in batches(plan, step):
            ids, targets = map(torch.from_numpy, _arrays(batch))
            loss = module(ids, targets) / plan.num_microbatches
            loss.backward()
            losses.append(loss.item())
        trained.losses.append(sum(losses))
        trained.gradients.append(sgd_step(dict(module.named_parameters()), plan.workload.learning_rate))
    return trained


def merged(ranks: list[Trained]) -> Trained:
    """All ranks' parts as one; no two ranks have the same parameter or both have losses."""
    (losses,) = (trained.losses for trained in ranks if trained.losses)
    whole: list[Gradients] = [{} for _ in range(STEPS)]
    for trained in ranks:
        for everything, own in zip(whole, trained.gradients, strict=True):
            assert not everything.keys() & own.keys()
            everything.update(own)
    return Trained(losses=losses, gradients=whole)


def assert_same(ours: Trained, theirs: Trained) -> None:
    """Losses and all gradients of every step are equal, as the rule of parity has it."""
    tolerance = TOLERANCE["fp64"]
    assert len(ours.losses) == STEPS
    assert ours.losses == pytest.approx(theirs.losses, rel=tolerance, abs=0)
    for own, expected in zip(ours.gradients, theirs.gradients, strict=True):
        assert own.keys() == expected.keys()
        assert max(gradient_errors(own, expected).values()) <= tolerance


@pytest.mark.parametrize("name", CASES)
def test_torch_trains_by_our_schedule(name: str, table: dict[str, list[Trained]]) -> None:
    """Loss and every gradient of two steps are those of plain autograd in one process."""
    assert_same(merged(table[name]), alone(made(name).micro_batch))


@pytest.mark.parametrize("name", CASES)
def test_torch_and_picotron_train_the_same_by_one_plan(name: str, table: dict[str, list[Trained]]) -> None:
    """Loss and every gradient of two steps are those of Picotron's ranks, which run the same schedule."""
    plan = made(name)
    reports = train(plan, samples(plan), steps=STEPS)
    picotron = Trained(
        losses=[result.loss for result in reports[0].results],
        gradients=[assemble(plan, [report.gradients[step] for report in reports]) for step in range(STEPS)],
    )
    assert_same(merged(table[name]), picotron)


@pytest.mark.parametrize("name", CASES)
def test_torch_walks_every_action_of_the_schedule(name: str, table: dict[str, list[Trained]]) -> None:
    """On each rank torch runs the schedule's actions in its order, splits and pairs included."""
    orders = made(name).schedule.orders
    assert [list(trained.walked) for trained in table[name]] == [
        cells(orders, rank) for rank in range(len(orders))
    ]


@pytest.mark.parametrize("name", CASES)
def test_a_rank_trains_what_the_plan_gives_it(name: str, table: dict[str, list[Trained]]) -> None:
    """The parameters of torch's stages on a rank are those that the plan says the rank holds."""
    plan = made(name)
    for rank, trained in enumerate(table[name]):
        held = {placement.name for placement in plan.held(coordinate(plan.topology, rank))}
        assert trained.gradients[0].keys() == held
