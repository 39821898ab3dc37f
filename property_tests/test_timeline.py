"""The timeline of every rank equals an oracle's: longest paths in a graph of what needs what.

The oracle knows no classes: it has a node for each addition that the rule of time asks for, on each rank by
itself, so that even rounding is the same.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from math import prod
from typing import Any

import pytest
from attrs import evolve, frozen
from hypothesis import event, given
from hypothesis import strategies as st

from picotron.errors import PlanError
from picotron.planner import lanes
from picotron.planner.actions import Action, Phase, cells, parse_cell
from picotron.planner.body import WAIT
from picotron.planner.clock import Operation, advance
from picotron.planner.cost import SegmentCost, StageCost, of_kind
from picotron.planner.faults import Fault, Pause, Slow
from picotron.planner.lower import lower
from picotron.planner.pipeline import Schedule
from picotron.planner.plan import TrainingPlan
from picotron.planner.predict import predict
from picotron.planner.program import COMPUTE, RECEIVES, SENDS, Kind, Program, Row, rows
from picotron.planner.schedules import afab, one_f_one_b
from picotron.planner.simulate import (
    Durations,
    SimulatedStep,
    durations,
    priced_step,
    simulate_program,
    simulate_step,
    slices,
    summed,
)
from picotron.planner.timeline import Timeline, bubble_seconds, chrome_trace
from picotron.planner.topology import Coordinate, coordinate, group_of, rank_of
from property_tests.strategies import DENSE, SPARSE, interleavings, plans, quarters, schedules, stage_costs
from property_tests.strategies_faults import step_scripts
from property_tests.strategies_timeline import prices

EVERY = DENSE + SPARSE

Node = tuple[Any, ...]
Times = list[tuple[float, float]]


class _Graph:
    """Nodes that take seconds and start when all that they need has ended."""

    def __init__(self) -> None:
        self.needs: dict[Node, set[Node]] = defaultdict(set)
        self.seconds: dict[Node, float] = {}

    def add(self, node: Node, seconds: float, *needs: Node) -> None:
        self.seconds[node] = seconds
        self.needs[node] |= set(needs)

    def spans(self) -> dict[Node, tuple[float, float]]:
        """Start and end of each node. Raises CycleError if none could go first."""
        spans: dict[Node, tuple[float, float]] = {}
        for node in TopologicalSorter(self.needs).static_order():
            start = max((spans[need][1] for need in self.needs[node]), default=0.0)
            spans[node] = start, start + self.seconds[node]
        return spans


@frozen(kw_only=True)
class _Rank:
    """One rank of the oracle's world: its rows, its prices and whom it meets."""

    rows: tuple[Row, ...]
    group_names: tuple[str, ...]
    seconds: Durations
    update_seconds: float
    group: Callable[[str], tuple[int, ...]]
    peer: Callable[[int], int]


def _oracle(world: list[_Rank], faults: tuple[Fault, ...] = ()) -> list[Times]:
    """(start, end) of each row of each rank, by longest paths over an explicit graph.

    ("own", r, n) is the n-th thing that happens on rank r itself, ("sum", group, ranks, k) the k-th operation
    of one communicator, ("message", sender, receiver, direction, microbatch) a transfer.
    """
    graph = _Graph()
    shown: list[list[tuple[Node, Node]]] = []
    for rank, own in enumerate(world):
        shown.append(_add_rank(graph, world, rank, own, faults))
    spans = graph.spans()
    return [
        [spans[first] if first == last else (spans[first][1], spans[last][1]) for first, last in nodes]
        for nodes in shown
    ]


