"""A module of torch's in the place of a segment: the same gradients, in one walk of its graph or in two."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attrs import evolve
from torch import nn
from torch.nn import functional

from picotron.errors import PlanError
from picotron.planner.plan import TrainingPlan
from picotron.planner.predict import predict
from picotron.runtime.data import step_batches
from picotron.runtime.foreign import check_modules
from picotron.runtime.pipeline import Session
from picotron.runtime.run import run
from picotron.runtime.simulated import simulate
from tests.runtime.models import (
    TOLERANCE,
    RankReport,
    distance,
    random_samples,
    random_weights,
    reference,
    single_rank,
    tiny_model,
    tiny_plan,
    tiny_workload,
)


class Mlp(nn.Module):
    """A llama's MLP block as anyone would write it; ``idle`` weights take no part."""

    def __init__(self) -> None:
        super().__init__()
        self.post_attention_layernorm = nn.RMSNorm(24, eps=1e-5)
        self.gate_proj, self.up_proj = nn.Linear(24, 16, bias=False), nn.Linear(24, 16, bias=False)
        self.down_proj = nn.Linear(16, 24, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, seq_len, hidden] to the same."""
        assert x.shape == (2, 8, 24)
        normed = self.post_attention_layernorm(x)
        y: torch.Tensor = x + self.down_proj(functional.silu(self.gate_proj(normed)) * self.up_proj(normed))
        return y


def made(**parallel: Any) -> TrainingPlan:
    """Two microbatches of two samples for each of four layers."""
    model, work = tiny_model("llama", layers=4, tied=True), tiny_workload(global_batch=4)
    return tiny_plan(model, work, micro_batch=2, **parallel)


def trained(plan: TrainingPlan, modules: dict[str, nn.Module]) -> list[RankReport]:
    """Every rank's report of two steps with such modules."""
    data = random_samples(plan.model.vocab_size, plan.workload.seq_len)

    def rank_main(backend: Any) -> RankReport:
        session, results, gradients = Session(plan, backend, random_weights, modules=modules), [], []
        for step in range(2):
            results.append(session.step(step_batches(plan, data, consumed=4 * step, dp_index=0)))
            gradients.append({name: gradient.clone() for name, gradient in session.gradients.items()})
        return RankReport(results=tuple(results), gradients=tuple(gradients))

    return simulate(rank_main, plan.topology.world_size, timeout_seconds=60.0)


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_module_trains_as_the_segment_it_stands_for(schedule: str, recompute: str) -> None:
    """Whole backwards and split ones, recomputed or not: loss, norm and gradients are the single rank's."""
    plan = made(pp=2, schedule=schedule, recompute=recompute, foreign=("mlp 1", "mlp 2"))
    reports = trained(plan, {"mlp 1": Mlp(), "mlp 2": Mlp()})
    found = distance(plan, reports, reference(single_rank(plan), steps=2))
    assert found.largest <= TOLERANCE["fp64"], found


class Biased(Mlp):
    """With a parameter that the segment has not."""

    def __init__(self) -> None:
        super().__init__()
        self.down_proj = nn.Linear(16, 24)


def compiled() -> nn.Module:
    """By function; nothing is compiled before it is called."""
    module = torch.compile(Mlp())
    assert isinstance(module, nn.Module)
    return module


def compiled_in_place() -> nn.Module:
    """By method."""
    module = Mlp()
    module.compile()
    return module


COMPILING = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own making


@COMPILING
@pytest.mark.parametrize(
    ("parallel", "module", "words"),
    [
        ({}, Biased, r"must have the parameters .*, got .*'down_proj.bias': \(24,\)"),
        ({"pp": 2, "schedule": "zb-h1"}, compiled, "zb-h1 splits backwards in two"),
        ({"pp": 2, "schedule": "zb-v"}, compiled_in_place, "pass the module uncompiled"),
    ],
)
def test_what_a_module_cannot_stand_for_is_refused(parallel: dict[str, Any], module: Any, words: str) -> None:
    """By rule and value, before anything opens."""
    with pytest.raises(PlanError, match=words):
        check_modules(made(**parallel, foreign=("mlp 0",)), {"mlp 0": module()})


@pytest.mark.parametrize(
    ("foreign", "given", "words"),
    [
        ((), ("mlp 1",), "foreign segments: none, got mlp 1; pass these, or plan with foreign naming those"),
        (("mlp 0", "mlp 1"), ("mlp 1",), "foreign segments: mlp 0, mlp 1, got mlp 1;"),
        (("mlp 1",), (), "foreign segments: mlp 1, got none;"),
    ],
)
def test_modules_are_those_that_the_plan_names(
    foreign: tuple[str, ...], given: tuple[str, ...], words: str
) -> None:
    """A price with two walks that do not happen, or without those that do, is no price."""
    data = random_samples(32, 8)
    with pytest.raises(PlanError, match=words):
        run(made(foreign=foreign), data, steps=1, modules={name: Mlp() for name in given})


def test_a_run_with_a_module_takes_the_predicted_time() -> None:
    """The virtual clock of ranks whose W walks a graph again is the plan's to the bit."""
    plan = made(pp=2, schedule="zb-h1", foreign=("mlp 1",))
    data = random_samples(plan.model.vocab_size, plan.workload.seq_len)
    measured = run(plan, data, steps=1, modules={"mlp 1": Mlp()})
    assert measured.seconds[0] == predict(plan).step_seconds > predict(evolve(plan, foreign=())).step_seconds


@COMPILING
def test_a_compiled_module_may_have_whole_backwards() -> None:
    """Under its own parameters' names."""
    plan = made(pp=2, foreign=("mlp 0", "mlp 1"))
    check_modules(plan, {"mlp 0": compiled(), "mlp 1": compiled_in_place()})
