"""How fast a search covers its space, and how good what it finds is, beside Calculon's exhaustive search.

Alone it times two whole spaces. With ``--calculon PATH`` (a checkout of calculon-ai/calculon, imported from
there) it gives both the same choices for GPT-3 175B on 4,096 A100s: tensor, pipeline and data parallelism,
microbatch, interleaved stages, recomputation, sharded optimizer, sequence parallelism and overlaps. Calculon
evaluates a random sample, to tell its rate, and with ``--sweep`` every layout with its quickest details, to
tell its best. Then each prices the other's best plan. CPU time throughout.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from attrs import asdict, evolve, frozen

from picotron.planner.candidates import Plans, in_words, rows_of
from picotron.planner.cases import RECOMPUTES, SCHEDULE_NAMES
from picotron.planner.cluster import ClusterSpec
from picotron.planner.model import ModelSpec
from picotron.planner.search import search
from picotron.planner.search_result import SearchResult
from picotron.planner.software import software_profile
from picotron.planner.workload import Workload

SPACES: dict[str, tuple[str, str, int, int, str]] = {
    "llama-3.1-405b on 16,384 H100s": ("llama-3.1-405b", "h100:2048x8", 2048, 8192, "megatron-2025"),
    "gpt3-175b on 4,096 A100s": ("gpt3-175b", "a100-80gb:512x8", 1536, 2048, "megatron-2021"),
}
QUICK = {"llama-3.1-8b on 8 H100s": ("llama-3.1-8b", "h100:1x8", 32, 4096, "picotron")}
SAME_CHOICES: dict[str, Any] = {
    "cp": 1,
    "schedule": ("1f1b", "interleaved"),
    "zero_stage": (0, 1),
    "shard": "all",
    "recompute_layers": 1.0,
    "offload": 0,
    "ends": 0,
    "order": ("pp", "dp", "cp", "tp"),
}
CALCULONS_RECOMPUTE = {"none": "none", "selective": "attn_only", "full": "full"}
KEPT = 60
TARGET = 300  # times Calculon's configurations a second
OVERLAPS = (0.0, 0.3, 0.6)  # shares of tensor-parallel transfers that are hidden


@frozen(kw_only=True)
class Timed:
    """One space: CPU seconds of each round, and what was covered."""

    space: str
    seconds: tuple[float, ...]
    candidates: int
    evaluated: int
    candidates_per_second: float
    best: str
    best_seconds: float


@frozen(kw_only=True)
class Beside:
    """Both searches over the same choices. ``by_``: whose estimate of the seconds of a step it is."""

    our_candidates: int
    our_seconds: float
    our_rate: float
    our_evaluated_rate: float
    calculon_rate: float
    times_faster: float
    calculon_evaluated: int
    our_best: str
    calculon_best: str
    our_best_by_calculon: float
    calculon_best_by_calculon: float
    ties: int  # plans that our prediction cannot tell from our best, and that Calculon can express
    agreed: str  # of those, the one that Calculon prefers
    agreed_by_calculon: float
    agreed_by_ours: float
    front: int  # plans of our Pareto front that Calculon can express
    on_front: str  # of those, the one that Calculon prefers
    on_front_by_calculon: float
    on_front_by_ours: float
    our_best_by_ours: float
    calculon_best_by_ours: float


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


def timed(work: Callable[[], SearchResult], rounds: int) -> tuple[SearchResult, tuple[float, ...]]:
    """The result, and the CPU seconds of each round after a first one that loads the tables."""
    result, seconds = work(), []
    for _ in range(rounds):
        start = time.process_time()
        result = work()
        seconds.append(time.process_time() - start)
    return result, tuple(seconds)


def alone(name: str, request: tuple[str, str, int, int, str], rounds: int) -> Timed:
    """One whole space."""
    model, cluster, batch, seq_len, profile = request
    spec, machine = ModelSpec.from_hf(model), ClusterSpec.parse(cluster)
    work = Workload(global_batch=batch, seq_len=seq_len)
    result, seconds = timed(lambda: search(spec, machine, work, profile=profile), rounds)
    counts = result.counts
    return Timed(
        space=name,
        seconds=seconds,
        candidates=counts.candidates,
        evaluated=counts.evaluated,
        candidates_per_second=counts.covered / median(seconds),
        best=in_words(result.fastest.row(0)),
        best_seconds=float(result.fastest.seconds[0]),
    )


class Calculon:
    """The other side: one estimate at a time, of executions written as it reads them."""

    def __init__(self, path: Path, devices: int, batch: int) -> None:
        sys.path.insert(0, str(path))
        stub = types.ModuleType("psutil")
        stub.cpu_count = lambda logical=False: 1  # type: ignore[attr-defined]
        sys.modules.setdefault("psutil", stub)  # neither has a part in an estimate
        sys.modules.setdefault("pandas", types.ModuleType("pandas"))
        from calculon.llm.llm import Llm
        from calculon.system import System

        self.llm, self.devices, self.batch = Llm, devices, batch
        self.app = Llm.Application(json.loads((path / "models" / "gpt3-175B.json").read_text()))
        self.system = System(json.loads((path / "systems" / "a100_80g.json").read_text()))
        self.log = logging.Logger("calculon")
        self.evaluated, self.seconds = 0, 0.0

    def price(self, execution: Mapping[str, Any]) -> float:
        """Seconds of a step, or infinity where it refuses or does not fit."""
        start = time.process_time()
        self.evaluated += 1
        try:
            model = self.llm(self.app, self.log)
            model.compile(self.system, self.llm.Execution.from_json(dict(execution)))
            model.run(self.system)
            found = float(model.get_total_time())
        except self.llm.Error:
            found = float("inf")
        self.seconds += time.process_time() - start
        return found

    def layouts(self) -> Iterator[dict[str, Any]]:
        """Degrees, stages, microbatch, recomputation and sharding that it takes."""
        llm, app = self.llm, self.app
        for tp in llm.get_all_tensor_parallelisms(self.devices, app.hidden, app.attn_heads):
            for pp in llm.get_all_pipeline_parallelisms(self.devices, tp, app.num_blocks):
                dp = llm.get_data_parallelism(self.devices, tp, pp)
                if self.batch % dp:
                    continue
                stages = list(llm.get_valid_pipeline_interleavings(app.num_blocks, pp))
                sizes = list(llm.get_valid_microbatch_sizes(app.seq_size, tp, dp, self.batch, pp))
                sharded = [True, False] if dp > 1 else [False]
                for v, recompute, shard, size in product(
                    stages, CALCULONS_RECOMPUTE.values(), sharded, sizes
                ):
                    yield {
                        "tensor_par": tp,
                        "pipeline_par": pp,
                        "data_par": dp,
                        "pipeline_interleaving": v,
                        "activation_recompute": recompute,
                        "optimizer_sharding": shard,
                        "microbatch_size": size,
                    }

    def details(self, layout: Mapping[str, Any], *, quickest: bool) -> Iterator[dict[str, Any]]:
        """The layout with every communication type, overlap and network, or those quickest as a rule."""
        tp, pp, dp = (layout[f"{name}_par"] for name in ("tensor", "pipeline", "data"))
        nets = range(self.system.num_networks)
        types_ = ("rs_ag",) if quickest and tp > 1 else ("ar", "p2p_rs_ag", "rs_ag")
        overlaps = ("ring",) if quickest and tp > 1 else ("none", "ring", "pipe") if tp > 1 else ("none",)
        for kind in types_:
            redo = self.llm.can_redo_ag(kind, layout["activation_recompute"])
            for again, hidden, overlap, tn, pn, dn in product(
                (True, False) if redo else (False,),
                ((True,) if quickest else (True, False)) if dp > 1 else (False,),
                overlaps,
                ((0 if tp <= 8 else 1,) if quickest else nets) if tp > 1 else (0,),
                ((0 if tp * pp <= 8 else 1,) if quickest else nets) if pp > 1 else (0,),
                ((0 if tp * pp * dp <= 8 else 1,) if quickest else nets) if dp > 1 else (0,),
            ):
                yield {
                    **layout,
                    "num_procs": self.devices,
                    "batch_size": self.batch,
                    "datatype": "float16",
                    "fused_activation": True,
                    "attention_type": "multihead",
                    "tensor_par_comm_type": kind,
                    "seq_par_ag_redo": again,
                    "data_par_overlap": hidden,
                    "tensor_par_overlap": overlap,
                    "tensor_par_net": tn,
                    "pipeline_par_net": pn,
                    "data_par_net": dn,
                    "weight_offload": False,
                    "activations_offload": False,
                    "optimizer_offload": False,
                    "training": True,
                }

    def best(self, executions: Iterator[dict[str, Any]]) -> tuple[float, dict[str, Any]]:
        """The quickest of some executions."""
        found: tuple[float, dict[str, Any]] = (float("inf"), {})
        for execution in executions:
            seconds = self.price(execution)
            if seconds < found[0]:
                found = (seconds, execution)
        return found


def as_layout(row: Mapping[str, float]) -> dict[str, Any]:
    """One of our candidates as Calculon writes it."""
    return {
        "tensor_par": int(row["tp"]),
        "pipeline_par": int(row["pp"]),
        "data_par": int(row["dp"]),
        "pipeline_interleaving": int(row["virtual_stages"]),
        "activation_recompute": CALCULONS_RECOMPUTE[RECOMPUTES[int(row["recompute"])]],
        "optimizer_sharding": bool(row["zero_stage"]),
        "microbatch_size": int(row["micro_batch"]),
    }


def as_row(execution: Mapping[str, Any]) -> dict[str, float]:
    """One of Calculon's executions as a candidate of ours."""
    recompute = next(
        n for n, theirs in CALCULONS_RECOMPUTE.items() if theirs == execution["activation_recompute"]
    )
    stages = execution["pipeline_interleaving"]
    return {
        **dict.fromkeys(("cp", "ep", "etp"), 1),
        **dict.fromkeys(("offload", "ends", "order"), 0),
        "tp": execution["tensor_par"],
        "pp": execution["pipeline_par"],
        "dp": execution["data_par"],
        "virtual_stages": stages,
        "schedule": SCHEDULE_NAMES.index("interleaved" if stages > 1 else "1f1b"),
        "micro_batch": execution["microbatch_size"],
        "zero_stage": int(execution["optimizer_sharding"]),
        "shard": execution["data_par"] if execution["optimizer_sharding"] else 1,
        "sequence_parallel": int(
            execution["tensor_par"] > 1 and execution["tensor_par_comm_type"] == "rs_ag"
        ),
        "recompute": RECOMPUTES.index(recompute),
        "recompute_layers": float(recompute != "none"),
    }


