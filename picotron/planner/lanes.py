"""Discrete-event simulation of one step: what every lane does when, by the one rule of ``clock``.

A *lane* is a rank, or a class of ranks whose clocks are always equal. Its rows run in order, on its own time.
What several lanes take part in runs on a *stream* of theirs, in posting order: a channel joins a sender and a
receiver, a communicator all lanes that have a rank in it. The n-th operation that one of them posts is the
n-th of all; it starts when the last has come and the stream is free. WAIT, COUNT, NORM and the collectives
inside bodies hold a lane until such an operation has ended. Nothing else blocks, so the result does not
depend on who goes first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import reduce
from itertools import zip_longest
from operator import add
from typing import NamedTuple, TypeAlias

from attrs import define, field, frozen

from picotron.errors import PlanError
from picotron.planner.body import WAIT
from picotron.planner.clock import Operation, Span, advance
from picotron.planner.cost import SegmentCost, StageCost, of_kind
from picotron.planner.program import COMPUTE, COPIES, RECEIVES, SENDS, Kind, Row, anchored


class Stream(NamedTuple):
    """A communicator or a channel of some lanes; whatever runs on it takes ``factor`` times as long."""

    name: str
    lanes: tuple[int, ...]
    factor: float = 1.0


@frozen(kw_only=True)
class Lane:
    """What one lane does, and whom it meets.

    ``seconds``: by row, what it moves takes so long on healthy links. ``stages``: costs of the stages that
    it runs, to be multiplied by ``factor`` where they are computing, as ``update_seconds`` is.
    ``communicators``: by name of the group. ``peers``: by pipeline rank, the lane there and the factor of the
    link to it. ``pauses``: by row, the seconds that pass before it.
    """

    rows: Sequence[Row]
    group_names: Sequence[str]
    seconds: Sequence[float]
    stages: Mapping[int, StageCost]
    update_seconds: float
    factor: float = 1.0
    communicators: Mapping[str, Stream]
    peers: Mapping[int, tuple[int, float]]
    pauses: Mapping[int, Sequence[float]] = field(factory=dict)


def run_lanes(lanes: Sequence[Lane]) -> list[list[Span]]:
    """When each row of each lane runs. Raises PlanError where lanes wait for each other."""
    return _Run(lanes).run()


def chain(start: float, seconds: Iterable[float]) -> float:
    """When the last of several operations ends, if nothing but the end of the one before holds up the next.

    So ``advance`` would say, asked for one after the other on streams that are free at ``start``.
    """
    return reduce(add, seconds, start)


@frozen
class _Leg:
    """Part of a body: a lane computes ``before`` by itself, then meets others and stays in step with them.

    ``first`` is the collective in which they meet, ``then`` all further ones of the same lanes, each
    after the computing of the lane that comes last to it.
    """

    before: Sequence[float]
    stream: Stream
    first: float
    then: list[float]


@frozen
class _Body:
    """The chains of a body while no sum moves beside it; ``after`` its legs a lane computes by itself."""

    legs: Sequence[_Leg]
    after: Sequence[float]


@define(eq=False)
class _Meeting:
    """One operation of a stream: how many lanes have still to come, and when it ran once all have."""

    missing: int
    ready: float = 0.0
    span: Span | None = None
    waiting: list[int] = field(factory=list)


_Walk: TypeAlias = Generator[_Meeting, None, None]  # gives what it has to wait for
_Part: TypeAlias = tuple[float, Stream | None]  # seconds, and the communicator of a collective
_Place: TypeAlias = tuple[int, int, Kind]  # lane, stage and phase of a body


class _Run:
    """The state of one simulation: when each lane and stream is free, and what has been posted."""

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self.lanes = lanes
        self.free: dict[Hashable, float] = dict.fromkeys(range(len(lanes)), 0.0)
        self.meetings: dict[Stream, list[_Meeting]] = {}
        self.num_posted: dict[tuple[Stream, int], int] = {}
        self.found: list[list[Span | _Meeting | None]] = [[None] * len(lane.rows) for lane in lanes]
        self.at = [0] * len(lanes)
        self.ready = deque(range(len(lanes)))
        self.anchored = [anchored(lane.rows) for lane in lanes]
        self.first_sums = [_first_sum(lane) for lane in lanes]
        self.bodies = _bodies(lanes)

    def run(self) -> list[list[Span]]:
        walks = [self.walk(lane) for lane in range(len(self.lanes))]
        while self.ready:
            lane = self.ready.popleft()
            for meeting in walks[lane]:
                meeting.waiting.append(lane)
                break
        stuck = [
            str(lane.rows[index])
            for lane, index in zip(self.lanes, self.at, strict=True)
            if index < len(lane.rows)
        ]
        if stuck:
            raise PlanError(f"the ranks of this program wait for each other at {', '.join(stuck)}")
        return [[_span(found) for found in own] for own in self.found]

    def walk(self, lane: int) -> _Walk:
        """The rows of a lane, in order."""
        own, found = self.lanes[lane], self.found[lane]
        for index, row in enumerate(own.rows):
            self.at[lane] = index
            if row.anchor_row >= 0:
                continue  # posted inside its anchor
            self.pause(lane, index)
            began, kind = self.free[lane], row.kind
            if kind in COMPUTE:
                yield from self.compute(lane, index, row)
                found[index] = Span(began, self.free[lane])
            elif kind is Kind.WAIT:
                yield from self.wait_row(lane, index)
            elif kind is Kind.UPDATE:
                found[index] = self.spend(lane, own.update_seconds * own.factor)
            elif kind is Kind.RESHARD:
                found[index] = Span(began, began)
            else:
                meeting = self.post_row(lane, index)
                if kind is Kind.COUNT or kind is Kind.NORM:
                    yield from self.wait(lane, meeting)
        self.at[lane] = len(own.rows)

    def spend(self, lane: int, seconds: float, ready: float = 0.0) -> Span:
        """Let time pass on a lane."""
        span = advance(self.free, Operation((lane,), ready, seconds))
        self.free[lane] = span.end
        return span

    def pause(self, lane: int, index: int) -> None:
        for seconds in self.lanes[lane].pauses.get(index, ()):
            self.spend(lane, seconds)

    def wait(self, lane: int, meeting: _Meeting) -> _Walk:
        if meeting.span is None:
            yield meeting
        assert meeting.span is not None
        self.spend(lane, 0.0, ready=meeting.span.end)

    def wait_row(self, lane: int, index: int) -> _Walk:
        """Hold the lane until what a WAIT is for has ended."""
        found, began = self.found[lane], self.free[lane]
        target = found[self.lanes[lane].rows[index].target]
        yield from self.wait(lane, target if isinstance(target, _Meeting) else _Meeting(1))
        found[index] = Span(began, self.free[lane])

    def post(self, lane: int, stream: Stream, first: float, then: Sequence[float] = ()) -> _Meeting:
        """Come to the next operation of a stream: of ``first`` seconds, and ``then`` of more in a chain."""
        place = stream, lane
        number = self.num_posted.get(place, 0)
        self.num_posted[place] = number + 1
        line = self.meetings.setdefault(stream, [])
        if number == len(line):
            line.append(_Meeting(len(stream.lanes)))
        meeting = line[number]
        meeting.missing -= 1
        meeting.ready = max(meeting.ready, self.free[lane])
        if not meeting.missing:
            start, end = advance(self.free, Operation((stream,), meeting.ready, first))
            self.free[stream] = end = chain(end, then)
            meeting.span = Span(start, end)
            self.ready.extend(meeting.waiting)
        return meeting

    def post_row(self, lane: int, index: int) -> _Meeting:
        """Post what a row moves."""
        own = self.lanes[lane]
        stream = _row_stream(own, lane, own.rows[index])
        meeting = self.post(lane, stream, own.seconds[index] * stream.factor)
        self.found[lane][index] = meeting
        return meeting

    def compute(self, lane: int, index: int, row: Row) -> _Walk:
        """A body: in a few chains, or one operation after the other where something may move beside it."""
        body = self.bodies.get((lane, row.stage, row.kind))
        if body is None or index >= self.first_sums[lane]:
            yield from self.compute_by_segment(lane, index, row)
            return
        for leg in body.legs:
            self.free[lane] = chain(self.free[lane], leg.before)
            yield from self.wait(lane, self.post(lane, leg.stream, leg.first, leg.then))
        self.free[lane] = chain(self.free[lane], body.after)

    def compute_by_segment(self, lane: int, index: int, row: Row) -> _Walk:
        own = self.lanes[lane]
        segments = _segments(own, row.stage, row.kind)
        for position, segment in enumerate(segments):
            yield from self.compute_segment(lane, segment)
            number = position if row.kind is Kind.FORWARD else len(segments) - 1 - position
            for posted in self.anchored[lane].get((index, number), ()):
                self.pause(lane, posted)
                if own.rows[posted].kind is Kind.WAIT:
                    yield from self.wait_row(lane, posted)
                else:
                    self.post_row(lane, posted)

    def compute_segment(self, lane: int, segment: SegmentCost) -> _Walk:
        own, under_way = self.lanes[lane], deque[_Meeting]()
        for stretch, collective in zip_longest(segment.compute, segment.collectives):
            self.spend(lane, stretch * own.factor)
            if collective is None:
                continue
            if collective.kind == WAIT:
                if under_way:
                    yield from self.wait(lane, under_way.popleft())
                continue
            stream = own.communicators[collective.group]
            meeting = self.post(lane, stream, collective.seconds * stream.factor)
            if collective.asynchronous:
                under_way.append(meeting)
            else:
                yield from self.wait(lane, meeting)


def _span(found: Span | _Meeting | None) -> Span:
    span = found.span if isinstance(found, _Meeting) else found
    assert span is not None
    return span


def _row_stream(own: Lane, lane: int, row: Row) -> Stream:
    """Where a row that is no computing runs."""
    if row.kind in SENDS or row.kind in RECEIVES:
        peer, factor = own.peers[row.peer]
        name = "forward" if row.kind in (Kind.SEND_F, Kind.RECV_F) else "backward"
        return Stream(name, (lane, peer) if row.kind in SENDS else (peer, lane), factor)
    if row.kind in COPIES:
        return Stream(COPIES[row.kind], (lane,))
    return own.communicators[own.group_names[row.group]]


def _segments(own: Lane, stage: int, kind: Kind) -> Sequence[SegmentCost]:
    found: Sequence[SegmentCost] = of_kind(own.stages[stage], kind)
    return found


def _parts(own: Lane, segment: SegmentCost) -> Iterator[_Part]:
    """Seconds of a segment in order, and the communicator of those that are a collective."""
    for stretch, collective in zip_longest(segment.compute, segment.collectives):
        yield stretch * own.factor, None
        if collective is not None and collective.kind != WAIT:
            stream = own.communicators[collective.group]
            yield collective.seconds * stream.factor, stream


def _first_sum(own: Lane) -> int:
    """The first row in which the sum of a bucket is posted; from there on it may move beside a body."""
    sums = (
        index if row.anchor_row < 0 else row.anchor_row
        for index, row in enumerate(own.rows)
        if row.kind in (Kind.REDUCE, Kind.REDUCE_SCATTER)
    )
    return min(sums, default=len(own.rows))


def _bodies(lanes: Sequence[Lane]) -> dict[_Place, _Body]:
    """The chains of every body in which nothing moves while the lane computes."""
    parts = {
        (lane, stage, kind): [
            part for segment in _segments(own, stage, kind) for part in _parts(own, segment)
        ]
        for lane, own in enumerate(lanes)
        for stage in own.stages
        for kind in COMPUTE
        if not any(
            collective.asynchronous
            for segment in _segments(own, stage, kind)
            for collective in segment.collectives
        )
    }
    joint = {place: _joint(own) for place, own in parts.items()}
    return {place: _body(place, parts, joint) for place in parts}


def _joint(parts: Sequence[_Part]) -> dict[int, int]:
    """The collectives of several lanes, by index, and the index of the one before (-1 for the first)."""
    found = [index for index, (_, stream) in enumerate(parts) if stream is not None and len(stream.lanes) > 1]
    return dict(zip(found, [-1, *found], strict=False))


def _body(
    place: _Place, parts: Mapping[_Place, Sequence[_Part]], joint: Mapping[_Place, Mapping[int, int]]
) -> _Body:
    own, legs, alone_from = parts[place], list[_Leg](), 0
    for index, previous in joint[place].items():
        seconds, stream = own[index]
        assert stream is not None
        in_step = _in_step(place, previous, index, parts, joint)
        if in_step:
            legs[-1].then.extend((*in_step, seconds))
        else:
            legs.append(_Leg([part for part, _ in own[alone_from:index]], stream, seconds, []))
        alone_from = index + 1
    return _Body(legs, [part for part, _ in own[alone_from:]])


def _in_step(
    place: _Place,
    previous: int,
    index: int,
    parts: Mapping[_Place, Sequence[_Part]],
    joint: Mapping[_Place, Mapping[int, int]],
) -> Sequence[float]:
    """What the slowest lane of a collective computes between it and the one before.

    Nothing if that one had other lanes, or some of these meet others in between, or none is the slowest
    throughout.
    """
    _, stage, kind = place
    stream, last = parts[place][index][1], parts[place][previous][1]
    assert stream is not None
    together = [(other, stage, kind) for other in stream.lanes]
    if previous < 0 or last is None or last.lanes != stream.lanes:
        return ()
    if any(joint[other].get(index) != previous for other in together):
        return ()
    computed = [[part for part, _ in parts[other][previous + 1 : index]] for other in together]
    slowest = [max(part) for part in zip(*computed, strict=True)]
    return slowest if slowest in computed else ()
