"""Bytes beside weights and activations: transfers, placeholders, scratch, and what no tensor holds."""

from __future__ import annotations

import numpy as np
from attrs import frozen

from picotron.planner.cases import ARCHITECTURES, ATTENTIONS, RECOMPUTES, SCHEDULE_NAMES, Cases, Column
from picotron.planner.held_weights import HeldWeights
from picotron.planner.in_flight import microbatches
from picotron.planner.memory_constants import memory_constants
from picotron.planner.moving_bytes import Blocks
from picotron.planner.saved_tensors import EAGER, FUSED
from picotron.planner.stage_columns import RankLayers
from picotron.planner.standing_bytes import StandingBytes


def adds_gradients(cases: Cases) -> Column:
    """Where a product adds its weight gradient to the main gradients itself (Megatron-Core).

    It does where these are wider than weights, and in whatever width since Transformer Engine brought cuDNN's
    attention.
    """
    work, software = cases.work, cases.software
    does = (work.gradient_bytes > work.compute_bytes) | (software.attention >= ATTENTIONS.index("flash-3"))
    adds: Column = (software.kernels == FUSED) & (cases.layout.zero_stage <= 1) & does
    return adds


def placeholders(blocks: Blocks, layers: RankLayers) -> Column:
    """Empty weight gradients that autograd wants where a product adds them to the main gradients itself.

    Transformer Engine keeps one of each matrix's shape.
    """
    matrices = dict(blocks.layer.matrices)
    sparse = sum(matrices.pop(name) for name in list(matrices) if name.startswith(("expert", "shared")))
    dense = matrices.pop("up") + matrices.pop("product")
    kept = sum(matrices.values()) + (layers.dense > 0) * dense + (layers.sparse > 0) * sparse
    placeholders: Column = adds_gradients(blocks.cases) * kept * blocks.cases.work.compute_bytes
    return placeholders


def head_placeholder(blocks: Blocks, layers: RankLayers) -> Column:
    """The head's, which is Megatron-Core's own: made in the head's backward, and freed."""
    matrix = blocks.widths.vocab * blocks.cases.model.hidden * blocks.cases.work.compute_bytes
    placeholder: Column = layers.last * adds_gradients(blocks.cases) * matrix
    return placeholder


def library_workspace(cases: Cases) -> Column:
    """Scratch that matrix libraries keep."""
    workspace: Column = memory_constants().library_workspace_bytes[_architecture(cases)]
    return workspace


def _architecture(cases: Cases) -> Column:
    index: Column = cases.machine.architecture.astype(np.int64)
    return index


def position_table(cases: Cases) -> Column:
    """Cosine and sine of rotary positions."""
    model, work = cases.model, cases.work
    rotary = np.where(model.rope_dim > 0, model.rope_dim, model.head_dim)
    rows = (model.learned_positions == 0) * work.seq_len / cases.layout.cp
    table: Column = rows * rotary * work.compute_bytes
    return table


@frozen(kw_only=True, eq=False)
class Transfers:
    """Bytes on their way, and ``ahead`` of them what does not stand while the head computes forward."""

    total: Column
    ahead: Column


def communication(
    blocks: Blocks, layers: RankLayers, held: HeldWeights, standing: StandingBytes
) -> Transfers:
    """Transfers of the pipeline, keys and values of the ring, gathered weights, gradients to be reduced."""
    cases, w, t = blocks.cases, blocks.widths, blocks.tokens
    layout = cases.layout
    eager = cases.software.kernels == EAGER
    pending = np.where(eager, _pending(cases, layers), 1) * (layout.pp > 1)
    pipeline = pending * blocks.saved.boundary
    ring = (layout.cp > 1) * ~eager * 2 * t.whole * (w.key + w.value) * t.item
    if not np.any(layout.zero_stage >= 2):
        return Transfers(total=pipeline + ring, ahead=np.zeros(()))
    table = w.vocab * cases.model.hidden * cases.work.compute_bytes
    gathered = np.minimum(
        _gathered(blocks, layers, held, standing, table),
        np.where(eager, standing.whole, standing.gathered),
    )
    reduced = np.minimum(_reduced(blocks, layers, held), standing.reduced)
    first = microbatches(cases.work, layout) * layout.virtual_stages == 1
    travelling = np.minimum(_last_reduced(blocks, layers), reduced)  # while the next microbatch is forward
    ahead = eager * (np.maximum(gathered - table, 0) + reduced - ~first * travelling)
    return Transfers(total=pipeline + ring + gathered + reduced, ahead=ahead)


