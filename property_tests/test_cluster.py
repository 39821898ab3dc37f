"""Theorems of clusters and of what their collectives cost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from picotron.planner.cluster import (
    ClusterSpec,
    achieved_link,
    cluster_from_json,
    cluster_to_json,
    group_link,
    link_between,
    preset_names,
)
from picotron.planner.collectives import KINDS, collective_seconds, wire_bytes
from property_tests.strategies_cluster import clusters, clusters_and_groups, efficiencies, links

payloads = st.integers(0, 2**40)
sizes = st.integers(1, 64)
kinds = st.sampled_from(KINDS)


@given(clusters())
def test_json_is_an_identity(cluster):
    """What is saved is read back, and saves to the same bytes."""
    text = cluster_to_json(cluster)
    assert cluster_from_json(text) == cluster
    assert cluster_to_json(cluster_from_json(text)) == text


@given(st.sampled_from(preset_names()), st.integers(1, 999), st.integers(1, 99))
def test_a_presets_name_parses_to_itself(name, nodes, devices_per_node):
    """The short form is the name of what it makes."""
    cluster = ClusterSpec.preset(name, nodes=nodes, devices_per_node=devices_per_node)
    assert ClusterSpec.parse(cluster.name) == cluster
    assert cluster.num_devices == nodes * devices_per_node


@given(clusters_and_groups())
def test_a_group_in_one_node_uses_its_links(case):
    """A group has the intra-node link exactly when its ranks share a node, and the network's if not."""
    cluster, ranks = case
    nodes = {rank // cluster.devices_per_node for rank in ranks}
    expected = cluster.intra_node if len(nodes) == 1 else cluster.inter_node
    assert link_between(cluster, ranks) == expected
    if len(nodes) == 1 or len(nodes) == len(ranks):
        assert group_link(cluster, ranks) == expected


@given(clusters_and_groups(), st.randoms())
def test_a_groups_link_does_not_depend_on_the_order(case, random):
    """A group is a set of ranks."""
    cluster, ranks = case
    shuffled = list(ranks)
    random.shuffle(shuffled)
    assert group_link(cluster, shuffled) == group_link(cluster, ranks)


@given(clusters_and_groups())
def test_a_ring_is_between_the_levels_it_crosses(case):
    """Its rate is a whole number of adapters' up to the intra-node rate, its latency a mean of the two."""
    cluster, ranks = case
    link = group_link(cluster, ranks)
    levels = (cluster.intra_node.latency_seconds, cluster.inter_node.latency_seconds)
    assert min(levels) * (1 - 1e-9) <= link.latency_seconds <= max(levels) * (1 + 1e-9)
    adapters = link.bytes_per_second / cluster.inter_node.bytes_per_second
    whole = adapters == pytest.approx(round(adapters)) and 1 <= round(adapters) <= cluster.devices_per_node
    assert whole or link.bytes_per_second == cluster.intra_node.bytes_per_second


@given(links(), efficiencies())
def test_software_makes_no_link_faster(link, efficiency):
    """An achieved rate is a fraction of the peak."""
    assert achieved_link(link, efficiency).bytes_per_second <= link.bytes_per_second


@given(payloads, sizes, links())
def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather(payload_bytes, size, link):
    """In bytes exactly, in seconds but for rounding."""
    halves = ("reduce_scatter", "all_gather")
    assert wire_bytes("all_reduce", payload_bytes, size) == sum(
        wire_bytes(kind, payload_bytes, size) for kind in halves
    )
    assert collective_seconds("all_reduce", payload_bytes, size, link) == pytest.approx(
        sum(collective_seconds(kind, payload_bytes, size, link) for kind in halves)
    )


@given(kinds, payloads, payloads, sizes, links())
def test_more_bytes_never_cost_less(kind, one, other, size, link):
    """Seconds and bytes on the wire grow with the payload."""
    less, more = sorted((one, other))
    assert wire_bytes(kind, less, size) <= wire_bytes(kind, more, size)
    assert collective_seconds(kind, less, size, link) <= collective_seconds(kind, more, size, link)


@given(kinds, payloads, sizes, sizes, links())
def test_more_ranks_never_cost_less(kind, payload_bytes, one, other, link):
    """Seconds grow with the group, up to the padding of chunks: a payload each rank divides has none."""
    few, many = sorted((one, other))
    padded = payload_bytes * few * many
    assert collective_seconds(kind, padded, few, link) <= collective_seconds(kind, padded, many, link) * (
        1 + 1e-12
    )


@given(payloads, st.integers(2, 64))
def test_a_ring_meets_the_lower_bound_but_for_padding(payload_bytes, size):
    """Each rank must send 2 (p-1)/p of an all-reduced tensor; padding adds less than 2 (p-1) bytes."""
    bound = 2 * (size - 1) * payload_bytes
    assert bound <= wire_bytes("all_reduce", payload_bytes, size) * size < bound + 2 * (size - 1) * size


@given(kinds, payloads, links())
def test_a_group_of_one_is_free(kind, payload_bytes, link):
    """No bytes and no seconds."""
    assert wire_bytes(kind, payload_bytes, 1) == 0
    assert collective_seconds(kind, payload_bytes, 1, link) == 0
