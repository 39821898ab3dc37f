"""The benchmark of one GPU compares equal trainings where it is tried out, and says where there is no GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.test_benchmarks import run_script


def test_tried_out_on_a_cpu_both_sides_train_the_same(tmp_path: Path) -> None:
    """Losses are the peer's to 1e-5, memory is the plan's to the byte, and all is in the JSON."""
    path = tmp_path / "report.json"
    options = ("--dry-run", "--eager-peer", "--batch", "2", "--rounds", "1", "--steps-per-round", "1")
    done = run_script(*options, "--json", str(path), script="gpu.py")
    assert done.returncode == 0, done.stderr
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["max_loss_difference"] < 1e-5
    assert report["memory"] == 1.0 and report["ours"]["peak_bytes"] == report["planned_peak_bytes"]
    assert report["speed"] == report["ours"]["tokens_per_second"] / report["peer"]["tokens_per_second"]
    assert len(report["ours"]["losses"]) == len(report["peer"]["losses"]) == 4
    assert "aimed at" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_there_is_one_line() -> None:
    """It says what is missing and how to try the script out."""
    done = run_script(script="gpu.py")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "needs a CUDA device" in done.stderr
    assert "--dry-run" in done.stderr
