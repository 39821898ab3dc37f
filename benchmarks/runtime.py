"""Picotron's runtime over gloo beside its peers': what a step costs, sends and holds.

Each row sets Picotron against one peer or several of the same layout, and all of them against plain PyTorch
in a single process. The sides take turns; what counts is the CPU time of a side's processes over the single
one's. Then each takes steps whose payload, live tensors and memory are looked at. See README.md beside this
file.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from attrs import evolve, field, frozen
from cpu_profile import Profile, summed, table
from rank_sides import Counted, Look, rank_team
from teams import (
    WORKLOAD_W,
    Case,
    Reports,
    Side,
    aligned,
    cpu_seconds,
    loss_difference,
    make_plan,
    parser,
    ratio_interval,
    say,
    take_turns,
    write_report,
)

from picotron.errors import PlanError
from picotron.runtime.run import check_runnable

CASES = {
    "W": WORKLOAD_W,
    "tiny": Case(hidden=32, layers=4, heads=4, intermediate=48, seq_len=16),
}
SINGLE = Side("torch", {"micro_batch": 8})
MB = 1e6
ABSENT = "DeepSpeed is not installed in this Python: pip install deepspeed (it needs a C++ compiler, ninja)"


@frozen(kw_only=True)
class Target:
    """What a row is to reach: CPU time over the single process's or a peer's, payload, a peer's memory."""

    single: float | None = None
    peer: tuple[str, float] | None = None
    payload_bytes: float | None = None
    memory: tuple[str, float] | None = None


@frozen
class Row:
    """A line of the table: ours and the peers, by engine."""

    ours: Side
    peers: tuple[Side, ...]
    target: Target = field(factory=Target)

    def __str__(self) -> str:
        return f"{self.ours} against {' and '.join(map(str, self.peers))}"


def _row(parallel: dict[str, Any], *peers: str, target: Target | None = None) -> Row:
    """A peer has the ranks and the microbatches that we have."""
    theirs = {key: value for key, value in parallel.items() if key != "schedule"}
    return Row(Side("gloo", parallel), tuple(Side(engine, theirs) for engine in peers), target or Target())


DP2 = {"dp": 2, "micro_batch": 4}
TP2 = {"tp": 2, "micro_batch": 8, "sequence_parallel": False}
PP4 = {"pp": 4, "micro_batch": 1, "schedule": "1f1b"}
CUBE = {"dp": 2, "pp": 2, "tp": 2, "micro_batch": 1, "schedule": "1f1b", "sequence_parallel": False}
ROWS = {
    "one": _row({"micro_batch": 8}, "torch"),
    "dp2": _row(DP2, "ddp", target=Target(peer=("ddp", 1.0))),
    "tp2": _row(TP2, "dtensor", target=Target(single=1.15, payload_bytes=141 * MB)),
    "tp2-sp": _row({**TP2, "sequence_parallel": True}, "dtensor"),
    "pp4": _row(PP4, "torch-1f1b", target=Target(peer=("torch-1f1b", 1.0))),
    "zero3": _row({**DP2, "zero_stage": 3}, "fsdp", "deepspeed", target=Target(peer=("deepspeed", 1.0))),
    "dp2-pp2-tp2": _row(
        CUBE,
        "original",
        target=Target(single=1.5, payload_bytes=230 * MB, memory=("original", 0.5)),
    ),
    "dp2-pp2-tp2-torch": _row(CUBE, "torch-cube"),
}
OPTIONAL = ("deepspeed", "original")


@frozen(kw_only=True)
class Measured:
    """One side of a row. Seconds and bytes are a step's, over all ranks, turn by turn.

    ``over_single`` is the ratio of median CPU times, with its interval; ``payload`` is by operation: how
    often (0 where that is not counted) and bytes. Peaks and ``resident_bytes`` are by rank.
    """

    engine: str
    what: str
    world_size: int
    cpu_seconds: tuple[float, ...]
    other_seconds: tuple[float, ...]
    wall_seconds: tuple[float, ...]
    over_single: float
    over_single_interval: tuple[float, float]
    sent_bytes: int
    loopback_bytes: int
    payload: dict[str, tuple[int, int]]
    peak_bytes_by_rank: tuple[int, ...]
    resident_bytes_by_rank: tuple[int, ...]
    losses: tuple[float, ...] = field(repr=False)

    @property
    def payload_bytes(self) -> int:
        """Handed over for sending, by all operations of all ranks."""
        return sum(size for _, size in self.payload.values())


@frozen(kw_only=True)
class Verdict:
    """A target of a row, what was measured for it, and whether it is met, missed or open."""

    target: str
    value: float
    bound: float
    verdict: str


@frozen(kw_only=True)
class Result:
    """A row, measured: our side (None where it cannot run, and why), the peers and the single process."""

    row: str
    ours: Measured | None
    refused: str | None
    peers: tuple[Measured, ...]
    single: Measured
    absent: tuple[str, ...]
    over_peers: dict[str, tuple[float, float, float]]
    verdicts: tuple[Verdict, ...]
    max_loss_difference: float


