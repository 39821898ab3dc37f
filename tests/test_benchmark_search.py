"""The benchmark of searches runs and counts what it covers; speed is not tested."""

from __future__ import annotations

import json

from tests.test_benchmarks import run_script


def test_a_quick_run_tells_what_was_covered(tmp_path_factory) -> None:
    """One small space, a round: candidates, those evaluated, and the best plan in words."""
    path = tmp_path_factory.mktemp("benchmark") / "report.json"
    done = run_script("--quick", "--rounds", "1", "--json", str(path), script="search.py")
    assert done.returncode == 0, done.stderr
    assert "candidates covered" in done.stdout
    (row,) = json.loads(path.read_text(encoding="utf-8"))["spaces"]
    assert row["candidates"] > row["evaluated"] > 0
    assert len(row["seconds"]) == 1
    assert row["best"].startswith("tp=")
