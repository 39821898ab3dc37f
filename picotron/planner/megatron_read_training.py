"""What Megatron-LM's flags train; what costs a little and no plan has is noted."""

from __future__ import annotations

from typing import Any

from picotron.errors import PlanError
from picotron.planner.megatron_flags import Given
from picotron.planner.topology import Topology
from picotron.planner.workload import FORMATS, Workload

NOTED = {  # flag: how it is read
    "rampup-batch-size": "the batch is read at its full size",
    "accumulate-allreduce-grads-in-fp32": "",
    "fp8-param-gather": "parameters are counted as gathered in 16 bits",
    "fp4-param-gather": "parameters are counted as gathered in 16 bits",
    "first-last-layers-bf16": "all layers are counted in the low precision",
    "use-precision-aware-optimizer": "optimizer states are counted in fp32",
    "main-grads-dtype": "gradients are counted in fp32",
    "main-params-dtype": "main weights are counted in fp32",
    "exp-avg-dtype": "moments are counted in fp32",
    "exp-avg-sq-dtype": "moments are counted in fp32",
    "optimizer-cpu-offload": "the optimizer is counted on the device",
    "distribute-saved-activations": "saved activations are counted whole on every tensor-parallel rank",
    "hierarchical-context-parallel-sizes": "context parallelism is counted as one ring",
    "hybrid-context-parallel": "every sequence is counted at its full length",
    "tensor-parallel-num-weight-shards": "weights are counted as tensor parallelism cuts them",
    "microbatch-group-size-per-virtual-pipeline-stage": "microbatches go round in groups of pp",
    "calculate-per-token-loss": "",
}


def note_what_is_not_counted(read: Given, topology: Topology) -> None:
    """Sentences on what runs and costs a little, and no plan has."""
    for flag in ("attention-dropout", "hidden-dropout"):
        if rate := read.number(flag, default=0.1):
            read.note(f"--{flag} {rate:g}: dropout is not counted")
    kind = read.text("moe-token-dispatcher-type", default="allgather")
    if topology.ep > 1 and kind == "allgather":
        read.note("--moe-token-dispatcher-type allgather: tokens are counted as sent all to all")
    read.has("moe-grouped-gemm")
    for flag, how in NOTED.items():
        if read.has(flag) and how:
            read.note(f"--{flag}: {how}")


def read_workload(read: Given, topology: Topology, seq_len: int, micro_batch: int) -> Workload:
    """Batch, formats, optimizer and its rate over time."""
    batch = _global_batch(read, micro_batch * topology.dp)
    rate = read.number("lr", default=0.0)
    least = read.number("min-lr", default=0.0)
    if least > rate > 0:
        raise PlanError(f"--min-lr must be at most --lr, got {least:g} and {rate:g}")
    optimizer = _optimizer(read)
    warmup, decay = _schedule(read, batch)
    precision = _precision(read)
    narrow = read.has("grad-reduce-in-bf16") and FORMATS[precision].compute == 2
    return Workload(
        global_batch=batch,
        seq_len=seq_len,
        precision=precision,
        gradient_dtype="bf16" if narrow else None,
        optimizer=optimizer,
        learning_rate=rate,
        weight_decay=read.number("weight-decay", default=0.01),
        beta1=read.number("adam-beta1", default=0.9),
        beta2=read.number("adam-beta2", default=0.999),
        warmup_steps=warmup,
        decay_steps=decay,
        min_learning_rate_ratio=float(f"{least / rate:.15g}") if rate else 0.0,
        max_grad_norm=read.number("clip-grad", default=1.0),
        seed=read.integer("seed", default=0, least=0),
    )


def _global_batch(read: Given, default: int) -> int:
    """Sequences of a step; of a schedule of batch sizes, the last."""
    if ramp := read.words("step-batch-size-schedule"):
        read.note("--step-batch-size-schedule: the batch is read at its last size")
        last = ramp[-1].rpartition(":")[2]
        default = int(last) if last.isdecimal() else default
    return read.integer("global-batch-size", default=default)


def _optimizer(read: Given) -> Any:
    optimizer = read.text("optimizer", default="adam")
    if optimizer not in ("adam", "sgd"):
        read.note(f"--optimizer {optimizer}: read as AdamW, whose states take as much or more")
    if optimizer == "sgd" and read.number("sgd-momentum", default=0.9):
        read.note("--sgd-momentum: the momentum is left out of the plan")
    return "sgd" if optimizer == "sgd" else "adamw"


def _schedule(read: Given, batch: int) -> tuple[int, int]:
    """Steps of the rise of the learning rate, and the step at which it has fallen; 0 where it stays."""
    for quantity in ("train", "lr-decay", "lr-warmup"):
        read.at_most_one(f"{quantity}-iters", f"{quantity}-samples")
    read.at_most_one("lr-warmup-fraction", "lr-warmup-iters")
    read.at_most_one("lr-warmup-fraction", "lr-warmup-samples")

    def steps(quantity: str, default: int) -> int:
        samples = read.integer(f"{quantity}-samples", default=0, least=0)
        return read.integer(f"{quantity}-iters", default=samples // batch or default, least=0)

    train = steps("train", 0)
    decay = steps("lr-decay", train)
    fraction = read.number("lr-warmup-fraction", default=0.0)
    warmup = steps("lr-warmup", round(fraction * decay))
    style = read.text("lr-decay-style", default="linear")
    if style not in ("constant", "cosine"):
        read.note(f"--lr-decay-style {style}: read as a cosine with the same ends")
    return warmup, 0 if style == "constant" else decay


def _precision(read: Given) -> Any:
    read.at_most_one("bf16", "fp16")
    read.at_most_one("fp8-format", "fp4-format")
    eighths = read.has("fp8-format", "fp8-hybrid", "fp8-e4m3")
    recipe = read.choice("fp8-recipe", ("tensorwise", "delayed", "mxfp8", "blockwise", "custom"), "delayed")
    quarter = read.has("fp4-format")
    read.has("fp4-recipe")
    half = "fp16" if read.has("fp16") else "bf16" if read.has("bf16") else "fp32"
    if not (eighths or quarter):
        return half
    if half != "bf16":
        read.note(f"fp8 and fp4 are counted beside bf16, where these arguments have {half}")
    if quarter:
        return "nvfp4"
    if recipe not in ("tensorwise", "delayed", "mxfp8"):
        read.note(f"--fp8-recipe {recipe}: counted as scaled by tensor")
    return "mxfp8" if recipe == "mxfp8" else "fp8"
