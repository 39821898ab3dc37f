"""The machines a plan is priced for: devices, the links between them and the software that drives them.

A cluster is ``nodes`` equal nodes of ``devices_per_node`` devices; global rank r sits in node
``r // devices_per_node``. Two levels of link: inside a node and between nodes. Every rate is a peak in base
units (FLOP/s without sparsity, bytes/s per device in one direction), and ``Efficiency`` says what fraction
of it a program reaches: seconds are always work over peak times fraction, the roofline of Williams,
Waterman and Patterson 2009 (CACM 52(4)).

``memory_bytes`` is the nominal capacity, the total that the driver reports. It is about the data sheet's
"GB" counted as GiB; what the driver and the libraries keep for themselves is not subtracted here.

The presets are in ``presets/devices.json``, one node of a machine a name: what ``load_cluster`` reads, less
the cluster's own name and its number of nodes. Each group of numbers names its source.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from attrs import Attribute, Factory, evolve, field, frozen
from attrs.converters import optional as optional_converter
from attrs.validators import instance_of
from attrs.validators import optional as optional_validator
from cattrs import Converter

from picotron.errors import PlanError
from picotron.planner.architectures import ARCHITECTURES, HOST_RATES, PROCESSORS, architecture_of
from picotron.planner.measured import MeasuredCosts
from picotron.planner.records import hint, preset, preset_table, read_json, strict_converter, structured
from picotron.planner.software import SoftwareProfile, software_profile
from picotron.planner.validators import as_float, is_between, is_integer, is_positive, of_class_must_be, shown

PRECISIONS = ("fp64", "fp32", "tf32", "bf16", "fp16", "fp8", "fp4")
MOST_DEVICES = 2**17
LARGEST_COUNT = 2**62
DEFAULT_PROFILE = "picotron"
KINDS_OF_DEVICE = ("cuda", "rocm", "cpu")


_POSITIVE = of_class_must_be("a positive finite number", is_positive)
_NOT_NEGATIVE = of_class_must_be(
    "a finite number of at least 0", lambda value: is_between(value, 0, sys.float_info.max)
)
_FRACTION = of_class_must_be("a fraction in (0, 1]", lambda value: is_positive(value) and value <= 1)
_COUNT = [
    of_class_must_be("an integer of at least 1", lambda value: is_integer(value) and value >= 1),
    of_class_must_be(f"at most {LARGEST_COUNT}", lambda value: bool(value <= LARGEST_COUNT)),
]
_FLAG = of_class_must_be("true or false", lambda value: isinstance(value, bool))
_TEXT = of_class_must_be(
    "text that is not empty", lambda value: isinstance(value, str) and bool(value.strip())
)
_ARCHITECTURE = of_class_must_be(f"one of {ARCHITECTURES}", lambda value: value in ARCHITECTURES)
_DEVICE_KIND = of_class_must_be(f"one of {KINDS_OF_DEVICE}", lambda value: value in KINDS_OF_DEVICE)


def _peak() -> Any:
    return field(
        default=None,
        converter=optional_converter(as_float),
        validator=optional_validator(_POSITIVE),
    )


@frozen(kw_only=True)
class Peaks:
    """Dense matrix-multiply peaks in FLOP/s, by the format of the operands; None where there is no unit.

    Each is the fastest path of its format: tensor or matrix cores where they take it, vector units else.
    """

    fp64: float | None = _peak()
    fp32: float | None = _peak()
    tf32: float | None = _peak()
    bf16: float | None = _peak()
    fp16: float | None = _peak()
    fp8: float | None = _peak()
    fp4: float | None = _peak()


@frozen(kw_only=True)
class DeviceSpec:
    """One accelerator, or one CPU core with its share of the memory.

    ``processors`` are what a product's tiles are dealt to (streaming multiprocessors, compute units);
    ``host_bytes_per_second`` is the rate to host memory in one direction, which offloading crosses. Left
    out, the architecture follows from kind and name, and these two from the architecture.
    """

    name: str = field(validator=_TEXT)
    peak_flops_per_second: Peaks = field(validator=instance_of(Peaks))
    memory_bytes: int = field(validator=_COUNT)
    memory_bytes_per_second: float = field(converter=as_float, validator=_POSITIVE)
    kind: str = field(validator=_DEVICE_KIND)
    source: str = field(validator=_TEXT)
    architecture: str = field(
        default=Factory(lambda self: architecture_of(self.kind, self.name), True), validator=_ARCHITECTURE
    )
    processors: int = field(
        default=Factory(lambda self: PROCESSORS[self.architecture], True), validator=_COUNT
    )
    host_bytes_per_second: float = field(
        default=Factory(lambda self: HOST_RATES[self.architecture], True),
        converter=as_float,
        validator=_POSITIVE,
    )


@frozen(kw_only=True)
class LinkSpec:
    """What one device can send, in bytes/s in one direction, and the seconds before the first byte.

    ``in_network_reduction``: the switches sum all-reduces on their way (SHARP, NVLink SHARP), so that a
    device sends and receives the tensor once.
    """

    name: str = field(validator=_TEXT)
    bytes_per_second: float = field(converter=as_float, validator=_POSITIVE)
    latency_seconds: float = field(converter=as_float, validator=_NOT_NEGATIVE)
    source: str = field(validator=_TEXT)
    in_network_reduction: bool = field(default=False, validator=_FLAG)


@frozen(kw_only=True)
class Efficiency:
    """The software profile: fractions of the peaks reached, and the fixed cost of one kernel in seconds.

    Where costs were ``measured`` by shape, those count and the fractions of matmul and memory do not. What
    an observed run corrects (``fit_profile``) are the two scales, which multiply all seconds of computing and
    of communication, and ``step_seconds``, which every rank spends once a step.
    """

    matmul: float = field(converter=as_float, validator=_FRACTION)
    memory: float = field(converter=as_float, validator=_FRACTION)
    link: float = field(converter=as_float, validator=_FRACTION)
    kernel_seconds: float = field(converter=as_float, validator=_NOT_NEGATIVE)
    source: str = field(validator=_TEXT)
    measured: MeasuredCosts | None = field(
        default=None, validator=optional_validator(instance_of(MeasuredCosts))
    )
    compute_scale: float = field(default=1.0, converter=as_float, validator=_POSITIVE)
    communication_scale: float = field(default=1.0, converter=as_float, validator=_POSITIVE)
    step_seconds: float = field(default=0.0, converter=as_float, validator=_NOT_NEGATIVE)


def _profile(value: Any) -> Any:
    return software_profile(value) if isinstance(value, str) else value


@frozen(kw_only=True)
class ClusterSpec:
    """Equal nodes of equal devices, the two levels of link, and what software reaches and does on them.

    ``profile`` is a software profile or the name of a preset.
    """

    name: str = field(validator=_TEXT)
    device: DeviceSpec = field(validator=instance_of(DeviceSpec))
    devices_per_node: int = field(validator=_COUNT)
    nodes: int = field(validator=_COUNT)
    intra_node: LinkSpec = field(validator=instance_of(LinkSpec))
    inter_node: LinkSpec = field(validator=instance_of(LinkSpec))
    efficiency: Efficiency = field(validator=instance_of(Efficiency))
    profile: SoftwareProfile = field(
        factory=lambda: software_profile(DEFAULT_PROFILE),
        converter=_profile,
        validator=instance_of(SoftwareProfile),
    )

    @efficiency.validator
    def _not_too_many(self, _: Attribute[Any], __: Efficiency) -> None:
        if self.num_devices > MOST_DEVICES:
            raise PlanError(f"a cluster may have at most {MOST_DEVICES:,} devices, got {self.num_devices:,}")

    @property
    def num_devices(self) -> int:
        """Devices in the whole cluster, one for each rank."""
        return self.nodes * self.devices_per_node

    @classmethod
    def preset(cls, name: str, *, nodes: int = 1, devices_per_node: int | None = None) -> ClusterSpec:
        """``nodes`` nodes of a shipped machine, named so that ``parse`` reads the name back.

        ``devices_per_node`` defaults to the machine's own (8, or 72 for gb200). Raises PlanError for an
        unknown name, with the closest known ones.
        """
        machine = preset(_presets(), name, "a cluster preset")
        per_node = machine.devices_per_node if devices_per_node is None else devices_per_node
        return evolve(machine, name=f"{name}:{nodes}x{per_node}", nodes=nodes, devices_per_node=per_node)

    @classmethod
    def parse(cls, text: str) -> ClusterSpec:
        """The cluster that ``"h100"``, ``"h100:16x8"`` (nodes x devices a node) or ``"mine.json"`` names."""
        if not isinstance(text, str):
            raise PlanError(f"a cluster must be a preset's name or a path to a .json file, got {shown(text)}")
        if text.endswith(".json"):
            return load_cluster(text)
        name, colon, shape = text.partition(":")
        machine = cls.preset(name)
        if not colon:
            return machine
        counts = re.fullmatch(r"([0-9]{1,18})x([0-9]{1,18})", shape)
        if counts is None:
            raise PlanError(
                f"a cluster's shape must be NODESxDEVICES_PER_NODE, got {shown(shape)} in {shown(text)}; "
                f"write {name}:2x8 for two nodes of eight devices"
            )
        return cls.preset(name, nodes=int(counts[1]), devices_per_node=int(counts[2]))


def preset_names() -> tuple[str, ...]:
    """The names that ``ClusterSpec.preset`` knows, in the table's order."""
    return tuple(_presets())


