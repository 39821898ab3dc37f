"""A plan as the configuration with which torchtitan runs it.

Keys are those of torchtitan v0.2.2 (commit 73a0e697 of 2026-02-20), the current release, which reads TOML
into ``torchtitan/config/job_config.py``; its main branch has since moved to configurations in Python. Facts
that the export rests on, from there:

- ranks run through tensor, context, data and pipeline parallelism, fastest first; parameters are sharded over
  ``data_parallel_shard_degree`` times context parallelism, and copied
  ``data_parallel_replicate_degree`` times;
- FSDP shards parameters, gradients and optimizer together: with resharding after forward that is ZeRO
  stage 3, without it stage 2. Tensor parallelism is always sequence parallelism too;
- models are chosen by flavour, from those in ``torchtitan/models``;
- pipeline schedules are PyTorch's, or orders from a CSV file, which it reads as PyTorch does.

What the configuration cannot say is said in sentences, never left out in silence.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from attrs import frozen

from picotron.errors import PlanError
from picotron.planner.exported import (
    FEWEST_STEPS,
    Note,
    Unexpressed,
    framework_profile,
    other_software,
    same_order,
    stage_slices,
)
from picotron.planner.model import ModelSpec
from picotron.planner.pipeline import schedule_to_csv
from picotron.planner.plan import TrainingPlan
from picotron.planner.software import SoftwareProfile
from picotron.planner.topology import AXES
from picotron.planner.workload import Workload

VERSION = "torchtitan v0.2.2 (73a0e697, 2026-02-20)"
PROFILE = "torchtitan"
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


@frozen(kw_only=True)
class TorchtitanConfig:
    """One run's configuration, by section; ``str`` is the TOML file, its launching line in a comment.

    ``schedule_csv`` stands in the file ``schedule.csv`` beside it, where the schedule is none of PyTorch's.
    """

    title: str
    settings: tuple[Setting, ...]
    launch: str
    schedule_csv: str | None
    unexpressed: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def sections(self) -> dict[str, dict[str, Any]]:
        """The settings as TOML holds them."""
        found: dict[str, dict[str, Any]] = {}
        for section, key, value in self.settings:
            found.setdefault(section, {})[key] = value
        return found

    def __str__(self) -> str:
        lines = [
            f"# {self.title}; configuration of {VERSION}.",
            *(f"# NOT EXPRESSED: {sentence}" for sentence in self.unexpressed),
            *(f"# Note: {sentence}" for sentence in self.notes),
            f"# {self.launch}",
        ]
        for section, values in self.sections.items():
            lines += ["", f"[{section}]", *(f"{key} = {_toml(value)}" for key, value in values.items())]
        return "\n".join(lines) + "\n"


def to_torchtitan(
    plan: TrainingPlan, *, profile: SoftwareProfile | str | None = None, steps: int | None = None
) -> TorchtitanConfig:
    """The configuration with which torchtitan runs ``plan``.

    ``profile`` decides compilation and overlaps: left out, the cluster's own where it is one of torchtitan's,
    else ``torchtitan``. ``steps`` is how many are trained. Raises PlanError for what is no plan, or an
    unknown profile.
    """
    if not isinstance(plan, TrainingPlan):
        raise PlanError(f"plan must be a TrainingPlan, got {type(plan).__name__}; make one with plan(...)")
    software = framework_profile(plan, profile, PROFILE)
    parts: list[Part] = [
        *_model(plan.model, plan.workload.precision),
        *_training(plan, steps),
        *_optimizer(plan.workload),
        *_parallelism(plan),
        *_pipeline(plan),
        *_recompute(plan),
        *_compile(plan, software),
        *other_software(plan, software),
        *_others(plan),
    ]
    cluster = plan.cluster
    return TorchtitanConfig(
        title=f"{plan.model.name} on {cluster.name}",
        settings=tuple(part for part in parts if isinstance(part, tuple)),
        launch=f"torchrun --nnodes {cluster.nodes} --nproc-per-node {cluster.devices_per_node} "
        '--rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:29500" '
        "-m torchtitan.train --job.config_file plan.toml",
        schedule_csv=schedule_to_csv(plan.schedule) if _needs_csv(plan) else None,
        unexpressed=tuple(part.text for part in parts if isinstance(part, Unexpressed)),
        notes=tuple(part.text for part in parts if isinstance(part, Note)),
    )


def _toml(value: Any) -> str:
    """A value as TOML writes it: JSON's strings, lists and truth are its own, and so are finite numbers."""
    return json.dumps(value)


def _model(model: ModelSpec, precision: str) -> Iterator[Part]:
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


def _training(plan: TrainingPlan, steps: int | None) -> Iterator[Part]:
    work, topology = plan.workload, plan.topology
    local = work.global_batch // topology.dp if topology.pp > 1 else plan.micro_batch
    yield "training", "local_batch_size", local
    yield "training", "global_batch_size", work.global_batch
    yield "training", "seq_len", work.seq_len
    yield "training", "max_norm", work.max_grad_norm
    if not work.max_grad_norm:
        yield Unexpressed("no clipping of gradients: a norm of 0 would clip them to nothing, so raise it")
    least = max(work.decay_steps, work.warmup_steps + 1, FEWEST_STEPS)
    yield "training", "steps", least if steps is None else steps
    if steps is None:
        yield Note(f"a plan does not say how many steps are trained: {least} stands in")
    yield "training", "dataset", "c4_test"
    yield Note("data and tokenizer are the run's own: c4_test and its tokenizer stand in")
    wide = {"fp32": "float32", "fp64": "float32"}.get(work.precision, "bfloat16")
    yield "training", "mixed_precision_param", wide
    yield "training", "mixed_precision_reduce", "float32"
    if work.precision in ("fp16", "fp64", "nvfp4"):
        yield Unexpressed(f"precision {work.precision}: it runs {wide}")
    granule = math.lcm(topology.tp, 2 * topology.cp if topology.cp > 1 else 1)
    if work.seq_len % granule:
        yield Unexpressed(f"sequences of {work.seq_len} tokens: it cuts them into {granule} equal parts")


def _optimizer(work: Workload) -> Iterator[Part]:
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


def _parallelism(plan: TrainingPlan) -> Iterator[Part]:
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


def _needs_csv(plan: TrainingPlan) -> bool:
    return plan.topology.pp > 1 and (plan.schedule_csv is not None or plan.schedule_name not in SCHEDULES)


def _pipeline(plan: TrainingPlan) -> Iterator[Part]:
    pp = plan.topology.pp
    yield "parallelism", "pipeline_parallel_degree", pp
    if pp == 1:
        if plan.virtual_stages > 1:
            yield Unexpressed(f"virtual_stages={plan.virtual_stages} on one pipeline rank")
        return
    if plan.model.family.startswith("qwen3"):
        yield Unexpressed("pipelines of qwen3: it has none")
    if _needs_csv(plan):
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


def _recompute(plan: TrainingPlan) -> Iterator[Part]:
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


def _compile(plan: TrainingPlan, profile: SoftwareProfile) -> Iterator[Part]:
    compiled = profile.kernels == "compiled"
    yield "compile", "enable", compiled
    if compiled and profile.tensor_overlap and plan.topology.tp > 1:
        yield "parallelism", "enable_async_tensor_parallel", True


def _others(plan: TrainingPlan) -> Iterator[Part]:
    yield "debug", "seed", plan.workload.seed
    count = sum(plan.offload)
    if count:
        yield Unexpressed(f"activations of {count} layers in host memory: it keeps all on the device")
    yield Unexpressed(f"buckets of {plan.bucket_bytes} bytes: FSDP reduces a layer at a time")
