"""Programs as torch's pipelining text with communication (its ``compute_comms`` format), written and read.

A line is a rank, a cell an action: ``0F0`` or a pair ``(0F1;1B0)OVERLAP_F_B``; ``0SEND_F0``, ``1RECV_F0``,
``1SEND_B0``, ``0RECV_B0`` with the stage of the rank that acts; ``0UNSHARD``, ``0RESHARD``; ``0REDUCE_GRAD``
once all gradients of a stage are there, by which torch also scales them. Its runtime waits for a receive
where it is used and for all sends at the end, so that waits have no cell. It has one channel for all that one
rank sends another, and its simulation goes past a receive only when it has arrived: a receive stands just
before the cell that needs it, or that needs what comes after it on that channel.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence

import numpy as np

from picotron.errors import PlanError
from picotron.planner.actions import Orders, Phase, make_orders, parse_cell
from picotron.planner.meetings import meetings
from picotron.planner.program import COLLECTIVES, COMPUTE, RECEIVES, Kind, Program, last_backwards, rows

_MESSAGE = re.compile(r"(\d{1,10})(SEND_F|RECV_F|SEND_B|RECV_B)(\d{1,10})")
_OF_STAGE = re.compile(r"(\d{1,10})(UNSHARD|RESHARD|REDUCE_GRAD)")
_LEFT_OUT = (
    *RECEIVES,
    *(kind for kind in COLLECTIVES if kind is not Kind.UNSHARD),
    Kind.WAIT,
    Kind.UPDATE,
)


def program_to_csv(program: Program) -> str:
    """The program as torch's text, one line a rank.

    Raises PlanError for what torch has no action for: a stage on two ranks, recomputing, copies to the host.
    """
    unknown = np.flatnonzero(program.is_kind(Kind.RECOMPUTE, Kind.OFFLOAD, Kind.RELOAD))
    if len(unknown):
        raise PlanError(f"torch's text has no {Kind(int(program.kind[unknown[0]])).name}; leave it out")
    ends = last_backwards(program)
    if len({stage for _, stage in ends}) < len(ends):
        raise PlanError(
            "torch runs a stage on one rank, and this program has two copies of each, as DualPipe does; "
            "DualPipeV has one"
        )
    received, last = _receives(program), set(ends.values())
    lines = (_cells(program, rank, received, last) for rank in range(program.num_ranks))
    return "".join(",".join(line) + "\n" for line in lines)


def _receives(program: Program) -> dict[int, list[str]]:
    """The receives that stand before a row, by its index."""
    met = meetings(program)
    send, receive = met.first[: met.num_messages], met.second[: met.num_messages]
    waits = np.flatnonzero(program.is_kind(Kind.WAIT))
    use = np.empty(program.num_rows, dtype=np.int64)
    use[program.target[waits] + program.first_row[waits]] = waits
    order = np.lexsort((send, program.rank[send], program.rank[receive]))
    send, receive = send[order], receive[order]
    pair = program.rank[receive].astype(np.int64) * program.num_ranks + program.rank[send]
    lift = pair * (program.num_rows + 1)
    place = np.minimum.accumulate((use[receive] + lift)[::-1])[::-1] - lift
    found: dict[int, list[str]] = {}
    columns = (place, program.stage[receive], program.kind[receive], program.microbatch[receive])
    for before, stage, kind, microbatch in zip(*(column.tolist() for column in columns), strict=True):
        found.setdefault(before, []).append(f"{stage}{Kind(kind).name}{microbatch}")
    return found


def _cells(program: Program, rank: int, received: dict[int, list[str]], ends: set[int]) -> Iterator[str]:
    """The cells of one rank; sums, and what is freed, only after the sends of what was computed."""
    half, later = "", list[str]()
    for index, row in enumerate(rows(program, rank), start=program.offsets[rank]):
        arrivals = received.get(index, [])
        if arrivals or (row.kind in (*COMPUTE, Kind.UNSHARD) and not half):
            yield from (*later, *arrivals)
            later = []
        if row.kind in COMPUTE and row.batch >= 0:
            if half:
                yield f"({half};{row})OVERLAP_F_B"
            half = "" if half else str(row)
        elif row.kind is Kind.RESHARD:
            later.append(str(row))
        elif row.kind not in _LEFT_OUT:
            yield str(row)
        if index in ends:
            later.append(f"{row.stage}REDUCE_GRAD")
    yield from later


def orders_from_program_csv(text: str) -> Orders:
    """The orders in torch's text with or without communication, whether they are a schedule or not.

    Some of torch's classes name REDUCE_GRAD and no messages; where there is one message all must be there.
    Raises PlanError, naming line and cell, for a cell that is none, and for communication that does not fit
    the actions.
    """
    ranks: list[list[str]] = []
    try:
        for line in csv.reader(io.StringIO(text)):
            ranks.append([cell.strip() for cell in line if cell.strip()])
            for cell in ranks[-1]:
                if _is_action(cell):
                    parse_cell(cell)
    except (PlanError, csv.Error) as error:
        raise PlanError(f"line {max(len(ranks), 1)}: {error}") from None
    actions = [[cell for cell in own if _is_action(cell)] for own in ranks]
    if any(_MESSAGE.fullmatch(cell) for own in ranks for cell in own):
        _check_messages(ranks)
    for number, own in enumerate(ranks, start=1):
        _check_stage_cells(number, own)
    return make_orders(actions)


def _is_action(cell: str) -> bool:
    return not (_MESSAGE.fullmatch(cell) or _OF_STAGE.fullmatch(cell))


_Passed = tuple[int, str, int]  # stage, F or B, microbatch: what a stage takes from another, or makes for it


def _check_messages(ranks: Sequence[Sequence[str]]) -> None:
    """Raise PlanError unless all that crosses ranks is sent once it is there and received before its use."""
    made = {what: (line, at) for line, own in enumerate(ranks) for at, what in _made(own)}
    ends: dict[tuple[str, _Passed], int] = {}
    for line, own in enumerate(ranks):
        for at, cell in enumerate(own):
            found = _MESSAGE.fullmatch(cell)
            if found is None:
                continue
            end, direction = found[2].split("_")
            what = int(found[1]), direction, int(found[3])
            where, action = made.get(what, (-1, -1)), "{}{}{}".format(*what)
            if (end, what) in ends:
                raise PlanError(f"line {line + 1}: {cell} must stand once")
            if where[0] != line or (where[1] > at) != (end == "RECV"):
                order = "before" if end == "RECV" else "after"
                raise PlanError(f"line {line + 1}: {cell} must stand {order} {action} on its line")
            ends[end, what] = line
    for what, (line, _) in made.items():
        source = _next(what, -1)
        if source in made and made[source][0] != line:
            for end in (("RECV", what), ("SEND", source)):
                if end not in ends:
                    name = "{}{}_{}{}".format(end[1][0], end[0], *end[1][1:])
                    raise PlanError(f"line {made[end[1]][0] + 1}: {name} is missing")
    for end, what in ends:
        other = ("RECV", _next(what, 1)) if end == "SEND" else ("SEND", _next(what, -1))
        if other not in ends:
            name = "{}{}_{}{}".format(what[0], end, *what[1:])
            raise PlanError(f"line {ends[end, what] + 1}: {name} has no other end")


def _next(what: _Passed, step: int) -> _Passed:
    """What the stage after, in the direction of its data, makes of it; or the one before."""
    stage, direction, microbatch = what
    return stage + (step if direction == "F" else -step), direction, microbatch


def _made(own: Sequence[str]) -> Iterator[tuple[int, _Passed]]:
    """What the actions of a line make for other stages, and where."""
    for at, cell in enumerate(own):
        for action in parse_cell(cell) if _is_action(cell) else ():
            if action.phase is not Phase.WEIGHT:
                yield at, (action.stage, "F" if action.phase is Phase.FORWARD else "B", action.microbatch)


def _check_stage_cells(number: int, own: Sequence[str]) -> None:
    """Raise PlanError unless stages are unsharded and resharded in turn, and reduced once, at their end."""
    held: set[int] = set()
    reduced: set[int] = set()
    for cell in own:
        found = _OF_STAGE.fullmatch(cell)
        if found is None:
            late = {action.stage for action in parse_cell(cell)} & reduced if _is_action(cell) else set()
            if late:
                raise PlanError(f"line {number}: {late.pop()}REDUCE_GRAD must stand after {cell}")
            continue
        stage, name = int(found[1]), found[2]
        if (name == "UNSHARD") == (stage in held) and name != "REDUCE_GRAD":
            raise PlanError(f"line {number}: UNSHARD and RESHARD of stage {stage} must take turns")
        if name == "REDUCE_GRAD" and stage in reduced:
            raise PlanError(f"line {number}: {cell} must stand once")
        if name == "REDUCE_GRAD":
            reduced.add(stage)
        else:
            held ^= {stage}
