"""Collectives over columns, by hand and beside the scalar functions."""

from itertools import product

import numpy as np
import pytest
from attrs import evolve

from picotron.planner.cluster import ClusterSpec, group_link
from picotron.planner.collectives import collective_seconds
from picotron.planner.constants import default_constants
from picotron.planner.network import (
    Group,
    all_reduce_seconds,
    all_to_all_seconds,
    group,
    joined,
    links,
    ring_seconds,
    send_seconds,
    strides,
)
from tests.planner.estimated import IDEAL, case

CASES = case()
LINK = links(CASES, IDEAL)
NODE = Group(size=np.asarray(8.0), inside=np.asarray(8.0))
BYTES = np.asarray(2.0**30)


def test_a_ring_in_a_node_is_the_scalar_one() -> None:
    """Latency and bandwidth of ``collectives``, on the link of the node."""
    scalar = collective_seconds("all_gather", 2**30, 8, ClusterSpec.preset("h100").intra_node)
    assert ring_seconds(LINK, BYTES, NODE) == pytest.approx(scalar)
    both = collective_seconds("all_reduce", 2**30, 8, ClusterSpec.preset("h100").intra_node)
    assert ring_seconds(LINK, BYTES, NODE, rounds=2.0) == pytest.approx(both)


def test_a_ring_over_nodes_leaves_by_its_own_adapters() -> None:
    """16 ranks, 2 of each of 8 nodes: 15/16 of the bytes at twice 50 GB/s, 8 hops between nodes, 7 inside."""
    where = Group(size=np.asarray(16.0), inside=np.asarray(2.0))
    expected = 15 / 16 * 2**30 / 100e9 + 8 * 4.0e-6 + 8 * 1.9e-6
    assert ring_seconds(LINK, BYTES, where) == pytest.approx(expected)


def test_adapters_together_are_no_faster_than_the_node() -> None:
    """16 ranks, 8 of each of 2 nodes: 8 adapters of 50 GB/s are 400, and 450 is the most."""
    where = Group(size=np.asarray(16.0), inside=np.asarray(8.0))
    assert ring_seconds(LINK, BYTES, where) == pytest.approx(
        15 / 16 * 2**30 / 400e9 + 2 * 4.0e-6 + 14 * 1.9e-6
    )


def test_small_all_reduces_climb_trees() -> None:
    """Over 64 nodes of one rank each, 6 levels up and down are fewer than 126 steps."""
    where = Group(size=np.asarray(64.0), inside=np.asarray(1.0))
    assert all_reduce_seconds(LINK, np.asarray(8.0), where) == pytest.approx(2 * (8 / 50e9 + 6 * 4.0e-6))


def test_what_leaves_the_node_takes_its_own_adapter() -> None:
    """Of 16 ranks in 2 nodes a half of the bytes leave; twice as slow as 7/16 at 450 GB/s."""
    where = Group(size=np.asarray(16.0), inside=np.asarray(8.0))
    assert all_to_all_seconds(LINK, BYTES, where) == pytest.approx(2**29 / 50e9 + 4.0e-6)
    assert all_to_all_seconds(LINK, BYTES, where, 0.25) == pytest.approx(2**28 / 50e9 + 4.0e-6)


def test_a_group_of_one_costs_nothing() -> None:
    """Nor does an empty payload."""
    alone = Group(size=np.asarray(1.0), inside=np.asarray(1.0))
    assert ring_seconds(LINK, BYTES, alone) == all_reduce_seconds(LINK, BYTES, alone) == 0
    assert all_to_all_seconds(LINK, BYTES, alone) == ring_seconds(LINK, np.asarray(0.0), NODE) == 0
    assert send_seconds(LINK, BYTES, np.asarray(False)) == pytest.approx(2**30 / 450e9 + 1.9e-6)


def test_axes_outside_of_a_node_have_one_rank_in_it() -> None:
    """tp 4 and cp 2 fill a node of 8: data-parallel neighbours are a node apart, pipeline stages further."""
    cases = case(tp=4, cp=2, dp=4, pp=2)
    step = strides(cases)
    assert [float(step[axis]) for axis in ("tp", "cp", "dp", "pp")] == [1, 4, 8, 32]
    data, context = (group(cases, getattr(cases.layout, axis), step[axis]) for axis in ("dp", "cp"))
    both = joined(data, context)
    assert (data.inside, context.inside, both.inside, both.size) == (1, 2, 2, 8)


def test_columns_of_switches_that_sum_are_the_scalar_ones() -> None:
    """In a node, between nodes of one rank, and over both levels, where both must sum."""
    for intra, inter in product((0.0, 1.0), repeat=2):
        machine = evolve(CASES.machine, intra_reduces=np.asarray(intra), inter_reduces=np.asarray(inter))
        link = links(evolve(CASES, machine=machine), IDEAL)
        for ranks, where in (
            (range(8), NODE),
            ((0, 8), Group(size=np.asarray(2.0), inside=np.asarray(1.0))),
            (range(16), Group(size=np.asarray(16.0), inside=np.asarray(8.0))),
        ):
            cluster = ClusterSpec.preset("h100", nodes=2)
            cluster = evolve(
                cluster,
                intra_node=evolve(cluster.intra_node, in_network_reduction=bool(intra)),
                inter_node=evolve(cluster.inter_node, in_network_reduction=bool(inter)),
            )
            scalar = collective_seconds("all_reduce", 2**30, len(ranks), group_link(cluster, ranks))
            assert all_reduce_seconds(link, BYTES, where) == pytest.approx(
                scalar, rel=5e-3
            )  # latencies apart


def test_switches_that_sum_reach_less_of_their_rate_than_a_ring() -> None:
    """By the table's share: eight ranks gain less than the 7/4 that their bytes would give."""
    machine = evolve(CASES.machine, intra_reduces=np.asarray(1.0))
    ring, sums = (
        float(all_reduce_seconds(links(each, default_constants()), BYTES, NODE))
        for each in (CASES, evolve(CASES, machine=machine))
    )
    assert ring / sums == pytest.approx(7 / 4 * float(default_constants()["switch_share"]), rel=0.02)
