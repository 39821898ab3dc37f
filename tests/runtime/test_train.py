"""A training run leaves what it promises, and nothing it finds is lost."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from attrs import evolve
from safetensors.torch import load_file, save_file

import picotron as pt
from picotron.errors import ExecutionError, PlanError
from picotron.planner.interval import Interval
from picotron.planner.plan import TrainingPlan
from picotron.runtime.compare import compare
from picotron.runtime.data import ByteText
from picotron.runtime.pipeline import LossError
from picotron.runtime.record import measurement_data, measurement_from_json
from picotron.runtime.run import run
from picotron.runtime.train import new_run_folder, train
from picotron.runtime.weights import saved_weights

MODEL = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
TEXT = ByteText(np.frombuffer(b"the plan is the program; " * 40, dtype=np.uint8), 16)


def a_plan(**workload: object) -> TrainingPlan:
    work = pt.Workload(
        **{"global_batch": 4, "seq_len": 16, "precision": "fp32", "learning_rate": 1e-2, **workload}  # type: ignore[arg-type]
    )
    cluster = pt.ClusterSpec.preset("cpu", devices_per_node=8)
    return pt.plan(pt.ModelSpec.from_hf(MODEL), cluster, work, dp=2, pp=2, tp=2)


def test_a_run_folder_holds_plan_metrics_weights_timeline_and_measurement(tmp_path: Path):
    """Every file that the folder promises is there, whole, and says what the run returned."""
    plan = a_plan()
    folder = tmp_path / "run"
    measurement = train(plan, TEXT, folder, steps=5, save_every=2)
    assert measurement is not None
    assert pt.load_plan(folder / "plan.json") == plan
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert [line["loss"] for line in lines] == list(measurement.losses)
    assert {"step", "loss", "tokens", "seconds", "grad_norm"} <= lines[0].keys()
    assert lines[0]["tokens"] == 4 * 16
    assert [path.name for path in sorted((folder / "weights").iterdir())] == ["step-000004", "step-000005"]
    events = json.loads((folder / "timeline.json").read_text())["traceEvents"]
    assert {event["pid"] for event in events} == set(range(8))
    again = measurement_from_json((folder / "measurement.json").read_text())
    assert measurement_data(again) == measurement_data(measurement)


def test_predicted_and_measured_agree_in_all_that_is_promised():
    """Payload bytes, order of rows and live bytes are equal; a measurement of another kind is not hidden."""
    plan = a_plan()
    measurement = run(plan, TEXT, steps=3)
    comparison = compare(pt.predict(plan), measurement)
    assert comparison.promises_kept
    assert "live bytes at segment ends" in str(comparison)
    lost = evolve(measurement, payload_bytes_by_rank=((),) * 8)
    assert not compare(pt.predict(plan), lost).promises_kept
    shuffled = evolve(measurement, rows_by_rank=tuple(row[::-1] for row in measurement.rows_by_rank))
    assert not compare(pt.predict(plan), shuffled).promises_kept


def test_measured_seconds_are_held_against_the_range_of_known_runs():
    """A line for half of them and one for 80 %, of CPU seconds; none where no error is known."""
    plan = a_plan()
    measurement, predicted = run(plan, TEXT, steps=2), pt.predict(plan)
    assert not any("known runs" in line.quantity for line in compare(predicted, measurement).lines)
    for half, verdict in ((1e-9, "outside"), (9.0, "within")):
        sure = evolve(predicted, interval=Interval(half=half, most=9.5, source="here"))
        lines = {line.quantity: line for line in compare(sure, measurement).lines}
        assert lines["CPU seconds a step, range of half of known runs"].verdict == verdict
        assert lines["CPU seconds a step, range of 80 % of known runs"].verdict == "within"
        assert compare(sure, measurement).promises_kept


def test_a_run_never_goes_into_a_folder_that_holds_one(tmp_path: Path):
    """What an earlier run left stays as it was."""
    folder = tmp_path / "run"
    train(a_plan(), TEXT, folder, steps=1)
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(PlanError, match="a run needs a folder of its own"):
        train(a_plan(), TEXT, folder, steps=1)
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert new_run_folder(tmp_path, "run") == tmp_path / "run-1"


def test_a_loss_that_is_not_finite_stops_with_the_last_good_weights_saved(tmp_path: Path):
    """The step that went wrong changes no weight; those of the step before are saved, all finite."""
    plan = a_plan(learning_rate=1e30, max_grad_norm=0.0)
    folder = tmp_path / "run"
    with pytest.raises(LossError, match="must be finite, got"):
        train(plan, TEXT, folder, steps=20)
    steps_done = len((folder / "metrics.jsonl").read_text().splitlines())
    (saved,) = (folder / "weights").iterdir()
    assert saved.name == f"step-{steps_done:06d}"
    tensors = [t for file in saved.glob("*.safetensors") for t in load_file(file).values()]
    assert tensors and all(math.isfinite(float(tensor.sum())) for tensor in tensors)


def test_a_skipped_step_is_told_and_read_back(tmp_path: Path):
    """After a first step too long: their lines, the measurement and what is read of it have no number."""
    plan = a_plan(learning_rate=1e30, max_grad_norm=0.0)
    measured = train(plan, TEXT, tmp_path / "run", steps=3)
    assert measured is not None and measured.skipped == (1, 2)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [False, True, True]
    again = measurement_from_json((tmp_path / "run/measurement.json").read_text())
    assert again.skipped == (1, 2)
    assert lines[1]["grad_norm"] is None and math.isnan(again.grad_norms[1])


def test_saved_weights_continue_where_they_were(tmp_path: Path):
    """A session on the saved weights has, on the next samples, the loss that the next step had."""
    plan = a_plan(optimizer="sgd")
    whole = train(plan, TEXT, tmp_path / "whole", steps=4, save_every=2)
    assert whole is not None
    train(plan, TEXT, tmp_path / "half", steps=2)
    next_loss = _loss_of_next_step(plan, tmp_path / "half/weights/step-000002")
    assert next_loss == pytest.approx(whole.losses[2], abs=1e-6)


def _loss_of_next_step(plan: TrainingPlan, folder: Path) -> float:
    """The loss of the samples of step 2, from the weights in ``folder``."""
    from picotron.runtime.data import step_batches
    from picotron.runtime.pipeline import Session
    from picotron.runtime.simulated import simulate

    def rank_main(backend):
        session = Session(plan, backend, saved_weights(folder))
        return session.step(step_batches(plan, TEXT, consumed=2 * 4, dp_index=session.where.dp)).loss

    return simulate(rank_main, 8)[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"steps": 1, "save_every": -1}, "save_every must be a whole number of at least 0, got -1"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_written(tmp_path: Path, arguments: dict, words: str):
    """One line with rule and value, and no folder."""
    with pytest.raises(PlanError, match=words):
        train(a_plan(), TEXT, tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()


def test_an_unwritable_folder_is_one_line(tmp_path: Path):
    """The run folder cannot be made below a file."""
    (tmp_path / "file").write_text("")
    with pytest.raises(PlanError, match="the run folder must be writable"):
        train(a_plan(), TEXT, tmp_path / "file" / "run", steps=1)


def test_weights_that_do_not_fit_are_named(tmp_path: Path):
    """A missing tensor, a wrong shape and a path without weights each say what is wrong."""
    with pytest.raises(PlanError, match="weights must be a .safetensors file or a folder"):
        saved_weights(tmp_path)
    save_file({"model.embed_tokens.weight": torch.zeros(3, 3)}, tmp_path / "model.safetensors")
    source = saved_weights(tmp_path)
    embedding, *rest = a_plan().layout
    with pytest.raises(PlanError, match=r"must have shape \(256, 32\), got \(3, 3\)"):
        source(embedding)
    with pytest.raises(PlanError, match="must hold model.layers.0"):
        source(rest[0])


def test_a_failed_save_leaves_the_weights_that_were_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """When the disk refuses, every rank stops with one error and the earlier folder stays whole."""
    import picotron.runtime.weights as room

    plan = a_plan()
    real = room._write_tensors
    calls = []

    def refuse_later(path: Path, tensors: dict) -> None:
        calls.append(path)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        real(path, tensors)

    monkeypatch.setattr(room, "_write_tensors", refuse_later)
    with pytest.raises(PlanError, match="No space left on device"):
        train(plan, TEXT, tmp_path / "run", steps=2, save_every=1)
    (kept,) = (tmp_path / "run/weights").glob("step-*")
    assert kept.name == "step-000001"
    assert all(load_file(file) for file in kept.glob("*.safetensors"))


def test_a_measurement_that_is_cut_short_is_a_plan_error(tmp_path: Path):
    """Reading back half a file names the rule."""
    measurement = run(a_plan(), TEXT, steps=1)
    text = json.dumps(measurement_data(measurement))
    for cut in (0, 1, len(text) // 2, len(text) - 1):
        with pytest.raises(PlanError):
            measurement_from_json(text[:cut])
    with pytest.raises(PlanError, match=r"\$.losses"):
        measurement_from_json(json.dumps({**json.loads(text), "losses": "none"}))


def test_a_world_of_another_size_is_refused_before_the_folder_is_made(tmp_path: Path):
    """Eight ranks are planned; two come."""
    from picotron.runtime.simulated import simulate
    from picotron.runtime.train import _train_rank

    plan = a_plan()
    with pytest.raises(ExecutionError, match="the plan needs 8 ranks, got a world of 2"):
        simulate(lambda world: _train_rank(plan, world, TEXT, tmp_path / "run", 1, 0, None, None), 2)
    assert not (tmp_path / "run").exists()


def test_a_disk_that_safetensors_reports_full_is_one_error_on_every_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its own error is no OSError, and must not go round the ranks' agreement."""
    import safetensors.torch
    from safetensors import SafetensorError

    def refuse(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: File too large")

    monkeypatch.setattr(safetensors.torch, "save_file", refuse)
    with pytest.raises(PlanError, match="the weights' folder must be writable.*File too large"):
        train(a_plan(), TEXT, tmp_path / "run", steps=1)


@pytest.mark.parametrize(
    ("door", "words"),
    [
        (lambda: pt.plan("llama-tiny", None, None), "model must be a ModelSpec, got str"),
        (lambda: pt.predict(None), "plan must be a TrainingPlan, got NoneType"),
        (lambda: run(None, TEXT, steps=1), "plan must be a TrainingPlan, got NoneType"),
        (lambda: run(a_plan(), 5, steps=1), "data must be a dataset or a path to text, got int"),
        (lambda: run(a_plan(), [np.array([1.5])], steps=1), "a sample must be a 1-D array of whole numbers"),
        (lambda: compare(1, 2), "compare takes a Prediction and a Measurement, got int and int"),
        (lambda: a_plan(seed=2**64), "seed must be at most"),
        (lambda: a_plan(beta1=1), r"beta1 must be a number in \[0.0, 1.0\)"),
    ],
)
def test_wrong_kinds_of_value_are_refused_at_the_door(door, words: str):
    """Rule and value, not a traceback from the depths."""
    with pytest.raises(PlanError, match=words):
        door()


@pytest.mark.parametrize("stage", [0, 1])
def test_one_stage_that_cannot_be_written_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int
):
    """Whichever stage's file fails, the folder does not appear, and nothing half-written stays."""
    import picotron.runtime.weights as room

    real = room._write_tensors

    def refuse_one(path: Path, tensors: dict) -> None:
        if path.name.startswith(f"model-{stage + 1:05d}"):
            raise OSError(28, "No space left on device")
        real(path, tensors)

    monkeypatch.setattr(room, "_write_tensors", refuse_one)
    with pytest.raises(PlanError, match="No space left on device"):
        train(a_plan(), TEXT, tmp_path / "run", steps=1)
    assert list((tmp_path / "run/weights").iterdir()) == []
