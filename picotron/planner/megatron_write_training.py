"""What is trained and with which kernels, as Megatron-LM's arguments.

Kernels and overlaps are the software profile's, as far as the plan lets them be asked for.
"""

from __future__ import annotations

from collections.abc import Iterator

from picotron.planner.exported import FEWEST_STEPS, Note, Unexpressed
from picotron.planner.megatron_write_layout import Part
from picotron.planner.model import ModelSpec
from picotron.planner.plan import TrainingPlan
from picotron.planner.software import SoftwareProfile
from picotron.planner.workload import Workload

PRECISIONS = {  # precision: flags beside those of the gradients
    "bf16": (("--bf16",),),
    "fp16": (("--fp16",),),
    "fp32": (),
    "fp8": (("--bf16",), ("--fp8-format", "hybrid"), ("--fp8-recipe", "tensorwise")),
    "mxfp8": (("--bf16",), ("--fp8-format", "e4m3"), ("--fp8-recipe", "mxfp8")),
    "nvfp4": (("--bf16",), ("--fp4-format", "e2m1"), ("--fp4-recipe", "nvfp4")),
}
BACKENDS = {"unfused": "unfused", "fused-softmax": "unfused", "cudnn": "fused"}  # others are flash's


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
    if work.precision in PRECISIONS and work.precision != "fp32":
        yield ("--accumulate-allreduce-grads-in-fp32",)


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
    least = max(work.decay_steps, work.warmup_steps + 1, FEWEST_STEPS)
    yield "--train-iters", str(least if steps is None else steps)
    if steps is None:
        yield Note(f"a plan does not say how many steps are trained: --train-iters {least} stands in")
    yield "--lr-decay-style", "cosine" if work.decay_steps else "constant"
    if work.decay_steps:
        yield "--lr-decay-iters", str(work.decay_steps)
    if work.warmup_steps:
        yield "--lr-warmup-iters", str(work.warmup_steps)


def kernels_of(plan: TrainingPlan, profile: SoftwareProfile) -> Iterator[Part]:
    """Kernels and overlaps, as far as the plan lets them be asked for."""
    table = profile.attention
    kernel = table.get(plan.cluster.device.architecture, table["default"])
    yield "--attention-backend", BACKENDS.get(kernel, "flash")
    if profile.reduce_overlap:
        yield ("--overlap-grad-reduce",)
    if profile.reduce_overlap and profile.gather_overlap and plan.zero_stage:
        yield ("--overlap-param-gather",)
    if profile.tensor_overlap and plan.sequence_parallel:
        yield ("--tp-comm-overlap",)
    whole = "full" not in plan.recompute and (plan.topology.pp == 1 or plan.virtual_stages > 1)
    if profile.expert_overlap and plan.topology.ep > 1 and whole:
        yield ("--overlap-moe-expert-parallel-comm",)
    if plan.virtual_stages > 1 and plan.topology.pp > 2 and not profile.pipeline_overlap:
        yield ("--no-overlap-p2p-communication",)
    if profile.graphs:
        yield "--cuda-graph-impl", "transformer_engine"


def data_of(model: ModelSpec) -> Iterator[Part]:
    """What stands in for the data that a plan does not have."""
    yield ("--mock-data",)
    yield "--tokenizer-type", "NullTokenizer"
    yield Note("data and tokenizer are the run's own: --mock-data and NullTokenizer stand in")
    if model.latent_attention and model.family == "deepseek_v3":
        yield Note("multi-token prediction is no part of the plan: add --mtp-num-layers to train it")
