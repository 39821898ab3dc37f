"""What a script of faults does to one simulated rank, place by place."""

from __future__ import annotations

from collections.abc import Iterable

from attrs import define, field

from picotron.planner.faults import Corrupt, Drop, Fault, Kill, OutOfMemory, Pause, compute_factor


class Killed(BaseException):
    """Ends a rank's thread where a fault kills it; never leaves ``simulate``."""


@define
class Injection:
    """The faults of one rank that have not struck yet."""

    pending: dict[tuple[int, int], list[Kill | Pause | Corrupt]]  # by place
    factor: float  # of its computing
    limit_bytes: int | None
    lost: frozenset[tuple[int, int]]  # (receiver, number) of messages that do not arrive
    armed: list[Corrupt] = field(factory=list)

    def reach(self, step: int, index: int) -> list[float]:
        """Let strike what is due at a place; returns the seconds of each pause. Raises Killed."""
        pauses = []
        for fault in self.pending.pop((step, index), ()):
            if isinstance(fault, Kill):
                raise Killed
            if isinstance(fault, Pause):
                pauses.append(fault.seconds)
            else:
                self.armed.append(fault)
        return pauses

    def corrupt(self) -> tuple[int, int] | None:
        """Element and bit to invert in what is received next; None for nothing."""
        if not self.armed:
            return None
        fault = self.armed.pop(0)
        return fault.element, fault.bit


def injection(faults: Iterable[Fault], rank: int, limit_bytes: int | None) -> Injection:
    """What ``faults`` hold for ``rank``, whose device has ``limit_bytes``."""
    script = tuple(faults)
    pending: dict[tuple[int, int], list[Kill | Pause | Corrupt]] = {}
    for fault in script:
        if isinstance(fault, Kill | Pause | Corrupt) and fault.rank == rank:
            pending.setdefault((fault.step, fault.at), []).append(fault)
    limits = [f.at_bytes for f in script if isinstance(f, OutOfMemory) and f.rank == rank]
    return Injection(
        pending=pending,
        factor=compute_factor(script, rank),
        limit_bytes=min([*limits, *([] if limit_bytes is None else [limit_bytes])], default=None),
        lost=frozenset((f.receiver, f.at) for f in script if isinstance(f, Drop) and f.sender == rank),
    )
