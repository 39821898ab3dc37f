"""``picotron compare``: what a run measured beside what its plan promised."""

from __future__ import annotations

import argparse
from pathlib import Path

from attrs import asdict

from picotron.cli.common import Subparsers, command, read_source, write_json, write_out
from picotron.planner.predict import predict


def add_parser(subparsers: Subparsers) -> None:
    """Declare ``picotron compare``."""
    parser = command(
        subparsers,
        "compare",
        _execute,
        summary="compare what a run measured with what its plan predicted",
        example="picotron compare runs/llama-tiny-1",
    )
    parser.add_argument("run", metavar="RUN", help="a run's folder, or its measurement.json")


def _execute(arguments: argparse.Namespace) -> None:
    from picotron.runtime.compare import compare
    from picotron.runtime.record import measurement_from_json

    path = Path(arguments.run)
    file = path / "measurement.json" if path.is_dir() else path
    measurement = measurement_from_json(read_source(str(file), "a measurement"))
    comparison = compare(predict(measurement.plan), measurement)
    if arguments.json:
        write_json(
            {"lines": [asdict(line) for line in comparison.lines], "promises_kept": comparison.promises_kept}
        )
    else:
        write_out(str(comparison))
