"""How near the closed forms of pipeline bubbles are to the schedules themselves.

Over ranks, stages a rank, microbatches and ratios of F, I and W on equal stages: the relative error of the
seconds of a step by ``bubble_seconds`` against when the last action of the real schedule ends.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from attrs import asdict, frozen

from picotron.planner.bubbles import bubble_seconds
from picotron.planner.cases import SCHEDULE_NAMES
from picotron.planner.catalogue import SCHEDULES, make_schedule
from picotron.planner.schedule_times import PipelineCosts, schedule_times

RANKS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16)
STAGES = (2, 3, 4)
RATIOS = ((1.0, 1.0, 1.0), (1.0, 1.1, 0.7), (1.0, 1.5, 0.9), (1.0, 2.1, 0.8), (1.0, 0.9, 0.3))
QUICK_RANKS = (2, 4, 6)


@frozen(kw_only=True)
class Row:
    """One schedule of one size, its seconds and those of the closed form, with F of a rank a second."""

    schedule: str
    ranks: int
    stages: int
    microbatches: int
    ratio: tuple[float, float, float]
    seconds: float
    estimated: float

    @property
    def error(self) -> float:
        """Relative, positive where the closed form is longer."""
        return self.estimated / self.seconds - 1.0


def some_microbatches(ranks: int) -> tuple[int, ...]:
    """From 1 to 4p: all up to 2p + 2 where ranks are few, else a dozen of them, and three beyond."""
    few = range(1, 2 * ranks + 3)
    step = max(1, len(few) // 12)
    return tuple(
        sorted({*few[::step], ranks - 1, ranks, 2 * ranks, 3 * ranks, 3 * ranks + 1, 4 * ranks} - {0})
    )


def rows(names: Sequence[str], ranks: Sequence[int]) -> Iterator[Row]:
    """Every size of every schedule."""
    for name in names:
        known = SCHEDULES[name].virtual_stages
        for p in ranks:
            for v in STAGES if known == "any" else (known,):
                for m in some_microbatches(p):
                    made = make_schedule(name, p, m, v)
                    for ratio in RATIOS:
                        costs = [tuple([one / v] * made.num_stages) for one in ratio]
                        spans = schedule_times(
                            made,
                            PipelineCosts(
                                forward_seconds=costs[0], input_seconds=costs[1], weight_seconds=costs[2]
                            ),
                        )
                        f, i, w = (np.asarray(one) for one in ratio)
                        sizes = (np.asarray(float(size)) for size in (p, v, m))
                        idle = bubble_seconds(name, *sizes, f, i, w)
                        yield Row(
                            schedule=name,
                            ranks=p,
                            stages=v,
                            microbatches=m,
                            ratio=ratio,
                            seconds=spans.makespan_seconds,
                            estimated=m * sum(ratio) + float(idle),
                        )


def main() -> None:
    """Print the worst and the median error of each schedule."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schedule", action="append", choices=SCHEDULE_NAMES, help="only this one")
    parser.add_argument("--quick", action="store_true", help="a few ranks")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every row")
    arguments = parser.parse_args()
    found = list(rows(arguments.schedule or SCHEDULE_NAMES, QUICK_RANKS if arguments.quick else RANKS))
    print(f"{'schedule':<16}{'sizes':>7}{'median':>9}{'least':>9}{'most':>9}   where the greatest error is")
    for name in arguments.schedule or SCHEDULE_NAMES:
        own = [row for row in found if row.schedule == name]
        error = np.array([row.error for row in own])
        worst = own[int(np.abs(error).argmax())]
        print(
            f"{name:<16}{len(own):>7}{np.median(np.abs(error)):>9.2%}{error.min():>9.2%}{error.max():>9.2%}"
            f"   p={worst.ranks} v={worst.stages} m={worst.microbatches} F:I:W={worst.ratio}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in found]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
