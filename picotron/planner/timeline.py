"""Timelines: when rows start and end, predicted or measured, and as traces; and the bubble of a schedule."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from attrs import cmp_using, field, frozen

from picotron.planner.cost import StageCost
from picotron.planner.pipeline import Schedule
from picotron.planner.program import Row
from picotron.planner.schedule_times import PipelineCosts, idle_seconds, schedule_times

STREAMS = ("compute", "send", "receive", "collective", "copy")

_array: Any = field(eq=cmp_using(eq=np.array_equal), repr=False)


@frozen(kw_only=True)
class Timeline:
    """When rows ran, predicted or measured alike; ``clock`` says which kind of seconds these are.

    Columns over all rows: ``rank`` (global; in a ``Prediction`` the pipeline rank), ``row``, ``operation``
    (-1: the row itself), ``stream`` (index into STREAMS), ``start`` and ``end`` in seconds since the step
    began.
    """

    clock: str
    rank: np.ndarray = _array
    row: np.ndarray = _array
    operation: np.ndarray = _array
    stream: np.ndarray = _array
    start: np.ndarray = _array
    end: np.ndarray = _array

    @property
    def makespan_seconds(self) -> float:
        """From the first start to the last end."""
        return float(self.end.max() - self.start.min())


def make_timeline(clock: str, entries: Sequence[tuple[int, int, int, int, float, float]]) -> Timeline:
    """A timeline of (rank, row, operation, stream, start, end), ordered by rank and row."""
    columns = list(zip(*sorted(entries), strict=True))
    whole = [np.array(column, dtype=np.int64) for column in columns[:4]]
    seconds = [np.array(column, dtype=np.float64) for column in columns[4:]]
    names = ("rank", "row", "operation", "stream", "start", "end")
    return Timeline(clock=clock, **dict(zip(names, [*whole, *seconds], strict=True)))


def bubble_seconds(schedule: Schedule, stages: Sequence[StageCost]) -> tuple[float, ...]:
    """Idle seconds of each pipeline rank in the schedule itself: makespan less work, transfers free."""
    costs = pipeline_costs(stages)
    return idle_seconds(schedule, costs, schedule_times(schedule, costs))


def pipeline_costs(stages: Sequence[StageCost]) -> PipelineCosts:
    """The costs of stages as a schedule by itself counts them: a B takes what I and W take."""
    return PipelineCosts(
        forward_seconds=(stage.forward_seconds for stage in stages),
        input_seconds=(stage.backward_input_seconds for stage in stages),
        weight_seconds=(stage.backward_weight_seconds for stage in stages),
    )


def chrome_trace(timeline: Timeline, programs: Sequence[Sequence[Row]] | Mapping[int, Sequence[Row]]) -> str:
    """The timeline as Chrome trace JSON, which Perfetto opens; one process a rank, one thread a stream.

    ``programs``: the rows of each rank that the timeline names. Times are microseconds.
    """
    events: list[dict[str, object]] = [
        {"ph": "M", "name": "process_name", "pid": rank, "tid": 0, "args": {"name": f"rank {rank}"}}
        for rank in sorted(set(timeline.rank.tolist()))
    ] + [
        {"ph": "M", "name": "thread_name", "pid": rank, "tid": tid, "args": {"name": name}}
        for rank in sorted(set(timeline.rank.tolist()))
        for tid, name in enumerate(STREAMS)
    ]
    columns = (timeline.rank, timeline.row, timeline.stream, timeline.start, timeline.end)
    for rank, index, stream, start, end in zip(*(column.tolist() for column in columns), strict=True):
        row = programs[rank][index]
        events.append(
            {
                "ph": "X",
                "name": str(row),
                "cat": row.kind.name,
                "pid": rank,
                "tid": stream,
                "ts": start * 1e6,
                "dur": (end - start) * 1e6,
                "args": {"row": index, "bytes": row.bytes},
            }
        )
    return json.dumps({"traceEvents": events, "otherData": {"clock": timeline.clock}}, separators=(",", ":"))
