"""The timeline of any program equals an oracle's: longest paths in a graph of what needs what."""

from __future__ import annotations

import json
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from picotron.errors import PlanError
from picotron.planner.cost import SegmentCost, StageCost
from picotron.planner.pipeline import Schedule, afab, one_f_one_b
from picotron.planner.plan import TrainingPlan
from picotron.planner.program import COMPUTE, RECEIVES, SENDS, Kind, Program, Row, lower, rows
from picotron.planner.timeline import Durations, bubble_seconds, chrome_trace, durations, simulate_program
from property_tests.strategies import interleavings, plans, quarters, schedules, stage_costs

Node = tuple[Any, ...]
Times = dict[tuple[int, int], tuple[float, float]]


class _Graph:
    """Nodes that take seconds and start when all that they need has ended."""

    def __init__(self) -> None:
        self.needs: dict[Node, set[Node]] = defaultdict(set)
        self.seconds: dict[Node, float] = {}

    def add(self, node: Node, seconds: float, *needs: Node) -> None:
        self.seconds[node] = seconds
        self.needs[node] |= set(needs)

    def ends(self) -> dict[Node, float]:
        """When each node ends. Raises CycleError if none could go first."""
        ends: dict[Node, float] = {}
        for node in TopologicalSorter(self.needs).static_order():
            ends[node] = max((ends[n] for n in self.needs[node]), default=0.0) + self.seconds.get(node, 0.0)
        return ends


def _border(row: Row) -> tuple[bool, int, int]:
    """(forward, lower stage, microbatch): what a send and its receive have in common."""
    forward = row.kind in (Kind.SEND_F, Kind.RECV_F)
    below = row.kind in (Kind.SEND_F, Kind.RECV_B)
    return forward, row.stage if below else row.stage - 1, row.microbatch


def _oracle(program: Program, seconds: Durations) -> Times:
    """(start, end) of each row, by longest paths over an explicit graph.

    ("past", r, i): rank r's compute stream is past row i. ("inside", r, i, n): it is past the n-th segment
    of row i. ("moved", border): a transfer is over. ("summed", r, i): the bucket of row i is. Transfers of
    one channel and reductions of one rank follow each other in the order in which they are posted.
    """
    graph, nodes = _Graph(), {}
    own = [rows(program, rank) for rank in range(program.num_ranks)]
    inside: dict[tuple[int, int, int], Node] = {}
    sends: dict[tuple[int, int, bool], list[Node]] = defaultdict(list)
    sums: list[list[tuple[tuple[int, int, int], int]]] = [[] for _ in own]
    meetings: dict[Kind, list[Node]] = defaultdict(list)
    for rank, rs in enumerate(own):
        for i, row in enumerate(rs):
            here, before = ("past", rank, i), ("past", rank, i - 1)
            if i == 0:
                graph.add(before, 0.0)
            cost = 0.0
            needs: list[Node] = [before]
            if row.kind in COMPUTE:
                stage = seconds.stages[row.stage]
                own_costs = stage.forward if row.kind is Kind.FORWARD else stage.backward
                for n, segment in enumerate(own_costs):
                    step = ("inside", rank, i, n)
                    graph.add(step, segment.compute_seconds + segment.communication_seconds, needs[-1])
                    number = n if row.kind is Kind.FORWARD else len(own_costs) - 1 - n
                    inside[rank, i, number] = step
                    needs = [step]
                nodes[rank, i] = None
            elif row.kind in SENDS or row.kind in RECEIVES:
                moved = ("moved", *_border(row))
                graph.add(moved, seconds.send_seconds, before)
                nodes[rank, i] = moved
                if row.kind in SENDS:
                    sends[rank, row.peer, row.kind is Kind.SEND_F].append(moved)
            elif row.kind is Kind.REDUCE:
                at = (row.anchor_row, -row.anchor_segment, i) if row.anchor_row >= 0 else (i, 0, i)
                sums[rank].append((at, i))
            elif row.kind in (Kind.NORM, Kind.COUNT):
                cost = seconds.reduce_seconds[program.groups[row.group], row.bytes]
                meetings[row.kind].append(before)
                nodes[rank, i] = here
            elif row.kind is Kind.UPDATE:
                cost = seconds.stages[rank].update_seconds
            graph.add(here, cost, *needs)
    for posted in sends.values():
        for earlier, later in pairwise(posted):
            graph.needs[later].add(earlier)
    tied = [i for _, i in sorted(sums[0]) if program.groups[own[0][i].group] == "embedding"]
    for rank, rs in enumerate(own):
        previous: list[Node] = []
        number_tied = 0
        for _, i in sorted(sums[rank]):
            row = rs[i]
            group = program.groups[row.group]
            node: Node = ("summed", rank, i)
            if group == "embedding":
                node = ("summed", 0, tied[number_tied])
                number_tied += 1
            posted_by = inside[rank, row.anchor_row, row.anchor_segment] if row.anchor_row >= 0 else None
            graph.add(node, seconds.reduce_seconds[group, row.bytes], posted_by or ("past", rank, i - 1))
            graph.needs[node] |= set(previous)
            previous, nodes[rank, i] = [node], node
        for i, row in enumerate(rs):
            if row.kind is Kind.WAIT:
                graph.needs["past", rank, i].add(nodes[rank, row.target])
            if row.kind is Kind.NORM:
                graph.needs["past", rank, i] |= set(meetings[Kind.NORM])
    ends = graph.ends()
    times: Times = {}
    for rank, rs in enumerate(own):
        for i in range(len(rs)):
            node = nodes.get((rank, i))
            if node is None:
                times[rank, i] = ends["past", rank, i - 1], ends["past", rank, i]
            else:
                times[rank, i] = ends[node] - graph.seconds[node], ends[node]
    return times


