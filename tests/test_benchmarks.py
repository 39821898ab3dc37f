"""The benchmark runs, and compares trainings that are the same; how fast they are is not tested."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
ROWS = ("single", "ddp", "dp2-pp2-tp2-simulated")
REPORT_KEYS = {"command", "machine", "model", "case", "rounds", "steps_per_round", "rows"}
ROW_KEYS = {
    "row",
    "ours",
    "peer",
    "speed",
    "speed_interval",
    "wall_speed",
    "memory",
    "max_loss_difference",
}
SIDE_KEYS = {
    "what",
    "world_size",
    "cpu_seconds",
    "wall_seconds",
    "tokens_per_cpu_second",
    "tokens_per_wall_second",
    "peak_bytes_by_rank",
    "losses",
}
STEPS = 2 + 2 * 1 + 1  # warm-up, rounds * steps, and the one whose memory is measured


def run_script(*arguments: str, script: str = "train_step.py") -> subprocess.CompletedProcess[str]:
    """A benchmark, as a person would start it."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, f"benchmarks/{script}", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """Standard output and JSON of a run of the tiny model."""
    path = tmp_path_factory.mktemp("benchmark") / "report.json"
    options = ("--model", "tiny", "--rounds", "2", "--steps-per-round", "1")
    done = run_script(*options, "--rows", ",".join(ROWS), "--json", str(path))
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(path.read_text(encoding="utf-8"))


def test_the_json_has_the_stated_keys(ran: tuple[str, dict[str, Any]]) -> None:
    """Report, rows and sides have the keys that the README names, one row for each that was asked for."""
    _, report = ran
    assert report.keys() == REPORT_KEYS
    assert [row["row"] for row in report["rows"]] == list(ROWS)
    for row in report["rows"]:
        assert row.keys() == ROW_KEYS
        assert row["ours"].keys() == row["peer"].keys() == SIDE_KEYS


def test_both_sides_train_the_same(ran: tuple[str, dict[str, Any]]) -> None:
    """Every step's loss is the peer's to 1e-5, and it falls: weights, batches and optimizer are the same."""
    _, report = ran
    for row in report["rows"]:
        ours, peer = row["ours"]["losses"], row["peer"]["losses"]
        assert len(ours) == len(peer) == STEPS
        assert ours == pytest.approx(peer, rel=0, abs=1e-5), row["row"]
        assert row["max_loss_difference"] == max(abs(a - b) for a, b in zip(ours, peer, strict=True))
        assert ours[-1] < ours[0]


def test_ratios_follow_from_what_was_measured(ran: tuple[str, dict[str, Any]]) -> None:
    """Speed is tokens a CPU second over the peer's, in its interval; memory compares the fullest ranks."""
    _, report = ran
    for row in report["rows"]:
        ours, peer = row["ours"], row["peer"]
        assert row["speed"] == ours["tokens_per_cpu_second"] / peer["tokens_per_cpu_second"]
        assert row["speed_interval"][0] <= row["speed"] <= row["speed_interval"][1]
        assert row["memory"] == max(ours["peak_bytes_by_rank"]) / max(peer["peak_bytes_by_rank"])
        for side in (ours, peer):
            assert len(side["cpu_seconds"]) == len(side["wall_seconds"]) == 2
            assert min(side["cpu_seconds"]) > 0


def test_every_rank_reports_its_memory(ran: tuple[str, dict[str, Any]]) -> None:
    """Simulated ranks and processes alike, of ours and of the peer's: one peak a rank."""
    _, report = ran
    by_name = {row["row"]: row for row in report["rows"]}
    assert len(by_name["dp2-pp2-tp2-simulated"]["ours"]["peak_bytes_by_rank"]) == 8
    assert len(by_name["ddp"]["peer"]["peak_bytes_by_rank"]) == 2
    assert len(by_name["ddp"]["ours"]["peak_bytes_by_rank"]) == 2
    assert len(by_name["single"]["peer"]["peak_bytes_by_rank"]) == 1


def test_the_table_has_a_line_for_each_row(ran: tuple[str, dict[str, Any]]) -> None:
    """A heading, then the rows in the order asked for."""
    printed, _ = ran
    assert [line.split()[0] for line in printed.splitlines()] == ["row", *ROWS]


def test_an_unknown_row_is_refused() -> None:
    """Exit code 2, and the message names the rows there are."""
    done = run_script("--rows", "single,nonsense")
    assert done.returncode == 2
    assert "dp2-pp2-tp2-gloo" in done.stderr
    assert "got nonsense" in done.stderr
