"""Bubbles of schedules, and what making, checking, lowering and timing them costs, beside PyTorch's.

Every cost is measured in a process of its own, fresh for each turn, by CPU time and by how far its resident
memory rose; the two sides take turns. PyTorch's orders are priced by the same clock as ours. See README.md
beside this file.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from attrs import asdict, frozen


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


PEERS = {  # of our names
    "afab": "GPipe",
    "1f1b": "1F1B",
    "interleaved": "Interleaved1F1B",
    "bfs": "LoopedBFS",
    "interleaved-zb": "InterleavedZeroBubble",
    "zb-v": "ZBVZeroBubble",
    "dualpipe-v": "DualPipeV",
}
SIZES = ((4, 8), (8, 32), (8, 20), (16, 64))
FULL = (64, 1024)
SMALL = (16, 256)
SCALING = (64, (128, 256, 512, 1024))
QUICK = (4, 8)


@frozen(kw_only=True)
class Bubble:
    """Idle shares of the makespan with F = I = W = 1 a stage; the peer's is None where it refuses."""

    name: str
    num_ranks: int
    num_microbatches: int
    virtual_stages: int
    ours: float
    peer: float | None


@frozen(kw_only=True)
class Cost:
    """CPU seconds of each turn of some work, and by how much memory rose at most; the peer's if it can."""

    work: str
    name: str
    num_ranks: int
    num_microbatches: int
    virtual_stages: int
    num_actions: int
    ours_seconds: tuple[float, ...]
    ours_bytes: int
    peer_seconds: tuple[float, ...]
    peer_bytes: int
    times_faster: float | None
    interval: tuple[float, float] | None


def torch_orders(name: str, num_ranks: int, num_microbatches: int, virtual_stages: int) -> list[list[Any]]:
    """What PyTorch's schedule of that name computes, rank by rank."""
    import torch.distributed.pipelining._schedule_visualizer as visualizer

    stages = virtual_stages if virtual_stages > 1 else None
    orders: Any = visualizer.get_schedule_ops(PEERS[name], num_ranks, num_microbatches, stages)
    return [
        [action for action in orders[rank] if action is not None and action.is_compute_op]
        for rank in range(num_ranks)
    ]


def torch_schedule(name: str, num_ranks: int, num_microbatches: int, virtual_stages: int) -> Any:
    """The same as a schedule of ours; the forwards of its 1F1B's last rank, numbered from 1, counted anew."""
    from picotron.planner.pipeline import schedule_of

    orders = torch_orders(name, num_ranks, num_microbatches, virtual_stages)
    if name == "1f1b":
        forwards = (action for action in orders[-1] if action.computation_type.value == "F")
        shift = min(action.microbatch_index for action in forwards)
        orders[-1] = [
            action._replace(
                microbatch_index=action.microbatch_index - shift * (action.computation_type.value == "F")
            )
            for action in orders[-1]
        ]
    return schedule_of([[str(action) for action in order] for order in orders])


def bubbles() -> list[Bubble]:
    """Ours and PyTorch's of each name, at each size."""
    from picotron.errors import PlanError
    from picotron.planner.catalogue import SCHEDULES, make_schedule
    from picotron.planner.schedule_times import bubble_fraction, schedule_times, unit_costs

    def idle(schedule: Any) -> float:
        costs = unit_costs(schedule.num_stages)
        return bubble_fraction(schedule, costs, schedule_times(schedule, costs))

    found = []
    for name, named in SCHEDULES.items():
        for p, m in SIZES:
            for v in (2, 4) if named.virtual_stages == "any" else (int(named.virtual_stages),):
                try:
                    ours = make_schedule(name, p, m, v)
                except PlanError as error:
                    say(f"{name} {p}x{m}: {error}")
                    continue
                peer = None
                if name in PEERS:
                    try:
                        peer = idle(torch_schedule(name, p, m, v))
                    except (ValueError, AssertionError, RuntimeError) as error:
                        say(f"torch's {PEERS[name]} {p}x{m} v={v}: {str(error).splitlines()[0]}")
                found.append(
                    Bubble(
                        name=name,
                        num_ranks=p,
                        num_microbatches=m,
                        virtual_stages=v,
                        ours=idle(ours),
                        peer=peer,
                    )
                )
    return found