def _gathered(
    blocks: Blocks, layers: RankLayers, held: HeldWeights, standing: StandingBytes, table: Column
) -> Column:
    """Of sharded parameters two layers are whole at a time, one of them ahead of its use, and the tables.

    In *eager* a table or a layer is gathered ahead, and none of another stage; whole ones, beside a rank's
    own share, of what is shared at all.
    """
    size = blocks.cases.work.compute_bytes
    layer = held.largest_layer - ~standing.experts_shared * (layers.sparse > 0) * blocks.layer.experts
    several = layers.all > blocks.cases.layout.virtual_stages
    ahead = np.maximum(several * layer * size, np.maximum(layers.first, layers.last) * table)
    every = (2 * held.largest_layer + held.table) * size
    eager = blocks.cases.software.kernels == EAGER
    gathered: Column = np.where(eager, layer * size + ahead, every)
    return gathered


def _reduced(blocks: Blocks, layers: RankLayers, held: HeldWeights) -> Column:
    """Of sharded gradients a bucket, which holds a layer's or the tables' at least.

    In *eager* those of two neighbouring segments, of which one fills while the other is reduced: an MLP and
    an attention, or an end's table and what is next to it, and what buckets had left open before. Experts
    travel between other ranks: those of one layer, whose saved tensors and weights are gone, while those of
    the one before fill.
    """
    work, bucket, own = blocks.cases.work, blocks.cases.software.bucket_bytes, blocks.layer
    mlp = np.maximum((layers.dense > 0) * own.dense, (layers.sparse > 0) * (own.shared + own.experts))
    table = blocks.widths.vocab * blocks.cases.model.hidden
    several = np.maximum(layers.last * (table + mlp), layers.first * (table + own.attention))
    segments = np.maximum(own.attention + mlp, several) * work.wire_bytes
    gathered = (blocks.cases.layout.zero_stage >= 3) * held.largest_layer * work.compute_bytes
    beside = np.maximum(own.experts * work.wire_bytes - blocks.sparse.whole - gathered, 0)
    segments = segments + (layers.sparse > blocks.cases.layout.virtual_stages) * beside
    layer = np.maximum(held.largest_layer, held.table) * work.wire_bytes
    left = np.minimum(bucket, segments)
    eager = blocks.cases.software.kernels == EAGER
    reduced: Column = np.where(eager, segments + left, np.maximum(layer, bucket))
    return reduced


def _last_reduced(blocks: Blocks, layers: RankLayers) -> Column:
    """Of sharded gradients what is waited for after the B or W: of its last segment, and of its bucket."""
    table = layers.first * blocks.widths.vocab * blocks.cases.model.hidden
    size: Column = (blocks.layer.attention + table) * blocks.cases.work.wire_bytes
    reduced: Column = size + np.minimum(blocks.cases.software.bucket_bytes, size)
    return reduced


def _pending(cases: Cases, layers: RankLayers) -> Column:
    """Tensors of the pipeline on their way where receives are posted early and sends are waited for late."""
    layout = cases.layout
    more = microbatches(cases.work, layout) * layout.virtual_stages > 1
    waits = np.isin(layout.schedule, [SCHEDULE_NAMES.index(name) for name in ("afab", "bfs")])
    sides = layout.virtual_stages > 1
    behind, ahead = np.maximum(1 - layers.last, sides), np.maximum(1 - layers.first, sides)
    pending: Column = behind * (1 + more) + ahead * more * ~waits
    return pending


def fragmentation_share(cases: Cases) -> Column:
    """Of the bytes that come and go: less where every layer is recomputed, as what stands is of one size.

    A CPU's memory is the system's, which maps pages: nothing.
    """
    layout, constants = cases.layout, memory_constants()
    recomputed = np.where(layout.recompute == RECOMPUTES.index("full"), layout.recompute_layers, 0.0)
    mixed, uniform = constants.fragmentation_share, constants.recomputed_fragmentation_share
    share: Column = _on_accelerator(cases) * (mixed + (uniform - mixed) * recomputed)
    return share


def framework(cases: Cases) -> Column:
    """The process's own memory, and the buffers of each communicator that it opens."""
    layout, constants = cases.layout, memory_constants()
    degrees = (layout.dp, layout.pp, layout.cp, layout.tp, layout.ep)
    groups = 1 + sum(degree > 1 for degree in degrees)
    context = constants.context_bytes[_architecture(cases)]
    framework: Column = context + _on_accelerator(cases) * groups * constants.communicator_bytes
    return framework


def _on_accelerator(cases: Cases) -> Column:
    present: Column = _architecture(cases) != ARCHITECTURES.index("cpu")
    return present
