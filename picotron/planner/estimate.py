"""Seconds of a training step of many cases at once, as a sum of named causes.

One microbatch on the slowest stage (``layer_times``) is repeated; the pipeline adds what it waits
(``pipeline_times``), data parallelism what is not hidden, and the optimizer its update (``sharding_times``).
Every cause is seconds of the step; they sum to it exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from attrs import frozen

from picotron.errors import PlanError
from picotron.planner.block_times import BACKWARD_KERNELS, CORE, Block, total, weighted
from picotron.planner.cases import RECOMPUTES, Cases, Column
from picotron.planner.constants import Constants, default_constants
from picotron.planner.kernels import device_rates
from picotron.planner.layer_times import LayerTimes, layer_times
from picotron.planner.network import links
from picotron.planner.offload_times import offload_waits
from picotron.planner.parameter_counts import parameter_counts
from picotron.planner.pipeline_times import (
    StageLayers,
    bubble_share,
    stage_layers,
    transfer_seconds,
)
from picotron.planner.sharding_times import Beside, data_seconds, optimizer_seconds

CAUSES = (
    "matmul",
    "attention",
    "elementwise",
    "launch",
    "recompute",
    "tensor",
    "context",
    "expert",
    "pipeline_bubble",
    "pipeline_transfer",
    "data",
    "optimizer",
    "offload",
)
_RATES = (
    "peak_flops",
    "peak_16bit",
    "memory_bytes_per_second",
    "processors",
    "devices_per_node",
    "intra_bytes_per_second",
    "inter_bytes_per_second",
    "host_bytes_per_second",
)
_DEGREES = ("dp", "pp", "cp", "tp", "ep", "etp", "virtual_stages", "micro_batch")
_SIZES = ("hidden", "layers", "heads", "kv_heads", "head_dim", "vocab")
_WORK = ("global_batch", "seq_len", "compute_bytes")
_FULL, _SELECTIVE = RECOMPUTES.index("full"), RECOMPUTES.index("selective")


@frozen(kw_only=True, eq=False)
class TimeEstimate:
    """Seconds of a step, and what they are made of."""

    step_seconds: Column
    causes: Mapping[str, Column]
    layers: LayerTimes


def estimate_seconds(
    cases: Cases, constants: Constants | None = None, *, mean_layers: bool = False
) -> TimeEstimate:
    """Seconds of a step of every case and their causes, each of shape (n,).

    ``mean_layers``: as if every pipeline rank could hold the mean number of layers, which bounds all cuts.
    Raises PlanError where a rate, a degree or a size is not a positive number.
    """
    _check(cases)
    table = default_constants() if constants is None else constants
    rates, link = device_rates(cases, table), links(cases, table)
    layers = layer_times(cases, table, rates, link)
    layout, work = cases.layout, cases.work
    microbatches = np.maximum(np.ceil(work.global_batch / (layout.dp * layout.micro_batch)), 1.0)

    layer = with_recompute(cases, table, layers)
    held = stage_layers(cases, mean=mean_layers)
    stage, others = _slowest(cases, table, layers, layer, held)
    forward, backward, launch = pass_seconds(cases, table, stage)
    busy = forward + backward + launch

    weight = np.minimum(_weight_seconds(stage), backward)
    share = bubble_share(cases, forward, backward, weight, microbatches)
    bubble = share * others
    message = layout.micro_batch * work.seq_len / layout.cp * cases.model.hidden * work.compute_bytes
    transfer = transfer_seconds(cases, link, microbatches, message)

    counts = parameter_counts(cases)
    early = 1.0 + (layout.pp - 1.0) * (1.0 - 1.0 / layout.virtual_stages)  # some chunks end before the last
    early = np.minimum(early, microbatches)
    launches = 1.0 + BACKWARD_KERNELS
    passes = (forward + launch / launches, backward + launch * (BACKWARD_KERNELS / launches))
    waits = offload_waits(cases, held.middle, *passes, weight)
    beside = Beside(  # other transfers hide under those to the host too
        forward=passes[0] + waits[0],
        backward=passes[1] + waits[1],
        microbatches=microbatches,
        layers=held.middle,
        early=early,
    )
    data = data_seconds(cases, table, link, counts, beside)
    update = optimizer_seconds(cases, table, counts, held.middle, rates.bytes_per_second)
    nodes = layout.dp * layout.pp * layout.cp * layout.tp / cases.machine.devices_per_node
    waiting = table["straggler_share"] * np.log2(np.maximum(nodes, 1.0)) * (microbatches * busy + bubble)

    causes = {
        cause: microbatches * (stage.forward.get(cause, 0.0) + stage.backward.get(cause, 0.0))
        for cause in ("matmul", "attention", "elementwise", "recompute", "tensor", "context", "expert")
    }
    causes |= {
        "launch": microbatches * launch,
        "pipeline_bubble": bubble,
        "pipeline_transfer": transfer,
        "data": data + waiting,
        "optimizer": update + table["step_seconds"] + cases.machine.step_seconds,
        "offload": microbatches * (waits[0] + waits[1]),
    }
    shape = np.broadcast_shapes((len(cases),), *(np.shape(value) for value in causes.values()))
    causes = {cause: np.broadcast_to(causes[cause], shape) for cause in CAUSES}
    return TimeEstimate(step_seconds=sum(causes.values(), np.zeros(shape)), causes=causes, layers=layers)


def _check(cases: Cases) -> None:
    """Every number that something is divided by must be positive and finite."""
    machine, layout = cases.machine, cases.layout
    for part, names in ((machine, _RATES), (layout, _DEGREES), (cases.model, _SIZES), (cases.work, _WORK)):
        for name in names:
            column = getattr(part, name)
            if not np.all((column > 0) & (column < np.inf)):
                bad = column[~((column > 0) & (column < np.inf))].flat[0]
                raise PlanError(f"{type(part).__name__}.{name} must be positive and finite, got {bad:g}")


def with_recompute(cases: Cases, constants: Constants, layers: LayerTimes) -> Block:
    """The mean layer, whose backward begins by computing again what was not kept."""
    layout, layer = cases.layout, layers.layer
    full = np.where(layout.recompute == _FULL, layout.recompute_layers, 0.0)
    core = np.where(layout.recompute == _SELECTIVE, layout.recompute_layers, 0.0)
    if not (np.any(full) or np.any(core)):
        return layer
    skipped = np.where(cases.software.recompute_stops_early > 0, layers.last_product, 0.0)
    again = full * (total(layer.forward, CORE) - skipped) + core * layer.forward["attention"]
    repeated = {"expert": np.where(cases.software.recompute_stops_early > 0, 0.5, 1.0)}  # no combine
    backward = {
        cause: seconds + full * repeated.get(cause, 1.0) * layer.forward.get(cause, np.zeros(()))
        if cause not in CORE
        else seconds
        for cause, seconds in layer.backward.items()
    }
    return Block(
        forward=layer.forward,
        backward=backward | {"recompute": again},
        forward_kernels=layer.forward_kernels * (1.0 + full / 2.6),
        launches=layer.launches * (1.0 + full / 2.6),
        waits=layer.waits + full * cases.software.checkpoint_waits * constants["checkpoint_seconds"],
    )


def _slowest(
    cases: Cases, constants: Constants, layers: LayerTimes, layer: Block, held: StageLayers
) -> tuple[Block, Column]:
    """One microbatch on the slowest stage, and the seconds of all other stages together."""
    ends = (layers.embedding, layers.head)
    if not np.any(cases.layout.pp > 1):
        return weighted([(ends[0], 1.0), (layer, cases.model.layers), (ends[1], 1.0)]), np.zeros(())
    alone, several = cases.layout.pp == 1, cases.layout.pp > 2
    times = [_Times.of(cases, constants, block) for block in (layer, *ends)]
    turned = held.turned.astype(np.float64)
    first = _Times.seconds(times, (held.first, 1.0, turned))
    last = _Times.seconds(times, (held.last, 0.0, 1.0 - turned))
    middle = np.where(several, _Times.seconds(times, (held.middle, 0.0, 0.0)), 0.0)
    is_last = (last >= first) & (last >= middle)
    is_first = ~is_last & (first >= middle)
    own = np.where(is_last, held.last, np.where(is_first, held.first, held.middle))
    stage = weighted(
        [
            (ends[0], np.where(alone | is_first, 1.0, 0.0)),
            (layer, np.where(alone, cases.model.layers, own)),
            (ends[1], np.where(alone, 1.0, np.where(is_last, 1.0 - turned, is_first * turned))),
        ]
    )
    between = np.maximum(cases.layout.pp - 2.0, 0.0)
    mean = np.maximum(cases.model.layers - held.first - held.last, 0.0) / np.maximum(between, 1.0)
    whole = first + last + between * _Times.seconds(times, (mean, 0.0, 0.0))
    others = whole - np.where(is_last, last, np.where(is_first, first, middle))
    return stage, np.where(alone, 0.0, np.maximum(others, 0.0))


@frozen(kw_only=True, eq=False)
class _Times:
    """What one block takes of the device, gaps between kernels with it, of the host, and in waits."""

    device: Column
    host: Column
    waits: Column

    @classmethod
    def of(cls, cases: Cases, constants: Constants, block: Block) -> _Times:
        """Both passes of a block."""
        kernels = block.forward_kernels + block.backward_kernels
        scale = cases.machine.compute_scale
        launches = (1.0 + BACKWARD_KERNELS) * block.launches
        return cls(
            device=total(block.forward) + total(block.backward) + kernels * constants["gap_seconds"] * scale,
            host=launches * constants["launch_seconds"] * scale,
            waits=block.waits * scale,
        )

    @staticmethod
    def seconds(times: Sequence[_Times], counts: Sequence[Column | float]) -> Column:
        """So many of each, one after the other: the device's or the host's time, whichever is longer."""
        zero: Column = np.zeros(())
        device = sum((one.device * count for one, count in zip(times, counts, strict=True)), zero)
        host = sum((one.host * count for one, count in zip(times, counts, strict=True)), zero)
        waits = sum((one.waits * count for one, count in zip(times, counts, strict=True)), zero)
        return np.maximum(device, host) + waits


def pass_seconds(cases: Cases, constants: Constants, stage: Block) -> tuple[Column, Column, Column]:
    """Seconds of a microbatch forward and backward, and what the launches of its kernels add to both."""
    forward, backward = total(stage.forward), total(stage.backward)
    whole = _Times.seconds([_Times.of(cases, constants, stage)], [1.0])
    return forward, backward, np.maximum(whole - forward - backward, 0.0)


def _weight_seconds(stage: Block) -> Column:
    """The weight gradients' products: half of the backward's."""
    return stage.backward["matmul"] / 2.0
