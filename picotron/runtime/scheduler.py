"""Who of the simulated ranks runs next, and what is told when nobody can.

Ranks are threads of which exactly one runs: it holds the baton, and hands it over where it waits for what is
not complete, where it ends and, with chance ``preempt``, where it posts an operation. Who goes next is drawn
from ``random.Random(seed)``.
"""

from __future__ import annotations

import random
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable

import torch
from attrs import define, field, frozen

from picotron.errors import ExecutionError
from picotron.planner.clock import Operation as Timed
from picotron.planner.clock import advance
from picotron.planner.waits import Wait, WaitGraph
from picotron.runtime.device import RandomState, make_current, random_state, set_random_state

CPU = torch.device("cpu")


class Aborted(BaseException):
    """Ends a rank because another one failed; never leaves ``simulate``."""


@frozen
class Event:
    """What happened: ``rank`` did ``what`` ("post", "wait", "end", "fail") at virtual ``seconds``."""

    rank: int
    what: str
    operation: str
    seconds: float


@frozen
class Ran:
    """When something ran on a stream of ``rank``, in virtual seconds; its own time is the stream "rank"."""

    rank: int
    stream: str
    name: str
    place: str
    start_seconds: float
    end_seconds: float


@define(eq=False)
class Task:
    """One rank as the scheduler sees it. ``turn`` is released to let it run."""

    rank: int
    turn: threading.Lock = field(factory=threading.Lock)
    waiting_for: Operation | None = None
    waiting_at: str = ""
    error: ExecutionError | None = None  # raised where it waits
    factor: float = 1.0  # of its computing
    gone: str = ""  # why it does not come any more: it has returned, failed or was killed
    started_cpu_seconds: float = 0.0
    seen_cpu_seconds: float = 0.0  # thread CPU time up to which the clock has counted
    random_state: RandomState = ()


@define(eq=False, kw_only=True)
class Operation(ABC):
    """Something a rank can wait for: complete once ``end_seconds`` is set, failed once ``problem`` is."""

    number: int  # in its group, or on its channel
    start_seconds: float = 0.0
    end_seconds: float | None = None
    problem: str | None = None
    blamed: tuple[int, str, str] | None = None  # rank, action and position at fault, if one is
    waiting: list[Task] = field(factory=list)

    @abstractmethod
    def describe(self) -> str:
        """As reports name it."""

    @property
    @abstractmethod
    def stream(self) -> str:
        """What it runs on, as pictures name it."""

    @abstractmethod
    def absent(self) -> tuple[int, ...]:
        """The ranks whose part is missing."""


def failed(rank: int, operation: Operation, place: str) -> ExecutionError:
    """What ``rank`` is told of a failed operation: where it stands, or who is at fault and where."""
    assert operation.problem is not None
    who, action, position = operation.blamed or (rank, operation.describe(), place)
    return ExecutionError(operation.problem, rank=who, action=action, position=position or None)


