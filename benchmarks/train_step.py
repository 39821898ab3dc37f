"""Speed and memory of Picotron's training step beside plain PyTorch's, in one run of one script.

Each row sets two sides against each other, which take turns: a round of one, a round of the other, and so on.
Every side is one or more processes of its own that were started before, with one thread for torch each;
those whose turn it is not wait on a pipe. A round is some training steps; what counts is the CPU time of all
processes of a side, since wall time on a shared machine says little. See README.md beside this file.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

from attrs import field, frozen
from teams import (
    WORKLOAD_W,
    Case,
    Command,
    Reports,
    Side,
    aligned,
    cpu_seconds,
    loss_difference,
    losses,
    parser,
    ratio_interval,
    say,
    side_team,
    take_turns,
    write_report,
)

CASES = {
    "W": WORKLOAD_W,
    "tiny": Case(hidden=32, layers=2, heads=4, intermediate=48, seq_len=16),
}


@frozen
class Row:
    """A line of the table."""

    ours: Side
    peer: Side


def _row(ours: str, parallel: dict[str, Any], peer: str = "torch", peer_micro_batch: int = 1) -> Row:
    """Without ``micro_batch`` the microbatch is one sample; DDP has the ranks that we have."""
    theirs = {"dp": parallel["dp"]} if peer == "ddp" else {}
    return Row(
        Side(ours, {"micro_batch": 1, **parallel}), Side(peer, {"micro_batch": peer_micro_batch, **theirs})
    )


CUBE = {"dp": 2, "pp": 2, "tp": 2, "sequence_parallel": False}
WHOLE = {"tp": 2, "micro_batch": 8, "sequence_parallel": False}
BATCH = {"micro_batch": 8}
ROWS = {
    "control": _row("torch", {}),
    "single": _row("simulated", {}),
    "single-full": _row("simulated", {"micro_batch": 8}, peer_micro_batch=8),
    "ddp": _row("gloo", {"dp": 2}, "ddp"),
    "ddp-full": _row("gloo", {"dp": 2, "micro_batch": 4}, "ddp", peer_micro_batch=4),
    "zero1-dp2-gloo": _row("gloo", {"dp": 2, "micro_batch": 4, "zero_stage": 1}, "ddp", peer_micro_batch=4),
    "zero2-dp2-gloo": _row("gloo", {"dp": 2, "micro_batch": 4, "zero_stage": 2}, "ddp", peer_micro_batch=4),
    "zero3-dp2-gloo": _row("gloo", {"dp": 2, "micro_batch": 4, "zero_stage": 3}, "ddp", peer_micro_batch=4),
    "pp2-simulated": _row("simulated", {"pp": 2}),
    "pp2-gloo": _row("gloo", {"pp": 2}),
    "tp2-simulated": _row("simulated", WHOLE, peer_micro_batch=8),
    "tp2-gloo": _row("gloo", WHOLE, peer_micro_batch=8),
    "tp2-sp-gloo": _row("gloo", {**WHOLE, "sequence_parallel": True}, peer_micro_batch=8),
    "cp2-gloo": _row("gloo", {"cp": 2, "micro_batch": 8}, peer_micro_batch=8),
    "cp2-ulysses": _row("gloo", {"cp": 2, "micro_batch": 8, "context": "all_to_all"}, peer_micro_batch=8),
    "dp2-pp2-tp2-simulated": _row("simulated", CUBE),
    "dp2-pp2-tp2-gloo": _row("gloo", CUBE),
    "selective": _row("simulated", {"recompute": "selective"}, "simulated"),
    "recomputed": _row("simulated", {"recompute": "full"}, "simulated"),
    "offloaded": _row("simulated", {"offload": True}, "simulated"),
    "selective-full": _row("simulated", {**BATCH, "recompute": "selective"}, "simulated", 8),
    "recomputed-full": _row("simulated", {**BATCH, "recompute": "full"}, "simulated", 8),
    "offloaded-full": _row("simulated", {**BATCH, "offload": True}, "simulated", 8),
}


@frozen(kw_only=True)
class Measured:
    """One side of a row: seconds of a step in each round, ``cpu_seconds`` summed over the ranks."""

    what: str
    world_size: int
    cpu_seconds: tuple[float, ...]
    wall_seconds: tuple[float, ...]
    tokens_per_cpu_second: float
    tokens_per_wall_second: float
    peak_bytes_by_rank: tuple[int, ...]
    losses: tuple[float, ...] = field(repr=False)


@frozen(kw_only=True)
class Result:
    """A row, measured; ratios are ours over the peer's.

    ``speed`` is of tokens per CPU second, with the bootstrap's 95 % interval, ``wall_speed`` of tokens per
    wall second, ``memory`` of the fullest ranks' peaks.
    """

    row: str
    ours: Measured
    peer: Measured
    speed: float
    speed_interval: tuple[float, float]
    wall_speed: float
    memory: float
    max_loss_difference: float


def measure(name: str, case: Case, *, rounds: int, steps: int) -> Result:
    """Both sides of a row by turns, then a step of each whose memory is measured."""
    row = ROWS[name]
    with side_team(case, row.ours) as ours, side_team(case, row.peer) as peer:
        taken = take_turns((ours, peer), rounds=rounds, steps=steps)
        last = [each.obey(Command(1, measured=True)) for each in (ours, peer)]
    tokens = case.global_batch * case.seq_len
    sides = [
        measured_side(side, [*reports, end], tokens)
        for side, reports, end in zip((row.ours, row.peer), taken, last, strict=True)
    ]
    return compared(name, *sides)


def measured_side(side: Side, reports: Sequence[Reports], tokens: int) -> Measured:
    """From every process's reports of warm-up, rounds and measured step."""
    timed, last = reports[1:-1], reports[-1]
    cpu = tuple(map(cpu_seconds, timed))
    wall = tuple(max(report.wall_seconds for report in each) / each[0].count for each in timed)
    return Measured(
        what=str(side),
        world_size=side.world_size,
        cpu_seconds=cpu,
        wall_seconds=wall,
        tokens_per_cpu_second=tokens / median(cpu),
        tokens_per_wall_second=tokens / median(wall),
        peak_bytes_by_rank=tuple(peak for report in last for peak in report.peak_bytes),
        losses=losses(reports),
    )


