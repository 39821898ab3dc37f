"""The world of torch.distributed: gloo on CPU, NCCL on CUDA. No other module talks to it but ``torch_api``.

A process opens one backend at a time; torch's default group is then that backend's world. ``connect`` reads
torchrun's environment once a process; several backends can follow one another over the same ``Processes``,
each over all of them or over a part, whose ranks then count from 0.

- avg on gloo is the sum, divided when waited for.
- A channel is a tag on gloo. On NCCL each direction of it is a communicator of its own per pair. NCCL makes
  communicators at their first operation, and the host waits there for the peers: so every group and channel
  has its first operation where it is opened, in an order that all ranks share.
- On NCCL ``wait`` has the current stream wait, and never the host; what an operation uses is kept until then.
  Its clock is the device's: ``mark`` puts an event on the stream, ``seconds_since`` reads it after the step.
- Whatever torch raises, because a peer died or the timeout passed, is an ExecutionError that names rank and
  operation, and the failure a rank announced by ``abort`` if there was one.
- A ``Watchdog`` tells every rank of another's death, and ends it if it does not end by itself.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.distributed as dist
from attrs import define, frozen
from torch.distributed.rendezvous import rendezvous

from picotron.errors import ExecutionError
from picotron.runtime.backend import (
    Capabilities,
    Group,
    Handle,
    Mark,
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
from picotron.runtime.connections import break_off, open_connections
from picotron.runtime.same_host import WAITING, share_host
from picotron.runtime.shared_collectives import Finish, SharedCollectives
from picotron.runtime.stamps import CommunicationClock, Stamp
from picotron.runtime.watchdog import TELL_SECONDS, Watchdog

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

TIMEOUT_SECONDS = 600.0
SHARED_BYTES = 1 << 24  # the largest tensor that goes through memory shared with others of this host
SETTLE_SECONDS = 3e-3

GLOO = Capabilities(name="gloo", clock="host", fused_reduce_scatter=False)
NCCL = Capabilities(name="nccl", clock="device", fused_reduce_scatter=True)

MESSAGES = 1 << 32  # channels of messages are numbered from here, those of groups below
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_REDUCE_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "avg": dist.ReduceOp.AVG}
# Renamed in torch 2.13; the older names then warn.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@frozen
class Processes:
    """The processes of one launch, as one of them sees them, and the store they share."""

    rank: int
    world_size: int
    local_rank: int
    store: Store


def connect(timeout_seconds: float = TIMEOUT_SECONDS) -> Processes:
    """The processes that torchrun started, from its environment. Call it once a process."""
    if missing := [name for name in _VARIABLES if name not in os.environ]:
        raise ExecutionError(
            f"the environment must name {', '.join(_VARIABLES)}; missing {', '.join(missing)}: "
            "start with torchrun, or choose the simulated backend"
        )
    store, rank, world_size = next(rendezvous("env://", timeout=timedelta(seconds=timeout_seconds)))
    return Processes(rank, world_size, int(os.environ["LOCAL_RANK"]), store)


class DistributedBackend:
    """One process's rank in a world of processes: all of a launch, or its members ``ranks``."""

    def __init__(
        self,
        processes: Processes,
        *,
        device: torch.device | str | None = None,
        timeout_seconds: float = TIMEOUT_SECONDS,
        ranks: Sequence[int] | None = None,
        shared_memory: bool = True,
    ) -> None:
        """``shared_memory``: CPU tensors go between ranks of one host through memory, where they can."""
        everyone = range(processes.world_size)
        members = check_ranks(processes.rank, everyone if ranks is None else ranks, processes.world_size)
        if processes.rank not in members:
            raise ExecutionError(f"only members open a world, this one is {members}", rank=processes.rank)
        if dist.is_initialized():
            raise ExecutionError("a process opens one world at a time: close the other", rank=processes.rank)
        self.rank, self.world_size = members.index(processes.rank), len(members)
        self.device = _device(device, processes.local_rank)
        self.capabilities = NCCL if self.device.type == "cuda" else GLOO
        self._timeout = timedelta(seconds=timeout_seconds)
        self._store = _fresh_store(processes, members)
        self._pairs: dict[tuple[int, int, str], Any] = {}  # NCCL communicators by sender, receiver, channel
        self._tags: dict[int, str] = {}
        self._num_groups = 0
        self._shared: SharedCollectives | None = None
        self._clock = CommunicationClock(self.device) if self.capabilities is NCCL else None
        self._watchdog: Watchdog | None = None
        self._connections: frozenset[str] = frozenset()  # of torch's groups
        self._started_cpu_seconds = time.process_time()
        with self._named("open"), self._connecting():
            dist.init_process_group(
                "gloo" if self.capabilities is GLOO else "cpu:gloo,cuda:nccl",
                store=self._store,
                rank=self.rank,
                world_size=self.world_size,
                timeout=self._timeout,
            )
        with self._named("open"):
            if self.world_size > 1:
                self._watchdog = Watchdog(self.rank, self.world_size, self._store, self._break_off)
            if shared_memory and self.capabilities is GLOO and self.world_size > 1:
                host = share_host(self._store, self.rank, self.world_size, timeout_seconds)
                self._shared = None if host is None else SharedCollectives(host)

    @classmethod
    def open(
        cls,
        device: torch.device | str | None = None,
        *,
        timeout_seconds: float = TIMEOUT_SECONDS,
        ranks: Sequence[int] | None = None,
        shared_memory: bool = True,
    ) -> Self:
        """A backend over the processes torchrun started; ``device`` is cuda if there is one, else cpu."""
        processes = connect(timeout_seconds)
        return cls(
            processes,
            device=device,
            timeout_seconds=timeout_seconds,
            ranks=ranks,
            shared_memory=shared_memory,
        )

    def close(self, *, failed: bool = False) -> None:
        """Close every communicator; a second call does nothing.

        ``failed``: operations may be under way that will never end; on NCCL they are ended.
        """
        if self._shared is not None:
            self._shared.host.close()
        if self._watchdog is not None:
            self._watchdog.leave()
        for pair in self._pairs.values():
            pair.abort()  # nothing is under way, or it will never end
        self._pairs.clear()
        if dist.is_initialized() and failed and self.capabilities is NCCL:
            dist.distributed_c10d._abort_process_group()
        elif dist.is_initialized():
            dist.destroy_process_group()
        if self._watchdog is not None:
            self._watchdog.close()

    @contextmanager
    def _connecting(self) -> Iterator[None]:
        """The body, in which torch opens connections that may have to be broken off."""
        before = open_connections()
        yield
        self._connections |= open_connections() - before

    def _break_off(self) -> None:
        """End whatever this rank waits on; called by the watchdog. What a GPU waits on cannot be reached."""
        if self._shared is not None:
            self._shared.host.break_off()
        break_off(self._connections)

    def __enter__(self) -> Self:
        """Hand over the backend itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close, after every rank has come this far, or after telling the others of an error."""
        if error is not None:
            self.abort(error)
            return
        try:
            if self._clock is not None:
                torch.cuda.synchronize(self.device)
            self.barrier()
        finally:
            self.close()

    def new_group(self, ranks: Sequence[int], name: str = "") -> Group:
        """A communicator of ascending ``ranks``."""
        members = check_ranks(self.rank, ranks, self.world_size)
        with self._named("new_group"), self._connecting():
            opened = dist.new_group(list(members), timeout=self._timeout)
            if self.capabilities is NCCL and self.rank in members:
                dist.all_reduce(torch.zeros(1, device=self.device), group=opened)
        self._num_groups += 1
        return Group(members, name, Opened(opened, self._num_groups, self._is_shared(members)))

    def open_channels(self, channels: Sequence[tuple[int, int, str]]) -> None:
        """On NCCL one number goes over each, so that its communicator is there; on gloo nothing."""
        if self.capabilities is GLOO:
            return
        for sender, receiver, channel in sorted(channels):
            number = torch.zeros(1, device=self.device)
            if self.rank == sender:
                self.send(number, receiver, channel).wait()
            elif self.rank == receiver:
                self.recv(number, sender, channel).wait()

    def _is_shared(self, ranks: Sequence[int]) -> bool:
        return self._shared is not None and self._shared.reaches(ranks)

    def all_reduce(self, tensor: torch.Tensor, group: Group, op: str = "sum") -> Handle:
        """Replace ``tensor`` by its sum, max or avg over the group."""
        check_all_reduce(self.rank, group, tensor, op)
        if shared := self._sharing(group, tensor):
            return self._show(
                "all_reduce", group, lambda channel: shared.all_reduce(tensor, group, channel, op)
            )
        torch_op, finish = self._reduction(op, tensor, group)
        return self._post(
            "all_reduce", group, lambda pg: dist.all_reduce(tensor, torch_op, group=pg, async_op=True), finish
        )

    def all_gather(self, output: torch.Tensor, input: torch.Tensor, group: Group) -> Handle:
        """Write to ``output`` the members' inputs, concatenated."""
        check_all_gather(self.rank, group, output, input)
        if shared := self._sharing(group, output):
            return self._show(
                "all_gather", group, lambda channel: shared.all_gather(output, input, group, channel)
            )
        return self._post("all_gather", group, lambda pg: _all_gather(output, input, group=pg, async_op=True))

    def reduce_scatter(
        self, output: torch.Tensor, input: torch.Tensor, group: Group, op: str = "sum"
    ) -> Handle:
        """Write to ``output`` this rank's part of the reduced inputs."""
        check_reduce_scatter(self.rank, group, output, input, op)
        if shared := self._sharing(group, input):
            return self._show(
                "reduce_scatter",
                group,
                lambda channel: shared.reduce_scatter(output, input, group, channel, op),
            )
        torch_op, finish = self._reduction(op, output, group)
        return self._post(
            "reduce_scatter",
            group,
            lambda pg: _reduce_scatter(output, input, torch_op, group=pg, async_op=True),
            finish,
        )

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
        if shared := self._sharing(group):
            return self._show(
                "all_to_all",
                group,
                lambda channel: shared.all_to_all(output, input, group, channel, received, sent),
            )
        return self._post(
            "all_to_all",
            group,
            lambda pg: dist.all_to_all_single(
                output, input, list(received), list(sent), group=pg, async_op=True
            ),
        )

    def exchange(self, output: torch.Tensor, input: torch.Tensor, group: Group) -> Handle:
        """Send ``input`` to the next member and receive from the one before: an uneven all_to_all."""
        check_exchange(self.rank, group, output, input)
        if shared := self._sharing(group, input):
            return self._show(
                "exchange", group, lambda channel: shared.exchange(output, input, group, channel)
            )
        place, size = group.index(self.rank), group.size
        received, sent = ([0] * size for _ in range(2))
        received[place - 1] = sent[(place + 1) % size] = input.numel()
        return self._post(
            "exchange",
            group,
            lambda pg: dist.all_to_all_single(
                output.view(-1), input.view(-1), received, sent, group=pg, async_op=True
            ),
        )

    def broadcast(self, tensor: torch.Tensor, group: Group, source: int) -> Handle:
        """Replace ``tensor`` by that of world rank ``source``."""
        check_broadcast(self.rank, group, tensor, source)
        if shared := self._sharing(group, tensor):
            return self._show(
                "broadcast", group, lambda channel: shared.broadcast(tensor, group, channel, source)
            )
        return self._post(
            "broadcast", group, lambda pg: dist.broadcast(tensor, source, group=pg, async_op=True)
        )

    def send(self, tensor: torch.Tensor, peer: int, channel: str = "") -> Handle:
        """Send to ``peer``; on gloo it may end only when the receive is posted."""
        check_message(self.rank, "send", tensor, peer, self.world_size)
        with self._named(action := f"send to rank {peer} on channel {channel!r}"):
            if shared := self._sharing_with(peer, tensor):
                return SharedHandle(self, action, shared.send(tensor, peer, MESSAGES + self._tag(channel)))
            if self._clock is not None:
                pair, posted = self._pair(self.rank, peer, channel), self._clock.mark()
                return StreamHandle(self, action, pair.send([tensor], 1, 0), posted, self._clock, pair)
            work = dist.isend(tensor, peer, tag=self._tag(channel))
        return DistributedHandle(self, action, work, None)

    def recv(self, tensor: torch.Tensor, peer: int, channel: str = "") -> Handle:
        """Receive into ``tensor`` the next message of ``peer`` on ``channel``."""
        check_message(self.rank, "recv", tensor, peer, self.world_size)
        with self._named(action := f"recv from rank {peer} on channel {channel!r}"):
            if shared := self._sharing_with(peer, tensor):
                return SharedHandle(self, action, shared.receive(tensor, peer, MESSAGES + self._tag(channel)))
            if self._clock is not None:
                pair, posted = self._pair(peer, self.rank, channel), self._clock.mark()
                return StreamHandle(self, action, pair.recv([tensor], 0, 0), posted, self._clock, pair)
            work = dist.irecv(tensor, peer, tag=self._tag(channel))
        return DistributedHandle(self, action, work, None)

    def batch(self, transfers: Sequence[Transfer]) -> Handle:
        """Post several sends and receives, one after the other: none of them waits for another."""
        post = {"send": self.send, "recv": self.recv}
        return _All([post[t.kind](t.tensor, t.peer, t.channel) for t in transfers])

    def copy(self, kind: str, payload_bytes: int) -> Handle:
        """Nothing to wait for: the device's own streams keep order."""
        return _All([])

    def barrier(self) -> None:
        """Return once every rank's host has called it."""
        self.gather_objects(None)

    def gather_objects(self, value: object) -> list[object]:
        """Every rank's value, through gloo."""
        values: list[object] = [None] * self.world_size
        with self._named("gather_objects"):
            dist.all_gather_object(values, value)
        return values

    def settle(self) -> None:
        """Give gloo's threads, which let go of tensors just after ``wait``, a moment to do so."""
        if self._clock is None:
            time.sleep(SETTLE_SECONDS)

    def mark(self) -> Mark:
        """Host seconds, or an event on the current stream."""
        return time.perf_counter() if self._clock is None else self._clock.mark()

    def seconds_since(self, start: Mark, marks: Sequence[Mark]) -> list[float]:
        """Seconds from ``start`` to each of ``marks``."""
        if self._clock is None:
            return [mark - start for mark in marks]
        return self._clock.seconds(start, marks)

    def spend(self, seconds: float) -> None:
        """Nothing: time is real."""

    def at(self, step: int, index: int, action: str = "") -> None:
        """Where the others, should this rank die, will have seen it last."""
        if self._watchdog is not None:
            self._watchdog.at((step, index, action))

    def cpu_seconds(self) -> float:
        """CPU seconds of this process, the communication's own threads included."""
        return time.process_time() - self._started_cpu_seconds

    def random_scope(self, seed: int) -> AbstractContextManager[torch.Generator]:
        """A fresh generator."""
        return nullcontext(torch.Generator(self.device).manual_seed(seed))

    def abort(self, error: BaseException) -> None:
        """Announce the failure and close, which ends what the others are waiting for."""
        try:
            failure = f"rank {self.rank} failed: {type(error).__name__}: {error}"
            if self._watchdog is None or self._watchdog.news is None:
                self._store.compare_set("failure", "", failure)  # the first one stays
            if self._watchdog is not None:
                self._watchdog.failed(failure)
            self.close(failed=True)
        except RuntimeError as secondary:  # the first error is the one to tell
            error.add_note(f"closing then failed too: {secondary}")

    def _sharing(self, group: Group, tensor: torch.Tensor | None = None) -> SharedCollectives | None:
        """How ``tensor`` (None: of any size) goes through shared memory; None where it does not."""
        opened = group.payload
        fits = tensor is None or tensor.numel() * tensor.element_size() <= SHARED_BYTES
        return self._shared if isinstance(opened, Opened) and opened.is_shared and fits else None

    def _sharing_with(self, peer: int, tensor: torch.Tensor) -> SharedCollectives | None:
        """The same, for a message."""
        fits = tensor.numel() * tensor.element_size() <= SHARED_BYTES
        return self._shared if fits and self._is_shared((peer,)) else None

    def _show(self, kind: str, group: Group, start: Callable[[int], Finish]) -> Handle:
        """Start a collective through shared memory."""
        assert isinstance(group.payload, Opened)
        with self._named(action := f"{kind} in group {group}"):
            return SharedHandle(self, action, start(group.payload.number))

    def _post(
        self, kind: str, group: Group, start: Callable[[Any], Any], finish: Callable[[], object] | None = None
    ) -> Handle:
        """Start a collective."""
        action = f"{kind} in group {group}"
        if not isinstance(group.payload, Opened):
            raise ExecutionError(f"group must come from new_group, got {group}", rank=self.rank, action=kind)
        with self._named(action):
            if self._clock is not None:
                posted = self._clock.mark()
                work = start(group.payload.process_group)
                return StreamHandle(self, action, work, posted, self._clock, group.payload.number)
            return DistributedHandle(self, action, start(group.payload.process_group), finish)

    def _reduction(
        self, op: str, result: torch.Tensor, group: Group
    ) -> tuple[Any, Callable[[], object] | None]:
        """Torch's name for ``op``, and what is left to do to ``result`` at the end."""
        if op == "avg" and self.capabilities is GLOO:
            return dist.ReduceOp.SUM, lambda: result.div_(group.size)
        return _REDUCE_OPS[op], None

    def _tag(self, channel: str) -> int:
        """The channel's number on every rank."""
        tag = zlib.crc32(channel.encode()) & 0x7FFFFFFF
        if self._tags.setdefault(tag, channel) != channel:
            raise ExecutionError(
                f"channels must have distinct tags, {channel!r} and {self._tags[tag]!r} share one"
            )
        return tag

    def _pair(self, sender: int, receiver: int, channel: str) -> Any:
        """The NCCL communicator of this channel and direction; the sender is its rank 0."""
        key = sender, receiver, channel
        if key not in self._pairs:
            store = _part(self._store, f"pair/{sender}/{receiver}/{channel}")
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = self._timeout
            self._pairs[key] = dist.ProcessGroupNCCL(store, int(self.rank == receiver), 2, options)
        return self._pairs[key]

    @contextmanager
    def _named(self, action: str) -> Iterator[None]:
        """The body unseen by autograd and modes; what torch raises in it as an ExecutionError."""
        try:
            with unseen():
                yield
        except ExecutionError as error:
            if error.action != WAITING:
                raise
            message = f"{self._blame(wait=True)}{error.message}"
            raise ExecutionError(message, rank=self.rank, action=action) from error
        except (RuntimeError, ValueError) as error:
            message = f"{self._blame(wait='onnection' in str(error))}torch.distributed failed: {error}"
            raise ExecutionError(message, rank=self.rank, action=action) from error
        except OSError as error:
            raise ExecutionError(f"no connection: {error}", rank=self.rank, action=action) from error

    def _blame(self, *, wait: bool) -> str:
        """Who died or failed, as a message begins; ``wait``: that is likely, and may be on its way."""
        if self._watchdog is not None:
            news = self._watchdog.wait(TELL_SECONDS if wait else 0.0)
            if news is not None:
                self._watchdog.told()
                return f"{news}; "
        return self._announced_failure()

    def _announced_failure(self) -> str:
        try:
            return f"{self._store.get('failure').decode()}; " if self._store.check(["failure"]) else ""
        except RuntimeError:  # the store's host is gone
            return ""


