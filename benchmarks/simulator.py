"""What simulating ranks costs: CPU time of many ranks over that of one, and of everything around them.

A training step of many ranks is set against one rank's step over the same batch in the same microbatches:
as simulated ranks, as gloo's processes, and as PyTorch's threaded process group. Then what a hand-over from
rank to rank costs, and a step of 16,384 ranks of which only the time is simulated. The two sides of a row
take turns; what counts is CPU time, of all processes of a side. See README.md beside this file.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import torch
from attrs import evolve, field, frozen
from teams import (
    WORKLOAD_W,
    Case,
    Side,
    aligned,
    cpu_seconds,
    loss_difference,
    losses,
    parser,
    ratio_interval,
    say,
    serve_side,
    serve_work,
    take_turns,
    team,
    write_report,
)

from picotron.planner.cluster import ClusterSpec
from picotron.planner.faults import Slow
from picotron.planner.model import ModelSpec
from picotron.planner.plan import plan
from picotron.planner.simulate import simulate_step
from picotron.planner.workload import Workload
from picotron.runtime.backend import Backend
from picotron.runtime.simulated import simulation
from picotron.runtime.world import World

NUM_OPERATIONS = 2000  # of every rank, or turns of two locks, in a turn of a row of hand-overs
CASES = {
    "W": WORKLOAD_W,
    "tiny": Case(hidden=32, layers=8, heads=4, intermediate=48, seq_len=16),
}


@frozen
class Work:
    """Something other than training that one process does on command."""

    what: str
    main: Callable[[Connection], None]

    def __str__(self) -> str:
        return self.what


@frozen
class Row:
    """A line of the table. ``unit`` "x" is ours over the base, any other one is ours alone.

    ``global_batch``: instead of the model's own.
    """

    ours: Side | Work
    base: Side | Work | None = None
    target: float | None = field(default=None, kw_only=True)
    unit: str = field(default="x", kw_only=True)
    global_batch: int | None = field(default=None, kw_only=True)

    def __str__(self) -> str:
        batch = f", global batch {self.global_batch}" if self.global_batch else ""
        return f"{self.ours}{'' if self.base is None else f' against {self.base}'}{batch}"


UNITS = {"x": 1.0, "us": 1e6, "s": 1.0}


def pinned(work: Callable[[], int], connection: Connection) -> None:
    """Serve ``work`` on one core."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    serve_work(connection, work)


def hand_overs(world_size: int, operations: Callable[[Backend], None]) -> int:
    """How often ranks that do nothing but ``operations`` hand over."""
    found = simulation(operations, world_size, World())
    if found.failure is not None:
        raise found.failure
    return found.num_hand_overs


def barriers(backend: Backend) -> None:
    for _ in range(NUM_OPERATIONS):
        backend.barrier()


def all_reduces(backend: Backend) -> None:
    group, tensor = backend.new_group(range(backend.world_size)), torch.zeros(1)
    for _ in range(NUM_OPERATIONS):
        backend.all_reduce(tensor, group).wait()


def messages(backend: Backend) -> None:
    """From an even rank to the odd one after it."""
    tensor, peer = torch.zeros(1), backend.rank ^ 1
    post = backend.recv if backend.rank % 2 else backend.send
    for _ in range(NUM_OPERATIONS):
        post(tensor, peer).wait()


def lock_turns() -> int:
    """Two threads that let each other run by a lock each, which is the least that a hand-over can be."""
    locks = threading.Lock(), threading.Lock()
    for lock in locks:
        lock.acquire()

    def turns(own: threading.Lock, other: threading.Lock) -> None:
        for _ in range(NUM_OPERATIONS):
            own.acquire()
            other.release()

    threads = [threading.Thread(target=turns, args=pair) for pair in (locks, locks[::-1])]
    for thread in threads:
        thread.start()
    locks[0].release()
    for thread in threads:
        thread.join()
    return 2 * NUM_OPERATIONS


def time_only_step(*faults: Slow) -> int:
    """One step of 16,384 ranks, from a plan that is made anew."""
    cluster = ClusterSpec.preset("h100", nodes=2048)
    work = Workload(global_batch=128 * 128, seq_len=4096)
    made = plan(ModelSpec.from_hf("llama-3.1-405b"), cluster, work, tp=8, pp=16, dp=128, schedule="1f1b")
    assert made.num_microbatches == 128
    simulate_step(made, faults)
    return 1


def _step(
    engine: str,
    parallel: dict[str, Any],
    *,
    base: str = "simulated",
    target: float | None = None,
    global_batch: int | None = None,
) -> Row:
    """Against one rank with the same microbatches; without ``micro_batch`` that is one sample."""
    sizes = {"micro_batch": 1, **parallel}
    return Row(
        Side(engine, sizes),
        Side(base, {"micro_batch": sizes["micro_batch"]}),
        target=target,
        global_batch=global_batch,
    )


def _hand_over(what: str, world_size: int, operations: Callable[[Backend], None]) -> Row:
    return Row(
        Work(f"{what} of {world_size} ranks", partial(pinned, partial(hand_overs, world_size, operations))),
        Work("bare locks of 2 threads", partial(pinned, lock_turns)),
        target=20.0,
        unit="us",
    )


