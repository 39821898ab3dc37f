"""Learning rate, clipping and updates, by hand and against torch's own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from picotron.planner.plan import TrainingPlan
from picotron.planner.topology import coordinate
from picotron.runtime.backend import Backend
from picotron.runtime.data import step_batches
from picotron.runtime.layout import assemble
from picotron.runtime.optimizer import clip_coefficient, learning_rate
from picotron.runtime.pipeline import Session, StepResult
from picotron.runtime.simulated import simulate
from tests.runtime.models import random_samples, random_weights, tiny_model, tiny_plan, tiny_workload

Tensors = dict[str, torch.Tensor]


def test_the_rate_rises_stays_and_falls() -> None:
    """4 steps of warm-up to 1.0, then a cosine over 4 steps down to a tenth, where it stays."""
    work = tiny_workload(learning_rate=1.0, warmup_steps=4, decay_steps=8, min_learning_rate_ratio=0.1)
    half = 0.1 + 0.9 * 0.5
    diagonal = 0.45 * math.sqrt(0.5)
    expected = [0.25, 0.5, 0.75, 1.0, 1.0, half + diagonal, half, half - diagonal, 0.1, 0.1, 0.1]
    assert [learning_rate(work, step) for step in range(11)] == pytest.approx(expected, abs=1e-15)


def test_the_rate_stays_without_a_decay() -> None:
    """decay_steps 0: after the warm-up nothing changes."""
    work = tiny_workload(learning_rate=0.3, warmup_steps=2)
    assert [learning_rate(work, step) for step in (0, 1, 2, 1000)] == [0.15, 0.3, 0.3, 0.3]
    assert learning_rate(tiny_workload(learning_rate=0.3), 0) == 0.3


def test_a_decay_no_longer_than_its_warm_up_ends_at_the_floor() -> None:
    """No division by zero; one step after the warm-up the rate is the least."""
    work = tiny_workload(learning_rate=1.0, warmup_steps=2, decay_steps=2, min_learning_rate_ratio=0.5)
    assert [learning_rate(work, step) for step in (1, 2, 3)] == [1.0, 1.0, 0.5]


def test_a_norm_within_bounds_is_left_alone() -> None:
    """A norm of 5 is brought to 1 by (nearly) a fifth; 0.5 and no bound at all change nothing."""
    assert clip_coefficient(5.0, 1.0) == pytest.approx(0.2, rel=1e-6)
    assert clip_coefficient(0.5, 1.0) == 1.0
    assert clip_coefficient(1e9, 0) == 1.0


def trained(
    made: TrainingPlan, steps: int
) -> tuple[list[Tensors], list[Tensors], list[StepResult], list[Tensors]]:
    """Whole weights before the first and after each step, whole gradients, and rank 0's results."""
    data = random_samples(made.model.vocab_size, made.workload.seq_len)

    def main(backend: Backend) -> tuple[list[Tensors], list[Tensors], list[StepResult]]:
        session = Session(made, backend, random_weights)

        def copies(tensors: Tensors) -> Tensors:
            return {name: tensor.clone() for name, tensor in tensors.items()}

        weights, gradients, results = [copies(session.weights)], [], []
        for step in range(steps):
            consumed = step * made.workload.global_batch
            batches = step_batches(made, data, consumed=consumed, dp_index=session.where.dp)
            results.append(session.step(batches))
            weights.append(copies(session.weights))
            gradients.append(copies(session.gradients))
        return weights, gradients, results

    ranks = simulate(main, made.topology.world_size)
    weights, gradients = (
        [assemble(made, [rank[column][at] for rank in ranks]) for at in range(steps + 1 - column)]
        for column in (0, 1)
    )
    return weights, gradients, ranks[0][2], [rank[0][-1] for rank in ranks]


def torchs(
    optimizer: type[torch.optim.Optimizer], weights: Tensors, gradients: list[Tensors], **settings: Any
) -> Tensors:
    """The weights that torch's own optimizer makes of the same gradients; matrices alone decay."""
    parameters = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in weights.items()}
    decay = settings.pop("weight_decay")
    groups = [
        {
            "params": [p for p in parameters.values() if (p.dim() > 1) is is_matrix],
            "weight_decay": decay * is_matrix,
        }
        for is_matrix in (True, False)
    ]
    made = optimizer(groups, **settings)
    for own in gradients:
        for name, parameter in parameters.items():
            parameter.grad = own[name].clone()
        made.step()
    return {name: parameter.detach() for name, parameter in parameters.items()}


