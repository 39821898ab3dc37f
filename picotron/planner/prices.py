"""What communication costs in a world, as one function of who talks: a simulated clock asks it.

A price never depends on what else is going on, so the time of an operation does not depend on the order in
which ranks are looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from picotron.planner.cluster import ClusterSpec, achieved_link, group_link, link_between
from picotron.planner.collectives import KINDS, collective_seconds
from picotron.planner.cost import group_seconds, send_seconds
from picotron.planner.plan import TrainingPlan
from picotron.planner.program import HOST

Price = Callable[[str, str, tuple[int, ...], int], float]
"""Seconds of (kind, group name, ranks, payload bytes); a message's ranks are its sender and its receiver."""


def plan_price(plan: TrainingPlan) -> Price:
    """The prices that ``predict(plan)`` counts with: of one kind of group, those of its slowest."""

    @cache
    def priced(kind: str, group: str, payload_bytes: int) -> float:
        if kind == "send":
            return send_seconds(plan, payload_bytes)
        if group == HOST:
            return copy_seconds(plan, payload_bytes)
        return group_seconds(plan, kind, group, payload_bytes)

    return lambda kind, group, ranks, payload_bytes: priced(kind, group, payload_bytes)


def copy_seconds(plan: TrainingPlan, payload_bytes: int) -> float:
    """Seconds of a copy between a device and its host, in either direction."""
    return payload_bytes / plan.cluster.device.host_bytes_per_second


def cluster_price(cluster: ClusterSpec) -> Price:
    """Every operation over the very links that its ranks have; a kind without a known cost is free."""

    @cache
    def priced(kind: str, ranks: tuple[int, ...], payload_bytes: int) -> float:
        if kind not in KINDS or len(ranks) < 2:
            return 0.0
        link = (link_between if kind in ("send", "all_to_all") else group_link)(cluster, ranks)
        return collective_seconds(kind, payload_bytes, len(ranks), achieved_link(link, cluster.efficiency))

    return lambda kind, group, ranks, payload_bytes: priced(kind, ranks, payload_bytes)
