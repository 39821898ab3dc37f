"""What communication takes of a rank's processor, and of time: calls of the available backend, measured.

Simulated ranks hand a processor over to each other; gloo's are two processes of their own on this machine,
whose communication threads count too. Every rank does the same number of calls of each kind and size.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import torch
from attrs import frozen

from picotron.errors import ExecutionError, PlanError
from picotron.planner.fit_costs import Observation, fit_call, fit_prices
from picotron.planner.measured import CallCost
from picotron.runtime.backend import Backend, Group
from picotron.runtime.loopback import children
from picotron.runtime.simulated import simulate

BACKENDS = ("simulated", "gloo")
KINDS = ("all_reduce", "all_gather", "reduce_scatter", "send")
SIZES = (2**6, 2**16, 2**18, 2**20)  # bytes of payload
SIMULATED_RANKS = 4
_CALLS = 8  # of one kind and size before the next has its turn
_LEAST_ROUNDS = 3
_TIMEOUT_SECONDS = 600.0
_LEAST_SECONDS = 1e-9

Taken = dict[tuple[str, int], tuple[float, float]]
"""CPU and wall seconds of a call on one rank, by kind and payload."""


@frozen(kw_only=True)
class Calls:
    """Costs of calls in CPU seconds of a rank, and the link of their wall seconds; None where simulated."""

    costs: tuple[CallCost, ...]
    latency_seconds: float | None = None
    bytes_per_second: float | None = None


def measure_calls(backend: str, seconds: float) -> Calls:
    """The communication of "simulated" ranks or of two processes over "gloo"."""
    if backend not in BACKENDS:
        raise PlanError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if backend == "gloo":
        return calls_from(over_gloo(_calls_over_gloo, seconds), 2, with_link=True)
    ranks = simulate(lambda rank: take_calls(rank, seconds), SIMULATED_RANKS, clock="cpu")
    return calls_from(ranks, SIMULATED_RANKS)


def take_calls(backend: Backend, seconds: float) -> Taken:
    """Median CPU and wall seconds of a call on this rank, for every kind and size.

    Of a send, rank 0 and rank 1 are measured, which send and receive.
    """
    group = backend.new_group(tuple(range(backend.world_size)), "everyone")
    calls = {(kind, size): _call(backend, group, kind, size) for kind in KINDS for size in SIZES}
    taken: dict[tuple[str, int], list[tuple[float, float]]] = {key: [] for key in calls}
    for call in calls.values():
        call()
    end, rounds = time.perf_counter() + seconds, 0
    while _another_round(backend, rounds, end):
        for key, call in calls.items():
            cpu, wall = backend.cpu_seconds(), time.perf_counter()
            for _ in range(_CALLS):
                call()
            cpu, wall = backend.cpu_seconds() - cpu, time.perf_counter() - wall
            taken[key].append((cpu / _CALLS, wall / _CALLS))
        rounds += 1
    return {
        key: (max(median(cpu for cpu, _ in own), _LEAST_SECONDS), median(wall for _, wall in own))
        for key, own in taken.items()
    }


def _another_round(backend: Backend, rounds: int, end: float) -> bool:
    """Rank 0 decides for all."""
    return bool(backend.gather_objects(rounds < _LEAST_ROUNDS or time.perf_counter() < end)[0])


def _call(backend: Backend, group: Group, kind: str, size: int) -> Callable[[], None]:
    whole = torch.zeros(size // 4)
    part = torch.zeros(size // 4 // group.size)
    if kind == "all_reduce":
        return lambda: backend.all_reduce(whole, group).wait()
    if kind == "all_gather":
        return lambda: backend.all_gather(whole, part, group).wait()
    if kind == "reduce_scatter":
        return lambda: backend.reduce_scatter(part, whole, group).wait()
    if backend.rank == 0:
        return lambda: backend.send(whole, 1, "calibration").wait()
    if backend.rank == 1:
        return lambda: backend.recv(whole, 0, "calibration").wait()
    return lambda: None


def calls_from(ranks: list[Taken], world_size: int, *, with_link: bool = False) -> Calls:
    """The costs that every rank's timings have in the mean; both ends of a message cost the same."""
    costs = []
    for kind in KINDS:
        members = 2 if kind == "send" else world_size
        timings = [(size, sum(taken[kind, size][0] for taken in ranks[:members]) / members) for size in SIZES]
        costs.append(fit_call(kind, timings))
        if kind == "send":
            costs.append(fit_call("recv", timings))
    if not with_link:
        return Calls(costs=tuple(costs))
    latency, rate = _link(ranks, world_size)
    return Calls(costs=tuple(costs), latency_seconds=latency, bytes_per_second=rate)


def _link(ranks: list[Taken], world_size: int) -> tuple[float, float]:
    """Latency and rate with which a ring's all-reduce takes the wall seconds that it took."""
    steps, sent = 2 * (world_size - 1), 2 * (world_size - 1) / world_size
    prices = fit_prices(
        [
            Observation(
                {"latency": float(steps), "byte": sent * size},
                max(max(taken["all_reduce", size][1] for taken in ranks), _LEAST_SECONDS),
            )
            for size in SIZES
        ]
    )
    return prices["latency"], 1 / max(prices["byte"], 1e-15)


def over_gloo(function: Callable[..., Any], *arguments: object) -> list[Any]:
    """What ``function(processes, *arguments)`` returns in each of two processes that can open gloo.

    ``function`` is importable by name; ``processes`` are what a ``DistributedBackend`` is made of. Raises
    ExecutionError with a process's traceback.
    """
    with children(_send_result, 2, function, arguments) as both:
        return [_answer(child.connection) for child in both]


def _send_result(connection: Connection, function: Callable[..., Any], arguments: tuple[object, ...]) -> None:
    """One of the two processes; what goes wrong is told through the pipe."""
    from picotron.runtime.distributed import connect

    try:
        connection.send((True, function(connect(), *arguments)))
    except BaseException:
        connection.send((False, traceback.format_exc()))
        raise


def _calls_over_gloo(processes: Any, seconds: float) -> Taken:
    from picotron.runtime.distributed import DistributedBackend

    with DistributedBackend(processes, device="cpu") as backend:
        return take_calls(backend, seconds)


def _answer(connection: Connection) -> Any:
    if not connection.poll(_TIMEOUT_SECONDS):
        raise ExecutionError(f"a process over gloo must answer within {_TIMEOUT_SECONDS:g} s")
    try:
        done, answer = connection.recv()
    except EOFError:
        raise ExecutionError("a process over gloo ended without an answer") from None
    if not done:
        raise ExecutionError(f"a process over gloo failed:\n{answer}")
    return answer