def _simulated(program: Program, seconds: Durations) -> Times:
    timeline = simulate_program(program, seconds)
    columns = (timeline.rank, timeline.row, timeline.start, timeline.end)
    return {
        (rank, row): (start, end)
        for rank, row, start, end in zip(*(column.tolist() for column in columns), strict=True)
    }


@st.composite
def _priced(draw: st.DrawFn, program: Program, segments: list[int]) -> Durations:
    """Any seconds, in quarters, for all that ``program`` does on stages of so many segments."""
    update = draw(quarters())
    keys = {
        (program.groups[group], size)
        for kind, group, size in zip(
            program.kind.tolist(), program.group.tolist(), program.bytes.tolist(), strict=True
        )
        if kind in (Kind.REDUCE, Kind.NORM, Kind.COUNT)
    }
    return Durations(
        stages=tuple(draw(stage_costs(count, update)) for count in segments),
        send_seconds=draw(quarters()),
        reduce_seconds={key: draw(quarters(200)) for key in sorted(keys)},
    )


@given(plans(), st.data())
def test_a_plans_timeline_is_the_oracles(made: TrainingPlan, data: st.DataObject) -> None:
    """Every start and end of every row, to the bit, for any seconds."""
    program = made.program()
    seconds = data.draw(_priced(program, [len(own) for own in made.stage_segments]))
    assert _simulated(program, seconds) == _oracle(program, seconds)


@given(plans())
def test_a_plans_own_prices_give_the_oracles_timeline(made: TrainingPlan) -> None:
    """With the roofline's seconds too, but for rounding."""
    program = made.program()
    seconds = durations(made, program)
    found, expected = _simulated(program, seconds), _oracle(program, seconds)
    assert found.keys() == expected.keys()
    for key, times in found.items():
        assert times == pytest.approx(expected[key], rel=1e-12, abs=1e-15)


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
    seconds = data.draw(_priced(program, [2] * schedule.num_stages))
    try:
        expected = _oracle(program, seconds)
    except CycleError:
        pytest.fail("a lowered program waits in a circle")
    assert _simulated(program, seconds) == expected


def _longest_path(schedule: Schedule, seconds: Durations) -> tuple[float, list[float]]:
    """When the last action ends if transfers are free, and each rank's work."""
    graph, work = _Graph(), [0.0] * schedule.num_ranks
    for rank, order in enumerate(schedule.orders):
        for action, before in zip(order, (None, *order), strict=False):
            stage = seconds.stages[action.stage]
            forward = str(action.phase) == "F"
            cost = stage.forward_seconds if forward else stage.backward_seconds
            neighbour = action.stage + (-1 if forward else 1)
            graph.add((action.stage, str(action.phase), action.microbatch), cost)
            needs = graph.needs[action.stage, str(action.phase), action.microbatch]
            if before is not None:
                needs.add((before.stage, str(before.phase), before.microbatch))
            if 0 <= neighbour < schedule.num_stages:
                needs.add((neighbour, str(action.phase), action.microbatch))
            work[rank] += cost
    return max(graph.ends().values()), work


