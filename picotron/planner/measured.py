"""What operations cost on a machine where they were measured: a few numbers for each kind, by shape.

A product of [m, k] by [k, n] approaches its asymptotic rate as each size grows past its half-rate size, where
that size alone would halve it (Hockney's n-half, 1985, Parallel Computing 2(1), once for each dimension):
``2mnk / rate * (1 + half_m / m + half_n / n + half_k / k)``. The three terms are the traffic of the two
operands and of the result. A kernel's bytes go at the caches' rate up to what a core's caches hold, and at
the memory's beyond. Communication takes CPU time of a rank by call and by byte.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from attrs import Attribute, field, frozen
from attrs.validators import instance_of

from picotron.errors import PlanError
from picotron.planner.validators import NAME, POSITIVE, as_float, between


def _rate() -> Any:
    return field(converter=as_float, validator=POSITIVE)


def _cost() -> Any:
    return field(default=0.0, converter=as_float, validator=between(0))


@frozen(kw_only=True)
class ProductCost:
    """A product's asymptotic rate, and the sizes m, n and k at which each alone would halve it.

    ``fixed_seconds`` is what a call takes beyond any kernel's fixed cost.
    """

    flops_per_second: float = _rate()
    half_m: float = _cost()
    half_n: float = _cost()
    half_k: float = _cost()
    fixed_seconds: float = _cost()

    def seconds(self, flops: int, shape: tuple[int, ...]) -> float:
        """Of ``flops`` in products of ``shape`` (m, n, k, batch); at the asymptotic rate without a shape."""
        ideal = flops / self.flops_per_second
        if not shape:
            return ideal + self.fixed_seconds
        m, n, k = shape[:3]
        return ideal * (1 + self.half_m / m + self.half_n / n + self.half_k / k) + self.fixed_seconds


@frozen(kw_only=True)
class KernelCost:
    """Rates of a kernel's bytes: the first ``cache_bytes`` of them, and the rest."""

    cached_bytes_per_second: float = _rate()
    memory_bytes_per_second: float = _rate()
    cache_bytes: float = _cost()

    def seconds(self, moved_bytes: int) -> float:
        """Of one kernel that reads and writes so many bytes."""
        cached = min(moved_bytes, self.cache_bytes)
        return cached / self.cached_bytes_per_second + (moved_bytes - cached) / self.memory_bytes_per_second


@frozen(kw_only=True)
class CallCost:
    """CPU seconds of one rank in a communication call of one kind: fixed, and by byte of its payload."""

    kind: str = field(validator=NAME)
    call_seconds: float = _cost()
    byte_seconds: float = _cost()

    def seconds(self, payload_bytes: int) -> float:
        """Of one call."""
        return self.call_seconds + self.byte_seconds * payload_bytes


def _costs(value: Iterable[CallCost]) -> tuple[CallCost, ...]:
    return tuple(value)


@frozen(kw_only=True)
class MeasuredCosts:
    """Everything that a step is made of on a measured machine, in one precision.

    ``output``, ``input`` and ``weight`` price a layer's products: of its output, and of the gradients of its
    input and of its weight, whose operands lie differently in memory. Attention's shape is that of a head's
    scores. A segment takes ``segment_seconds`` beside its operations, and the optimizer its seconds an
    element and a tensor.
    """

    precision: str = field(validator=NAME)
    output: ProductCost = field(validator=instance_of(ProductCost))
    input: ProductCost = field(validator=instance_of(ProductCost))
    weight: ProductCost = field(validator=instance_of(ProductCost))
    attention: ProductCost = field(validator=instance_of(ProductCost))
    attention_backward: ProductCost = field(validator=instance_of(ProductCost))
    kernel: KernelCost = field(validator=instance_of(KernelCost))
    segment_seconds: float = _cost()
    update_element_seconds: float = _cost()
    update_tensor_seconds: float = _cost()
    communication: tuple[CallCost, ...] = field(default=(), converter=_costs)

    @communication.validator
    def _once(self, _: Attribute[Any], value: tuple[CallCost, ...]) -> None:
        kinds = [cost.kind for cost in value]
        if len(set(kinds)) != len(kinds):
            raise PlanError(f"communication must have each kind once, got {tuple(kinds)}")

    def call_seconds(self, kind: str, payload_bytes: int) -> float:
        """CPU seconds of a rank in one call; 0 for a kind that was not measured."""
        return sum(cost.seconds(payload_bytes) for cost in self.communication if cost.kind == kind)
