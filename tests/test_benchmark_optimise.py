"""The benchmark of the optimiser runs, and says what it measured."""

from __future__ import annotations

import json
from pathlib import Path

from tests.test_benchmarks import run_script


def test_quick_rows_meet_what_is_published(tmp_path: Path) -> None:
    """A row for every profile of 8 ranks, none worse than published, bounds below what was found."""
    path = tmp_path / "report.json"
    done = run_script("--quick", "--effort", "100000", "--json", str(path), script="optimise.py")
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())
    assert len(done.stdout.splitlines()) == 2 + len(rows) == 8
    assert "worse" not in done.stdout
    for row in rows:
        assert row["stage_span"] <= row["published"] + 5e-5
        assert row["stage_span_bound"] <= row["stage_span"] + 1e-12
        assert row["bubble_bound"] <= row["bubble"] + 1e-12
        assert row["gap"] >= 0