def sampled(calculon: Calculon, count: int, seed: int) -> tuple[float, dict[str, Any]]:
    """The quickest of a random sample of all executions."""
    chance = random.Random(seed)
    layouts = list(calculon.layouts())
    picked = (
        chance.choice(list(calculon.details(chance.choice(layouts), quickest=False))) for _ in range(count)
    )
    return calculon.best(picked)


def expressible(calculon: Calculon, plans: Plans) -> list[Mapping[str, float]]:
    """Those plans whose stages Calculon can cut: it takes equal ones alone."""
    rows = [plans.row(index) for index in range(len(plans))]
    return [row for row in rows if calculon.app.num_blocks % (row["pp"] * row["virtual_stages"]) == 0]


def preferred(calculon: Calculon, rows: list[Mapping[str, float]]) -> tuple[float, Mapping[str, float]]:
    """Calculon's favourite of some plans, with the details that suit each, and its seconds."""
    seconds = [calculon.best(calculon.details(as_layout(row), quickest=False))[0] for row in rows]
    index = min(range(len(rows)), key=lambda index: (seconds[index], index))
    return seconds[index], rows[index]


def verdict(both: Beside) -> list[str]:
    """In words, whether what we found is as good by Calculon's estimate, and by ours."""
    best = both.calculon_best_by_calculon
    lines = []
    for whose, seconds in (
        ("our single best", both.our_best_by_calculon),
        (f"the best of our {both.ties} ties", both.agreed_by_calculon),
        (f"the best of our front of {both.front}", both.on_front_by_calculon),
    ):
        met = "at least as good as" if seconds <= best else f"missed, {seconds / best - 1:.1%} slower than"
        lines.append(f"by Calculon's estimate {whose} is {met} its own best: {seconds:.3f} and {best:.3f} s")
    ours, theirs = both.our_best_by_ours, both.calculon_best_by_ours
    met = "at least as good as" if ours <= theirs else "missed, slower than"
    lines.append(f"by our estimate our single best is {met} Calculon's best: {ours:.3f} and {theirs:.3f} s")
    return lines


