"""A plan as the arguments with which Megatron-LM runs it; ``megatron_import`` reads them back.

Flags are those of Megatron-LM 0.20.0 (main, commit d98e8a64 of 2026-08-22), from
``megatron/training/arguments.py`` and the classes of configuration of which it makes flags. Facts that the
export rests on, from there:

- ranks run through tensor, context, data and pipeline parallelism, fastest first; ``--use-tp-pp-dp-mapping``
  puts pipeline before data. Experts are cut again, tensor parallelism fastest, from the same ranks;
- stages go round the pipeline ranks; ``--pipeline-model-parallel-layout`` gives each its layers, and without
  it all stages are equal. The schedules are 1F1B and its interleaving, whose microbatches go in groups of pp;
- ``--use-distributed-optimizer`` is ZeRO stage 1; stages 2 and 3 are Megatron-FSDP's sharding strategies;
- full recomputation takes the first layers of every stage, by number; selective, the attention core.

What the arguments cannot say is said in sentences, never left out in silence.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from attrs import frozen

from picotron.errors import PlanError
from picotron.planner.model import Experts, ModelSpec
from picotron.planner.plan import TrainingPlan
from picotron.planner.software import SoftwareProfile, software_profile
from picotron.planner.topology import Topology
from picotron.planner.workload import Workload

VERSION = "Megatron-LM 0.20.0 (d98e8a64, 2026-08-22)"
PROFILE = "megatron-2025"
# Orders of axes that it can have, slowest first, and the flag that asks for each.
ORDERS = ((("pp", "dp", "cp", "tp"), None), (("dp", "pp", "cp", "tp"), "--use-tp-pp-dp-mapping"))
PRECISIONS = {  # precision: flags beside those of the gradients
    "bf16": (("--bf16",),),
    "fp16": (("--fp16",),),
    "fp32": (),
    "fp8": (("--bf16",), ("--fp8-format", "hybrid"), ("--fp8-recipe", "tensorwise")),
    "mxfp8": (("--bf16",), ("--fp8-format", "e4m3"), ("--fp8-recipe", "mxfp8")),
    "nvfp4": (("--bf16",), ("--fp4-format", "e2m1"), ("--fp4-recipe", "nvfp4")),
}
STRATEGIES = ("no_shard", "optim", "optim_grads", "optim_grads_params")  # of Megatron-FSDP, by ZeRO stage
LLAMA3_SCALING = (1.0, 4.0, 8192)  # low and high frequency factor and trained positions: fixed in its code
BACKENDS = {"unfused": "unfused", "fused-softmax": "unfused", "cudnn": "fused"}  # others are flash's
OFFLOADED = ("attn_norm", "qkv_linear", "core_attn", "attn_proj", "mlp_norm")
OFFLOADED_OF_EXPERTS = ("expert_fc1", "moe_act")
FEWEST_STEPS = 100  # where neither the plan nor the caller says how many there are

Argument = tuple[str, ...]


@frozen
class Unexpressed:
    """A sentence on what the arguments cannot say."""

    text: str


@frozen
class Note:
    """A sentence on what the plan does not say and the arguments must."""

    text: str


Part = Argument | Unexpressed | Note


@frozen(kw_only=True)
class MegatronArguments:
    """The arguments of one run, each a flag and its values; ``str`` is a shell script that starts it."""

    title: str
    arguments: tuple[Argument, ...]
    nodes: int
    devices_per_node: int
    environment: tuple[str, ...]
    unexpressed: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def words(self) -> tuple[str, ...]:
        """The arguments as the program receives them."""
        return tuple(word for argument in self.arguments for word in argument)

    def __str__(self) -> str:
        comments = [
            *(f"# NOT EXPRESSED: {sentence}" for sentence in self.unexpressed),
            *(f"# Note: {sentence}" for sentence in self.notes),
        ]
        lines = [" ".join((argument[0], *map(shlex.quote, argument[1:]))) for argument in self.arguments]
        launch = (
            f"torchrun --nproc-per-node {self.devices_per_node} --nnodes {self.nodes} "
            '--node-rank "${NODE_RANK:-0}" --master-addr "${MASTER_ADDR:-localhost}" '
            '--master-port "${MASTER_PORT:-29500}" pretrain_gpt.py'
        )
        return "\n".join(
            [
                "#!/bin/bash",
                f"# {self.title}; arguments of {VERSION}.",
                *comments,
                *(f"export {setting}" for setting in self.environment),
                " \\\n    ".join([launch, *lines]),
                "",
            ]
        )


def to_megatron(
    plan: TrainingPlan, *, profile: SoftwareProfile | str = PROFILE, steps: int | None = None
) -> MegatronArguments:
    """The arguments with which Megatron-LM runs ``plan``.

    ``profile`` decides the flags of kernels and overlaps, which are no part of a plan; ``steps`` is how many
    are trained. Raises PlanError for what is no plan, or an unknown profile.
    """
    if not isinstance(plan, TrainingPlan):
        raise PlanError(f"plan must be a TrainingPlan, got {type(plan).__name__}; make one with plan(...)")
    software = software_profile(profile) if isinstance(profile, str) else profile
    parts = [
        *_parallelism(plan),
        *_pipeline(plan),
        *_batch(plan),
        *_model(plan.model, plan.workload.seq_len, plan.topology.tp),
        *_precision(plan.workload),
        *_sharding(plan),
        *_recompute(plan),
        *_offload(plan),
        *_optimizer(plan.workload, steps),
        *_software(plan, software),
        *_data(plan.model),
    ]
    sharded = plan.zero_stage >= 2
    return MegatronArguments(
        title=f"{plan.model.name} on {plan.cluster.name}",
        arguments=tuple(part for part in parts if isinstance(part, tuple)),
        nodes=plan.cluster.nodes,
        devices_per_node=plan.cluster.devices_per_node,
        environment=() if sharded else ("CUDA_DEVICE_MAX_CONNECTIONS=1",),
        unexpressed=tuple(part.text for part in parts if isinstance(part, Unexpressed)),
        notes=tuple(part.text for part in parts if isinstance(part, Note)),
    )


def same_order(topology: Topology, order: tuple[str, ...]) -> bool:
    """Whether the ranks of ``topology`` sit as they would under ``order``: axes of one rank have no place."""
    moving = [axis for axis in order if getattr(topology, axis) > 1]
    return moving == [axis for axis in topology.order if getattr(topology, axis) > 1]


def _parallelism(plan: TrainingPlan) -> Iterator[Part]:
    topology = plan.topology
    yield "--tensor-model-parallel-size", str(topology.tp)
    if plan.sequence_parallel:
        yield ("--sequence-parallel",)
    if topology.cp > 1:
        yield "--context-parallel-size", str(topology.cp)
        yield "--cp-comm-type", "p2p"
        if plan.workload.seq_len % (2 * topology.cp):
            yield Unexpressed(
                f"Megatron-LM cuts a sequence into 2 * cp = {2 * topology.cp} equal parts, "
                f"which {plan.workload.seq_len} tokens do not make"
            )
    if plan.model.experts:
        yield "--expert-model-parallel-size", str(topology.ep)
        yield "--expert-tensor-parallel-size", str(topology.etp)
        if plan.model.experts.num_experts % topology.ep:
            yield Unexpressed(
                f"Megatron-LM gives each rank as many experts: {plan.model.experts.num_experts} "
                f"are no multiple of ep={topology.ep}"
            )
        if topology.tp > 1 and not plan.sequence_parallel:
            yield Unexpressed(
                "Megatron-LM trains experts under tensor parallelism with sequence parallelism only"
            )
    found = [flag for order, flag in ORDERS if same_order(topology, order)]
    if not found:
        yield Unexpressed(
            f"ranks in the order {','.join(topology.order)} (slowest first): it has pp,dp,cp,tp "
            "and dp,pp,cp,tp, and runs the first"
        )
    elif found[0]:
        yield (found[0],)


def _pipeline(plan: TrainingPlan) -> Iterator[Part]:
    pp, virtual = plan.topology.pp, plan.virtual_stages
    yield "--pipeline-model-parallel-size", str(pp)
    runs = "interleaved" if virtual > 1 else "1f1b"
    if plan.schedule_csv is not None or plan.schedule_name != runs:
        custom = "the custom schedule " if plan.schedule_csv is not None else "schedule "
        yield Unexpressed(
            f"{custom}{plan.schedule_name!r}: Megatron-LM has 1F1B and its interleaving, and runs {runs}"
        )
    if virtual > 1 and pp == 1:
        yield Unexpressed(f"virtual_stages={virtual} on one pipeline rank: it interleaves from two ranks on")
        return
    if virtual > 1 and plan.num_microbatches % pp:
        yield Unexpressed(
            f"{plan.num_microbatches} microbatches: its interleaved schedule takes multiples of pp={pp} only"
        )
    if len(set(plan.stage_layers)) > 1:
        yield "--pipeline-model-parallel-layout", stage_layout(plan.stage_layers)
    elif virtual > 1:
        yield "--num-virtual-stages-per-pipeline-rank", str(virtual)


def stage_layout(stage_layers: tuple[int, ...]) -> str:
    """The layers of each stage as ``--pipeline-model-parallel-layout`` writes them.

    >>> stage_layout((3, 4, 4, 4, 1))
    'Et*3|(t*4|)*3tL'
    """
    first, *middle, last = [f"t*{layers}" if layers > 1 else "t" for layers in stage_layers]
    runs: list[tuple[str, int]] = []
    for stage in middle:
        same = runs and runs[-1][0] == stage
        runs[-1:] = [(stage, runs[-1][1] + 1)] if same else [*runs[-1:], (stage, 1)]
    between = "".join(f"({stage}|)*{count}" if count > 1 else f"{stage}|" for stage, count in runs)
    return f"E{first}|{between}{last}L"


def _batch(plan: TrainingPlan) -> Iterator[Part]:
    yield "--micro-batch-size", str(plan.micro_batch)
    yield "--global-batch-size", str(plan.workload.global_batch)
    yield "--seq-length", str(plan.workload.seq_len)


def _model(model: ModelSpec, seq_len: int, tp: int) -> Iterator[Part]:
    yield "--num-layers", str(model.num_layers)
    yield "--hidden-size", str(model.hidden_size)
    yield "--ffn-hidden-size", str(model.intermediate_size)
    yield "--num-attention-heads", str(model.num_heads)
    yield from _attention(model)
    yield from _positions(model, seq_len)
    yield "--normalization", "RMSNorm" if model.norm == "rms" else "LayerNorm"
    yield "--norm-epsilon", repr(model.norm_eps)
    yield from _activation(model)
    yield from _biases(model)
    yield "--init-method-std", repr(model.init_std)
    yield "--attention-dropout", "0.0"
    yield "--hidden-dropout", "0.0"
    if not model.tied_embeddings:
        yield ("--untie-embeddings-and-output-weights",)
    yield "--vocab-size", str(model.vocab_size)
    yield "--make-vocab-size-divisible-by", "1"
    if model.vocab_size % tp:
        yield Unexpressed(
            f"a vocabulary of {model.vocab_size} cut unevenly over tp={tp}: "
            f"it is padded to {-(-model.vocab_size // tp) * tp}"
        )
    if model.experts:
        yield from _experts(model, model.experts)


def _attention(model: ModelSpec) -> Iterator[Part]:
    latent = model.latent_attention
    if latent is None:
        yield "--kv-channels", str(model.head_dim)
        if model.num_kv_heads != model.num_heads:
            yield ("--group-query-attention",)
            yield "--num-query-groups", str(model.num_kv_heads)
        if model.qk_norm:
            yield ("--qk-layernorm",)
        return
    yield ("--multi-latent-attention",)
    if latent.q_lora_rank is not None:
        yield "--q-lora-rank", str(latent.q_lora_rank)
    yield "--kv-lora-rank", str(latent.kv_lora_rank)
    yield "--qk-head-dim", str(latent.qk_nope_head_dim)
    yield "--qk-pos-emb-head-dim", str(latent.qk_rope_head_dim)
    yield "--v-head-dim", str(latent.v_head_dim)
    yield ("--qk-layernorm",)
    if not latent.interleaved:
        yield Unexpressed("rotary pairs half a head apart under latent attention: it takes adjacent ones")


def _positions(model: ModelSpec, seq_len: int) -> Iterator[Part]:
    yield "--max-position-embeddings", str(max(model.max_positions, seq_len))
    if seq_len > model.max_positions:
        yield Unexpressed(
            f"sequences longer than the model's {model.max_positions} positions: it asks for as many"
        )
    if model.rope_theta is None:
        yield "--position-embedding-type", "learned_absolute"
        return
    scaling = model.rope_scaling
    latent = model.latent_attention is not None
    yarn = scaling is not None and scaling.kind == "yarn"
    yield "--position-embedding-type", "yarn" if yarn and not latent else "rope"
    yield "--rotary-base", str(int(model.rope_theta))
    if model.rope_theta != int(model.rope_theta):
        yield Unexpressed(f"a rotary base of {model.rope_theta:g}: it takes whole numbers")
    if latent:
        yield "--rope-type", "yarn" if yarn else "rope"
    if scaling is not None:
        yield from {"linear": _linear, "llama3": _llama3, "yarn": _yarn}[scaling.kind](model)


def _linear(model: ModelSpec) -> Iterator[Part]:
    assert model.rope_scaling
    factor = model.rope_scaling.factor
    yield "--rotary-seq-len-interpolation-factor", str(max(1, round(factor)))
    if factor != round(factor):
        yield Unexpressed(f"positions divided by {factor:g}: it takes whole numbers")


def _llama3(model: ModelSpec) -> Iterator[Part]:
    scaling = model.rope_scaling
    assert scaling
    yield ("--use-rope-scaling",)
    yield "--rope-scaling-factor", repr(scaling.factor)
    own = (scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_positions)
    if own != LLAMA3_SCALING:
        yield Unexpressed(
            "rotary scaling with frequency factors {:g} and {:g} from {} positions: its code has {:g}, {:g} "
            "and {}".format(*own, *LLAMA3_SCALING)
        )


def _yarn(model: ModelSpec) -> Iterator[Part]:
    scaling = model.rope_scaling
    assert scaling
    yield "--rotary-scaling-factor", repr(scaling.factor)
    # Unless both are given, transformers takes neither: the factor that 1 and 0 lead to.
    both = scaling.mscale and scaling.mscale_all_dim
    yield "--mscale", repr(scaling.mscale if both else 1.0)
    yield "--mscale-all-dim", repr(scaling.mscale_all_dim if both else 0.0)
    told = (scaling.original_max_positions, scaling.beta_fast, scaling.beta_slow, scaling.truncate)
    if model.latent_attention is None:
        yield "--yarn-original-max-position-embeddings", str(told[0])
        yield "--yarn-beta-fast", repr(told[1])
        yield "--yarn-beta-slow", repr(told[2])
        yield (f"--{'' if told[3] else 'no-'}yarn-correction-range-round-to-int",)
    elif told != (4096, 32.0, 1.0, True):
        yield Unexpressed(
            f"YaRN from {told[0]} positions with beta {told[1]:g} and {told[2]:g}: under latent attention "
            "its arguments have 4096, 32 and 1"
        )
    if scaling.attention_factor is not None:
        yield Unexpressed(
            f"YaRN's attention factor of {scaling.attention_factor:g}: it derives it from mscale"
        )


def _activation(model: ModelSpec) -> Iterator[Part]:
    if model.gated_mlp:
        yield ("--swiglu",) if model.activation == "silu" else ("--quick-geglu",)
        if model.activation != "silu":
            yield Unexpressed("a gate through tanh GELU: --quick-geglu approximates it by a sigmoid")
    elif model.activation == "silu":
        yield Unexpressed("SiLU without a gate: it runs GELU")


def _biases(model: ModelSpec) -> Iterator[Part]:
    told = (model.qkv_bias, model.output_bias, model.mlp_bias)
    if told == (True, True, True):
        return
    yield ("--disable-bias-linear",)
    if model.qkv_bias:
        yield ("--add-qkv-bias",)
    if told not in ((False, False, False), (True, False, False)):
        lost = [name for name, there in zip(("output", "MLP"), told[1:], strict=True) if there]
        yield Unexpressed(
            f"biases of the {' and '.join(lost)} projections only: it has all, of queries or none"
        )


def _experts(model: ModelSpec, experts: Experts) -> Iterator[Part]:
    yield "--num-experts", str(experts.num_experts)
    yield "--moe-router-topk", str(experts.top_k)
    yield "--moe-ffn-hidden-size", str(experts.intermediate_size)
    yield ("--moe-grouped-gemm",)
    yield "--moe-token-dispatcher-type", "alltoall"
    if experts.shared_intermediate_size:
        yield "--moe-shared-expert-intermediate-size", str(experts.shared_intermediate_size)
    if experts.dense_layers:
        yield "--moe-layer-freq", _pattern(model.num_layers, experts.dense_layers)
    yield "--moe-router-score-function", experts.score_function
    if experts.score_function == "softmax" and not experts.normalize_scores:
        yield ("--moe-router-pre-softmax",)
    if experts.score_function == "sigmoid":
        yield ("--moe-router-enable-expert-bias",)
        if not experts.normalize_scores:
            yield Unexpressed("sigmoid scores as they are: it divides them by their sum")
    if experts.num_groups > 1:
        yield "--moe-router-num-groups", str(experts.num_groups)
        yield "--moe-router-group-topk", str(experts.top_k_groups)
    if experts.routed_scale != 1:
        yield "--moe-router-topk-scaling-factor", repr(experts.routed_scale)


def _pattern(num_layers: int, dense: tuple[int, ...]) -> str:
    """Which layers have experts, as a Python list: ``([0]*3+[1]*58)``."""
    kinds = [int(layer not in dense) for layer in range(num_layers)]
    runs: list[list[int]] = []
    for kind in kinds:
        if runs and runs[-1][0] == kind:
            runs[-1][1] += 1
        else:
            runs.append([kind, 1])
    return "(" + "+".join(f"[{kind}]*{count}" for kind, count in runs) + ")"


def _precision(work: Workload) -> Iterator[Part]:
    if work.precision not in PRECISIONS:
        yield Unexpressed(f"precision {work.precision}: it runs fp32")
    yield from PRECISIONS.get(work.precision, ())
    if work.precision in PRECISIONS and work.precision != "fp32":
        yield ("--accumulate-allreduce-grads-in-fp32",)


def _sharding(plan: TrainingPlan) -> Iterator[Part]:
    stage, ranks = plan.zero_stage, plan.topology.dp * plan.topology.cp
    if stage:
        yield ("--use-distributed-optimizer",)
    if stage >= 2:
        yield ("--use-megatron-fsdp",)
        yield "--data-parallel-sharding-strategy", STRATEGIES[stage]
        yield "--ckpt-format", "fsdp_dtensor"
        if plan.workload.precision == "fp64":
            yield Unexpressed("fp64 under Megatron-FSDP")
    if stage and plan.shard and plan.shard != ranks:
        yield "--num-distributed-optimizer-instances", str(ranks // plan.shard)
    size, rest = divmod(plan.bucket_bytes, plan.format.gradient)
    yield "--ddp-bucket-size", str(max(1, size))
    if rest or not size:
        yield Unexpressed(f"buckets of {plan.bucket_bytes} bytes: it counts whole gradients")


def stage_slices(stage_layers: tuple[int, ...]) -> Iterator[slice]:
    """The layers of each stage, as slices of what is listed by layer."""
    start = 0
    for layers in stage_layers:
        yield slice(start, start + layers)
        start += layers


def _recompute(plan: TrainingPlan) -> Iterator[Part]:
    modes = plan.recompute
    kinds = set(modes)
    if kinds == {"none"}:
        return
    if "full" not in kinds:
        yield "--recompute-granularity", "selective"
        yield "--recompute-modules", "core_attn"
        if "none" in kinds:
            yield Unexpressed(
                f"selective recomputation in {modes.count('selective')} of {len(modes)} layers: all do it"
            )
        return
    yield "--recompute-granularity", "full"
    if kinds == {"full"}:
        yield "--recompute-method", "uniform"
        yield "--recompute-num-layers", "1"
        return
    stages = [modes[own] for own in stage_slices(plan.stage_layers)]
    most = max(own.count("full") for own in stages)
    yield "--recompute-method", "block"
    yield "--recompute-num-layers", str(most)
    if any(tuple(own) != block_modes(len(own), most) for own in stages):
        yield Unexpressed(
            "recomputation layer by layer: it recomputes the same number of first layers in every stage, "
            f"here {most}, and never mixes full with selective"
        )


def block_modes(layers: int, recomputed: int) -> tuple[str, ...]:
    """What each layer of a stage does where the first ``recomputed`` are recomputed in full."""
    return ("full",) * min(layers, recomputed) + ("none",) * max(0, layers - recomputed)


def _offload(plan: TrainingPlan) -> Iterator[Part]:
    count, layers = sum(plan.offload), len(plan.offload)
    if not count:
        return
    first = tuple(layer < count for layer in range(layers))
    kept = set(plan.recompute) == {"none"}
    if plan.offload == first and count < layers and plan.topology.pp == 1 and kept:
        yield "--cpu-offloading-num-layers", str(count)
        return
    yield ("--fine-grained-activation-offloading",)
    yield "--offload-modules", *OFFLOADED, *(OFFLOADED_OF_EXPERTS if plan.model.experts else ())
    yield "--activation-offload-fraction", repr(count / layers)
    yield Unexpressed(
        f"activations of {count} of {layers} layers offloaded: it offloads the same share of the inputs of "
        "chosen modules instead"
    )


def _optimizer(work: Workload, steps: int | None) -> Iterator[Part]:
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


def _software(plan: TrainingPlan, profile: SoftwareProfile) -> Iterator[Part]:
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


def _data(model: ModelSpec) -> Iterator[Part]:
    yield ("--mock-data",)
    yield "--tokenizer-type", "NullTokenizer"
    yield Note("data and tokenizer are the run's own: --mock-data and NullTokenizer stand in")
    if model.latent_attention and model.family == "deepseek_v3":
        yield Note("multi-token prediction is no part of the plan: add --mtp-num-layers to train it")
