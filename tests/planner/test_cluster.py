"""Examples of clusters, checkable by hand and against the data sheets that the presets name."""

from __future__ import annotations

import json

import pytest
from attrs import evolve

from picotron.errors import PlanError
from picotron.planner.cluster import (
    PRECISIONS,
    ClusterSpec,
    DeviceSpec,
    Efficiency,
    LinkSpec,
    achieved_link,
    cluster_from_json,
    cluster_to_json,
    group_link,
    link_between,
    load_cluster,
    peak_flops_per_second,
    preset_names,
)
from picotron.planner.measured import CallCost, KernelCost, MeasuredCosts, ProductCost

TWO_NODES = ClusterSpec.preset("h100", nodes=2)


def test_presets_are_the_published_machines() -> None:
    """Every machine of the table is valid, one node of it, and has its own name."""
    assert preset_names() == (
        "v100", "v100-16gb", "a100-40gb", "a100-80gb", "h100", "h200", "b200", "gb200", "mi300x", "cpu",
    )  # fmt: skip
    for name in preset_names():
        cluster = ClusterSpec.preset(name)
        assert (cluster.device.name, cluster.nodes) == (name, 1)
        assert cluster.num_devices == (72 if name == "gb200" else 8)


@pytest.mark.parametrize("name", preset_names())
def test_every_number_names_its_source(name: str) -> None:
    """A data sheet or a measurement stands behind each group of numbers, or the word assumption."""
    cluster = ClusterSpec.preset(name)
    for part in (cluster.device, cluster.intra_node, cluster.inter_node, cluster.efficiency):
        assert any(word in part.source.lower() for word in ("data sheet", "assumption")), part


@pytest.mark.parametrize(
    ("name", "bf16", "fp8"),
    [
        ("a100-80gb", 312e12, None),
        ("h100", 989e12, 1979e12),
        ("h200", 989e12, 1979e12),
        ("b200", 2250e12, 4500e12),
        ("gb200", 2450e12, 4900e12),
        ("mi300x", 1307.4e12, 2614.9e12),
    ],
)
def test_peaks_are_dense(name: str, bf16: float, fp8: float | None) -> None:
    """Utilisation is counted over the dense peak, half of the sparse one that data sheets print first."""
    peaks = ClusterSpec.preset(name).device.peak_flops_per_second
    assert (peaks.bf16, peaks.fp8) == (bf16, fp8)


@pytest.mark.parametrize("name", preset_names())
def test_a_machine_hangs_together(name: str) -> None:
    """Narrower formats are no slower, memory outruns the links, and a node its network."""
    cluster = ClusterSpec.preset(name)
    peaks = [getattr(cluster.device.peak_flops_per_second, precision) for precision in PRECISIONS]
    known = [peak for peak in peaks if peak is not None]
    assert known == sorted(known)
    rates = (cluster.device.memory_bytes_per_second, cluster.intra_node.bytes_per_second)
    assert rates[0] > rates[1] > cluster.inter_node.bytes_per_second
    assert cluster.intra_node.latency_seconds < cluster.inter_node.latency_seconds


def test_links_are_one_direction_of_one_device() -> None:
    """900 GB/s of NVLink is 450 each way; eight 400 Gb/s adapters for eight devices are 50 GB/s each."""
    assert TWO_NODES.intra_node.bytes_per_second == 450e9
    assert TWO_NODES.inter_node.bytes_per_second == 400e9 / 8


def test_memory_is_what_the_driver_reports() -> None:
    """An "80 GB" H100 reports 81559 MiB: more than 80e9 bytes, less than 80 GiB."""
    memory_bytes = TWO_NODES.device.memory_bytes
    assert memory_bytes == 81559 * 2**20
    assert 80e9 < memory_bytes < 80 * 2**30


def test_parse_reads_nodes_times_devices() -> None:
    """The short form says a machine, how many nodes and how many devices in each."""
    assert ClusterSpec.parse("h100") == ClusterSpec.preset("h100")
    parsed = ClusterSpec.parse("h100:16x8")
    assert (parsed.nodes, parsed.devices_per_node, parsed.num_devices) == (16, 8, 128)
    assert ClusterSpec.parse("cpu:1x4").num_devices == 4
    assert parsed.name == "h100:16x8"


