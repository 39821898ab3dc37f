"""Theorems about recomputing and offloading: against a set of named tensors, and against doing neither."""

from __future__ import annotations

from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from picotron.planner.body import Body, Tensor
from picotron.planner.cost import of_kind
from picotron.planner.memory import memory_timeline
from picotron.planner.plan import TrainingPlan
from picotron.planner.program import COMPUTE, Kind, rows
from picotron.planner.recompute import MODES, units
from picotron.planner.topology import Coordinate, rank_of
from property_tests.strategies import DENSE, SPARSE, saving_plans

EVERY = DENSE + SPARSE
HALVES = (Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)


def _run(body: Body, live: set[Tensor]) -> list[int]:
    """Walk through a body: nothing is made twice, or freed that is not there. Levels of activations."""
    levels = []
    for segment in body.segments:
        for operation in segment.operations:
            for tensor in operation.creates:
                assert tensor not in live, tensor
                live.add(tensor)
            live_then = {tensor.name for tensor in live}
            assert all(read.name in live_then for read in operation.reads), operation
            for tensor in operation.frees:
                live.remove(tensor)
        levels.append(sum(tensor.bytes for tensor in live if tensor.category == "activations"))
    return levels


def _outside(made: TrainingPlan, stage: int) -> tuple[set[Tensor], set[Tensor]]:
    """What stands before a stage's F and before its B without being made by either."""
    boundary, last = made.dims().local_bytes, len(made.stage_segments[stage])
    before = {Tensor("0.x", boundary)} if stage else set[Tensor]()
    passed = {Tensor(f"{last}.g", boundary, "workspace")} if stage + 1 < made.num_stages else set[Tensor]()
    sizes = made.variant(stage).gathered_bytes
    gathered = [
        Tensor(f"{unit[0]}.parameters", size, "parameters")
        for unit, size in zip(units(made.stage_segments[stage]), sizes if any(sizes) else (), strict=False)
    ]  # of which the row that gathers makes the first
    return before | set(gathered[:1]), passed | set(gathered[-1:])


@given(saving_plans(families=EVERY), st.data())
def test_every_tensor_is_made_before_it_is_freed(made: TrainingPlan, data: st.DataObject) -> None:
    """Once each, in F and B and in F, I and W alike; what remains is what passes on."""
    stage = data.draw(st.integers(0, made.num_stages - 1))
    bodies = made.bodies(stage)
    before, passed = _outside(made, stage)
    for backwards in ((Kind.BACKWARD,), HALVES):
        live = set(before)
        _run(bodies.forward, live)
        live |= passed
        live.discard(Tensor(f"{len(made.stage_segments[stage])}.x", made.dims().local_bytes))
        for kind in backwards:
            _run(of_kind(bodies, kind), live)
        assert {tensor.name for tensor in live if tensor.category != "gradients"} <= {"0.g"}


@given(saving_plans(families=EVERY), st.data())
def test_recompute_keeps_no_more_and_changes_no_forward(made: TrainingPlan, data: st.DataObject) -> None:
    """F runs the same steps; from none to selective to full no microbatch leaves more behind."""
    stage = data.draw(st.integers(0, made.num_stages - 1))
    layers = made.model.num_layers
    kept, steps, work = [], [], []
    for mode in MODES:
        bodies = evolve(made, recompute=(mode,) * layers).bodies(stage)
        kept.append(_run(bodies.forward, _outside(made, stage)[0])[-1])
        ran = [step for segment in bodies.forward.segments for step in segment.operations]
        steps.append(
            [(step.name, step.flops, step.payload_bytes) for step in ran if step.kernels or step.flops]
        )
        work.append(bodies.backward.flops)
    assert kept == sorted(kept, reverse=True)
    assert steps[0] == steps[1] == steps[2]
    assert work == sorted(work)
    forward, backward = (
        of_kind(evolve(made, recompute=("none",) * layers).bodies(stage), k) for k in COMPUTE[:2]
    )
    again = sum(
        step.flops
        for unit in units(made.stage_segments[stage])
        if made.stage_segments[stage][unit[0]].layer is not None
        for place in unit
        for step in forward.segments[place].operations
    )
    assert work[2] == backward.flops + again


@given(saving_plans(families=EVERY), st.data())
def test_halves_do_what_the_whole_does(made: TrainingPlan, data: st.DataObject) -> None:
    """I and W together run the steps of B, once each, and send what it sends."""
    bodies = made.bodies(data.draw(st.integers(0, made.num_stages - 1)))
    ran = [
        sorted(
            (step.name, step.flops, step.group, step.payload_bytes)
            for kind in kinds
            for segment in of_kind(bodies, kind).segments
            for step in segment.operations
            if step.flops or step.payload_bytes or step.kernels
        )
        for kinds in ((Kind.BACKWARD,), HALVES)
    ]
    assert ran[0] == ran[1]


@given(saving_plans(families=EVERY), st.data())
def test_what_is_offloaded_is_copied_and_nothing_else(made: TrainingPlan, data: st.DataObject) -> None:
    """A row away for each F and one back for each B or I, of what F leaves less; none without offload."""
    pp = data.draw(st.integers(0, made.topology.pp - 1))
    layers = made.model.num_layers
    kept = evolve(made, offload=(False,) * layers)
    own = rows(made.program(), pp)
    for stage in made.rank_stages(pp):
        levels = [_run(one.bodies(stage).forward, _outside(made, stage)[0])[-1] for one in (kept, made)]
        for kind, beside in ((Kind.OFFLOAD, (Kind.FORWARD,)), (Kind.RELOAD, (Kind.BACKWARD, HALVES[0]))):
            copies = [row.bytes for row in own if row.kind is kind and row.stage == stage]
            computed = [row for row in own if row.kind in beside and row.stage == stage]
            assert copies == [levels[0] - levels[1]] * len(computed) * (levels[0] > levels[1])
    rank = rank_of(made.topology, Coordinate(pp=pp))
    assert memory_timeline(made, rank).max_bytes <= memory_timeline(kept, rank).max_bytes + _a_layer(kept, pp)


def _a_layer(kept: TrainingPlan, pp: int) -> int:
    """What a layer of a rank saves at most: a copy back comes while the layer after it computes."""
    return max(
        _run(kept.bodies(stage).forward, _outside(kept, stage)[0])[-1] for stage in kept.rank_stages(pp)
    )
