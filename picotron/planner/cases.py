"""Many training runs at once, as columns: what the vectorised estimates are computed from.

A *case* is one model on one machine under one software profile with one layout. Every column is a numpy
array, and the columns of all five parts broadcast against each other: a search has one model and many
layouts, so its model's columns have shape () and its layout's shape (n,); a table of published runs has
shape (n,) throughout. What a column means is said beside it; sizes are in elements, bytes or seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
from attrs import AttrsInstance, fields, frozen

from picotron.errors import PlanError
from picotron.planner.architectures import ARCHITECTURES as ARCHITECTURES
from picotron.planner.model import ModelSpec

Column = np.ndarray
Part = TypeVar("Part", bound=AttrsInstance)


@frozen(kw_only=True, eq=False)
class ModelColumns:
    """Sizes of the decoder. What a model does not have is 0."""

    hidden: Column
    layers: Column
    heads: Column
    kv_heads: Column
    head_dim: Column  # of a query and a key (under latent attention both parts together)
    value_dim: Column  # of a value's head
    intermediate: Column  # of a dense MLP
    gated: Column  # 1 where the MLP has a gate beside its up projection
    vocab: Column
    tied: Column  # 1 where the head shares the embedding's table
    learned_positions: Column  # rows of the position table; 0 under rotary positions
    layer_norm: Column  # 1 for norms with mean and bias, 0 for RMS norms
    biases: Column  # 1 where every projection has a bias
    head_norms: Column  # 1 where queries and keys have norms of their own, head by head
    query_rank: Column  # latent attention: width of the compressed query
    kv_rank: Column  # latent attention: width of the compressed keys and values (0: ordinary attention)
    rope_dim: Column  # latent attention: the part of a key that all heads share
    moe_layers: Column  # layers whose MLP is experts; the other layers are dense
    experts: Column
    top_k: Column
    expert_intermediate: Column
    shared_intermediate: Column  # of the experts every token visits, together
    expert_latent: (
        Column  # hidden over the width that experts read (at least 1); they are counted at full width
    )
    windowed_layers: Column  # layers whose attention looks back no further than ``window``
    window: Column


@frozen(kw_only=True, eq=False)
class WorkColumns:
    """What is trained: batch, formats and optimizer."""

    global_batch: Column  # sequences a step
    seq_len: Column
    compute_bytes: Column  # of a weight or activation between kernels (2 for bf16, under fp8 products too)
    product_format: Column  # index into PRODUCT_FORMATS: operands of the large products
    gradient_bytes: Column  # of an accumulated gradient
    wire_bytes: Column  # of a gradient on its way between data-parallel ranks
    main_bytes: Column  # of the optimizer's own copy of a weight; 0 where the weight is its own
    moment_bytes: Column  # of both of Adam's moments together
    trained_head: Column  # 1: loss over the vocabulary (0 leaves the head out)


PRODUCT_FORMATS = ("fp64", "fp32", "tf32", "bf16", "fp16", "fp8", "mxfp8", "fp8-blockwise", "nvfp4")


@frozen(kw_only=True, eq=False)
class MachineColumns:
    """One device, its node and the network. Rates are peaks in base units."""

    architecture: Column  # index into ARCHITECTURES
    peak_flops: Column  # dense FLOP/s of the product format
    peak_16bit: Column  # dense FLOP/s of bf16 or fp16, in which attention and everything else runs
    memory_bytes: Column
    memory_bytes_per_second: Column
    processors: Column  # streaming multiprocessors: what a product's tiles are dealt to
    devices_per_node: Column
    intra_bytes_per_second: Column  # one device to its node, one direction
    intra_seconds: Column  # latency of a hop
    inter_bytes_per_second: Column  # one device to the network, one direction
    inter_seconds: Column
    intra_reduces: Column  # 1 where the node's switches sum all-reduces (SHARP)
    inter_reduces: Column  # 1 where the network's do
    host_bytes_per_second: Column  # one device to host memory: what an offload crosses
    compute_scale: Column  # what an observed run corrects: multiplies all seconds of computing
    communication_scale: Column  # and all of communication
    step_seconds: Column  # spent once a step


@frozen(kw_only=True, eq=False)
class SoftwareColumns:
    """A software profile, as far as it is not a constant of the device."""

    attention: Column  # index into ATTENTIONS
    kernels: Column  # index into KERNEL_SETS: how far elementwise work is fused
    tensor_overlap: Column  # share of tensor-parallel transfers hidden under products, 0 to 1
    reduce_overlap: Column  # 1: gradients are reduced under backward
    gather_overlap: Column  # 1: sharded parameters are gathered under forward
    pipeline_overlap: Column  # 1: stage to stage transfers run beside compute
    expert_overlap: Column  # share of expert all-to-alls hidden
    expert_dedup: Column  # 1: a token is sent once to each rank, and once to each node, that wants it
    expert_neighbours: (
        Column  # 1: a token's experts are neighbours, as a benchmark's balanced gate deals them
    )
    expert_kernels: Column  # index into EXPERT_KERNELS: how the products of a rank's experts are launched
    expert_graphs: Column  # 1: experts too are launched as graphs, and the host waits for no counts
    loss: Column  # index into LOSSES: what stands beside the logits
    graphs: Column  # 1: all but experts is launched as graphs, without the host
    optimizer_on_host: Column  # 1: the update runs on the host's processors, from host memory
    recompute_stops_early: Column  # 1: recomputation leaves out a layer's last product, which nothing reads
    far_adapters: Column  # 1: a ring's messages are not handed to the rank beside the adapter that it uses
    checkpoint_waits: Column  # 1: a recomputed layer makes the device wait for the host's own bookkeeping
    bucket_bytes: Column  # of one data-parallel transfer: what is reduced or gathered at a time
    clock: Column  # share of the nominal peak that the power cap leaves under sustained load


ATTENTIONS = ("unfused", "fused-softmax", "flash-1", "flash-2", "flash-3", "cudnn")
KERNEL_SETS = ("eager", "fused", "compiled")
EXPERT_KERNELS = (
    "looped",
    "grouped",
    "fused",
)  # one launch each; one for all; with activation and casts in it
LOSSES = ("copy", "in place", "chunked")  # logits in fp32 beside them; over them; a chunk of tokens at a time


@frozen(kw_only=True, eq=False)
class LayoutColumns:
    """How the work is laid over the devices. dp * pp * cp * tp devices in all."""

    dp: Column
    pp: Column
    cp: Column
    tp: Column
    ep: Column
    etp: Column
    virtual_stages: Column
    schedule: Column  # index into SCHEDULE_NAMES
    micro_batch: Column
    zero_stage: Column  # 0: all kept; 1: optimizer; 2: and gradients; 3: and parameters sharded
    shard: Column  # data-parallel ranks (dp * cp) that share one sharded copy: all of them, or fewer (HSDP)
    sequence_parallel: Column  # 1 or 0
    recompute: Column  # index into RECOMPUTES
    recompute_layers: Column  # share of the layers that is recomputed, 0 to 1 (where recompute is not none)
    offload: Column  # share of saved activations that is kept in host memory, 0 to 1
    ends: Column  # 1: embedding and head count as a layer each when stages are cut; 0: layers cut evenly
    order: Column  # index into ORDERS: axes, slowest first


SCHEDULE_NAMES = (
    "afab",
    "1f1b",
    "interleaved",
    "bfs",
    "zb-h1",
    "zb-h2",
    "zb-v",
    "interleaved-zb",
    "dualpipe-v",
    "v-min",
    "v-half",
)
RECOMPUTES = ("none", "selective", "full")  # selective: the attention core alone
ORDERS = (
    ("pp", "dp", "cp", "tp"),
    ("dp", "pp", "cp", "tp"),
    ("pp", "cp", "dp", "tp"),
    ("dp", "cp", "pp", "tp"),
)


@frozen(kw_only=True, eq=False)
class Cases:
    """Columns of all five parts, which broadcast to one length."""

    model: ModelColumns
    work: WorkColumns
    machine: MachineColumns
    software: SoftwareColumns
    layout: LayoutColumns

    def __len__(self) -> int:
        parts = (self.model, self.work, self.machine, self.software, self.layout)
        columns = [getattr(part, f.name) for part in parts for f in fields(type(part))]
        shape = np.broadcast_shapes(*(column.shape for column in columns))
        return shape[0] if shape else 1


def columns(part: type[Part], values: Mapping[str, Any]) -> Part:
    """``part`` built from ``values``, each a number or a sequence of numbers; every column must be given."""
    names = [f.name for f in fields(part)]
    if missing := [name for name in names if name not in values]:
        raise PlanError(f"{part.__name__} needs a column for each of its fields, missing {missing}")
    return part(**{name: np.asarray(values[name], dtype=np.float64) for name in names})


def model_columns(model: ModelSpec) -> ModelColumns:
    """The columns of one model, each of shape ()."""
    latent, experts = model.latent_attention, model.experts
    return columns(
        ModelColumns,
        {
            "hidden": model.hidden_size,
            "layers": model.num_layers,
            "heads": model.num_heads,
            "kv_heads": model.num_kv_heads,
            "head_dim": model.head_dim,
            "value_dim": latent.v_head_dim if latent else model.head_dim,
            "intermediate": model.intermediate_size,
            "gated": model.gated_mlp,
            "vocab": model.vocab_size,
            "tied": model.tied_embeddings,
            "learned_positions": model.max_positions if model.rope_theta is None else 0,
            "layer_norm": model.norm == "layer",
            "biases": model.family == "gpt2",
            "head_norms": model.qk_norm,
            "query_rank": (latent.q_lora_rank or 0) if latent else 0,
            "kv_rank": latent.kv_lora_rank if latent else 0,
            "rope_dim": latent.qk_rope_head_dim if latent else 0,
            "moe_layers": model.num_moe_layers,
            "experts": experts.num_experts if experts else 0,
            "top_k": experts.top_k if experts else 0,
            "expert_intermediate": experts.intermediate_size if experts else 0,
            "shared_intermediate": experts.shared_intermediate_size if experts else 0,
            "expert_latent": 1,
            "windowed_layers": 0,
            "window": 0,
        },
    )
