"""Weights in from, and out to, folders of safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import picotron.runtime.weights as weights_room
from picotron.errors import PlanError
from picotron.planner.model import ModelSpec, parameters
from picotron.planner.plan import TrainingPlan
from picotron.runtime.backend import Backend
from picotron.runtime.layout import WeightSource, assemble
from picotron.runtime.pipeline import Session
from picotron.runtime.simulated import simulate
from picotron.runtime.weights import save_weights, saved_weights
from tests.runtime.models import FAMILIES, random_weights, tiny_model, tiny_plan

safetensors = pytest.importorskip("safetensors.torch")


def save(made: TrainingPlan, folder: Path, weights: WeightSource = random_weights) -> list[Any]:
    """What saving on every rank returned, or the PlanError it raised."""

    def main(backend: Backend) -> object:
        try:
            return save_weights(Session(made, backend, weights), folder)
        except PlanError as error:
            return error

    return simulate(main, made.topology.world_size)


def whole(made: TrainingPlan, source: WeightSource) -> dict[str, torch.Tensor]:
    """Whole tensors of sessions that read ``source``."""
    parts = simulate(lambda backend: Session(made, backend, source).weights, made.topology.world_size)
    return assemble(made, parts)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_many_ranks_save_other_ranks_read(family: str, tied: bool, tmp_path: Path) -> None:
    """From dp 2, pp 2, tp 2 to one rank and to tp 4 over key/value copies: the same tensors to the bit."""
    model = tiny_model(family, tied=tied)
    save(tiny_plan(model, dp=2, pp=2, tp=2), tmp_path / "saved")
    expected = {p.name: random_weights(p) for p in tiny_plan(model).layout}
    for parallel in ({}, {"tp": 4}, {"pp": 2}):
        found = whole(tiny_plan(model, **parallel), saved_weights(tmp_path / "saved"))
        assert found.keys() == expected.keys()
        assert all(found[name].equal(expected[name]) for name in expected)


@pytest.mark.parametrize("schedule", ["interleaved", "zb-v"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_ranks_of_several_stages_save_what_one_rank_reads(schedule: str, tied: bool, tmp_path: Path) -> None:
    """Each of two pipeline ranks writes one file with all its stages; a table of both ends stands in one."""
    model = tiny_model("gpt2", layers=4, tied=tied)
    made = tiny_plan(model, pp=2, tp=2, schedule=schedule)
    save(made, tmp_path / "saved")
    names = [f"model-0000{rank}-of-00002.safetensors" for rank in (1, 2)]
    assert files(tmp_path / "saved") == ["config.json", *names, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {p.name: names[p.rank] for p in made.layout if p.tied_to is None}
    for other in (tiny_plan(model), made, tiny_plan(model, pp=4)):
        found = whole(other, saved_weights(tmp_path / "saved"))
        assert all(found[p.name].equal(random_weights(p)) for p in tiny_plan(model).layout)


def test_one_stage_is_one_file(tmp_path: Path) -> None:
    """Weights and configuration, every parameter under its own name, whole and in the plan's precision."""
    made = tiny_plan(tiny_model("llama"), dp=2, tp=2)
    assert save(made, tmp_path / "saved") == [tmp_path / "saved"] * 4
    assert files(tmp_path / "saved") == ["config.json", "model.safetensors"]
    tensors = safetensors.load_file(tmp_path / "saved" / "model.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        p.name: p.shape for p in parameters(made.model)
    }
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float64}
    assert not list(tmp_path.glob(".*"))


