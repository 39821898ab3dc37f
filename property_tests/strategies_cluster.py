"""Strategies for clusters: valid parts, the simplest being a small machine of round numbers."""

from __future__ import annotations

from hypothesis import strategies as st

from picotron.planner.cluster import (
    KINDS_OF_DEVICE,
    PRECISIONS,
    ClusterSpec,
    DeviceSpec,
    Efficiency,
    LinkSpec,
    Peaks,
)

rates = st.floats(min_value=1.0, max_value=1e18)
latencies = st.floats(min_value=0.0, max_value=1.0)
fractions = st.floats(min_value=1e-6, max_value=1.0)
names = st.text(min_size=1, max_size=8).filter(str.strip)


def peaks() -> st.SearchStrategy[Peaks]:
    """Any subset of the formats, with any peaks."""
    return st.builds(Peaks, **{name: st.none() | rates for name in PRECISIONS})


def devices() -> st.SearchStrategy[DeviceSpec]:
    """One device."""
    return st.builds(
        DeviceSpec,
        name=names,
        peak_flops_per_second=peaks(),
        memory_bytes=st.integers(1, 2**50),
        memory_bytes_per_second=rates,
        kind=st.sampled_from(KINDS_OF_DEVICE),
        source=names,
    )


def links() -> st.SearchStrategy[LinkSpec]:
    """One level of link."""
    return st.builds(LinkSpec, name=names, bytes_per_second=rates, latency_seconds=latencies, source=names)


def efficiencies() -> st.SearchStrategy[Efficiency]:
    """One software profile."""
    return st.builds(
        Efficiency, matmul=fractions, memory=fractions, link=fractions, kernel_seconds=latencies, source=names
    )


def clusters(max_nodes: int = 8, max_devices_per_node: int = 8) -> st.SearchStrategy[ClusterSpec]:
    """One cluster of up to ``max_nodes`` nodes."""
    return st.builds(
        ClusterSpec,
        name=names,
        device=devices(),
        devices_per_node=st.integers(1, max_devices_per_node),
        nodes=st.integers(1, max_nodes),
        intra_node=links(),
        inter_node=links(),
        efficiency=efficiencies(),
    )


@st.composite
def clusters_and_groups(draw: st.DrawFn) -> tuple[ClusterSpec, tuple[int, ...]]:
    """A cluster, and some of its ranks in any order."""
    cluster = draw(clusters(max_nodes=4, max_devices_per_node=4))
    ranks = st.lists(st.integers(0, cluster.num_devices - 1), min_size=1, max_size=8, unique=True)
    return cluster, tuple(draw(ranks))
