from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
from collections.abc import Callable
from inspect import Parameter, signature
from pathlib import Path
from types import SimpleNamespace

import pytest
from attrs import fields

import picotron
from picotron import cli
from picotron.cli.common import command
from picotron.cli.plan import PLAN_FLAGS, WORKLOAD_HELP
from picotron.errors import ExecutionError, PlanError
from picotron.planner.pipeline import schedule_to_csv
from picotron.planner.plan import plan
from picotron.planner.schedules import one_f_one_b
from picotron.planner.serialize import fingerprint, load_plan
from picotron.planner.workload import Workload

SMALL = [
    "llama-tiny",
    "--cluster",
    "cpu:1x4",
    "--global-batch",
    "4",
    "--seq-len",
    "32",
    "--precision",
    "fp32",
]
COMMANDS = ["plan", "show", "predict", "simulate", "schedule", "diff"]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command; gives its exit code, output and errors."""

    def picotron(*arguments: object) -> tuple[int, str, str]:
        code = cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return picotron


@pytest.fixture
def saved(run: Run, tmp_path: Path) -> Path:
    """A small plan's file."""
    path = tmp_path / "plan.json"
    assert run("plan", *SMALL, "--pp", 2, "-o", path)[0] == 0
    return path


def refused(result: tuple[int, str, str], code: int = 2) -> str:
    """The one line of a refusal, less its prefix."""
    assert result[:2] == (code, "")
    assert result[2].startswith("picotron: ")
    assert result[2].count("\n") == 1
    return result[2].removeprefix("picotron: ").rstrip("\n")


def test_flags_bear_the_names_of_plan_and_of_workload():
    """Whoever knows the functions knows the flags."""
    named = {name for name, p in signature(plan).parameters.items() if p.kind is Parameter.KEYWORD_ONLY}
    assert set(PLAN_FLAGS) == named
    assert set(WORKLOAD_HELP) == {field.name for field in fields(Workload)}


def test_a_plan_is_printed_and_saved(run: Run, tmp_path: Path):
    """The file holds the plan whose picture is printed."""
    path = tmp_path / "plan.json"
    code, out, err = run("plan", *SMALL, "--pp", 2, "--no-sequence-parallel", "--seed", 7, "-o", path)
    made = load_plan(path)
    assert (code, out, err) == (0, f"{made}\n", "")
    assert (made.topology.pp, made.topology.dp, made.workload.seed) == (2, 2, 7)


def test_every_flag_reaches_the_plan(run: Run):
    """Lists have commas between; what is left out is chosen by the plan."""
    flags = (
        "--pp 2 --tp 2 --dp 1 --order tp,pp,dp,cp --schedule afab --micro-batch 2 --sequence-parallel "
        "--stage-layers 4,2 --bucket-bytes 1024 --optimizer sgd --learning-rate 0.5 --decay-steps 9"
    )
    code, out, _ = run("plan", *SMALL, *flags.split(), "--json")
    data = json.loads(out)
    assert code == 0
    assert data["topology"]["order"] == ["tp", "pp", "dp", "cp"]
    assert (data["stage_layers"], data["bucket_bytes"], data["micro_batch"]) == ([4, 2], 1024, 2)
    assert (data["schedule"]["name"], data["sequence_parallel"], data["chosen"]) == ("afab", True, [])
    assert (data["workload"]["learning_rate"], data["workload"]["optimizer"]) == (0.5, "sgd")
    saving = "--dp 4 --zero-stage 2 --shard 2 --recompute full*2,none,selective*3 --offload yes*2,no*4"
    code, out, _ = run("plan", *SMALL, *saving.split(), "--json")
    data = json.loads(out)
    assert (code, data["zero_stage"], data["shard"]) == (0, 2, 2)
    assert data["recompute"] == ["full", "full", "none", "selective", "selective", "selective"]
    assert data["offload"] == [True, True, False, False, False, False]
    code, out, _ = run("plan", *SMALL, "--foreign", "mlp 1,attention 0", "--json")
    assert (code, json.loads(out)["foreign"]) == (0, ["mlp 1", "attention 0"])
    code, out, _ = run(
        "plan", *SMALL, *["--pp", "2", "--schedule", "interleaved", "--virtual-stages", "3"], "--json"
    )
    data = json.loads(out)
    assert (code, data["virtual_stages"], data["stage_layers"]) == (0, 3, [1] * 6)


