"""Small trainings whose rows are timed: what operations cost in place, with all that the runtime adds.

Measured apart, an operation finds its operands in the caches and its memory at hand; in a step it does not.
Each row of a step on one simulated rank is timed by its CPU clock, so forwards, backwards and the optimizer
are told apart.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

import numpy as np
from attrs import evolve, field, frozen

from picotron.planner.body import Body
from picotron.planner.cluster import ClusterSpec
from picotron.planner.cost import of_kind, product_role
from picotron.planner.fit_costs import Observation, Prior, fit_prices
from picotron.planner.layout import local_numel
from picotron.planner.measured import KernelCost, ProductCost
from picotron.planner.model import ModelSpec
from picotron.planner.plan import TrainingPlan, plan
from picotron.planner.program import COMPUTE, Kind, rows
from picotron.planner.topology import Coordinate
from picotron.planner.workload import Workload
from picotron.runtime.backend import Backend
from picotron.runtime.calibrated_works import Progress
from picotron.runtime.data import HostBatch, step_batches
from picotron.runtime.pipeline import Session
from picotron.runtime.simulated import simulate

_LEAST_STEPS = 1
_LEAST_SECONDS = 1e-9


@frozen
class Training:
    """A model and what it is trained on."""

    layers: int
    hidden: int
    heads: int
    intermediate: int
    seq_len: int
    micro_batch: int
    num_microbatches: int = 1
    vocab: int = 256

    def __str__(self) -> str:
        return f"step of {self.layers} layers of {self.hidden}, {self.micro_batch}x{self.seq_len} tokens"


TRAININGS = (
    Training(2, 8, 2, 8, 4, 1, 2, 16),
    Training(6, 8, 2, 8, 4, 1, 1, 16),
    Training(2, 64, 2, 172, 64, 1),
    Training(2, 128, 4, 344, 64, 1),
    Training(1, 128, 4, 344, 256, 1),
    Training(1, 128, 2, 344, 64, 8),
    Training(1, 256, 4, 688, 128, 1),
    Training(1, 256, 8, 688, 32, 2),
    Training(1, 256, 4, 688, 256, 2),
    Training(1, 512, 8, 1376, 64, 1),
)


@frozen(kw_only=True)
class Apart:
    """What was measured apart, which in-place timings correct."""

    products: Mapping[str, ProductCost]  # by role
    attention: ProductCost
    attention_backward: ProductCost
    kernel: KernelCost
    kernel_seconds: float


@frozen(kw_only=True)
class InPlace:
    """Corrections of what was measured apart, and what only a step can tell."""

    product_scale: float
    operand_seconds: float  # a byte
    attention_scale: float
    kernel_scale: float
    kernel_seconds: float
    segment_seconds: float
    update_element_seconds: float
    update_tensor_seconds: float
    step_seconds: float


# Prices of causes, apart or as assumed where only a step tells, and how far they may be off.
_PRIORS = {
    "product": Prior(1.0, 0.1),
    "attention": Prior(1.0, 0.1),
    "byte": Prior(1.5, 0.3),
    "operand": Prior(3e-11, 0.5),
    "segment": Prior(20e-6, 0.5),
}
_UPDATE_PRIORS = {"tensor": Prior(20e-6, 1.0)}


@frozen
class StepTimings:
    """Median seconds of one training's rows by kind, and of the rest of its step."""

    plan: TrainingPlan = field(repr=False)
    by_kind: Mapping[Kind, float]
    rest_seconds: float


def step_timings(precision: str, seconds: float, progress: Progress | None = None) -> list[StepTimings]:
    """Timings of each of TRAININGS, which take turns for ``seconds``, at least one step each."""
    plans = [training_plan(training, precision) for training in TRAININGS]

    def rank_main(backend: Backend) -> list[StepTimings]:
        steps: list[Callable[[], Any]] = []
        for training, made in zip(TRAININGS, plans, strict=True):
            if progress is not None:
                progress(str(training))
            steps.append(partial(Session(made, backend).step, same_batches(made)))
        for step in steps:
            step()
        taken: list[list[Any]] = [[] for _ in steps]
        end = time.perf_counter() + seconds
        while len(taken[0]) < _LEAST_STEPS or time.perf_counter() < end:
            for step, results in zip(steps, taken, strict=True):
                results.append(step())
        return [_medians(made, results) for made, results in zip(plans, taken, strict=True)]

    return simulate(rank_main, 1, clock="cpu")[0]


