"""Predicted beside measured on this machine: CPU seconds of a step, and wall time of one or two processes.

The machine is calibrated first, in the same run. Then trainings of many layouts and sizes take turns, on
simulated ranks and, where they have at most two, on processes over gloo. CPU seconds count by the median of
the turns. Wall time counts by the fastest turn, since on a machine that others use all turns hold their work
too: see the load. None of the trainings was part of the calibration.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from attrs import asdict, evolve, field, frozen

from picotron.planner.cluster import ClusterSpec
from picotron.planner.host_seconds import cpu_seconds_by_rank
from picotron.planner.model import ModelSpec
from picotron.planner.plan import TrainingPlan, plan
from picotron.planner.predict import predict
from picotron.planner.workload import Workload
from picotron.runtime.backend import Backend
from picotron.runtime.calibrated_calls import measure_calls, over_gloo
from picotron.runtime.calibration import calibrate, with_calls
from picotron.runtime.data import standard_library_text, step_batches
from picotron.runtime.distributed import DistributedBackend
from picotron.runtime.pipeline import Session
from picotron.runtime.simulated import simulate

TARGET_ERROR, TARGET_RANK_CORRELATION = 0.15, 0.8
GLOO_SECONDS = 2.0  # for its calls to be measured
WARMUP_STEPS = 1


@frozen
class Layout:
    """A model, what it is trained on, and how it is cut."""

    hidden: int
    layers: int
    seq_len: int
    global_batch: int
    parallel: Mapping[str, Any] = field(factory=dict)
    family: str = "llama"
    vocab: int = 256
    heads: int = 4

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return int(np.prod([self.parallel.get(axis, 1) for axis in ("dp", "pp", "tp")]))


LAYOUTS: Mapping[str, Layout] = {
    "one-small": Layout(128, 4, 64, 8, {"micro_batch": 2}),
    "one-wide": Layout(512, 2, 128, 4, {"micro_batch": 4}),
    "one-batch": Layout(256, 2, 256, 8, {"micro_batch": 8}),
    "one-vocabulary": Layout(192, 3, 128, 4, {"micro_batch": 2}, vocab=4096),
    "one-gpt2": Layout(256, 3, 128, 4, {"micro_batch": 1}, family="gpt2"),
    "dp2": Layout(256, 4, 256, 4, {"dp": 2, "micro_batch": 1}),
    "dp2-wide": Layout(512, 2, 64, 8, {"dp": 2, "micro_batch": 4}, heads=8),
    "dp8": Layout(128, 2, 256, 8, {"dp": 8, "micro_batch": 1}),
    "pp2-zb-h1": Layout(512, 4, 64, 8, {"pp": 2, "micro_batch": 2, "schedule": "zb-h1"}),
    "pp2-interleaved": Layout(
        384, 4, 128, 8, {"pp": 2, "virtual_stages": 2, "schedule": "interleaved", "micro_batch": 1}
    ),
    "pp4": Layout(128, 8, 128, 8, {"pp": 4, "micro_batch": 1}),
    "pp2-gpt2": Layout(192, 4, 64, 8, {"pp": 2, "micro_batch": 2}, family="gpt2"),
    "tp2": Layout(256, 4, 128, 8, {"tp": 2, "micro_batch": 2, "sequence_parallel": False}),
    "tp2-sp": Layout(384, 2, 256, 4, {"tp": 2, "micro_batch": 2, "sequence_parallel": True}),
    "tp4": Layout(512, 2, 256, 4, {"tp": 4, "micro_batch": 1, "sequence_parallel": False}),
    "dp2-tp2-sp": Layout(192, 6, 64, 16, {"dp": 2, "tp": 2, "micro_batch": 4, "sequence_parallel": True}),
    "dp2-pp2-tp2-sp": Layout(
        256, 8, 128, 8, {"dp": 2, "pp": 2, "tp": 2, "micro_batch": 1, "sequence_parallel": True}
    ),
}


@frozen(kw_only=True)
class Score:
    """One layout on one backend, in seconds a step: "cpu" over all ranks, or "wall"."""

    layout: str
    backend: str
    quantity: str
    predicted_seconds: float
    measured_seconds: float
    turns: tuple[float, ...]

    @property
    def error(self) -> float:
        """Of the prediction, relative to what was measured."""
        return self.predicted_seconds / self.measured_seconds - 1


def make_plan(layout: Layout, cluster: ClusterSpec) -> TrainingPlan:
    """The plan of a layout, priced for ``cluster``."""
    own = evolve(cluster, devices_per_node=layout.world_size, nodes=1)
    work = Workload(global_batch=layout.global_batch, seq_len=layout.seq_len, precision="fp32")
    return plan(ModelSpec.from_hf(_config(layout)), own, work, **{"dp": 1, **layout.parallel})


def _config(layout: Layout) -> dict[str, Any]:
    if layout.family == "gpt2":
        return {
            "model_type": "gpt2",
            "vocab_size": layout.vocab,
            "n_embd": layout.hidden,
            "n_layer": layout.layers,
            "n_head": layout.heads,
            "n_inner": 4 * layout.hidden,
            "n_positions": layout.seq_len,
            "layer_norm_epsilon": 1e-5,
            "activation_function": "gelu_new",
            "tie_word_embeddings": True,
        }
    return {
        "model_type": "llama",
        "vocab_size": layout.vocab,
        "hidden_size": layout.hidden,
        "intermediate_size": layout.hidden * 8 // 3 // 8 * 8,
        "num_hidden_layers": layout.layers,
        "num_attention_heads": layout.heads,
        "num_key_value_heads": layout.heads,
        "max_position_embeddings": layout.seq_len,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }


def take_steps(backend: Backend, made: TrainingPlan, steps: int) -> list[tuple[float, float]]:
    """CPU and wall seconds of each step after the warm-up, on one rank."""
    session, text = Session(made, backend), standard_library_text(made.workload.seq_len)
    taken = []
    for step in range(WARMUP_STEPS + steps):
        consumed = step * made.workload.global_batch
        batches = step_batches(made, text, consumed=consumed, dp_index=session.where.dp)
        backend.barrier()
        result = session.step(batches)
        taken.append((result.cpu_seconds, result.seconds))
    return taken[WARMUP_STEPS:]


def simulated_turns(plans: Mapping[str, TrainingPlan], rounds: int, steps: int) -> dict[str, list[float]]:
    """CPU seconds of a step over all ranks, by layout and turn."""
    turns: dict[str, list[float]] = {name: [] for name in plans}
    for number in range(rounds):
        for name, made in plans.items():
            say(f"round {number + 1} of {rounds}: {name} ...")

            def rank_main(backend: Backend, made: TrainingPlan = made) -> list[tuple[float, float]]:
                return take_steps(backend, made, steps)

            by_rank = simulate(rank_main, made.topology.world_size, clock="cpu")
            turns[name].append(median(sum(cpu for cpu, _ in step) for step in zip(*by_rank, strict=True)))
    return turns


def gloo_rank(
    processes: Any, plans: Mapping[str, TrainingPlan], rounds: int, steps: int
) -> dict[str, list[list[tuple[float, float]]]]:
    """What a process takes of each layout and turn that it is a rank of."""
    taken: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in plans}
    for _ in range(rounds):
        for name, made in plans.items():
            if processes.rank < made.topology.world_size:
                members = range(made.topology.world_size)
                with DistributedBackend(processes, device="cpu", ranks=members) as backend:
                    taken[name].append(take_steps(backend, made, steps))
    return taken


def gloo_turns(
    plans: Mapping[str, TrainingPlan], rounds: int, steps: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """CPU seconds over all processes and wall seconds of a step, by layout and turn."""
    say(f"{rounds} rounds over gloo: {', '.join(plans)} ...")
    ranks = over_gloo(gloo_rank, dict(plans), rounds, steps)
    cpu: dict[str, list[float]] = {}
    wall: dict[str, list[float]] = {}
    for name, made in plans.items():
        turns = list(zip(*(ranks[rank][name] for rank in range(made.topology.world_size)), strict=True))
        steps_of = [list(zip(*turn, strict=True)) for turn in turns]
        cpu[name] = [median(sum(own[0] for own in step) for step in turn) for turn in steps_of]
        wall[name] = [min(max(own[1] for own in step) for step in turn) for turn in steps_of]
    return cpu, wall


def scored(
    backend: str, quantity: str, predicted: Mapping[str, float], turns: Mapping[str, Sequence[float]]
) -> list[Score]:
    """Each layout's prediction beside the median of its turns; of wall time, the fastest."""
    return [
        Score(
            layout=name,
            backend=backend,
            quantity=quantity,
            predicted_seconds=predicted[name],
            measured_seconds=(min if quantity == "wall" else median)(own),
            turns=tuple(own),
        )
        for name, own in turns.items()
    ]


