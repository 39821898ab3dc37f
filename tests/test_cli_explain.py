"""``picotron explain``: a chart, its numbers, and what a change would do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.test_cli import Run, refused, run, saved

__all__ = ["run", "saved"]


def test_a_plan_is_explained(run: Run, saved: Path) -> None:
    """Plain text where it is piped; JSON whose parts sum to the whole."""
    code, text, err = run("explain", saved, "--changes", 1)
    assert (code, err) == (0, "")
    assert "\x1b" not in text
    assert "where " in text
    data = json.loads(run("explain", saved, "--changes", 0, "--json")[1])
    assert sum(data["seconds"].values()) == pytest.approx(data["step_seconds"])
    assert sum(data["bytes"].values()) == data["peak_bytes"]
    assert data["changes"] == []
    assert "\x1b[" in run("explain", saved, "--colour", "always", "--changes", 0)[1]


def test_what_ifs_are_differences(run: Run, saved: Path) -> None:
    """Several at once, in the caller's words; what followed is said."""
    asked = ["--set", "pp=1", "--set", "seq_len=64", "--network", "2x", "--profile", "megatron-2021"]
    code, text, err = run("explain", saved, *asked)
    assert (code, err) == (0, "")
    assert "with pp=1, seq_len=64, network 2x, profile megatron-2021" in " ".join(text.split())
    assert "follows: dp=4 (was 2)" in text
    data = json.loads(run("explain", saved, *asked, "--json")[1])
    difference = data["after"]["step_seconds"] - data["before"]["step_seconds"]
    assert sum(data["seconds"].values()) == pytest.approx(difference)
    assert data["after"]["profile"] == "megatron-2021"
    assert data["asked"] == ["pp=1", "seq_len=64", "network 2x", "profile megatron-2021"]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (["--set", "tp=2", "--set", "tp=1"], "--set must name each setting once, got tp=2 tp=1"),
        (["--set", "tp"], "--set must look like NAME=VALUE, got 'tp'"),
        (["--set", "tq=2"], "did you mean tp"),
        (["--set", "tp=x"], "--set tp must have a value of its kind, got 'x'"),
        (["--set", "precision=int3"], "--set precision must have a value of its kind"),
        (["--set", "sequence_parallel=perhaps"], "--set sequence_parallel must have a value of its kind"),
        (["--set", "pp=3"], "must equal the cluster's 4 devices"),
        (["--network", "fast"], "must be a positive factor such as 2x or 0.5, got 'fast'"),
        (["--latency", "1e99"], "latency must be a factor such as 2 or 0.5"),
        (["--device", "h300"], "a cluster preset must be one of"),
        (["--device", "h100", "--set", "cluster=h100"], "contradict each other"),
        (["--network", "2x", "--set", "cluster=cpu:1x4"], "must come without --set cluster"),
        (["--profile", "none"], "a software profile must be one of"),
        (["--changes", "-1"], "--changes must be in [0, 100]"),
    ],
)
def test_bad_requests_are_refused(run: Run, saved: Path, asked: list[str], words: str) -> None:
    """One line, and exit code 2."""
    assert words in refused(run("explain", saved, *asked))
