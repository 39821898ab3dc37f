"""Seconds of collectives for whole columns: by algorithm, size and the levels of the network they cross.

Hockney's model: steps times latency plus bytes over bandwidth. A group has ``size`` ranks of which ``inside``
share each node; a ring over it leaves every node by as many adapters as it has ranks there, so that its rate
is ``inside`` times one adapter's but no more than the node's own links (as ``cluster.group_link``). Sources:
Thakur, Rabenseifner and Gropp 2005; Patarasuk and Yuan 2009; for trees Sanders, Speck and Traeff 2009.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from attrs import frozen

from picotron.planner.cases import ORDERS, Cases, Column
from picotron.planner.constants import Constants


@frozen(kw_only=True, eq=False)
class Group:
    """A communicator: how many ranks, and how many of them share a node."""

    size: Column
    inside: Column
    reach: Column | float = (
        1.0  # share of its adapters' rate, where they are far from the ranks that use them
    )


@frozen(kw_only=True, eq=False)
class Links:
    """Rates and latencies that collectives reach at both levels."""

    intra: Column
    inter: Column
    intra_seconds: Column
    inter_seconds: Column
    start_seconds: Column
    intra_reduces: Column
    inter_reduces: Column
    switch_share: Column


def links(cases: Cases, constants: Constants) -> Links:
    """What every case's machine reaches."""
    machine, scale = cases.machine, cases.machine.communication_scale
    return Links(
        intra=machine.intra_bytes_per_second * constants["intra_share"] / scale,
        inter=machine.inter_bytes_per_second * constants.by("inter_share", machine.architecture) / scale,
        intra_seconds=machine.intra_seconds * scale,
        inter_seconds=machine.inter_seconds * scale,
        start_seconds=constants["collective_seconds"] * scale,
        intra_reduces=machine.intra_reduces,
        inter_reduces=machine.inter_reduces,
        switch_share=constants["switch_share"],
    )


def strides(cases: Cases) -> Mapping[str, Column]:
    """Distance in ranks between neighbours along each axis, under the layout's order of axes."""
    layout = cases.layout
    order = layout.order.astype(np.intp)
    found: dict[str, Column] = {}
    for axis in ("pp", "dp", "cp", "tp"):
        choices = [_stride(cases, axes, axis) for axes in ORDERS]
        found[axis] = np.choose(order, choices) if np.any(order) else choices[0]
    return found


def _stride(cases: Cases, axes: tuple[str, ...], axis: str) -> Column:
    product: Column = np.ones(())
    for later in axes[axes.index(axis) + 1 :]:
        product = product * getattr(cases.layout, later)
    return product


def group(cases: Cases, size: Column, stride: Column) -> Group:
    """The group of ``size`` ranks, ``stride`` apart."""
    return Group(size=size, inside=np.clip(cases.machine.devices_per_node // stride, 1.0, size))


def expert_group(cases: Cases, size: Column, stride: Column) -> Group:
    """The group of ``size`` ranks that are ``stride`` apart in the order of one stage's ranks."""
    layout, per_node, step = cases.layout, cases.machine.devices_per_node, strides(cases)["pp"]
    period = step * layout.pp
    of_stage = np.where(period <= per_node, step * (per_node // period), np.minimum(step, per_node))
    return Group(size=size, inside=np.clip(of_stage // stride, 1.0, size))


def joined(outer: Group, inner: Group) -> Group:
    """The group over two axes together."""
    return Group(size=outer.size * inner.size, inside=outer.inside * inner.inside)


def ring_seconds(link: Links, payload_bytes: Column, where: Group, rounds: float = 1.0) -> Column:
    """A ring all-gather or reduce-scatter of ``payload_bytes``, the whole tensor; 2 rounds all-reduce."""
    crosses = where.size > where.inside
    rate = np.where(crosses, np.minimum(link.inter * where.inside * where.reach, link.intra), link.intra)
    nodes = where.size / where.inside
    hops = np.where(crosses, nodes * link.inter_seconds, 0.0) + (where.size - nodes) * link.intra_seconds
    bytes_sent = payload_bytes * (where.size - 1.0) / where.size
    seconds = rounds * (bytes_sent / rate + hops) + link.start_seconds
    return np.where((where.size > 1) & (payload_bytes > 0), seconds, 0.0)


def all_reduce_seconds(link: Links, payload_bytes: Column, where: Group) -> Column:
    """The quickest of a ring, a double tree and, where all switches on the way sum, their there and back.

    They send 2 (p-1)/p n bytes, 2 n (latency by the logarithm), and n (Graham et al. 2016, COMHPC: SHARP).
    """
    ring = ring_seconds(link, payload_bytes, where, rounds=2.0)
    nodes = where.size / where.inside
    crosses = where.size > where.inside
    rate = np.where(crosses, np.minimum(link.inter * where.inside * where.reach, link.intra), link.intra)
    depth = np.log2(np.maximum(nodes, 1.0)) * link.inter_seconds + (where.inside - 1.0) * link.intra_seconds
    tree = 2.0 * (payload_bytes / rate + depth) + link.start_seconds
    quickest = np.minimum(ring, tree)
    if np.any(link.intra_reduces) or np.any(link.inter_reduces):
        hops = np.where(crosses, link.inter_seconds, 0.0) + link.intra_seconds
        switched = payload_bytes / (rate * link.switch_share) + 2.0 * hops + link.start_seconds
        in_node = (link.intra_reduces > 0) | (where.inside == 1)
        sums = np.where(crosses, (link.inter_reduces > 0) & in_node, link.intra_reduces > 0)
        quickest = np.where(sums, np.minimum(quickest, switched), quickest)
    return np.where((where.size > 1) & (payload_bytes > 0), quickest, 0.0)


def all_to_all_seconds(
    link: Links,
    payload_bytes: Column,
    where: Group,
    leaving: Column | float | None = None,
    staying: Column | float | None = None,
) -> Column:
    """Every rank sends an equal part of its ``payload_bytes`` to each, by its adapter and its node's links.

    ``leaving`` and ``staying`` are the shares of the bytes that cross the network and the node's own links
    where they are not those of equal parts.
    """
    leaving = 1.0 - where.inside / where.size if leaving is None else leaving
    staying = (where.inside - 1.0) / where.size if staying is None else staying
    slower = np.maximum(payload_bytes * leaving / link.inter, payload_bytes * staying / link.intra)
    hop = np.where(leaving > 0, link.inter_seconds, link.intra_seconds)
    seconds = slower + hop + link.start_seconds
    return np.where((where.size > 1) & (payload_bytes > 0), seconds, 0.0)


def send_seconds(link: Links, payload_bytes: Column, leaves: Column) -> Column:
    """One message to a neighbour, which ``leaves`` the node or not."""
    rate = np.where(leaves, link.inter, link.intra)
    hop = np.where(leaves, link.inter_seconds, link.intra_seconds)
    seconds: Column = payload_bytes / rate + hop + link.start_seconds
    return seconds
