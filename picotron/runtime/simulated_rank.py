"""One rank of a simulated world: the ``Backend`` that its function is given."""

from __future__ import annotations

import math
import pickle
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from attrs import evolve

from picotron.errors import ExecutionError
from picotron.planner.clock import Operation as Timed
from picotron.planner.clock import advance
from picotron.planner.faults import Fault, link_factor
from picotron.planner.program import HOST
from picotron.runtime.backend import (
    Capabilities,
    Group,
    Handle,
    Transfer,
    check_all_gather,
    check_all_reduce,
    check_all_to_all,
    check_broadcast,
    check_exchange,
    check_message,
    check_ranks,
    check_reduce_scatter,
    unseen,
)
from picotron.runtime.collectives import Collectives
from picotron.runtime.device import on_default_stream
from picotron.runtime.guards import CHANGED, Guard, guard
from picotron.runtime.injection import Injection, Killed
from picotron.runtime.ledger import Collective, Copy, Ledger, Part, Post
from picotron.runtime.messages import Messages
from picotron.runtime.scheduler import Operation, Scheduler, Task, failed
from picotron.runtime.world import World

CAPABILITIES = Capabilities(name="simulated", clock="virtual", fused_reduce_scatter=True)

CPU_CLOCKED = evolve(CAPABILITIES, clock="virtual cpu")

_CONTROL = -1  # the world's own communicator: barrier, gather_objects, new_group
_FOLDERS = tuple(f"{Path(file).parent}/" for file in (__file__, torch.__file__))  # whose frames no user wrote


class SimulatedHandle:
    """An operation of the simulator, as one rank waits for it."""

    __slots__ = ("_backend", "_guards", "_operations", "_place")

    def __init__(
        self,
        backend: SimulatedBackend,
        operations: tuple[Operation, ...],
        place: str,
        guards: tuple[Guard, ...],
    ) -> None:
        self._backend, self._operations, self._place, self._guards = backend, operations, place, guards

    @property
    def operation(self) -> Operation:
        """The first of its operations."""
        return self._operations[0]

    @property
    def span(self) -> tuple[float, float] | None:
        """When it ran, in virtual seconds; None before it is complete."""
        ends = [operation.end_seconds for operation in self._operations]
        if not ends or None in ends:
            return None
        return min(operation.start_seconds for operation in self._operations), max(cast("list[float]", ends))

    def wait(self) -> None:
        """Return once the operation is complete."""
        first_time = self._backend.waited(self)
        try:
            self._backend.wait(self._operations, self._place, first_time)
            if any(watched.changed() for watched in self._guards):
                raise ExecutionError(
                    CHANGED,
                    rank=self._backend.rank,
                    action=self.operation.describe(),
                    position=self._place,
                )
        except ExecutionError:
            self._backend.troubled = True
            raise
        self._guards = ()