def test_parse_reads_a_file(tmp_path) -> None:
    """A name that ends in .json is a file."""
    path = tmp_path / "mine.json"
    path.write_text(cluster_to_json(TWO_NODES))
    assert ClusterSpec.parse(str(path)) == load_cluster(path) == TWO_NODES


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("h10", "got 'h10'; did you mean h100"),
        ("H100", "got 'H100'; did you mean h100"),
        ("a100", "got 'a100'; did you mean a100-40gb or a100-80gb"),
        ("toaster", "must be one of ('v100'"),
        ("h100:16", "write h100:2x8"),
        ("h100:2x8x3", "NODESxDEVICES_PER_NODE"),
        ("h100:", "got ''"),
        ("h100:0x8", "ClusterSpec.nodes must be an integer of at least 1, got 0"),
        ("h100:8x0", "ClusterSpec.devices_per_node must be an integer of at least 1, got 0"),
        ("nowhere.json", "must be readable"),
    ],
)
def test_parse_says_the_rule_the_value_and_the_remedy(text: str, words: str) -> None:
    """What cannot be read is answered with what could be."""
    with pytest.raises(PlanError) as caught:
        ClusterSpec.parse(text)
    assert words in str(caught.value)


def test_a_device_without_a_format_says_which_it_has() -> None:
    """Volta has no bf16: the error names the device, the format and the formats that would do."""
    v100 = ClusterSpec.preset("v100").device
    assert peak_flops_per_second(v100, "fp16") == 125e12
    with pytest.raises(PlanError, match=r"v100 has no bf16 .* choose one of its own: fp64, fp32, fp16$"):
        peak_flops_per_second(v100, "bf16")
    with pytest.raises(PlanError, match=r"precision must be one of .* did you mean bf16"):
        peak_flops_per_second(v100, "bfloat16")


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [((3,), "intra"), ((0, 7), "intra"), ((8, 15), "intra"), ((7, 8), "inter"), (range(16), "inter")],
)
def test_link_between_is_the_slowest_level_crossed(ranks, expected: str) -> None:
    """Ranks 0 to 7 are one node and 8 to 15 the next."""
    link = TWO_NODES.intra_node if expected == "intra" else TWO_NODES.inter_node
    assert link_between(TWO_NODES, ranks) == link


@pytest.mark.parametrize(
    ("ranks", "bytes_per_second", "latency_seconds"),
    [
        ((0, 1, 2), 450e9, 1.9e-6),
        ((0, 8), 50e9, 4.0e-6),
        ((0, 4, 8, 12), 100e9, (1.9e-6 + 4.0e-6) / 2),
        (range(16), 400e9, (14 * 1.9e-6 + 2 * 4.0e-6) / 16),
        ((0, 1, 2, 8), 50e9, (1.9e-6 + 4.0e-6) / 2),
    ],
)
def test_a_ring_over_nodes_uses_every_adapter_it_owns(ranks, bytes_per_second, latency_seconds) -> None:
    """With k ranks in each node, k rings leave by k adapters; two of the hops leave a node."""
    link = group_link(TWO_NODES, ranks)
    assert link.bytes_per_second == bytes_per_second
    assert link.latency_seconds == pytest.approx(latency_seconds)


def test_a_ring_is_no_faster_than_the_links_inside_a_node() -> None:
    """72 adapters of 50 GB/s would be 3600 GB/s, but each rank also sends to its neighbour by NVLink."""
    assert group_link(ClusterSpec.preset("gb200", nodes=2), range(144)).bytes_per_second == 900e9


@pytest.mark.parametrize("ranks", [(), (0, 0), (-1, 0), (0, 16)])
def test_a_group_is_different_ranks_of_the_cluster(ranks) -> None:
    """A group that is empty, repeats a rank or leaves the cluster has no link."""
    with pytest.raises(PlanError):
        link_between(TWO_NODES, ranks)


def test_an_achieved_link_is_slower_by_the_fraction() -> None:
    """The profile takes from the rate, not from the latency."""
    efficiency = evolve(TWO_NODES.efficiency, link=0.5)
    link = achieved_link(TWO_NODES.intra_node, efficiency)
    assert (link.bytes_per_second, link.latency_seconds) == (225e9, 1.9e-6)


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("peaks", {"fp32": 0}, "Peaks.fp32 must be a positive finite number, got 0.0"),
        ("peaks", {"bf16": float("inf")}, "Peaks.bf16 must be a positive finite number, got inf"),
        ("peaks", {"fp8": True}, "Peaks.fp8"),
        ("device", {"kind": "tpu"}, "DeviceSpec.kind must be one of ('cuda', 'rocm', 'cpu'), got 'tpu'"),
        ("device", {"memory_bytes": 8e10}, "DeviceSpec.memory_bytes must be an integer of at least 1"),
        ("device", {"source": " "}, "DeviceSpec.source must be text"),
        ("link", {"latency_seconds": -1}, "LinkSpec.latency_seconds must be a finite number of at least 0"),
        ("link", {"bytes_per_second": float("nan")}, "LinkSpec.bytes_per_second"),
        ("efficiency", {"matmul": 1.1}, "Efficiency.matmul must be a fraction in (0, 1], got 1.1"),
        ("efficiency", {"link": 0}, "Efficiency.link"),
        ("cluster", {"nodes": True}, "ClusterSpec.nodes"),
    ],
)
def test_a_value_that_exists_is_valid(part: str, change, words: str) -> None:
    """Each field refuses what is not possible, naming itself, the rule and the value."""
    parts = {
        "peaks": TWO_NODES.device.peak_flops_per_second,
        "device": TWO_NODES.device,
        "link": TWO_NODES.intra_node,
        "efficiency": TWO_NODES.efficiency,
        "cluster": TWO_NODES,
    }
    with pytest.raises(PlanError) as caught:
        evolve(parts[part], **change)
    assert words in str(caught.value)