@pytest.mark.parametrize("words", ["--offload maybe", "--offload yes*x", "--recompute full*99999999999"])
def test_layers_that_cannot_be_read_are_refused(run: Run, words: str):
    """A word and, with a star, how often; no more layers than a model may have."""
    code, _, error = run("plan", *SMALL, *words.split())
    assert code == 2 and "if repeated, got" in error


def test_a_schedule_of_several_stages_a_rank_is_planned_predicted_and_simulated(run: Run, tmp_path: Path):
    """By its name or from its CSV; what a rank's row is called names all its stages."""
    path, csv = tmp_path / "plan.json", tmp_path / "own.csv"
    code, out, _ = run("plan", *SMALL, "--pp", 2, "--schedule", "zb-v", "-o", path)
    assert code == 0
    assert "virtual_stages=2: stages a rank of zb-v" in out
    assert "stages 0,3: embedding, layer" in out
    assert run("predict", path)[0] == 0
    _, out, _ = run("simulate", path)
    table = [line.split()[0] for line in out.splitlines() if line]
    assert sorted(table[table.index("stages") + 1 :]) == ["0,3", "1,2"]
    csv.write_text(schedule_to_csv(load_plan(path).schedule))
    assert run("plan", *SMALL, "--pp", 2, "--schedule", csv, "--virtual-stages", 2)[0] == 0
    assert "virtual_stages=3 stages on each" in refused(
        run("plan", *SMALL, "--pp", 2, "--schedule", csv, "--virtual-stages", 3)
    )
    assert "dualpipe keeps two copies" in refused(run("plan", *SMALL, "--pp", 2, "--schedule", "dualpipe"))


def test_a_plan_goes_through_a_pipe(run: Run, monkeypatch: pytest.MonkeyPatch):
    """``plan -o - | show -`` is what plan prints, and show --json what it was given."""
    code, text, _ = run("plan", *SMALL, "-o", "-")
    assert code == 0
    picture = run("plan", *SMALL)[1]
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert run("show", "-") == (0, picture, "")
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert run("show", "-", "--json") == (0, text, "")


def test_a_step_is_drawn_as_svg(run: Run, saved: Path, tmp_path: Path):
    """Beside the picture, or alone on the standard output."""
    path = tmp_path / "step.svg"
    assert run("show", saved, "--svg", path) == run("show", saved)
    assert path.read_text().startswith("<svg ")
    assert run("show", saved, "--svg", "-") == (0, path.read_text().rstrip("\n") + "\n", "")


def test_a_bad_plan_on_the_standard_input_is_named(run: Run, monkeypatch: pytest.MonkeyPatch):
    """There is no file to name."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("{"))
    assert refused(run("show", "-")).startswith("standard input: a plan must be JSON")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff"), encoding="utf-8"))
    assert refused(run("show", "-")).startswith("standard input: a plan must be UTF-8 text")


def test_a_prediction_is_drawn_or_printed_as_json(run: Run, saved: Path):
    """The JSON is in base units and says of which plan and clock it is."""
    code, text, _ = run("predict", saved, "--json")
    data = json.loads(text)
    assert code == 0
    expected = (
        "step_seconds tokens_per_second tokens_per_second_per_device mfu mfu_causal hfu bubble_fraction "
        "exposed_communication_seconds peak_memory_bytes memory_by_rank memory_by_category capacity_bytes "
        "fits margin_bytes misfits fingerprint clock interval interval_of interval_source step_seconds_low "
        "step_seconds_high wide_step_seconds_high seconds_by_cause reserved_by_rank reserved_bytes"
    )
    assert set(expected.split()) <= set(data)
    assert data["fingerprint"] == fingerprint(load_plan(saved))
    assert data["tokens_per_second"] == pytest.approx(4 * 32 / data["step_seconds"])
    assert data["peak_memory_bytes"] == max(data["memory_by_rank"])
    assert sum(data["memory_by_category"].values()) == data["peak_memory_bytes"]
    assert data["margin_bytes"] == data["capacity_bytes"] - data["peak_memory_bytes"]
    assert (data["fits"], data["misfits"], data["clock"]) == (True, [], "predicted")
    assert data["interval"] is data["step_seconds_low"] is None  # of a CPU that nobody measured
    assert sum(data["seconds_by_cause"].values()) == pytest.approx(data["step_seconds"])
    assert (data["reserved_bytes"], data["framework_bytes"]) == (data["peak_memory_bytes"], 0)
    assert "days" not in data
    code, text, _ = run("predict", saved)
    assert code == 0
    assert "step time" in text


def test_so_many_tokens_take_so_many_days(run: Run, saved: Path):
    """Days are tokens over tokens per second; four devices take four hours an hour."""
    data = json.loads(run("predict", saved, "--json", "--tokens", "1e6")[1])
    assert data["days"] == pytest.approx(1e6 / data["tokens_per_second"] / 86_400)
    assert data["gpu_hours"] == pytest.approx(data["days"] * 24 * 4)
    assert "1e+06 tokens: " in run("predict", saved, "--tokens", "1e6")[1]
    for text in ("-1", "x", "inf", "nan"):
        assert "must be a positive number such as 15e12" in refused(run("predict", saved, "--tokens", text))


def test_a_trace_is_saved_or_printed(run: Run, saved: Path, tmp_path: Path):
    """It is Chrome's format; on the standard output it is alone."""
    trace = tmp_path / "trace.json"
    assert run("predict", saved, "--trace", trace)[0] == 0
    events = json.loads(trace.read_text())["traceEvents"]
    assert {"0F0", "1B1"} <= {event["name"] for event in events}
    assert json.loads(run("predict", saved, "--trace", "-")[1])["traceEvents"] == events


