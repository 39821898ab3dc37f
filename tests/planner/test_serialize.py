from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve, fields

from picotron.errors import PlanError
from picotron.planner.catalogue import SCHEDULES, make_schedule
from picotron.planner.cluster import ClusterSpec
from picotron.planner.model import ModelSpec
from picotron.planner.pipeline import schedule_from_csv
from picotron.planner.plan import TrainingPlan, plan
from picotron.planner.records import read_json, write_text
from picotron.planner.serialize import (
    Difference,
    diff,
    fingerprint,
    load_plan,
    plan_from_json,
    plan_to_json,
    save_plan,
    schedule_digest,
)
from picotron.planner.workload import Workload

TWO_ROUNDS = "0F0,0F1,0B1,0B0\n1F0,1F1,1B1,1B0\n"  # backward in the order of no known schedule


def small_plan(preset: str = "llama-tiny", **options: Any) -> TrainingPlan:
    work = Workload(global_batch=4, seq_len=32, precision="fp32")
    return plan(ModelSpec.from_hf(preset), ClusterSpec.parse("cpu:1x4"), work, **{"pp": 2, **options})


def custom_plan() -> TrainingPlan:
    return small_plan(dp=2, schedule=schedule_from_csv(TWO_ROUNDS, name="two-rounds"))


def changed(path: str, value: object, made: TrainingPlan | None = None) -> str:
    """The JSON of a small plan with one value, at a dotted path, put in or taken out (``...``)."""
    data = json.loads(plan_to_json(made or small_plan()))
    *above, last = path.split(".")
    inner = data
    for name in above:
        inner = inner[name]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    "preset", ["llama-tiny", "gpt2", "qwen3-8b", "mixtral-8x7b", "deepseek-v3", "llama-3.2-1b"]
)
def test_a_plan_of_every_kind_of_model_is_read_back_equal(preset):
    """Nested classes, None, tuples and names survive."""
    made = small_plan(preset)
    again = plan_from_json(plan_to_json(made))
    assert again == made
    assert plan_to_json(again) == plan_to_json(made)
    assert isinstance(again.stage_layers, tuple)
    assert isinstance(again.topology.order, tuple)


def test_what_every_layer_has_alike_is_saved_once():
    """One value for all layers, or one for each; a file that says nothing means none."""
    alike, unlike = (
        small_plan(recompute="full", offload=True),
        small_plan(recompute=("full",) + ("none",) * 5),
    )
    data = json.loads(plan_to_json(alike))
    assert (data["recompute"], data["offload"], data["zero_stage"], data["shard"]) == ("full", True, 0, None)
    assert json.loads(plan_to_json(unlike))["recompute"] == ["full"] + ["none"] * 5
    assert [plan_from_json(plan_to_json(made)) for made in (alike, unlike)] == [alike, unlike]
    for name in ("recompute", "offload", "zero_stage", "shard"):
        del data[name]
    assert plan_from_json(json.dumps(data)) == small_plan()


def test_foreign_segments_are_saved_by_name():
    """And told apart; a file that says nothing has none."""
    made = small_plan(schedule="zb-h1", foreign=["mlp 1", "attention 0"])
    assert plan_from_json(plan_to_json(made)) == made
    bare = evolve(made, foreign=())
    assert plan_from_json(changed("foreign", ..., made)) == bare
    assert [str(one) for one in diff(bare, made)] == ["foreign: () -> ('mlp 1', 'attention 0')"]
    with pytest.raises(PlanError, match=r"foreign must name segments among attention 0, .*, got 'mlp 6'"):
        plan_from_json(changed("foreign", ["mlp 6"], made))


def test_keys_are_sorted_and_the_version_is_written():
    """The text is canonical: reading and writing it with sorted keys changes nothing."""
    text = plan_to_json(small_plan())
    data = json.loads(text)
    assert data["schema_version"] == 1
    assert json.dumps(data, sort_keys=True, indent=2) + "\n" == text


def test_a_schedule_is_saved_as_name_parameters_and_digest():
    """1F1B on one rank with one microbatch is 0F0,0B0; nothing of it is written but the digest."""
    made = plan(
        ModelSpec.from_hf("llama-tiny"), ClusterSpec.parse("cpu:1x4"), Workload(global_batch=4, seq_len=8)
    )
    assert json.loads(plan_to_json(made))["schedule"] == {
        "name": "1f1b",
        "num_ranks": 1,
        "num_microbatches": 1,
        "sha256": hashlib.sha256(b"0F0,0B0\n").hexdigest(),
        "csv": None,
    }


