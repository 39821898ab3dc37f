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
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from attrs import frozen

from picotron.errors import ExecutionError
from picotron.runtime.arithmetic import ARITHMETIC
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
from picotron.runtime.ledger import Collective, Ledger, Message, Part, Receive, disagreement
from picotron.runtime.scheduler import Aborted, Operation, Scheduler, Task

T = TypeVar("T")

CAPABILITIES = Capabilities(name="simulated", virtual_time=True, fused_reduce_scatter=True)

_CONTROL = -1  # the world's own communicator: barrier, gather_objects, new_group


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
    except Aborted:
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
                self._fail(collective, disagreement(group, first_rank, first, self.rank, part))
            elif not collective.absent() and collective.problem is None:
                self._complete(collective, kind)
            if not collective.absent():
                del self.ledger.collectives[key]
        if collective.problem is not None:
            raise ExecutionError(collective.problem, rank=self.rank, action=collective.describe())
        return SimulatedHandle(self.task, self.scheduler, collective)

    def _complete(self, collective: Collective, kind: str) -> None:
        problem = ARITHMETIC[kind](collective.in_group_order()) if kind in ARITHMETIC else None
        if problem is not None:
            self._fail(collective, problem)
            return
        collective.end_seconds = max(part.posted_seconds for part in collective.parts.values())
        if kind in ARITHMETIC:
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