def test_a_step_is_simulated_with_faults(run: Run, saved: Path):
    """Both step times, how many classes of ranks there are, and who waits most."""
    healthy = json.loads(run("simulate", saved, "--json")[1])
    assert (healthy["slowdown"], healthy["faults"], healthy["num_classes"]) == (1.0, [], 2)
    assert healthy["step_seconds"] == json.loads(run("predict", saved, "--json")[1])["step_seconds"]
    assert healthy["fingerprint"] == fingerprint(load_plan(saved))
    faults = ["--slow", "1=2", "--slow-link", "0-2=3", "--pause", "3@4=0.5", "--slow", "1=1.5"]
    code, text, _ = run("simulate", saved, *faults, "--json")
    data = json.loads(text)
    assert code == 0
    assert data["faults"] == [
        {"kind": "Slow", "rank": 1, "link": None, "factor": 2.0},
        {"kind": "Slow", "rank": None, "link": [0, 2], "factor": 3.0},
        {"kind": "Pause", "rank": 3, "at": 4, "seconds": 0.5, "step": 0},
        {"kind": "Slow", "rank": 1, "link": None, "factor": 1.5},
    ]
    assert data["healthy_step_seconds"] == healthy["step_seconds"]
    assert data["slowdown"] == data["step_seconds"] / healthy["step_seconds"] > 1
    assert [one["rank"] for one in data["classes"]] == [0, 1, 2, 3]
    assert [one["stages"] for one in data["classes"]] == [[0], [0], [1], [1]]
    for one in data["classes"]:
        assert one["compute_seconds"] + one["idle_seconds"] == pytest.approx(data["step_seconds"])
    code, text, _ = run("simulate", saved, *faults)
    assert code == 0
    words = ("step time", "with faults", f"{data['slowdown'] - 1:+.1%}", "4 of 4 ranks", "who waits most")
    assert all(word in text for word in words)
    assert "with faults" not in run("simulate", saved)[1]
    assert " less)" in run("simulate", saved, "--slow", "0=0.5", "--slow", "1=0.5")[1]


def test_who_waits_most_comes_first(run: Run, saved: Path):
    """A slow rank is the last of the table: it waits least."""
    lines = run("simulate", saved, "--slow", "3=4")[1].splitlines()
    table = [line.split() for line in lines[lines.index(next(x for x in lines if "stage " in x)) + 1 :]]
    assert [row[:3] for row in table] == [["0", "2", "0"], ["1", "1", "2"], ["1", "1", "3"]]
    shares = [float(row[-1].rstrip("%")) for row in table]
    assert shares == sorted(shares, reverse=True)


