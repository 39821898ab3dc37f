"""How a plan is cut, as Megatron-LM's arguments: ranks, stages, shards, what is computed again or offloaded.

- ranks run through tensor, context, data and pipeline parallelism, fastest first; ``--use-tp-pp-dp-mapping``
  puts pipeline before data. Experts are cut again, tensor parallelism fastest, from the same ranks;
- stages go round the pipeline ranks; ``--pipeline-model-parallel-layout`` gives each its layers, and without
  it all stages are equal. The schedules are 1F1B and its interleaving, whose microbatches go in groups of pp;
- ``--use-distributed-optimizer`` is ZeRO stage 1; stages 2 and 3 are Megatron-FSDP's sharding strategies;
- full recomputation takes the first layers of every stage, by number; selective, the attention core.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from picotron.planner.exported import Note, Unexpressed, same_order, stage_slices
from picotron.planner.plan import TrainingPlan

# Orders of axes that it can have, slowest first, and the flag that asks for each.
ORDERS = ((("pp", "dp", "cp", "tp"), None), (("dp", "pp", "cp", "tp"), "--use-tp-pp-dp-mapping"))
STRATEGIES = ("no_shard", "optim", "optim_grads", "optim_grads_params")  # of Megatron-FSDP, by ZeRO stage
OFFLOADED = ("attn_norm", "qkv_linear", "core_attn", "attn_proj", "mlp_norm")
OFFLOADED_OF_EXPERTS = ("expert_fc1", "moe_act")
Argument = tuple[str, ...]
Part = Argument | Unexpressed | Note


def ranks_of(plan: TrainingPlan) -> Iterator[Part]:
    """Degrees, and the order of axes."""
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
    yield from _experts(plan)
    found = [flag for order, flag in ORDERS if same_order(topology, order)]
    if not found:
        yield Unexpressed(
            f"ranks in the order {','.join(topology.order)} (slowest first): it has pp,dp,cp,tp "
            "and dp,pp,cp,tp, and runs the first"
        )
    elif found[0]:
        yield (found[0],)


def _experts(plan: TrainingPlan) -> Iterator[Part]:
    topology, experts = plan.topology, plan.model.experts
    if experts is None:
        return
    yield "--expert-model-parallel-size", str(topology.ep)
    yield "--expert-tensor-parallel-size", str(topology.etp)
    if experts.num_experts % topology.ep:
        yield Unexpressed(
            f"Megatron-LM gives each rank as many experts: {experts.num_experts} "
            f"are no multiple of ep={topology.ep}"
        )
    if topology.tp > 1 and not plan.sequence_parallel:
        yield Unexpressed(
            "Megatron-LM trains experts under tensor parallelism with sequence parallelism only"
        )


def stages_of(plan: TrainingPlan) -> Iterator[Part]:
    """Stages, their layers and schedule."""
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


def shards_of(plan: TrainingPlan) -> Iterator[Part]:
    """What data-parallel ranks share rather than copy, and the size of buckets."""
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


def recomputed(plan: TrainingPlan) -> Iterator[Part]:
    """What is computed again in backward."""
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
    else:
        yield from _blocks([modes[own] for own in stage_slices(plan.stage_layers)])


def _blocks(stages: Sequence[Sequence[str]]) -> Iterator[Part]:
    """The first few layers of every stage, as many as the stage with most of them recomputes in full."""
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


def offloaded(plan: TrainingPlan) -> Iterator[Part]:
    """What waits in host memory."""
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