def beside(path: Path, *, rounds: int, sample: int, sweep: bool, seed: int) -> Beside:
    """Both over the same choices; ours once with each combination of overlaps, which no layout chooses."""
    model, cluster, batch, seq_len, profile = SPACES["gpt3-175b on 4,096 A100s"]
    spec, machine = ModelSpec.from_hf(model), ClusterSpec.parse(cluster)
    work, software = Workload(global_batch=batch, seq_len=seq_len), software_profile(profile)
    profiles = [
        evolve(software, tensor_overlap=tensor, reduce_overlap=data, gather_overlap=data)
        for tensor, data in product(OVERLAPS, (False, True))
    ]
    found = [
        timed(lambda p=p: search(spec, machine, work, profile=p, keep=KEPT, **SAME_CHOICES), rounds)
        for p in profiles
    ]
    results = [result for result, _ in found]
    ours = min(results, key=lambda result: float(result.fastest.seconds[0]))
    seconds = sum(median(times) for _, times in found)
    covered = sum(result.counts.covered for result in results)
    evaluated = sum(result.counts.evaluated for result in results)

    calculon = Calculon(path, machine.num_devices, batch)
    say(f"Calculon evaluates a sample of {sample}")
    best = sampled(calculon, sample, seed)
    rate = calculon.evaluated / calculon.seconds
    if sweep:
        say("Calculon sweeps all layouts with the quickest details")
        swept = (e for layout in calculon.layouts() for e in calculon.details(layout, quickest=True))
        best = min(best, calculon.best(swept), key=lambda pair: pair[0])
    best = min(
        best, calculon.best(calculon.details(_layout_of(best[1]), quickest=False)), key=lambda pair: pair[0]
    )
    first = expressible(calculon, ours.fastest)[:1]
    ties, front = expressible(calculon, ours.ties) or first, expressible(calculon, ours.pareto) or first
    single, agreed, on_front = (preferred(calculon, rows) for rows in (first, ties, front))

    def by_ours(row: Mapping[str, float]) -> float:
        return float(ours.prices.seconds(rows_of([row])).step_seconds[0])

    return Beside(
        our_candidates=covered,
        our_seconds=seconds,
        our_rate=covered / seconds,
        our_evaluated_rate=evaluated / seconds,
        calculon_rate=rate,
        times_faster=covered / seconds / rate,
        calculon_evaluated=calculon.evaluated,
        our_best=in_words(single[1]),
        calculon_best=in_words(as_row(best[1])),
        our_best_by_calculon=single[0],
        calculon_best_by_calculon=best[0],
        ties=len(ties),
        agreed=in_words(agreed[1]),
        agreed_by_calculon=agreed[0],
        agreed_by_ours=by_ours(agreed[1]),
        front=len(front),
        on_front=in_words(on_front[1]),
        on_front_by_calculon=on_front[0],
        on_front_by_ours=by_ours(on_front[1]),
        our_best_by_ours=by_ours(single[1]),
        calculon_best_by_ours=by_ours(as_row(best[1])),
    )


