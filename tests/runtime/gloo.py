"""Launch one function in several processes that can open gloo on loopback, as torchrun would."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

import torch

_GRACE_SECONDS = 2.0  # for the other ranks to tell their errors too, once one has failed


def launch(
    function: Callable[..., Any], world_size: int, *args: object, timeout_seconds: float = 120.0
) -> list[Any]:
    """What ``function(*args)`` returned in each of ``world_size`` fresh processes, in rank order.

    ``function`` is importable by name; arguments and results are pickled. Each process finds torchrun's
    variables in its environment, so ``DistributedBackend.open("cpu")`` works at once, and torch has one
    thread. To run a table of cases on worlds of several sizes in one launch, call ``connect`` once in the
    function, then ``DistributedBackend(processes, ranks=range(n))`` for each in those whose rank is below n.

    Raises RuntimeError with the tracebacks of the ranks that failed, or with the ranks still running when the
    time is up. No process is left behind.
    """
    import torch.distributed as dist

    # Port 0: one that is free.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    context = multiprocessing.get_context("spawn")
    readers: dict[Connection, int] = {}
    processes: list[SpawnProcess] = []
    try:
        for rank in range(world_size):
            reader, writer = context.Pipe(duplex=False)
            environment = _environment(rank, world_size, store.port)
            process = context.Process(target=_child, args=(writer, environment, function, args), daemon=True)
            process.start()
            writer.close()
            readers[reader] = rank
            processes.append(process)
        return _results(readers, processes, time.monotonic() + timeout_seconds)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
            process.close()
        for reader in readers:
            reader.close()


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is in the process that launches
        "GLOO_SOCKET_IFNAME": "lo",
    }


def _child(
    writer: Connection, environment: dict[str, str], function: Callable[..., Any], args: tuple[object, ...]
) -> None:
    """What each process runs: the function, then its result or its traceback down the pipe."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        report = pickle.dumps((None, function(*args)))
    except BaseException:
        report = pickle.dumps((traceback.format_exc(), None))
    writer.send_bytes(report)
    writer.close()


def _results(
    readers: dict[Connection, int], processes: list[SpawnProcess], deadline_seconds: float
) -> list[Any]:
    """Every rank's result; RuntimeError as soon as one has failed (and the others had their grace)."""
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    pending = dict(readers)
    while pending:
        ready = wait(list(pending), max(0.0, deadline_seconds - time.monotonic()))
        if not ready:
            break
        for reader in ready:
            assert isinstance(reader, Connection)
            rank = pending.pop(reader)
            failure, results[rank] = _report(reader, processes[rank])
            if failure is not None:
                if not failures:
                    deadline_seconds = min(deadline_seconds, time.monotonic() + _GRACE_SECONDS)
                failures[rank] = failure
    if failures:
        raise RuntimeError("\n".join(f"rank {rank} failed:\n{text}" for rank, text in failures.items()))
    if pending:
        raise RuntimeError(f"the time is up, and ranks {sorted(pending.values())} are still running")
    return [results[rank] for rank in sorted(results)]


def _report(reader: Connection, process: SpawnProcess) -> tuple[str | None, Any]:
    try:
        failure, result = pickle.loads(reader.recv_bytes())
    except EOFError:
        process.join(_GRACE_SECONDS)
        return f"it ended without a result, exit code {process.exitcode}", None
    return failure, result