class Scheduler:
    """Owner of the baton and of the clocks: who runs, who could, and what the others wait for.

    ``streams`` says when each stream is free, in virtual seconds; a rank's own is under its number. With
    ``cpu_clock`` a rank's own advances by its thread's CPU time, else only by what it is told to spend.
    Every method but ``start``, ``enter`` and ``stop`` is called by the rank that holds the baton.
    """

    def __init__(
        self,
        world_size: int,
        seed: int,
        *,
        cpu_clock: bool = False,
        preempt: float = 0.0,
        device: torch.device = CPU,
    ) -> None:
        if world_size < 1:
            raise ExecutionError(f"world_size must be at least 1, got {world_size}")
        state = random_state(device)
        self.tasks = tuple(Task(rank, random_state=state) for rank in range(world_size))
        self._device = device
        self.streams: dict[Hashable, float] = dict.fromkeys(range(world_size), 0.0)
        self.failure: BaseException | None = None
        self.unmatched: Callable[[], list[str]] = list  # what a report of a deadlock adds
        self.events: list[Event] | None = None
        self.spans: list[Ran] = []  # kept where events are
        self.num_hand_overs = 0
        self._cpu_clock, self._preempt = cpu_clock, preempt
        self._random = random.Random(seed)
        self._runnable: list[Task] = []
        for task in self.tasks:
            task.turn.acquire()

    def start(self) -> None:
        """Give the baton to the first rank."""
        self._runnable = [task for task in self.tasks if not task.gone]
        if (first := self._next()) is not None:
            first.turn.release()

    def enter(self, task: Task) -> None:
        """Wait, on the rank's own new thread, for its first turn."""
        task.turn.acquire()
        torch.set_num_threads(1)
        torch.autograd.set_multithreading_enabled(False)  # on CUDA a shared thread would wait for the baton
        make_current(self._device)
        set_random_state(self._device, task.random_state)
        task.started_cpu_seconds = task.seen_cpu_seconds = time.thread_time()

    def leave(self, task: Task, why: str) -> None:
        """Hand the baton over for good."""
        task.gone = why
        if (following := self._next()) is not None:
            following.turn.release()

    def tick(self, task: Task) -> float:
        """The rank's clock, with the CPU time counted that it has spent since it was last looked at."""
        if self._cpu_clock:
            now = time.thread_time()
            self.spend(task, (now - task.seen_cpu_seconds) * task.factor)
            task.seen_cpu_seconds = now
        return self.streams[task.rank]

    def skip(self, task: Task) -> None:
        """Leave the CPU time spent since the clock was last looked at off it."""
        if self._cpu_clock:
            task.seen_cpu_seconds = time.thread_time()

    def spend(self, task: Task, seconds: float) -> None:
        """Compute for so long."""
        self.streams[task.rank] = advance(self.streams, Timed((task.rank,), 0.0, seconds)).end

    def note(self, task: Task, what: str, operation: str) -> None:
        """Write an event down, if events are kept."""
        if self.events is not None:
            self.events.append(Event(task.rank, what, operation, self.streams[task.rank]))

    def note_span(self, task: Task, stream: str, name: str, place: str, span: tuple[float, float]) -> None:
        """Write down when something ran, if events are kept and it took time."""
        if self.events is not None and span[0] < span[1]:
            self.spans.append(Ran(task.rank, stream, name, place, *span))

    def posted(self, task: Task) -> None:
        """Let another rank run first, with chance ``preempt``."""
        if self._preempt and self._runnable and self._random.random() < self._preempt:
            self._runnable.append(task)
            self._hand_over(task)

    def wait(self, task: Task, operation: Operation, place: str = "") -> None:
        """Return once ``operation`` is complete, having let others run if it was not."""
        self.tick(task)
        self.check_alive()
        if operation.end_seconds is None and operation.problem is None:
            task.waiting_for, task.waiting_at = operation, place
            operation.waiting.append(task)
            self._hand_over(task)
            task.waiting_for = None
            self.skip(task)
        self._raise_errors(task, operation, place)
        assert operation.end_seconds is not None
        self.streams[task.rank] = advance(self.streams, Timed((task.rank,), operation.end_seconds, 0.0)).end

    def wake(self, operation: Operation) -> None:
        """Make those runnable who wait for ``operation``."""
        self._runnable.extend(operation.waiting)
        operation.waiting.clear()

    def fail(self, operation: Operation, problem: str, blamed: tuple[int, str, str] | None = None) -> None:
        """Have everyone who waits, or will wait, for ``operation`` raise ``problem``."""
        operation.problem, operation.blamed = problem, blamed
        self.wake(operation)

    def stop(self, error: BaseException) -> None:
        """End every rank at its next communication; the first ``error`` is kept. Callable from any thread."""
        if self.failure is None:
            self.failure = error

    def check_alive(self) -> None:
        """Raise Aborted if the world has failed."""
        if self.failure is not None:
            raise Aborted

    def _raise_errors(self, task: Task, operation: Operation, place: str) -> None:
        if task.error is not None:
            error, task.error = task.error, None
            raise error
        if operation.problem is not None:
            raise failed(task.rank, operation, place)
        self.check_alive()

    def _hand_over(self, task: Task) -> None:
        """Let another rank run; return when it is this one's turn again."""
        following = self._next()
        if following is task:
            return
        assert following is not None, "a waiting rank is always woken"
        self.num_hand_overs += 1
        task.random_state = random_state(self._device)
        following.turn.release()
        task.turn.acquire()
        set_random_state(self._device, task.random_state)

    def _next(self) -> Task | None:
        """Who runs next; None if every rank has ended."""
        if self.failure is not None:
            self._wake_all()
        if not self._runnable and any(not task.gone for task in self.tasks):
            self._report_deadlock()
        if not self._runnable:
            return None
        if self._runnable[0].error is not None:
            return self._runnable.pop(0)  # a deadlock is told in the order of ranks, whatever the seed
        return self._runnable.pop(int(self._random.random() * len(self._runnable)))

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
        report = "\n".join(["deadlock: no rank can go on", str(self.wait_graph()), *self.unmatched()])
        for task in self._wake_all():
            assert task.waiting_for is not None
            task.error = ExecutionError(
                report,
                rank=task.rank,
                action=task.waiting_for.describe(),
                position=task.waiting_at or None,
            )

    def wait_graph(self) -> WaitGraph:
        """Who waits for whom now."""
        waits = tuple(
            Wait(
                rank=task.rank,
                operation=task.waiting_for.describe(),
                place=task.waiting_at,
                absent=task.waiting_for.absent(),
            )
            for task in self.tasks
            if task.waiting_for is not None
        )
        return WaitGraph(waits=waits, others={task.rank: task.gone for task in self.tasks if task.gone})