def rank_correlation(left: Sequence[float], right: Sequence[float]) -> float:
    """Spearman's, of values of which no two are equal."""
    ranks = [np.argsort(np.argsort(values)) for values in (left, right)]
    return float(np.corrcoef(*ranks)[0, 1]) if len(left) > 1 else float("nan")


def summary(scores: Sequence[Score]) -> dict[str, Any]:
    """Median and largest absolute error, bias and rank correlation of one backend's quantity."""
    errors = [score.error for score in scores]
    correlation = rank_correlation(
        [score.predicted_seconds for score in scores], [score.measured_seconds for score in scores]
    )
    return {
        "layouts": len(scores),
        "median_absolute_error": median(map(abs, errors)),
        "largest_absolute_error": max(map(abs, errors)),
        "bias": sum(errors) / len(errors),
        "rank_correlation": None if np.isnan(correlation) else correlation,
    }


def table(scores: Sequence[Score]) -> str:
    """The scores as text, with a line that sums each group up."""
    lines = [f"{'layout':<18}{'backend':<11}{'of':<6}{'predicted':>11}{'measured':>11}{'error':>8}   turns"]
    for score in scores:
        spread = f"{1e3 * min(score.turns):.1f} to {1e3 * max(score.turns):.1f}"
        lines.append(
            f"{score.layout:<18}{score.backend:<11}{score.quantity:<6}"
            f"{1e3 * score.predicted_seconds:>8.1f} ms"
            f"{1e3 * score.measured_seconds:>8.1f} ms{score.error:>+8.1%}   {spread} ms"
        )
    for (backend, quantity), found in grouped(scores).items():
        lines.append(
            f"{backend} {quantity}: {found['layouts']} layouts, median absolute error "
            f"{found['median_absolute_error']:.1%} (target {TARGET_ERROR:.0%}), "
            f"largest {found['largest_absolute_error']:.1%}, bias {found['bias']:+.1%}, "
            f"Spearman {found['rank_correlation'] or float('nan'):.2f} (target {TARGET_RANK_CORRELATION})"
        )
    return "\n".join(lines)


