"""Data parallelism's part of a step: reducing gradients, gathering parameters, updating.

Gradients of a device's parameters are reduced over its data-parallel group once a step (each microbatch where
gradients are sharded), under the backward of the last microbatch where the profile overlaps; sharded
parameters are gathered under the forward. ZeRO-3 and FSDP gather every layer in both passes of every
microbatch and reduce its gradients, each under the computing of a layer. What is hidden slows the computing
beside it by a stated share. Rajbhandari et al. 2020, arXiv:1910.02054; Zhao et al. 2023, arXiv:2304.11277.
"""

from __future__ import annotations

import numpy as np
from attrs import evolve, frozen

from picotron.planner.cases import RECOMPUTES, Cases, Column
from picotron.planner.constants import Constants
from picotron.planner.network import (
    Group,
    Links,
    all_reduce_seconds,
    expert_group,
    group,
    joined,
    ring_seconds,
    strides,
)
from picotron.planner.parameter_counts import ParameterCounts

FULL = RECOMPUTES.index("full")
HOST_STATE_BYTES = 30.0  # a parameter's 32-bit copy and moments, read and written, its gradient and new value


@frozen(kw_only=True, eq=False)
class Beside:
    """What data-parallel transfers may hide under: seconds of a microbatch on the stage, and their number."""

    forward: Column
    backward: Column
    microbatches: Column
    layers: Column
    early: Column  # passes of one microbatch during which some chunk's transfers may already run


def data_groups(cases: Cases) -> tuple[Group, Group, Group]:
    """The groups over which dense parameters are sharded and copied, and over which an expert is."""
    layout, step = cases.layout, strides(cases)
    both = joined(group(cases, layout.dp, step["dp"]), group(cases, layout.cp, step["cp"]))
    shard = np.where(layout.zero_stage > 0, np.clip(layout.shard, 1.0, both.size), 1.0)
    inside = np.minimum(both.inside, shard)
    copies = Group(size=both.size / shard, inside=np.maximum(both.inside / inside, 1.0))
    experts = layout.ep * layout.etp
    own = np.maximum(both.size * layout.tp / experts, 1.0)
    ranks = expert_group(cases, own, experts)
    return Group(size=shard, inside=inside), copies, ranks


def data_seconds(
    cases: Cases, constants: Constants, link: Links, counts: ParameterCounts, beside: Beside
) -> Column:
    """Exposed seconds a step of reductions and gathers, with what hidden ones take from computing."""
    work, layout, software = cases.work, cases.layout, cases.software
    shard, copies, own = data_groups(cases)
    shard, copies = (_reached(cases, constants, each) for each in (shard, copies))
    ends = counts.embedding + np.where(layout.pp > 1, 0.0, counts.head)
    dense = beside.layers * counts.layer + ends
    experts = beside.layers * counts.layer_experts
    fully = layout.zero_stage >= 3
    each = np.where(layout.zero_stage >= 2, beside.microbatches, 1.0)

    gradient = dense * work.wire_bytes
    unit = np.where(fully, counts.layer, 0.0)  # what is sharded fully comes and goes a layer at a time
    reduce_shard = _in_buckets(cases, link, gradient, shard, unit * work.wire_bytes)
    reduce_copies = all_reduce_seconds(link, gradient / shard.size, copies)
    reduce_experts = all_reduce_seconds(link, experts * work.wire_bytes, own)
    gather = _in_buckets(cases, link, dense * work.compute_bytes, shard, unit * work.compute_bytes)
    gather_experts = np.where(fully, ring_seconds(link, experts * work.compute_bytes, own), 0.0)
    gather = gather + gather_experts

    once = copies.size > 1
    halves = each * ring_seconds(link, experts * work.wire_bytes, own) + ring_seconds(
        link, experts * work.compute_bytes, own
    )  # scattered sums of each microbatch, and new parameters
    of_experts = np.where(layout.zero_stage == 2, halves, reduce_experts)
    reduced = each * reduce_shard + np.where(once, reduce_copies, 0.0) + of_experts
    hide_reduce = _exposed(
        constants, reduced, np.maximum(each, beside.early) * beside.backward, software.reduce_overlap
    )
    hide_gather = _exposed(constants, gather, beside.early * beside.forward, software.gather_overlap)
    ordinary = hide_reduce + np.where(layout.zero_stage > 0, hide_gather, 0.0)

    per_layer = 1.0 / np.maximum(beside.layers, 1.0)
    ahead = gather * per_layer  # the first layer of a step has nothing to hide under
    forwards = _exposed(constants, gather, beside.forward, software.gather_overlap)
    again = (layout.recompute == FULL) & (
        software.recompute_stops_early == 0
    )  # gathered for both of its halves
    backwards = _exposed(
        constants,
        gather * np.where(again, 2.0, 1.0) + reduce_shard,
        beside.backward,
        np.minimum(software.gather_overlap, software.reduce_overlap),
    )
    late = np.where(once, reduce_copies, 0.0) + reduce_experts
    sharded = beside.microbatches * (forwards + backwards) + ahead + late
    return np.where(fully, sharded, ordinary)