def peak_flops_per_second(device: DeviceSpec, precision: str) -> float:
    """The device's dense peak for matrix multiplies of one format.

    Raises PlanError if ``precision`` is not one of PRECISIONS or the device has no unit for it.
    """
    if precision not in PRECISIONS:
        raise PlanError(
            f"precision must be one of {PRECISIONS}, got {precision!r}{hint(precision, PRECISIONS)}"
        )
    peak = _peaks_by_precision(device)[precision]
    if peak is None:
        able = ", ".join(name for name, value in _peaks_by_precision(device).items() if value is not None)
        raise PlanError(f"{device.name} has no {precision} matrix multiply; choose one of its own: {able}")
    return peak


def link_between(cluster: ClusterSpec, ranks: Sequence[int]) -> LinkSpec:
    """The slowest level of link that a group of global ranks crosses: what one rank sends another over."""
    return cluster.intra_node if len(_ranks_by_node(cluster, ranks)) == 1 else cluster.inter_node


def group_link(cluster: ClusterSpec, ranks: Sequence[int]) -> LinkSpec:
    """The link that each rank of a ring over the group seems to have.

    In one node it is the intra-node link. Across nodes, a group with k ranks in each node runs k rings, each
    leaving by another device's adapter, so that the ring's rate is k times the network's, but no more than
    the intra-node rate where a node holds two or more of the ranks (NCCL builds its channels so). The latency
    is the mean over the ring's hops, one of which leaves each node. Where nodes hold different numbers of
    the ranks, the smallest counts.

    For reduce-scatter, all-gather, all-reduce and broadcast; an all-to-all or a send, whose every byte takes
    its own device's adapter, has the link of ``link_between``.
    """
    by_node = _ranks_by_node(cluster, ranks)
    adapters = min(by_node.values())
    if len(by_node) == 1 or len(by_node) == len(ranks):
        return link_between(cluster, ranks)
    intra, inter = cluster.intra_node, cluster.inter_node
    leaving = len(by_node) / len(ranks)
    return LinkSpec(
        name=f"{inter.name} x{adapters}",
        bytes_per_second=min(intra.bytes_per_second, adapters * inter.bytes_per_second),
        latency_seconds=leaving * inter.latency_seconds + (1 - leaving) * intra.latency_seconds,
        source=f"{adapters} adapters of: {inter.source}",
        in_network_reduction=intra.in_network_reduction and inter.in_network_reduction,
    )