def refusal(case: Case, ours: Side) -> str | None:
    """Why our side of a row cannot be planned or run, if so."""
    try:
        check_runnable(make_plan(case, ours), "gloo")
    except PlanError as error:
        return str(error)
    return None


def row_of(name: str, options: argparse.Namespace) -> Row:
    """The row, our side of it without shared memory where that is asked for."""
    row = ROWS[name]
    return evolve(row, ours=evolve(row.ours, engine="sockets")) if options.sockets else row


def present(row: Row, options: argparse.Namespace) -> tuple[tuple[Side, ...], tuple[str, ...]]:
    """The peers that can run, and the engines that were not asked for."""
    asked = {"deepspeed": options.deepspeed, "original": options.original is not None}
    absent = tuple(p.engine for p in row.peers if not asked.get(p.engine, True))
    return tuple(p for p in row.peers if p.engine not in absent), absent


def measure(name: str, case: Case, options: argparse.Namespace) -> Result:
    """All sides of a row by turns, then the looks of each."""
    row = row_of(name, options)
    refused = refusal(case, row.ours)
    peers, absent = present(row, options)
    sides = (SINGLE, *([] if refused else [row.ours]), *peers)
    with ExitStack() as stack:
        teams = [stack.enter_context(rank_team(case, side, options.original)) for side in sides]
        taken = take_turns(teams, rounds=options.rounds, steps=options.steps_per_round)
        looks = [
            {what: team.obey(Look(1, what=what)) for what in ("resident", "payload", "memory")}
            for team in teams
        ]
    base = tuple(map(cpu_seconds, taken[0][1:]))
    found = [
        measured_side(side, reports, look, base)
        for side, reports, look in zip(sides, taken, looks, strict=True)
    ]
    single, *others = found
    ours = None if refused else others.pop(0)
    over = {peer.engine: _over(ours.cpu_seconds, peer.cpu_seconds) for peer in others} if ours else {}
    compared = [side for side in (ours, *others) if side is not None]
    return Result(
        row=name,
        ours=ours,
        refused=refused,
        peers=tuple(others),
        single=single,
        absent=absent,
        over_peers=over,
        verdicts=() if ours is None else verdicts(row.target, ours, others, over),
        max_loss_difference=max((loss_difference(s.losses, single.losses) for s in compared), default=0.0),
    )


def _over(above: Sequence[float], below: Sequence[float]) -> tuple[float, float, float]:
    """A ratio of medians and its interval."""
    return (median(above) / median(below), *ratio_interval(above, below))


def measured_side(
    side: Side, reports: Sequence[Reports], look: dict[str, tuple[Counted, ...]], base: Sequence[float]
) -> Measured:
    """From every process's reports of warm-up and turns, and from its looks."""
    turns: Any = reports[1:]
    cpu = tuple(map(cpu_seconds, turns))
    ratio, low, high = _over(cpu, base)
    payload: dict[str, tuple[int, int]] = {}
    for report in look["payload"]:
        for name, times, size in report.payload:
            before = payload.get(name, (0, 0))
            payload[name] = before[0] + times, before[1] + size
    return Measured(
        engine=side.engine,
        what=str(side),
        world_size=side.world_size,
        cpu_seconds=cpu,
        other_seconds=tuple(sum(r.other_seconds for r in each) / each[0].count for each in turns),
        wall_seconds=tuple(max(r.wall_seconds for r in each) / each[0].count for each in turns),
        over_single=ratio,
        over_single_interval=(low, high),
        sent_bytes=round(median(sum(r.sent_bytes for r in each) / each[0].count for each in turns)),
        loopback_bytes=round(min(max(r.loopback_bytes for r in each) / each[0].count for each in turns)),
        payload=payload,
        peak_bytes_by_rank=tuple(peak for report in look["memory"] for peak in report.peak_bytes),
        resident_bytes_by_rank=tuple(report.resident_bytes for report in look["resident"]),
        losses=tuple(
            loss
            for each in (*reports, *look.values())
            for loss in each[-1].losses  # a last stage knows it
        ),
    )


def verdicts(
    target: Target, ours: Measured, peers: Sequence[Measured], over: dict[str, tuple[float, float, float]]
) -> tuple[Verdict, ...]:
    """Each target that a row has and whose peer was measured."""
    by_engine, made = {peer.engine: peer for peer in peers}, []
    if target.single is not None:
        made.append(
            _judged("CPU / single", ours.over_single, target.single, interval=ours.over_single_interval)
        )
    if target.peer is not None and target.peer[0] in over:
        value, low, high = over[target.peer[0]]
        made.append(_judged(f"CPU / {target.peer[0]}", value, target.peer[1], interval=(low, high)))
    if target.payload_bytes is not None:
        made.append(_judged("payload MB", ours.payload_bytes / MB, target.payload_bytes / MB))
    if target.memory is not None and target.memory[0] in by_engine:
        theirs = max(by_engine[target.memory[0]].peak_bytes_by_rank)
        value = max(ours.peak_bytes_by_rank) / theirs
        made.append(_judged(f"live / {target.memory[0]}", value, target.memory[1]))
    return tuple(made)