@pytest.mark.parametrize("name", [name for name, row in SCHEDULES.items() if not row.bidirectional])
@pytest.mark.parametrize("custom", [False, True], ids=["named", "custom"])
def test_a_plan_of_every_schedule_is_read_back_equal(name: str, custom: bool):
    """With its stages a rank, and the same orders; by name or as orders of one's own."""
    schedule = make_schedule(name, 2, 3) if custom else name
    made = plan(
        ModelSpec.from_hf("llama-tiny"),
        ClusterSpec.parse("cpu:1x2"),
        Workload(global_batch=3, seq_len=8),
        pp=2,
        schedule=schedule,
    )
    again = plan_from_json(plan_to_json(made))
    assert again == made
    assert again.schedule.orders == made.schedule.orders
    assert json.loads(plan_to_json(made))["virtual_stages"] == made.num_stages // 2


def test_a_file_without_stages_a_rank_has_one():
    """Plans saved before ranks could hold several stages are read as what they were."""
    made = small_plan()
    assert plan_from_json(changed("virtual_stages", ..., made)) == made


def test_a_custom_schedule_is_saved_whole():
    """Its orders are in the file, and the plan that is read back runs them."""
    made = custom_plan()
    saved = json.loads(plan_to_json(made))["schedule"]
    assert (saved["name"], saved["csv"]) == ("two-rounds", TWO_ROUNDS)
    assert saved["sha256"] == schedule_digest(made.schedule)
    again = plan_from_json(plan_to_json(made))
    assert again == made
    assert str(again.schedule) == TWO_ROUNDS


def test_equal_plans_have_equal_bytes():
    """0 and 0.0, 1 and True, 0.0 and -0.0 are equal, and are written alike."""
    made = small_plan()
    for equal in (
        evolve(made, workload=evolve(made.workload, beta1=0, max_grad_norm=1)),
        evolve(made, workload=evolve(made.workload, beta1=-0.0, max_grad_norm=1.0)),
    ):
        assert equal == evolve(made, workload=evolve(made.workload, beta1=0.0))
        assert plan_to_json(equal) == plan_to_json(evolve(made, workload=evolve(made.workload, beta1=0.0)))
        assert fingerprint(equal) != fingerprint(made)


