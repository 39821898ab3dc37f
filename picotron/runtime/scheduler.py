"""Who of the simulated ranks runs next, what the others wait for, and what is told when nobody can run."""

from __future__ import annotations

import random
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from attrs import define, field

from picotron.errors import ExecutionError

_SHOWN = 3  # absent ranks that a deadlock report describes per waiting rank


class Aborted(BaseException):
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
        """Raise Aborted if the world has failed."""
        if self.failure is not None:
            raise Aborted

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
class Operation(ABC):
    """Something a rank can wait for: complete once ``end_seconds`` is set, failed once ``problem`` is."""

    number: int  # in its group, or on its channel
    end_seconds: float | None = None
    problem: str | None = None
    waiting: list[Task] = field(factory=list)

    @abstractmethod
    def describe(self) -> str:
        """As reports name it."""

    @abstractmethod
    def absent(self) -> tuple[int, ...]:
        """The ranks whose part is missing."""
