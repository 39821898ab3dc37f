"""The benchmark beside PyTorch's pipeline runtime runs, compares equal trainings and says what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.test_benchmarks import REPORT_KEYS, ROW_KEYS, SIDE_KEYS, STEPS, run_script

pytest.importorskip("torch.distributed.pipelining", reason="this torch has no pipelining")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """Standard output and JSON of a run of the tiny model: one row that runs, one that is refused."""
    path = tmp_path_factory.mktemp("pipeline") / "report.json"
    options = ("--model", "tiny", "--ranks", "2", "--rounds", "2", "--steps-per-round", "1")
    done = run_script(*options, "--rows", "zb-v,dualpipe", "--json", str(path), script="pipeline.py")
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(path.read_text(encoding="utf-8"))


def test_the_json_has_the_stated_keys(ran: tuple[str, dict[str, Any]]) -> None:
    """The report's, rows' and sides' keys are those of the training step's benchmark."""
    _, report = ran
    assert report.keys() == REPORT_KEYS
    row, refused = report["rows"]
    assert row.keys() == ROW_KEYS
    assert row["ours"].keys() == row["peer"].keys() == SIDE_KEYS
    assert refused.keys() == {"row", "refused"}


def test_both_runtimes_train_the_same(ran: tuple[str, dict[str, Any]]) -> None:
    """Every step's loss is torch's to 1e-5, and it falls: weights, batches, optimizer are the same."""
    row = ran[1]["rows"][0]
    ours, peer = row["ours"]["losses"], row["peer"]["losses"]
    assert len(ours) == len(peer) == STEPS
    assert ours == pytest.approx(peer, rel=0, abs=1e-5)
    assert ours[-1] < ours[0]
    assert "zb-v" in row["ours"]["what"] and "zb-v" in row["peer"]["what"]


def test_every_process_is_counted(ran: tuple[str, dict[str, Any]]) -> None:
    """Two ranks a side, each with a peak; speed is tokens a CPU second over torch's, in its interval."""
    row = ran[1]["rows"][0]
    for side in (row["ours"], row["peer"]):
        assert side["world_size"] == len(side["peak_bytes_by_rank"]) == 2
        assert len(side["cpu_seconds"]) == 2 and min(side["cpu_seconds"]) > 0
    assert row["speed"] == row["ours"]["tokens_per_cpu_second"] / row["peer"]["tokens_per_cpu_second"]
    assert row["speed_interval"][0] <= row["speed"] <= row["speed_interval"][1]


def test_what_no_plan_can_run_is_said(ran: tuple[str, dict[str, Any]]) -> None:
    """A refused row has the plan's reason, in the JSON and below the table, and stops no other row."""
    printed, report = ran
    refused = report["rows"][1]
    assert refused["row"] == "dualpipe"
    assert "two copies of the parameters" in refused["refused"]
    assert [line.split()[0] for line in printed.splitlines()] == ["schedule", "zb-v", "dualpipe:"]
    assert printed.splitlines()[-1] == f"dualpipe: refused: {refused['refused']}"


@pytest.mark.parametrize("arguments", [("--rows", "1f1b,nonsense"), ("--microbatches", "none")])
def test_unknown_arguments_are_refused(arguments: tuple[str, str]) -> None:
    """Exit code 2, and the message names what was given."""
    done = run_script(*arguments, script="pipeline.py")
    assert done.returncode == 2
    assert arguments[1].split(",")[-1] in done.stderr