def make_and_check(name: str, p: int, m: int, v: int) -> Callable[[], Any]:
    """Ours: a schedule, and the proof that it is one."""
    from picotron.planner.catalogue import make_schedule
    from picotron.planner.check import check

    def work() -> int:
        schedule = make_schedule(name, p, m, v)
        assert check(schedule).ok
        return schedule.orders.num_actions

    return work


def lower_and_time(name: str, p: int, m: int, v: int) -> Callable[[], Any]:
    """Ours: from a schedule to a program and the time of each of its rows."""
    from picotron.planner.catalogue import make_schedule
    from picotron.planner.flow import program_times
    from picotron.planner.lower import with_transfers
    from picotron.planner.schedule_times import unit_costs

    schedule = make_schedule(name, p, m, v)
    costs = unit_costs(schedule.num_stages, transfer=0.1)

    def work() -> int:
        program_times(with_transfers(schedule, 1), costs)
        return schedule.orders.num_actions

    return work


def torch_make(name: str, p: int, m: int, v: int) -> Callable[[], Any]:
    """PyTorch's: its class with mock stages, which makes the orders (and lowers some)."""
    import torch.distributed.pipelining._schedule_visualizer  # noqa: F401

    return lambda: sum(map(len, torch_orders(name, p, m, v)))


def torch_lower(name: str, p: int, m: int, v: int) -> Callable[[], Any]:
    """PyTorch's: sends and receives for the orders, and its simulation of them."""
    import torch.distributed.pipelining.schedules as theirs

    orders = dict(enumerate(torch_orders(name, p, m, v)))
    from picotron.planner.catalogue import make_schedule

    ranks = make_schedule(name, p, m, v).stage_ranks
    where: dict[str, Any] = {"stage_to_rank": ranks.__getitem__, "num_stages": len(ranks)}

    def work() -> int:
        lowered = theirs._add_send_recv(orders, **where)
        theirs._simulate_comms_compute(lowered, **where)
        return sum(map(len, orders.values()))

    return work


WORKS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "make and check": (make_and_check, torch_make),
    "lower and time": (lower_and_time, torch_lower),
}


def most_bytes() -> int:
    """The most memory that this process ever had; ``getrusage`` would count its parent's too."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def _measured(prepare: Callable[..., Any], sizes: tuple[Any, ...], out: Any) -> None:
    try:
        work = prepare(*sizes)
        gc.collect()
        before = most_bytes()
        began = time.process_time()
        count = work()
        seconds = time.process_time() - began
        out.send((seconds, most_bytes() - before, count))
    except Exception as error:
        out.send(f"{type(error).__name__}: {error}")


def turn(prepare: Callable[..., Any], sizes: tuple[Any, ...]) -> tuple[float, int, int] | str:
    """CPU seconds, bytes and actions of one turn in a fresh process, or why there are none."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(prepare, sizes, there), daemon=True)
    process.start()
    there.close()
    try:
        answer: tuple[float, int, int] | str = here.recv()
    except EOFError:
        answer = "the process ended without an answer"
    process.join()
    return answer


def cost(work: str, name: str, sizes: tuple[int, int, int], *, rounds: int, peer_rounds: int) -> Cost:
    """One row: ours and PyTorch's by turns."""
    from teams import ratio_interval  # it loads torch, which a process of ours does not

    ours, peer = WORKS[work]
    own: list[tuple[float, int, int]] = []
    theirs: list[tuple[float, int, int]] = []
    for index in range(rounds):
        got = turn(ours, (name, *sizes))
        if isinstance(got, str):
            raise RuntimeError(f"{work} of {name} {sizes}: {got}")
        own.append(got)
        if index < peer_rounds and name in PEERS:
            got = turn(peer, (name, *sizes))
            if isinstance(got, str):
                say(f"torch cannot {work} {PEERS[name]} {sizes}: {got.splitlines()[0][:100]}")
                peer_rounds = 0
            else:
                theirs.append(got)
    seconds, others = tuple(o[0] for o in own), tuple(t[0] for t in theirs)
    paired = len(others) == len(seconds)
    return Cost(
        work=work,
        name=name,
        num_ranks=sizes[0],
        num_microbatches=sizes[1],
        virtual_stages=sizes[2],
        num_actions=own[0][2],
        ours_seconds=seconds,
        ours_bytes=max(o[1] for o in own),
        peer_seconds=others,
        peer_bytes=max((t[1] for t in theirs), default=0),
        times_faster=median(others) / median(seconds) if others else None,
        interval=ratio_interval(others, seconds) if paired and others else None,
    )


