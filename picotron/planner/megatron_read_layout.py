"""How Megatron-LM's flags cut a run: ranks, stages, shards, what is computed again or offloaded.

The rules by which one flag refuses another are Megatron-LM's; ``megatron_write_layout`` has the facts behind.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from picotron.errors import PlanError
from picotron.planner.cluster import ClusterSpec
from picotron.planner.megatron_flags import Given
from picotron.planner.megatron_write_layout import ORDERS, STRATEGIES, block_modes
from picotron.planner.model import ModelSpec
from picotron.planner.topology import Topology
from picotron.planner.validators import shown
from picotron.planner.workload import Workload

GRADIENTS_OF_A_BUCKET = (40_000_000, 1_000_000)  # at least, and for each data-parallel rank
SHAPES = (  # three ways to cut a rank's layers into stages, each alone
    "num-layers-per-virtual-pipeline-stage",
    "num-virtual-stages-per-pipeline-rank",
    "pipeline-model-parallel-layout",
)
LONGEST_LAYOUT = 100_000  # characters, repetitions written out


def read_topology(read: Given, cluster: ClusterSpec) -> Topology:
    """Degrees and the order of axes; data parallelism takes the devices that the rest leaves."""
    for old in ("model-parallel-size", "batch-size", "warmup"):
        if read.has(old):
            raise PlanError(f"--{old} must be replaced: Megatron-LM no longer has it")
    tp = read.integer("tensor-model-parallel-size", default=1)
    pp = read.integer("pipeline-model-parallel-size", default=1)
    cp = read.integer("context-parallel-size", default=1)
    ep = read.integer("expert-model-parallel-size", default=1)
    experts = read.integer("num-experts", default=0, least=0)
    etp = read.integer("expert-tensor-parallel-size", default=tp if experts else 1)
    world, rest = cluster.num_devices, tp * pp * cp
    if world % rest:
        raise PlanError(
            f"tensor, pipeline and context parallel sizes must divide the cluster's {world} devices, "
            f"got {tp} * {pp} * {cp} = {rest}; give the cluster's shape, as in h100:16x8"
        )
    order = next(order for order, flag in ORDERS if (flag is not None) == read.has("use-tp-pp-dp-mapping"))
    return Topology(
        tp=tp, pp=pp, cp=cp, dp=world // rest, ep=ep if experts else 1, etp=etp if experts else 1, order=order
    )


def read_sequence_parallel(read: Given, topology: Topology) -> bool:
    """Whether tokens are cut between tensor-parallel regions: it needs several ranks for that."""
    on = read.has("sequence-parallel") and topology.tp > 1
    if read.has("tp-comm-overlap") and not on:
        raise PlanError(
            "--tp-comm-overlap must come with --sequence-parallel and a tensor-parallel size above 1"
        )
    return on


def check_contexts(read: Given, topology: Topology, seq_len: int) -> None:
    """Raise PlanError unless context parallelism can cut the sequence; note another exchange than a ring."""
    kinds = set(read.words("cp-comm-type")) - {"p2p"}
    if topology.cp > 1 and seq_len % (2 * topology.cp):
        raise PlanError(
            f"--seq-length must be a multiple of 2 * --context-parallel-size = {2 * topology.cp}, "
            f"got {seq_len}"
        )
    if topology.cp > 1 and kinds:
        read.note(
            f"--cp-comm-type {' '.join(sorted(kinds))}: keys and values are counted as sent round a ring"
        )


def read_stages(read: Given, model: ModelSpec, topology: Topology) -> tuple[int, tuple[int, ...]]:
    """Stages of each rank, and layers of each stage."""
    for one, other in combinations(SHAPES, 2):
        read.at_most_one(one, other)
    first = read.integer("decoder-first-pipeline-num-layers", default=0)
    last = read.integer("decoder-last-pipeline-num-layers", default=0)
    ends = read.has("account-for-embedding-in-pipeline-split"), read.has("account-for-loss-in-pipeline-split")
    layout = read.text("pipeline-model-parallel-layout")
    if layout:
        return stages_of_layout(layout, model.num_layers, topology.pp)
    if (first or last) and any(ends):
        raise PlanError(
            "--decoder-first-pipeline-num-layers and the likes must come without --account-for-..."
        )
    pp, layers = topology.pp, model.num_layers
    if first or last:
        ranks = _uneven(layers, pp, first, last)
    else:
        ranks = [_quotient(layers + sum(ends), pp, "pipeline-model-parallel-size")] * pp
    virtual = _virtual_stages(read, ranks)
    stages = [own // virtual for own in ranks] * virtual
    stages[0] -= ends[0]
    stages[-1] -= ends[1]
    if min(stages) < 1:
        raise PlanError(
            f"every stage must have a layer, got stages of {','.join(map(str, stages))} layers: a plan has "
            "no stage for the embedding or the loss alone"
        )
    return virtual, tuple(stages)


def _virtual_stages(read: Given, ranks: Sequence[int]) -> int:
    """Stages into which every rank's layers are cut."""
    of_a_stage, of_a_rank, _ = SHAPES
    virtual = read.integer(of_a_rank, default=1)
    if read.has(of_a_stage):
        virtual = _quotient(ranks[0], read.integer(of_a_stage), of_a_stage)
    for own in ranks:
        _quotient(own, virtual, of_a_rank)
    return virtual


