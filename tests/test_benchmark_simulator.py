"""The benchmark of the simulator runs, and sets equal trainings against each other; speed is not tested."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest

from tests.test_benchmarks import REPORT_KEYS, run_script

STEP_ROWS = ("dp4-threads",)
OTHER_ROWS = ("hand-over-message",)
ROW_KEYS = {
    "row",
    "ours",
    "base",
    "cpu_seconds",
    "base_cpu_seconds",
    "unit",
    "value",
    "interval",
    "target",
    "verdict",
    "max_loss_difference",
}


run_simulator = partial(run_script, script="simulator.py")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """Standard output and JSON of a run of the tiny model."""
    path = tmp_path_factory.mktemp("benchmark") / "report.json"
    rows = ",".join((*STEP_ROWS, *OTHER_ROWS))
    done = run_simulator("--model", "tiny", "--rounds", "2", "--rows", rows, "--json", str(path))
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(path.read_text(encoding="utf-8"))


def test_the_json_has_the_stated_keys(ran: tuple[str, dict[str, Any]]) -> None:
    """Report and rows have the keys that the README names, one row for each that was asked for."""
    _, report = ran
    assert report.keys() == REPORT_KEYS
    assert [row["row"] for row in report["rows"]] == [*STEP_ROWS, *OTHER_ROWS]
    for row in report["rows"]:
        assert row.keys() == ROW_KEYS
        sides = [row["cpu_seconds"], *([row["base_cpu_seconds"]] if row["base"] else [])]
        assert all(len(side) == 2 and min(side) > 0 for side in sides)


def test_many_ranks_train_what_one_trains(ran: tuple[str, dict[str, Any]]) -> None:
    """Simulated ranks, and a peer's threads, have the losses of one rank over the same batches."""
    _, report = ran
    for row in report["rows"][: len(STEP_ROWS)]:
        assert row["max_loss_difference"] < 1e-5, row["row"]


def test_values_follow_from_what_was_measured(ran: tuple[str, dict[str, Any]]) -> None:
    """A ratio is ours over the base, other units are ours alone; each lies in its interval."""
    _, report = ran
    for row in report["rows"]:
        unit = {"us": 1e-6, "s": 1.0}.get(row["unit"]) or sum(row["base_cpu_seconds"]) / 2
        assert row["value"] == pytest.approx(sum(row["cpu_seconds"]) / 2 / unit)
        assert row["interval"][0] <= row["value"] * (1 + 1e-9)
        assert row["value"] <= row["interval"][1] * (1 + 1e-9)


def test_a_hand_over_is_one_of_many(ran: tuple[str, dict[str, Any]]) -> None:
    """Microseconds are of one hand-over, not of all that a round has."""
    _, report = ran
    values = [row["value"] for row in report["rows"] if row["unit"] == "us"]
    assert values
    assert all(1 < value < 2000 for value in values)


def test_the_verdict_follows_from_target_and_interval(ran: tuple[str, dict[str, Any]]) -> None:
    """Met and missed only where the whole interval says so."""
    _, report = ran
    for row in report["rows"]:
        (low, high), target = row["interval"], row["target"]
        if target is None:
            assert row["verdict"] == "none"
        else:
            expected = "met" if high <= target else "missed" if low > target else "open"
            assert row["verdict"] == expected


def test_the_table_has_a_line_for_each_row(ran: tuple[str, dict[str, Any]]) -> None:
    """A heading, then the rows in the order asked for."""
    printed, _ = ran
    assert [line.split()[0] for line in printed.splitlines()] == ["row", *STEP_ROWS, *OTHER_ROWS]


def test_an_unknown_row_is_refused() -> None:
    """Exit code 2, and the message names the rows there are."""
    done = run_simulator("--rows", "tp4,nonsense")
    assert done.returncode == 2
    assert "dp8-pp8-batch64" in done.stderr
    assert "got nonsense" in done.stderr
