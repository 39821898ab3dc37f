"""A program: everything that each pipeline rank posts, computes and waits for, in order.

Sends and receives are posted in program order on one channel per (sender, receiver, direction) and end at
their WAIT: the n-th send of a channel meets its n-th receive. Rows stand in read-only columns, so that
millions are cheap; a ``Row`` is made only when looked at. ``lower`` makes programs, passes add rows to them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from attrs import Attribute, Factory, cmp_using, evolve, field, frozen

from picotron.errors import PlanError


class Kind(IntEnum):
    """What a row does."""

    COUNT = 0  # sum the step's valid tokens over data-parallel ranks
    FORWARD = 1
    BACKWARD = 2
    SEND_F = 3  # activations to the next stage
    RECV_F = 4
    SEND_B = 5  # gradients to the previous stage
    RECV_B = 6
    REDUCE = 7  # sum one bucket over one group
    WAIT = 8
    NORM = 9  # gradient norm and loss over the world
    UPDATE = 10
    BACKWARD_INPUT = 11
    BACKWARD_WEIGHT = 12
    UNSHARD = 13  # gather a stage's parameters
    RESHARD = 14  # free what was gathered
    RECOMPUTE = 15  # forward once more, for what it saves
    OFFLOAD = 16  # copy what a forward saved to the host
    RELOAD = 17
    REDUCE_SCATTER = 18  # sum one bucket over one group, each rank a part of it
    ALL_GATHER = 19  # gather one bucket's updated parameters


COMPUTE = (Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)  # as in PHASES
SENDS = (Kind.SEND_F, Kind.SEND_B)
RECEIVES = (Kind.RECV_F, Kind.RECV_B)
SUMS = (Kind.REDUCE, Kind.REDUCE_SCATTER)  # of gradients
COLLECTIVES: Mapping[Kind, str] = {
    **dict.fromkeys((Kind.COUNT, Kind.REDUCE, Kind.NORM), "all_reduce"),
    Kind.REDUCE_SCATTER: "reduce_scatter",
    **dict.fromkeys((Kind.ALL_GATHER, Kind.UNSHARD), "all_gather"),
}
"""What rows over a group are, by the names of ``collectives``."""
COPIES: Mapping[Kind, str] = {Kind.OFFLOAD: "offload", Kind.RELOAD: "reload"}
HOST = "host"  # the other end of a copy
STATISTICS_BYTES = 24  # squared gradient norm, loss sum, valid tokens: three fp64
COUNT_BYTES = 8
_LETTERS = dict(zip(COMPUTE, "FBIW", strict=True))
_KINDS = tuple(Kind)


class Row(NamedTuple):
    """One row, made only when looked at. -1 stands for none; ``bytes`` is payload of one rank."""

    kind: Kind
    stage: int = -1
    microbatch: int = -1
    part: int = -1  # bucket
    anchor_row: int = -1  # posted inside that row ...
    anchor_segment: int = -1  # ... once this segment of it has run
    peer: int = -1  # pipeline rank
    group: int = -1  # index into Program.groups
    bytes: int = 0
    target: int = -1  # the row that a WAIT ends
    batch: int = -1  # sends and receives of one id are posted together, computing rows run overlapped

    def __str__(self) -> str:
        name = _LETTERS.get(self.kind, self.kind.name)
        if self.kind in COLLECTIVES and self.part >= 0:
            return f"{self.stage}{name}{self.part}"
        return (
            name if self.stage < 0 else f"{self.stage}{name}{self.microbatch if self.microbatch >= 0 else ''}"
        )


_COLUMNS = Row._fields
_REFERENCES = ("anchor_row", "target")
_NONE: Mapping[str, int] = {**dict.fromkeys(_COLUMNS, -1), "bytes": 0}
_TOO_LARGE = "a row's bytes must fit in 64 bits; the model or the batch is too large"


def check_bytes(size: int) -> None:
    """Raise PlanError unless so many bytes fit in a row."""
    if size >= 2**63:
        raise PlanError(_TOO_LARGE)


def _whole(values: Any, kind: type) -> np.ndarray:
    """The values as a column. Raises PlanError for numbers that do not fit."""
    try:
        wide = values if isinstance(values, np.ndarray) else np.asarray(values, dtype=np.int64)
    except OverflowError:
        raise PlanError(_TOO_LARGE) from None
    array: np.ndarray = wide.astype(kind, copy=False)
    if array.dtype != wide.dtype and not np.array_equal(array, wide):
        raise PlanError(
            f"a row's numbers must fit in {8 * array.itemsize} bits, got {int(np.abs(wide).max())}"
        )
    return array


def _filled(kind: type, none: int, length: int) -> np.ndarray:
    """A column without any value, which takes no memory."""
    return np.broadcast_to(np.array(none, dtype=kind), length)


def _column(kind: type, none: int = -1) -> Any:
    def read_only(values: Any) -> np.ndarray:
        array = _whole(values, kind)
        if array.flags.writeable:
            array = array.copy() if array is values else array
            array.setflags(write=False)
        return array

    left_out: Any = Factory(lambda self: _filled(kind, none, self.offsets[-1]), takes_self=True)
    return field(default=left_out, converter=read_only, eq=cmp_using(eq=np.array_equal), repr=False)


_kinds, _numbers, _sizes = _column(np.int8), _column(np.int32), _column(np.int64, 0)


@frozen(kw_only=True)
class Program:
    """Rows of all pipeline ranks in read-only columns; rank r's are ``offsets[r]`` to ``offsets[r + 1]``.

    ``anchor_row`` and ``target`` count from the rank's own first row. A column left out has no value.
    """

    groups: tuple[str, ...]
    offsets: tuple[int, ...]
    kind: np.ndarray = _kinds
    stage: np.ndarray = _numbers
    microbatch: np.ndarray = _numbers
    part: np.ndarray = _numbers
    anchor_row: np.ndarray = _numbers
    anchor_segment: np.ndarray = _numbers
    peer: np.ndarray = _numbers
    group: np.ndarray = _numbers
    bytes: np.ndarray = _sizes
    target: np.ndarray = _numbers
    batch: np.ndarray = _numbers

    @batch.validator
    def _fit(self, _: Attribute[object], __: np.ndarray) -> None:
        sizes = {len(getattr(self, name)) for name in _COLUMNS}
        if sizes != {self.offsets[-1]} or any(stop < first for first, stop in pairwise(self.offsets)):
            raise PlanError(f"columns of {sorted(sizes)} rows do not fit offsets {self.offsets}")

    @property
    def num_ranks(self) -> int:
        """Pipeline ranks."""
        return len(self.offsets) - 1

    @property
    def num_rows(self) -> int:
        """Rows over all ranks."""
        return self.offsets[-1]

    @property
    def first_row(self) -> np.ndarray:
        """For each row, where the rows of its rank begin."""
        return np.repeat(np.array(self.offsets[:-1], dtype=np.int32), np.diff(self.offsets))

    @property
    def rank(self) -> np.ndarray:
        """For each row, its rank."""
        return np.repeat(np.arange(self.num_ranks, dtype=np.int32), np.diff(self.offsets))

    def rank_of(self, index: int) -> int:
        """The rank of the row at an index of the columns."""
        return int(np.searchsorted(self.offsets, index, side="right")) - 1

    def is_kind(self, *kinds: Kind) -> np.ndarray:
        """Which rows are of one of these kinds."""
        found: np.ndarray = self.kind == kinds[0]
        for kind in kinds[1:]:
            found |= self.kind == kind
        return found


def make_program(groups: tuple[str, ...], offsets: tuple[int, ...], **columns: np.ndarray) -> Program:
    """A program that takes these arrays for its own: they are read-only from now on, and not copied."""
    for column in columns.values():
        column.setflags(write=False)
    return Program(groups=groups, offsets=offsets, **columns)


def rows(program: Program, rank: int) -> tuple[Row, ...]:
    """The rows of one pipeline rank, in program order."""
    first, stop = program.offsets[rank : rank + 2]
    kinds, *rest = (getattr(program, name)[first:stop].tolist() for name in _COLUMNS)
    return tuple(map(Row._make, zip(map(_KINDS.__getitem__, kinds), *rest, strict=True)))


def row_at(program: Program, index: int) -> Row:
    """The row at an index of the columns."""
    kind, *rest = (int(getattr(program, name)[index]) for name in _COLUMNS)
    return Row(_KINDS[kind], *rest)


def row_columns(many: Sequence[Row]) -> dict[str, np.ndarray]:
    """The columns of some rows."""
    columns = zip(*many, strict=True) if many else ((),) * len(_COLUMNS)
    return {
        name: _whole(column, np.int64 if name == "bytes" else np.int32)
        for name, column in zip(_COLUMNS, columns, strict=True)
    }


def inserted(
    program: Program, ranks: Any, before: Any, groups: Sequence[str] = (), **columns: Any
) -> Program:
    """The program with new rows, each on one of ``ranks`` and just before the row at an index of the columns.

    After a rank's last row: before the end of its rows. New rows before the same one keep their order. Their
    ``anchor_row`` and ``target`` are indices of the columns too, as if new rows followed the last one; all
    that old rows refer to is renumbered. ``groups`` are the program's groups from now on, if given.
    """
    ranks, before = np.asarray(ranks, dtype=np.int64), np.asarray(before, dtype=np.int64)
    order = np.lexsort((before, ranks))
    counts = np.bincount(ranks, minlength=program.num_ranks)
    offsets = np.array(program.offsets) + np.concatenate([[0], np.cumsum(counts)])
    new_places = before[order] + np.arange(len(order))
    is_old = np.ones(offsets[-1], dtype=np.bool_)
    is_old[new_places] = False
    places = np.empty(offsets[-1], dtype=np.int32)  # of old rows, then of new ones
    places[: program.num_rows] = np.flatnonzero(is_old)
    places[program.num_rows + order] = new_places
    first_row = np.repeat(offsets[:-1].astype(np.int32), np.diff(offsets))

    def merged(name: str) -> np.ndarray:
        old, new = getattr(program, name), columns.get(name)
        if new is None and old.strides == (0,):
            return _filled(old.dtype.type, _NONE[name], len(is_old))
        out = np.empty(len(is_old), dtype=old.dtype)
        out[is_old] = old
        out[new_places] = _NONE[name] if new is None else _whole(np.asarray(new), old.dtype.type)[order]
        return out

    def renumbered(name: str) -> np.ndarray:
        old, new = getattr(program, name), columns.get(name)
        if new is None and old.strides == (0,):
            return _filled(old.dtype.type, -1, len(is_old))
        out = np.full(len(is_old), -1, dtype=old.dtype)
        refers = np.flatnonzero(old >= 0)
        out[places[refers]] = places[old[refers] + program.first_row[refers]]
        if new is not None:
            referred = np.asarray(new, dtype=np.int64)[order]
            out[new_places] = np.where(referred >= 0, places[referred], -1)
        return np.where(out >= 0, out - first_row, -1)

    return make_program(
        tuple(groups) or program.groups,
        tuple(offsets.tolist()),
        **{name: renumbered(name) if name in _REFERENCES else merged(name) for name in _COLUMNS},
    )


def with_rows(program: Program, new: Sequence[tuple[int, int, Row]], groups: Sequence[str] = ()) -> Program:
    """``inserted`` for few rows: of (rank, index before which it stands, row)."""
    if not new:
        return evolve(program, groups=tuple(groups) or program.groups)
    ranks, before, many = zip(*new, strict=True)
    columns = {name: column for name, column in row_columns(many).items() if (column != _NONE[name]).any()}
    return inserted(program, ranks, before, groups, **columns)


def last_backwards(program: Program) -> dict[tuple[int, int], int]:
    """For each (rank, stage), the row, by index of the columns, in which its gradients are complete."""
    found = np.flatnonzero(program.is_kind(Kind.BACKWARD, Kind.BACKWARD_WEIGHT))
    rank = np.searchsorted(program.offsets, found, side="right") - 1
    key = rank * (int(program.stage.max()) + 1) + program.stage[found]
    _, from_behind = np.unique(key[::-1], return_index=True)
    at = sorted(found[::-1][from_behind].tolist())
    ranks = (np.searchsorted(program.offsets, at, side="right") - 1).tolist()
    return {(rank, int(program.stage[index])): index for rank, index in zip(ranks, at, strict=True)}


def matching_sends(program: Program) -> dict[tuple[int, int], tuple[int, int]]:
    """For each receive (rank, row), the send (rank, row) across the same border for its microbatch."""
    sends: dict[tuple[Kind, int, int, int, int], tuple[int, int]] = {}
    for rank in range(program.num_ranks):
        for index, row in enumerate(rows(program, rank)):
            if row.kind in SENDS:
                step = 1 if row.kind is Kind.SEND_F else -1
                receive = Kind.RECV_F if row.kind is Kind.SEND_F else Kind.RECV_B
                sends[receive, row.peer, rank, row.stage + step, row.microbatch] = rank, index
    return {
        (rank, index): sends[row.kind, rank, row.peer, row.stage, row.microbatch]
        for rank in range(program.num_ranks)
        for index, row in enumerate(rows(program, rank))
        if row.kind in RECEIVES
    }


def payload_bytes(program: Program, rank: int) -> dict[tuple[str, str], int]:
    """Payload that one pipeline rank hands over outside its bodies, by (kind, group or direction).

    What is copied to the host and back has the group "host".
    """
    totals: dict[tuple[str, str], int] = {}
    for row in rows(program, rank):
        if row.bytes and row.kind is not Kind.WAIT:
            key = _payload_key(program, row)
            totals[key] = totals.get(key, 0) + row.bytes
    return totals


def _payload_key(program: Program, row: Row) -> tuple[str, str]:
    if row.kind in SENDS or row.kind in RECEIVES:
        return ("send" if row.kind in SENDS else "recv"), "pp"
    if row.kind in COPIES:
        return COPIES[row.kind], HOST
    return COLLECTIVES[row.kind], program.groups[row.group]


def anchored(own: Sequence[Row]) -> dict[tuple[int, int], tuple[int, ...]]:
    """Rows posted inside other rows: by (anchor row, segment after which), their indices in order."""
    found: dict[tuple[int, int], tuple[int, ...]] = {}
    for index, row in enumerate(own):
        if row.anchor_row >= 0:
            key = row.anchor_row, row.anchor_segment
            found[key] = (*found.get(key, ()), index)
    return found


def execution_order(own: Sequence[Row]) -> tuple[int, ...]:
    """Row indices in the order in which a rank gets done with posting or running them.

    A row posted inside another one comes before it.
    """
    inside: dict[int, list[int]] = {}
    for (anchor, _), posted in sorted(anchored(own).items(), key=lambda item: (item[0][0], -item[0][1])):
        inside.setdefault(anchor, []).extend(posted)
    return tuple(
        index
        for anchor, row in enumerate(own)
        if row.anchor_row < 0
        for index in (*inside.get(anchor, ()), anchor)
    )
