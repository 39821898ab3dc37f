"""The actions of pipeline ranks: one phase of one microbatch on one stage, and orders of them.

An action prints and parses as torch's pipelining does: ``2F0`` is stage 2, forward, microbatch 0. A pair that
runs overlapped is one cell, ``(0F1;1B0)OVERLAP_F_B``. ``Orders`` keeps what every rank runs in read-only
columns, so that a million actions are cheap; an ``Action`` is made only when looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from itertools import chain, pairwise
from typing import Any, TypeAlias, overload

import numpy as np
from attrs import Attribute, cmp_using, field, frozen

from picotron.errors import PlanError
from picotron.planner.validators import is_integer, shown


class Phase(StrEnum):
    """What an action computes: a full backward, or its input and its weight gradient apart."""

    FORWARD = "F"
    BACKWARD = "B"
    INPUT = "I"
    WEIGHT = "W"


PHASES = "FBIW"  # columns hold the index into it
F, B, I, W = range(4)  # noqa: E741
MAX_NUMBER = 2**31 - 1  # of a stage or a microbatch
_ACTION = re.compile(r"([0-9]{1,10})([FBIW])([0-9]{1,10})")
_PAIR = re.compile(r"\(([^;()]*);([^;()]*)\)OVERLAP_F_B")


@frozen(order=True)
class Action:
    """One phase of one microbatch on one stage."""

    stage: int
    phase: Phase
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.phase}{self.microbatch}"


Cell: TypeAlias = "Action | str | tuple[Action, Action]"
"""An action or its text, or a pair that runs overlapped."""


def parse_action(text: str) -> Action:
    """The action that prints as ``text``. Raises PlanError for anything else."""
    match = _ACTION.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None or max(int(match[1]), int(match[3])) > MAX_NUMBER:
        raise PlanError(f"an action must look like 2F0 (stage, F, B, I or W, microbatch), got {shown(text)}")
    return Action(int(match[1]), Phase(match[2]), int(match[3]))


def parse_cell(text: str) -> tuple[Action, ...]:
    """The action of a cell, or the two of an overlapped pair. Raises PlanError for anything else."""
    pair = _PAIR.fullmatch(text.strip())
    return (parse_action(pair[1]), parse_action(pair[2])) if pair else (parse_action(text),)


def _column(kind: type) -> Any:
    def read_only(values: Any) -> np.ndarray:
        given = np.asarray(values)
        array: np.ndarray = np.ascontiguousarray(given, dtype=kind)
        if array.ndim != 1 or not (given.dtype == kind or np.array_equal(array, given)):
            raise PlanError(f"a column must be of whole numbers within {kind.__name__}, got {shown(values)}")
        if array.flags.writeable:
            array = array.copy() if array is values else array
            array.setflags(write=False)
        return array

    return field(converter=read_only, eq=cmp_using(eq=np.array_equal), repr=False)


_bytes, _numbers, _flags = _column(np.int8), _column(np.int32), _column(np.bool_)


@frozen(kw_only=True)
class Orders(Sequence[tuple[Action, ...]]):
    """What each pipeline rank runs, in order; nothing is promised of it but that the columns fit together.

    Rank r's actions are ``offsets[r]`` to ``offsets[r + 1]``. ``phase`` is an index into PHASES. ``joined``
    marks an action that runs overlapped with the one after it.
    """

    offsets: tuple[int, ...]
    phase: np.ndarray = _bytes
    stage: np.ndarray = _numbers
    microbatch: np.ndarray = _numbers
    joined: np.ndarray = _flags

    @joined.validator
    def _fit(self, _: Attribute[object], joined: np.ndarray) -> None:
        sizes = {len(column) for column in (self.phase, self.stage, self.microbatch, joined)}
        ends = self.offsets
        if not ends or ends[0] != 0 or sizes != {ends[-1]} or any(b < a for a, b in pairwise(ends)):
            raise PlanError(f"columns of {sorted(sizes)} actions do not fit offsets {shown(ends)}")
        if len(joined) and not 0 <= self.phase.min() <= self.phase.max() < len(PHASES):
            raise PlanError(f"a phase must be an index of {PHASES}, got {shown(self.phase.tolist())}")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, rank: int) -> tuple[Action, ...]: ...
    @overload
    def __getitem__(self, rank: slice) -> tuple[tuple[Action, ...], ...]: ...
    def __getitem__(self, rank: int | slice) -> Any:
        if isinstance(rank, slice):
            return tuple(self[index] for index in range(*rank.indices(len(self))))
        if not -len(self) <= rank < len(self):
            raise IndexError(f"rank must be in [0, {len(self)}), got {rank}")
        own = self.span(rank % len(self))
        columns = (column[own].tolist() for column in (self.stage, self.phase, self.microbatch))
        return tuple(Action(s, _PHASE[p], m) for s, p, m in zip(*columns, strict=True))

    def __iter__(self) -> Iterator[tuple[Action, ...]]:
        return (self[rank] for rank in range(len(self)))

    def __hash__(self) -> int:
        return hash((self.offsets, self.phase.tobytes(), self.stage.tobytes(), self.microbatch.tobytes()))

    @property
    def num_actions(self) -> int:
        """Actions over all ranks; a pair counts as two."""
        return self.offsets[-1]

    def span(self, rank: int) -> slice:
        """Where a rank's actions stand in the columns."""
        return slice(self.offsets[rank], self.offsets[rank + 1])

    def action(self, index: int) -> Action:
        """The action at an index of the columns."""
        return Action(int(self.stage[index]), _PHASE[self.phase[index]], int(self.microbatch[index]))

    def rank_of(self, index: int) -> int:
        """The rank that runs the action at an index of the columns."""
        return int(np.searchsorted(self.offsets, index, side="right")) - 1