class SimulatedBackend:
    """One rank of a simulated world. Use it on the thread it was handed to only."""

    def __init__(
        self,
        task: Task,
        scheduler: Scheduler,
        ledger: Ledger,
        world: World,
        faults: tuple[Fault, ...],
        injected: Injection,
    ) -> None:
        self.task, self.scheduler, self.ledger = task, scheduler, ledger
        self.rank, self.world_size = task.rank, len(scheduler.tasks)
        self.device = world.device
        self.capabilities = CAPABILITIES if world.clock == "planned" else CPU_CLOCKED
        self._world, self._faults, self._injected = world, faults, injected
        self._messages = Messages(scheduler, ledger, world.semantics, self._message_seconds)
        self._collectives = Collectives(scheduler, ledger, self._collective_seconds)
        self._everyone = Group(tuple(range(self.world_size)), "world", _CONTROL)
        self._num_groups = 0
        self._num_posted: dict[object, int] = {}  # by communicator, or (kind, peer, channel)
        self._num_operations = 0
        self._place: tuple[int, int, str] | None = None  # step, index and action, as told by at()
        self._open: dict[SimulatedHandle, None] = {}  # handles that have not been waited for
        self.troubled = False  # an operation has failed on this rank
        self.killed = ""  # how a fault has killed it, in words
        task.factor = injected.factor

    def new_group(self, ranks: Sequence[int], name: str = "") -> Group:
        """A communicator of ascending ``ranks``."""
        members = check_ranks(self.rank, ranks, self.world_size)
        self._collective("new_group", self._everyone, (list(members), name), ()).wait()
        self._num_groups += 1
        return Group(members, name, self._num_groups)

    def open_channels(self, channels: Sequence[tuple[int, int, str]]) -> None:
        """Nothing: a channel is a name."""

    def all_reduce(self, tensor: torch.Tensor, group: Group, op: str = "sum") -> Handle:
        """Replace ``tensor`` by its sum, max or avg over the group."""
        check_all_reduce(self.rank, group, tensor, op)
        agreed = (op, tensor.dtype, list(tensor.shape))
        return self._collective("all_reduce", group, agreed, (tensor, op), (tensor,))

    def all_gather(self, output: torch.Tensor, input: torch.Tensor, group: Group) -> Handle:
        """Write to ``output`` the members' inputs, concatenated."""
        check_all_gather(self.rank, group, output, input)
        agreed = (input.dtype, list(input.shape))
        return self._collective("all_gather", group, agreed, (output, input), (output, input))

    def reduce_scatter(
        self, output: torch.Tensor, input: torch.Tensor, group: Group, op: str = "sum"
    ) -> Handle:
        """Write to ``output`` this rank's part of the reduced inputs."""
        check_reduce_scatter(self.rank, group, output, input, op)
        agreed = (op, input.dtype, list(input.shape))
        return self._collective("reduce_scatter", group, agreed, (output, input, op), (input, output))

    def all_to_all(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        group: Group,
        output_sizes: Sequence[int] | None = None,
        input_sizes: Sequence[int] | None = None,
    ) -> Handle:
        """Exchange parts: part i of ``input`` goes to member i."""
        received, sent = check_all_to_all(self.rank, group, output, input, output_sizes, input_sizes)
        agreed = (input.dtype, list(input.shape[1:]))
        arguments = (output, input, received, sent)
        return self._collective("all_to_all", group, agreed, arguments, (input, output))

    def exchange(self, output: torch.Tensor, input: torch.Tensor, group: Group) -> Handle:
        """Send ``input`` to the next member and receive from the one before."""
        check_exchange(self.rank, group, output, input)
        agreed = (input.dtype, list(input.shape))
        return self._collective("exchange", group, agreed, (output, input), (input, output))

    def broadcast(self, tensor: torch.Tensor, group: Group, source: int) -> Handle:
        """Replace ``tensor`` by that of world rank ``source``."""
        check_broadcast(self.rank, group, tensor, source)
        agreed = (f"from rank {source}", tensor.dtype, list(tensor.shape))
        return self._collective("broadcast", group, agreed, (tensor, group.index(source)), (tensor,))

    def send(self, tensor: torch.Tensor, peer: int, channel: str = "") -> Handle:
        """Send to ``peer``; complete at once if the world buffers."""
        return self.batch((Transfer("send", tensor, peer, channel),))

    def recv(self, tensor: torch.Tensor, peer: int, channel: str = "") -> Handle:
        """Receive into ``tensor`` the next message of ``peer`` on ``channel``."""
        return self.batch((Transfer("recv", tensor, peer, channel),))

    def batch(self, transfers: Sequence[Transfer]) -> Handle:
        """Post several sends and receives together."""
        for transfer in transfers:
            check_message(self.rank, transfer.kind, transfer.tensor, transfer.peer, self.world_size)
        place, now = self._begin()
        posts = [self._post(transfer, place, now) for transfer in transfers]
        guards = tuple(watched for post in posts for watched in post.guards)
        with unseen():
            self._messages.post([post for post in posts if not self._lose(post)])
        return self._handle(tuple(posts), place, guards)

    def copy(self, kind: str, payload_bytes: int) -> Handle:
        """A copy on a stream of its own, which takes what the world's prices say."""
        place, now = self._begin()
        copy = Copy(number=self._next_number((kind, HOST)), kind=kind, rank=self.rank)
        price = self._world.price
        seconds = 0.0 if price is None else price(kind, HOST, (self.rank,), payload_bytes)
        span = advance(self.scheduler.streams, Timed(((self.rank, kind),), now, seconds))
        self.scheduler.streams[self.rank, kind] = copy.end_seconds = span.end
        copy.start_seconds = span.start
        return self._handle((copy,), place, ())

    def barrier(self) -> None:
        """Return once every rank has called it."""
        self._collective("barrier", self._everyone, (), ()).wait()

    def gather_objects(self, value: object) -> list[object]:
        """Every rank's value, each rank its own copies."""
        with unseen():
            pickled = pickle.dumps(value)
        handle = self._collective("gather_objects", self._everyone, (), (pickled,))
        handle.wait()
        assert isinstance(handle.operation, Collective)
        return [pickle.loads(theirs) for (theirs,) in handle.operation.in_group_order()]

    def settle(self) -> None:
        """Nothing is held beyond an operation's end."""

    def mark(self) -> float:
        """Virtual seconds on this rank's clock."""
        return self.scheduler.tick(self.task)

    def seconds_since(self, start: float, marks: Sequence[float]) -> list[float]:
        """Their differences."""
        return [mark - start for mark in marks]

    def spend(self, seconds: float) -> None:
        """Compute for so long, where the clock is a planned one."""
        if not 0 <= seconds < math.inf:
            raise ExecutionError(
                f"seconds must be a finite number of at least 0, got {seconds!r}",
                rank=self.rank,
                action="spend",
            )
        if self._world.clock == "planned":
            self._pass(seconds * self._injected.factor, "compute")

    def at(self, step: int, index: int, action: str = "") -> None:
        """Say where this rank is; faults of this place strike."""
        self._place = step, index, action
        self._reach(step, index)

    def cpu_seconds(self) -> float:
        """CPU seconds of this rank's thread, the simulator's arithmetic included."""
        return time.thread_time() - self.task.started_cpu_seconds

    def random_scope(self, seed: int) -> AbstractContextManager[torch.Generator]:
        """A fresh generator."""
        return nullcontext(torch.Generator(self.device).manual_seed(seed))

    def abort(self, error: BaseException) -> None:
        """End the other ranks at their next communication."""
        if not (isinstance(error, ExecutionError) and error.rank is not None):
            error.add_note(f"raised on simulated rank {self.rank} of {self.world_size}")
        self.scheduler.note(self.task, "fail", f"{type(error).__name__}: {error}")
        self.scheduler.stop(error)

    def wait(self, operations: Sequence[Operation], place: str, first_time: bool) -> None:
        """Return once all ``operations`` are complete; ExecutionError if that took too long."""
        self._check_alive()
        started = self.scheduler.tick(self.task)
        for operation in operations:
            before = self.scheduler.tick(self.task)
            if first_time and self._world.keep_events:
                self.scheduler.note(self.task, "wait", operation.describe())
            self.scheduler.wait(self.task, operation, place)
            if first_time and self._world.keep_events:
                self._note_spans(operation, place, before)
        patience = self._world.patience_seconds
        if patience is not None and self.scheduler.streams[self.rank] - started > patience:
            raise ExecutionError(
                f"an operation must be complete within {patience:g} virtual seconds of waiting, and was not",
                rank=self.rank,
                action=operations[0].describe(),
                position=place,
            )

    def _note_spans(self, operation: Operation, place: str, before: float) -> None:
        """Write down that this rank has waited, and when the operation ran."""
        assert operation.end_seconds is not None
        told, after = operation.describe(), self.scheduler.streams[self.rank]
        self.scheduler.note_span(self.task, "rank", f"wait for {told}", place, (before, after))
        span = operation.start_seconds, operation.end_seconds
        self.scheduler.note_span(self.task, operation.stream, told, place, span)

    def waited(self, handle: SimulatedHandle) -> bool:
        """Take note that ``handle`` is waited for; whether it is for the first time."""
        return self._open.pop(handle, 0) is None

    def check_waited(self) -> None:
        """Raise ExecutionError for the first handle that nobody has waited for.

        After another error the rank may not have come to wait for all.
        """
        for handle in () if self.troubled else self._open:
            raise ExecutionError(
                f"every handle must be waited for; {len(self._open)} of this rank's never were, this is the "
                "first: call wait() before its tensors are used or dropped",
                rank=self.rank,
                action=handle.operation.describe(),
                position=handle._place,
            )

    def vanish(self) -> None:
        """Be gone, which a fault has brought about: fail, for the others, what needs this rank."""
        self.killed = f"was killed by a fault{self.where()}"
        self.ledger.vanished[self.rank] = f"rank {self.rank} {self.killed}"
        self._collectives.abandon(self.rank)
        self._messages.abandon(self.rank)

    def _check_alive(self) -> None:
        """End this rank at its communication if it, or the world, is no more."""
        if self.killed:
            raise Killed
        self.scheduler.check_alive()

    def where(self) -> str:
        """Where this rank is, as reports end with it."""
        return f" at operation {self._num_operations}" if self._place is None else f" at {self._told_place()}"

    def _told_place(self) -> str:
        """The place that ``at`` was last called with, in words."""
        assert self._place is not None
        step, index, action = self._place
        where = [f"step {step}"] * (step >= 0) + [f"row {index}"] * (index >= 0)
        return ", ".join([*where, action] if action else where)

    def _reach(self, step: int, index: int) -> None:
        try:
            pauses = self._injected.reach(step, index)
        except Killed:
            self.vanish()
            raise
        for seconds in pauses:
            self._pass(seconds, "pause")

    def _pass(self, seconds: float, name: str) -> None:
        """Let virtual time go by on this rank."""
        before = self.scheduler.streams[self.rank]
        self.scheduler.spend(self.task, seconds)
        if self._world.keep_events:
            span = before, self.scheduler.streams[self.rank]
            self.scheduler.note_span(self.task, "rank", name, self.where().removeprefix(" at "), span)

    def _begin(self) -> tuple[str, float]:
        """Before anything is posted: where, and when on this rank's clock."""
        now = self.scheduler.tick(self.task)
        self._check_alive()
        if not on_default_stream(self.device):
            raise ExecutionError(
                "simulated ranks share the device's default stream, got a tensor posted from another: "
                "leave the stream before communicating",
                rank=self.rank,
            )
        if self._place is None:
            if self._injected.pending:
                self._reach(0, self._num_operations)
                now = self.scheduler.streams[self.rank]
            place = _caller()
        else:
            place = self._told_place()
        self._num_operations += 1
        return place, now

    def _post(self, transfer: Transfer, place: str, now: float) -> Post:
        receives = transfer.kind == "recv"
        return Post(
            number=self._next_number((transfer.kind, transfer.peer, transfer.channel)),
            kind=transfer.kind,
            rank=self.rank,
            peer=transfer.peer,
            channel=transfer.channel,
            tensor=transfer.tensor,
            ready_seconds=now,
            place=place,
            guards=(guard(transfer.tensor),),
            corrupt=self._injected.corrupt() if receives else None,
        )

    def _lose(self, post: Post) -> bool:
        """Whether a fault drops this message; the sender takes it for sent."""
        if post.kind != "send":
            return False
        number = self.ledger.num_sent.get((self.rank, post.peer), 0)
        self.ledger.num_sent[self.rank, post.peer] = number + 1
        if (post.peer, number) not in self._injected.lost:
            return False
        post.start_seconds = post.end_seconds = post.ready_seconds
        self.ledger.dropped.append(f"rank {self.rank} posted {post.describe()}, which a fault dropped")
        return True

    def _handle(
        self, operations: tuple[Operation, ...], place: str, guards: tuple[Guard, ...]
    ) -> SimulatedHandle:
        handle = SimulatedHandle(self, operations, place, guards)
        if operations:
            self._open[handle] = None
        if self._world.keep_events:
            for operation in operations:
                self.scheduler.note(self.task, "post", operation.describe())
        self.scheduler.skip(self.task)
        self.scheduler.posted(self.task)
        return handle

    def _next_number(self, stream: object) -> int:
        number = self._num_posted.get(stream, 0)
        self._num_posted[stream] = number + 1
        return number

    def _collective(
        self,
        kind: str,
        group: Group,
        agreed: tuple[object, ...],
        arguments: tuple[Any, ...],
        tensors: tuple[torch.Tensor, ...] = (),
    ) -> SimulatedHandle:
        """Post this rank's part; the last one to post completes the operation for all."""
        if not isinstance(group.payload, int):
            raise ExecutionError(f"group must come from new_group, got {group}", rank=self.rank, action=kind)
        place, now = self._begin()
        guards = tuple(map(guard, tensors))
        corrupt = self._injected.corrupt() if tensors else None
        collective = self._collectives.post(
            self.rank,
            group,
            self._next_number(group.payload),
            Part((kind, *agreed), arguments, now, place, guards, corrupt),
            max((tensor.numel() * tensor.element_size() for tensor in tensors), default=0),
        )
        if collective.problem is not None:
            self.troubled = True
            raise failed(self.rank, collective, place)
        return self._handle((collective,), place, guards)

    def _collective_seconds(self, collective: Collective) -> float:
        group, price = collective.group, self._world.price
        if price is None or group.payload == _CONTROL or group.size == 1:
            return 0.0
        seconds = price(collective.kind, group.name, group.ranks, collective.payload_bytes)
        return seconds * link_factor(self._faults, group.ranks) if self._faults else seconds

    def _message_seconds(self, sender: int, receiver: int, size: int) -> float:
        if self._world.price is None:
            return 0.0
        ends = sender, receiver
        seconds = self._world.price("send", "pp", ends, size)
        return seconds * link_factor(self._faults, ends) if self._faults else seconds


def _caller() -> str:
    """File and line of the innermost frame that is neither the runtime's nor torch's."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_FOLDERS):
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"