def test_whole_numbers_are_rates_too() -> None:
    """A rate written as an integer is the same value, and saves to the same bytes."""
    integer = LinkSpec(name="a", bytes_per_second=10, latency_seconds=0, source="b")
    assert integer == LinkSpec(name="a", bytes_per_second=10.0, latency_seconds=0.0, source="b")
    assert isinstance(integer.bytes_per_second, float)


def _changed(path: str, value: object) -> str:
    """A saved cluster with another value at a path of keys."""
    data = json.loads(cluster_to_json(TWO_NODES))
    *parents, last = path.split(".")
    place = data
    for key in parents:
        place = place[key]
    place[last] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("device.memory_bytes", "80", "$.device.memory_bytes: must be an integer, got '80'"),
        ("efficiency.matmul", 2, "$.efficiency: Efficiency.matmul must be a fraction in (0, 1], got 2.0"),
        ("device.peak_flops_per_second.bf17", 1, "bf17: no such field; did you mean bf16"),
        ("intra_node.latency_seconds", None, "$.intra_node.latency_seconds: must be a number, got None"),
        ("nodes", True, "$.nodes: must be an integer, got True"),
        ("name", None, "$.name: must be text, got None"),
        ("device", {"name": "a"}, "$.device.kind: required field is missing"),
        ("device", [], "$.device: must be an object, got []"),
    ],
)
def test_a_saved_cluster_names_the_path_of_a_bad_field(path: str, value: object, words: str) -> None:
    """The message has the path in the file, and the validator's own words."""
    with pytest.raises(PlanError) as caught:
        cluster_from_json(_changed(path, value))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "a cluster must be JSON"),
        ('{"name": ', "a cluster must be JSON"),
        ("[]", r"\$: must be an object, got \[\]"),
        ("3", r"\$: must be an object, got 3"),
    ],
)
def test_text_that_is_no_cluster_is_refused(text: str, words: str) -> None:
    """Neither broken JSON nor JSON of another shape is a cluster."""
    with pytest.raises(PlanError, match=words):
        cluster_from_json(text)


def test_a_bad_file_is_named(tmp_path) -> None:
    """An error in a file starts with the file."""
    path = tmp_path / "bad.json"
    path.write_text("{}")
    with pytest.raises(PlanError, match=r"bad\.json: .*\$\.device: required field is missing"):
        load_cluster(path)


def test_clusters_are_keys() -> None:
    """Equal clusters hash alike, so that costs can be remembered by cluster."""
    assert len({TWO_NODES, ClusterSpec.parse("h100:2x8"), ClusterSpec.parse("h100")}) == 2
    assert isinstance(TWO_NODES.device, DeviceSpec)
    assert isinstance(TWO_NODES.efficiency, Efficiency)


def test_a_file_from_before_costs_were_measured_still_loads() -> None:
    """Without the fields that came later, the fractions price as they did."""
    data = json.loads(cluster_to_json(TWO_NODES))
    for name in ("measured", "compute_scale", "communication_scale", "step_seconds"):
        del data["efficiency"][name]
    assert cluster_from_json(json.dumps(data)) == TWO_NODES


def test_measured_costs_are_saved_with_their_cluster() -> None:
    """Text and back is the same value; a bad number is named by its path."""
    plain = ProductCost(flops_per_second=1e11, half_m=3)
    measured = MeasuredCosts(
        precision="fp32",
        output=plain,
        input=plain,
        weight=plain,
        attention=plain,
        attention_backward=plain,
        kernel=KernelCost(cached_bytes_per_second=4e10, memory_bytes_per_second=1e10, cache_bytes=2**19),
        communication=[CallCost(kind="send", call_seconds=1e-4, byte_seconds=1e-9)],
    )
    efficiency = evolve(TWO_NODES.efficiency, measured=measured, compute_scale=1.5, step_seconds=0.25)
    cluster = evolve(TWO_NODES, efficiency=efficiency)
    assert cluster_from_json(cluster_to_json(cluster)) == cluster
    data = json.loads(cluster_to_json(cluster))
    data["efficiency"]["measured"]["output"]["flops_per_second"] = 0
    with pytest.raises(
        PlanError, match=r"\$\.efficiency\.measured\.output\.flops_per_second: .* must be a positive"
    ):
        cluster_from_json(json.dumps(data))