def test_each_stage_is_a_file_of_the_index(tmp_path: Path) -> None:
    """Three stages: three files, and an index of all tensors but the tied copy, with their bytes in all."""
    made = tiny_plan(tiny_model("gpt2", layers=3, tied=True), pp=3)
    save(made, tmp_path / "saved")
    names = [f"model-0000{stage}-of-00003.safetensors" for stage in (1, 2, 3)]
    assert files(tmp_path / "saved") == ["config.json", *names, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 8 * made.model.num_parameters
    assert index["weight_map"] == {
        p.name: names[p.stage] for p in sorted(made.layout, key=lambda p: p.name) if p.tied_to is None
    }
    assert "lm_head.weight" not in index["weight_map"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_configuration_gives_the_model_back(family: str, tmp_path: Path) -> None:
    """A saved folder is a model: from_hf reads it, with the precision noted."""
    made = tiny_plan(tiny_model(family, tied=True), pp=2)
    save(made, tmp_path / "saved")
    assert ModelSpec.from_hf(tmp_path / "saved", name=made.model.name) == made.model
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["torch_dtype"] == "float64"


def test_a_second_save_replaces_the_first(tmp_path: Path) -> None:
    """The new folder has nothing of the old one."""
    model = tiny_model("llama")
    save(tiny_plan(model, pp=2), tmp_path / "saved")
    save(tiny_plan(model), tmp_path / "saved", lambda p: torch.full(p.shape, 3.0))
    assert files(tmp_path / "saved") == ["config.json", "model.safetensors"]
    assert all(
        tensor.eq(3).all() for tensor in whole(tiny_plan(model), saved_weights(tmp_path / "saved")).values()
    )
    assert files(tmp_path) == ["saved"]


def test_what_an_interrupted_save_left_is_no_obstacle(tmp_path: Path) -> None:
    """A folder aside from an earlier attempt is cleared away."""
    (tmp_path / ".saved.partial").mkdir()
    (tmp_path / ".saved.partial" / "model.safetensors").write_bytes(b"half")
    save(tiny_plan(tiny_model("llama")), tmp_path / "saved")
    assert files(tmp_path) == ["saved"]
    assert files(tmp_path / "saved") == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("parallel", [{}, {"dp": 2, "pp": 2, "tp": 2}], ids=["one rank", "eight ranks"])
def test_every_rank_hears_that_a_folder_cannot_be_written(parallel: dict[str, int], tmp_path: Path) -> None:
    """A file stands where the folder's parent should be: a PlanError on all ranks, and nothing is lost."""
    (tmp_path / "file").write_text("kept")
    made = tiny_plan(tiny_model("llama"), **parallel)
    found = save(made, tmp_path / "file" / "saved")
    assert len(found) == made.topology.world_size
    for error in found:
        assert isinstance(error, PlanError)
        assert str(error).startswith("the weights' folder must be writable, got ")
    assert (tmp_path / "file").read_text() == "kept"


def test_a_full_disk_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One stage of two cannot write its file: every rank raises, the earlier weights stand."""
    model = tiny_model("llama")
    save(tiny_plan(model), tmp_path / "saved", lambda p: torch.full(p.shape, 3.0))

    def full(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        if "00002" in path.name:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("picotron.runtime.weights._write_tensors", full)
    for error in save(tiny_plan(model, pp=2, tp=2), tmp_path / "saved"):
        assert isinstance(error, PlanError)
        assert str(error).endswith("No space left on device")
    kept = whole(tiny_plan(model), saved_weights(tmp_path / "saved"))
    assert all(tensor.eq(3).all() for tensor in kept.values())
    assert files(tmp_path) == ["saved"]


@pytest.mark.parametrize("where", ["config.json", "rename"])
def test_a_disk_that_refuses_at_the_end_leaves_the_old_folder(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All stages are written, then the configuration or the last rename fails: as if nothing had begun."""
    model = tiny_model("llama")
    save(tiny_plan(model), tmp_path / "saved", lambda p: torch.full(p.shape, 3.0))
    flush, rename = weights_room._flush, Path.rename

    def refuse_flush(path: Path) -> None:
        if path.name == where:
            raise OSError(28, "No space left on device")
        flush(path)

    def refuse_rename(path: Path, target: Path) -> Path:
        if where == "rename" and path.name.endswith(".partial"):
            raise OSError(18, "Invalid cross-device link")
        return rename(path, target)

    monkeypatch.setattr(weights_room, "_flush", refuse_flush)
    monkeypatch.setattr(Path, "rename", refuse_rename)
    found = save(tiny_plan(model, pp=2, tp=2), tmp_path / "saved")
    assert [type(error) for error in found] == [PlanError] * 4
    assert len(set(map(str, found))) == 1
    assert files(tmp_path) == ["saved"]
    kept = whole(tiny_plan(model), saved_weights(tmp_path / "saved"))
    assert all(tensor.eq(3).all() for tensor in kept.values())


def test_an_error_without_words_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal that says nothing stops the save all the same."""

    def refuse(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        raise OSError

    monkeypatch.setattr(weights_room, "_write_tensors", refuse)
    (error,) = save(tiny_plan(tiny_model("llama")), tmp_path / "saved")
    assert isinstance(error, PlanError)
    assert files(tmp_path) == []


def test_a_path_without_weights_is_refused(tmp_path: Path) -> None:
    """Missing, empty, no safetensors at all, or a broken index."""
    (tmp_path / "text.safetensors").write_text("nothing of the kind")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model.safetensors.index.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    for name in ("nowhere", "empty", "text.safetensors", "broken"):
        with pytest.raises(PlanError, match=rf"a \.safetensors file or a folder with .*{name}"):
            saved_weights(tmp_path / name)


def test_missing_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    """What the model needs and the file lacks, and both shapes where they differ."""
    model = tiny_model("llama")
    save(tiny_plan(model), tmp_path / "saved")
    source = saved_weights(tmp_path / "saved")
    for other, message in (
        (
            tiny_model("qwen2"),
            r"must hold model\.layers\.0\.self_attn\.q_proj\.bias; it is not among their 21",
        ),
        (
            tiny_model("llama", vocab=66),
            r"model\.embed_tokens\.weight must have shape \(66, 24\), got \(67, 24\)",
        ),
    ):
        with pytest.raises(PlanError, match=message):
            simulate(lambda backend, other=other: Session(tiny_plan(other), backend, source), 1)


def test_a_single_file_is_read_by_its_path(tmp_path: Path) -> None:
    """A .safetensors file needs no folder or configuration."""
    made = tiny_plan(tiny_model("llama"))
    expected = {p.name: random_weights(p) for p in made.layout}
    safetensors.save_file(expected, tmp_path / "weights.safetensors")
    found = whole(made, saved_weights(tmp_path / "weights.safetensors"))
    assert all(found[name].equal(expected[name]) for name in expected)
