"""Megatron-LM's arguments as a plan, so that what already runs can be priced: the inverse of ``to_megatron``.

Defaults are Megatron-LM's own (see ``megatron`` for the release), and so are the rules by which one flag
refuses another; of the flags of earlier releases those that shape a run are read too. Every flag that changes
a plan is used; what it says that no plan has is noted, and the rest is listed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from attrs import evolve, frozen

from picotron.errors import PlanError
from picotron.planner.cluster import ClusterSpec
from picotron.planner.megatron import (
    ORDERS,
    STRATEGIES,
    MegatronArguments,
    block_modes,
)
from picotron.planner.megatron_flags import Given, given, left_over
from picotron.planner.megatron_model import read_model
from picotron.planner.megatron_text import WrittenArguments, flags, read_arguments
from picotron.planner.model import ModelSpec
from picotron.planner.plan import TrainingPlan, plan
from picotron.planner.topology import Topology
from picotron.planner.validators import shown
from picotron.planner.workload import FORMATS, Workload

GRADIENTS_OF_A_BUCKET = (40_000_000, 1_000_000)  # at least, and for each data-parallel rank
LONGEST_LAYOUT = 100_000  # characters, repetitions written out
LAUNCHER = {
    "nproc_per_node": "devices",
    "nproc-per-node": "devices",
    "nnodes": "nodes",
    "nnode": "nodes",
}
BESIDE_LAUNCHER = ("node-rank", "master-addr", "master-port", "rdzv-id", "rdzv-backend", "rdzv-endpoint")
# What the software profile decides, by field, and the flag that says so.
SOFTWARE: Mapping[str, tuple[tuple[str, Any], ...]] = {
    "overlap-grad-reduce": (("reduce_overlap", True),),
    "overlap-param-gather": (("gather_overlap", True),),
    "tp-comm-overlap": (("tensor_overlap", 0.6),),
    "overlap-moe-expert-parallel-comm": (("expert_overlap", 0.5),),
    "enable-cuda-graph": (("graphs", True),),
    "external-cuda-graph": (("graphs", True),),
    "grad-reduce-in-bf16": (("wire_bytes", 2.0), ("gradient_bytes", 2.0)),
    "use-flash-attn": (("attention", "flash-2"),),
}
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


@frozen(kw_only=True)
class ImportedPlan:
    """The plan that a list of arguments runs, and what became of each flag.

    ``software`` holds the fields of a software profile that the flags decide; ``ignored`` do not matter to a
    plan, ``unknown`` says which flags Megatron-LM does not have, ``notes`` what is read otherwise.
    """

    plan: TrainingPlan
    software: tuple[tuple[str, Any], ...]
    ignored: tuple[str, ...]
    unknown: tuple[str, ...]
    notes: tuple[str, ...]


def from_megatron(
    source: str | Sequence[str] | MegatronArguments,
    cluster: ClusterSpec | str,
    *,
    vocab_size: int | None = None,
    name: str = "megatron",
    variables: Mapping[str, str] | None = None,
) -> ImportedPlan:
    """The plan of Megatron-LM's arguments on a cluster.

    ``source`` is a shell script or a piece of one, a file's text, YAML, or the words themselves. A cluster
    named without its shape takes that of the launcher's line. ``vocab_size`` stands in where it is in a
    tokenizer's file, ``variables`` for what a script takes from its caller. Raises PlanError for arguments
    that contradict each other, cannot be read, or that no plan can say.
    """
    written = _written(source, variables)
    read = given(flags((*written.words,)))
    for note in written.notes:
        read.note(note)
    machine = _cluster(cluster, _launched(read, written), read)
    topology = _topology(read, machine)
    seq_len = read.integer("seq-length", "encoder-seq-length")
    model = read_model(read, tp=topology.tp, seq_len=seq_len, vocab_size=vocab_size, name=name)
    micro_batch = read.integer("micro-batch-size")
    work = _workload(read, topology, seq_len, micro_batch)
    virtual, stage_layers = _stages(read, model, topology)
    sequence_parallel = read.has("sequence-parallel") and topology.tp > 1
    if read.has("tp-comm-overlap") and not sequence_parallel:
        raise PlanError(
            "--tp-comm-overlap must come with --sequence-parallel and a tensor-parallel size above 1"
        )
    _check_contexts(read, topology, seq_len)
    if topology.ep > 1 and model.experts is None:
        raise PlanError("--expert-model-parallel-size must come with --num-experts")
    options: dict[str, Any] = {
        **_sharding(read, topology),
        "recompute": _recompute(read, stage_layers),
        "offload": _offload(read, model, topology),
    }
    made = plan(
        model,
        machine,
        work,
        **{axis: getattr(topology, axis) for axis in ("dp", "pp", "cp", "tp", "ep", "etp", "order")},
        schedule="interleaved" if virtual > 1 else "1f1b",
        virtual_stages=virtual,
        micro_batch=micro_batch,
        sequence_parallel=sequence_parallel,
        stage_layers=stage_layers,
        bucket_bytes=_bucket_bytes(read, topology, work),
        **options,
    )
    software = _software(read)
    _note_what_is_not_counted(read, topology)
    ignored, unknown = left_over(read)
    return ImportedPlan(
        plan=evolve(made, chosen=()),
        software=software,
        ignored=ignored,
        unknown=unknown,
        notes=tuple(read.notes),
    )


def _written(
    source: str | Sequence[str] | MegatronArguments, variables: Mapping[str, str] | None
) -> WrittenArguments:
    if isinstance(source, MegatronArguments):
        return WrittenArguments(words=source.words)
    if isinstance(source, str):
        return read_arguments(source, variables)
    words = tuple(source)
    if not all(isinstance(word, str) for word in words):
        raise PlanError(f"arguments must be a text or a sequence of words, got {shown(source)}")
    if not any(word.startswith("--") for word in words):
        raise PlanError(f"arguments must have a --flag among them, got {shown(words)}")
    return WrittenArguments(words=words)


def _launched(read: Given, written: WrittenArguments) -> dict[str, int]:
    """Nodes and devices of each, where the launcher's words say so."""
    launcher = given(flags(written.launcher)).values
    found: dict[str, int] = {}
    for flag, what in LAUNCHER.items():
        values = launcher.get(flag.replace("_", "-"), ()) or read.values.get(flag, ())
        read.used.add(flag)
        if values and values[0].isdecimal() and int(values[0]):
            found[what] = int(values[0])
    read.used |= set(BESIDE_LAUNCHER)
    return found


