"""Where milliseconds and bytes go, and what a change does to them, term by term."""

from __future__ import annotations

import json

import pytest
from attrs import evolve

from picotron.errors import PlanError
from picotron.planner.cluster import ClusterSpec
from picotron.planner.draw_explanation import MEANINGS, draw_explanation, draw_what_if
from picotron.planner.explain import explain, what_if
from picotron.planner.model import ModelSpec
from picotron.planner.plan import TrainingPlan, plan
from picotron.planner.predict import model_flops
from picotron.planner.what_if import changed, other_device, other_network, single_changes
from picotron.planner.workload import Workload


def made(cluster: str = "h100:4x8", **options: object) -> TrainingPlan:
    """A plan of Llama 3.1 8B, by default with every degree above one."""
    degrees: dict[str, object] = {"tp": 4, "pp": 2, "zero_stage": 1, **options}
    work = Workload(global_batch=64, seq_len=8192)
    return plan(ModelSpec.from_hf("llama-3.1-8b"), ClusterSpec.parse(cluster), work, **degrees)


def test_parts_sum_to_the_whole():
    """Seconds by cause to the step, bytes by class to the peak; rates and MFU follow from the step."""
    one = explain(made(), changes=0)
    assert sum(value for _, value in one.seconds) == one.step_seconds
    assert sum(size for _, size in one.bytes) == one.peak_bytes
    assert one.peak_bytes + one.margin_bytes == one.capacity_bytes
    assert one.tokens_per_second == pytest.approx(64 * 8192 / one.step_seconds)
    assert one.mfu == pytest.approx(
        model_flops(one.plan, "full") / one.step_seconds / (32 * 989.4e12), rel=1e-3
    )
    assert {cause for cause, _ in one.seconds} == set(MEANINGS)
    assert json.loads(one.to_json())["seconds"] == dict(one.seconds)


def test_a_difference_is_the_sum_of_its_terms():
    """Cause by cause and class by class, with another layout, network and profile at once."""
    slow = other_network(made().cluster, network=0.5, latency=2)
    found = what_if(made(), {"tp": 2}, cluster=slow, profile="megatron-2025", profile_after="megatron-2021")
    before, after = found.before, found.after
    difference = after.step_seconds - before.step_seconds
    assert found.difference_seconds == pytest.approx(difference, abs=1e-12 * before.step_seconds)
    assert sum(size for _, size in found.bytes) == after.peak_bytes - before.peak_bytes
    assert dict(found.seconds)["tensor"] == dict(after.seconds)["tensor"] - dict(before.seconds)["tensor"]
    assert (after.profile, after.plan.topology.tp) == ("megatron-2021", 2)


def test_nothing_changed_is_no_difference():
    """Every term is zero, and the text says nothing."""
    found = what_if(made())
    assert {value for _, value in (*found.seconds, *found.bytes)} == {0.0}
    assert draw_what_if(found).count("  nothing") == 2


def test_a_faster_network_shortens_transfers_alone():
    """Twice the rate between nodes: gradients cross it, tensor parallelism in a node does not."""
    one = made(tp=4, pp=1)
    found = dict(what_if(one, cluster=other_network(one.cluster, network=2)).seconds)
    assert found["data"] <= 0
    others = [abs(value) for cause, value in found.items() if cause not in ("data", "pipeline_transfer")]
    assert max(others) < 1e-12
    assert dict(what_if(one, cluster=other_network(one.cluster, bandwidth=2)).seconds)["tensor"] < 0


def test_the_chart_has_a_line_for_each_cause():
    """Plain text of at most the width, shares that add up; colour only where it is asked for."""
    one = explain(made(), profile="megatron-2025")
    text = draw_explanation(one)
    assert max(map(len, text.splitlines())) <= 100
    assert "\x1b" not in text
    assert "\x1b[38;5;" in draw_explanation(one, colour=True)
    for cause, value in one.seconds:
        assert (f"\n  {cause} " in text) == bool(value)
    head = text.splitlines()[0]
    assert head == "llama-3.1-8b on h100:4x8, dp=4 pp=2 tp=4, under megatron-2025"
    html = one._repr_html_()
    assert html.count("<tr>") == sum(bool(value) for _, value in (*one.seconds, *one.bytes))


def test_the_best_single_changes_save_and_fit():
    """Each is faster and fits, the fastest first, and does what it says when it is made."""
    one = explain(made(), changes=2)
    assert len(one.changes) == 2
    seconds = [change.step_seconds for change in one.changes]
    assert seconds == sorted(seconds)
    assert seconds[-1] < one.step_seconds
    assert all(change.peak_bytes <= one.capacity_bytes for change in one.changes)
    name, _, value = one.changes[0].setting.partition("=")
    setting = next(
        own for own in single_changes(one.plan) if {k: str(v) for k, v in own.items()} == {name: value}
    )
    assert explain(changed(one.plan, setting)[0], changes=0).step_seconds == seconds[0]


