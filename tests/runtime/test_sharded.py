"""Shared state of data-parallel ranks: against torch's own optimizer and FSDP2, and what stands in memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

from picotron.runtime.backend import Backend
from picotron.runtime.data import step_batches
from picotron.runtime.layout import slice_of
from picotron.runtime.memory import MemoryTracker
from picotron.runtime.pipeline import Session
from picotron.runtime.ranks import simulate_ranks
from picotron.runtime.simulated import simulate
from picotron.runtime.weights import save_weights, saved_weights
from tests.runtime.models import (
    gradient_errors,
    random_samples,
    random_weights,
    tiny_config,
    tiny_model,
    tiny_plan,
    tiny_workload,
)

WORK = {"optimizer": "adamw", "learning_rate": 1e-2, "weight_decay": 0.1, "max_grad_norm": 0.5}


def stepped(backend: Backend, made: Any, steps: int = 3) -> tuple[Session, list[dict[str, torch.Tensor]]]:
    """A session after some steps, and the gradients that each update saw."""
    session, seen = Session(made, backend, random_weights), []
    data = random_samples(made.model.vocab_size, made.workload.seq_len)
    for step in range(steps):
        consumed = step * made.workload.global_batch
        session.step(step_batches(made, data, consumed=consumed, dp_index=session.where.dp))
        seen.append({name: gradient.clone() for name, gradient in session.whole_gradients().items()})
    return session, seen


@pytest.mark.parametrize(
    "parallel",
    [
        {"dp": 1},
        {"dp": 2, "zero_stage": 1},
        {"dp": 4, "zero_stage": 2, "shard": 2, "bucket_bytes": 1},
        {"dp": 3, "tp": 2, "zero_stage": 3},
    ],
    ids=str,
)
def test_parts_move_as_torchs_adamw_moves_whole_tensors(parallel: dict[str, Any]) -> None:
    """Weights, and every part's slices of both moments, after three steps with decay and clipping."""
    made = tiny_plan(tiny_model("qwen2", tied=True), tiny_workload(**WORK, global_batch=12), **parallel)

    def main(backend: Backend) -> None:
        session, seen = stepped(backend, made)
        first = {p.name: slice_of(random_weights(p), p, session.where) for p in session.placements}
        decayed = [weight for weight in first.values() if weight.dim() > 1]
        rest = [weight for weight in first.values() if weight.dim() <= 1]
        groups = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
        theirs = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
        for gradients in seen:
            for name, weight in first.items():
                weight.grad = gradients[name]
            theirs.step()
        ours = session.whole_weights()
        for name, weight in first.items():
            torch.testing.assert_close(ours[name], weight, rtol=1e-12, atol=1e-14)
            for what, ((begin, end), part) in session.parameters.state(name).items():
                wanted = theirs.state[weight][what].reshape(-1)[begin:end]
                torch.testing.assert_close(part, wanted, rtol=1e-12, atol=1e-14)

    simulate(main, made.topology.world_size)


def test_zero_3_trains_as_torchs_fully_shard() -> None:
    """Transformers' Llama under FSDP2 over two ranks: gradients, and weights after two AdamW steps.

    It takes at once what are two microbatches here.
    """
    transformers = pytest.importorskip("transformers")
    made = tiny_plan(
        tiny_model("llama"),
        tiny_workload(optimizer="adamw", learning_rate=1e-2, global_batch=4),
        dp=2,
        zero_stage=3,
    )
    data = random_samples(made.model.vocab_size, made.workload.seq_len)

    def theirs() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        config = transformers.AutoConfig.for_model(**tiny_config("llama"))
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        model = model.to(torch.float64)
        with torch.no_grad():
            for placement in made.layout:
                model.get_parameter(placement.name).copy_(random_weights(placement))
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
        for step in range(2):
            consumed = step * made.workload.global_batch
            rank = torch.distributed.get_rank()
            batches = [*step_batches(made, data, consumed=consumed, dp_index=rank)]
            ids, targets = (
                torch.cat([torch.from_numpy(getattr(batch, name)) for batch in batches])
                for name in ("ids", "targets")
            )
            optimizer.zero_grad()
            logits = model(ids).logits
            cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
            optimizer.step()
        gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
        return gradients, {name: p.full_tensor().detach() for name, p in model.named_parameters()}

    wanted_gradients, wanted = simulate_ranks(theirs, 2, api="torch.distributed")[0]

    def ours(backend: Backend) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        session, seen = stepped(backend, made, steps=2)
        return seen[-1], {name: weight.clone() for name, weight in session.whole_weights().items()}

    for gradients, weights in simulate(ours, 2):
        assert max(gradient_errors(gradients, wanted_gradients).values()) < 1e-6  # their rotary table is fp32
        assert max(gradient_errors(weights, wanted).values()) < 1e-6


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_zero_3_saves_a_unit_at_a_time(tied: bool, tmp_path: Path) -> None:
    """Embedding, each layer and head are files of their own; no rank holds more than one beside its part."""
    model = tiny_model("llama", layers=4, tied=tied)
    made = tiny_plan(model, dp=2, pp=2, tp=2, zero_stage=3)

    def main(backend: Backend) -> int:
        session = Session(made, backend, random_weights)
        with MemoryTracker(session.parameters.elastic()) as tracker:
            save_weights(session, tmp_path / "saved")
        return tracker.peak_bytes

    peaks = simulate(main, made.topology.world_size)
    by_layer: dict[int | None, int] = {}
    for own in made.stage_segments[0]:
        by_layer[own.layer] = by_layer.get(own.layer, 0) + sum(math.prod(p.shape) for p in own.parameters)
    assert max(peaks) < 3 * 8 * max(by_layer.values())  # gathered, the others' slices, and whole
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) == 6
    single = tiny_plan(model)
    (found,) = simulate(lambda b: Session(single, b, saved_weights(tmp_path / "saved")).weights, 1)
    assert all(found[p.name].equal(random_weights(p)) for p in single.layout)


def test_parameters_of_others_have_no_memory_between_steps() -> None:
    """Under ZeRO-3 what is gathered is gone after the step; only vectors are there to be looked at."""
    made = tiny_plan(tiny_model("gpt2"), tiny_workload(global_batch=2), dp=2, zero_stage=3)

    def main(backend: Backend) -> None:
        session, _ = stepped(backend, made, steps=1)
        assert {own.untyped_storage().nbytes() for own in session.parameters.elastic()} == {0}
        vectors = {p.name for p in made.layout if len(p.shape) == 1}
        assert session.weights.keys() == session.gradients.keys() == vectors

    simulate(main, 2)