@pytest.mark.parametrize("parallel", [{}, {"dp": 2, "pp": 2, "tp": 2}], ids=["one rank", "eight ranks"])
def test_adamw_is_torchs(parallel: dict[str, int]) -> None:
    """Three steps with decay equal the unfused torch.optim.AdamW on whole tensors."""
    settings = {"beta1": 0.8, "beta2": 0.9, "weight_decay": 0.1, "learning_rate": 1e-2}
    made = tiny_plan(tiny_model("qwen2", tied=True), tiny_workload(optimizer="adamw", **settings), **parallel)
    weights, gradients, _, _ = trained(made, 3)
    expected = torchs(
        torch.optim.AdamW, weights[0], gradients, lr=1e-2, betas=(0.8, 0.9), weight_decay=0.1, fused=False
    )
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[-1][name], tensor, rtol=1e-12, atol=1e-14)


def main_weights(session: Session) -> Tensors:
    """Copies of the main weights of one rank."""
    return {
        name: session.parameters.state(name)["main"][1].view_as(weight).clone()
        for name, weight in session.weights.items()
    }


@pytest.mark.parametrize("gradient_dtype", [None, "bf16"])
def test_adamw_in_bf16_moves_main_weights_in_fp32(gradient_dtype: str | None) -> None:
    """Three steps: main weights are torch's of fp32 weights and gradients, and the weights those, rounded."""
    formats = {"precision": "bf16", "gradient_dtype": gradient_dtype}
    work = tiny_workload(optimizer="adamw", learning_rate=1e-3, **formats)
    made = tiny_plan(tiny_model("llama"), work)
    data = random_samples(made.model.vocab_size, made.workload.seq_len)

    def main(backend: Backend) -> tuple[Tensors, list[Tensors], Tensors, Tensors]:
        session = Session(made, backend, random_weights)
        first = main_weights(session)
        gradients = []
        for step in range(3):
            session.step(step_batches(made, data, consumed=step * work.global_batch, dp_index=0))
            gradients.append({name: gradient.clone().float() for name, gradient in session.gradients.items()})
        return first, gradients, main_weights(session), session.weights

    first, gradients, mains, weights = simulate(main, 1)[0]
    expected = torchs(
        torch.optim.AdamW, first, gradients, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=False
    )
    for name, tensor in expected.items():
        torch.testing.assert_close(mains[name], tensor, rtol=1e-6, atol=1e-7)
        assert torch.equal(weights[name], mains[name].to(torch.bfloat16))
        assert not torch.equal(mains[name], weights[name].float())


def test_gradient_descent_is_torchs() -> None:
    """Weights less rate times (gradient + decay times weight), norms and biases without decay."""
    made = tiny_plan(tiny_model("gpt2"), tiny_workload(weight_decay=0.1, learning_rate=0.1), tp=2)
    weights, gradients, _, _ = trained(made, 2)
    expected = torchs(torch.optim.SGD, weights[0], gradients, lr=0.1, weight_decay=0.1)
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[-1][name], tensor, rtol=1e-12, atol=1e-14)
    norm = "transformer.ln_f.weight"
    torch.testing.assert_close(weights[1][norm], weights[0][norm] - 0.1 * gradients[0][norm])


@pytest.mark.parametrize(
    "parallel",
    [{}, {"tp": 4}, {"dp": 2, "pp": 2, "tp": 2}, {"tp": 4, "sequence_parallel": False}],
    ids=str,
)
def test_clipping_is_torchs(parallel: dict[str, Any]) -> None:
    """The reported norm and the clipped gradients equal torch.nn.utils.clip_grad_norm_ on whole tensors."""
    model = tiny_model("qwen3", heads=4, kv_heads=2, tied=True)
    free, clipped = (
        trained(tiny_plan(model, tiny_workload(max_grad_norm=bound), **parallel), 1) for bound in (0.0, 0.5)
    )
    parameters = []
    for tensor in free[1][0].values():
        parameters.append(torch.nn.Parameter(torch.zeros_like(tensor)))
        parameters[-1].grad = tensor.clone()
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, 0.5))
    assert norm > 0.5
    assert free[2][0].grad_norm == clipped[2][0].grad_norm == pytest.approx(norm, rel=1e-12)
    for found, parameter in zip(clipped[1][0].values(), parameters, strict=True):
        torch.testing.assert_close(found, parameter.grad, rtol=1e-12, atol=1e-15)