def _add_rank(
    graph: _Graph, world: list[_Rank], rank: int, own: _Rank, faults: tuple[Fault, ...]
) -> list[tuple[Node, Node]]:
    """The nodes of one rank; for each row its own node twice, or the nodes between whose ends it lies."""
    slow = prod(f.factor for f in faults if isinstance(f, Slow) and f.rank == rank)
    line: list[Node] = [("own", rank, 0)]
    graph.add(line[0], 0.0)
    counts: dict[str, int] = defaultdict(int)
    last_sent: dict[tuple[int, bool], Node] = {}
    shown: dict[int, tuple[Node, Node]] = {}

    def pass_time(seconds: float, *needs: Node) -> Node:
        node: Node = ("own", rank, len(line))
        graph.add(node, seconds, line[-1], *needs)
        line.append(node)
        return node

    def link(ranks: tuple[int, ...]) -> float:
        slowed = [f for f in faults if isinstance(f, Slow) and f.link is not None]
        return prod(f.factor for f in slowed if f.link is not None and set(f.link) <= set(ranks))

    def post(name: str, seconds: float) -> Node:
        ranks = own.group(name)
        node: Node = ("sum", name, ranks, counts[name])
        graph.add(node, seconds * link(ranks), line[-1])
        if counts[name]:
            graph.needs[node].add(("sum", name, ranks, counts[name] - 1))
        counts[name] += 1
        return node

    def pause(index: int) -> None:
        for fault in faults:
            if isinstance(fault, Pause) and (fault.rank, fault.at) == (rank, index):
                pass_time(fault.seconds)

    def compute(index: int, row: Row) -> None:
        costs = of_kind(own.seconds.stages[row.stage], row.kind)
        segments = list(enumerate(costs)) if row.kind is Kind.FORWARD else _numbered_back(costs)
        for number, segment in segments:
            under_way: list[Node] = []
            for stretch, collective in zip(segment.compute, (*segment.collectives, None), strict=True):
                pass_time(stretch * slow)
                if collective is None:
                    continue
                if collective.kind != WAIT:
                    under_way.append(post(collective.group, collective.seconds))
                if not collective.asynchronous and under_way:
                    pass_time(0.0, under_way.pop(0))
            for other, inside in enumerate(own.rows):
                if (inside.anchor_row, inside.anchor_segment) == (index, number):
                    pause(other)
                    total(other, inside)

    def total(index: int, row: Row) -> Node:
        name = own.group_names[row.group]
        node = post(name, own.seconds.reduce_seconds[name, row.bytes])
        shown[index] = node, node
        return node

    for index, row in enumerate(own.rows):
        if row.anchor_row >= 0:
            continue
        pause(index)
        before = line[-1]
        if row.kind in COMPUTE:
            compute(index, row)
            shown[index] = before, line[-1]
        elif row.kind in SENDS or row.kind in RECEIVES:
            forward = row.kind in (Kind.SEND_F, Kind.RECV_F)
            peer = own.peer(row.peer)
            ends = (rank, peer) if row.kind in SENDS else (peer, rank)
            stage = row.stage + (0 if row.kind in (Kind.SEND_F, Kind.RECV_B) else -1)  # the lower of the two
            node: Node = ("message", *ends, forward, stage, row.microbatch)
            graph.add(node, own.seconds.send_seconds * link(ends), before)
            if row.kind in SENDS and (peer, forward) in last_sent:
                graph.needs[node].add(last_sent[peer, forward])
            if row.kind in SENDS:
                last_sent[peer, forward] = node
            shown[index] = node, node
        elif row.kind is Kind.WAIT:
            target, _ = shown[row.target]
            pass_time(0.0, target)
            shown[index] = before, line[-1]
        elif row.kind is Kind.UPDATE:
            node = pass_time(own.update_seconds * slow)
            shown[index] = node, node
        else:
            node = total(index, row)
            if row.kind is not Kind.REDUCE:
                pass_time(0.0, node)
    return [shown[index] for index in range(len(own.rows))]


def _numbered_back(segments: tuple[SegmentCost, ...]) -> list[tuple[int, SegmentCost]]:
    return list(zip(reversed(range(len(segments))), segments, strict=True))


def _world_of(made: TrainingPlan, seconds: dict[int, Durations]) -> list[_Rank]:
    """Every rank of a plan by itself; ``seconds`` by tensor-parallel rank."""

    def one(rank: int) -> _Rank:
        where, topology = coordinate(made.topology, rank), made.topology
        program = made.program(where.tp)
        return _Rank(
            rows=rows(program, where.pp),
            group_names=program.groups,
            seconds=seconds[where.tp],
            update_seconds=sum(
                seconds[where.tp].stages[stage].update_seconds for stage in made.rank_stages(where.pp)
            ),
            group=lambda name: group_of(topology, name, rank),
            peer=lambda pp: rank_of(topology, Coordinate(pp=pp, dp=where.dp, cp=where.cp, tp=where.tp)),
        )

    return [one(rank) for rank in range(made.topology.world_size)]


def _pipeline(program: Program, seconds: Durations) -> list[_Rank]:
    """A program by itself: one rank a pipeline rank, alone in all groups but the world and the tied ends."""
    everybody = tuple(range(program.num_ranks))

    def one(rank: int) -> _Rank:
        own = rows(program, rank)
        held = sorted({row.stage for row in own if row.kind in COMPUTE})
        return _Rank(
            rows=own,
            group_names=program.groups,
            seconds=seconds,
            update_seconds=sum(seconds.stages[stage].update_seconds for stage in held),
            group=lambda name: everybody if name == "world" else (rank,),
            peer=lambda pp: pp,
        )

    return [one(rank) for rank in everybody]


def _times(timeline: Timeline) -> Times:
    return list(zip(timeline.start.tolist(), timeline.end.tolist(), strict=True))


def _of_all_ranks(step: SimulatedStep) -> list[Times]:
    return [_times(step.rank_timeline(rank)) for rank in range(step.plan.topology.world_size)]


