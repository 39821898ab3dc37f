"""What a field takes, and how a value is shown where it is refused."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
from attrs import field, frozen

from picotron.errors import PlanError
from picotron.planner.cluster import ClusterSpec, LinkSpec, load_cluster
from picotron.planner.model import ModelSpec
from picotron.planner.serialize import load_plan
from picotron.planner.topology import Topology
from picotron.planner.validators import (
    LARGEST,
    SHOWN_CHARACTERS,
    are_words,
    as_float,
    as_tuple,
    between,
    must_be,
    of_class_must_be,
    shown,
    whole,
)
from picotron.planner.workload import FORMATS, MOMENTS, OptimizerName, Precision, Workload

HUGE = 2**16609  # more digits than Python writes


@frozen
class Sample:
    number: Any = field(default=1, validator=whole(1, 9))
    share: Any = field(default=0.0, converter=as_float, validator=between(0.0, 2.0))
    anything: Any = field(default=None, validator=must_be("short", lambda value: len(repr(value)) < 10))
    named: Any = field(default=1, validator=of_class_must_be("1", lambda value: value == 1))
    words: Any = field(default=(), converter=as_tuple, validator=must_be("a sequence of texts", are_words))


def refusal(**fields: Any) -> str:
    with pytest.raises(PlanError) as caught:
        Sample(**fields)
    return str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"number": 0}, "number must be a whole number of at least 1, got 0"),
        ({"number": 10}, "number must be at most 9, got 10"),
        ({"number": True}, "number must be a whole number of at least 1, got True"),
        ({"number": 2.0}, "number must be a whole number of at least 1, got 2.0"),
        ({"number": HUGE}, "number must be at most 9, got a number of 16610 bits"),
        ({"share": -1}, "share must be a number in [0.0, 2.0], got -1.0"),
        ({"share": 2.5}, "share must be a number in [0.0, 2.0], got 2.5"),
        ({"share": float("nan")}, "share must be a number in [0.0, 2.0], got nan"),
        ({"share": True}, "share must be a number in [0.0, 2.0], got True"),
        ({"share": HUGE}, "share must be a number in [0.0, 2.0], got a number of 16610 bits"),
        ({"named": 2}, "Sample.named must be 1, got 2"),
        ({"words": "ab"}, "words must be a sequence of texts, got 'ab'"),
        ({"words": ["a", 1]}, "words must be a sequence of texts, got ('a', 1)"),
        ({"words": None}, "words must be a sequence of texts, got None"),
    ],
)
def test_a_field_is_refused_with_rule_and_value(fields: dict[str, Any], message: str) -> None:
    """Bounds are taken, what lies beyond is not, and True is no number."""
    assert refusal(**fields) == message


def test_bounds_are_taken() -> None:
    """The least and the most, and a list for a tuple."""
    sample = Sample(number=9, share=2, words=["a", "b"])
    assert (sample.number, sample.share, sample.words) == (9, 2.0, ("a", "b"))
    assert type(sample.share) is float
    assert type(as_float(np.float64(0.5))) is float


def test_a_short_value_is_shown_whole_and_a_long_one_by_its_ends() -> None:
    """80 characters at most, whatever the value."""
    assert shown("x" * (SHOWN_CHARACTERS - 2)) == repr("x" * (SHOWN_CHARACTERS - 2))
    long = shown(["begin", *range(10_000), "end"])
    assert len(long) == SHOWN_CHARACTERS
    assert long.startswith("['begin', 0, 1, 2, ")
    assert "..." in long
    assert long.endswith(", 9998, 9999, 'end']")


def test_a_number_too_long_to_write_is_counted() -> None:
    """Python refuses to write it, and that is no answer to who asked."""
    assert shown(HUGE) == shown(-HUGE) == "a number of 16610 bits"
    assert shown([HUGE]) == "a value of list that holds a number too long to write"


@pytest.mark.parametrize(
    "value", ["x" * 10_000, list(range(10_000)), HUGE, [HUGE]], ids=["text", "list", "huge", "list of huge"]
)
@pytest.mark.parametrize(
    "make",
    [
        lambda value: Workload(global_batch=value, seq_len=1),
        lambda value: Workload(global_batch=1, seq_len=1, beta1=value),
        lambda value: Workload(global_batch=1, seq_len=1, precision=value),
        lambda value: Topology(order=value),
        lambda value: LinkSpec(name="a", bytes_per_second=value, latency_seconds=0, source="b"),
        lambda value: LinkSpec(name="a", bytes_per_second=1, latency_seconds=value, source="b"),
        lambda value: ModelSpec.from_hf("llama-tiny", name=[value]),  # type: ignore[arg-type]
        lambda value: ModelSpec.from_hf({"model_type": value}),
        lambda value: ModelSpec.from_hf({"model_type": "llama", "rope_scaling": [value]}),
        lambda value: ClusterSpec.preset(value),
        lambda value: ClusterSpec.parse(f"h100:{'9' * 10_000}x8"),
    ],
)
def test_no_message_echoes_a_long_value_whole(make: Any, value: object) -> None:
    """The rule can still be read."""
    with pytest.raises(PlanError, match=r"must be .*, got ") as caught:
        make(value)
    assert len(str(caught.value)) < 500


def test_a_workload_may_be_any_that_has_a_format() -> None:
    """The names that are typed are those of the tables."""
    assert get_args(Precision) == tuple(FORMATS)
    assert get_args(OptimizerName) == tuple(MOMENTS)
    assert Workload(global_batch=LARGEST, seq_len=1, seed=2**63 - 1).seed == 2**63 - 1


@pytest.mark.parametrize("value", [None, 5, b"h100", ["h100"]])
@pytest.mark.parametrize(
    ("door", "words"),
    [
        (load_plan, "a plan's file must be a path, got "),
        (load_cluster, "a cluster's file must be a path, got "),
        (ClusterSpec.parse, "a cluster must be a preset's name or a path to a .json file, got "),
        (ClusterSpec.preset, "a cluster preset must be one of .*, got "),
    ],
)
def test_a_door_refuses_what_is_no_text(door: Any, words: str, value: object) -> None:
    """Rule and value, not a traceback from the depths."""
    with pytest.raises(PlanError, match=words) as caught:
        door(value)
    assert str(caught.value).endswith(f"got {value!r}")
