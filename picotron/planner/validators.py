"""Rules that a field keeps, each refusing with rule and value, and the conversions that go before them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeGuard, get_args

from attrs import Attribute

from picotron.errors import PlanError

LARGEST = 2**48  # of any size: what follows from it stays within 64 bits
SHOWN_CHARACTERS = 80  # of a value in a message

Validator = Callable[[Any, "Attribute[Any]", Any], None]


def must_be(words: str, holds: Callable[[Any], bool]) -> Validator:
    """A validator that raises PlanError unless ``holds(value)``."""

    def validate(instance: object, attribute: Attribute[Any], value: Any) -> None:
        _check(attribute.name, words, holds, value)

    return validate


def of_class_must_be(words: str, holds: Callable[[Any], bool]) -> Validator:
    """As ``must_be``, but the message names the class too: "LinkSpec.name must be ..."."""

    def validate(instance: object, attribute: Attribute[Any], value: Any) -> None:
        _check(f"{type(instance).__name__}.{attribute.name}", words, holds, value)

    return validate


def one_of(alias: Any) -> Validator:
    """A validator that takes the values of a Literal."""
    choices = get_args(alias)
    return must_be(f"one of {', '.join(choices)}", lambda value: isinstance(value, str) and value in choices)


def none_or(kind: type) -> Validator:
    """A validator that takes None or an instance of ``kind``."""
    return must_be(f"None or of {kind.__name__}", lambda value: value is None or isinstance(value, kind))


def whole(least: int, most: int = LARGEST) -> list[Validator]:
    """Validators that take whole numbers from ``least`` to ``most``."""
    return [
        must_be(f"a whole number of at least {least}", lambda value: is_integer(value) and value >= least),
        must_be(f"at most {most}", lambda value: bool(value <= most)),
    ]


def between(low: float, high: float = sys.float_info.max) -> Validator:
    """A validator that takes finite numbers from ``low`` to ``high``."""
    return must_be(f"a number in [{low}, {high}]", lambda value: is_between(value, low, high))


def shown(value: object) -> str:
    """``repr(value)`` for a message: of a long one the beginning and the end.

    >>> shown("x" * 1000)
    "'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx...xxxxxxxxxxxxxxxxxxxxxxxxxxxxx'"
    """
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of thousands of digits
        if isinstance(value, int):
            return f"a number of {value.bit_length()} bits"
        return f"a value of {type(value).__name__} that holds a number too long to write"
    if len(text) <= SHOWN_CHARACTERS:
        return text
    tail = 3 * SHOWN_CHARACTERS // 8
    return f"{text[: SHOWN_CHARACTERS - tail - 3]}...{text[-tail:]}"


def is_integer(value: object) -> TypeGuard[int]:
    """Whether ``value`` is an integer (True is not one)."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_size(value: object, least: int = 1) -> bool:
    """Whether ``value`` is an integer from ``least`` to LARGEST (True is not one)."""
    return is_integer(value) and least <= value <= LARGEST


def is_between(value: object, low: float, high: float) -> bool:
    """Whether ``value`` is a number in [low, high] (True is not one)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def is_positive(value: object) -> bool:
    """Whether ``value`` is a positive finite number (True is not one)."""
    return is_between(value, 0, sys.float_info.max) and value != 0


def is_count(value: object) -> bool:
    """Whether ``value`` is an integer of at least 0."""
    return is_size(value, least=0)


def as_float(value: float) -> float:
    """A finite number as a float, so that equal specs are saved as equal bytes; anything else as it is."""
    return float(value) if is_between(value, -sys.float_info.max, sys.float_info.max) else value


def as_tuple(value: list[str] | tuple[str, ...]) -> tuple[str, ...]:
    """A list as a tuple; anything else as it is."""
    return tuple(value) if isinstance(value, list) else value


def are_words(value: object) -> bool:
    """Whether ``value`` is a tuple of texts."""
    return isinstance(value, tuple) and all(isinstance(word, str) for word in value)


def _check(name: str, words: str, holds: Callable[[Any], bool], value: object) -> None:
    if not holds(value):
        raise PlanError(f"{name} must be {words}, got {shown(value)}")


SIZE = must_be("a positive integer", is_size)
COUNT = must_be("an integer of at least 0", is_count)
POSITIVE = must_be("a positive finite number", is_positive)
FLAG = must_be("True or False", lambda value: isinstance(value, bool))
NAME = must_be("a name that is not empty", lambda value: isinstance(value, str) and value != "")