@given(plans(max_ranks=16, families=EVERY), st.data())
def test_every_ranks_timeline_is_the_oracles(made: TrainingPlan, data: st.DataObject) -> None:
    """Every start and end of every row of every rank, to the bit, whatever is slow, pauses or is uneven."""
    faults = data.draw(step_scripts(made))
    step = simulate_step(made, faults)
    event(f"{step.num_classes} classes of {made.topology.world_size} ranks")
    seconds = {index: durations(made, index) for index in range(made.topology.tp)}
    assert _of_all_ranks(step) == _oracle(_world_of(made, seconds), faults)


@given(plans(families=EVERY), st.data())
def test_every_ranks_timeline_is_the_oracles_at_any_price(made: TrainingPlan, data: st.DataObject) -> None:
    """Also where sums outlast bodies, messages are dear, and work takes no time."""
    faults, seconds = data.draw(step_scripts(made)), data.draw(prices(made))
    try:
        step = priced_step(made, faults, seconds)
    except PlanError as error:
        assert "a step must take between 0" in str(error)  # nothing takes any time
        return
    of_each = {index: seconds[first] for index, first in enumerate(slices(made))}
    assert _of_all_ranks(step) == _oracle(_world_of(made, of_each), faults)


@given(plans(families=EVERY), st.data())
def test_chains_are_what_one_operation_after_the_other_gives(made: TrainingPlan, data: st.DataObject) -> None:
    """To the bit: a body taken at once ends when all its operations, posted one by one, have ended."""
    faults = data.draw(step_scripts(made))
    step = simulate_step(made, faults)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lanes, "_first_sum", lambda own: 0)
        assert simulate_step(made, faults).timeline == step.timeline


@given(st.lists(st.floats(0, 1e6)), st.floats(0, 1e6))
def test_a_chain_is_the_rule_of_time_again_and_again(seconds: list[float], start: float) -> None:
    """On a stream that nobody else takes."""
    free = {"own": start}
    for own in seconds:
        free["own"] = advance(free, Operation(("own",), 0.0, own)).end
    assert lanes.chain(start, seconds) == free["own"]


@given(plans(families=EVERY))
def test_a_prediction_is_a_step_in_which_nothing_goes_wrong(made: TrainingPlan) -> None:
    """Its timeline is that of the first rank of every stage, its step the step of all."""
    prediction, step = predict(made), simulate_step(made)
    assert prediction.step_seconds == step.step_seconds
    for stage in range(made.topology.pp):
        own = step.rank_timeline(rank_of(made.topology, Coordinate(pp=stage)))
        shown = prediction.timeline.rank == stage
        starts, ends = prediction.timeline.start[shown], prediction.timeline.end[shown]
        assert list(zip(starts.tolist(), ends.tolist(), strict=True)) == _times(own)


def _priced(program: Program, stages: tuple[StageCost, ...], data: st.DataObject) -> Durations:
    """Any seconds, in quarters, for what ``program`` moves."""
    return Durations(
        stages=stages,
        send_seconds=data.draw(quarters()),
        reduce_seconds={key: data.draw(quarters(200)) for key in summed(program)},
    )


def _lowered(schedule: Schedule) -> Program:
    none: tuple[tuple[()], ...] = ((),) * schedule.num_stages
    return lower(
        schedule,
        boundary_bytes=4,
        buckets=none,
        bucket_bytes=none,
        data_parallel=False,
        world_size=schedule.num_ranks,
    )


@given(interleavings(), st.data())
def test_the_timeline_of_any_order_is_the_oracles(schedule: Schedule, data: st.DataObject) -> None:
    """Also with several stages a rank and microbatches out of order, wherever the order can be lowered."""
    try:
        program = _lowered(schedule)
    except PlanError:
        event("refused")
        return
    update = data.draw(quarters())
    stages = tuple(data.draw(stage_costs(2, update)) for _ in range(schedule.num_stages))
    seconds = _priced(program, stages, data)
    try:
        expected = _oracle(_pipeline(program, seconds))
    except CycleError:
        pytest.fail("a lowered program waits in a circle")
    assert _times(simulate_program(program, seconds)) == [span for own in expected for span in own]


def _longest_path(schedule: Schedule, stages: tuple[StageCost, ...]) -> tuple[float, list[float]]:
    """When the last action ends if transfers are free, and each rank's work."""
    graph, work = _Graph(), [0.0] * schedule.num_ranks
    seconds = {"F": "forward_seconds", "B": "backward_seconds"}
    seconds |= {"I": "backward_input_seconds", "W": "backward_weight_seconds"}
    joined = [[parse_cell(cell) for cell in cells(schedule.orders, r)] for r in range(schedule.num_ranks)]
    cell_of = {action: cell for own in joined for cell in own for action in cell}
    for rank, own in enumerate(joined):
        for cell, before in zip(own, (None, *own), strict=False):
            cost = sum(getattr(stages[action.stage], seconds[action.phase]) for action in cell)
            needs = {cell_of[need] for action in cell for need in _givers(action) if need in cell_of}
            graph.add(cell, cost, *needs, *([] if before is None else [before]))
            work[rank] += cost
    return max(end for _, end in graph.spans().values()), work


