"""``picotron calibrate``: measure this machine, or fit an observed run, into a cluster's file."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from picotron.cli.common import (
    STANDARD,
    Subparsers,
    command,
    read_plan,
    read_source,
    write_json,
    write_out,
    write_result,
)
from picotron.errors import PlanError
from picotron.planner.cluster import ClusterSpec, cluster_to_json
from picotron.planner.fit_profile import ProfileFit, fit_profile, runs_from_text

_RANKS, _PRECISION, _SECONDS, _BACKEND = 8, "fp32", 10.0, "simulated"


def add_parser(subparsers: Subparsers) -> None:
    """Declare ``picotron calibrate``."""
    parser = command(
        subparsers,
        "calibrate",
        _execute,
        summary="measure this machine's CPU, or fit what an observed run tells, into a cluster's file",
        example="picotron calibrate --ranks 8 -o this-cpu.json\n"
        "  picotron calibrate --from-run runs/llama-tiny-1 -o fitted.json",
        json_help="print the cluster, and what was fitted, as one JSON object",
    )
    measured = parser.add_argument_group("measuring this machine")
    measured.add_argument("--ranks", type=int, help=f"ranks that share the machine (default: {_RANKS})")
    measured.add_argument("--precision", choices=("fp32", "fp64", "bf16"), help=f"default: {_PRECISION}")
    measured.add_argument("--seconds", type=float, help=f"how long to measure (default: {_SECONDS:g})")
    measured.add_argument(
        "--backend",
        choices=("simulated", "gloo"),
        help="whose communication to measure: simulated ranks' (the default), or that of two processes",
    )
    fitted = parser.add_argument_group("fitting an observed run instead")
    fitted.add_argument(
        "--from-run",
        metavar="METRICS",
        help="a run's folder, its measurement.json or metrics.jsonl, or a JSON list of objects with a plan "
        "(whole, or its file) and step_seconds",
    )
    fitted.add_argument(
        "--plan", metavar="PLAN", help="the plan that metrics.jsonl is of; default: beside it"
    )
    parser.add_argument(
        "-o", "--out", metavar="FILE", default=STANDARD, help="where to save it; default: print"
    )


def _execute(arguments: argparse.Namespace) -> None:
    if arguments.from_run is not None:
        _fit(arguments)
        return
    if arguments.plan is not None:
        raise PlanError("--plan goes with --from-run, got it alone; name the metrics of a run")
    cluster = _measured(arguments)
    _write(arguments, cluster, {})


def _measured(arguments: argparse.Namespace) -> ClusterSpec:
    from picotron.runtime.cluster import calibrate

    def progress(name: str) -> None:
        print(f"measuring {name} ...", file=sys.stderr)

    return calibrate(
        precision=arguments.precision or _PRECISION,
        seconds=_SECONDS if arguments.seconds is None else arguments.seconds,
        num_ranks=_RANKS if arguments.ranks is None else arguments.ranks,
        backend=arguments.backend or _BACKEND,
        progress=progress,
    )


def _fit(arguments: argparse.Namespace) -> None:
    measuring = ("ranks", "precision", "seconds", "backend")
    if asked := [f"--{name}" for name in measuring if getattr(arguments, name) is not None]:
        raise PlanError(f"a fit to a run measures nothing, got {', '.join(asked)}; leave that out")
    path = Path(arguments.from_run)
    file = path / "measurement.json" if path.is_dir() else path
    text = read_source(str(file), "an observed run")
    beside = file.parent / "plan.json"
    plan = None
    if arguments.plan is not None:
        plan = read_plan(arguments.plan)
    elif file.suffix == ".jsonl" and beside.exists():
        plan = read_plan(str(beside))
    fit = fit_profile(runs_from_text(text, file.parent, plan))
    if not arguments.json:
        report = _report(fit)
        if arguments.out == STANDARD:
            print(report, file=sys.stderr)
        else:
            write_out(report)
    constants = {name: getattr(fit.cluster.efficiency, name) for name in fit.fitted}
    columns = zip(fit.observed_seconds, fit.seconds_before, fit.seconds_after, strict=True)
    runs = [{"observed": seen, "before": before, "after": after} for seen, before, after in columns]
    errors = {"error_before": fit.error_before, "error_after": fit.error_after}
    _write(arguments, fit.cluster, {"fitted": constants, "runs": runs, **errors})


def _report(fit: ProfileFit) -> str:
    """Each run's seconds before and after, and the constants."""
    lines = [f"{'run':>4}{'observed':>13}{'before':>13}{'after':>13}"]
    columns = zip(fit.observed_seconds, fit.seconds_before, fit.seconds_after, strict=True)
    for number, row in enumerate(columns):
        lines.append(f"{number:>4}" + "".join(f"{seconds:>11.4g} s" for seconds in row))
    lines.append(f"median error {fit.error_before:.1%} before, {fit.error_after:.1%} after")
    lines += [f"{name} = {getattr(fit.cluster.efficiency, name):.4g}" for name in fit.fitted]
    return "\n".join(lines)


def _write(arguments: argparse.Namespace, cluster: ClusterSpec, fitted: dict[str, object]) -> None:
    text = cluster_to_json(cluster)
    if arguments.out != STANDARD:
        write_result(arguments.out, text, "a cluster")
    if arguments.json:
        write_json({"cluster": json.loads(text), **fitted})
    elif arguments.out == STANDARD:
        write_out(text)
    else:
        write_out(f"saved {cluster.name} to {arguments.out}")