def test_the_simulated_step_has_a_trace(run: Run, saved: Path, tmp_path: Path):
    """A process for each class of ranks, under the number of its first rank."""
    trace = tmp_path / "trace.json"
    assert run("simulate", saved, "--slow", "1=2", "--trace", trace)[0] == 0
    events = json.loads(trace.read_text())["traceEvents"]
    assert {event["pid"] for event in events} == {0, 1, 2, 3}
    assert json.loads(run("simulate", saved, "--slow", "1=2", "--trace", "-")[1])["traceEvents"] == events


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--slow", "1"], "argument --slow: must look like 3=1.5, got '1'"),
        (["--slow", "1=x"], "argument --slow: must end with a number, as 3=1.5 does, got '1=x'"),
        (["--slow", "1=-1"], "argument --slow: factor must be a positive finite number, got -1.0"),
        (["--slow", "4=2"], "the rank of a fault must be in [0, 4), got 4"),
        (["--slow-link", "1=2"], "argument --slow-link: must look like 0-8=4, got '1=2'"),
        (["--slow-link", "1-1=2"], "argument --slow-link: link must be None or two different ranks"),
        (["--pause", "1=2"], "argument --pause: must look like 2@10=0.5, got '1=2'"),
        (["--pause", "1@999=2"], "rank 1 has rows 0 to "),
        (["--pause", "1@0=inf"], "argument --pause: seconds must be a positive finite number, got inf"),
    ],
)
def test_a_fault_that_cannot_be_is_refused(run: Run, saved: Path, arguments, words):
    """With what it should look like."""
    assert words in refused(run("simulate", saved, *arguments))


def test_a_schedule_is_drawn_and_exported(run: Run, tmp_path: Path):
    """The CSV is what the schedule prints, and is read back as the same orders."""
    path = tmp_path / "orders.csv"
    code, drawn, _ = run("schedule", "1f1b", "--ranks", 2, "--microbatches", 3, "--csv", path)
    assert code == 0
    assert "rank 1" in drawn
    assert path.read_text() == "0F0,0F1,0B0,0F2,0B1,0B2\n1F0,1B0,1F1,1B1,1F2,1B2\n"
    assert run("schedule", path, "--csv", "-") == (0, path.read_text(), "")
    data = json.loads(run("schedule", path, "--json")[1])
    assert (data["name"], data["num_ranks"], data["num_microbatches"]) == ("orders", 2, 3)
    assert data["orders"][1] == ["1F0", "1B0", "1F1", "1B1", "1F2", "1B2"]
    assert data["peak_stage_activations"] == [2, 1]
    assert "--ranks must be the file's own 2, got 4" in refused(run("schedule", path, "--ranks", 4))


def test_a_schedule_that_is_unknown_or_has_no_size_is_refused(run: Run):
    """The message says which names are known, or which flags are missing."""
    assert "must be one of afab, 1f1b" in refused(run("schedule", "zigzag"))
    assert "needs --ranks and --microbatches" in refused(run("schedule", "1f1b", "--ranks", 2))
    assert "at least one rank" in refused(run("schedule", "1f1b", "--ranks", 0, "--microbatches", 1))