def _givers(action: Action) -> list[Action]:
    """What another stage might do for ``action``: it waits for the one of them that there is."""
    stage, microbatch = action.stage, action.microbatch
    if action.phase is Phase.FORWARD:
        return [Action(stage - 1, Phase.FORWARD, microbatch)]
    if action.phase is Phase.WEIGHT:
        return []
    return [Action(stage + 1, phase, microbatch) for phase in (Phase.BACKWARD, Phase.INPUT)]


@given(schedules() | interleavings(), st.data())
def test_bubbles_are_what_the_longest_path_leaves_idle(schedule: Schedule, data: st.DataObject) -> None:
    """Makespan less own work, never negative."""
    stages = tuple(data.draw(stage_costs(1, 0.0)) for _ in range(schedule.num_stages))
    makespan, work = _longest_path(schedule, stages)
    bubbles = bubble_seconds(schedule, stages)
    assert bubbles == tuple(makespan - own for own in work)
    assert min(bubbles) >= 0


@given(st.integers(1, 6), st.integers(1, 10), quarters().map(lambda f: f + 0.25), quarters())
def test_equal_stages_take_the_textbooks_time(p: int, m: int, f: float, b: float) -> None:
    """(m + p - 1)(f + b) for both orders, free transfers; the bubble is (p - 1)(f + b) on every rank."""
    stage = StageCost(
        forward=(SegmentCost(compute=(f,)),), backward=(SegmentCost(compute=(b,)),), update_seconds=0.0
    )
    for schedule in (one_f_one_b(p, m), afab(p, m)):
        program = _lowered(schedule)
        free = dict.fromkeys(summed(program), 0.0)
        seconds = Durations(stages=(stage,) * p, send_seconds=0.0, reduce_seconds=free)
        timeline = simulate_program(program, seconds)
        assert timeline.makespan_seconds == (m + p - 1) * (f + b)
        assert bubble_seconds(schedule, seconds.stages) == ((p - 1) * (f + b),) * p


@given(plans(families=EVERY), st.data())
def test_streams_run_one_thing_at_a_time(made: TrainingPlan, data: st.DataObject) -> None:
    """On each rank, channel and communicator rows do not overlap; every row ends after it starts."""
    faults = data.draw(step_scripts(made))
    step = simulate_step(made, faults)
    for rank in range(made.topology.world_size):
        where = coordinate(made.topology, rank)
        own, timeline = rows(made.program(where.tp), where.pp), step.rank_timeline(rank)
        streams: dict[tuple[object, ...], list[tuple[float, float]]] = defaultdict(list)
        for row, stream, span in zip(own, timeline.stream.tolist(), _times(timeline), strict=True):
            apart = row.group if row.kind is Kind.REDUCE else row.kind if stream else None
            streams[stream, apart].append(span)
            assert span[1] >= span[0]
        for spans in streams.values():
            assert all(left[1] <= right[0] for left, right in pairwise(sorted(spans)))


@given(plans(families=EVERY), st.data())
def test_dearer_parts_never_shorten_the_step(made: TrainingPlan, data: st.DataObject) -> None:
    """A slower transfer delays or does nothing: no anomaly where everything is ordered beforehand."""
    seconds = {index: durations(made, index) for index in set(slices(made))}
    more = data.draw(quarters())
    slower = {
        index: evolve(
            own,
            send_seconds=own.send_seconds + more,
            reduce_seconds={key: value + 0.25 for key, value in own.reduce_seconds.items()},
        )
        for index, own in seconds.items()
    }
    assert priced_step(made, (), slower).step_seconds >= priced_step(made, (), seconds).step_seconds


@given(plans(max_ranks=4), st.data())
def test_traces_are_json_with_an_event_a_row(made: TrainingPlan, data: st.DataObject) -> None:
    """Whatever the plan, its trace is read back with as many events as rows, none before the step."""
    step = simulate_step(made, data.draw(step_scripts(made)))
    places = {rank: coordinate(made.topology, rank) for rank in step.classes.ranks}
    programs = {rank: rows(made.program(where.tp), where.pp) for rank, where in places.items()}
    trace = json.loads(chrome_trace(step.timeline, programs))
    events = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert len(events) == sum(map(len, programs.values()))
    assert min(e["ts"] for e in events) >= 0 and min(e["dur"] for e in events) >= 0