def _reached(cases: Cases, constants: Constants, where: Group) -> Group:
    """The group with the share of its adapters' rate that it reaches.

    A ring that enters and leaves a node by one adapter has both ends beside it where its ranks are
    neighbours, or one rank is alone; else one end is far, unless the library hands messages on in the node.
    """
    apart = (where.inside > 1) & (cases.layout.tp * cases.layout.cp > 1)
    far = np.where(apart, cases.software.far_adapters, 0.0) > 0
    return evolve(where, reach=np.where(far, constants["far_adapter_share"], 1.0))


def _exposed(constants: Constants, seconds: Column, beside: Column, overlaps: Column) -> Column:
    """What remains of a transfer that may hide under ``beside``, and what it slows there."""
    hidden = np.minimum(seconds * constants["hidden_share"], beside) * (overlaps > 0)
    left: Column = seconds - hidden * (1.0 - constants["interference"])
    return left


def _in_buckets(cases: Cases, link: Links, payload_bytes: Column, where: Group, unit_bytes: Column) -> Column:
    """One half of an all-reduce, in as many messages as there are buckets, none smaller than a unit."""
    bucket = np.maximum(cases.software.bucket_bytes, unit_bytes)
    extra = np.maximum(payload_bytes / bucket - 1.0, 0.0)
    one = ring_seconds(link, payload_bytes, where)
    again = ring_seconds(link, np.minimum(payload_bytes, 1.0), where)
    together: Column = one + extra * again
    return together


def optimizer_seconds(
    cases: Cases, constants: Constants, counts: ParameterCounts, layers: Column, bytes_per_second: Column
) -> Column:
    """Gradient norm, update and clearing, bound by memory; the optimizer's state may be sharded.

    On the host it keeps 32-bit copies and moments there, whatever the device holds (Ren et al. 2021).
    """
    work, layout = cases.work, cases.layout
    shard, _, own = data_groups(cases)
    ends = counts.embedding + np.where(layout.pp > 1, 0.0, counts.head)
    dense, experts = layers * counts.layer + ends, layers * counts.layer_experts
    state = 2.0 * (work.main_bytes + work.moment_bytes) + work.gradient_bytes + work.compute_bytes
    kept = np.where(layout.zero_stage > 0, dense / shard.size + experts / own.size, dense + experts)
    gradients = np.where(layout.zero_stage >= 2, kept, dense + experts)
    on_device = (kept * state + gradients * constants["optimizer_bytes"]) / bytes_per_second
    crossing = kept * (work.gradient_bytes + work.compute_bytes) / cases.machine.host_bytes_per_second
    on_host = crossing + kept * HOST_STATE_BYTES / constants["host_update_bytes_per_second"]
    seconds: Column = np.where(cases.software.optimizer_on_host > 0, on_host, on_device)
    return seconds