def _layout_of(execution: Mapping[str, Any]) -> dict[str, Any]:
    return {name: execution[name] for name in as_layout(dict.fromkeys(as_row(execution), 1))}


def main() -> None:
    """Run what is asked for and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one small space: does it run at all?")
    parser.add_argument("--calculon", type=Path, metavar="PATH", help="a checkout of calculon-ai/calculon")
    parser.add_argument("--sample", type=int, default=2000, help="executions that Calculon evaluates")
    parser.add_argument("--sweep", action="store_true", help="Calculon also sweeps every layout (a minute)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if arguments.rounds < 1 or arguments.sample < 1:
        parser.error(f"rounds and sample must be at least 1, got {arguments.rounds} and {arguments.sample}")
    if arguments.calculon and not (arguments.calculon / "calculon" / "llm").is_dir():
        parser.error(f"--calculon must be a checkout with a folder calculon/llm, got {arguments.calculon}")
    spaces = QUICK if arguments.quick else SPACES
    rows = [alone(name, request, arguments.rounds) for name, request in spaces.items()]
    for row in rows:
        print(
            f"{row.space}: {median(row.seconds):.2f} s of CPU "
            f"({min(row.seconds):.2f} to {max(row.seconds):.2f}), "
            f"{row.candidates:,} candidates covered, {row.evaluated:,} evaluated: "
            f"{row.candidates_per_second:,.0f} a second; best {row.best_seconds:.3f} s: {row.best}"
        )
    report: dict[str, Any] = {"spaces": [asdict(row) for row in rows]}
    if arguments.calculon:
        options = {"rounds": arguments.rounds, "sample": arguments.sample, "sweep": arguments.sweep}
        both = beside(arguments.calculon.resolve(), seed=arguments.seed, **options)
        report["calculon"] = asdict(both)
        print(
            f"same choices: ours {both.our_candidates:,} in {both.our_seconds:.2f} s, "
            f"{both.our_rate:,.0f} a second ({both.our_evaluated_rate:,.0f} evaluated); "
            f"Calculon {both.calculon_rate:,.0f} a second: "
            f"{both.times_faster:,.0f} times (target {TARGET})"
        )
        for whose, plan, theirs, own in (
            ("our best", both.our_best, both.our_best_by_calculon, both.our_best_by_ours),
            (
                "Calculon's best",
                both.calculon_best,
                both.calculon_best_by_calculon,
                both.calculon_best_by_ours,
            ),
            ("of our ties", both.agreed, both.agreed_by_calculon, both.agreed_by_ours),
            ("of our front", both.on_front, both.on_front_by_calculon, both.on_front_by_ours),
        ):
            print(f"{whose}: {theirs:.3f} s by Calculon, {own:.3f} s by ours: {plan}")
        print("\n".join(verdict(both)))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
