"""A world of threads in one process: deterministic to the bit, on virtual clocks, telling deadlocks at once.

Every rank is a thread, never the main one, with one intra-op thread. Exactly one runs at a time: it holds the
baton, and hands it over only when it waits for an operation that is not complete, or ends. Who goes next
is drawn from ``random.Random(seed)``: the same seed gives the same interleaving, and any seed the same bits.

Semantics:

- *Messages are buffered*: a send is complete when posted, its content taken then. A receive is matched when
  posted, in posting order per (sender, receiver, channel).
- *A collective is complete when its last member has posted it.* The n-th of a group must agree among its
  members in kind, op, dtype and sizes, else every member gets an ExecutionError that names two that differ.
- *Reductions have one order*: ``((t0 + t1) + t2) + ...`` in group order, accumulated in the tensors' own
  dtype; avg divides the sum by the group's size at the end.
- *Deadlock*: if nobody can run, every waiting rank gets an ExecutionError that says who waits for whom.
- *Failure*: the first exception of a rank ends the others at their next communication, and is
  raised by ``simulate`` itself.

The clock is virtual. A rank's advances by its own thread's CPU time while it runs its own code, and on
waiting for an operation becomes at least the latest posting time of those who took part. So it answers: how
long with a core for every rank and free transfers? The simulator's own arithmetic is not on it. Torch's
global CPU generator is rank-local: each rank starts from a copy of the caller's, which is left as it was.
"""

from __future__ import annotations

import pickle
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from attrs import define, evolve, field, frozen

from picotron.errors import ExecutionError
from picotron.runtime.backend import (
    Backend,
    Capabilities,
    Group,
    Handle,
    check_all_gather,
    check_all_reduce,
    check_all_to_all,
    check_broadcast,
    check_message,
    check_ranks,
    check_reduce_scatter,
    unseen,
)

T = TypeVar("T")

CAPABILITIES = Capabilities(name="simulated", virtual_time=True, fused_reduce_scatter=True)

_CONTROL = -1  # the world's own communicator: barrier, gather_objects, new_group
_SHOWN = 3  # absent ranks that a deadlock report describes per waiting rank


def simulate(
    function: Callable[[Backend], T], world_size: int, *, seed: int = 0, timeout_seconds: float | None = None
) -> list[T]:
    """What ``function(backend)`` returned on every rank, in rank order.

    Raises the first exception of any rank, with its rank in the message or a note. Past ``timeout_seconds``
    of host time, or on KeyboardInterrupt, every rank is ended at its next communication and joined.
    """
    scheduler = Scheduler(world_size, seed)
    results: list[Any] = [None] * world_size
    # Only this thread starts and joins ranks, so that no KeyboardInterrupt can fall in between.
    ended = threading.Event()  # waited for, since an interrupted Thread.join takes its thread for stopped
    conductor = threading.Thread(
        target=_conduct, args=(scheduler, function, results, ended), name="picotron-conductor", daemon=True
    )
    intra_op_threads, random_state = torch.get_num_threads(), torch.get_rng_state()
    conductor.start()
    try:
        if not ended.wait(timeout_seconds):
            scheduler.stop(_timeout_error(scheduler, timeout_seconds))
    except BaseException as interrupt:
        scheduler.stop(interrupt)
    finally:
        conductor.join()
        torch.set_num_threads(intra_op_threads)  # what threads to come start from is one setting for all
        torch.set_rng_state(random_state)
    if scheduler.failure is not None:
        raise scheduler.failure
    return results


def _conduct(
    scheduler: Scheduler, function: Callable[[Backend], T], results: list[T], ended: threading.Event
) -> None:
    """Start every rank, give one of them the baton, and join them all."""
    ledger, threads = Ledger(), []
    for task in scheduler.tasks:
        arguments = (function, SimulatedBackend(task, scheduler, ledger), results)
        name = f"picotron-rank-{task.rank}"
        threads.append(threading.Thread(target=_run_rank, args=arguments, name=name, daemon=True))
    for task, thread in zip(scheduler.tasks, threads, strict=True):
        try:
            thread.start()
        except RuntimeError as error:  # no more threads to be had
            task.finished = True
            scheduler.stop(error)
    scheduler.start()
    for thread in threads:
        if thread.ident is not None:
            thread.join()
    ended.set()