@frozen
class Opened:
    """A group's communicator: torch's, its number, and whether its ranks share this host's memory."""

    process_group: Any
    number: int
    is_shared: bool


@define
class SharedHandle:
    """An operation through shared memory; ``finish`` is None once it has ended."""

    backend: DistributedBackend
    action: str
    finish: Finish | None

    @property
    def span(self) -> tuple[float, float] | None:
        """Unknown: nobody looks at a clock."""
        return None

    def wait(self) -> None:
        """Return once it is complete."""
        if self.finish is not None:
            with self.backend._named(self.action):
                self.finish()
            self.finish = None


@define
class DistributedHandle:
    """An operation torch has under way."""

    backend: DistributedBackend
    action: str
    work: Any
    finish: Callable[[], object] | None

    @property
    def span(self) -> tuple[float, float] | None:
        """Unknown: torch does not tell."""
        return None

    def wait(self) -> None:
        """Return once it is complete."""
        if self.work is None:
            return
        with self.backend._named(self.action):
            self.work.wait()
            if self.finish is not None:
                self.finish()
        self.work = None


@define
class StreamHandle:
    """An operation on a stream of NCCL's; ``communicator`` tells which.

    ``posted`` is when its inputs were there, from which it counts: what it waits for of earlier operations
    and of its peers is its own time.
    """

    backend: DistributedBackend
    action: str
    work: Any
    posted: Stamp
    clock: CommunicationClock
    communicator: Hashable
    waited: bool = False

    @property
    def span(self) -> tuple[Stamp, Stamp] | None:
        """From posting to its end on its own stream; None before it is waited for."""
        if not self.waited:
            return None
        return self.posted, self.clock.after(self.communicator, self.work.wait)

    def wait(self) -> None:
        """Have the current stream wait for it; the host goes on."""
        if not self.waited:
            with self.backend._named(self.action):
                self.work.wait()
        self.waited = True


@frozen
class _All:
    """Several operations as one."""

    handles: list[Handle]

    @property
    def span(self) -> tuple[float, float] | None:
        """Unknown."""
        return None

    def wait(self) -> None:
        """Return once all are complete."""
        for handle in self.handles:
            handle.wait()


def _device(device: torch.device | str | None, local_rank: int) -> torch.device:
    """The device of this process; on CUDA the one of its local rank, made current."""
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.type == "cuda":
        chosen = torch.device("cuda", local_rank if chosen.index is None else chosen.index)
        torch.cuda.set_device(chosen)
    return chosen


def _fresh_store(processes: Processes, members: tuple[int, ...]) -> Store:
    """A part of the store that no earlier world has used: the same for all members of this one."""
    world = "-".join(map(str, members))
    opened = processes.store.add(f"opened/{world}/{processes.rank}", 1)
    return _part(processes.store, f"world/{world}/{opened}")


def _part(store: Store, prefix: str) -> Store:
    """The keys of ``store`` that start with ``prefix``, as a store."""
    return dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]