def compared(name: str, ours: Measured, peer: Measured) -> Result:
    """The row's ratios."""
    return Result(
        row=name,
        ours=ours,
        peer=peer,
        speed=ours.tokens_per_cpu_second / peer.tokens_per_cpu_second,
        speed_interval=ratio_interval(peer.cpu_seconds, ours.cpu_seconds),
        wall_speed=ours.tokens_per_wall_second / peer.tokens_per_wall_second,
        memory=max(ours.peak_bytes_by_rank) / max(peer.peak_bytes_by_rank),
        max_loss_difference=loss_difference(ours.losses, peer.losses),
    )


HEADINGS = (
    "row",
    "CPU ms/step",
    "peer's",
    "tokens/CPU s",
    "peer's",
    "speed",
    "95 %",
    "wall (hint)",
    "MB/rank",
    "peer's",
    "memory",
    "loss differs",
)


def _cells(result: Result) -> tuple[str, ...]:
    ours, peer, (low, high) = result.ours, result.peer, result.speed_interval
    return (
        result.row,
        f"{median(ours.cpu_seconds) * 1e3:.1f}",
        f"{median(peer.cpu_seconds) * 1e3:.1f}",
        f"{ours.tokens_per_cpu_second:.0f}",
        f"{peer.tokens_per_cpu_second:.0f}",
        f"{result.speed:.3f}",
        f"{low:.3f}-{high:.3f}",
        f"{result.wall_speed:.2f}",
        f"{max(ours.peak_bytes_by_rank) / 1e6:.2f}",
        f"{max(peer.peak_bytes_by_rank) / 1e6:.2f}",
        f"{result.memory:.3f}",
        f"{result.max_loss_difference:.1e}",
    )


def main() -> None:
    """Measure the rows asked for, print the table, write the JSON."""
    arguments = parser(__doc__, CASES, ROWS, steps=2).parse_args()
    case, results = CASES[arguments.model], []
    for name in arguments.rows:
        say(f"{name}: {ROWS[name].ours} against {ROWS[name].peer}")
        started = time.perf_counter()
        result = measure(name, case, rounds=arguments.rounds, steps=arguments.steps_per_round)
        spent = time.perf_counter() - started
        say(f"  speed {result.speed:.3f}, memory {result.memory:.3f} ({spent:.0f} s)")
        results.append(result)
    print(aligned([HEADINGS, *map(_cells, results)]))
    write_report(arguments, case, results)


if __name__ == "__main__":
    main()
