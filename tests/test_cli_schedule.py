"""``picotron schedule``: one schedule, several under one scale, and the verdict on a file."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from picotron.planner.catalogue import SCHEDULES, make_schedule
from picotron.planner.pipeline import schedule_to_csv
from tests.test_cli import Run, refused, run

__all__ = ["run"]
SIZE = ["--ranks", 4, "--microbatches", 8]


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_every_named_schedule_is_drawn(run: Run, name: str) -> None:
    """Plain text where it is piped: no escape, every rank, and the figures below."""
    code, text, err = run("schedule", name, *SIZE)
    assert (code, err) == (0, "")
    assert text.startswith(f"{name}: 4 ranks, 8 microbatches")
    assert sum(line.startswith("rank ") for line in text.splitlines()) == 4
    assert "activations held at most, by rank: " in text
    assert "\x1b" not in text


def test_colour_can_be_asked_for(run: Run) -> None:
    """Always means piped too."""
    assert "\x1b[" in run("schedule", "zb-h1", *SIZE, "--colour", "always")[1]


def test_stages_a_rank_are_a_choice_where_the_schedule_leaves_one(run: Run) -> None:
    """Interleaved takes any number, ZB-V has two."""
    data = json.loads(run("schedule", "interleaved", *SIZE, "--virtual-stages", 4, "--json")[1])
    assert data["num_stages"] == 16
    assert "virtual_stages of zb-v must be 2, got 3" in refused(
        run("schedule", "zb-v", *SIZE, "--virtual-stages", 3)
    )


def test_costs_change_the_picture(run: Run) -> None:
    """With W free ZB-H1's makespan is that of F and I alone."""
    assert json.loads(run("schedule", "afab", *SIZE, "--costs", "f=2,i=1,w=1", "--json")[1])["makespan"] == 44
    for costs, words in (("f", "must look like f=1"), ("x=1", "must name f, i, w, transfer, got x")):
        assert words in refused(run("schedule", "afab", *SIZE, "--costs", costs))
    assert "costs must be 0, or between 1e-30 and 1e+30, got" in refused(
        run("schedule", "afab", *SIZE, "--costs", "w=-1")
    )


def test_a_schedule_goes_into_files(run: Run, tmp_path: Path) -> None:
    """CSV with and without communication, picture and trace, all at once; they hold what they should."""
    files = {name: tmp_path / name for name in ("csv", "program-csv", "svg", "trace")}
    flags = [word for name, path in files.items() for word in (f"--{name}", path)]
    assert run("schedule", "zb-v", *SIZE, *flags)[0] == 0
    assert files["csv"].read_text() == schedule_to_csv(make_schedule("zb-v", 4, 8))
    assert "0SEND_F0" in files["program-csv"].read_text()
    ET.fromstring(files["svg"].read_text())
    assert json.loads(files["trace"].read_text())["traceEvents"]
    assert run("schedule", "zb-v", *SIZE, "--csv", "-") == (0, files["csv"].read_text(), "")


@pytest.mark.parametrize("flag", ["--csv", "--program-csv"])
def test_a_custom_schedule_is_read_from_either_format(run: Run, tmp_path: Path, flag: str) -> None:
    """What was written comes back as the same orders."""
    path = tmp_path / "mine.csv"
    run("schedule", "zb-h1", *SIZE, flag, path)
    data = json.loads(run("schedule", "custom", "--from", path, "--json")[1])
    named = json.loads(run("schedule", "zb-h1", *SIZE, "--json")[1])
    assert data["name"] == "custom"
    assert data["orders"] == named["orders"]
    assert "--virtual-stages must be the file's own 1, got 2" in refused(
        run("schedule", "custom", "--from", path, "--virtual-stages", 2)
    )


def test_several_schedules_share_a_scale(run: Run, tmp_path: Path) -> None:
    """Text, JSON and picture name each of them."""
    names, path = ["1f1b", "zb-h1", "zb-v"], tmp_path / "all.svg"
    text = run("schedule", "compare", *names, *SIZE, "--svg", path)[1]
    assert [line.split(":")[0] for line in text.splitlines() if "time units" in line] == [
        "zb-v",
        "zb-h1",
        "1f1b",
    ]
    assert "zb-v against zb-h1 against 1f1b" in path.read_text()
    data = json.loads(run("schedule", "compare", *names, *SIZE, "--json")[1])
    assert [each["makespan"] for each in data] == [33, 27, 25.5]


def test_the_verdict_on_a_good_file(run: Run, tmp_path: Path) -> None:
    """Valid, and under which semantics it runs."""
    path = tmp_path / "good.csv"
    path.write_text("0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n")
    code, text, err = run("schedule", "check", path)
    assert (code, err) == (0, "")
    assert text.startswith("valid: 2 ranks, 2 stages, 2 microbatches")
    assert json.loads(run("schedule", "check", path, "--json")[1])["runs_under"] == ["buffered", "batched"]
    code, text, err = run("schedule", "check", path, "--semantics", "rendezvous")
    assert code == 2
    assert "the ranks wait for each other (rendezvous): 0 -> 1 -> 0" in err
    assert run("schedule", "check", "1f1b", *SIZE)[0] == 0


