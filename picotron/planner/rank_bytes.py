"""What every rank holds and hands over in a step, found once for ranks that are alike."""

from __future__ import annotations

from collections.abc import Sequence

from attrs import field, frozen

from picotron.planner.body import Category, collective_bytes
from picotron.planner.causes import runs
from picotron.planner.chart import rank_ranges
from picotron.planner.classes import axis_indices
from picotron.planner.cost import of_kind
from picotron.planner.layout import even_range
from picotron.planner.memory import MemoryTimeline, memory_timeline, static_bytes
from picotron.planner.plan import TrainingPlan
from picotron.planner.program import COMPUTE, payload_bytes
from picotron.planner.reserved import Beside, beside_tensors
from picotron.planner.topology import Coordinate, coordinate

MOST_NAMED = 6  # stages of a rank that are named one by one
_STANDING: tuple[Category, ...] = ("parameters", "gradients", "optimizer")


@frozen(kw_only=True)
class RankBytes:
    """What a rank's device holds at its highest moment: tensors, framework and fragmentation."""

    tensors: MemoryTimeline = field(repr=False)
    peak_bytes: int
    framework_bytes: int
    fragmentation_bytes: int

    @property
    def reserved_bytes(self) -> int:
        """All of it."""
        return self.peak_bytes + self.framework_bytes + self.fragmentation_bytes


def bytes_by_rank(plan: TrainingPlan) -> tuple[RankBytes, ...]:
    """What each rank holds, shared by ranks of equal stages and slices.

    Among those, the gradient norm's scratch differs by a few bytes for each tensor; no other moment does.
    """
    keys, beside = alike(plan), beside_tensors(plan)
    found = {key: _rank_bytes(plan, rank, beside) for key, rank in _firsts(keys).items()}
    return tuple(found[key] for key in keys)


def _rank_bytes(plan: TrainingPlan, rank: int, beside: Beside) -> RankBytes:
    tensors = memory_timeline(plan, rank)
    standing = static_bytes(plan, coordinate(plan.topology, rank))
    peak = tensors.max_bytes
    moving = peak - sum(standing[name] for name in _STANDING)
    return RankBytes(
        tensors=tensors,
        peak_bytes=peak,
        framework_bytes=beside.framework_bytes,
        fragmentation_bytes=beside.fragmentation_bytes(moving),
    )


def misfits(plan: TrainingPlan, held: Sequence[RankBytes]) -> tuple[str, ...]:
    """One line for each pipeline rank that exceeds the device: by how much, and what takes most."""
    capacity = plan.cluster.device.memory_bytes
    lines: dict[int, str] = {}
    for pp, own in zip(axis_indices(plan.topology)["pp"], held, strict=True):
        if own.reserved_bytes > capacity and pp not in lines:
            lines[pp] = _misfit(plan.rank_stages(pp), own, capacity)
    return tuple(lines.values())


def _misfit(stages: Sequence[int], own: RankBytes, capacity: int) -> str:
    name, size = max(own.tensors.peak_by_category, key=lambda item: item[1])
    named = ", ".join(map(str, stages)) if len(stages) <= MOST_NAMED else rank_ranges(stages)
    needs = "stages {} need" if len(stages) > 1 else "stage {} needs"
    apart = own.reserved_bytes - own.peak_bytes
    return (
        f"{needs.format(named)} {_gib(own.reserved_bytes)} GiB of {_gib(capacity)}: "
        f"{_gib(own.reserved_bytes - capacity)} too much, most of it {name} ({_gib(size)} GiB)"
        + (f", framework and fragmentation {_gib(apart)} GiB" if apart else "")
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


def planned_payloads(plan: TrainingPlan) -> tuple[tuple[tuple[str, str, int], ...], ...]:
    """For each rank, (kind, group, bytes) that it hands over in one step, in sorted order."""
    keys = alike(plan)
    found = {key: _payload(plan, coordinate(plan.topology, rank)) for key, rank in _firsts(keys).items()}
    return tuple(found[key] for key in keys)


def alike(plan: TrainingPlan) -> list[tuple[int, int, int]]:
    """For each rank, what it shares with the ranks that hold and do as much.

    Its stages, its slice of the vocabulary where slices differ, and how many experts of a layer it holds.
    """
    topology, experts = plan.topology, plan.model.experts
    indices = axis_indices(topology)
    even = plan.model.vocab_size % topology.tp == 0
    ranges = [
        even_range(experts.num_experts, topology.ep, ep) if experts else (0, 0) for ep in range(topology.ep)
    ]
    held = [stop - start for start, stop in ranges]
    return [
        (pp, 0 if even else tp, held[ep])
        for pp, tp, ep in zip(indices["pp"], indices["tp"], indices["ep"], strict=True)
    ]


def _firsts(keys: Sequence[tuple[int, int, int]]) -> dict[tuple[int, int, int], int]:
    """The first rank that has each key."""
    found: dict[tuple[int, int, int], int] = {}
    for rank, key in enumerate(keys):
        found.setdefault(key, rank)
    return found


def _payload(plan: TrainingPlan, where: Coordinate) -> tuple[tuple[str, str, int], ...]:
    program = plan.program(where.tp)
    totals = payload_bytes(program, where.pp)
    counts = runs(program, where.pp)
    for stage in plan.rank_stages(where.pp):
        bodies = plan.bodies(stage, where.tp)
        for kind in COMPUTE:
            for key, size in collective_bytes(of_kind(bodies, kind)).items():
                totals[key] = totals.get(key, 0) + size * counts[stage, kind]
    return tuple(sorted((kind, group, size) for (kind, group), size in totals.items()))
