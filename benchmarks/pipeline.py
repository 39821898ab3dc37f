"""Picotron's runtime beside PyTorch's own pipeline runtime, both walking one and the same schedule.

Each row is a schedule, on 4 processes a side over gloo. Picotron's side runs the plan; PyTorch's is a Llama
of stock modules cut into the plan's stages, which ``torch.distributed.pipelining`` runs in the order that it
reads from the plan's schedule as text. Both take turns as in train_step.py; what counts is the CPU time of
all processes of a side. See README.md beside this file.
"""

from __future__ import annotations

import time
from statistics import median

from attrs import evolve, frozen
from teams import (
    WORKLOAD_W,
    Case,
    Command,
    Side,
    aligned,
    count,
    make_plan,
    parser,
    say,
    side_team,
    take_turns,
    write_report,
)
from train_step import Result, compared, measured_side

from picotron.errors import PlanError
from picotron.runtime.run import check_runnable

CASES = {
    "W": WORKLOAD_W,
    "tiny": Case(hidden=32, layers=8, heads=4, intermediate=48, seq_len=16),
}
TARGET = 1.0  # tokens a CPU second, over PyTorch's
ROWS: dict[str, dict[str, object]] = {
    "1f1b": {},
    "interleaved": {"virtual_stages": 2},
    "zb-h1": {},
    "zb-v": {},
    "dualpipe-v": {},
    "v-half": {},
    "dualpipe": {},
}


@frozen(kw_only=True)
class Refused:
    """A row that cannot be run, and why."""

    row: str
    refused: str


def sides(name: str, num_ranks: int) -> tuple[Side, Side]:
    """Ours and PyTorch's, of the same schedule."""
    parallel = {"pp": num_ranks, "micro_batch": 1, "schedule": name, **ROWS[name]}
    return Side("gloo", parallel), Side("torch-pipeline", parallel)


def refusal(name: str, case: Case, ours: Side) -> Refused | None:
    """Why the plan of a row cannot be made or run, if so."""
    try:
        check_runnable(make_plan(case, ours), "gloo")
    except PlanError as error:
        return Refused(row=name, refused=str(error))
    return None


def measure(name: str, case: Case, both: tuple[Side, Side], *, rounds: int, steps: int) -> Result:
    """Both sides of a row by turns, then a step of each whose memory is measured."""
    with side_team(case, both[0]) as ours, side_team(case, both[1]) as peer:
        taken = take_turns((ours, peer), rounds=rounds, steps=steps)
        last = [each.obey(Command(1, measured=True)) for each in (ours, peer)]
    tokens = case.global_batch * case.seq_len
    measured = [
        measured_side(side, [*reports, end], tokens)
        for side, reports, end in zip(both, taken, last, strict=True)
    ]
    return compared(name, *measured)


def verdict(result: Result) -> str:
    """Whether the whole interval of the speed reaches the target or stays below; "open" where neither."""
    low, high = result.speed_interval
    return "met" if low >= TARGET else "missed" if high < TARGET else "open"


HEADINGS = (
    "schedule",
    "CPU ms/step",
    "torch's",
    "tokens/CPU s",
    "torch's",
    "speed",
    "95 %",
    "target",
    "verdict",
    "MB/rank",
    "torch's",
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
        f"{TARGET:g}",
        verdict(result),
        f"{max(ours.peak_bytes_by_rank) / 1e6:.2f}",
        f"{max(peer.peak_bytes_by_rank) / 1e6:.2f}",
        f"{result.memory:.3f}",
        f"{result.max_loss_difference:.1e}",
    )


def main() -> None:
    """Measure the rows asked for, print the table and what was refused, write the JSON."""
    options = parser(__doc__, CASES, ROWS, steps=2)
    options.add_argument("--ranks", type=count, default=4, help="processes a side (default: %(default)s)")
    options.add_argument(
        "--microbatches", type=count, default=8, help="samples of a step, one each (default: %(default)s)"
    )
    arguments = options.parse_args()
    case = evolve(CASES[arguments.model], global_batch=arguments.microbatches)
    results: list[Result | Refused] = []
    for name in arguments.rows:
        both = sides(name, arguments.ranks)
        say(f"{name}: {both[0]} against {both[1]}")
        refused = refusal(name, case, both[0])
        if refused is not None:
            say(f"  refused: {refused.refused}")
            results.append(refused)
            continue
        started = time.perf_counter()
        result = measure(name, case, both, rounds=arguments.rounds, steps=arguments.steps_per_round)
        spent = time.perf_counter() - started
        say(f"  speed {result.speed:.3f}, memory {result.memory:.3f} ({spent:.0f} s)")
        results.append(result)
    print(aligned([HEADINGS, *(_cells(result) for result in results if isinstance(result, Result))]))
    for result in results:
        if isinstance(result, Refused):
            print(f"{result.row}: refused: {result.refused}")
    write_report(arguments, case, results)


if __name__ == "__main__":
    main()