@given(schedules() | interleavings(), st.data())
def test_bubbles_are_what_the_longest_path_leaves_idle(schedule: Schedule, data: st.DataObject) -> None:
    """Makespan less own work, never negative."""
    stages = tuple(data.draw(stage_costs(1, 0.0)) for _ in range(schedule.num_stages))
    seconds = Durations(stages=stages, send_seconds=0.0, reduce_seconds={})
    makespan, work = _longest_path(schedule, seconds)
    bubbles = bubble_seconds(schedule, stages)
    assert bubbles == tuple(makespan - own for own in work)
    assert min(bubbles) >= 0


@given(st.integers(1, 6), st.integers(1, 10), quarters(), quarters())
def test_equal_stages_take_the_textbooks_time(p: int, m: int, f: float, b: float) -> None:
    """(m + p - 1)(f + b) for both orders, free transfers; the bubble is (p - 1)(f + b) on every rank."""
    stage = StageCost(
        forward=(SegmentCost(compute_seconds=f, communication_seconds=0.0),),
        backward=(SegmentCost(compute_seconds=b, communication_seconds=0.0),),
        update_seconds=0.0,
    )
    for schedule in (one_f_one_b(p, m), afab(p, m)):
        program = _lowered(schedule)
        keys = {(program.groups[g], s) for g, s in zip(program.group, program.bytes, strict=True) if g >= 0}
        seconds = Durations(stages=(stage,) * p, send_seconds=0.0, reduce_seconds=dict.fromkeys(keys, 0.0))
        timeline = simulate_program(program, seconds)
        assert timeline.makespan_seconds == (m + p - 1) * (f + b)
        assert bubble_seconds(schedule, seconds.stages) == ((p - 1) * (f + b),) * p


@given(plans(), st.data())
def test_streams_run_one_thing_at_a_time(made: TrainingPlan, data: st.DataObject) -> None:
    """On each stream of each rank, rows do not overlap; every row ends after it starts."""
    program = made.program()
    seconds = data.draw(_priced(program, [len(own) for own in made.stage_segments]))
    timeline = simulate_program(program, seconds)
    lanes: dict[tuple[int, int, bool], list[tuple[float, float]]] = defaultdict(list)
    for rank, row, stream, start, end in zip(
        timeline.rank.tolist(),
        timeline.row.tolist(),
        timeline.stream.tolist(),
        timeline.start.tolist(),
        timeline.end.tolist(),
        strict=True,
    ):
        kind = rows(program, rank)[row].kind
        lanes[rank, stream, kind in (Kind.SEND_F, Kind.RECV_F)].append((start, end))
        assert end >= start
    for spans in lanes.values():
        ordered = sorted(spans)
        assert all(left[1] <= right[0] for left, right in pairwise(ordered))


@given(plans(), st.data())
def test_dearer_parts_never_shorten_the_step(made: TrainingPlan, data: st.DataObject) -> None:
    """A slower transfer delays or does nothing: no anomaly where everything is ordered beforehand."""
    program = made.program()
    seconds = data.draw(_priced(program, [len(own) for own in made.stage_segments]))
    slower = Durations(
        stages=seconds.stages,
        send_seconds=seconds.send_seconds + data.draw(quarters()),
        reduce_seconds={key: value + 0.25 for key, value in seconds.reduce_seconds.items()},
    )
    before, after = simulate_program(program, seconds), simulate_program(program, slower)
    assert after.makespan_seconds >= before.makespan_seconds


@given(plans(max_ranks=4))
def test_traces_are_json_with_an_event_a_row(made: TrainingPlan) -> None:
    """Whatever the plan, its trace is read back with as many events as rows, none before the step."""
    program = made.program()
    timeline = simulate_program(program, durations(made, program))
    trace = json.loads(chrome_trace(timeline, [rows(program, r) for r in range(program.num_ranks)]))
    events = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert len(events) == program.num_rows
    assert min(e["ts"] for e in events) >= 0 and min(e["dur"] for e in events) >= 0
