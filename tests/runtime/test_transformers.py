"""One rank computes what transformers computes: logits, loss, gradients, and weights in both directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from picotron.planner.context import CONTEXTS
from picotron.planner.model import ModelSpec
from picotron.planner.plan import TrainingPlan
from picotron.runtime.backend import Backend
from picotron.runtime.data import DeviceTokens, HostBatch, step_batches
from picotron.runtime.layout import WeightSource, assemble, given_weights
from picotron.runtime.pipeline import Session
from picotron.runtime.segments import Head
from picotron.runtime.simulated import simulate
from picotron.runtime.weights import save_weights, saved_weights
from tests.runtime.models import (
    FAMILIES,
    Gradients,
    gradient_errors,
    random_samples,
    random_weights,
    tiny_config,
    tiny_plan,
    tiny_workload,
)

transformers = pytest.importorskip("transformers")

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "llama tied": {"family": "llama", "tied": True},
    "llama with biases": {"family": "llama", "attention_bias": True, "mlp_bias": True},
    "llama, head_dim is not hidden / heads": {"family": "llama", "head_dim": 10, "kv_heads": 1},
    "llama3 rope": {"family": "llama", "rope_scaling": LLAMA3},
    "linear rope": {"family": "llama", "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "qwen2": {"family": "qwen2", "use_sliding_window": False},
    "qwen2 tied": {"family": "qwen2", "tied": True},
    "qwen3": {"family": "qwen3", "head_dim": 16},
    "qwen3 with biases": {"family": "qwen3", "attention_bias": True, "tied": True},
    "gpt2": {"family": "gpt2", "tied": True},
    "gpt2 untied": {"family": "gpt2", "kv_heads": 4},
}
SEQ_LEN, SEQUENCES = 24, 4


def causal_lm(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """Transformers' model with random weights, none of its biases zero."""
    made = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config), attn_implementation="eager"
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.copy_(noise + (1.0 if parameter.dim() == 1 else 0.0))
    return made.to(dtype).eval()


def one_rank(
    model: ModelSpec, weights: WeightSource, precision: str
) -> tuple[torch.Tensor, float, Gradients, list[HostBatch]]:
    """Picotron's logits of every sequence, the step's loss and gradients, and the batches it saw."""
    work = tiny_workload(global_batch=SEQUENCES, seq_len=SEQ_LEN, precision=precision)
    made = tiny_plan(model, work, micro_batch=2)
    data = random_samples(model.vocab_size, SEQ_LEN, ragged=True)
    batches = list(step_batches(made, data, consumed=0, dp_index=0))

    def main(backend: Backend) -> tuple[torch.Tensor, float, Gradients]:
        session = Session(made, backend, weights)
        logits = torch.cat([logits_of(session, batch) for batch in batches])
        result = session.step(batches)
        return logits, result.loss, session.gradients

    return *simulate(main, 1)[0], batches


def by_ranks(made: TrainingPlan, weights: WeightSource) -> tuple[float, Gradients]:
    """The loss and gradients of a step of many ranks."""
    data = random_samples(made.model.vocab_size, SEQ_LEN, ragged=True)

    def main(backend: Backend) -> tuple[float, Gradients]:
        session = Session(made, backend, weights)
        result = session.step(step_batches(made, data, consumed=0, dp_index=session.where.dp))
        return result.loss, session.gradients

    reports = simulate(main, made.topology.world_size)
    return reports[0][0], assemble(made, [gradients for _, gradients in reports])


def logits_of(session: Session, batch: HostBatch) -> torch.Tensor:
    """[sequences, s, vocabulary] of a single-rank session."""
    *body, head = session.runners
    tokens, x = DeviceTokens(batch, session.backend.device), torch.empty(0, dtype=session.parameters.dtype)
    with torch.no_grad():
        for runner in body:
            x, _ = runner.forward(x, tokens)
        assert isinstance(head, Head)
        return head.logits(x, {}).view(*batch.ids.shape, -1)


def theirs(model: Any, batches: list[HostBatch]) -> tuple[torch.Tensor, float, Gradients]:
    """Transformers' logits, and the loss and gradients of the mean over all labelled tokens."""
    ids = torch.from_numpy(np.concatenate([batch.ids for batch in batches]))
    labels = torch.from_numpy(np.concatenate([batch.targets for batch in batches]))
    logits = model(ids).logits
    loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), float(loss.detach()), found


def assert_equal(config: dict[str, Any], precision: str, tolerance: float) -> None:
    dtype = {"fp32": torch.float32, "fp64": torch.float64}[precision]
    model = causal_lm(config, dtype)
    weights = given_weights({name: tensor.detach() for name, tensor in model.state_dict().items()})
    logits, loss, gradients, batches = one_rank(ModelSpec.from_hf(config), weights, precision)
    expected_logits, expected_loss, expected = theirs(model, batches)
    assert (logits - expected_logits).norm() <= tolerance * expected_logits.norm()
    assert loss == pytest.approx(expected_loss, rel=tolerance)
    assert gradients.keys() == expected.keys()
    errors = gradient_errors(gradients, expected)
    assert max(errors.values()) <= tolerance, errors


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_is_transformers(variant: str) -> None:
    """Logits, loss and every gradient, within 1e-5 in fp32; some samples are short."""
    assert_equal(tiny_config(**VARIANTS[variant]), "fp32", 1e-5)


