"""``picotron train``, ``compare`` and ``calibrate`` as a user types them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import picotron as pt
from picotron.cli import main
from picotron.cli.train import DEFAULT_MICRO_BATCH, DEFAULT_MODEL, DEFAULT_WORKLOAD, chosen_backend


def small_plan(folder: Path, **workload: object) -> Path:
    """The file of a plan for eight ranks that trains in a second."""
    work = pt.Workload(**{"global_batch": 4, "seq_len": 32, "precision": "fp32", **workload})  # type: ignore[arg-type]
    cluster = pt.ClusterSpec.preset("cpu", devices_per_node=8)
    plan = pt.plan(pt.ModelSpec.from_hf("llama-tiny"), cluster, work, dp=2, pp=2, tp=2)
    pt.save_plan(plan, folder / "plan.json")
    return folder / "plan.json"


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_without_arguments_a_llama_trains_on_eight_simulated_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Plan, prediction, progress, a falling loss, and predicted beside measured with every promise kept."""
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--steps", "4", "--save-every", "2"]) == 0
    out, err = capsys.readouterr()
    assert "llama-tiny on 8 x" in out and "predicted beside measured" in out and "differs" not in out
    assert "step 1/4" in err and "tokens/s" in err
    run = tmp_path / "runs/llama-tiny-1"
    plan = pt.load_plan(run / "plan.json")
    assert (plan.topology.dp, plan.topology.pp, plan.topology.tp) == (2, 2, 2)
    assert losses(run)[-1] < losses(run)[0]
    assert sorted(path.name for path in (run / "weights").iterdir()) == ["step-000002", "step-000004"]
    assert main(["compare", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["promises_kept"] is True
    assert main(["compare", str(run)]) == 0
    assert "virtual time" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "nowhere.txt"], "the data path must exist, got 'nowhere.txt'; name a text file"),
        (["--steps", "0"], "steps must be a whole number of at least 1, got 0"),
        (["--out", "/dev/null/run"], "the run folder must be writable"),
        (["--weights", "nowhere"], "weights must be a .safetensors file or a folder"),
    ],
)
def test_a_bad_request_is_one_line_and_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
):
    """Rule, value and remedy on the standard error, and nothing else."""
    plan = small_plan(tmp_path)
    assert main(["train", str(plan), "--json", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and words in err


def test_a_plan_that_cannot_run_yet_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A mixture of experts in fp16 is priced, and both reasons are told before anything opens."""
    cluster = pt.ClusterSpec.preset("h100")
    plan = pt.plan(
        pt.ModelSpec.from_hf("mixtral-8x7b"),
        cluster,
        pt.Workload(global_batch=8, seq_len=64, precision="fp16"),
    )
    pt.save_plan(plan, tmp_path / "plan.json")
    assert main(["train", str(tmp_path / "plan.json"), "--out", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert "the family mixtral" in err and "precision fp16" in err
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_ends_with_code_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The last good weights are saved, and the line names rank, action and step."""
    plan = small_plan(tmp_path, learning_rate=1e30, max_grad_norm=0.0)
    assert main(["train", str(plan), "--out", str(tmp_path / "run"), "--json"]) == 3
    assert "action NORM" in capsys.readouterr().err
    assert list((tmp_path / "run/weights").glob("step-*/model.safetensors.index.json"))


def test_torchrun_gives_the_losses_of_the_simulated_run(tmp_path: Path):
    """Eight gloo processes run the very plan; the promises hold there too."""
    plan = small_plan(tmp_path)
    assert main(["train", str(plan), "--steps", "3", "--out", str(tmp_path / "simulated"), "--json"]) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "8"]
    command = [
        *launcher,
        "-m",
        "picotron",
        "train",
        str(plan),
        "--steps",
        "3",
        "--out",
        str(tmp_path / "gloo"),
    ]
    done = subprocess.run(
        [*command, "--json"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["promises_kept"] is True
    assert losses(tmp_path / "gloo") == pytest.approx(losses(tmp_path / "simulated"), abs=1e-5)


def test_an_interrupt_leaves_a_readable_folder(tmp_path: Path):
    """Ctrl-C ends every rank with code 130; plan and metrics so far are whole."""
    plan = small_plan(tmp_path)
    command = [sys.executable, "-m", "picotron", "train", str(plan), "--steps", "100000"]
    run = tmp_path / "run"
    process = subprocess.Popen(
        [*command, "--out", str(run)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (run / "metrics.jsonl").exists():
        time.sleep(0.1)
    while time.monotonic() < deadline and len((run / "metrics.jsonl").read_text().splitlines()) < 3:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.decode().splitlines()[-1].endswith("picotron: interrupted")
    assert pt.load_plan(run / "plan.json")
    assert len(losses(run)) >= 3


def test_the_default_plan_is_a_few_million_parameters_on_eight_ranks():
    """What the README promises of ``picotron train``."""
    model = pt.ModelSpec.from_hf(DEFAULT_MODEL)
    assert 2e6 < model.num_parameters < 9e6
    assert DEFAULT_WORKLOAD.global_batch % (2 * DEFAULT_MICRO_BATCH) == 0


def test_the_backend_follows_the_launcher(monkeypatch: pytest.MonkeyPatch):
    """Alone: simulated. Under torchrun without a GPU for each process: gloo."""
    monkeypatch.delenv("RANK", raising=False)
    assert chosen_backend(None) == "simulated"
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert chosen_backend(None) == "gloo"
    assert chosen_backend("simulated") == "simulated"


def test_under_torchrun_a_plan_must_be_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Each rank measuring for itself would make eight different plans."""
    monkeypatch.setenv("RANK", "0")
    assert main(["train"]) == 2
    assert "under torchrun every rank must have the same plan" in capsys.readouterr().err


def test_calibrate_writes_a_cluster_that_plans_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The file is a --cluster for the planner."""
    file = tmp_path / "here.json"
    assert main(["calibrate", "--ranks", "2", "--seconds", "0.2", "-o", str(file)]) == 0
    assert "measuring matmul" in capsys.readouterr().err
    cluster = pt.ClusterSpec.parse(str(file))
    assert (cluster.num_devices, cluster.device.kind) == (2, "cpu")


def test_a_launchers_environment_that_makes_no_sense_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A rank that is no number names the variable."""
    monkeypatch.setenv("RANK", "x")
    assert main(["train", "plan.json"]) == 2
    assert "the environment's RANK must be a whole number, got 'x'" in capsys.readouterr().err