_PHASE = tuple(map(Phase, PHASES))


def make_orders(nested: Iterable[Iterable[Cell]]) -> Orders:
    """Orders from one sequence of cells a rank. Raises PlanError for what is no cell."""
    if isinstance(nested, Orders):
        return nested
    try:
        ranks = [[_cell(cell) for cell in own] for own in nested]
    except TypeError:
        raise PlanError(f"orders must be one sequence of cells a rank, got {shown(nested)}") from None
    offsets = [0]
    for own in ranks:
        offsets.append(offsets[-1] + sum(map(len, own)))
    every = list(chain.from_iterable(ranks))
    actions = list(chain.from_iterable(every))
    return Orders(
        offsets=tuple(offsets),
        phase=np.array([_PHASE.index(action.phase) for action in actions]),
        stage=np.array([action.stage for action in actions]),
        microbatch=np.array([action.microbatch for action in actions]),
        joined=np.array([index + 1 < len(cell) for cell in every for index in range(len(cell))]),
    )


def _cell(cell: Cell) -> tuple[Action, ...]:
    if isinstance(cell, Action):
        return (_checked(cell),)
    if isinstance(cell, str):
        return parse_cell(cell)
    if isinstance(cell, tuple) and len(cell) == 2 and all(isinstance(half, Action) for half in cell):
        return (_checked(cell[0]), _checked(cell[1]))
    raise PlanError(f"a cell must be an action, its text or a pair of actions, got {shown(cell)}")


def _checked(action: Action) -> Action:
    """The action, if columns can hold it. Raises PlanError if not."""
    numbers = (action.stage, action.microbatch)
    if action.phase in _PHASE and all(is_integer(n) and abs(n) <= MAX_NUMBER for n in numbers):
        return action
    raise PlanError(f"an action must have a stage, F, B, I or W, and a microbatch, got {shown(action)}")


Columns: TypeAlias = "Sequence[np.ndarray]"
"""A rank's phase, stage and microbatch, and ``joined`` where it has pairs."""


def parse_cells(texts: Iterable[str]) -> Columns:
    """The columns of a rank's cells. Raises PlanError for a text that is no cell."""
    found: list[tuple[int, int, int, bool]] = []
    for text in texts:
        match = _ACTION.fullmatch(text)
        if match is not None and len(match[1]) < 10 and len(match[3]) < 10:
            found.append((PHASES.index(match[2]), int(match[1]), int(match[3]), False))
            continue
        actions = parse_cell(text)
        for index, action in enumerate(actions, start=1):
            found.append((PHASES.index(action.phase), action.stage, action.microbatch, index < len(actions)))
    phase, stage, microbatch, joined = np.array(found, dtype=np.int64).reshape(-1, 4).T
    return phase.astype(np.int8), stage.astype(np.int32), microbatch.astype(np.int32), joined.astype(np.bool_)


def stack_orders(ranks: Sequence[Columns]) -> Orders:
    """Orders from each rank's columns."""
    if not ranks:
        return make_orders([])
    offsets = [0]
    for own in ranks:
        offsets.append(offsets[-1] + len(own[0]))
    columns = [np.concatenate([own[index] for own in ranks]) for index in range(3)]
    joined = [own[3] if len(own) > 3 else np.zeros(len(own[0]), dtype=np.bool_) for own in ranks]
    return Orders(
        offsets=tuple(offsets),
        phase=columns[0],
        stage=columns[1],
        microbatch=columns[2],
        joined=np.concatenate(joined),
    )


def cells(orders: Orders, rank: int) -> list[str]:
    """A rank's cells as text; a pair is one."""
    own = orders.span(rank)
    columns = (column[own].tolist() for column in (orders.stage, orders.phase, orders.microbatch))
    texts = [f"{stage}{PHASES[phase]}{microbatch}" for stage, phase, microbatch in zip(*columns, strict=True)]
    if not orders.joined[own].any():
        return texts
    out, joined = [], orders.joined[own].tolist()
    for index, text in enumerate(texts):
        if joined[index] and index + 1 < len(texts):
            out.append(f"({text};{texts[index + 1]})OVERLAP_F_B")
        elif not (index and joined[index - 1]):
            out.append(text)
    return out
