from __future__ import annotations

import json
from pathlib import Path

import pytest
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st

from picotron.errors import PlanError
from picotron.planner.plan import TrainingPlan
from picotron.planner.serialize import diff, fingerprint, load_plan, plan_from_json, plan_to_json, save_plan
from property_tests.strategies_serialize import changed_values, json_values, plans


def loaded(text: str) -> TrainingPlan | None:
    """The plan in a text, or None where it is refused in one line; nothing else may happen."""
    try:
        return plan_from_json(text)
    except PlanError as error:
        assert str(error)
        return None


@given(plans())
def test_a_plan_is_what_its_json_reads_back(plan):
    """Saving and loading is the identity, on values and on bytes."""
    text = plan_to_json(plan)
    again = plan_from_json(text)
    assert again == plan
    assert plan_to_json(again) == text
    assert diff(plan, again) == ()


@given(plans(), plans())
def test_plans_are_equal_exactly_when_their_bytes_are(left, right):
    """So the fingerprint stands for the plan, and diff is empty for equal plans only."""
    same = left == right
    assert (plan_to_json(left) == plan_to_json(right)) == same
    assert (fingerprint(left) == fingerprint(right)) == same
    assert (diff(left, right) == ()) == same


@given(plans())
def test_equal_numbers_are_written_alike(plan):
    """0, 0.0 and -0.0, or 1 and 1.0, do not tell two plans apart."""
    work = plan.workload
    twin = evolve(plan, workload=evolve(work, beta1=float(work.beta1), beta2=work.beta2 or -0.0))
    assert twin == plan
    assert plan_to_json(twin) == plan_to_json(plan)


@given(plans(), st.data())
def test_any_changed_value_is_refused_or_is_another_plan(plan, data):
    """A change that loads shows in the fingerprint and in diff; one that does not is a PlanError."""
    changed = data.draw(changed_values(json.loads(plan_to_json(plan))))
    found = loaded(json.dumps(changed))
    if found is not None:
        assert (found == plan) == (fingerprint(found) == fingerprint(plan)) == (diff(plan, found) == ())
        assert plan_from_json(plan_to_json(found)) == found


@given(plans())
def test_every_difference_is_a_field_that_differs(plan):
    """Each path leads, from both plans, to the two values that it names."""
    other = evolve(
        plan, bucket_bytes=7, workload=evolve(plan.workload, seed=3, beta1=0.25), chosen=("by hand",)
    )
    for difference in diff(plan, other):
        left, right = plan, other
        for name in difference.path.split("."):
            left, right = getattr(left, name), getattr(right, name)
        assert (left, right) == (difference.left, difference.right)
        assert left != right


@given(json_values() | st.text())
def test_what_is_no_plan_is_refused(value):
    """Any JSON value, and any text."""
    assert loaded(json.dumps(value)) is None
    assert loaded(str(value)) is None


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file to write to, again and again."""
    return tmp_path_factory.mktemp("plans") / "plan.json"


@settings(max_examples=3, deadline=None)
@given(plan=plans(max_degree=2))
def test_a_plan_cut_at_any_byte_is_refused(path, plan):
    """Only the last line's end can go: all else of the file is needed."""
    text = plan_to_json(plan)
    assert text.isascii()
    assert loaded(text[:-1]) == plan
    for length in range(len(text) - 1):
        assert loaded(text[:length]) is None
    save_plan(plan, path)
    path.write_bytes(path.read_bytes()[: len(text) // 2])
    with pytest.raises(PlanError, match=r"plan\.json: a plan must be JSON"):
        load_plan(path)


@given(plan=plans(), position=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255))
def test_a_plan_with_any_byte_spoilt_is_refused_or_is_a_plan(path, plan, position, byte):
    """Not even a file that is no text makes loading fail in another way."""
    content = bytearray(plan_to_json(plan).encode())
    content[int(position * len(content))] = byte
    path.write_bytes(content)
    try:
        found = load_plan(path)
    except PlanError as error:
        assert "plan.json" in str(error)
    else:
        assert plan_from_json(plan_to_json(found)) == found