def achieved_link(link: LinkSpec, efficiency: Efficiency) -> LinkSpec:
    """The link at the rate that the software profile reaches; the latency stays."""
    return evolve(link, bytes_per_second=link.bytes_per_second * efficiency.link)


def cluster_to_json(cluster: ClusterSpec) -> str:
    """The cluster as JSON text that ``cluster_from_json`` reads back to an equal value."""
    return json.dumps(_converter().unstructure(cluster), indent=2) + "\n"


def cluster_from_json(text: str) -> ClusterSpec:
    """The cluster in a JSON text. Raises PlanError naming the path of each bad field."""
    return _structured(read_json(text, "a cluster"))


def load_cluster(path: str | os.PathLike[str]) -> ClusterSpec:
    """The cluster in a JSON file. Raises PlanError naming the file and the path of each bad field."""
    if not isinstance(path, str | os.PathLike):
        raise PlanError(f"a cluster's file must be a path, got {shown(path)}")
    try:
        return cluster_from_json(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"a cluster's file must be readable: {error}") from error
    except ValueError as error:
        raise PlanError(f"{os.fspath(path)}: {error}") from error


def _peaks_by_precision(device: DeviceSpec) -> dict[str, float | None]:
    return {name: getattr(device.peak_flops_per_second, name) for name in PRECISIONS}


def _ranks_by_node(cluster: ClusterSpec, ranks: Sequence[int]) -> Counter[int]:
    if not ranks or len(set(ranks)) != len(ranks):
        raise PlanError(f"a group must be one or more different ranks, got {tuple(ranks)}")
    if min(ranks) < 0 or max(ranks) >= cluster.num_devices:
        raise PlanError(
            f"ranks must be in [0, {cluster.num_devices}) of {cluster.name}, "
            f"got {tuple(ranks)}; give the cluster more nodes"
        )
    return Counter(rank // cluster.devices_per_node for rank in ranks)


@cache
def _presets() -> dict[str, ClusterSpec]:
    return {
        name: _structured({"name": name, "nodes": 1} | row) for name, row in preset_table("devices").items()
    }


@cache
def _converter() -> Converter:
    """The converter of this room."""
    return strict_converter()


def _structured(data: object) -> ClusterSpec:
    return structured(_converter(), data, ClusterSpec)
