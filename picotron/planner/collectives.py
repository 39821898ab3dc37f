"""What a collective costs: seconds by latency and bandwidth, and the bytes that each rank sends.

The model is Hockney's: a message of n bytes takes latency + n / bandwidth. A link is one device's sending
rate in one direction, and a rank sends and receives at once. Ring algorithms throughout, since they are
optimal in bandwidth: Thakur, Rabenseifner and Gropp 2005 (Int. J. High Perform. Comput. Appl. 19(1)), and
Patarasuk and Yuan 2009 (J. Parallel Distrib. Comput. 69(2)) for the all-reduce. We depart from them in
leaving out the arithmetic of the reduction, which GPUs hide behind the transfer.

A tensor that ``size`` does not divide is padded, as a ring's chunks are equal. The payload is the whole
tensor: of an all-reduce and an all-to-all the input, of an all-gather the output, of a reduce-scatter the
input, of a broadcast and a send what is sent. Rates are those of the link as given: pass one that
``achieved_link`` has brought down to what software reaches. A group of one rank costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from attrs import frozen

from picotron.errors import PlanError
from picotron.planner.cluster import LinkSpec


@frozen
class _Ring:
    """How many steps a ring of a size takes, and how many bytes each rank sends in all of them."""

    steps: Callable[[int], int]
    sent_bytes: Callable[[int, int], int]  # (payload_bytes, size)


def _chunk_bytes(payload_bytes: int, size: int) -> int:
    return -(-payload_bytes // size)


def _all_but_one(payload_bytes: int, size: int) -> int:
    return (size - 1) * _chunk_bytes(payload_bytes, size)


def _whole(payload_bytes: int, size: int) -> int:
    return payload_bytes


_RINGS = {
    "all_reduce": _Ring(lambda size: 2 * (size - 1), lambda payload, size: 2 * _all_but_one(payload, size)),
    "all_gather": _Ring(lambda size: size - 1, _all_but_one),
    "reduce_scatter": _Ring(lambda size: size - 1, _all_but_one),
    "all_to_all": _Ring(lambda size: size - 1, _all_but_one),
    "broadcast": _Ring(lambda size: size - 1, _whole),
    "send": _Ring(lambda size: 1, _whole),
}
KINDS = tuple(_RINGS)


def wire_bytes(kind: str, payload_bytes: int, size: int) -> int:
    """The bytes that each rank sends.

    For a broadcast it is what each rank but the last passes on, for a send what the sender sends. Raises
    PlanError if ``kind`` is not one of KINDS, ``payload_bytes`` is negative or ``size`` is less than 1.
    """
    _check(kind, payload_bytes, size)
    return 0 if size == 1 else _RINGS[kind].sent_bytes(payload_bytes, size)


def collective_seconds(kind: str, payload_bytes: int, size: int, link: LinkSpec) -> float:
    """Steps times latency plus bytes sent over bandwidth, for one of KINDS; 0 in a group of one.

    An all-reduce over switches that sum sends its tensor once.
    """
    _check(kind, payload_bytes, size)
    if size == 1:
        return 0.0
    latency_seconds = _RINGS[kind].steps(size) * link.latency_seconds
    ring = latency_seconds + wire_bytes(kind, payload_bytes, size) / link.bytes_per_second
    if kind == "all_reduce" and link.in_network_reduction:
        return min(ring, 2 * link.latency_seconds + payload_bytes / link.bytes_per_second)
    return ring


def all_reduce_seconds(payload_bytes: int, size: int, link: LinkSpec) -> float:
    """2(p-1) latency + 2 (p-1)/p n / bandwidth, n the tensor: a reduce-scatter, then an all-gather.

    Patarasuk and Yuan 2009, section 4; the bandwidth term is the lower bound for ranks that sum themselves.
    Where the link's switches sum (SHARP; Graham et al. 2016, COMHPC), 2 latency + n / bandwidth if less.
    """
    return collective_seconds("all_reduce", payload_bytes, size, link)


def all_gather_seconds(payload_bytes: int, size: int, link: LinkSpec) -> float:
    """(p-1) latency + (p-1)/p n / bandwidth, n the output.

    Thakur et al. 2005, section 4.1: the ring.
    """
    return collective_seconds("all_gather", payload_bytes, size, link)


def reduce_scatter_seconds(payload_bytes: int, size: int, link: LinkSpec) -> float:
    """(p-1) latency + (p-1)/p n / bandwidth, n the input.

    The ring all-gather run backwards; Thakur et al. 2005, section 4.3, give their pairwise exchange the same
    cost.
    """
    return collective_seconds("reduce_scatter", payload_bytes, size, link)


def all_to_all_seconds(payload_bytes: int, size: int, link: LinkSpec) -> float:
    """(p-1) latency + (p-1)/p n / bandwidth, n one rank's input.

    Thakur et al. 2005, section 4.4: pairwise exchange, each rank keeping its own chunk.
    """
    return collective_seconds("all_to_all", payload_bytes, size, link)


def broadcast_seconds(payload_bytes: int, size: int, link: LinkSpec) -> float:
    """(p-1) latency + n / bandwidth: a chain whose ranks pass on small pieces as they come.

    The limit of many pieces of the pipelined chain; Chan et al. 2007 (Concurr. Comput. 19(13)) survey it.
    """
    return collective_seconds("broadcast", payload_bytes, size, link)


def send_seconds(payload_bytes: int, link: LinkSpec) -> float:
    """Latency + n / bandwidth: one message between two ranks (Hockney 1994, Parallel Computing 20(3))."""
    return collective_seconds("send", payload_bytes, 2, link)


def _check(kind: str, payload_bytes: int, size: int) -> None:
    if kind not in _RINGS:
        raise PlanError(f"a collective must be one of {KINDS}, got {kind!r}")
    if payload_bytes < 0:
        raise PlanError(f"payload_bytes must be at least 0, got {payload_bytes}")
    if size < 1:
        raise PlanError(f"a group's size must be at least 1, got {size}")
