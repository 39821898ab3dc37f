"""The optimiser on the zero-bubble papers' profiles, beside the rates that their schedulers reach.

Profiles (milliseconds of F, I and W of a stage, and of a hop) and microbatch counts are those of Qi et al.
2023, arXiv:2401.10241, section 5. A stage holds 2 units of a microbatch from F to I and 1 until W, and a rank
may hold what p or 2p microbatches hold (their ZB-1p and ZB-2p). ``published`` is the rate that the authors'
released scheduler gives for the profile: 1 - work / longest own span. In the V rows (their ZBV) a rank holds
two such stages, up the ranks and back, and p microbatches.

    python benchmarks/optimise.py                 # every row: half a minute
    python benchmarks/optimise.py --quick         # p = 8 and the fewest microbatches
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from attrs import asdict, frozen

from picotron.planner.optimise import EFFORT, OptimisedSchedule, optimise
from picotron.planner.schedule_memory import unit_memory
from picotron.planner.schedule_times import PipelineCosts, unit_costs


@frozen
class Profile:
    name: str
    f: float
    i: float
    w: float
    hop: float
    ranks: int


PROFILES = (
    Profile("1.5B", 18.522, 18.086, 9.337, 0.601, 8),
    Profile("6.2B", 29.718, 29.444, 19.927, 0.527, 8),
    Profile("14.6B", 11.347, 11.248, 8.132, 0.377, 16),
    Profile("28.3B", 10.419, 10.21, 7.843, 0.408, 32),
)
EQUAL = Profile("equal", 1.0, 1.0, 1.0, 0.0, 8)
PUBLISHED = {  # profile -> [(microbatches, rate at p, rate at 2p)]
    "1.5B": [(24, 0.1585, 0.0433), (32, 0.1238, 0.0036), (64, 0.0660, 0.0018)],
    "6.2B": [(24, 0.1323, 0.0029), (32, 0.1026, 0.0022), (64, 0.0541, 0.0011)],
    "14.6B": [(48, 0.1397, 0.0066), (64, 0.1086, 0.0050), (128, 0.0574, 0.0025)],
    "28.3B": [(96, 0.1405, 0.0038), (128, 0.1092, 0.0028), (256, 0.0578, 0.0014)],
}
PUBLISHED_V = {"1.5B": [(24, 0.0605), (64, 0.0236)], "equal": [(24, 0.0), (64, 0.0)]}


@frozen
class Case:
    profile: Profile
    microbatches: int
    limit: int  # microbatches of a rank
    published: float
    v: bool = False

    @property
    def costs(self) -> PipelineCosts:
        p = self.profile
        return unit_costs(p.ranks * (2 if self.v else 1), f=p.f, i=p.i, w=p.w, transfer=p.hop)

    def optimised(self, objective: str, effort: int) -> OptimisedSchedule:
        stages = self.costs.num_stages
        whole = 2 * stages // self.profile.ranks  # units of a microbatch on all stages of a rank
        return optimise(
            self.costs,
            self.profile.ranks,
            self.microbatches,
            memory=unit_memory(stages, activation=2, weight=1),
            memory_limit_bytes=self.limit * whole,
            placement="v" if self.v else "one",
            objective=objective,
            effort=effort,
        )


@frozen
class Row:
    profile: str
    ranks: int
    microbatches: int
    limit: int
    placement: str
    published: float
    stage_span: float
    stage_span_bound: float
    stage_span_source: str
    stage_span_cpu_seconds: float
    bubble: float
    bubble_bound: float
    gap: float
    bubble_source: str
    bubble_cpu_seconds: float


def cases(quick: bool) -> Iterator[Case]:
    for profile in PROFILES:
        if quick and profile.ranks > 8:
            continue
        for microbatches, one, two in PUBLISHED[profile.name][: 1 if quick else None]:
            yield Case(profile, microbatches, profile.ranks, one)
            yield Case(profile, microbatches, 2 * profile.ranks, two)
    for profile in (PROFILES[0], EQUAL):
        for microbatches, rate in PUBLISHED_V[profile.name][: 1 if quick else None]:
            yield Case(profile, microbatches, profile.ranks, rate, v=True)


def measure(case: Case, effort: int) -> Row:
    found, took = {}, {}
    for objective in ("stage_span", "makespan"):
        start = time.process_time()
        found[objective] = case.optimised(objective, effort)
        took[objective] = time.process_time() - start
    span, makespan = found["stage_span"], found["makespan"]
    p = case.profile
    work = case.microbatches * (p.f + p.i + p.w) * (2 if case.v else 1)
    return Row(
        profile=p.name,
        ranks=p.ranks,
        microbatches=case.microbatches,
        limit=case.limit,
        placement="v" if case.v else "one",
        published=case.published,
        stage_span=span.stage_span_fraction,
        stage_span_bound=1 - work / span.stage_span_bound_seconds,
        stage_span_source=span.source,
        stage_span_cpu_seconds=took["stage_span"],
        bubble=makespan.bubble_fraction,
        bubble_bound=1 - work / makespan.lower_bound_seconds,
        gap=makespan.gap,
        bubble_source=makespan.source,
        bubble_cpu_seconds=took["makespan"],
    )


HEADER = (
    "| profile | p, m | limit | published | ours (bound) | CPU s "
    "| bubble of makespan (bound) | gap | CPU s |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def line(row: Row) -> str:
    verdict = "" if row.stage_span <= row.published + 5e-5 else " worse"
    limit = f"{row.limit}{' (V)' if row.placement == 'v' else ''}"
    return (
        f"| {row.profile} | {row.ranks}, {row.microbatches} | {limit} | {row.published:.4f} "
        f"| {row.stage_span:.4f} ({row.stage_span_bound:.4f}){verdict} | {row.stage_span_cpu_seconds:.2f} "
        f"| {row.bubble:.4f} ({row.bubble_bound:.4f}) | {row.gap:.4f} | {row.bubble_cpu_seconds:.2f} |"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="p = 8 and the fewest microbatches")
    parser.add_argument("--effort", type=int, default=EFFORT, help="of each question, in simulated actions")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    options = parser.parse_args(arguments)
    print(HEADER)
    rows = []
    for case in cases(options.quick):
        rows.append(measure(case, options.effort))
        print(line(rows[-1]), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