TP4 = {"tp": 4, "micro_batch": 8}
PLAIN_TP4 = {**TP4, "sequence_parallel": False}
PP8 = {"pp": 8}
CUBE = {"dp": 2, "pp": 2, "tp": 2}
GRID = {"dp": 8, "pp": 8}
TIME_ONLY = Work("16,384 ranks, time only", partial(serve_work, work=time_only_step))
ONE_SLOW = Work(
    "16,384 ranks, time only, one of them slow",
    partial(serve_work, work=partial(time_only_step, Slow(rank=4321, factor=1.5))),
)
ROWS = {
    "control": _step("simulated", {}),
    "tp4": _step("simulated", TP4, target=1.25),
    "tp4-no-sp": _step("simulated", PLAIN_TP4, target=1.25),
    "tp4-microbatches": _step("simulated", {"tp": 4}),
    "pp8": _step("simulated", PP8, target=1.18),
    "dp2-pp2-tp2": _step("simulated", CUBE),
    "dp4": _step("simulated", {"dp": 4}),
    "dp8": _step("simulated", {"dp": 8}),
    "dp8-pp8": _step("simulated", GRID, target=1.9),
    "dp8-pp8-batch64": _step("simulated", GRID, target=1.9, global_batch=64),
    "tp4-gloo": _step("gloo", TP4),
    "tp4-no-sp-gloo": _step("gloo", PLAIN_TP4),
    "pp8-gloo": _step("gloo", PP8),
    "dp2-pp2-tp2-gloo": _step("gloo", CUBE),
    "dp4-threads": _step("threaded-ddp", {"dp": 4}, base="torch"),
    "dp8-threads": _step("threaded-ddp", {"dp": 8}, base="torch"),
    "tp4-threads": _step("threaded-tp", PLAIN_TP4, base="torch"),
    "hand-over-barrier": _hand_over("barriers", 8, barriers),
    "hand-over-barrier-64": _hand_over("barriers", 64, barriers),
    "hand-over-all-reduce": _hand_over("all_reduces", 8, all_reduces),
    "hand-over-message": _hand_over("messages", 2, messages),
    "time-only": Row(TIME_ONLY, target=2.0, unit="s"),
    "time-only-slow": Row(ONE_SLOW, TIME_ONLY, target=2.0, unit="s"),
}


@frozen(kw_only=True)
class Result:
    """A row, measured. CPU seconds are of a step, a hand-over or a simulated step, round by round.

    ``value`` is in ``unit``: "x" is ours over the base, "us" and "s" are ours alone.
    """

    row: str
    ours: str
    base: str | None
    cpu_seconds: tuple[float, ...]
    base_cpu_seconds: tuple[float, ...] | None
    unit: str
    value: float
    interval: tuple[float, float]
    target: float | None
    verdict: str
    max_loss_difference: float | None


def verdict(interval: tuple[float, float], target: float | None) -> str:
    """Whether a value's whole interval is within its target, or beyond it; "open" where neither."""
    if target is None:
        return "none"
    low, high = interval
    return "met" if high <= target else "missed" if low > target else "open"


def measure(name: str, case: Case, *, rounds: int, steps: int) -> Result:
    """The sides of a row by turns."""
    row = ROWS[name]
    case = evolve(case, global_batch=row.global_batch or case.global_batch)
    sides = [row.ours] if row.base is None else [row.ours, row.base]
    with ExitStack() as stack:
        teams = [stack.enter_context(_team(case, side)) for side in sides]
        taken = take_turns(teams, rounds=rounds, steps=steps)
    seconds = [tuple(map(cpu_seconds, reports[1:])) for reports in taken]
    below = seconds[1] if row.unit == "x" else (1.0 / UNITS[row.unit],) * rounds
    interval = ratio_interval(seconds[0], below)
    return Result(
        row=name,
        ours=str(row.ours),
        base=None if row.base is None else str(row.base),
        cpu_seconds=seconds[0],
        base_cpu_seconds=None if row.base is None else seconds[1],
        unit=row.unit,
        value=median(seconds[0]) / median(below),
        interval=interval,
        target=row.target,
        verdict=verdict(interval, row.target),
        max_loss_difference=loss_difference(*map(losses, taken)) if row.unit == "x" else None,
    )


def _team(case: Case, side: Side | Work) -> Any:
    if isinstance(side, Work):
        return team(str(side), side.main)
    return team(str(side), partial(serve_side, case, side), side.num_processes)


HEADINGS = ("row", "CPU ms", "base's", "value", "95 %", "", "target", "verdict", "loss differs")


def _cells(result: Result) -> tuple[str, ...]:
    low, high = result.interval
    return (
        result.row,
        _milliseconds(result.cpu_seconds),
        _milliseconds(result.base_cpu_seconds),
        f"{result.value:.3f}",
        f"{low:.3f}-{high:.3f}",
        result.unit,
        "-" if result.target is None else f"{result.target:g}",
        result.verdict,
        "-" if result.max_loss_difference is None else f"{result.max_loss_difference:.1e}",
    )


def _milliseconds(seconds: tuple[float, ...] | None) -> str:
    return "-" if seconds is None else f"{median(seconds) * 1e3:.4g}"


def main() -> None:
    """Measure the rows asked for, print the table, write the JSON."""
    arguments = parser(__doc__, CASES, ROWS, steps=1).parse_args()
    case, results = CASES[arguments.model], []
    for name in arguments.rows:
        say(f"{name}: {ROWS[name]}")
        started = time.perf_counter()
        result = measure(name, case, rounds=arguments.rounds, steps=arguments.steps_per_round)
        say(f"  {result.value:.3f} {result.unit} ({time.perf_counter() - started:.0f} s)")
        results.append(result)
    print(aligned([HEADINGS, *map(_cells, results)]))
    write_report(arguments, case, results)


if __name__ == "__main__":
    main()
