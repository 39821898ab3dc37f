"""The seconds of a simulated step by cause, on the rank that works longest; they sum to the step exactly.

Its own work is split as it was priced: on accelerators by the causes of the time model for each layer and
end, elsewhere by the kind of every operation. What it waits for belongs to what is under way meanwhile: a
transfer between stages, a reduction or gather of data parallelism, a copy to the host. The rest of its waits
and the end of the step, when it has nothing left to do, are the pipeline's bubble; without a pipeline, and
inside its collectives, they are the schedule's: ranks with other slices come later.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from picotron.planner.body import COLLECTIVES as BODY_COLLECTIVES
from picotron.planner.body import WAIT, Bodies, Body, Operation, SegmentBody
from picotron.planner.classes import axis_indices
from picotron.planner.cost import (
    SegmentCost,
    StageCost,
    compute_seconds,
    launch_seconds,
    of_kind,
    segment_overhead_seconds,
)
from picotron.planner.estimate import CAUSES as ESTIMATED
from picotron.planner.plan import TrainingPlan
from picotron.planner.profile_prices import ProfileSeconds, body_units, profile_seconds
from picotron.planner.program import COLLECTIVES, COMPUTE, COPIES, RECEIVES, SENDS, Kind, Program, Row, rows
from picotron.planner.simulate import Durations, SimulatedStep, slices

CAUSES = (*ESTIMATED, "schedule")
ROUNDING = 1e-12  # of a sum of many floats, relative
_OF_GROUP = {"tp": "tensor", "cp": "context", "ep": "expert", "etp": "expert"}
_OF_KIND = {"matmul": "matmul", "attention": "attention", "kernel": "elementwise"}
_SUMMED = (Kind.COUNT, Kind.NORM)
_NUDGES = (1.0, 0.9, 1.1, 0.75, 1.25, 0.5, 1.5, 2.0)  # of a rounding, until sums of floats agree
_SPLIT = (Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)
_AWAITED = {
    **dict.fromkeys((*SENDS, *RECEIVES), "pipeline_transfer"),
    **dict.fromkeys(COLLECTIVES, "data"),
    **dict.fromkeys(COPIES, "offload"),
}

Seconds = tuple[tuple[str, float], ...]
Parts = defaultdict[str, float]
Runs = Counter[tuple[int, Kind]]


def step_causes(plan: TrainingPlan, step: SimulatedStep, seconds: Mapping[int, Durations]) -> Seconds:
    """Seconds of ``step`` by cause, in the order of CAUSES; ``seconds`` are its prices by ``slices``."""
    indices, own_slice = axis_indices(plan.topology), slices(plan)
    places = [(indices["pp"][rank], own_slice[indices["tp"][rank]]) for rank in step.classes.ranks]
    counts = [runs(plan.program(index), pp) for pp, index in places]
    work = [_work_seconds(own, seconds[index].stages) for own, (_, index) in zip(counts, places, strict=True)]
    busiest = max(range(len(work)), key=work.__getitem__)
    pp, index = places[busiest]
    found = _own_causes(plan, index, counts[busiest], seconds[index].stages)
    computed = sum(found.values())
    waits, spent = _waits(step, busiest, rows(plan.program(index), pp))
    idle = "pipeline_bubble" if plan.topology.pp > 1 else "schedule"
    found[idle] += _beyond_rounding(waits.pop("idle"), step.step_seconds)
    found["schedule"] += _beyond_rounding(spent - computed, spent)
    for cause, value in waits.items():
        found[cause] += value
    return summing_to(step.step_seconds, {cause: found[cause] for cause in CAUSES})


def _beyond_rounding(value: float, whole: float) -> float:
    """A difference of sums as large as ``whole``; 0 where rounding alone made it."""
    return value if value > ROUNDING * whole else 0.0


def runs(program: Program, rank: int) -> Runs:
    """How often a pipeline rank runs each (stage, kind) that computes."""
    own = slice(*program.offsets[rank : rank + 2])
    pairs = zip(program.stage[own].tolist(), program.kind[own].tolist(), strict=True)
    return Counter((stage, Kind(kind)) for stage, kind in pairs if kind in COMPUTE)


def _work_seconds(own: Runs, stages: Sequence[StageCost]) -> float:
    """What a rank computes and communicates in its bodies and its update."""
    bodies = sum(count * _seconds(stages[stage], kind) for (stage, kind), count in own.items())
    return bodies + sum(stages[stage].update_seconds for stage in {stage for stage, _ in own})


def _seconds(cost: StageCost, kind: Kind) -> float:
    return sum(segment.seconds for segment in of_kind(cost, kind))


def _own_causes(plan: TrainingPlan, tp_index: int, own: Runs, stages: Sequence[StageCost]) -> Parts:
    """What the rank does itself in a step: its bodies, and its update."""
    found, profile = Parts(float), profile_seconds(plan)
    bodies = {stage: plan.bodies(stage, tp_index) for stage, _ in own}
    for (stage, kind), count in own.items():
        for cause, value in body_causes(plan, bodies[stage], stages[stage], kind, profile).items():
            found[cause] += value * count
    found["optimizer"] += sum(stages[stage].update_seconds for stage in bodies)
    return found


def body_causes(
    plan: TrainingPlan, bodies: Bodies, cost: StageCost, kind: Kind, profile: ProfileSeconds | None
) -> Parts:
    """The seconds of one body by cause; they sum to what it costs."""
    body, costs = of_kind(bodies, kind), of_kind(cost, kind)
    found = Parts(float)
    for unit in body_units(body):
        whole = sum(costs[place].seconds for place in unit)
        weights = _weights(plan, bodies, cost, kind, unit, profile)
        total = sum(weights.values())
        for cause, weight in weights.items():
            found[cause] += whole * weight / total if total > 0 else 0.0
        if total <= 0:
            found["elementwise"] += whole
    return found


def _weights(
    plan: TrainingPlan,
    bodies: Bodies,
    cost: StageCost,
    kind: Kind,
    unit: tuple[int, ...],
    profile: ProfileSeconds | None,
) -> Mapping[str, float]:
    """What causes share the seconds of a layer or an end in proportion to."""
    own = _priced(plan, of_kind(bodies, kind), of_kind(cost, kind), unit)
    if profile is None:
        return own
    names = tuple(of_kind(bodies, kind).segments[place].name for place in unit)
    target = profile.of(names, forward=kind is Kind.FORWARD).causes
    if kind not in _SPLIT:
        return target
    both = Parts(float)
    for half in _SPLIT:
        for cause, value in _priced(plan, of_kind(bodies, half), of_kind(cost, half), unit).items():
            both[cause] += value
    share = sum(own.values()) / max(sum(both.values()), 1e-300)
    return {
        cause: value * (own[cause] / both[cause] if both[cause] > 0 else share)
        for cause, value in target.items()
    }


def _priced(plan: TrainingPlan, body: Body, costs: Sequence[SegmentCost], unit: tuple[int, ...]) -> Parts:
    """The operations of some segments as they are priced one by one, by cause."""
    found = Parts(float)
    for place in unit:
        found["launch"] += segment_overhead_seconds(plan)
        for operation in body.segments[place].operations:
            if operation.kind not in BODY_COLLECTIVES and operation.kind != WAIT:
                launching = launch_seconds(plan, operation)
                found["launch"] += launching
                found[_cause(operation)] += compute_seconds(plan, operation) - launching
        for operation, collective in _collectives(body.segments[place], costs[place]):
            found[_OF_GROUP.get(operation.group, "data")] += collective
    return found


def _collectives(segment: SegmentBody, cost: SegmentCost) -> list[tuple[Operation, float]]:
    return list(zip(segment.communication, cost.exposed, strict=True))


def _cause(operation: Operation) -> str:
    return "recompute" if operation.name.startswith("recompute ") else _OF_KIND[operation.kind]


def _waits(step: SimulatedStep, number: int, own: Sequence[Row]) -> tuple[Parts, float]:
    """Seconds that the rank of class ``number`` waits, by cause; and how long its bodies and update take."""
    timeline = step.timeline
    mine = timeline.rank == step.classes.ranks[number]
    start, end = timeline.start[mine].tolist(), timeline.end[mine].tolist()
    found = Parts(float)
    now = spent = 0.0
    for index, row in enumerate(own):
        if row.anchor_row >= 0:
            if row.kind is Kind.WAIT:  # inside a body, which it prolongs
                held = end[index] - start[index]
                found[_AWAITED[own[row.target].kind]] += held
                spent -= held
            continue
        if row.kind in COMPUTE or row.kind is Kind.UPDATE:
            spent += end[index] - start[index]
            now = end[index]
        elif row.kind is Kind.WAIT or row.kind in _SUMMED:
            at = row.target if row.kind is Kind.WAIT else index
            until = max(now, end[at])
            queued = row.kind is Kind.WAIT and own[at].kind in COLLECTIVES  # behind others like it
            moving = until - now if queued else max(0.0, until - max(now, start[at]))
            found[_AWAITED[own[at].kind]] += moving
            found["idle"] += until - now - moving
            now = until
    found["idle"] += step.step_seconds - now
    return found, spent


def summing_to(whole: float, found: Mapping[str, float]) -> Seconds:
    """The parts with their rounding in one of the last of them: added up in order they are ``whole``."""
    parts = dict(found)
    rest = whole - sum(parts.values())
    for name in [name for name, value in reversed(parts.items()) if value]:
        for share in _NUDGES:
            nudged = parts | {name: parts[name] + share * rest}
            if sum(nudged.values()) == whole:
                return tuple(nudged.items())
    return tuple(parts.items())
