"""Bytes of activations that a rank holds as it walks a schedule: three levels a microbatch.

After its F a stage holds ``activation_bytes`` of a microbatch; after its I ``weight_bytes``, what W still
needs (inputs of linears and gradients of their outputs); after its W nothing. A B frees all at once. What an
action allocates it holds from its start, what it frees is free at its end; the F of an overlapped pair
allocates before the other half frees. Source: Qi et al. 2023, Zero Bubble, arXiv:2401.10241, section 2.3
(M_B and M_W).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from attrs import Attribute, field, frozen

from picotron.errors import PlanError
from picotron.planner.actions import PHASES, B, F, I, W
from picotron.planner.pipeline import Schedule
from picotron.planner.validators import is_integer, shown

MOST_BYTES = 2**40  # of a microbatch on a stage, so that sums stay within 64 bits


def _tuple(values: Iterable[int]) -> tuple[int, ...]:
    try:
        return tuple(values)
    except TypeError:
        raise PlanError(f"bytes must be given for each stage, got {shown(values)}") from None


@frozen(kw_only=True)
class ScheduleMemory:
    """Bytes that one microbatch holds on each stage: between F and I (or B), and between I and W."""

    activation_bytes: tuple[int, ...] = field(converter=_tuple)
    weight_bytes: tuple[int, ...] = field(converter=_tuple)

    @weight_bytes.validator
    def _fit(self, _: Attribute[object], weight_bytes: tuple[int, ...]) -> None:
        if len(weight_bytes) != len(self.activation_bytes):
            raise PlanError(
                "activation_bytes and weight_bytes must be given for the same stages, "
                f"got {len(self.activation_bytes)} and {len(weight_bytes)} of them"
            )
        for value in (*self.activation_bytes, *weight_bytes):
            if not is_integer(value) or not 0 <= value <= MOST_BYTES:
                raise PlanError(f"bytes must be integers from 0 to {MOST_BYTES}, got {shown(value)}")

    @property
    def num_stages(self) -> int:
        """Stages that have bytes."""
        return len(self.activation_bytes)

    def changes(self) -> np.ndarray:
        """Bytes that an action adds to what its rank holds: [phase, stage]."""
        held, left = np.array([self.activation_bytes, self.weight_bytes], dtype=np.int64)
        rows = {F: held, B: -held, I: left - held, W: -left}
        return np.stack([rows[phase] for phase in range(len(PHASES))])


def unit_memory(num_stages: int, *, activation: int = 1, weight: int = 1) -> ScheduleMemory:
    """The same bytes on every stage.

    >>> unit_memory(2, activation=2)
    ScheduleMemory(activation_bytes=(2, 2), weight_bytes=(1, 1))
    """
    return ScheduleMemory(activation_bytes=(activation,) * num_stages, weight_bytes=(weight,) * num_stages)


def held_bytes(schedule: Schedule, memory: ScheduleMemory) -> np.ndarray:
    """Bytes that the rank holds after each action, aligned with the columns of the orders.

    Nothing is held before a rank's first action, nor after its last.
    """
    if memory.num_stages != schedule.num_stages:
        raise PlanError(f"bytes must be those of {schedule.num_stages} stages, got {memory.num_stages}")
    orders = schedule.orders
    held: np.ndarray = memory.changes()[orders.phase, orders.stage].cumsum()
    return held


def peak_bytes(schedule: Schedule, memory: ScheduleMemory) -> tuple[int, ...]:
    """The most bytes that each rank ever holds.

    >>> from picotron.planner.schedules import one_f_one_b
    >>> peak_bytes(one_f_one_b(3, 4), unit_memory(3, activation=2, weight=1))
    (6, 4, 2)
    """
    starts = np.array(schedule.orders.offsets[:-1])
    return tuple(np.maximum.reduceat(held_bytes(schedule, memory), starts).tolist())
