"""What is trained, as Megatron-LM's arguments: batch, formats, optimizer, and what stands in for the data."""

from __future__ import annotations

from collections.abc import Iterator

from picotron.planner.exported import Note, Unexpressed, trained_steps
from picotron.planner.megatron_write_layout import Part
from picotron.planner.model import ModelSpec
from picotron.planner.plan import TrainingPlan
from picotron.planner.workload import Workload

PRECISIONS = {  # precision: flags beside those of the gradients
    "bf16": (("--bf16",),),
    "fp16": (("--fp16",),),
    "fp32": (),
    "fp8": (("--bf16",), ("--fp8-format", "hybrid"), ("--fp8-recipe", "tensorwise")),
    "mxfp8": (("--bf16",), ("--fp8-format", "e4m3"), ("--fp8-recipe", "mxfp8")),
    "nvfp4": (("--bf16",), ("--fp4-format", "e2m1"), ("--fp4-recipe", "nvfp4")),
}


def batch_of(plan: TrainingPlan) -> Iterator[Part]:
    """Sequences of a microbatch and of a step."""
    yield "--micro-batch-size", str(plan.micro_batch)
    yield "--global-batch-size", str(plan.workload.global_batch)
    yield "--seq-length", str(plan.workload.seq_len)


def precision_of(work: Workload) -> Iterator[Part]:
    """Formats of products and of gradients."""
    if work.precision not in PRECISIONS:
        yield Unexpressed(f"precision {work.precision}: it runs fp32")
    yield from PRECISIONS.get(work.precision, ())
    form = work.format
    if form.gradient == 2:
        yield ("--grad-reduce-in-bf16",)
    elif work.precision in PRECISIONS and work.precision != "fp32":
        yield ("--accumulate-allreduce-grads-in-fp32",)
    if form.reduce != form.gradient:
        yield Unexpressed(f"gradients that travel in {work.reduce_dtype}: they travel as they are kept")


def optimizer_of(work: Workload, steps: int | None) -> Iterator[Part]:
    """The optimizer and its rate over time."""
    yield "--optimizer", "adam" if work.optimizer == "adamw" else "sgd"
    if work.optimizer == "sgd":
        yield "--sgd-momentum", "0.0"
    yield "--lr", repr(work.learning_rate)
    yield "--min-lr", repr(work.learning_rate * work.min_learning_rate_ratio)
    yield "--weight-decay", repr(work.weight_decay)
    yield "--adam-beta1", repr(work.beta1)
    yield "--adam-beta2", repr(work.beta2)
    yield "--clip-grad", repr(work.max_grad_norm)
    if work.seed:
        yield "--seed", str(work.seed)
    count = trained_steps(work, steps)
    yield "--train-iters", str(count)
    if steps is None:
        yield Note(f"a plan does not say how many steps are trained: --train-iters {count} stands in")
    yield "--lr-decay-style", "cosine" if work.decay_steps else "constant"
    if work.decay_steps:
        yield "--lr-decay-iters", str(work.decay_steps)
    if work.warmup_steps:
        yield "--lr-warmup-iters", str(work.warmup_steps)


def data_of(model: ModelSpec) -> Iterator[Part]:
    """What stands in for the data that a plan does not have."""
    yield ("--mock-data",)
    yield "--tokenizer-type", "NullTokenizer"
    yield Note("data and tokenizer are the run's own: --mock-data and NullTokenizer stand in")
    if model.latent_attention and model.family == "deepseek_v3":
        yield Note("multi-token prediction is no part of the plan: add --mtp-num-layers to train it")