def _run_rank(function: Callable[[Backend], T], backend: SimulatedBackend, results: list[T]) -> None:
    """The life of one rank's thread."""
    backend.scheduler.enter(backend.task)
    try:
        if backend.scheduler.failure is None:
            results[backend.rank] = function(backend)
    except _Aborted:
        pass
    except BaseException as error:
        backend.abort(error)
    finally:
        backend.scheduler.leave(backend.task)


def _timeout_error(scheduler: Scheduler, timeout_seconds: float | None) -> ExecutionError:
    waits = {task.rank: task.waiting_for for task in scheduler.tasks if not task.finished}
    doing = "; ".join(
        f"rank {rank} {'is running or ready' if wait is None else f'waits for {wait.describe()}'}"
        for rank, wait in waits.items()
    )
    return ExecutionError(f"the simulation must end within {timeout_seconds} seconds, but {doing}")


class _Aborted(BaseException):
    """Ends a rank because another one failed; never leaves ``simulate``."""


@define(eq=False)
class Task:
    """One rank as the scheduler sees it. ``turn`` is released to let it run."""

    rank: int
    turn: threading.Lock = field(factory=threading.Lock)
    waiting_for: Operation | None = None
    error: ExecutionError | None = None  # raised where it waits
    finished: bool = False
    clock_seconds: float = 0.0
    started_cpu_seconds: float = 0.0
    seen_cpu_seconds: float = 0.0  # thread CPU time up to which the clock has counted
    random_state: torch.Tensor = field(factory=torch.get_rng_state)

    def tick(self) -> None:
        """Advance the clock by the CPU time spent since it was last looked at."""
        now = time.thread_time()
        self.clock_seconds += now - self.seen_cpu_seconds
        self.seen_cpu_seconds = now

    def skip(self) -> None:
        """Leave the CPU time spent since the clock was last looked at off it."""
        self.seen_cpu_seconds = time.thread_time()


class Scheduler:
    """Owner of the baton: who runs, who could, and what the others wait for.

    Every method but ``stop`` is called by the rank that holds the baton.
    """

    def __init__(self, world_size: int, seed: int) -> None:
        if world_size < 1:
            raise ExecutionError(f"world_size must be at least 1, got {world_size}")
        self.tasks = tuple(Task(rank) for rank in range(world_size))
        self.failure: BaseException | None = None
        self._random = random.Random(seed)
        self._runnable: list[Task] = []
        for task in self.tasks:
            task.turn.acquire()

    def start(self) -> None:
        """Give the baton to the first rank."""
        self._runnable = [task for task in self.tasks if not task.finished]
        if (first := self._next()) is not None:
            first.turn.release()

    def enter(self, task: Task) -> None:
        """Wait, on the rank's own new thread, for its first turn."""
        task.turn.acquire()
        torch.set_num_threads(1)
        torch.set_rng_state(task.random_state)
        task.started_cpu_seconds = task.seen_cpu_seconds = time.thread_time()

    def leave(self, task: Task) -> None:
        """Hand the baton over for good."""
        task.finished = True
        if (following := self._next()) is not None:
            following.turn.release()

    def wait(self, task: Task, operation: Operation) -> None:
        """Return once ``operation`` is complete, having let others run if it was not."""
        task.tick()
        self.check_alive()
        if operation.end_seconds is None and operation.problem is None:
            task.waiting_for = operation
            operation.waiting.append(task)
            self._hand_over(task)
            task.waiting_for = None
            task.skip()
        self._raise_errors(task, operation)
        assert operation.end_seconds is not None
        task.clock_seconds = max(task.clock_seconds, operation.end_seconds)

    def wake(self, operation: Operation) -> None:
        """Make those runnable who wait for ``operation``."""
        self._runnable.extend(operation.waiting)
        operation.waiting.clear()

    def stop(self, error: BaseException) -> None:
        """End every rank at its next communication; the first ``error`` is kept. Callable from any thread."""
        if self.failure is None:
            self.failure = error

    def check_alive(self) -> None:
        """Raise _Aborted if the world has failed."""
        if self.failure is not None:
            raise _Aborted

    def _raise_errors(self, task: Task, operation: Operation) -> None:
        if task.error is not None:
            error, task.error = task.error, None
            raise error
        if operation.problem is not None:
            raise ExecutionError(operation.problem, rank=task.rank, action=operation.describe())
        self.check_alive()

    def _hand_over(self, task: Task) -> None:
        """Let another rank run; return when it is this one's turn again."""
        following = self._next()
        if following is task:  # it was woken by the report of a deadlock
            return
        assert following is not None, "a waiting rank is always woken"
        task.random_state = torch.get_rng_state()
        following.turn.release()
        task.turn.acquire()
        torch.set_rng_state(task.random_state)

    def _next(self) -> Task | None:
        """Who runs next; None if every rank has finished."""
        if self.failure is not None:
            self._wake_all()
        if not self._runnable and any(not task.finished for task in self.tasks):
            self._report_deadlock()
        if not self._runnable:
            return None
        return self._runnable.pop(self._random.randrange(len(self._runnable)))

    def _wake_all(self) -> list[Task]:
        """Make every waiting rank runnable; returns those that were not yet."""
        woken = [
            task for task in self.tasks if task.waiting_for is not None and task in task.waiting_for.waiting
        ]
        for task in woken:
            assert task.waiting_for is not None
            task.waiting_for.waiting.remove(task)
        self._runnable += woken
        return woken

    def _report_deadlock(self) -> None:
        report = deadlock_report(self.tasks)
        for task in self._wake_all():
            assert task.waiting_for is not None
            task.error = ExecutionError(report, rank=task.rank, action=task.waiting_for.describe())


