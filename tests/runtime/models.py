"""Tiny models, data and runs that the runtime's tests share, and the rule by which gradients are compared."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from attrs import evolve, frozen

from picotron.planner.cluster import ClusterSpec
from picotron.planner.layout import Placement
from picotron.planner.memory import memory_timeline
from picotron.planner.model import ModelSpec
from picotron.planner.plan import TrainingPlan, plan
from picotron.planner.predict import planned_payloads
from picotron.planner.program import execution_order, rows
from picotron.planner.topology import coordinate
from picotron.planner.workload import Workload
from picotron.runtime.backend import Backend
from picotron.runtime.data import step_batches
from picotron.runtime.layout import WeightSource, assemble, slice_of
from picotron.runtime.pipeline import Session, StepResult
from picotron.runtime.simulated import simulate

FAMILIES = ("llama", "qwen2", "qwen3", "gpt2")
TOLERANCE = {"fp32": 1e-5, "fp64": 1e-10, "bf16": 2.0**-5}  # bf16 to bf16; see bf16_excess
BF16_FACTOR, BF16_FLOOR = 3.0, 2.0**-8  # one unit of the last place of bf16

Gradients = Mapping[str, torch.Tensor]
Samples = Sequence[np.ndarray]


def tiny_config(
    family: str,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 6,
    layers: int = 2,
    vocab: int = 67,
    tied: bool = False,
    **more: object,
) -> dict[str, Any]:
    """A Hugging Face configuration of ``family`` that every tensor-parallel degree dividing ``heads`` cuts.

    Weights are drawn wide, so that no gradient is lost in the others' rounding.
    """
    common = {
        "model_type": family,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,
    }
    if family == "gpt2":
        own: dict[str, Any] = {
            "n_embd": heads * head_dim,
            "n_layer": layers,
            "n_head": heads,
            "n_inner": 4 * heads,
            "n_positions": 32,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
        }
        own |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
        return common | own | dict.fromkeys(("bos_token_id", "eos_token_id"), 0) | more
    own = {
        "hidden_size": 24,
        "intermediate_size": 4 * heads,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "rope_theta": 10000.0,
    }
    return common | own | more


def tiny_model(family: str, **config: Any) -> ModelSpec:
    """The model of ``tiny_config``."""
    return ModelSpec.from_hf(tiny_config(family, **config))


def tiny_workload(**changes: Any) -> Workload:
    """Eight sequences of 8 tokens, in fp64, trained by plain gradient descent without clipping."""
    settings: dict[str, Any] = {
        "global_batch": 8,
        "seq_len": 8,
        "precision": "fp64",
        "optimizer": "sgd",
        "learning_rate": 0.01,
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
    }
    return Workload(**settings | changes)


def tiny_plan(model: ModelSpec, work: Workload | None = None, **parallel: Any) -> TrainingPlan:
    """A plan of ``model`` on as many CPU ranks as ``parallel`` needs, its gradients in several buckets."""
    ranks = math.prod(parallel.get(axis, 1) for axis in ("dp", "pp", "cp", "tp"))
    cluster = ClusterSpec.preset("cpu", devices_per_node=ranks)
    return plan(model, cluster, work or tiny_workload(), **{"dp": 1, "bucket_bytes": 10_000, **parallel})


def single_rank(made: TrainingPlan) -> TrainingPlan:
    """The plan of the same training on one rank, a sample at a time."""
    return tiny_plan(made.model, made.workload)


def random_samples(vocab: int, seq_len: int, *, count: int = 41, ragged: bool = False) -> list[np.ndarray]:
    """Samples of random ids, of ``seq_len + 1`` each or (``ragged``) of 2 to that many, three being of 1."""
    draw = np.random.default_rng([vocab, seq_len])
    lengths = draw.integers(2, seq_len + 2, count) if ragged else np.full(count, seq_len + 1)
    if ragged:
        lengths[1:4] = 1
    return [draw.integers(0, vocab, length) for length in lengths]


def random_weights(placement: Placement) -> torch.Tensor:
    """Values that depend on the parameter's name only; no norm is one and no bias zero."""
    digest = hashlib.sha256((placement.tied_to or placement.name).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    drawn = torch.randn(placement.shape, generator=generator, dtype=torch.float64) * 0.2
    return drawn + 1 if placement.init == "ones" else drawn


@frozen(kw_only=True)
class RankReport:
    """What one rank saw in each step; ``gradients`` are its own slices, after clipping."""

    results: tuple[StepResult, ...]
    gradients: tuple[Gradients, ...]


def train_rank(
    backend: Backend,
    made: TrainingPlan,
    data: Samples,
    *,
    steps: int = 5,
    measure_from: int | None = None,
    weights: WeightSource = random_weights,
) -> RankReport:
    """One rank's training, memory measured in every step from ``measure_from`` on."""
    session = Session(made, backend, weights)
    results, gradients = [], []
    for step in range(steps):
        consumed = step * made.workload.global_batch
        batches = step_batches(made, data, consumed=consumed, dp_index=session.where.dp)
        measured = measure_from is not None and step >= measure_from
        results.append(session.step(batches, measure_memory=measured))
        gradients.append({name: gradient.clone() for name, gradient in session.whole_gradients().items()})
    return RankReport(results=tuple(results), gradients=tuple(gradients))


def train(
    made: TrainingPlan, data: Samples, *, seed: int = 0, timeout_seconds: float | None = 60.0, **how: Any
) -> list[RankReport]:
    """Every rank's report of a simulated training."""
    return simulate(
        lambda backend: train_rank(backend, made, data, **how),
        made.topology.world_size,
        seed=seed,
        timeout_seconds=timeout_seconds,
    )


@lru_cache(maxsize=64)
def reference(made: TrainingPlan, *, ragged: bool = False, steps: int = 5) -> RankReport:
    """The training of ``single_rank(made)``; ``made`` is such a plan already."""
    data = random_samples(made.model.vocab_size, made.workload.seq_len, ragged=ragged)
    return train(made, data, steps=steps)[0]


def gradient_errors(gradients: Gradients, expected: Gradients) -> dict[str, float]:
    """For each tensor, its distance to the expected one over what the parity rule divides by."""
    scales = _scales(expected)
    return {name: float((gradients[name] - expected[name]).norm()) / scale for name, scale in scales.items()}


def slice_errors(made: TrainingPlan, rank: int, own: Gradients, expected: Gradients) -> dict[str, float]:
    """The same for one rank's slices of the tensors; a tied copy is held against the one it equals."""
    where, scales = coordinate(made.topology, rank), _scales(expected)
    errors = {}
    for placement in made.held(where):
        source = placement.tied_to or placement.name
        difference = own[placement.name] - slice_of(expected[source], placement, where)
        errors[placement.name] = float(difference.norm()) / scales[source]
    return errors


def _scales(expected: Gradients) -> dict[str, float]:
    """max(norm, norm of all * sqrt(share of all elements)) of each tensor."""
    total_norm = math.sqrt(sum(float(tensor.square().sum()) for tensor in expected.values()))
    total = sum(tensor.numel() for tensor in expected.values())
    return {
        name: max(float(tensor.norm()), total_norm * math.sqrt(tensor.numel() / total))
        for name, tensor in expected.items()
    }


@frozen(kw_only=True)
class Distance:
    """How far a run is from its single-rank reference: largest relative errors over all steps."""

    loss: float
    grad_norm: float
    gradient: float
    worst: str  # the step and the tensor of the largest gradient error

    @property
    def largest(self) -> float:
        """The largest of all."""
        return max(self.loss, self.grad_norm, self.gradient)


def distance(made: TrainingPlan, reports: Sequence[RankReport], wanted: RankReport) -> Distance:
    """The distance of ``reports``, of every rank of ``made``, to the single rank's."""
    errors = {}
    for step, expected in enumerate(wanted.gradients):
        whole = assemble(made, [report.gradients[step] for report in reports])
        assert whole.keys() == expected.keys()
        for name, error in gradient_errors(whole, expected).items():
            errors[f"step {step}: {name}"] = error
        for rank, report in enumerate(reports):
            for name, error in slice_errors(made, rank, report.gradients[step], expected).items():
                errors[f"step {step}, rank {rank}: {name}"] = error
    worst = max(errors, key=lambda name: _not_a_number_last(errors[name]))
    return Distance(
        loss=_largest_difference(reports, wanted, lambda result: result.loss),
        grad_norm=_largest_difference(reports, wanted, lambda result: result.grad_norm),
        gradient=errors[worst],
        worst=worst,
    )


def _not_a_number_last(error: float) -> float:
    return math.inf if math.isnan(error) else error


def _largest_difference(
    reports: Sequence[RankReport], wanted: RankReport, value: Callable[[StepResult], float]
) -> float:
    return max(
        abs(value(result) - value(expected)) / abs(value(expected))
        for report in reports
        for result, expected in zip(report.results, wanted.results, strict=True)
    )


def assert_as_planned(made: TrainingPlan, reports: Sequence[RankReport]) -> None:
    """In each step every rank ran the planned rows in order and handed over the planned payload."""
    payloads = planned_payloads(made)
    for rank, report in enumerate(reports):
        where = coordinate(made.topology, rank)
        order = execution_order(rows(made.program(where.tp), where.pp))
        for result in report.results:
            assert tuple(entry[1] for entry in result.entries) == order
            assert result.payload_bytes == payloads[rank]


def memory_shares(made: TrainingPlan, reports: Sequence[RankReport]) -> list[float]:
    """Measured over planned peak at every entry of every measured step, live bytes having been equal."""
    shares: list[float] = []
    for rank, report in enumerate(reports):
        planned = memory_timeline(made, rank)
        for result in report.results:
            if (measured := result.memory) is None:
                continue
            for column in ("row", "operation", "live_bytes"):
                np.testing.assert_array_equal(getattr(measured, column), getattr(planned, column), column)
            shares += (measured.peak_bytes / planned.peak_bytes).tolist()
    return shares


def bf16_weights(placement: Placement) -> torch.Tensor:
    """``random_weights`` rounded to bf16, so that every precision trains the same ones."""
    return random_weights(placement).to(torch.bfloat16).to(torch.float64)


def wide_gradients(made: TrainingPlan, data: Samples, **how: Any) -> tuple[Gradients, float]:
    """Whole gradients of the first step from ``bf16_weights``, as fp64, and its loss."""
    reports = train(made, data, steps=1, weights=bf16_weights, **how)
    whole = assemble(made, [report.gradients[0] for report in reports])
    return {name: gradient.double() for name, gradient in whole.items()}, reports[0].results[0].loss


def in_precision(made: TrainingPlan, precision: str) -> TrainingPlan:
    """The plan of the same training, computed otherwise; gradients are kept and travel as it has them."""
    changes = {"gradient_dtype": None, "reduce_dtype": None, "precision": precision}
    return evolve(made, workload=evolve(made.workload, **changes))


def bf16_excess(many: Gradients, one: Gradients, exact: Gradients) -> tuple[float, str]:
    """The rule of parity in bf16: by how much ``many`` ranks break it (0: not at all), for which tensor.

    The error of each tensor to ``exact`` (fp64, the same weights), by the scale of the rule for fp64, is at
    most BF16_FACTOR times the largest of any tensor on ``one`` rank in bf16, plus BF16_FLOOR; that of all
    together at most BF16_FACTOR times that on one rank, plus a fourth of BF16_FLOOR.
    """
    found, allowed = gradient_errors(many, exact), gradient_errors(one, exact)
    limit = BF16_FACTOR * max(allowed.values()) + BF16_FLOOR
    beyond = {name: error - limit for name, error in found.items() if not error <= limit}
    together = _error_together(many, exact) - BF16_FACTOR * _error_together(one, exact) - BF16_FLOOR / 4
    if not together <= 0:
        beyond["all together"] = together
    worst = max(beyond, key=lambda name: _not_a_number_last(beyond[name]), default="")
    return beyond.get(worst, 0.0), worst


def _error_together(gradients: Gradients, exact: Gradients) -> float:
    """Distance of all gradients as one vector, over its length."""
    difference = sum(float((gradients[name] - exact[name]).square().sum()) for name in exact)
    return math.sqrt(difference / sum(float(tensor.square().sum()) for tensor in exact.values()))
