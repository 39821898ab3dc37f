"""``picotron calibrate``: measure this machine into a cluster that plans can be priced for."""

from __future__ import annotations

import argparse
import sys

from picotron.cli.common import STANDARD, Subparsers, command, write_out, write_result
from picotron.planner.cluster import cluster_to_json


def add_parser(subparsers: Subparsers) -> None:
    """Declare ``picotron calibrate``."""
    parser = command(
        subparsers,
        "calibrate",
        _execute,
        summary="measure this machine's CPU into a cluster's file",
        example="picotron calibrate --ranks 8 -o this-cpu.json",
        json_help=None,
    )
    parser.add_argument("--ranks", type=int, default=8, help="ranks that share the machine (default: 8)")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "fp64", "bf16"), help="default: fp32")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long to measure (default: 2)")
    parser.add_argument(
        "-o", "--out", metavar="FILE", default=STANDARD, help="where to save it; default: print"
    )


def _execute(arguments: argparse.Namespace) -> None:
    from picotron.runtime.cluster import calibrate

    def progress(name: str) -> None:
        print(f"measuring {name} ...", file=sys.stderr)

    cluster = calibrate(
        precision=arguments.precision, seconds=arguments.seconds, num_ranks=arguments.ranks, progress=progress
    )
    write_result(arguments.out, cluster_to_json(cluster), "a cluster")
    if arguments.out != STANDARD:
        write_out(f"saved {cluster.name} to {arguments.out}")