def deadlock_report(tasks: Sequence[Task]) -> str:
    """Who waits for whom, when nobody can run: one line a waiting rank, then the cycle or who is gone."""
    waits = {task.rank: task.waiting_for for task in tasks if task.waiting_for is not None}
    absent = {rank: operation.absent() for rank, operation in waits.items()}
    lines = ["deadlock: no rank can go on"]
    for rank, operation in waits.items():
        whom = [f"absent rank {r}, which {_doing(waits.get(r))}" for r in absent[rank][:_SHOWN]]
        if len(absent[rank]) > _SHOWN:
            whom.append(f"and {len(absent[rank]) - _SHOWN} more absent")
        lines.append(f"rank {rank} waits for {operation.describe()}: {'; '.join(whom)}")
    if cycle := wait_cycle(absent):
        lines.append("wait-for cycle: " + " -> ".join(map(str, cycle)))
    else:
        gone = sorted({r for ranks in absent.values() for r in ranks if r not in waits})
        lines.append(f"waited for, but finished: rank {', '.join(map(str, gone))}")
    return "\n".join(lines)


def _doing(operation: Operation | None) -> str:
    return "has finished" if operation is None else f"waits for {operation.describe()}"


def wait_cycle(absent: Mapping[int, Sequence[int]]) -> tuple[int, ...]:
    """A cycle, first rank repeated at its end, in the graph from rank to the ranks it waits for; or ().

    >>> wait_cycle({0: (1,), 1: (2,), 2: (1,)})
    (1, 2, 1)
    >>> wait_cycle({0: (1,), 1: (2,)})
    ()
    """
    edges = {rank: [r for r in ranks if r in absent] for rank, ranks in absent.items()}
    while ends := {rank for rank, ranks in edges.items() if not ranks}:
        edges = {
            rank: [r for r in ranks if r not in ends] for rank, ranks in edges.items() if rank not in ends
        }
    if not edges:
        return ()
    path = [min(edges)]
    while edges[path[-1]][0] not in path:
        path.append(edges[path[-1]][0])
    first = edges[path[-1]][0]
    return (*path[path.index(first) :], first)


@define(eq=False, kw_only=True)
class Operation:
    """Something a rank can wait for: complete once ``end_seconds`` is set, failed once ``problem`` is."""

    number: int  # in its group, or on its channel
    end_seconds: float | None = None
    problem: str | None = None
    waiting: list[Task] = field(factory=list)

    def describe(self) -> str:
        """As reports name it."""
        raise NotImplementedError

    def absent(self) -> tuple[int, ...]:
        """The ranks whose part is missing."""
        raise NotImplementedError


