"""When an operation runs: the one rule of time that predictions and simulated clocks share.

A *stream* does one operation after the other: the computing of a rank, a communicator, one direction of a
channel between two ranks. An operation starts when it is ready and every stream it takes is free, and takes
them all until it ends. What shares a link with what is a static factor of its seconds, so that no time
depends on who is asked first.

- computing: on the rank's own stream, ready at once;
- a collective: on its communicator, ready when the last member has come to it;
- a message: on its channel, ready when both ends are posted (buffered: when it is sent);
- waiting: on the rank's own stream, ready at the end of what is waited for, taking no time.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import NamedTuple


class Operation(NamedTuple):
    """What takes ``streams`` for ``seconds``, at ``ready`` (seconds) at the earliest."""

    streams: tuple[Hashable, ...]
    ready: float
    seconds: float


class Span(NamedTuple):
    """From when to when, in seconds."""

    start: float
    end: float


def advance(state: Mapping[Hashable, float], operation: Operation) -> Span:
    """When ``operation`` runs, given when each stream is free (one that is not in ``state``: at 0).

    The state after it is the same, but that ``operation.streams`` are free at the span's end.

    >>> advance({"rank 0": 2.0}, Operation(("rank 0",), ready=0.0, seconds=0.5))
    Span(start=2.0, end=2.5)
    >>> advance({"rank 0": 2.0}, Operation(("dp",), ready=3.0, seconds=0.5))
    Span(start=3.0, end=3.5)
    """
    start = operation.ready
    for stream in operation.streams:
        start = max(start, state.get(stream, 0.0))
    return Span(start, start + operation.seconds)
