"""What is trained and how: batch, precision and optimizer, and the bytes that each precision keeps."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Literal

from attrs import Attribute, field, frozen

from picotron.errors import PlanError
from picotron.planner.validators import LARGEST

Precision = Literal["bf16", "fp32", "fp64"]
OptimizerName = Literal["adamw", "sgd"]


@frozen(kw_only=True)
class Format:
    """Bytes per element under one precision; ``main`` is 0 where the parameters are their own main copy."""

    compute: int
    gradient: int
    main: int
    moment: int


FORMATS: dict[str, Format] = {
    "bf16": Format(compute=2, gradient=4, main=4, moment=4),
    "fp32": Format(compute=4, gradient=4, main=0, moment=4),
    "fp64": Format(compute=8, gradient=8, main=0, moment=8),
}
MOMENTS: dict[str, int] = {"adamw": 2, "sgd": 0}


Validator = Callable[[object, "Attribute[Any]", Any], None]


def whole(minimum: int, maximum: int = LARGEST) -> Validator:
    """A validator that takes whole numbers from ``minimum`` to ``maximum``."""

    def check(instance: object, attribute: Attribute[Any], value: object) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise PlanError(f"{attribute.name} must be a whole number of at least {minimum}, got {value!r}")
        if value > maximum:
            raise PlanError(
                f"{attribute.name} must be at most {maximum}, got a number of {value.bit_length()} bits"
            )

    return check


def _number(minimum: float, maximum: float = sys.float_info.max) -> Validator:
    def check(instance: object, attribute: Attribute[float], value: float) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not minimum <= value <= maximum:
            raise PlanError(f"{attribute.name} must be a number in [{minimum}, {maximum}], got {value!r}")

    return check


def _decay(instance: object, attribute: Attribute[Any], value: object) -> None:
    """A moving average's decay: at 1 it would never move."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < 1.0:
        raise PlanError(f"{attribute.name} must be a number in [0.0, 1.0), got {value!r}")


def _one_of(*known: str) -> Validator:
    def check(instance: object, attribute: Attribute[str], value: str) -> None:
        if value not in known:
            raise PlanError(f"{attribute.name} must be one of {', '.join(known)}, got {value!r}")

    return check


@frozen(kw_only=True)
class Workload:
    """What is trained, and how: a step takes ``global_batch`` sequences of ``seq_len`` tokens.

    ``precision`` bf16 keeps fp32 main weights and fp32 gradients. The learning rate rises linearly over
    ``warmup_steps`` and falls along a cosine to ``min_learning_rate_ratio`` of itself at ``decay_steps``
    (0: it stays). ``max_grad_norm`` 0 turns clipping off.
    """

    global_batch: int = field(validator=whole(1))
    seq_len: int = field(validator=whole(1))
    precision: Precision = field(default="bf16", validator=_one_of(*FORMATS))
    optimizer: OptimizerName = field(default="adamw", validator=_one_of(*MOMENTS))
    learning_rate: float = field(default=3e-4, validator=_number(0.0))
    weight_decay: float = field(default=0.1, validator=_number(0.0))
    beta1: float = field(default=0.9, validator=_decay)
    beta2: float = field(default=0.95, validator=_decay)
    warmup_steps: int = field(default=0, validator=whole(0))
    decay_steps: int = field(default=0, validator=whole(0))
    min_learning_rate_ratio: float = field(default=0.1, validator=_number(0.0, 1.0))
    max_grad_norm: float = field(default=1.0, validator=_number(0.0))
    seed: int = field(default=0, validator=whole(0, 2**63 - 1))
