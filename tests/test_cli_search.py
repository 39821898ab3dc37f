"""``picotron search``: the best plans of a space, its front and counts, and why a layout is none of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from picotron.cli.search import CHOICE_HELP
from picotron.planner.cases import SCHEDULE_NAMES
from picotron.planner.serialize import load_plan
from picotron.planner.space import CHOICES
from tests.test_cli import Run, refused, run

__all__ = ["run"]
NODE = ["llama-3.1-8b", "--cluster", "h100:1x4", "--global-batch", "16", "--seq-len", "2048"]
FEW = [*NODE, "--schedule", "1f1b", "--recompute", "none", "--offload", "0", "--order", "pp,dp,cp,tp"]
SMALL = [*FEW, "--simulate", "0"]


def test_flags_bear_the_names_of_choices() -> None:
    """Whoever knows a candidate's choices knows the flags."""
    assert set(CHOICE_HELP) == set(CHOICES)


def test_a_table_is_printed_and_the_best_plan_saved(run: Run, tmp_path: Path) -> None:
    """The file holds the plan of the first row; as many rows as are asked for."""
    path = tmp_path / "best.json"
    code, out, err = run("search", *SMALL, "--top", 3, "--tp", "2,4", "-o", path)
    assert (code, err) == (0, "")
    rows = [line for line in out.splitlines() if line.lstrip()[:1].isdigit() and "tp=" in line]
    assert [row.split()[0] for row in rows] == ["1", "2", "3"]
    best = load_plan(path)
    assert f"tp={best.topology.tp} " in rows[0]
    assert best.topology.tp in (2, 4)
    assert "Pareto front of" in out
    assert "candidates: " in out


def test_json_tells_plans_front_and_counts(run: Run) -> None:
    """In bytes and seconds; the first plan is the best; every candidate is covered."""
    code, out, _ = run("search", *SMALL, "--json", "--why", "tp=3", "--why", "tp=4 zero_stage=0")
    data = json.loads(out)
    counts = data["counts"]
    assert code == 0
    assert data["best"] == data["plans"][0]
    choices = data["best"]["choices"]
    assert choices["schedule"] in SCHEDULE_NAMES and choices["sequence_parallel"] in (True, False)
    assert type(choices["tp"]) is type(choices["zero_stage"]) is int
    assert data["pareto"][0]["step_seconds"] == data["best"]["step_seconds"]
    assert counts["evaluated"] + counts["cut_by_memory"] + counts["cut_by_time"] == counts["candidates"]
    first, second = data["why"]
    assert (first["verdict"], first["step_seconds"]) == ("refused", None)
    assert second["verdict"] in ("slower", "tie", "too large")


def test_reasons_follow_the_table(run: Run) -> None:
    """One a layout asked about, in order."""
    out = run("search", *SMALL, "--why", "tp=3", "--why", "cp=4")[1]
    assert out.index("tp=3: no layout") < out.index("cp=4: ")


def test_the_plan_alone_goes_through_a_pipe(run: Run) -> None:
    """``-o -`` prints the best plan's JSON and nothing else."""
    assert json.loads(run("search", *SMALL, "--tp", 4, "-o", "-")[1])["topology"]["tp"] == 4


def test_the_simulator_stands_beside_the_estimate(run: Run, tmp_path: Path) -> None:
    """For the first three plans, or as many as asked; a better cut of the best plan is told and saved."""
    out = run("search", *FEW, "--top", 4)[1]
    rows = [line.split() for line in out.splitlines() if line.lstrip()[:1].isdigit() and "tp=" in line]
    assert "simulated" in out.splitlines()[1]
    assert [row[3:5][1] in ("s", "ms") for row in rows] == [True, True, True, False]
    path = tmp_path / "best.json"
    flags = ["--pp", "4", "--schedule", "zb-v", "--refine", "--simulate", "1", "--json", "-o", path]
    data = json.loads(run("search", *NODE, *flags)[1])
    (found,) = data["simulated"]
    assert found["misfit"] is None
    assert data["refined"]["step_seconds"] <= data["refined"]["before_seconds"] == found["step_seconds"]
    assert list(load_plan(path).stage_layers) == data["refined"]["stage_layers"]


def test_a_memory_limit_binds(run: Run) -> None:
    """In GiB; what is no such number is refused."""
    data = json.loads(
        run("search", *NODE, "--schedule", "1f1b", "--memory-limit", "40", "--simulate", "0", "--json")[1]
    )
    assert data["limit_bytes"] == 40 * 2**30 > data["best"]["reserved_bytes"]
    assert "--memory-limit must be a positive number of GiB, got -1" in refused(
        run("search", *SMALL, "--memory-limit", "-1")
    )
    assert "fits nowhere" in refused(run("search", *SMALL, "--memory-limit", "2"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tp", "3"], "tp must divide the 32 query heads"),
        (["--tp", "x"], "tp must be a whole number of at least 1, got 'x'"),
        (["--profile", "none"], "a software profile must be one of"),
        (["--why", "tp"], "a layout must be written as tp=4 pp=8"),
        (["--top", "0"], "top must be at least 1"),
        (["--simulate", "-1"], "simulate must be at least 0"),
        (["--reach", "0.5"], "reach must be a number of at least 1"),
    ],
)
def test_a_bad_request_is_one_line(run: Run, flags: list[str], words: str) -> None:
    """Exit code 2 and the rule."""
    assert words in refused(run("search", *SMALL, *flags))


def test_help_has_an_example(run: Run) -> None:
    """With the command's own name."""
    code, out, _ = run("search", "--help")
    assert code == 0
    assert "example:\n  picotron search llama-3.1-405b" in out