def same_batches(made: TrainingPlan) -> tuple[HostBatch, ...]:
    """A step's batches, of one sample that is repeated."""
    tokens = 7 * np.arange(made.workload.seq_len + 1, dtype=np.int64) % made.model.vocab_size
    return step_batches(made, [tokens], consumed=0, dp_index=0)


def training_plan(
    training: Training, precision: str, cluster: ClusterSpec | None = None, **parallel: int
) -> TrainingPlan:
    """The plan of ``training``, on one rank unless ``parallel`` says otherwise."""
    model = ModelSpec.from_hf(
        {
            "model_type": "llama",
            "vocab_size": training.vocab,
            "hidden_size": training.hidden,
            "intermediate_size": training.intermediate,
            "num_hidden_layers": training.layers,
            "num_attention_heads": training.heads,
            "num_key_value_heads": training.heads,
            "max_position_embeddings": training.seq_len,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
        }
    )
    size = training.micro_batch * training.num_microbatches
    work = Workload(global_batch=size, seq_len=training.seq_len, precision=precision)  # type: ignore[arg-type]
    own = evolve(cluster or ClusterSpec.preset("cpu"), devices_per_node=math.prod(parallel.values()))
    asked: dict[str, Any] = {"micro_batch": training.micro_batch, **parallel}
    return plan(model, own, work, **asked)


def _medians(made: TrainingPlan, results: list[Any]) -> StepTimings:
    own = rows(made.program(), 0)
    spans: dict[Kind, list[float]] = defaultdict(list)
    rest: list[float] = []
    for result in results:
        computed = 0.0
        for _, row, _, _, start, end in result.entries:
            if own[row].kind in COMPUTE:
                spans[own[row].kind].append(end - start)
                computed += end - start
        rest.append(result.cpu_seconds - computed)
    by_kind = {kind: max(median(taken), _LEAST_SECONDS) for kind, taken in spans.items()}
    return StepTimings(made, by_kind, max(median(rest), _LEAST_SECONDS))


def fit_in_place(timings: list[StepTimings], apart: Apart) -> InPlace:
    """The corrections that make the prices of bodies and of updates agree with the timings."""
    bodies = [
        Observation(_amounts(of_kind(timing.plan.bodies(0), kind), apart), seconds)
        for timing in timings
        for kind, seconds in timing.by_kind.items()
    ]
    prices = fit_prices(bodies, _PRIORS | {"kernel": Prior(max(apart.kernel_seconds, 1e-7), 0.5)})
    update = fit_prices([_update(timing) for timing in timings], _UPDATE_PRIORS)
    return InPlace(
        product_scale=prices["product"],
        operand_seconds=prices["operand"],
        attention_scale=prices["attention"],
        kernel_scale=prices["byte"],
        kernel_seconds=prices["kernel"],
        segment_seconds=prices["segment"],
        update_element_seconds=update["element"],
        update_tensor_seconds=update["tensor"],
        step_seconds=update["step"],
    )


def _amounts(body: Body, apart: Apart) -> dict[str, float]:
    """Seconds of a body by cause as measured apart; of kernels and segments their number."""
    found: dict[str, float] = defaultdict(float)
    for segment in body.segments:
        found["segment"] += 1
        for operation in segment.operations:
            found["kernel"] += operation.kernels
            if operation.kind == "matmul":
                cost = apart.products[product_role(operation)]
                found["product"] += cost.seconds(operation.flops, operation.shape)
                found["operand"] += operation.moved_bytes
            elif operation.kind == "attention":
                cost = apart.attention if body.phase == "F" else apart.attention_backward
                found["attention"] += cost.seconds(operation.flops, operation.shape)
            else:
                found["byte"] += apart.kernel.seconds(operation.moved_bytes)
    return dict(found)


def _update(timing: StepTimings) -> Observation:
    made, where = timing.plan, Coordinate()
    held = made.stage_held(0, where)
    elements = sum(local_numel(parameter, where) for parameter in held)
    amounts = {"element": float(elements), "tensor": float(len(held)), "step": 1.0}
    return Observation(amounts, timing.rest_seconds)
