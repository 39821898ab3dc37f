"""Launch one function in several processes that can open gloo on loopback, as torchrun would.

What strikes simulated ranks as a fault can strike these for real: see ``StruckBackend``.
"""

from __future__ import annotations

import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from picotron.planner.faults import Fault, Kill, Pause, compute_factor
from picotron.runtime.backend import Backend
from picotron.runtime.loopback import children

STOPPED_SECONDS = 0.5  # how long a process that stops itself stays stopped

_GRACE_SECONDS = 2.0  # for the other ranks to tell their errors too, once one has failed
_GLANCE_SECONDS = 0.05  # how often one looks for stopped processes


def launch(
    function: Callable[..., Any],
    world_size: int,
    *args: object,
    timeout_seconds: float = 120.0,
    killed: Collection[int] = (),
) -> list[Any]:
    """What ``function(*args)`` returned in each of ``world_size`` fresh processes, in rank order.

    ``function`` is importable by name; arguments and results are pickled. Each process finds torchrun's
    variables in its environment, so ``DistributedBackend.open("cpu")`` works at once, and torch has one
    thread. To run a table of cases on worlds of several sizes in one launch, call ``connect`` once in the
    function, then ``DistributedBackend(processes, ranks=range(n))`` for each in those whose rank is below n.

    Ranks in ``killed`` are to end by SIGKILL: their result is None, and any other end is a failure. A process
    that stops itself (SIGSTOP) is continued after STOPPED_SECONDS.

    Raises RuntimeError with the tracebacks of the ranks that failed, or with the ranks still running when the
    time is up. No process is left behind.
    """
    with children(_report_result, world_size, function, args) as ranks:
        readers = {child.connection: rank for rank, child in enumerate(ranks)}
        processes = [child.process for child in ranks]
        return _results(readers, processes, time.monotonic() + timeout_seconds, killed)


def _report_result(connection: Connection, function: Callable[..., Any], args: tuple[object, ...]) -> None:
    """What each process runs: the function, then its result or its traceback down the pipe."""
    try:
        report = pickle.dumps((None, function(*args)))
    except BaseException:
        report = pickle.dumps((traceback.format_exc(), None))
    connection.send_bytes(report)
    connection.close()


def _results(
    readers: dict[Connection, int],
    processes: list[SpawnProcess],
    deadline_seconds: float,
    killed: Collection[int],
) -> list[Any]:
    """Every rank's result; RuntimeError as soon as one has failed (and the others had their grace)."""
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    stopped: dict[int, float] = {}  # when, by process id
    pending = dict(readers)
    while pending and (left_seconds := deadline_seconds - time.monotonic()) > 0:
        ready = wait(list(pending), min(left_seconds, _GLANCE_SECONDS))
        _continue_stopped([processes[rank] for rank in pending.values()], stopped)
        for reader in ready:
            assert isinstance(reader, Connection)
            rank = pending.pop(reader)
            failure, results[rank] = _report(reader, processes[rank], to_be_killed=rank in killed)
            if failure is not None:
                if not failures:
                    deadline_seconds = min(deadline_seconds, time.monotonic() + _GRACE_SECONDS)
                failures[rank] = failure
    if failures:
        raise RuntimeError("\n".join(f"rank {rank} failed:\n{text}" for rank, text in failures.items()))
    if pending:
        raise RuntimeError(f"the time is up, and ranks {sorted(pending.values())} are still running")
    return [results[rank] for rank in sorted(results)]


def _report(reader: Connection, process: SpawnProcess, *, to_be_killed: bool) -> tuple[str | None, Any]:
    try:
        failure, result = pickle.loads(reader.recv_bytes())
    except EOFError:
        process.join(_GRACE_SECONDS)
        if to_be_killed and process.exitcode == -signal.SIGKILL:
            return None, None
        return f"it ended without a result, exit code {process.exitcode}", None
    if to_be_killed and failure is None:
        return f"it was to be killed and returned {result!r}", None
    return failure, result


def _continue_stopped(processes: list[SpawnProcess], stopped: dict[int, float]) -> None:
    """Note in ``stopped`` which of ``processes`` have stopped, and continue those whose time is over."""
    for process in processes:
        assert process.pid is not None
        if _has_stopped(process.pid):
            stopped[process.pid] = time.monotonic()
    for pid, since in list(stopped.items()):
        if time.monotonic() >= since + STOPPED_SECONDS:
            del stopped[pid]
            os.kill(pid, signal.SIGCONT)


def _has_stopped(pid: int) -> bool:
    try:
        return os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG) is not None
    except ChildProcessError:  # it has ended
        return False


_OPERATIONS = (
    *("new_group", "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "exchange", "broadcast"),
    *("send", "recv", "batch", "barrier", "gather_objects"),
)


class StruckBackend:
    """A process's backend at whose places a script strikes for real; for the rest, the backend itself.

    A place is what it is on simulated ranks. Kill is SIGKILL; Pause is SIGSTOP, whatever its seconds: the
    process that launched this one continues it; and ``spend`` sleeps where a Slow concerns the computing.
    """

    def __init__(self, backend: Backend, faults: Sequence[Fault]) -> None:
        self._backend, self._factor = backend, compute_factor(faults, backend.rank)
        self._strikes = {
            (f.step, f.at): f for f in faults if isinstance(f, Kill | Pause) and f.rank == backend.rank
        }
        self._in_plan, self._num_operations = False, 0
        self.stopped_seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._backend, name)
        if name not in _OPERATIONS:
            return found

        def after_the_strike(*args: Any, **kwargs: Any) -> Any:
            if not self._in_plan:
                self._reach(0, self._num_operations)
            self._num_operations += 1
            return found(*args, **kwargs)

        return after_the_strike

    def at(self, step: int, index: int, action: str = "") -> None:
        self._in_plan = True
        self._reach(step, index)

    def spend(self, seconds: float) -> None:
        if self._factor != 1.0:
            time.sleep(seconds * self._factor)

    def _reach(self, step: int, index: int) -> None:
        fault = self._strikes.pop((step, index), None)
        if fault is not None:
            before = time.perf_counter()
            os.kill(os.getpid(), signal.SIGKILL if isinstance(fault, Kill) else signal.SIGSTOP)
            self.stopped_seconds += time.perf_counter() - before
