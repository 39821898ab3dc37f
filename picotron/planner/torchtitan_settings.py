"""A plan as the settings of torchtitan's configuration; the facts behind them are in ``torchtitan``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from picotron.planner.exported import (
    Note,
    Unexpressed,
    same_order,
    stage_slices,
    trained_steps,
)
from picotron.planner.model import ModelSpec
from picotron.planner.plan import TrainingPlan
from picotron.planner.software import SoftwareProfile
from picotron.planner.topology import AXES
from picotron.planner.workload import Workload

SCHEDULES = {  # ours, as PyTorch names them
    "1f1b": "1F1B",
    "afab": "GPipe",
    "interleaved": "Interleaved1F1B",
    "bfs": "LoopedBFS",
    "interleaved-zb": "InterleavedZeroBubble",
    "zb-v": "ZBVZeroBubble",
    "dualpipe-v": "DualPipeV",
}
# Sizes of each flavour: (layers, hidden, intermediate, heads, key/value heads, experts, vocabulary).
FLAVORS: Mapping[tuple[str, str], tuple[int, ...]] = {
    ("llama3", "8B"): (32, 4096, 14_336, 32, 8, 0, 128_256),
    ("llama3", "70B"): (80, 8192, 28_672, 64, 8, 0, 128_256),
    ("llama3", "405B"): (126, 16_384, 53_248, 128, 8, 0, 128_256),
    ("qwen3", "0.6B"): (28, 1024, 3072, 16, 8, 0, 151_936),
    ("qwen3", "1.7B"): (28, 2048, 6144, 16, 8, 0, 151_936),
    ("qwen3", "4B"): (36, 2560, 9728, 32, 8, 0, 151_936),
    ("qwen3", "8B"): (36, 4096, 12_288, 32, 8, 0, 151_936),
    ("qwen3", "14B"): (40, 5120, 17_408, 40, 8, 0, 151_936),
    ("qwen3", "32B"): (64, 5120, 25_600, 64, 8, 0, 151_936),
    ("qwen3", "30B-A3B"): (48, 2048, 6144, 32, 4, 128, 151_936),
    ("qwen3", "235B-A22B"): (94, 4096, 12_288, 64, 4, 128, 151_936),
    ("deepseek_v3", "671B"): (61, 7168, 18_432, 128, 128, 256, 129_280),
}
_NAMES = {"llama": "llama3", "qwen3": "qwen3", "qwen3_moe": "qwen3", "deepseek_v3": "deepseek_v3"}
CSV_NAME = "schedule.csv"
Setting = tuple[str, str, Any]  # section, key, value
Part = Setting | Unexpressed | Note


def model_of(model: ModelSpec, precision: str) -> Iterator[Part]:
    """The flavour, and what converts its products."""
    name = _NAMES.get(model.family)
    sizes = (
        model.num_layers,
        model.hidden_size,
        model.intermediate_size,
        model.num_heads,
        model.num_kv_heads,
        model.experts.num_experts if model.experts else 0,
        model.vocab_size,
    )
    flavor = next((flavor for (own, flavor), its in FLAVORS.items() if (own, its) == (name, sizes)), None)
    yield "model", "name", name or "llama3"
    yield "model", "flavor", flavor or model.name
    if name is None:
        yield Unexpressed(f"models of the family {model.family}: it has llama3, qwen3 and deepseek_v3")
    elif flavor is None:
        yield Unexpressed(
            f"the sizes of {model.name}: a flavour of that name must be added to torchtitan/models/{name}, "
            f"with {model.num_layers} layers of width {model.hidden_size}, {model.num_heads} heads "
            f"({model.num_kv_heads} key/value), MLPs of {model.intermediate_size}, a vocabulary of "
            f"{model.vocab_size} and rotary base {model.rope_theta or 0:g}"
        )
    converters = {"fp8": ["quantize.linear.float8"], "mxfp8": ["quantize.linear.mx"]}.get(precision, [])
    if converters:
        yield "model", "converters", converters
        yield f"{converters[0]}", "recipe_name", "tensorwise" if precision == "fp8" else "mxfp8_cublas"
        if model.experts:
            yield Unexpressed(
                "experts' products in fp8: grouped products are converted by a setting of their own"
            )


def training_of(plan: TrainingPlan, steps: int | None) -> Iterator[Part]:
    """Batch, length, steps, data and formats."""
    work, topology = plan.workload, plan.topology
    local = work.global_batch // topology.dp if topology.pp > 1 else plan.micro_batch
    yield "training", "local_batch_size", local
    yield "training", "global_batch_size", work.global_batch
    yield "training", "seq_len", work.seq_len
    yield "training", "max_norm", work.max_grad_norm
    if not work.max_grad_norm:
        yield Unexpressed("no clipping of gradients: a norm of 0 would clip them to nothing, so raise it")
    count = trained_steps(work, steps)
    yield "training", "steps", count
    if steps is None:
        yield Note(f"a plan does not say how many steps are trained: {count} stands in")
    yield "training", "dataset", "c4_test"
    yield Note("data and tokenizer are the run's own: c4_test and its tokenizer stand in")
    wide = {"fp32": "float32", "fp64": "float32"}.get(work.precision, "bfloat16")
    yield "training", "mixed_precision_param", wide
    yield "training", "mixed_precision_reduce", "bfloat16" if work.format.reduce == 2 else "float32"
    if work.format.gradient == 2:
        yield Unexpressed("gradients accumulated in bf16: it accumulates them in fp32")
    if work.precision in ("fp16", "fp64", "nvfp4"):
        yield Unexpressed(f"precision {work.precision}: it runs {wide}")
    granule = math.lcm(topology.tp, 2 * topology.cp if topology.cp > 1 else 1)
    if work.seq_len % granule:
        yield Unexpressed(f"sequences of {work.seq_len} tokens: it cuts them into {granule} equal parts")


def optimizer_of(work: Workload) -> Iterator[Part]:
    """The optimizer and its rate over time."""
    yield "optimizer", "name", "AdamW"
    if work.optimizer != "adamw":
        yield Unexpressed(f"the optimizer {work.optimizer}: it has Adam and AdamW, and runs AdamW")
    yield "optimizer", "lr", work.learning_rate
    yield "optimizer", "beta1", work.beta1
    yield "optimizer", "beta2", work.beta2
    yield "optimizer", "weight_decay", work.weight_decay
    if work.weight_decay:
        yield Unexpressed("weight decay of matrices alone: it decays norms too")
    yield "lr_scheduler", "warmup_steps", work.warmup_steps
    yield "lr_scheduler", "decay_type", "cosine"
    yield "lr_scheduler", "min_lr_factor", work.min_learning_rate_ratio
    if work.decay_steps:
        yield "lr_scheduler", "total_steps", work.decay_steps
    else:
        yield "lr_scheduler", "decay_ratio", 0.0


def ranks_of(plan: TrainingPlan) -> Iterator[Part]:
    """Degrees, and what shares a copy of the parameters."""
    topology = plan.topology
    replicas, shards = _data_parallel(plan)
    yield "parallelism", "data_parallel_replicate_degree", replicas
    yield "parallelism", "data_parallel_shard_degree", shards
    yield from _sharding(plan, shards)
    yield "parallelism", "tensor_parallel_degree", topology.tp
    if topology.tp > 1 and not plan.sequence_parallel:
        yield Unexpressed("tensor parallelism without sequence parallelism: it has both or none")
    yield "parallelism", "context_parallel_degree", topology.cp
    if topology.cp > 1:
        yield "parallelism", "context_parallel_rotate_method", "alltoall"
        yield Unexpressed(
            "keys and values sent round a ring: it has all-to-all, which moves as much, and all-gather"
        )
    if plan.model.experts:
        yield "parallelism", "expert_parallel_degree", topology.ep
        yield "parallelism", "expert_tensor_parallel_degree", topology.etp
        if topology.etp not in (1, topology.tp):
            yield Unexpressed(
                f"etp={topology.etp}: experts are cut by tensor parallelism in 1 or tp={topology.tp}"
            )
    if not same_order(topology, AXES):
        yield Unexpressed(
            f"ranks in the order {','.join(topology.order)} (slowest first): it has {','.join(AXES)} only"
        )


def _data_parallel(plan: TrainingPlan) -> tuple[int, int]:
    """Copies of the parameters, and data-parallel ranks that share one."""
    dp, cp = plan.topology.dp, plan.topology.cp
    if not plan.zero_stage:
        return dp, 1
    shared = max(1, (plan.shard or dp * cp) // cp)
    return dp // shared, shared


def _sharding(plan: TrainingPlan, shards: int) -> Iterator[Part]:
    topology, stage = plan.topology, plan.zero_stage
    others = topology.pp * topology.cp * topology.tp
    if stage:
        yield "parallelism", "fsdp_reshard_after_forward", "always" if stage == 3 else "never"
    if stage == 1:
        yield Unexpressed(
            "optimizer states sharded alone (zero_stage=1): gradients and parameters are sharded too"
        )
    if stage and plan.shard and shards * topology.cp != plan.shard:
        yield Unexpressed(
            f"shard={plan.shard}: context-parallel ranks always share, here {shards * topology.cp} do"
        )
    if not stage and topology.cp > 1:
        yield Unexpressed("copies on context-parallel ranks (zero_stage=0): it shards over them")
    elif not stage and topology.dp > 1 and others > 1:
        yield Unexpressed(
            "copies beside other kinds of parallelism (zero_stage=0): it refuses them; take 2 or 3"
        )


def needs_csv(plan: TrainingPlan) -> bool:
    """Whether PyTorch has no name for the schedule."""
    return plan.topology.pp > 1 and (plan.schedule_csv is not None or plan.schedule_name not in SCHEDULES)


def stages_of(plan: TrainingPlan) -> Iterator[Part]:
    """Schedule and stages."""
    pp = plan.topology.pp
    yield "parallelism", "pipeline_parallel_degree", pp
    if pp == 1:
        if plan.virtual_stages > 1:
            yield Unexpressed(f"virtual_stages={plan.virtual_stages} on one pipeline rank")
        return
    if plan.model.family.startswith("qwen3"):
        yield Unexpressed("pipelines of qwen3: it has none")
    if needs_csv(plan):
        yield "parallelism", "pipeline_parallel_schedule", "PipelineScheduleMulti"
        yield "parallelism", "pipeline_parallel_schedule_csv", CSV_NAME
        yield Note(f"schedule {plan.schedule_name!r} is read from the file {CSV_NAME}")
    else:
        yield "parallelism", "pipeline_parallel_schedule", SCHEDULES[plan.schedule_name]
    yield "parallelism", "pipeline_parallel_microbatch_size", plan.micro_batch
    yield "parallelism", "module_fqns_per_model_part", stage_modules(plan.stage_layers)


def stage_modules(stage_layers: tuple[int, ...]) -> list[list[str]]:
    """The modules of each stage, as ``module_fqns_per_model_part`` lists them.

    >>> stage_modules((1, 2))
    [['tok_embeddings', 'layers.0'], ['layers.1', 'layers.2', 'norm', 'output']]
    """
    stages = [
        [f"layers.{layer}" for layer in range(own.start, own.stop)] for own in stage_slices(stage_layers)
    ]
    stages[0].insert(0, "tok_embeddings")
    stages[-1] += ["norm", "output"]
    return stages


def recomputed(plan: TrainingPlan) -> Iterator[Part]:
    """What is computed again in backward."""
    modes = plan.recompute
    kinds = set(modes)
    section = "activation_checkpoint"
    if len(kinds) == 1:
        mode = modes[0]
        yield section, "mode", mode
        if mode == "selective":
            yield section, "selective_ac_option", "op"
            yield Unexpressed(
                "recomputation of the attention core alone: it keeps attention and every other product, and "
                "recomputes the rest"
            )
        return
    full = tuple(index for index, mode in enumerate(modes) if mode == "full")
    every = math.ceil(len(modes) / max(1, len(full)))
    yield section, "mode", "selective"
    yield section, "selective_ac_option", str(every) if full else "op"
    yield Unexpressed(
        f"recomputation layer by layer: it recomputes one layer in {every}, in full"
        if full
        else "recomputation layer by layer: it recomputes alike in all"
    )


def compiled(plan: TrainingPlan, profile: SoftwareProfile) -> Iterator[Part]:
    """Compilation and what it overlaps."""
    compiled = profile.kernels == "compiled"
    yield "compile", "enable", compiled
    if compiled and profile.tensor_overlap and plan.topology.tp > 1:
        yield "parallelism", "enable_async_tensor_parallel", True


def others_of(plan: TrainingPlan) -> Iterator[Part]:
    """The seed; offloading and buckets, which it has not."""
    yield "debug", "seed", plan.workload.seed
    count = sum(plan.offload)
    if count:
        yield Unexpressed(f"activations of {count} layers in host memory: it keeps all on the device")
    yield Unexpressed(f"buckets of {plan.bucket_bytes} bytes: FSDP reduces a layer at a time")