def rows(size: tuple[int, int]) -> list[tuple[str, tuple[int, int, int]]]:
    """The schedules of the table of costs, at one size."""
    from picotron.planner.catalogue import SCHEDULES

    found = []
    for name, named in SCHEDULES.items():
        stages = (
            {"interleaved": (2, 4, 8)}.get(name, (2, 4))
            if named.virtual_stages == "any"
            else (named.virtual_stages,)
        )
        found += [(name, (*size, int(v))) for v in stages]
    return found


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=("quick", "small", "full"), default="small", help="of the costs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer-rounds", type=int, help="of PyTorch's turns (default: as many; full: 1)")
    parser.add_argument("--only", help="names with commas between")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    size = {"quick": QUICK, "small": SMALL, "full": FULL}[arguments.size]
    peer_rounds = arguments.peer_rounds
    if peer_rounds is None:
        peer_rounds = 1 if arguments.size == "full" else arguments.rounds
    chosen = None if arguments.only is None else set(arguments.only.split(","))
    idle = [row for row in bubbles() if chosen is None or row.name in chosen]
    print(bubble_table(idle))
    costs = []
    for work in WORKS:
        for name, sizes in rows(size):
            if chosen is None or name in chosen:
                say(f"{work}: {name} {sizes}")
                costs.append(cost(work, name, sizes, rounds=arguments.rounds, peer_rounds=peer_rounds))
    print(cost_table(costs))
    growth = []
    if arguments.size == "full":
        for m in SCALING[1]:
            growth += [
                cost(work, "interleaved-zb", (SCALING[0], m, 2), rounds=arguments.rounds, peer_rounds=0)
                for work in WORKS
            ]
        print(growth_table(growth))
    if arguments.json:
        from teams import machine

        report = {
            "command": sys.argv,
            "machine": machine(),
            "bubbles": [asdict(row) for row in idle],
            "costs": [asdict(row) for row in [*costs, *growth]],
        }
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)


def aligned(lines: list[tuple[str, ...]]) -> str:
    """A table as text."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines) + "\n"


def bubble_table(found: list[Bubble]) -> str:
    """The bubbles, a line a schedule and size."""
    lines = [("schedule", "v", "ranks x microbatches", "bubble", "torch's")]
    for row in found:
        theirs = "-" if row.peer is None else f"{row.peer:.4f}"
        lines.append(
            (
                row.name,
                str(row.virtual_stages),
                f"{row.num_ranks} x {row.num_microbatches}",
                f"{row.ours:.4f}",
                theirs,
            )
        )
    return aligned(lines)


def cost_table(found: list[Cost]) -> str:
    """The costs, a line a schedule."""
    lines = [
        (
            "work",
            "schedule",
            "v",
            "actions",
            "CPU s",
            "MB",
            "torch's CPU s",
            "torch's MB",
            "times faster",
            "95 %",
        )
    ]
    for row in found:
        interval = "" if row.interval is None else f"{row.interval[0]:.0f}-{row.interval[1]:.0f}"
        theirs = f"{median(row.peer_seconds):.3f}" if row.peer_seconds else "-"
        lines.append(
            (
                row.work,
                row.name,
                str(row.virtual_stages),
                f"{row.num_actions:,}",
                f"{median(row.ours_seconds):.3f}",
                f"{row.ours_bytes / 1e6:.0f}",
                theirs,
                f"{row.peer_bytes / 1e6:.0f}" if row.peer_seconds else "-",
                "" if row.times_faster is None else f"{row.times_faster:.0f}",
                interval,
            )
        )
    return aligned(lines)


def growth_table(found: list[Cost]) -> str:
    """Microseconds an action as the number of actions grows."""
    lines = [("work", "schedule", "actions", "CPU s", "us an action")]
    for row in found:
        seconds = median(row.ours_seconds)
        lines.append(
            (
                row.work,
                row.name,
                f"{row.num_actions:,}",
                f"{seconds:.3f}",
                f"{seconds / row.num_actions * 1e6:.2f}",
            )
        )
    return aligned(lines)


if __name__ == "__main__":
    main()