def test_what_does_not_fit_is_told_what_would_make_it():
    """Of a plan that is too large, changes that fit, though slower."""
    one = explain(made("h100:1x8", tp=1, pp=1, zero_stage=0))
    assert one.margin_bytes < 0
    assert all(change.peak_bytes <= one.capacity_bytes for change in one.changes)
    assert "TOO MUCH" in str(one)
    assert one.changes
    assert "single changes that make it fit" in str(one)


@pytest.mark.parametrize(
    ("settings", "field", "value", "follows"),
    [
        ({"tp": 8}, "topology.dp", 2, "dp=2 (was 4): the devices that pp * cp * tp leave"),
        ({"tp": 1}, "sequence_parallel", False, "sequence_parallel=False (was True)"),
        ({"virtual_stages": 2}, "schedule_name", "interleaved", "schedule=interleaved (was 1f1b)"),
        ({"schedule": "zb-v"}, "virtual_stages", 2, "virtual_stages=2 (was 1)"),
        ({"pp": 4}, "num_stages", 4, "least FLOPs on the dearest rank"),
        ({"micro_batch": 2}, "num_microbatches", 8, "num_microbatches=8 (was 16)"),
        ({"cluster": "h100:8x8"}, "topology.dp", 8, "dp=8 (was 4)"),
        ({"model": "llama-3.1-70b", "recompute": "full"}, "model.num_layers", 80, "stage_layers="),
    ],
)
def test_what_must_follows(settings: dict[str, object], field: str, value: object, follows: str):
    """A change leads to a valid plan, and what else had to change is said."""
    other, sentences = changed(made(), settings)
    found: object = other
    for name in field.split("."):
        found = getattr(found, name)
    assert found == value
    assert any(follows in sentence for sentence in sentences), sentences


@pytest.mark.parametrize(
    ("settings", "left"),
    [({"tp": 8}, "chunked"), ({"sequence_parallel": False}, "weight_gradient"), ({"tp": 1}, "none")],
)
def test_what_is_left_of_an_overlap(settings: dict[str, object], left: str):
    """Without sequence parallelism nothing is gathered, and without tensor parallelism nothing is summed."""
    assert changed(made(tensor_overlap="chunked"), settings)[0].tensor_overlap == left


def test_what_is_set_is_kept_or_refused():
    """What does not divide, an unknown name, a factor without reason: PlanError, never another value."""
    one = made()
    for settings, words in (
        ({"tp": 3}, "must equal the cluster's 32 devices"),
        ({"dp": 8}, "try dp=4"),
        ({"tpp": 4}, "did you mean tp"),
        ({"global_batch": 63}, "must divide global_batch 63"),
        ({"stage_layers": (31, 2)}, "stage_layers must give"),
    ):
        with pytest.raises(PlanError) as refusal:
            changed(one, settings)
        assert words in str(refusal.value)
    for factor in (0, -1, float("nan"), 1e9):
        with pytest.raises(PlanError, match="network must be a factor"):
            other_network(one.cluster, network=factor)
    with pytest.raises(PlanError, match="plan must be a TrainingPlan"):
        explain("plan.json")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"settings": 3}, "settings must be values by name"),
        ({"settings": {"dp": "x"}}, "got 'x'"),
        ({"settings": {"cluster": None}}, "cluster must be a ClusterSpec"),
        ({"cluster": ["h100"]}, "cluster must be a ClusterSpec"),
        ({"profile": 3}, "a software profile must be one of"),
        ({"interval": -1}, "interval must be a relative error"),
        ({"asked": 1}, "asked must be words"),
    ],
)
def test_what_is_no_question_is_refused(arguments: dict[str, object], words: str):
    """With the rule and what was given, whatever its type."""
    with pytest.raises(PlanError, match=words):
        what_if(made(), **arguments)
    with pytest.raises(PlanError, match="changes must be a whole number"):
        explain(made(), changes=-1)


def test_another_device_runs_the_same_software():
    """A profile is no part of a machine: it goes along."""
    one = made()
    one = evolve(one, cluster=evolve(one.cluster, profile="megatron-2025"))
    assert other_device(one.cluster, "h200").profile.name == "megatron-2025"


def test_a_custom_schedule_follows_only_where_its_orders_fit():
    """It stays under another sharding; under other microbatches it is replaced, and that is said."""
    own = changed(made(), {"schedule": made(schedule="zb-h1").schedule})[0]
    assert own.schedule_csv is not None
    assert changed(own, {"zero_stage": 2})[0].schedule_csv == own.schedule_csv
    other, sentences = changed(own, {"micro_batch": 2})
    assert other.schedule_csv is None
    assert any(sentence.startswith("schedule=1f1b") for sentence in sentences)


def test_another_device_has_as_many_of_its_own_machine():
    """Nodes and devices stay, links and peaks are the other machine's."""
    found = other_device(made().cluster, "h200")
    assert (found.nodes, found.devices_per_node, found.device.name) == (4, 8, "h200")
