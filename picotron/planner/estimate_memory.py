"""Bytes on the fullest pipeline rank at the fullest moment of a step, by class, for many cases at once.

What stands all the time is counted from shapes; what comes and goes is counted by named tensor at the
moments that can be the fullest: the first backward with all microbatches in flight, in its last layer or in
the head; where W is put off, the end of an I, with most chunks in flight or with most waiting for W; and the
optimizer's step. The pipeline ranks looked at are the first, the second, the last and the
first without dense layers in front of its experts (which are few); and, where a schedule holds more towards
the end, the last but one and the one at the edge of those with a layer more than others. Any other has
neither embedding nor head, no more layers than one of these before or behind it and, by ``in_flight``, no
more in flight.

Sources: Rajbhandari et al. 2020, ZeRO, arXiv:1910.02054; Zhao et al. 2023, FSDP, arXiv:2304.11277;
Korthikanti et al. 2022, arXiv:2205.05198; Narayanan et al. 2021, arXiv:2104.04473.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from attrs import AttrsInstance, fields, frozen

from picotron.planner.cases import Cases, Column
from picotron.planner.held_weights import held_weights, layer_weights, widths
from picotron.planner.in_flight import InFlight, holds_more_behind, in_flight, is_v_placed, splits_backward
from picotron.planner.moving_bytes import (
    Blocks,
    blocks_of,
    chunk_of,
    first_layer,
    in_flight_bytes,
    last_layer,
)
from picotron.planner.side_bytes import (
    Transfers,
    communication,
    fragmentation_share,
    framework,
    head_placeholder,
    library_workspace,
    placeholders,
    position_table,
)
from picotron.planner.stage_columns import RankLayers, first_sparse_rank, rank_layers, uneven_rank
from picotron.planner.standing_bytes import standing_bytes

CLASSES = (
    "parameters",
    "gradients",
    "main",
    "moments",
    "activations",
    "logits",
    "communication",
    "workspace",
    "framework",
    "fragmentation",
)
APART = ("framework", "fragmentation")  # not counted as allocated
BLOCK = 16_384  # cases at a time


@frozen(kw_only=True, eq=False)
class MemoryEstimate:
    """Bytes of the fullest pipeline rank at its fullest moment, by class; ``rank`` is its position."""

    classes: Mapping[str, Column]
    rank: Column

    @property
    def allocated_bytes(self) -> Column:
        """Bytes of tensors: what an allocator counts as allocated."""
        return sum((v for k, v in self.classes.items() if k not in APART), start=np.zeros(()))

    @property
    def pool_bytes(self) -> Column:
        """Tensors and what fragmentation wastes: what a caching allocator reserves."""
        pool: Column = self.allocated_bytes + self.classes["fragmentation"]
        return pool

    @property
    def reserved_bytes(self) -> Column:
        """All classes: what the device's own tools show."""
        return sum(self.classes.values(), start=np.zeros(()))


def estimate_bytes(cases: Cases, *, imbalance: float = 1.0) -> MemoryEstimate:
    """The fullest rank of each case. ``imbalance``: what the fullest expert rank sees over the mean."""
    parts = [_estimate(block, imbalance) for block in _in_blocks(cases)]
    if len(parts) == 1:
        return parts[0]
    return MemoryEstimate(
        classes={name: np.concatenate([part.classes[name] for part in parts]) for name in CLASSES},
        rank=np.concatenate([part.rank for part in parts]),
    )


def _in_blocks(cases: Cases) -> Iterator[Cases]:
    """The cases, as many at a time as stay in a processor's cache."""
    number = len(cases)
    if number <= BLOCK:
        yield cases
        return
    parts = {part.name: getattr(cases, part.name) for part in fields(Cases)}
    for start in range(0, number, BLOCK):
        yield Cases(**{name: _sliced(part, slice(start, start + BLOCK)) for name, part in parts.items()})


def _sliced(part: AttrsInstance, where: slice) -> Any:
    """The rows of the columns that have a row for each case."""
    values = {column.name: getattr(part, column.name) for column in fields(type(part))}
    return type(part)(**{name: value[where] if value.size > 1 else value for name, value in values.items()})


def _estimate(cases: Cases, imbalance: float) -> MemoryEstimate:
    blocks = blocks_of(cases, imbalance)
    positions = _positions(cases)
    found = [_rank_bytes(blocks, position) for position in positions]
    sums = [sum(classes.values()) for classes in found]
    shape = np.broadcast_shapes((len(cases),), *(np.shape(s) for s in sums))
    fullest = np.stack([np.broadcast_to(s, shape) for s in sums]).argmax(axis=0)

    def chosen(columns: Sequence[Column]) -> Column:
        made = np.array(np.broadcast_to(columns[0], shape), dtype=np.float64)
        for index, column in enumerate(columns[1:], start=1):
            np.copyto(made, column, where=fullest == index)
        return made

    classes = {name: chosen([one[name] for one in found]) for name in CLASSES}
    return MemoryEstimate(classes=classes, rank=chosen(positions))