@define(eq=False, kw_only=True)
class Receive(Operation):
    """A receive that was posted and has no message yet."""

    sender: int
    channel: str
    tensor: torch.Tensor

    def describe(self) -> str:
        """As reports name it."""
        return f"recv #{self.number} from rank {self.sender} on channel {self.channel!r}"

    def absent(self) -> tuple[int, ...]:
        """The sender."""
        return (self.sender,)


@frozen
class Message:
    """A send that was posted and has no receive yet."""

    content: torch.Tensor
    posted_seconds: float


@frozen
class Part:
    """What one member brings to a collective: ``agreed`` is equal among them, ``arguments`` are its own."""

    agreed: tuple[object, ...]
    arguments: tuple[Any, ...]
    posted_seconds: float


@define(eq=False, kw_only=True)
class Collective(Operation):
    """The n-th collective of a group."""

    group: Group
    parts: dict[int, Part] = field(factory=dict)

    def describe(self) -> str:
        """As reports name it."""
        kind = next(iter(self.parts.values())).agreed[0]
        return f"{kind} #{self.number} in group {self.group}"

    def absent(self) -> tuple[int, ...]:
        """The members that have not posted it."""
        return tuple(rank for rank in self.group.ranks if rank not in self.parts)

    def in_group_order(self) -> list[tuple[Any, ...]]:
        """Every member's arguments."""
        return [self.parts[rank].arguments for rank in self.group.ranks]

    def let_go(self) -> None:
        """Drop the members' tensors: a late waiter must not keep another rank's memory alive."""
        self.parts = {rank: evolve(part, arguments=()) for rank, part in self.parts.items()}


@define(eq=False)
class Ledger:
    """What has been posted and not yet matched."""

    collectives: dict[tuple[int, int], Collective] = field(factory=dict)  # by communicator and number
    messages: dict[tuple[int, int, str], deque[Message]] = field(factory=dict)  # by sender, receiver, channel
    receives: dict[tuple[int, int, str], deque[Receive]] = field(factory=dict)


@frozen
class SimulatedHandle:
    """An operation of the simulator, as one rank waits for it."""

    task: Task
    scheduler: Scheduler
    operation: Operation

    def wait(self) -> None:
        """Return once the operation is complete."""
        self.scheduler.wait(self.task, self.operation)


class _Complete:
    """A handle of what was complete when posted."""

    def wait(self) -> None:
        """Return at once."""