def test_the_fingerprint_is_the_start_of_the_sha256_of_the_json():
    """Anybody with the file can compute it."""
    made = small_plan()
    assert fingerprint(made) == hashlib.sha256(plan_to_json(made).encode()).hexdigest()[:12]


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("schema_version", 2, "$.schema_version: must be 1, "),
        ("schema_version", True, "$.schema_version: must be 1, "),
        ("schema_version", ..., "$.schema_version: required field is missing"),
        ("schedule", ..., "$.schedule: required field is missing"),
        (
            "schedule.name",
            "zigzag",
            f"$.schedule.name: must be one of {', '.join(SCHEDULES)}, got 'zigzag'",
        ),
        ("virtual_stages", 2, "$.stage_layers: stage_layers must give 4 stages all 6 layers, got (3, 3)"),
        ("virtual_stages", 0, "$.virtual_stages: virtual_stages must be a whole number of at least 1, got 0"),
        ("schedule.name", "afab", "$.schedule.sha256: must be '"),
        ("schedule.num_ranks", 3, "$.schedule.num_ranks: must be 2, "),
        ("schedule.num_microbatches", "2", "$.schedule.num_microbatches: must be an integer, got '2'"),
        ("schedule.csv", "0F0,0X0\n", "$.schedule.csv: line 1: an action must look like 2F0"),
        ("schedule.csv", "0F0,0B0\n", "$: the schedule must have 2 ranks and 2 microbatches, got 1 and 1"),
        ("schedule_name", "1f1b", "$.schedule_name: no such field; it belongs in $.schedule"),
        ("workload.global_batch", ..., "$.workload.global_batch: required field is missing"),
        (
            "workload.global_batch",
            0,
            "$.workload.global_batch: global_batch must be a whole number of at least",
        ),
        ("workload.global_batch", "4", "$.workload.global_batch: must be an integer, got '4'"),
        ("workload.global_batch", True, "$.workload.global_batch: must be an integer, got True"),
        ("workload.precision", "fp7", "$.workload.precision: must be one of bf16, fp16, fp32, fp64, fp8, "),
        ("zero_stage", 9, "$.zero_stage: zero_stage must be at most 3, got 9"),
        ("shard", 1, "$.shard: shard needs a zero_stage of 1, 2 or 3, got shard=1 with zero_stage=0"),
        ("recompute", "half", "$.recompute: recompute must be one of none, selective, full, or one of them"),
        ("recompute", ["half"], "$.recompute[0]: must be one of none, selective, full, got 'half'"),
        ("recompute", None, "$.recompute: recompute must be one of none, selective, full, or one of them"),
        ("offload", ["yes"], "$.offload[0]: must be true or false, got 'yes'"),
        ("offload", [True], "$.offload: offload must be True or False, or one of them for each of the "),
        ("workload.sed", 1, "$.workload.sed: no such field; did you mean seed?"),
        ("workload.beta1", 2, "$.workload.beta1: beta1 must be a number in [0.0, 1.0), got 2.0"),
        ("workload.beta1", 10**400, "$.workload.beta1: must be a number that a float can hold"),
        ("topology.order", "pp", "$.topology.order: must be a list, got 'pp'"),
        ("topology.order", ["pp", 1], "$.topology.order[1]: must be text, got 1"),
        ("topology.order", ["pp"], "$.topology.order: order must name each of "),
        ("topology.dp", 4, "$: pp * dp * cp * tp must equal the cluster's 4 devices, got "),
        ("stage_layers", [1, None], "$.stage_layers[1]: must be an integer, got None"),
        ("stage_layers", [1, 9], "$.stage_layers: stage_layers must give 2 stages all "),
        ("sequence_parallel", 1, "$.sequence_parallel: must be true or false, got 1"),
        ("model.experts", 8, "$.model.experts: must be an object, got 8"),
        ("model.experts", {}, "$.model.experts.num_experts: required field is missing"),
        ("model.head_dim", -1, "$.model.head_dim: head_dim must be a positive integer, got -1"),
        ("cluster.efficiency.link", 2, "Efficiency.link must be a fraction in (0, 1], got 2.0"),
    ],
)
def test_a_bad_field_is_refused_by_its_path_in_the_validators_own_words(path, value, words):
    """Whatever is wrong with a file, the reader learns where and what."""
    with pytest.raises(PlanError) as error:
        plan_from_json(changed(path, value))
    assert words in str(error.value)


def test_every_bad_field_is_named_at_once():
    """Two mistakes are one error with two paths."""
    text = changed("workload.seed", "x").replace('"micro_batch": 1', '"micro_batch": "1"')
    with pytest.raises(PlanError, match=r"\$\.workload\.seed: .*; \$\.micro_batch: ") as error:
        plan_from_json(text)
    assert "\n" not in str(error.value)


def test_a_custom_schedule_that_was_edited_is_refused():
    """The digest holds the orders that were saved, even where the new ones are valid."""
    text = changed("schedule.csv", "0F1,0F0,0B0,0B1\n1F1,1F0,1B0,1B1\n", custom_plan())
    with pytest.raises(PlanError, match=r"\$\.schedule\.sha256: must be "):
        plan_from_json(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "a plan must be JSON, got Expecting value"),
        ("[]", r"\$: must be an object, got \[\]"),
        ("[" * 100_000, "a plan must be JSON"),
        ('{"schema_version": NaN}', "NaN, which is not a JSON number"),
        ('{"schema_version": 1, "schema_version": 1}', "the key 'schema_version' twice"),
        ("9" * 5000, "a plan must be JSON"),
        ('{"a": "\x00"}', "a plan must be JSON"),
    ],
)
def test_what_is_not_one_json_object_is_refused(text, words):
    """No text makes loading fail in any other way."""
    with pytest.raises(PlanError, match=words):
        plan_from_json(text)


