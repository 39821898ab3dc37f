"""The benchmark of schedules runs and prices both sides by one clock; speed is not tested."""

from __future__ import annotations

import json

from tests.test_benchmarks import run_script

COST_KEYS = {
    "work",
    "name",
    "num_ranks",
    "num_microbatches",
    "virtual_stages",
    "num_actions",
    "ours_seconds",
    "ours_bytes",
    "peer_seconds",
    "peer_bytes",
    "times_faster",
    "interval",
}


def test_a_quick_run_sets_both_sides_side_by_side(tmp_path_factory) -> None:
    """Bubbles of ours are never above PyTorch's; each work has a turn of both sides in each round."""
    path = tmp_path_factory.mktemp("benchmark") / "report.json"
    done = run_script(
        "--size", "quick", "--rounds", "1", "--only", "zb-v", "--json", str(path), script="schedules.py"
    )
    assert done.returncode == 0, done.stderr
    assert "times faster" in done.stdout
    report = json.loads(path.read_text(encoding="utf-8"))
    assert {row["name"] for row in report["bubbles"]} == {"zb-v"}
    for row in report["bubbles"]:
        assert row["ours"] <= row["peer"]
    made = [row for row in report["costs"] if row["work"] == "make and check"]
    assert [row["name"] for row in made] == ["zb-v"]
    for row in report["costs"]:
        assert row.keys() == COST_KEYS
        assert len(row["ours_seconds"]) == 1
    assert all(len(row["peer_seconds"]) == 1 and row["times_faster"] > 0 for row in made)


def test_closed_forms_are_set_beside_the_schedules() -> None:
    """A line for each schedule: sizes tried, median, least and greatest error, and where that is."""
    done = run_script("--quick", "--schedule", "zb-h1", "--schedule", "v-half", script="bubbles.py")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()[1:]
    assert [line.split()[0] for line in (first, second)] == ["zb-h1", "v-half"]
    assert [float(error.rstrip("%")) for error in first.split()[2:5]] == [0, 0, 0]
    assert float(second.split()[2].rstrip("%")) == 0