class SimulatedBackend:
    """One rank of a simulated world. Use it on the thread it was handed to only."""

    def __init__(self, task: Task, scheduler: Scheduler, ledger: Ledger) -> None:
        self.task, self.scheduler, self.ledger = task, scheduler, ledger
        self.rank, self.world_size = task.rank, len(scheduler.tasks)
        self.device = torch.device("cpu")
        self.capabilities = CAPABILITIES
        self._world = Group(tuple(range(self.world_size)), "world", _CONTROL)
        self._num_groups = 0
        self._num_posted: dict[object, int] = {}  # by communicator, or (peer, channel) received from

    def new_group(self, ranks: Sequence[int], name: str = "") -> Group:
        """A communicator of ascending ``ranks``."""
        members = check_ranks(self.rank, ranks, self.world_size)
        self._collective("new_group", self._world, (list(members), name), ()).wait()
        self._num_groups += 1
        return Group(members, name, self._num_groups)

    def all_reduce(self, tensor: torch.Tensor, group: Group, op: str = "sum") -> Handle:
        """Replace ``tensor`` by its sum, max or avg over the group."""
        check_all_reduce(self.rank, group, tensor, op)
        agreed = (op, tensor.dtype, list(tensor.shape))
        return self._collective("all_reduce", group, agreed, (tensor, op))

    def all_gather(self, output: torch.Tensor, input: torch.Tensor, group: Group) -> Handle:
        """Write to ``output`` the members' inputs, concatenated."""
        check_all_gather(self.rank, group, output, input)
        return self._collective("all_gather", group, (input.dtype, list(input.shape)), (output, input))

    def reduce_scatter(
        self, output: torch.Tensor, input: torch.Tensor, group: Group, op: str = "sum"
    ) -> Handle:
        """Write to ``output`` this rank's part of the reduced inputs."""
        check_reduce_scatter(self.rank, group, output, input, op)
        agreed = (op, input.dtype, list(input.shape))
        return self._collective("reduce_scatter", group, agreed, (output, input, op))

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
        return self._collective("all_to_all", group, agreed, (output, input, received, sent))

    def broadcast(self, tensor: torch.Tensor, group: Group, source: int) -> Handle:
        """Replace ``tensor`` by that of world rank ``source``."""
        check_broadcast(self.rank, group, tensor, source)
        agreed = (f"from rank {source}", tensor.dtype, list(tensor.shape))
        return self._collective("broadcast", group, agreed, (tensor, group.index(source)))

    def send(self, tensor: torch.Tensor, peer: int, channel: str = "") -> Handle:
        """Send to ``peer``; complete at once."""
        check_message(self.rank, "send", tensor, peer, self.world_size)
        key = (self.rank, peer, channel)
        with self._posting():
            if receives := self.ledger.receives.get(key):
                action = f"send to rank {peer} on channel {channel!r}"
                self._deliver(receives.popleft(), tensor, self.task.clock_seconds, action)
            else:
                message = Message(tensor.clone(), self.task.clock_seconds)
                self.ledger.messages.setdefault(key, deque()).append(message)
        return _Complete()

    def recv(self, tensor: torch.Tensor, peer: int, channel: str = "") -> Handle:
        """Receive into ``tensor`` the next message of ``peer`` on ``channel``."""
        check_message(self.rank, "recv", tensor, peer, self.world_size)
        key = (peer, self.rank, channel)
        with self._posting():
            number = self._next_number((peer, channel))
            receive = Receive(number=number, sender=peer, channel=channel, tensor=tensor)
            if messages := self.ledger.messages.get(key):
                message = messages.popleft()
                self._deliver(receive, message.content, message.posted_seconds, receive.describe())
            else:
                self.ledger.receives.setdefault(key, deque()).append(receive)
        return SimulatedHandle(self.task, self.scheduler, receive)

    def barrier(self) -> None:
        """Return once every rank has called it."""
        self._collective("barrier", self._world, (), ()).wait()

    def gather_objects(self, value: object) -> list[object]:
        """Every rank's value, each rank its own copies."""
        with self._posting():
            pickled = pickle.dumps(value)
        handle = self._collective("gather_objects", self._world, (), (pickled,))
        handle.wait()
        assert isinstance(handle.operation, Collective)
        return [pickle.loads(theirs) for (theirs,) in handle.operation.in_group_order()]

    def settle(self) -> None:
        """Nothing is held beyond an operation's end."""

    def mark(self) -> float:
        """Virtual seconds on this rank's clock."""
        self.task.tick()
        return self.task.clock_seconds

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
        self.scheduler.stop(error)

    @contextmanager
    def _posting(self) -> Iterator[None]:
        """The simulator's own work: off the clock, unseen by autograd and by dispatch modes."""
        self.task.tick()
        self.scheduler.check_alive()
        try:
            with unseen():
                yield
        finally:
            self.task.skip()

    def _next_number(self, stream: object) -> int:
        number = self._num_posted.get(stream, 0)
        self._num_posted[stream] = number + 1
        return number

    def _collective(
        self, kind: str, group: Group, agreed: tuple[object, ...], arguments: tuple[Any, ...]
    ) -> SimulatedHandle:
        """Post this rank's part; the last one to post completes the operation for all."""
        if not isinstance(group.payload, int):
            raise ExecutionError(f"group must come from new_group, got {group}", rank=self.rank, action=kind)
        with self._posting():
            key = (group.payload, self._next_number(group.payload))
            collective = self.ledger.collectives.setdefault(key, Collective(number=key[1], group=group))
            part = Part((kind, *agreed), arguments, self.task.clock_seconds)
            first_rank, first = next(iter(collective.parts.items()), (self.rank, part))
            collective.parts[self.rank] = part
            if part.agreed != first.agreed:
                self._fail(collective, _disagreement(group, first_rank, first, self.rank, part))
            elif not collective.absent() and collective.problem is None:
                self._complete(collective, kind)
            if not collective.absent():
                del self.ledger.collectives[key]
        if collective.problem is not None:
            raise ExecutionError(collective.problem, rank=self.rank, action=collective.describe())
        return SimulatedHandle(self.task, self.scheduler, collective)

    def _complete(self, collective: Collective, kind: str) -> None:
        problem = _ARITHMETIC[kind](collective.in_group_order()) if kind in _ARITHMETIC else None
        if problem is not None:
            self._fail(collective, problem)
            return
        collective.end_seconds = max(part.posted_seconds for part in collective.parts.values())
        if kind in _ARITHMETIC:
            collective.let_go()
        self.scheduler.wake(collective)

    def _deliver(self, receive: Receive, content: torch.Tensor, posted_seconds: float, action: str) -> None:
        """Complete a receive with a message's content, or fail both ends if they disagree."""
        want, got = receive.tensor, content
        if (want.dtype, want.shape) != (got.dtype, got.shape):
            problem = (
                f"a message and its receive must agree in dtype and shape: {receive.describe()} expects "
                f"{want.dtype} {list(want.shape)}, rank {receive.sender} sent {got.dtype} {list(got.shape)}"
            )
            self._fail(receive, problem)
            raise ExecutionError(problem, rank=self.rank, action=action)
        want.copy_(got)
        receive.end_seconds = posted_seconds
        self.scheduler.wake(receive)

    def _fail(self, operation: Operation, problem: str) -> None:
        """Have everyone who waits, or will wait, for ``operation`` raise ``problem``."""
        operation.problem = problem
        self.scheduler.wake(operation)


