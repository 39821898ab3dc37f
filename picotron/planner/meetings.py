"""What the rows of a program meet in: messages, and sums over groups, each on a stream of its own.

The n-th send on a channel meets its n-th receive; the n-th sum that one rank posts on a communicator is the
n-th of every rank in it. Other data parallel copies of a rank post as it does, so that most communicators
have it alone. Gathered parameters and copies to the host have streams of their own on each rank.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from attrs import field, frozen

from picotron.errors import PlanError
from picotron.planner.program import RECEIVES, SENDS, Kind, Program

SUMS = (Kind.COUNT, Kind.REDUCE, Kind.NORM, Kind.REDUCE_SCATTER, Kind.ALL_GATHER)
COPIES = (Kind.UNSHARD, Kind.OFFLOAD, Kind.RELOAD)


@frozen(kw_only=True)
class Meetings:
    """The operations of a program, numbered so that those of one stream follow each other in order.

    ``of_row``: the operation that a row is an end of, or -1. ``first``, ``second``: rows, by index of the
    columns, that are its ends: of a message the send and the receive, -1 for one that is missing; of others
    twice the same where there is one. ``further``: the other ends of the few that have more, -1 likewise.
    ``opens``: whether an operation is the first of its stream.
    """

    of_row: np.ndarray = field(eq=False)
    first: np.ndarray = field(eq=False)
    second: np.ndarray = field(eq=False)
    opens: np.ndarray = field(eq=False)
    num_messages: int  # which come first
    further: Mapping[int, tuple[int, ...]]

    @property
    def num_operations(self) -> int:
        """Messages and sums."""
        return len(self.first)


def meetings(program: Program) -> Meetings:
    """What the rows of ``program`` meet in."""
    of_row = np.full(program.num_rows, -1, dtype=np.int32)
    first, second, opens = _messages(program, of_row)
    num_messages = len(first)
    one, other, opens_too, further = _others(program, of_row, num_messages)
    return Meetings(
        of_row=of_row,
        first=np.concatenate([first, one]),
        second=np.concatenate([second, other]),
        opens=np.concatenate([opens, opens_too]),
        num_messages=num_messages,
        further=further,
    )


def _messages(program: Program, of_row: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Send, receive, and whether it opens its channel, of each message; their rows are noted."""
    is_send = program.is_kind(*SENDS)
    ends = np.flatnonzero(is_send | program.is_kind(*RECEIVES))
    rank, peer = program.rank[ends].astype(np.int64), program.peer[ends]
    if len(ends) and (peer.min() < 0 or peer.max() >= program.num_ranks):
        raise PlanError(f"the peer of a message must be in [0, {program.num_ranks})")
    sends = is_send[ends]
    backward = program.is_kind(Kind.SEND_B, Kind.RECV_B)[ends]
    channel = np.where(sends, rank * program.num_ranks + peer, peer * program.num_ranks + rank) * 2 + backward
    names, channel = np.unique(channel, return_inverse=True)
    counts = [np.bincount(channel[side], minlength=len(names)) for side in (sends, ~sends)]
    starts = np.concatenate([[0], np.cumsum(np.maximum(*counts))]).astype(np.int32)
    found = []
    for side, count in zip((sends, ~sends), counts, strict=True):
        own = ends[side]
        order = np.argsort(channel[side].astype(np.uint16 if len(names) < 2**16 else np.int64), kind="stable")
        within = np.arange(len(own)) - np.repeat(np.cumsum(count) - count, count)
        operation = np.repeat(starts[:-1], count) + within
        row = np.full(starts[-1], -1, dtype=np.int32)
        row[operation] = own[order]
        of_row[own[order]] = operation
        found.append(row)
    opens = np.zeros(starts[-1], dtype=np.bool_)
    opens[starts[:-1]] = True
    return found[0], found[1], opens


def _others(
    program: Program, of_row: np.ndarray, num_messages: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[int, tuple[int, ...]]]:
    """Ends and whether it opens its stream, of each operation that is no message; their rows are noted."""
    ends = np.flatnonzero(program.is_kind(*SUMS, *COPIES))
    rank, anchor = program.rank[ends], program.anchor_row[ends]
    posted_in = np.where(anchor >= 0, anchor + program.first_row[ends], ends)
    is_sum = program.is_kind(*SUMS)[ends]
    stream = np.where(is_sum, program.group[ends], len(program.groups) + program.kind[ends])
    members = [_members(program, name) for name in program.groups]
    home = rank.copy()  # the least rank that takes part
    for group, by_rank in enumerate(members):
        home[stream == group] = np.array([own[0] for own in by_rank])[rank[stream == group]]
    order = np.lexsort((ends, -program.anchor_segment[ends], posted_in, rank, stream, home))
    ends, rank, stream, home = (column[order] for column in (ends, rank, stream, home))
    number = number_in_run(rank, stream, home)
    order = np.lexsort((rank, number, stream, home))
    ends, rank, stream, home, number = (column[order] for column in (ends, rank, stream, home, number))
    begins = np.diff(number, prepend=-1) != 0
    begins |= np.diff(home, prepend=-1) != 0
    begins |= np.diff(stream, prepend=-1) != 0
    of_row[ends] = num_messages + np.cumsum(begins) - 1
    starts = np.flatnonzero(begins)
    first, second = ends[starts].astype(np.int32), ends[starts].astype(np.int32)
    further: dict[int, tuple[int, ...]] = {}
    for operation, start in enumerate(starts.tolist()):
        if stream[start] >= len(program.groups):
            continue
        by_rank = members[stream[start]][rank[start]]
        if len(by_rank) > 1:
            came = of_row[ends[start : start + len(by_rank)]] == num_messages + operation
            there = dict(zip(rank[start:], ends[start : start + len(by_rank)][came].tolist(), strict=False))
            first[operation], second[operation], *rest = (there.get(other, -1) for other in by_rank)
            if rest:
                further[num_messages + operation] = tuple(rest)
    return first, second, number[starts] == 0, further


def number_in_run(*columns: np.ndarray) -> np.ndarray:
    """For each row of sorted columns, how many equal ones stand before it."""
    index = np.arange(len(columns[0]))
    begins = np.zeros(len(index), dtype=np.bool_)
    for column in columns:
        begins |= np.diff(column, prepend=-1) != 0
    return index - np.maximum.accumulate(np.where(begins, index, 0)) if len(index) else index


def _members(program: Program, name: str) -> list[tuple[int, ...]]:
    """For each pipeline rank, those that take part in its sums over a group, ascending."""
    ranks = range(program.num_ranks)
    if name == "world":
        return [tuple(ranks)] * len(ranks)
    if name == "mirror":
        return [tuple(sorted({rank, len(ranks) - 1 - rank})) for rank in ranks]
    if name == "embedding" and name in program.groups:
        on = program.is_kind(Kind.REDUCE) & (program.group == program.groups.index(name))
        both = tuple(sorted(set(program.rank[on].tolist())))
        return [both or (rank,) for rank in ranks]
    return [(rank,) for rank in ranks]