def bytes_at(cases: Cases, position: Column, *, imbalance: float = 1.0) -> Mapping[str, Column]:
    """The classes on one pipeline rank of each case."""
    return _rank_bytes(blocks_of(cases, imbalance), np.asarray(position, dtype=np.float64))


def always_bytes(cases: Cases) -> Column:
    """What stands all the time on the rank that holds most of it, and the framework's own: a lower bound.

    Of parameters, gradients and optimizer state, whatever a schedule, recomputation and offload add.
    """
    w = widths(cases.model, cases.layout)
    layer = layer_weights(cases.model, cases.layout, w)
    most: Column = np.zeros(())
    for position in _positions(cases):
        layers = rank_layers(cases.model, cases.layout, position)
        standing = standing_bytes(cases, held_weights(cases.model, cases.layout, w, layer, layers))
        own = standing.parameters + standing.gradients + standing.main + standing.moments
        most = np.maximum(most, own)
    always: Column = most + framework(cases)
    return always


def _positions(cases: Cases) -> list[Column]:
    """The pipeline ranks that can be the fullest (see the module's docstring)."""
    model, last = cases.model, cases.layout.pp - 1
    found, long = [np.zeros_like(last)], bool(np.any(last > 1))
    if long:
        found.append(np.minimum(last, 1.0))
    behind = holds_more_behind(cases.layout)
    if long and (behind.any() or np.any((model.moe_layers > 0) & (model.moe_layers < model.layers))):
        edge = uneven_rank(model, cases.layout)
        found.append(np.where(behind, edge, first_sparse_rank(model, cases.layout)))
    if long and behind.any():
        found.append(np.maximum(last - 1, 0.0))
    return [*found, last] if np.any(last > 0) else found


@frozen(kw_only=True, eq=False)
class _Moment:
    """Bytes that come and go, at one moment."""

    activations: Column
    logits: Column
    workspace: Column
    communication: Column


def _rank_bytes(blocks: Blocks, position: Column) -> dict[str, Column]:
    """The classes on the rank at ``position``, at the fuller of the step's fullest moments."""
    cases, layout = blocks.cases, blocks.cases.layout
    layers = rank_layers(cases.model, layout, position)
    held = held_weights(cases.model, layout, blocks.widths, blocks.layer, layers)
    standing = standing_bytes(cases, held)
    transfers = communication(blocks, layers, held, standing)
    fullest = _fullest(blocks, layers, in_flight(cases, position), transfers)
    always = placeholders(blocks, layers) + library_workspace(cases) + position_table(cases)
    moment = fullest.activations + fullest.communication + fullest.logits + fullest.workspace
    backward = (moment >= standing.update) * 1.0
    return {
        "parameters": standing.parameters,
        "gradients": standing.gradients,
        "main": standing.main,
        "moments": standing.moments,
        "activations": backward * fullest.activations,
        "logits": backward * fullest.logits,
        "communication": backward * fullest.communication,
        "workspace": always + np.where(backward > 0, fullest.workspace, standing.update),
        "framework": framework(cases),
        "fragmentation": fragmentation_share(cases) * (np.maximum(moment, standing.update) + always),
    }


def _fullest(blocks: Blocks, layers: RankLayers, flight: InFlight, transfers: Transfers) -> _Moment:
    """The fullest moment of the backward: in the last layer or the head, or where W is put off in the first.

    By then all other layers, and the head, have left what W needs.
    """
    chunk, split = chunk_of(blocks, layers), splits_backward(blocks.cases.layout)
    heads = np.where(split, flight.split, flight.head - 1)
    head, for_head = layers.last * blocks.head.highest, head_placeholder(blocks, layers)
    layer = last_layer(blocks, layers)
    in_head = head + for_head > layer + transfers.ahead
    logits, working = in_head * head, np.where(in_head, for_head, layer)
    moving = transfers.total - in_head * transfers.ahead
    begins = in_flight_bytes(chunk, flight.whole, flight.split, heads, copies=True)
    if not split.any():
        return _Moment(activations=begins, logits=logits, workspace=working, communication=moving)
    whole, waiting = flight.whole - flight.turned, flight.split + flight.turned
    ends = in_flight_bytes(chunk, whole, waiting, flight.split + 1, copies=False)
    if flight.late_split is not flight.split:
        whole, waiting = flight.late_whole, flight.late_split
        # in a V one of those that wait is of the rank's other stage
        heads = np.where(split, np.maximum(0, waiting - is_v_placed(blocks.cases.layout)), heads)
        late = in_flight_bytes(chunk, whole, waiting, heads, copies=True)
        begins = np.maximum(begins, late)
        late = in_flight_bytes(chunk, whole - 1, waiting + 1, heads + 1, copies=False)
        ends = np.maximum(ends, late)
    first = first_layer(blocks, layers)
    at_end = split & (ends + first + transfers.total > begins + logits + working + moving)
    return _Moment(
        activations=np.where(at_end, ends, begins),
        logits=~at_end * logits,
        workspace=np.where(at_end, first, working),
        communication=np.where(at_end, transfers.total, moving),
    )