def test_loading_names_the_file_and_a_remedy(tmp_path: Path):
    """A cut file, a missing one, a folder and one that is not text are told apart."""
    path = tmp_path / "plan.json"
    path.write_text(plan_to_json(small_plan())[:100])
    with pytest.raises(PlanError, match=r"plan\.json: a plan must be JSON, .*; make the plan again"):
        load_plan(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(PlanError, match=r"a plan must be a file of UTF-8 text, got .*plan\.json"):
        load_plan(path)
    with pytest.raises(PlanError, match=r"a plan must be a readable file, got No such file .*other\.json"):
        load_plan(tmp_path / "other.json")
    with pytest.raises(PlanError, match="got Is a directory"):
        load_plan(tmp_path)


def test_a_saved_plan_is_loaded_equal_and_leaves_nothing_beside_it(tmp_path: Path):
    """Saving over a file replaces it; the file written aside is gone."""
    path = tmp_path / "plan.json"
    save_plan(small_plan(), path)
    save_plan(custom_plan(), str(path))
    assert load_plan(path) == custom_plan()
    assert [found.name for found in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_save_that_fails_leaves_the_file_that_was_there(tmp_path: Path, monkeypatch, failing):
    """A full disk destroys nothing, and the half-written file is removed."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "plan.json"
    save_plan(small_plan(), path)
    monkeypatch.setattr(os, failing, full)
    with pytest.raises(PlanError, match="a plan must go to a file that can be written, got No space left"):
        save_plan(custom_plan(), path)
    monkeypatch.undo()
    assert load_plan(path) == small_plan()
    assert [found.name for found in tmp_path.iterdir()] == ["plan.json"]


def test_a_save_aside_a_file_of_the_same_name_touches_neither(tmp_path: Path):
    """What another process is writing is not ours to remove."""
    aside = tmp_path / f".plan.json.{os.getpid()}.part"
    aside.write_text("another's")
    with pytest.raises(PlanError, match="File exists"):
        save_plan(small_plan(), tmp_path / "plan.json")
    assert aside.read_text() == "another's"


def test_a_link_stays_a_link_and_a_device_a_device(tmp_path: Path):
    """Renaming would replace them."""
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    link.symlink_to(real)
    save_plan(small_plan(), link)
    assert link.is_symlink()
    assert load_plan(real) == small_plan()
    write_text(os.devnull, "gone", "a text")
    assert not Path(os.devnull).is_file()


def test_a_folder_that_is_missing_is_named(tmp_path: Path):
    """The message bears the path that the caller gave, not that of the file written aside."""
    with pytest.raises(PlanError, match=r"No such file or directory at '.*/nowhere/plan\.json'"):
        save_plan(small_plan(), tmp_path / "nowhere" / "plan.json")
    with pytest.raises(PlanError, match="Is a directory"):
        save_plan(small_plan(), tmp_path)


def test_a_difference_names_the_field_and_both_values():
    """Fields of fields have dotted paths; what is derived is not listed."""
    left = small_plan()
    right = evolve(left, workload=evolve(left.workload, seed=7), micro_batch=2)
    assert diff(left, right) == (
        Difference(path="workload.seed", left=0, right=7),
        Difference(path="micro_batch", left=1, right=2),
    )
    assert list(map(str, diff(left, right))) == ["workload.seed: 0 -> 7", "micro_batch: 1 -> 2"]
    assert diff(left, small_plan()) == ()


def test_a_part_that_only_one_plan_has_is_one_difference():
    """Experts beside None are named by their class, and not field by field."""
    found = {d.path: d for d in diff(small_plan("llama-3.2-1b"), small_plan("mixtral-8x7b"))}
    assert found["model.experts"].left is None
    assert str(found["model.experts"]) == "model.experts: None -> Experts"
    assert str(found["model.name"]) == "model.name: 'llama-3.2-1b' -> 'mixtral-8x7b'"


def test_a_different_schedule_is_named():
    """The name and the orders of a custom schedule are fields of the plan."""
    assert {d.path for d in diff(small_plan(dp=2), custom_plan())} == {"schedule_name", "schedule_csv"}


def test_a_plan_with_more_fields_is_still_saved_whole():
    """Every field of a plan is in its JSON, under its own name or in the schedule."""
    data = json.loads(plan_to_json(small_plan()))
    names = {field.name for field in fields(TrainingPlan)}
    assert names - {"schedule_name", "schedule_csv"} == set(data) - {"schema_version", "schedule"}


def test_json_is_read_as_it_stands():
    """A truth value, a number and a text keep their types."""
    assert read_json('{"a": [true, 1, 1.5, "x", null]}', "a text") == {"a": [True, 1, 1.5, "x", None]}