def _uneven(layers: int, pp: int, first: int, last: int) -> list[int]:
    """Layers of each rank where its ends have their own number."""
    if pp == 1:
        return [layers]
    free = pp - bool(first) - bool(last)
    left = layers - first - last
    if left < 0 or (free and left % free) or (not free and left):
        raise PlanError(
            f"--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers must leave {free} "
            f"ranks equal shares of {layers} layers, got {first} and {last}"
        )
    middle = left // free if free else 0
    return [first or middle, *[middle] * (pp - 2), last or middle]


def _quotient(whole: int, part: int, flag: str) -> int:
    if whole % part:
        raise PlanError(f"--{flag} must divide the {whole} layers that it cuts, got {part}")
    return whole // part


def stages_of_layout(layout: str, layers: int, pp: int) -> tuple[int, tuple[int, ...]]:
    """``Et*3|(t*4|)*3tL`` as stages of a rank and layers of each stage, which E, L, m and t fill."""
    text = layout.replace(",", "")
    for pattern in (r"\(([^)]+)\)\*(\d{1,5})", r"(.)\*(\d{1,5})"):
        if sum(len(whole) * int(times) for whole, times in re.findall(pattern, text)) > LONGEST_LAYOUT:
            raise PlanError(f"--pipeline-model-parallel-layout must not repeat so much, got {shown(layout)}")
        text = re.sub(pattern, lambda match: match[1] * int(match[2]), text)
    stages = text.split("|")
    if set(text) - set("ELtm|") or not text.startswith("E") or text.count("E") != 1 or text.count("L") != 1:
        raise PlanError(
            "--pipeline-model-parallel-layout must be stages of E, t, m and L between bars, E first, "
            f"got {shown(layout)}"
        )
    counts = tuple(stage.count("t") for stage in stages)
    if sum(counts) != layers or len(stages) % pp:
        raise PlanError(
            f"--pipeline-model-parallel-layout must cut {layers} layers into a multiple of {pp} stages, "
            f"got {sum(counts)} layers in {len(stages)} stages"
        )
    if min(counts) < 1:
        raise PlanError(
            f"every stage must have a layer, got {shown(layout)}: a plan has no stage for the embedding, the "
            "loss or multi-token prediction alone"
        )
    return len(stages) // pp, counts