def _cluster(cluster: ClusterSpec | str, launched: Mapping[str, int], read: Given) -> ClusterSpec:
    """The cluster as asked for; its shape from the launcher where the caller gave none."""
    if isinstance(cluster, str) and ":" not in cluster and not cluster.endswith(".json") and launched:
        return ClusterSpec.preset(
            cluster, nodes=launched.get("nodes", 1), devices_per_node=launched.get("devices")
        )
    made = ClusterSpec.parse(cluster) if isinstance(cluster, str) else cluster
    if not isinstance(made, ClusterSpec):
        raise PlanError(f"cluster must be a ClusterSpec or its name, got {type(made).__name__}")
    asked = launched.get("nodes", made.nodes), launched.get("devices", made.devices_per_node)
    if asked != (made.nodes, made.devices_per_node):
        read.note(
            f"the launcher has {asked[0]} x {asked[1]} devices: the cluster's own "
            f"{made.nodes} x {made.devices_per_node} are taken"
        )
    return made


def _topology(read: Given, cluster: ClusterSpec) -> Topology:
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


def _note_what_is_not_counted(read: Given, topology: Topology) -> None:
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


def _check_contexts(read: Given, topology: Topology, seq_len: int) -> None:
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


def _workload(read: Given, topology: Topology, seq_len: int, micro_batch: int) -> Workload:
    ramp = read.words("step-batch-size-schedule")
    last = ramp[-1].rpartition(":")[2] if ramp else ""
    if ramp:
        read.note("--step-batch-size-schedule: the batch is read at its last size")
    default = int(last) if last.isdecimal() else micro_batch * topology.dp
    batch = read.integer("global-batch-size", default=default)
    rate = read.number("lr", default=0.0)
    least = read.number("min-lr", default=0.0)
    if least > rate > 0:
        raise PlanError(f"--min-lr must be at most --lr, got {least:g} and {rate:g}")
    optimizer = read.text("optimizer", default="adam")
    if optimizer not in ("adam", "sgd"):
        read.note(f"--optimizer {optimizer}: read as AdamW, whose states take as much or more")
    if optimizer == "sgd" and read.number("sgd-momentum", default=0.9):
        read.note("--sgd-momentum: the momentum is left out of the plan")
    warmup, decay = _schedule(read, batch)
    return Workload(
        global_batch=batch,
        seq_len=seq_len,
        precision=_precision(read),
        optimizer="sgd" if optimizer == "sgd" else "adamw",
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


def _stages(read: Given, model: ModelSpec, topology: Topology) -> tuple[int, tuple[int, ...]]:
    """Stages of each rank, and layers of each stage."""
    shapes = (
        "num-layers-per-virtual-pipeline-stage",
        "num-virtual-stages-per-pipeline-rank",
        "pipeline-model-parallel-layout",
    )
    for index, name in enumerate(shapes):
        for other in shapes[index + 1 :]:
            read.at_most_one(name, other)
    first = read.integer("decoder-first-pipeline-num-layers", default=0)
    last = read.integer("decoder-last-pipeline-num-layers", default=0)
    ends = read.has("account-for-embedding-in-pipeline-split"), read.has("account-for-loss-in-pipeline-split")
    layout = read.text(shapes[2])
    if layout:
        return _from_layout(layout, model.num_layers, topology.pp)
    pp, layers = topology.pp, model.num_layers
    if first or last:
        if any(ends):
            raise PlanError(
                "--decoder-first-pipeline-num-layers and the likes must come without --account-for-..."
            )
        ranks = _uneven(layers, pp, first, last)
    else:
        ranks = [_quotient(layers + sum(ends), pp, "pipeline-model-parallel-size")] * pp
    virtual = read.integer(shapes[1], default=1)
    if read.has(shapes[0]):
        virtual = _quotient(ranks[0], read.integer(shapes[0]), shapes[0])
    for own in ranks:
        _quotient(own, virtual, shapes[1])
    stages = [own // virtual for own in ranks] * virtual
    stages[0] -= ends[0]
    stages[-1] -= ends[1]
    if min(stages) < 1:
        raise PlanError(
            f"every stage must have a layer, got stages of {','.join(map(str, stages))} layers: a plan has "
            "no stage for the embedding or the loss alone"
        )
    return virtual, tuple(stages)


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


def _from_layout(layout: str, layers: int, pp: int) -> tuple[int, tuple[int, ...]]:
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


def _sharding(read: Given, topology: Topology) -> dict[str, Any]:
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


def _bucket_bytes(read: Given, topology: Topology, work: Workload) -> int:
    least, each = GRADIENTS_OF_A_BUCKET
    size = read.integer("ddp-bucket-size", default=max(least, each * topology.dp * topology.cp))
    if read.has("ddp-num-buckets"):
        read.note("--ddp-num-buckets: buckets are read at their default size")
    return size * FORMATS[work.precision].gradient


def _recompute(read: Given, stage_layers: tuple[int, ...]) -> tuple[str, ...]:
    """What each layer computes again."""
    old = read.has("checkpoint-activations", "activations-checkpoint-method")
    granularity = (
        read.choice(
            "recompute-granularity",
            ("full", "selective"),
            "full" if old else "selective" if read.has("recompute-activations") else "",
        )
        if read.has("recompute-granularity", "recompute-activations") or old
        else ""
    )
    method = read.text("recompute-method", "activations-checkpoint-method", default="uniform" if old else "")
    count = read.integer(
        "recompute-num-layers", "activations-checkpoint-num-layers", default=1 if old else 0, least=0
    )
    modules = set(read.words("recompute-modules") or ("core_attn",))
    if read.has("moe-layer-recompute"):
        modules.add("moe")
    layers = sum(stage_layers)
    if granularity == "selective":
        if method:
            raise PlanError("--recompute-method must come with --recompute-granularity full, got selective")
        if modules - {"core_attn"}:
            read.note(f"recomputation of {', '.join(sorted(modules - {'core_attn'}))} is not counted")
        return ("selective" if "core_attn" in modules else "none",) * layers
    if not granularity:
        if method:
            read.note("--recompute-method has no effect without --recompute-granularity")
        return ("none",) * layers
    if method not in ("uniform", "block") or not count:
        raise PlanError(
            "--recompute-granularity full must come with --recompute-method uniform or block and "
            f"--recompute-num-layers, got {method or 'none'} and {count}"
        )
    if method == "uniform":
        if count > 1:
            read.note(
                f"--recompute-num-layers {count}: each layer's input is counted as kept, not each {count}th"
            )
        return ("full",) * layers
    return tuple(mode for own in stage_layers for mode in block_modes(own, count))


def _offload(read: Given, model: ModelSpec, topology: Topology) -> tuple[bool, ...]:
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


def _software(read: Given) -> tuple[tuple[str, Any], ...]:
    """What the flags say of a software profile."""
    found: dict[str, Any] = {}
    for flag, settings in SOFTWARE.items():
        if read.has(flag):
            found |= dict(settings)
    if read.text("cuda-graph-impl", default="none") != "none":
        found["graphs"] = True
    backend = read.text("attention-backend", default="auto")
    kinds = {"flash": "flash-2", "fused": "cudnn", "unfused": "fused-softmax", "local": "unfused"}
    if backend in kinds:
        found["attention"] = kinds[backend]
    if read.has("no-overlap-p2p-communication"):
        found["pipeline_overlap"] = False
    return tuple(sorted(found.items()))
