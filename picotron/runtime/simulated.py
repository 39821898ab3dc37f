"""A world of threads in one process: deterministic to the bit, on virtual clocks, telling deadlocks at once.

Every rank is a thread, never the main one, with one intra-op thread. Exactly one runs at a time: it holds the
baton, and hands it over only at communication. Who goes next is drawn from ``random.Random(seed)``: the same
seed gives the same interleaving, and any seed the same bits.

Semantics:

- *Messages* meet as ``World.semantics`` says (see ``messages``); receives are matched when posted, in posting
  order per (sender, receiver, channel).
- *A collective is complete when its last member has posted it.* The n-th of a group must agree among its
  members in kind, op, dtype and sizes, else they get an ExecutionError that names two that differ.
- *Reductions have one order*: ``((t0 + t1) + t2) + ...`` in group order, accumulated in the tensors' own
  dtype; avg divides the sum by the group's size at the end.
- *Deadlock*: if nobody can run, every waiting rank gets an ExecutionError that says who waits for whom.
- *Misuse*: a tensor changed while an operation owns it, a handle never waited for and a message never
  received are ExecutionErrors too.
- *Failure*: the first exception of a rank ends the others at their next communication, and is
  raised by ``simulate`` itself.

The clock is virtual. On a ``planned`` clock a rank's computing takes what it is told to ``spend``; on a
``cpu`` clock its own thread's CPU time, as if it had a core of its own. Communication takes what
``World.price`` says, on streams of its own. Torch's global generators (the CPU's and the device's) are
rank-local: each rank starts from a copy of the caller's, which is left as it was. Those of other libraries
are shared.

With ``device="cuda"`` all ranks share one GPU and its default stream. They put work on it one at a time, in
the order in which they hold the baton, so what a rank posts stands before what another does with it, and no
rank waits for the device. A rank that communicates from a stream of its own is refused.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Generic, TypeVar, cast

import torch

from picotron.errors import ExecutionError, PlanError
from picotron.planner.faults import Fault, check_faults
from picotron.planner.validators import is_positive, shown
from picotron.runtime.backend import Backend
from picotron.runtime.device import random_state, set_random_state
from picotron.runtime.injection import Killed, injection
from picotron.runtime.ledger import Ledger
from picotron.runtime.memory import MemoryTracker
from picotron.runtime.scheduler import Aborted, Scheduler, Task
from picotron.runtime.simulated_rank import CAPABILITIES as CAPABILITIES
from picotron.runtime.simulated_rank import SimulatedBackend as SimulatedBackend
from picotron.runtime.world import Outcome, Simulation, World, make_world

T = TypeVar("T")


def simulate(
    function: Callable[[Backend], T],
    world_size: int,
    *,
    timeout_seconds: float | None = None,
    **world: Any,
) -> list[T]:
    """What ``function(backend)`` returned on every rank, in rank order; ``world`` as World's fields.

    Raises the first exception of any rank, with its rank in the message or a note. Past ``timeout_seconds``
    of host time, or on KeyboardInterrupt, every rank is ended at its next communication and joined.
    """
    return results(simulation(function, world_size, make_world(world), timeout_seconds=timeout_seconds))


def results(found: Simulation[T]) -> list[T]:
    """What every rank returned; raises the failure instead, if there was one."""
    if found.failure is not None:
        raise found.failure
    return [cast(T, outcome.result) for outcome in found.outcomes]


def simulation(
    function: Callable[[Backend], T], world_size: int, world: World, *, timeout_seconds: float | None = None
) -> Simulation[T]:
    """What became of every rank that ran ``function(backend)``; raises nothing of theirs."""
    if not isinstance(world_size, int) or isinstance(world_size, bool):
        raise PlanError(f"world_size must be a whole number, got {shown(world_size)}")
    if timeout_seconds is not None and not is_positive(timeout_seconds):
        raise PlanError(f"timeout_seconds must be None or a positive number, got {shown(timeout_seconds)}")
    scheduler = Scheduler(
        world_size,
        world.seed,
        cpu_clock=world.clock == "cpu",
        preempt=world.preempt,
        device=world.device,
    )
    ranks = _Ranks(function, scheduler, world, check_faults(world.faults, world_size))
    # Only this thread starts and joins ranks, so that no KeyboardInterrupt can fall in between.
    ended = threading.Event()  # waited for, since an interrupted Thread.join takes its thread for stopped
    conductor = threading.Thread(target=ranks.conduct, args=(ended,), name="picotron-conductor", daemon=True)
    intra_op_threads, state = torch.get_num_threads(), random_state(world.device)
    try:
        conductor.start()
        if not ended.wait(timeout_seconds):
            scheduler.stop(_timeout_error(scheduler, timeout_seconds))
    except BaseException as interrupt:
        scheduler.stop(interrupt)
    finally:
        if conductor.ident is not None or conductor in threading.enumerate():  # start() can be interrupted
            ended.wait()
            conductor.join()
        torch.set_num_threads(intra_op_threads)  # what threads to come start from is one setting for all
        set_random_state(world.device, state)
    failure = ranks.told(scheduler.failure) if scheduler.failure is not None else ranks.leftover()
    if failure is not None:
        failure.add_note(f"simulated, world_size={world_size}: seed={world.seed} repeats this")
    return Simulation(
        outcomes=tuple(ranks.outcomes),
        failure=failure,
        events=tuple(scheduler.events or ()),
        spans=tuple(scheduler.spans),
        num_hand_overs=scheduler.num_hand_overs,
        clock_seconds=tuple(scheduler.streams[rank] for rank in range(world_size)),
    )


class _Ranks(Generic[T]):
    """The threads of a world: started, run and joined."""

    def __init__(
        self,
        function: Callable[[Backend], T],
        scheduler: Scheduler,
        world: World,
        faults: tuple[Fault, ...],
    ) -> None:
        self.function, self.scheduler, self.world, self.faults = function, scheduler, world, faults
        self.ledger = Ledger()
        self.troubled = False  # an operation has failed, and a rank has gone on all the same
        self.outcomes: list[Outcome[T]] = [Outcome(task.rank, None, None) for task in scheduler.tasks]
        scheduler.unmatched = self.ledger.unmatched
        if world.keep_events:
            scheduler.events = []

    def conduct(self, ended: threading.Event) -> None:
        """Start every rank, give one of them the baton, and join them all."""
        threads = [
            threading.Thread(target=self._live, args=(task,), name=f"picotron-rank-{task.rank}", daemon=True)
            for task in self.scheduler.tasks
        ]
        for task, thread in zip(self.scheduler.tasks, threads, strict=True):
            try:
                thread.start()
            except RuntimeError as error:  # no more threads to be had
                task.gone = "was never started"
                self.scheduler.stop(error)
        self.scheduler.start()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        ended.set()

    def _live(self, task: Task) -> None:
        """The life of one rank's thread."""
        self.scheduler.enter(task)
        faults = injection(self.faults, task.rank, self.world.memory_bytes)
        backend = SimulatedBackend(task, self.scheduler, self.ledger, self.world, self.faults, faults)
        limit = faults.limit_bytes
        tracker = nullcontext() if limit is None else MemoryTracker(limit_bytes=limit, rank=task.rank)
        result, raised, why = None, None, "has returned"
        try:
            if self.scheduler.failure is None:
                with tracker:
                    result = self.function(backend)
                if not backend.killed:
                    backend.check_waited()
                self.troubled |= backend.troubled
        except Aborted:
            why = "has ended, since another rank failed"
        except Killed:
            pass
        except BaseException as error:
            why, raised = f"has failed: {type(error).__name__}", error
            if not backend.killed:
                backend.abort(error)
        finally:
            if backend.killed:  # whatever the rank has made of it
                why, result, raised = backend.killed, None, None
            self.outcomes[task.rank] = Outcome(task.rank, result, raised, bool(backend.killed))
            self.scheduler.note(task, "end", why)
            self.scheduler.leave(task, why)

    def told(self, first: BaseException) -> BaseException:
        """Of the failures that say the same as the first, the least rank's: one report for every seed."""
        if not isinstance(first, ExecutionError):
            return first
        alike = [
            outcome.error
            for outcome in self.outcomes
            if isinstance(outcome.error, ExecutionError) and outcome.error.message == first.message
        ]
        return alike[0] if alike else first

    def leftover(self) -> ExecutionError | None:
        """What is wrong at the end of a world in which no rank failed."""
        for task, outcome in zip(self.scheduler.tasks, self.outcomes, strict=True):
            if outcome.killed:
                return ExecutionError(f"the rank {task.gone}", rank=task.rank)
        if not self.troubled and (lost := self.ledger.unreceived()):
            return ExecutionError(
                "every message must be received, but all ranks have returned\n" + "\n".join(lost)
            )
        return None


def _timeout_error(scheduler: Scheduler, timeout_seconds: float | None) -> ExecutionError:
    waits = {task.rank: task.waiting_for for task in scheduler.tasks if not task.gone}
    doing = "; ".join(
        f"rank {rank} {'is running or ready' if wait is None else f'waits for {wait.describe()}'}"
        for rank, wait in waits.items()
    )
    return ExecutionError(f"the simulation must end within {timeout_seconds} seconds, but {doing}")