def test_a_plan_takes_the_orders_of_a_csv_file(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """``schedule --csv`` writes what ``plan --schedule`` reads."""
    path, text = tmp_path / "mine.csv", schedule_to_csv(one_f_one_b(2, 2))
    path.write_text(text)
    data = json.loads(run("plan", *SMALL, "--pp", 2, "--schedule", path, "--json")[1])
    assert (data["schedule"]["name"], data["schedule"]["csv"]) == ("mine", text)
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    data = json.loads(run("plan", *SMALL, "--pp", 2, "--schedule", "-", "--json")[1])
    assert (data["schedule"]["name"], data["schedule"]["csv"]) == ("custom", text)


def test_a_difference_has_its_path_and_both_values(run: Run, saved: Path, tmp_path: Path):
    """The text is one line a field; the JSON has path, left and right."""
    other = tmp_path / "other.json"
    run("plan", *SMALL, "--pp", 2, "--seed", 3, "-o", other)
    assert run("diff", saved, other) == (0, "workload.seed: 0 -> 3\n", "")
    found = json.loads(run("diff", saved, other, "--json")[1])
    assert found == [{"path": "workload.seed", "left": 0, "right": 3}]
    assert run("diff", saved, saved)[1] == f"no difference: both are {fingerprint(load_plan(saved))}\n"
    assert json.loads(run("diff", saved, saved, "--json")[1]) == []
    assert "twice" in refused(run("diff", "-", "-"))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_with_an_example(run: Run, name: str):
    """Help is one line a flag and ends with a command that can be copied."""
    code, text, err = run(name, "--help")
    assert (code, err) == (0, "")
    assert f"example:\n  picotron {name} " in text
    assert "--json" in text
    assert name in run("--help")[1]


def test_the_version_is_the_packages(run: Run):
    """One number, in one line."""
    assert run("--version") == (0, f"picotron {picotron.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "the following arguments are required: COMMAND; see picotron --help"),
        (["frob"], "invalid choice: 'frob'"),
        (["plan", "llama-tiny"], "required: --cluster, --global-batch, --seq-len; see picotron plan --help"),
        (["plan", *SMALL, "--tpp", "2"], "unrecognized arguments: --tpp 2"),
        (["plan", *SMALL, "--tp", "x"], "argument --tp: invalid int value: 'x'"),
        (["plan", *SMALL, "--stage-layers", "1,x"], "must be whole numbers with commas between, got '1,x'"),
        (["plan", *SMALL, "--order", "pp,dp"], "order must name each of"),
        (["plan", *SMALL, "--precision", "int8"], "argument --precision: invalid choice: 'int8'"),
        (["plan", *SMALL, "--tp", "3"], "pp * dp * cp * tp must equal the cluster's 4 devices"),
        (["plan", *SMALL, "--learning-rate", "nan"], "learning_rate must be a number"),
        (["plan", "nothing", *SMALL[1:]], "a model must be the name of a preset"),
        (["show", "no/such/plan.json"], "a plan must be a readable file, got No such file or directory"),
        (["predict", "no/such/plan.json"], "No such file or directory"),
        (["simulate", "no/such/plan.json"], "No such file or directory"),
        (["schedule", "no/such.csv"], "a schedule must be a readable file"),
    ],
)
def test_a_request_that_cannot_be_met_is_one_line_and_exit_code_2(run: Run, arguments, words):
    """No traceback, no usage page: what is wrong, and the remedy."""
    assert words in refused(run(*arguments))


@pytest.mark.parametrize("flag", ["-o", "--csv", "--trace"])
def test_a_file_that_cannot_be_written_is_one_line_and_exit_code_2(run: Run, saved: Path, flag, tmp_path):
    """The line names the path that was given."""
    target = tmp_path / "nowhere" / "out"
    arguments = {
        "-o": ["plan", *SMALL, "-o", target],
        "--csv": ["schedule", "1f1b", "--ranks", 1, "--microbatches", 1, "--csv", target],
        "--trace": ["predict", saved, "--trace", target],
    }
    assert f"No such file or directory at '{target}'" in refused(run(*arguments[flag]))


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (PlanError("tp must be 1,\n  got 2"), 2, "tp must be 1, got 2"),
        (ExecutionError("it stopped", rank=3, action="2B5"), 3, "rank 3, action 2B5: it stopped"),
        (OSError(28, "No space left on device"), 2, "[Errno 28] No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_goes_wrong_decides_the_exit_code(run: Run, monkeypatch, error, code, line):
    """2 for a request, 3 for an execution, 130 for an interrupt; always one line."""

    def execute(arguments: argparse.Namespace) -> None:
        raise error

    def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
        command(subparsers, "fail", execute, summary="fail", example="picotron fail", json_help=None)

    monkeypatch.setattr(cli, "COMMANDS", (SimpleNamespace(add_parser=add_parser),))
    assert refused(run("fail"), code) == line


def test_an_output_that_cannot_show_a_sign_gets_another(saved: Path, monkeypatch: pytest.MonkeyPatch):
    """An ASCII terminal shows question marks, not a traceback."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert cli.main(["show", str(saved)]) == 0
    assert b"?" in out.buffer.getvalue()


def test_a_reader_that_leaves_is_no_error():
    """``picotron ... | head`` ends quietly."""
    command_line = "-m picotron schedule afab --ranks 8 --microbatches 4000 --csv -"
    process = subprocess.Popen(
        [sys.executable, *command_line.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.read(8) == b"0F0,0F1,"
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=60) == 0


def test_the_module_is_the_command():
    """``python -m picotron`` runs main and exits with its code."""
    done = subprocess.run(
        [sys.executable, "-m", "picotron", "show", "no.json"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("picotron: a plan must be a readable file")
    assert done.stderr.count("\n") == 1