def _judged(what: str, value: float, bound: float, *, interval: tuple[float, float] | None = None) -> Verdict:
    """Of a value with an interval; a count has none. Open: the bound is inside the interval."""
    low, high = interval or (value, value)
    verdict = "met" if high <= bound else "missed" if low > bound else "open"
    return Verdict(target=what, value=value, bound=bound, verdict=verdict)


HEADINGS = (
    "row",
    "side",
    "CPU ms/step",
    "/ single",
    "95 %",
    "ours / it",
    "95 %",
    "gloo ms",
    "payload MB",
    "sent MB",
    "lo MB",
    "live MB",
    "RSS + MB",
)


def _lines(result: Result) -> list[tuple[str, ...]]:
    sides = [side for side in (result.ours, *result.peers, result.single) if side is not None]
    lines = []
    for side in sides:
        over = result.over_peers.get(side.engine) if side is not result.ours else None
        low, high = side.over_single_interval
        lines.append(
            (
                result.row,
                "ours" if side is result.ours else "single" if side is result.single else side.engine,
                f"{median(side.cpu_seconds) * 1e3:.1f}",
                f"{side.over_single:.3f}",
                f"{low:.3f}-{high:.3f}",
                "-" if over is None else f"{over[0]:.3f}",
                "-" if over is None else f"{over[1]:.3f}-{over[2]:.3f}",
                f"{median(side.other_seconds) * 1e3:.1f}",
                f"{side.payload_bytes / MB:.2f}",
                f"{side.sent_bytes / MB:.2f}",
                f"{side.loopback_bytes / MB:.2f}",
                f"{max(side.peak_bytes_by_rank) / MB:.2f}",
                f"{max(side.resident_bytes_by_rank) / MB:.0f}",
            )
        )
    return lines


def _remarks(result: Result) -> list[str]:
    """What stands below the table of a row: targets, what did not run, how far losses were apart."""
    said = [
        f"{result.row}: {v.target} {v.value:.3f}, target {v.bound:g}: {v.verdict}" for v in result.verdicts
    ]
    if result.refused is not None:
        said.append(f"{result.row}: ours not runnable: {result.refused}")
    hints = {"deepspeed": "give --deepspeed", "original": "give --original PATH"}
    said += [f"{result.row}: {engine} not measured: {hints[engine]}" for engine in result.absent]
    return [*said, f"{result.row}: losses differ by at most {result.max_loss_difference:.1e}"]


def profile_row(name: str, case: Case, options: argparse.Namespace) -> str:
    """Where CPU time goes on every side of a row."""
    row = row_of(name, options)
    peers, _ = present(row, options)
    if reason := refusal(case, row.ours):
        raise SystemExit(f"{name}: ours not runnable: {reason}")
    found: dict[str, Profile] = {}
    for side in (row.ours, *peers, SINGLE):
        label = "ours" if side is row.ours else "single" if side is SINGLE else side.engine
        with rank_team(case, side, options.original) as team:
            team.obey(Look(2, what="resident"))  # warm-up
            reports = team.obey(Look(options.steps_per_round, what="profile"))
        found[label] = summed([report.profile for report in reports])
    single = found.pop("single")
    return f"{name}: {row}\n{table(found, single)}"


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What was asked for; exits where it cannot be had."""
    made = parser(__doc__, CASES, ROWS, steps=2)
    made.set_defaults(rounds=11)
    made.add_argument("--deepspeed", action="store_true", help="measure DeepSpeed too (row zero3)")
    made.add_argument(
        "--original", type=Path, metavar="PATH", help="a checkout of huggingface/picotron (row dp2-pp2-tp2)"
    )
    made.add_argument(
        "--sockets",
        action="store_true",
        help="send through sockets, though processes share this host's memory",
    )
    made.add_argument("--profile", choices=ROWS, metavar="ROW", help="only tell where a row's CPU time goes")
    options = made.parse_args(arguments)
    if options.deepspeed and find_spec("deepspeed") is None:
        made.error(ABSENT)
    if options.original is not None and not (options.original / "picotron" / "model.py").is_file():
        made.error(f"--original must be a checkout of huggingface/picotron, got {options.original}")
    return options


def main() -> None:
    """Measure the rows asked for, print the table and the targets, write the JSON; or profile one row."""
    options = options_of()
    case = CASES[options.model]
    if options.profile is not None:
        print(profile_row(options.profile, case, options))
        return
    results: list[Result] = []
    for name in options.rows:
        say(f"{name}: {row_of(name, options)}")
        started = time.perf_counter()
        results.append(measure(name, case, options))
        say(aligned([HEADINGS, *_lines(results[-1])]))
        for line in _remarks(results[-1]):
            say(f"  {line}")
        say(f"  ({time.perf_counter() - started:.0f} s)")
    print(aligned([HEADINGS, *(line for result in results for line in _lines(result))]))
    for result in results:
        for line in _remarks(result):
            print(line)
    write_report(options, case, results)


if __name__ == "__main__":
    main()