def test_the_verdict_on_a_bad_file_marks_the_cell(run: Run, tmp_path: Path) -> None:
    """The grid on the output with its cell marked, one line on the errors, exit code 2."""
    path = tmp_path / "bad.csv"
    path.write_text("0F0,0B0,0F1,0B1\n1F0,1B1,1B0,1F1\n")
    code, text, err = run("schedule", "check", path)
    assert code == 2
    assert ">1B1<" in text
    assert err == "picotron: rank 1, position 1, action 1B1: backward needs 1F1 before it\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compare"], "compare needs schedules"),
        (["compare", "1f1b", "--csv", "x"], "compare takes no --csv"),
        (["check"], "check takes one .csv file, - or name"),
        (["check", "no/such.csv"], "a schedule must be a readable file"),
        (["custom"], "custom needs --from FILE"),
        (["1f1b", "zb-h1"], "one schedule at a time, got zb-h1 too"),
        (["1f1b", "--from", "x.csv"], "--from is for the schedule custom"),
        (["1f1b", *SIZE, "--width", 10], "--width must be at least 40 columns, got 10"),
        (["dualpipe", "--ranks", 4, "--microbatches", 3], "dualpipe"),
        (["zb-h3", *SIZE], "did you mean zb-h"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(run: Run, arguments: list[object], words: str) -> None:
    """With the remedy."""
    assert words in refused(run("schedule", *arguments))


def test_the_fastest_schedule_under_a_limit(run: Run) -> None:
    """With 1F1B's memory the optimum is ZB-H1's 27; the proof is told, and JSON has it too."""
    asked = ["optimise", *SIZE, "--memory-limit", 4]
    code, text, err = run("schedule", *asked)
    assert (code, err) == (0, "")
    assert "27 time units" in text
    assert "no schedule ends before 27; proven optimal" in text
    data = json.loads(run("schedule", *asked, "--json")[1])
    assert (data["makespan"], data["gap"], data["peak_bytes"]) == (27, 0, [4, 4, 4, 4])
    assert "the least that works for all ranks is 1" in refused(
        run("schedule", "optimise", *SIZE, "--memory-limit", 0)
    )
    assert "optimise needs --ranks" in refused(run("schedule", "optimise"))


def test_stages_may_differ(run: Run) -> None:
    """One number for each stage; another count is refused with the right one."""
    costs = ["--costs", "f=1:2,i=1:2,w=1"]
    size = ["--ranks", 2, "--microbatches", 2]
    data = json.loads(run("schedule", "1f1b", *size, *costs, "--json")[1])
    assert data["makespan"] == 1 + 2 * 5 + 2
    assert "--costs f must be one number or 4, got 2 of them" in refused(
        run("schedule", "1f1b", *SIZE, *costs)
    )
    assert "compare takes the costs of a whole rank" in refused(
        run("schedule", "compare", "afab", "1f1b", *size, *costs)
    )


def test_the_makespan_is_explained(run: Run) -> None:
    """For what each rank waits, and the path that sets the makespan."""
    text = run("schedule", "1f1b", *SIZE, "--explain")[1]
    assert "idle, waiting for  warm-up" in text
    assert "critical path: 0F0" in text


def test_names_may_stand_after_options(run: Run) -> None:
    """And the stages a rank are those of the schedules that leave a choice."""
    asked = ["compare", *SIZE, "--virtual-stages", 3, "1f1b", "--json", "interleaved"]
    data = json.loads(run("schedule", *asked)[1])
    assert [(each["name"], each["num_stages"]) for each in data] == [("1f1b", 4), ("interleaved", 12)]
    assert "unrecognized arguments: x --frob" in refused(run("schedule", "1f1b", *SIZE, "x", "--frob"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check", "1f1b", *SIZE, "--svg", "x.svg"], "check takes no --svg; leave it out"),
        (["1f1b", *SIZE, "--memory-limit", 3], "1f1b takes no --memory-limit"),
        (["optimise", *SIZE, "--semantics", "rendezvous"], "optimise takes no --semantics"),
        (["compare", "1f1b", "zb-h1", *SIZE, "--explain"], "compare takes no --explain"),
        (
            ["optimise", *SIZE, "--placement", "v", "--virtual-stages", 3],
            "--placement v has no --virtual-stages 3",
        ),
        (["optimise", "1f1b", *SIZE], "optimise takes no schedule, got 1f1b"),
        (["zb-h1", *SIZE, "--costs", "f=1e308"], "costs must be 0, or between 1e-30 and 1e+30"),
    ],
)
def test_nothing_is_ignored(run: Run, arguments: list[object], words: str) -> None:
    """An option that would change nothing is refused by name."""
    assert words in refused(run("schedule", *arguments))


def test_extreme_costs_and_many_ranks_are_drawn(run: Run) -> None:
    """A chart has at most a million columns and 128 ranks, and says so."""
    text = run("schedule", "1f1b", "--ranks", 2, "--microbatches", 2, "--costs", "f=1e15,i=1e-9,w=1e-9")[1]
    assert text.startswith("1f1b: 2 ranks")
    assert "... and 172 ranks more" in run("schedule", "1f1b", "--ranks", 300, "--microbatches", 2)[1]