@pytest.mark.parametrize("variant", ["llama tied", "llama3 rope", "qwen3", "gpt2"])
def test_a_model_in_bf16_is_as_near_as_transformers(variant: str) -> None:
    """To transformers in fp32 from the same weights: no further than transformers in bf16, or half more."""
    config = tiny_config(**VARIANTS[variant])
    wide, narrow = causal_lm(config, torch.float32), causal_lm(config, torch.bfloat16)
    wide.load_state_dict(narrow.state_dict())
    weights = given_weights({name: tensor.detach() for name, tensor in wide.state_dict().items()})
    logits, loss, gradients, batches = one_rank(ModelSpec.from_hf(config), weights, "bf16")
    exact_logits, exact_loss, exact = theirs(wide, batches)
    their_logits, their_loss, their_gradients = theirs(narrow, batches)
    assert logits.dtype == torch.bfloat16 and {g.dtype for g in gradients.values()} == {torch.float32}
    assert (logits - exact_logits).norm() <= 1.5 * (their_logits - exact_logits).norm()
    assert abs(loss - exact_loss) <= 1.5 * abs(their_loss - exact_loss) + 2e-3 * exact_loss
    found, allowed = gradient_errors(gradients, exact), gradient_errors(their_gradients, exact)
    assert max(found.values()) <= 1.5 * max(allowed.values())


@pytest.mark.parametrize("context", CONTEXTS)
def test_a_cut_sequence_is_transformers(context: str) -> None:
    """Loss and every gradient of two ranks that share sequences, within 1e-5 in fp32."""
    config = tiny_config("llama")
    model = causal_lm(config)
    weights = given_weights({name: tensor.detach() for name, tensor in model.state_dict().items()})
    spec = ModelSpec.from_hf(config)
    work = tiny_workload(global_batch=SEQUENCES, seq_len=SEQ_LEN, precision="fp32")
    made = tiny_plan(spec, work, cp=2, micro_batch=2, context=context)
    loss, gradients = by_ranks(made, weights)
    _, expected_loss, expected = theirs(model, one_rank(spec, weights, "fp32")[-1])
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert max(gradient_errors(gradients, expected).values()) <= 1e-5


def test_gpt2_is_transformers_to_the_last_digits() -> None:
    """Within 1e-10 in fp64 (the other families' norms and rotations are fp32 in transformers)."""
    assert_equal(tiny_config("gpt2", tied=True), "fp64", 1e-10)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shards", ["1GB", "10KB"], ids=["one file", "sharded"])
def test_a_folder_saved_by_transformers_is_read(family: str, shards: str, tmp_path: Path) -> None:
    """The configuration and weights of ``save_pretrained`` give its logits, tied tables being saved once."""
    model = causal_lm(tiny_config(family, tied=family != "llama"))
    model.save_pretrained(tmp_path, max_shard_size=shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) is (shards == "10KB")
    logits, loss, _, batches = one_rank(ModelSpec.from_hf(tmp_path), saved_weights(tmp_path), "fp32")
    expected, expected_loss, _ = theirs(model, batches)
    assert (logits - expected).norm() <= 1e-5 * expected.norm()
    assert loss == pytest.approx(expected_loss, rel=1e-5)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_a_folder_saved_by_many_ranks(family: str, tied: bool, tmp_path: Path) -> None:
    """Trained a step on eight ranks and saved; transformers' logits are one rank's from the same folder."""
    more = {"rope_scaling": LLAMA3, "mlp_bias": True} if family == "llama" else {}
    model = ModelSpec.from_hf(tiny_config(family, tied=tied, **more))
    work = tiny_workload(seq_len=SEQ_LEN, precision="fp32")
    made = tiny_plan(model, work, dp=2, pp=2, tp=2)
    data = random_samples(model.vocab_size, SEQ_LEN)

    def main(backend: Backend) -> None:
        session = Session(made, backend, random_weights)
        session.step(step_batches(made, data, consumed=0, dp_index=session.where.dp))
        save_weights(session, tmp_path / "model")

    simulate(main, 8)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", attn_implementation="eager", local_files_only=True, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    logits, loss, _, batches = one_rank(
        ModelSpec.from_hf(tmp_path / "model"), saved_weights(tmp_path / "model"), "fp32"
    )
    expected, expected_loss, _ = theirs(loaded.eval(), batches)
    assert (logits - expected).norm() <= 1e-5 * expected.norm()
    assert loss == pytest.approx(expected_loss, rel=1e-5)