def _disagreement(group: Group, first_rank: int, first: Part, rank: int, part: Part) -> str:
    theirs, ours = (" ".join(map(str, p.agreed)) for p in (first, part))
    return (
        f"members of group {group} must post the same collective: "
        f"rank {first_rank} posted {theirs}, rank {rank} posted {ours}"
    )


def _all_reduce(parts: list[tuple[torch.Tensor, str]]) -> None:
    total, op = parts[0]
    _accumulate(total, [tensor for tensor, _ in parts[1:]], op)
    for tensor, _ in parts[1:]:
        tensor.copy_(total)


def _reduce_scatter(parts: list[tuple[torch.Tensor, torch.Tensor, str]]) -> None:
    total, op = parts[0][1].clone(), parts[0][2]
    _accumulate(total, [tensor for _, tensor, _ in parts[1:]], op)
    for (output, _, _), piece in zip(parts, total.chunk(len(parts)), strict=True):
        output.copy_(piece)


def _accumulate(total: torch.Tensor, others: list[torch.Tensor], op: str) -> None:
    """Reduce ``others``, in their order, into ``total``."""
    for other in others:
        if op == "max":
            torch.maximum(total, other, out=total)
        else:
            total.add_(other)
    if op == "avg":
        total.div_(len(others) + 1)


def _all_gather(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    whole = parts[0][0]
    for (_, tensor), piece in zip(parts, whole.chunk(len(parts)), strict=True):
        if piece.data_ptr() != tensor.data_ptr():
            piece.copy_(tensor)
    for output, _ in parts[1:]:
        output.copy_(whole)


def _all_to_all(
    parts: list[tuple[torch.Tensor, torch.Tensor, tuple[int, ...], tuple[int, ...]]],
) -> str | None:
    for i, (_, _, _, sent) in enumerate(parts):
        for j, (_, _, received, _) in enumerate(parts):
            if sent[j] != received[i]:
                return (
                    "what one member sends the other must expect: "
                    f"member {i} sends {sent[j]} rows to member {j}, which expects {received[i]}"
                )
    outgoing = [torch.split(tensor, list(sent)) for _, tensor, _, sent in parts]
    for j, (output, _, received, _) in enumerate(parts):
        for piece, pieces in zip(torch.split(output, list(received)), outgoing, strict=True):
            piece.copy_(pieces[j])
    return None


def _broadcast(parts: list[tuple[torch.Tensor, int]]) -> None:
    source = parts[parts[0][1]][0]
    for tensor, _ in parts:
        if tensor is not source:
            tensor.copy_(source)


_ARITHMETIC: Mapping[str, Callable[[list[Any]], str | None]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "broadcast": _broadcast,
}
