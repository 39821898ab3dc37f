"""What a stage takes under the cluster's software profile: the bodies' operations, scaled to the time model.

The bodies say in which order a stage computes and communicates, one operation of the runtime at a time; how
fast other software does the same layer is what ``layer_times`` knows. Seconds of each layer, of the embedding
and of the head are scaled so that they sum to the model's, computing and communicating apart; what the model
hides under computing it has left out, so none is asynchronous here. A processor
without a profile of its own (a CPU) keeps the seconds of its operations.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby

import numpy as np
from attrs import evolve, field, frozen

from picotron.planner.block_times import Block, weighted
from picotron.planner.body import Bodies, Body
from picotron.planner.cases import RECOMPUTES, Cases
from picotron.planner.cluster import ClusterSpec
from picotron.planner.columns_of import cases_of_plan
from picotron.planner.constants import default_constants
from picotron.planner.estimate import pass_seconds, with_recompute
from picotron.planner.kernels import device_rates
from picotron.planner.layer_times import LayerTimes, layer_times
from picotron.planner.network import links
from picotron.planner.plan import TrainingPlan
from picotron.planner.segment_costs import SegmentCost, StageCost

_WIRES = ("tensor", "context", "expert")
Costs = tuple[SegmentCost, ...]


@frozen
class Target:
    """Seconds of one pass over a layer or an end: computing, and the collectives that it waits for.

    ``causes``: both together, by the causes of ``estimate``.
    """

    compute: float
    communication: float
    causes: Mapping[str, float] = field(factory=dict)


@frozen
class ProfileSeconds:
    """Seconds of each kind of layer and end, forward and backward, the latter by how a layer recomputes."""

    forward: Mapping[str, Target]
    backward: Mapping[tuple[str, str], Target]
    modes: tuple[str, ...]

    def of(self, names: tuple[str, ...], *, forward: bool) -> Target:
        """The seconds of a layer's segments, or of an end's one, called ``names``."""
        first, _, layer = names[0].partition(" ")
        mode = self.modes[int(layer)] if layer else "none"
        kind = first if not layer else "moe" if any(name.startswith("moe") for name in names) else "mlp"
        return self.forward[kind] if forward else self.backward[kind, mode]


def has_time_model(cluster: ClusterSpec) -> bool:
    """Whether the time model prices layers there: not on a CPU, nor where operations were measured."""
    return cluster.device.architecture != "cpu" and cluster.efficiency.measured is None


def profile_seconds(plan: TrainingPlan) -> ProfileSeconds | None:
    """What the time model says of ``plan``; None without one."""
    if not has_time_model(plan.cluster):
        return None
    cases, table = cases_of_plan(plan), default_constants()
    layers = layer_times(cases, table, device_rates(cases, table), links(cases, table))
    kinds = {
        "mlp": weighted([(layers.attention, 1.0), (layers.mlp, 1.0)]),
        "embedding": layers.embedding,
        "head": layers.head,
    }
    if plan.model.experts is not None:
        kinds["moe"] = weighted([(layers.attention, 1.0), (layers.experts, 1.0)])
    forward = {kind: _target(cases, block, block.forward) for kind, block in kinds.items()}
    backward = {
        (kind, mode): _target(cases, block, again.backward)
        for kind, block in kinds.items()
        for mode in RECOMPUTES
        for again in [_recomputed(cases, layers, block, mode)]
    }
    return ProfileSeconds(forward, backward, plan.recompute)


def _recomputed(cases: Cases, layers: LayerTimes, block: Block, mode: str) -> Block:
    if mode == "none" or "attention" not in block.forward:
        return block
    layout = evolve(
        cases.layout, recompute=np.asarray(float(RECOMPUTES.index(mode))), recompute_layers=np.ones(())
    )
    return with_recompute(evolve(cases, layout=layout), default_constants(), evolve(layers, layer=block))


def _target(cases: Cases, block: Block, seconds: Mapping[str, np.ndarray]) -> Target:
    """The launches of a block's kernels lengthen the computing of both of its passes alike."""
    _, _, launch = pass_seconds(cases, default_constants(), block)
    passes = (block.forward, block.backward)
    both = sum(float(value) for each in passes for cause, value in each.items() if cause not in _WIRES)
    causes = {cause: float(value) for cause, value in seconds.items()}
    wires = sum(causes[cause] for cause in _WIRES if cause in causes)
    computing = sum(causes.values()) - wires
    launching = computing * float(launch) / max(both, 1e-12)
    return Target(computing + launching, wires, causes | {"launch": launching})


def profiled(cost: StageCost, bodies: Bodies, seconds: ProfileSeconds) -> StageCost:
    """``cost`` with every layer's and end's seconds scaled to the profile's."""
    forward, _ = _scaled(cost.forward, bodies.forward, seconds, forward=True)
    backward, scales = _scaled(cost.backward, bodies.backward, seconds, forward=False)
    return evolve(
        cost,
        forward=forward,
        backward=backward,
        backward_input=_by(cost.backward_input, bodies.backward_input, scales),
        backward_weight=_by(cost.backward_weight, bodies.backward_weight, scales),
    )


Scales = dict[str, tuple[float, float]]


def _scaled(costs: Costs, body: Body, seconds: ProfileSeconds, *, forward: bool) -> tuple[Costs, Scales]:
    """The costs of a body scaled layer by layer, and the two scales of every segment by name."""
    scales: Scales = {}
    for places in body_units(body):
        names = tuple(body.segments[place].name for place in places)
        target = seconds.of(names, forward=forward)
        scales |= dict.fromkeys(names, _scales((costs[place] for place in places), target))
    return _by(costs, body, scales), scales


def body_units(body: Body) -> tuple[tuple[int, ...], ...]:
    """The places of a body's segments by layer; the embedding and the head by themselves."""
    names = [segment.name for segment in body.segments]
    keys = [name.partition(" ")[2] or name for name in names]
    return tuple(tuple(places) for _, places in groupby(range(len(names)), key=keys.__getitem__))


def _scales(costs: Iterable[SegmentCost], target: Target) -> tuple[float, float]:
    """By how much computing and communicating are multiplied, so that together they take what they should."""
    own = list(costs)
    computing = sum(cost.compute_seconds for cost in own)
    waiting = sum(cost.transfer_seconds for cost in own)
    if waiting > 0:
        return _ratio(target.compute, computing), target.communication / waiting
    return _ratio(target.compute + target.communication, computing), 1.0


def _ratio(wanted: float, found: float) -> float:
    return wanted / found if found > 0 else 1.0


def _by(costs: Costs, body: Body, scales: Scales) -> Costs:
    return tuple(
        SegmentCost(
            compute=[stretch * scales[segment.name][0] for stretch in cost.compute],
            collectives=[
                evolve(collective, seconds=collective.seconds * scales[segment.name][1], asynchronous=False)
                for collective in cost.collectives
            ],
        )
        for cost, segment in zip(costs, body.segments, strict=True)
    )