def read_sharding(read: Given, topology: Topology) -> dict[str, Any]:
    """ZeRO stage, and the ranks that share a copy."""
    read.at_most_one("use-torch-fsdp2", "use-megatron-fsdp")
    read.at_most_one("use-torch-fsdp2", "use-distributed-optimizer")
    strategy = read.choice("data-parallel-sharding-strategy", STRATEGIES, STRATEGIES[-1])
    stage = int(read.has("use-distributed-optimizer"))
    if read.has("use-torch-fsdp2"):
        if topology.pp > 1 or topology.ep > 1:
            raise PlanError("--use-torch-fsdp2 must come without pipeline and expert parallelism")
        stage = 2 if read.has("torch-fsdp2-no-reshard-after-forward") else 3
    elif read.has("use-megatron-fsdp", "use-custom-fsdp"):
        stage = STRATEGIES.index(strategy)
    instances = read.integer("num-distributed-optimizer-instances", default=1)
    ranks = topology.dp * topology.cp
    if ranks % instances:
        raise PlanError(
            f"--num-distributed-optimizer-instances must divide dp * cp = {ranks}, got {instances}"
        )
    if read.has("overlap-param-gather") and not stage:
        raise PlanError(
            "--overlap-param-gather must come with --use-distributed-optimizer or --use-megatron-fsdp"
        )
    return {"zero_stage": stage, **({"shard": ranks // instances} if instances > 1 and stage else {})}


def read_bucket_bytes(read: Given, topology: Topology, work: Workload) -> int:
    """Bytes of a gradient bucket."""
    least, each = GRADIENTS_OF_A_BUCKET
    size = read.integer("ddp-bucket-size", default=max(least, each * topology.dp * topology.cp))
    if read.has("ddp-num-buckets"):
        read.note("--ddp-num-buckets: buckets are read at their default size")
    return size * work.format.gradient


def read_recompute(read: Given, stage_layers: tuple[int, ...]) -> tuple[str, ...]:
    """What each layer computes again."""
    old = read.has("checkpoint-activations", "activations-checkpoint-method")
    granularity = _granularity(read, old)
    method = read.text("recompute-method", "activations-checkpoint-method", default="uniform" if old else "")
    count = read.integer(
        "recompute-num-layers", "activations-checkpoint-num-layers", default=1 if old else 0, least=0
    )
    modules = set(read.words("recompute-modules") or ("core_attn",))
    if read.has("moe-layer-recompute"):
        modules.add("moe")
    layers = sum(stage_layers)
    if granularity == "selective":
        return (_selected(read, method, modules),) * layers
    if granularity == "full":
        return _in_full(read, method, count, stage_layers)
    if method:
        read.note("--recompute-method has no effect without --recompute-granularity")
    return ("none",) * layers


def _granularity(read: Given, old: bool) -> str:
    """full, selective or nothing; ``old`` flags ask for full."""
    selective = read.has("recompute-activations")
    if not (old or read.has("recompute-granularity") or selective):
        return ""
    default = "full" if old else "selective" if selective else ""
    return read.choice("recompute-granularity", ("full", "selective"), default)


def _selected(read: Given, method: str, modules: set[str]) -> str:
    """What every layer does under selective recomputation of some modules."""
    if method:
        raise PlanError("--recompute-method must come with --recompute-granularity full, got selective")
    if others := sorted(modules - {"core_attn"}):
        read.note(f"recomputation of {', '.join(others)} is not counted")
    return "selective" if "core_attn" in modules else "none"


def _in_full(read: Given, method: str, count: int, stage_layers: tuple[int, ...]) -> tuple[str, ...]:
    """All layers, or the first few of each stage."""
    if method not in ("uniform", "block") or not count:
        raise PlanError(
            "--recompute-granularity full must come with --recompute-method uniform or block and "
            f"--recompute-num-layers, got {method or 'none'} and {count}"
        )
    if method == "block":
        return tuple(mode for own in stage_layers for mode in block_modes(own, count))
    if count > 1:
        read.note(
            f"--recompute-num-layers {count}: each layer's input is counted as kept, not each {count}th"
        )
    return ("full",) * sum(stage_layers)


def read_offload(read: Given, model: ModelSpec, topology: Topology) -> tuple[bool, ...]:
    """Which layers wait in host memory."""
    count = read.integer("cpu-offloading-num-layers", default=0, least=0)
    layers = model.num_layers
    if count and topology.pp > 1:
        raise PlanError("--cpu-offloading-num-layers must come without pipeline parallelism")
    if count and read.has("recompute-granularity", "recompute-activations"):
        raise PlanError("--cpu-offloading-num-layers must come without recomputation")
    if count >= layers > 0 and count:
        raise PlanError(f"--cpu-offloading-num-layers must be below the {layers} layers, got {count}")
    if read.has("fine-grained-activation-offloading"):
        count = round(layers * read.number("activation-offload-fraction", default=1.0))
        read.words("offload-modules")
        read.note(f"offloaded modules are counted as all activations of the first {count} layers")
    return tuple(layer < count for layer in range(layers))
