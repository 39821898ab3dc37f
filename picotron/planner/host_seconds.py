"""CPU seconds of every rank in a step, on a machine where they were measured: computing and communicating.

``predict`` counts a collective as time that a rank waits; here it is what the rank's processor does for it,
by call and by byte. Ranks share the machine's processors, so the sum over ranks is what a step costs it.
"""

from __future__ import annotations

from collections import Counter
from functools import cache

from picotron.planner.cost import of_kind, stage_costs
from picotron.planner.plan import TrainingPlan
from picotron.planner.program import COMPUTE, RECEIVES, SENDS, Kind, rows
from picotron.planner.topology import coordinate

Calls = Counter[tuple[str, int]]
"""How often a rank calls, by (kind, payload bytes)."""


def cpu_seconds_by_rank(plan: TrainingPlan) -> tuple[float, ...]:
    """CPU seconds of each rank; those of communication are 0 unless they were measured."""

    @cache
    def of_place(pp: int, tp: int) -> float:
        return _compute_seconds(plan, pp, tp) + _communication_seconds(plan, calls(plan, pp, tp))

    topology = plan.topology
    places = (coordinate(topology, rank) for rank in range(topology.world_size))
    return tuple(of_place(where.pp, where.tp) for where in places)


def calls(plan: TrainingPlan, pp: int, tp: int = 0) -> Calls:
    """The communication calls of the ranks at one pipeline and tensor-parallel place in a step."""
    program, found = plan.program(tp), Counter[tuple[str, int]]()
    for row in rows(program, pp):
        if row.kind in COMPUTE:
            for segment in of_kind(plan.bodies(row.stage, tp), row.kind).segments:
                found.update((call.kind, call.payload_bytes) for call in segment.collectives)
        elif row.kind in SENDS:
            found["send", row.bytes] += 1
        elif row.kind in RECEIVES:
            found["recv", row.bytes] += 1
        elif row.kind in (Kind.REDUCE, Kind.COUNT, Kind.NORM) and row.bytes:
            found["all_reduce", row.bytes] += 1
    return found


def _compute_seconds(plan: TrainingPlan, pp: int, tp: int) -> float:
    costs, stages = stage_costs(plan, tp), plan.rank_stages(pp)
    runs = Counter((row.stage, row.kind) for row in rows(plan.program(tp), pp) if row.kind in COMPUTE)
    computed = sum(costs[stage].compute_seconds(kind) * count for (stage, kind), count in runs.items())
    return computed + sum(costs[stage].update_seconds for stage in stages)


def _communication_seconds(plan: TrainingPlan, found: Calls) -> float:
    reached = plan.cluster.efficiency
    if reached.measured is None:
        return 0.0
    seconds = sum(
        reached.measured.call_seconds(kind, payload_bytes) * count
        for (kind, payload_bytes), count in found.items()
    )
    return seconds * reached.communication_scale