def grouped(scores: Sequence[Score]) -> dict[tuple[str, str], dict[str, Any]]:
    """The summary of each backend and quantity."""
    groups: dict[tuple[str, str], list[Score]] = {}
    for score in scores:
        groups.setdefault((score.backend, score.quantity), []).append(score)
    return {key: summary(own) for key, own in groups.items()}


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


def measure(names: Sequence[str], *, seconds: float, rounds: int, steps: int, gloo: bool) -> list[Score]:
    """Calibrate, train and score."""
    say("calibrating ...")
    started = time.perf_counter()
    cluster = calibrate(seconds=seconds)
    say(f"calibrated in {time.perf_counter() - started:.1f} s")
    plans = {name: make_plan(LAYOUTS[name], cluster) for name in names}
    predicted = {name: sum(cpu_seconds_by_rank(made)) for name, made in plans.items()}
    scores = scored("simulated", "cpu", predicted, simulated_turns(plans, rounds, steps))
    few = [name for name in names if LAYOUTS[name].world_size <= 2]
    if gloo and few:
        over = with_calls(cluster, measure_calls("gloo", GLOO_SECONDS))
        plans = {name: make_plan(LAYOUTS[name], over) for name in few}
        cpu, wall = gloo_turns(plans, rounds, steps)
        predicted = {name: sum(cpu_seconds_by_rank(made)) for name, made in plans.items()}
        scores += scored("gloo", "cpu", predicted, cpu)
        predicted = {name: predict(made).step_seconds for name, made in plans.items()}
        scores += scored("gloo", "wall", predicted, wall)
    return scores


def main() -> None:
    """Run the benchmark as its arguments say."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="to calibrate for (default: 10)")
    parser.add_argument("--rounds", type=int, default=4, help="turns of each layout (default: 4)")
    parser.add_argument("--steps", type=int, default=2, help="steps of a turn, after one more (default: 2)")
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help=f"of {', '.join(LAYOUTS)}")
    parser.add_argument("--no-gloo", action="store_true", help="simulated ranks only")
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured")
    arguments = parser.parse_args()
    names = arguments.layouts.split(",")
    if unknown := [name for name in names if name not in LAYOUTS]:
        parser.error(f"layouts must be of {', '.join(LAYOUTS)}, got {', '.join(unknown)}")
    if arguments.rounds < 1 or arguments.steps < 1:
        parser.error(f"rounds and steps must be at least 1, got {arguments.rounds} and {arguments.steps}")
    torch.set_num_threads(1)
    scores = measure(
        names,
        seconds=arguments.seconds,
        rounds=arguments.rounds,
        steps=arguments.steps,
        gloo=not arguments.no_gloo,
    )
    print(table(scores))
    print("load over 1, 5 and 15 minutes: " + ", ".join(f"{load:.1f}" for load in os.getloadavg()))
    if arguments.json:
        report = {
            "machine": {
                "processor": platform.processor(),
                "system": platform.platform(),
                "torch": torch.__version__,
                "load": os.getloadavg(),
            },
            "scores": [{**asdict(score), "error": score.error} for score in scores],
            "summaries": {" ".join(key): found for key, found in grouped(scores).items()},
        }
        Path(arguments.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
