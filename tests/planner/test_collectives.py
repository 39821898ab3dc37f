"""Examples of what collectives cost, each worked by hand."""

from __future__ import annotations

from itertools import product

import pytest
from attrs import evolve

from picotron.errors import PlanError
from picotron.planner.cluster import ClusterSpec, LinkSpec, group_link
from picotron.planner.collectives import (
    KINDS,
    all_gather_seconds,
    all_reduce_seconds,
    all_to_all_seconds,
    broadcast_seconds,
    collective_seconds,
    reduce_scatter_seconds,
    send_seconds,
    wire_bytes,
)

LINK = LinkSpec(name="link", bytes_per_second=100e9, latency_seconds=5e-6, source="test")
GB = 10**9


def test_ring_all_reduce_of_a_gigabyte_over_four() -> None:
    """Six steps of a quarter each: 1.5 GB at 100 GB/s is 15 ms, and six latencies of 5 us."""
    assert all_reduce_seconds(GB, 4, LINK) == pytest.approx(2 * (3 / 4) * 1e9 / 1e11 + 6 * 5e-6)
    assert all_reduce_seconds(GB, 4, LINK) == pytest.approx(0.01503)


@pytest.mark.parametrize("seconds", [all_gather_seconds, reduce_scatter_seconds, all_to_all_seconds])
def test_the_halves_send_all_but_one_chunk(seconds) -> None:
    """Three steps of a quarter each: 7.5 ms and 15 us."""
    assert seconds(GB, 4, LINK) == pytest.approx(0.007515)


def test_a_broadcast_passes_everything_along_a_chain() -> None:
    """The chain is filled after three latencies, then runs at the link's rate."""
    assert broadcast_seconds(GB, 4, LINK) == pytest.approx(0.01 + 15e-6)


def test_a_send_is_one_message() -> None:
    """1 GB at 100 GB/s is 10 ms, and one latency."""
    assert send_seconds(GB, LINK) == pytest.approx(0.01 + 5e-6)


@pytest.mark.parametrize(
    ("kind", "sent"),
    [
        ("all_reduce", 1200),
        ("all_gather", 600),
        ("reduce_scatter", 600),
        ("all_to_all", 600),
        ("broadcast", 800),
        ("send", 800),
    ],
)
def test_wire_bytes_of_800_bytes_over_four(kind: str, sent: int) -> None:
    """Chunks of 200 bytes: three in each half of an all-reduce."""
    assert wire_bytes(kind, 800, 4) == sent


def test_chunks_are_padded_to_equal_sizes() -> None:
    """10 bytes over 4 ranks are chunks of 3, of which each rank sends 3."""
    assert wire_bytes("all_gather", 10, 4) == 9
    assert wire_bytes("all_reduce", 10, 4) == 18


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_of_one_costs_nothing(kind: str) -> None:
    """There is nobody to send to."""
    assert collective_seconds(kind, GB, 1, LINK) == 0
    assert wire_bytes(kind, GB, 1) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_payload_still_waits(kind: str) -> None:
    """The steps are taken whatever they carry."""
    steps = {"all_reduce": 14, "send": 1}.get(kind, 7)
    assert collective_seconds(kind, 0, 8, LINK) == pytest.approx(steps * 5e-6)


@pytest.mark.parametrize(
    ("kind", "payload_bytes", "size", "words"),
    [
        ("gather", 1, 2, "a collective must be one of"),
        ("send", -1, 2, "payload_bytes must be at least 0, got -1"),
        ("send", 1, 0, "size must be at least 1, got 0"),
    ],
)
def test_requests_that_make_no_sense_are_refused(kind, payload_bytes, size, words) -> None:
    """Unknown kinds, negative bytes and empty groups have no cost."""
    with pytest.raises(PlanError, match=words):
        wire_bytes(kind, payload_bytes, size)
    with pytest.raises(PlanError, match=words):
        collective_seconds(kind, payload_bytes, size, LINK)


def test_switches_that_sum_halve_a_large_all_reduce() -> None:
    """Eight ranks, 16 bytes: a ring sends 28 in 14 steps; through summing switches each sends 16 in two."""
    ring = LinkSpec(name="ring", bytes_per_second=1, latency_seconds=0.5, source="invented")
    sums = evolve(ring, in_network_reduction=True)
    assert all_reduce_seconds(16, 8, ring) == 14 * 0.5 + 28
    assert all_reduce_seconds(16, 8, sums) == 2 * 0.5 + 16
    assert all_reduce_seconds(16, 2, sums) == 2 * 0.5 + 16  # of two ranks a ring does as well
    for kind in ("all_gather", "reduce_scatter", "all_to_all", "broadcast", "send"):
        assert collective_seconds(kind, 16, 8, sums) == collective_seconds(kind, 16, 8, ring)


def test_a_group_over_nodes_needs_both_levels_to_sum() -> None:
    """Two nodes of eight: with summing switches in the node or in the network alone, it stays a ring."""
    cluster = ClusterSpec.parse("h100:2x8")
    for intra, inter in product((False, True), repeat=2):
        made = evolve(
            cluster,
            intra_node=evolve(cluster.intra_node, in_network_reduction=intra),
            inter_node=evolve(cluster.inter_node, in_network_reduction=inter),
        )
        assert group_link(made, range(16)).in_network_reduction == (intra and inter)
        assert group_link(made, range(8)).in_network_reduction == intra
        assert group_link(made, (0, 8)).in_network_reduction == inter
