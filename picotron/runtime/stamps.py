"""Moments on a device's clock: told by events that the device passes, and read once the step is over.

On CUDA a call returns before its work is done, so the host's clock says nothing about it. An event is put
behind the work instead; when the device passes it, it notes the time. Reading waits for the device and is
left until nobody minds.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from attrs import frozen

_Event: Any = torch.cuda.Event  # untyped, as torch has it
_Stream: Any = torch.cuda.Stream


class Event(Protocol):
    """As ``torch.cuda.Event`` with timing."""

    def record(self) -> None:
        """Put it behind what the current stream has been given so far."""

    def synchronize(self) -> None:
        """Wait until the device has passed it."""

    def elapsed_time(self, end_event: Any) -> Any:
        """Milliseconds from this one to ``end_event``."""


@frozen(eq=False)
class Stamp:
    """When the device passes ``event``."""

    event: Event


class DeviceClock:
    """Makes stamps and reads them; ``new_event`` makes an event that keeps time."""

    def __init__(self, new_event: Callable[[], Event]) -> None:
        self._new_event = new_event

    def mark(self) -> Stamp:
        """Now, for the current stream: when what it has been given so far is done."""
        event = self._new_event()
        event.record()
        return Stamp(event)

    def seconds(self, since: Stamp, marks: Sequence[Stamp]) -> list[float]:
        """Seconds from ``since`` to each of ``marks``; waits until the device has passed them all.

        They are counted from ``since`` because an event's milliseconds are a 32-bit number.
        """
        for stamp in (since, *marks):
            stamp.event.synchronize()
        return [since.event.elapsed_time(stamp.event) * 1e-3 for stamp in marks]


class CommunicationClock(DeviceClock):
    """The clock of one GPU, which also sees when work of other streams is done.

    A communicator runs its work on a stream of its own, and torch lets only a stream wait for it: one that
    does nothing else waits for each communicator, and notes the time.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(partial(_Event, enable_timing=True))
        self._device = device
        self._lookouts: dict[Hashable, Any] = {}

    def after(self, communicator: Hashable, wait: Callable[[], object]) -> Stamp:
        """When that is done for which ``wait`` has the current stream wait."""
        if communicator not in self._lookouts:
            self._lookouts[communicator] = _Stream(self._device)
        with torch.cuda.stream(self._lookouts[communicator]):
            wait()
            return self.mark()
