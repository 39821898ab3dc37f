"""Rules that a field of a model keeps, each refusing with rule and value."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, get_args

from attrs import Attribute

from picotron.errors import PlanError

LARGEST = 2**48  # of any size: what follows from it stays within 64 bits

Validator = Callable[[Any, "Attribute[Any]", Any], None]


def must_be(words: str, holds: Callable[[Any], bool]) -> Validator:
    """A validator that raises PlanError unless ``holds(value)``."""

    def validate(instance: object, attribute: Attribute[Any], value: Any) -> None:
        if not holds(value):
            raise PlanError(f"{attribute.name} must be {words}, got {value!r}")

    return validate


def one_of(alias: Any) -> Validator:
    """A validator that takes the values of a Literal."""
    choices = get_args(alias)
    return must_be(f"one of {choices}", lambda value: isinstance(value, str) and value in choices)


def none_or(kind: type) -> Validator:
    """A validator that takes None or an instance of ``kind``."""
    return must_be(f"None or of {kind.__name__}", lambda value: value is None or isinstance(value, kind))


def is_size(value: object, least: int = 1) -> bool:
    """Whether ``value`` is an integer from ``least`` to LARGEST (True is not one)."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= LARGEST


def is_positive(value: object) -> bool:
    """Whether ``value`` is a positive finite number (True is not one)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def is_count(value: object) -> bool:
    """Whether ``value`` is an integer of at least 0."""
    return is_size(value, least=0)


def as_float(value: float) -> float:
    """An integer as a float, so that equal specs are saved as equal bytes; anything else as it is."""
    return float(value) if is_positive(value) else value


SIZE = must_be("a positive integer", is_size)
COUNT = must_be("an integer of at least 0", is_count)
POSITIVE = must_be("a positive finite number", is_positive)
FLAG = must_be("True or False", lambda value: isinstance(value, bool))
NAME = must_be("a name that is not empty", lambda value: isinstance(value, str) and value != "")
