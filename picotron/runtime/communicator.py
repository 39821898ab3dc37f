"""The one place through which a rank communicates: it holds the plan's order and counts the bytes.

Inside a segment a cursor walks the planned collectives; an operation of another kind, group or size than
the plan's next one is an ExecutionError at (rank, row, operation).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from attrs import frozen

from picotron.errors import ExecutionError
from picotron.planner.body import WAIT, Operation
from picotron.planner.program import HOST
from picotron.runtime.backend import Backend, Group, Handle


class Communicator:
    """Issues this rank's communication on ``backend`` and keeps account of it."""

    def __init__(self, backend: Backend, groups: Mapping[str, Group]) -> None:
        self.backend, self.groups = backend, groups
        self.payload_bytes: dict[tuple[str, str], int] = {}
        self._planned: Sequence[Operation] = ()
        self._stretches: Sequence[float] = ()
        self._cursor = 0
        self._action, self._row = "", -1
        self._to_copy: dict[str, int] = {}  # bytes of the copies under way that are still to come
        self.measuring = False  # live memory: then no operation may hold a tensor beyond its end

    def open(
        self, action: str, row: int, planned: Sequence[Operation], stretches: Sequence[float] = ()
    ) -> None:
        """Enter a segment of ``row`` whose collectives are ``planned``.

        ``stretches``: seconds of computing before, between and after them, for a virtual clock.
        """
        self._planned, self._cursor, self._action, self._row = planned, 0, action, row
        self._stretches = stretches
        self._spend()

    def close(self) -> None:
        """Leave the segment. Raises ExecutionError if a planned collective was not issued."""
        if self._cursor != len(self._planned):
            missing = self._planned[self._cursor]
            raise self._error(f"the segment ended before its planned {missing.kind} {missing.name!r}")
        self.open("", -1, ())

    def all_reduce(self, tensor: torch.Tensor, group: str, op: str = "sum") -> None:
        """Reduce ``tensor`` in place over ``group``."""
        self._expect("all_reduce", group, tensor)
        self._finish(self.backend.all_reduce(tensor, self._group(group), op))

    def all_gather(self, output: torch.Tensor, input: torch.Tensor, group: str) -> None:
        """Gather ``input`` into ``output`` along dim 0."""
        self._expect("all_gather", group, output)
        self._finish(self.backend.all_gather(output, input, self._group(group)))

    def reduce_scatter(self, output: torch.Tensor, input: torch.Tensor, group: str) -> None:
        """Sum ``input`` over ``group``, this rank's part of dim 0 into ``output``."""
        self._expect("reduce_scatter", group, input)
        self._finish(self.backend.reduce_scatter(output, input, self._group(group)))

    def all_to_all(self, output: torch.Tensor, input: torch.Tensor, group: str) -> None:
        """Send part i of ``input``, along dim 0, to member i, and receive its part as that of ``output``."""
        self._expect("all_to_all", group, input)
        self._finish(self.backend.all_to_all(output, input, self._group(group)))

    def exchange(self, output: torch.Tensor, input: torch.Tensor, group: str) -> None:
        """Send ``input`` to the next member, and receive ``output`` from the one before."""
        self._expect("exchange", group, input)
        self._finish(self.backend.exchange(output, input, self._group(group)))

    def start_exchange(self, output: torch.Tensor, input: torch.Tensor, group: str) -> Handle:
        """As ``exchange``, under way until ``wait``."""
        self._expect("exchange", group, input)
        handle = self.backend.exchange(output, input, self._group(group))
        self._spend()
        return handle

    def post_all_gather(self, output: torch.Tensor, input: torch.Tensor, group: str) -> Handle:
        """As ``all_gather``, under way until ``wait``."""
        self._expect("all_gather", group, output)
        return self._posted(self.backend.all_gather(output, input, self._group(group)))

    def post_all_reduce(self, tensor: torch.Tensor, group: str) -> Handle:
        """As ``all_reduce`` of a sum, under way until ``wait``."""
        self._expect("all_reduce", group, tensor)
        return self._posted(self.backend.all_reduce(tensor, self._group(group)))

    def post_reduce_scatter(self, output: torch.Tensor, input: torch.Tensor, group: str) -> Handle:
        """As ``reduce_scatter``, under way until ``wait``."""
        self._expect("reduce_scatter", group, input)
        return self._posted(self.backend.reduce_scatter(output, input, self._group(group)))

    def wait(self, handle: Handle, group: str) -> None:
        """Return once what is under way over ``group`` has ended, at its place in the plan."""
        self._next(WAIT, group)
        self._cursor += 1
        self._finish(handle)

    def place(self, group: str) -> tuple[int, int]:
        """Index of this rank in ``group``, and the group's size."""
        members = self._group(group)
        return members.index(self.backend.rank), members.size

    def start_all_reduce(self, tensor: torch.Tensor, group: str, planned_bytes: int) -> Handle:
        """Post the sum of ``tensor`` over ``group``, a row of the program with ``planned_bytes``."""
        self._count("all_reduce", group, tensor, planned_bytes)
        return self.backend.all_reduce(tensor, self._group(group))

    def start_all_gather(
        self, output: torch.Tensor, input: torch.Tensor, group: str, planned_bytes: int
    ) -> Handle:
        """Post the gathering of ``input`` into ``output``, of ``planned_bytes``."""
        self._count("all_gather", group, output, planned_bytes)
        return self.backend.all_gather(output, input, self._group(group))

    def start_reduce_scatter(
        self, output: torch.Tensor, input: torch.Tensor, group: str, planned_bytes: int
    ) -> Handle:
        """Post the sum of ``input`` over ``group``, its own part into ``output``, of ``planned_bytes``."""
        self._count("reduce_scatter", group, input, planned_bytes)
        return self.backend.reduce_scatter(output, input, self._group(group))

    def send(self, tensor: torch.Tensor, peer: int, channel: str, planned_bytes: int) -> Handle:
        """Post a send to world rank ``peer``, a row of the program with ``planned_bytes``."""
        self._count("send", "pp", tensor, planned_bytes)
        return self.backend.send(tensor, peer, channel)

    def receive(self, tensor: torch.Tensor, peer: int, channel: str, planned_bytes: int) -> Handle:
        """Post a receive from world rank ``peer``, a row of the program with ``planned_bytes``."""
        self._count("recv", "pp", tensor, planned_bytes)
        return self.backend.recv(tensor, peer, channel)

    def start_copy(self, kind: str, planned_bytes: int) -> Handle:
        """Post an "offload" to the host, or a "reload" from it, a row of the program with ``planned_bytes``.

        Its parts are told to ``copied``, and must be as many bytes once it is waited for.
        """
        self._to_copy[kind] = planned_bytes
        return _CopyHandle(self, kind, planned_bytes, self.backend.copy(kind, planned_bytes))

    def copied(self, kind: str, size: int) -> None:
        """Count a part of the "offload" or "reload" under way."""
        self._to_copy[kind] = self._to_copy.get(kind, 0) - size
        self.payload_bytes[kind, HOST] = self.payload_bytes.get((kind, HOST), 0) + size

    def end_copy(self, kind: str, planned_bytes: int) -> None:
        """Raise ExecutionError unless as much was copied as the plan says."""
        if missing := self._to_copy.pop(kind, 0):
            got = planned_bytes - missing
            raise self._error(f"{kind} must carry the planned {planned_bytes} bytes, got {got}")

    def _spend(self) -> None:
        """Compute the stretch that leads up to the next collective, or to the end of the segment."""
        if self._stretches:
            self.backend.spend(self._stretches[self._cursor])

    def _posted(self, handle: Handle) -> Handle:
        self._spend()
        return handle

    def _finish(self, handle: Handle) -> None:
        handle.wait()
        self._spend()
        if self.measuring:
            self.backend.settle()

    def _group(self, name: str) -> Group:
        try:
            return self.groups[name]
        except KeyError:
            raise self._error(f"the plan opened no group {name!r} on this rank") from None

    def _expect(self, kind: str, group: str, tensor: torch.Tensor) -> None:
        """Advance the cursor over the next planned collective, which must be this one."""
        planned = self._next(kind, group)
        self._count(kind, group, tensor, planned.payload_bytes)
        self._cursor += 1

    def _next(self, kind: str, group: str) -> Operation:
        """What the plan has next, which must be this."""
        if self._cursor >= len(self._planned):
            raise self._error(f"no further collective is planned here, got {kind} over {group}")
        planned = self._planned[self._cursor]
        if (planned.kind, planned.group) != (kind, group):
            raise self._error(
                f"the plan's next collective is {planned.kind} {planned.name!r} over {planned.group}, "
                f"got {kind} over {group}"
            )
        return planned

    def _count(self, kind: str, group: str, tensor: torch.Tensor, planned_bytes: int) -> None:
        size = tensor.numel() * tensor.element_size()
        if size != planned_bytes:
            raise self._error(f"{kind} over {group} must carry the planned {planned_bytes} bytes, got {size}")
        self.payload_bytes[kind, group] = self.payload_bytes.get((kind, group), 0) + size

    def _error(self, message: str) -> ExecutionError:
        """At the operation of the open segment; outside one, the walker knows the row."""
        position = f"row {self._row}, operation {self._cursor}" if self._action else None
        return ExecutionError(message, rank=self.backend.rank, action=self._action or None, position=position)


@frozen
class _CopyHandle:
    """A copy under way, whose bytes are looked at when it is waited for."""

    communicator: Communicator
    kind: str
    planned_bytes: int
    handle: Handle

    @property
    def span(self) -> tuple[float, float] | None:
        """As the backend tells it."""
        return self.handle.span

    def wait(self) -> None:
        """Return once it is complete."""
        self.handle.wait()
        self.communicator.end_copy(self.kind, self.planned_bytes)
