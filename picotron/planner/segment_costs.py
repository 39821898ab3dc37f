"""What segments and stages cost: seconds in the order in which a segment computes and communicates."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any, overload

from attrs import Attribute, Factory, field, frozen

from picotron.errors import PlanError
from picotron.planner.body import WAIT, Bodies, Body
from picotron.planner.program import Kind


def _floats(value: Iterable[float]) -> tuple[float, ...]:
    return tuple(value)


@frozen(kw_only=True)
class CollectiveCost:
    """One collective inside a segment, in whose communicator the rank waits for its end."""

    kind: str
    group: str
    payload_bytes: int
    seconds: float
    asynchronous: bool = False  # its end is at a later entry of kind WAIT


def _costs(value: Iterable[CollectiveCost]) -> tuple[CollectiveCost, ...]:
    return tuple(value)


@frozen(kw_only=True)
class SegmentCost:
    """Seconds of one segment in its order: stretches of computing, and a collective between each two.

    Between two stretches may also be the WAIT for the earliest asynchronous collective that none was for.
    """

    compute: tuple[float, ...] = field(converter=_floats)
    collectives: tuple[CollectiveCost, ...] = field(default=(), converter=_costs)

    @collectives.validator
    def _alternate(self, _: Attribute[object], value: tuple[CollectiveCost, ...]) -> None:
        if len(self.compute) != len(value) + 1:
            raise PlanError(
                f"a segment computes before, between and after its collectives: {len(value)} of them need "
                f"{len(value) + 1} stretches, got {len(self.compute)}"
            )

    @property
    def compute_seconds(self) -> float:
        """Its own computing."""
        return sum(self.compute)

    @property
    def communication_seconds(self) -> float:
        """The collectives that it blocks on, as long as it does."""
        return sum(self.exposed)

    @property
    def exposed(self) -> tuple[float, ...]:
        """Of each entry of ``collectives``, how long computing stops there if no other rank comes late."""
        if not any(collective.asynchronous for collective in self.collectives):
            return tuple(collective.seconds for collective in self.collectives)
        now, free, ends, found = 0.0, 0.0, deque[float](), list[float]()
        for stretch, collective in zip(self.compute, self.collectives, strict=False):
            now += stretch
            if collective.kind == WAIT:
                held = max(0.0, ends.popleft() - now) if ends else 0.0
            else:
                free = max(now, free) + collective.seconds
                held = 0.0 if collective.asynchronous else free - now
                ends += [free] if collective.asynchronous else []
            now += held
            found.append(held)
        return tuple(found)

    @property
    def transfer_seconds(self) -> float:
        """All of its collectives, whether it computes beside them or not."""
        return sum(collective.seconds for collective in self.collectives)

    @property
    def seconds(self) -> float:
        """Both, one after the other."""
        return self.compute_seconds + self.communication_seconds


@frozen(kw_only=True)
class StageCost:
    """Seconds of one microbatch on one stage, by segment in the order each phase runs them.

    Left out, I takes what B takes, and W nothing.
    """

    forward: tuple[SegmentCost, ...]
    backward: tuple[SegmentCost, ...]
    backward_input: tuple[SegmentCost, ...] = field(default=Factory(lambda self: self.backward, True))
    backward_weight: tuple[SegmentCost, ...] = ()
    update_seconds: float

    @property
    def forward_seconds(self) -> float:
        """One F."""
        return sum(segment.seconds for segment in self.forward)

    @property
    def backward_seconds(self) -> float:
        """One B."""
        return sum(segment.seconds for segment in self.backward)

    @property
    def backward_input_seconds(self) -> float:
        """One I."""
        return sum(segment.seconds for segment in self.backward_input)

    @property
    def backward_weight_seconds(self) -> float:
        """One W."""
        return sum(segment.seconds for segment in self.backward_weight)

    def compute_seconds(self, kind: Kind) -> float:
        """One action of ``kind`` without its collectives."""
        return sum(segment.compute_seconds for segment in of_kind(self, kind))


@overload
def of_kind(value: StageCost, kind: Kind) -> tuple[SegmentCost, ...]: ...
@overload
def of_kind(value: Bodies, kind: Kind) -> Body: ...
def of_kind(value: StageCost | Bodies, kind: Kind) -> Any:
    """What ``value``, the bodies or the cost of a stage, has for rows of ``kind``."""
    return getattr(value, kind.name.lower())