def test_every_steps_rate_is_reported_and_used() -> None:
    """With a warm-up of two steps gradient descent moves a norm by half the rate, then by all of it."""
    made = tiny_plan(tiny_model("llama"), tiny_workload(learning_rate=0.1, warmup_steps=2))
    weights, gradients, results, _ = trained(made, 3)
    assert [result.learning_rate for result in results] == [0.05, 0.1, 0.1]
    for step, rate in enumerate((0.05, 0.1, 0.1)):
        moved = weights[step]["model.norm.weight"] - weights[step + 1]["model.norm.weight"]
        torch.testing.assert_close(moved, rate * gradients[step]["model.norm.weight"])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_copies_of_a_weight_stay_equal(optimizer: str) -> None:
    """After three steps every rank's slices are the whole's to the bit, the tied head's too."""
    work = tiny_workload(optimizer=optimizer, weight_decay=0.1, max_grad_norm=0.5)
    made = tiny_plan(tiny_model("llama", heads=4, kv_heads=1, tied=True), work, dp=2, pp=2, tp=2)
    last = trained(made, 3)[3]
    groups: dict[tuple[str, int], list[torch.Tensor]] = {}
    for rank, own in enumerate(last):
        where = coordinate(made.topology, rank)
        for p in made.held(where):
            slot = 0 if p.cut is None else where.tp // p.cut.copies
            groups.setdefault((p.tied_to or p.name, slot), []).append(own[p.name])
    assert max(map(len, groups.values())) == 8 // 2
    for copies in groups.values():
        assert all(copy.equal(copies[0]) for copy in copies)


SHARDED: list[dict[str, Any]] = [
    {"dp": 2, "pp": 2, "tp": 2},
    {"dp": 4, "tp": 2, "zero_stage": 2, "shard": 2},
    {"dp": 3, "pp": 2, "zero_stage": 3, "bucket_bytes": 1},
]


@pytest.mark.parametrize("parallel", SHARDED, ids=str)
def test_the_norm_counts_every_element_once(parallel: dict[str, Any]) -> None:
    """Over all ranks the owned squares of gradients of one add up to the number of parameters."""
    made = tiny_plan(
        tiny_model("llama", heads=4, kv_heads=1, tied=True), tiny_workload(global_batch=12), **parallel
    )

    def main(backend: Backend) -> float:
        parameters = Session(made, backend).parameters
        for own in parameters.buckets.values():
            own.kept_gradients.fill_(1.0)
        total = torch.zeros((), dtype=torch.float64)
        parameters.add_square_norm(total)
        return float(total)

    counted = sum(simulate(main, made.topology.world_size))
    assert counted == pytest.approx(made.model.num_parameters, rel=1e-12)


def test_an_optimizer_keeps_two_moments_and_a_count() -> None:
    """AdamW keeps two for each bucket and one count of steps; plain descent keeps nothing."""

    def state(optimizer: str) -> list[tuple[int, ...]]:
        made = tiny_plan(tiny_model("llama"), tiny_workload(optimizer=optimizer))
        (found,) = simulate(lambda b: Session(made, b).parameters.optimizer.tensors(), 1)
        return [tuple(tensor.shape) for tensor in found]

    made = tiny_plan(tiny_model("llama"))
    count, *moments = state("adamw")
    assert count == () and sum(size for (size,) in moments) == 2 * made.model.num_parameters
    assert state("sgd") == []


@pytest.mark.parametrize(("precision", "optimizer"), [("fp64", "sgd"), ("bf16", "adamw")])
def test_a_device_decides_as_the_host_does(precision: str, optimizer: str) -> None:
    """Steps that are clipped, not clipped and skipped, of which the host reads only at the end."""
    work = tiny_workload(
        precision=precision, optimizer=optimizer, max_grad_norm=2.0, max_skipped_steps=1, learning_rate=0.1
    )
    made = tiny_plan(tiny_model("llama"), work, pp=2)
    data = random_samples(67, 8)

    def train(backend: Backend, on_device: bool) -> list[tuple[StepResult, dict[str, torch.Tensor]]]:
        session, found = Session(made, backend, random_weights), []
        session.decides_on_device = on_device
        for step in range(4):
            if step == 2:
                kept = next(iter(session.weights.values())).clone()
                next(iter(session.weights.values())).fill_(torch.nan)
            batches = step_batches(made, data, consumed=8 * step, dp_index=0)
            result = session.step(batches)
            if step == 2:
                next(iter(session.weights.values())).copy_(kept)
            found.append((result, {name: weight.clone() for name, weight in session.weights.items()}))
        return found

    host, device = (
        simulate(lambda backend, on_device=flag: train(backend, on_device), 2)  # type: ignore[misc]
        for flag in (False, True)
    )
    rounding = 1e-6 if precision == "fp64" else 1e-2  # to fused kernels a scale is fp32
    norms = [result.grad_norm for result, _ in host[0]]
    assert min(norms) < work.max_grad_norm < max(norms), norms
    for ours, theirs in zip(device, host, strict=True):
        assert [result.skipped for result, _ in ours] == [False, False, True, False]
        for (result, weights), (wanted, expected) in zip(ours, theirs, strict=True):
            assert result.skipped == wanted.skipped
            if not wanted.skipped:
                assert result.loss == pytest.approx(wanted.loss, rel=rounding)
            for name, weight in weights.items():
                torch.testing.assert_close(weight, expected[name], rtol=rounding, atol=rounding)
