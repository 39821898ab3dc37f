"""``picotron export`` and ``picotron import``: to another framework's arguments and back."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from picotron.planner.serialize import diff, load_plan
from tests.test_cli import SMALL, Run, refused, run, saved

__all__ = ["run", "saved"]


def test_a_plan_goes_to_megatron_and_comes_back(run: Run, saved: Path, tmp_path: Path) -> None:
    """The script that is written reads back as the plan."""
    script, again = tmp_path / "train.sh", tmp_path / "again.json"
    assert run("export", saved, "--to", "megatron", "-o", script) == (0, "", "")
    code, text, err = run(
        "import", script, "--from", "megatron", "--cluster", "cpu", "--name", "llama-tiny", "-o", again
    )
    assert code == 0
    assert text.startswith("llama-tiny")
    assert "picotron: ignored, no matter to a plan: " in err
    assert {one.path for one in diff(load_plan(saved), load_plan(again))} <= {"chosen"}
    words = json.loads(run("export", saved, "--to", "megatron", "--json", "--steps", 7)[1])["arguments"]
    assert words[words.index("--train-iters") + 1] == "7"
    asked = ["--args", " ".join(words), "--from", "megatron", "--cluster", "cpu:1x4", "--name", "llama-tiny"]
    assert run("import", *asked, "-o", "-")[1] == again.read_text()


def test_what_cannot_be_expressed_goes_to_the_standard_error(run: Run, tmp_path: Path) -> None:
    """And a schedule that PyTorch has no name for into a file beside the configuration."""
    path, toml = tmp_path / "plan.json", tmp_path / "plan.toml"
    run("plan", *SMALL, "--pp", 2, "--schedule", "zb-h1", "-o", path)
    code, out, err = run("export", path, "--to", "megatron")
    assert code == 0
    assert "# NOT EXPRESSED: schedule 'zb-h1'" in out
    assert "picotron: not expressed: schedule 'zb-h1'" in err
    assert run("export", path, "--to", "torchtitan", "-o", toml)[0] == 0
    section = tomllib.loads(toml.read_text())["parallelism"]
    assert (tmp_path / section["pipeline_parallel_schedule_csv"]).read_text().startswith("0F0")
    assert "written beside a saved configuration" in run("export", path, "--to", "torchtitan")[2]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ([], "import needs a FILE or --args, one of the two"),
        (["--args", "nothing"], "arguments must have a --flag among them"),
        (["--args", "--num-layers 4"], "--seq-length must be given"),
        (["--args", "--seq-length $S"], "--var NAME=VALUE"),
        (["--args=--bf16", "--var", "S"], "--var must look like NAME=VALUE, got 'S'"),
    ],
)
def test_bad_requests_are_refused(run: Run, asked: list[str], words: str) -> None:
    """One line, and exit code 2."""
    assert words in refused(run("import", *asked, "--from", "megatron", "--cluster", "h100"))


def test_export_refuses_what_it_does_not_know(run: Run, saved: Path) -> None:
    """Another framework, no steps, another profile."""
    assert "invalid choice: 'jax'" in refused(run("export", saved, "--to", "jax"))
    assert "--steps: must be a whole number" in refused(
        run("export", saved, "--to", "megatron", "--steps", 0)
    )
    assert "a software profile must be one of" in refused(
        run("export", saved, "--to", "megatron", "--profile", "none")
    )
