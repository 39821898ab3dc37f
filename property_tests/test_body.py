"""Theorems about bodies: their FLOPs are the model's, and their tensors are born once and die once."""

from __future__ import annotations

from collections import Counter

import attrs
from hypothesis import given

from picotron.planner.body import (
    COLLECTIVES,
    WAIT,
    Bodies,
    Operation,
    Tensor,
    collective_bytes,
    segment_memory,
)
from picotron.planner.flops import matmuls
from picotron.planner.plan import TrainingPlan
from picotron.planner.stage import stage_bodies
from picotron.planner.topology import group_size
from property_tests.strategies import DENSE, SPARSE, plans

EVERY = DENSE + SPARSE


def _stages(made: TrainingPlan) -> list[Bodies]:
    """The bodies of every stage, on the rank with the largest slices."""
    return [
        stage_bodies(made.model, made.topology, stage, own, made.dims())
        for stage, own in enumerate(made.stage_segments)
    ]


@given(plans())
def test_forward_flops_are_the_models(made: TrainingPlan) -> None:
    """Segment by segment, on the rank with the largest slices; context-parallel ranks share causal pairs."""
    for own, bodies in zip(made.stage_segments, _stages(made), strict=True):
        forward, backward = bodies.forward, bodies.backward
        scores = 0
        for segment, body in zip(own, forward.segments, strict=True):
            expected = matmuls(
                made.model,
                segment,
                batch=made.micro_batch,
                seq_len=made.workload.seq_len,
                tp=made.topology.tp,
                attention="causal",
            )
            scores += sum(m.flops for m in expected if m.name == "scores")
            found = sum(op.flops for op in body.operations)
            assert found * made.topology.cp == sum(m.flops for m in expected), body.name
        assert backward.flops * made.topology.cp == 2 * forward.flops * made.topology.cp + scores


@given(plans(families=EVERY))
def test_every_tensor_is_made_once_and_freed_once(made: TrainingPlan) -> None:
    """A stage is given input and output's gradient; F and B, or F, I and W, leave output and dx alone."""
    last = len(made.stage_segments) - 1
    for stage, bodies in enumerate(_stages(made)):
        for backwards in ((bodies.backward,), (bodies.backward_input, bodies.backward_weight)):
            end, boundary = len(bodies.forward.segments), made.dims().local_bytes
            live = {"0.x": Tensor("0.x", boundary)} if stage else {}
            for body in (bodies.forward, *backwards):
                if body is backwards[0] and stage < last:
                    assert live.pop(f"{end}.x") == Tensor(f"{end}.x", boundary)
                    live[f"{end}.g"] = Tensor(f"{end}.g", boundary, "workspace")
                for segment in body.segments:
                    for operation in segment.operations:
                        for tensor in operation.creates:
                            assert tensor.name not in live
                            live[tensor.name] = tensor
                        for tensor in operation.frees:
                            assert live.pop(tensor.name) == tensor
                if body is backwards[0] and stage:
                    assert live["0.g"] == Tensor("0.g", boundary, "workspace")
            assert list(live) == (["0.g"] if stage else [])


@given(plans(families=EVERY))
def test_the_halves_of_a_backward_are_its_operations(made: TrainingPlan) -> None:
    """I and W do, in order and segment by segment, what B does; only the moments of freeing differ."""

    def done(operations: tuple[Operation, ...], for_weights: bool) -> list[Operation]:
        own = [attrs.evolve(op, frees=()) for op in operations if op.for_weights is for_weights]
        return [op for op in own if op.kernels or op.payload_bytes]

    for bodies in _stages(made):
        inputs, weights = bodies.backward_input.segments, bodies.backward_weight.segments
        for whole, i, w in zip(bodies.backward.segments, inputs, weights, strict=True):
            assert whole.name == i.name == w.name
            assert done(i.operations, False) == done(whole.operations, False)
            assert done(w.operations, True) == done(whole.operations, True)
            assert not done(i.operations, True) and not done(w.operations, False)
        halves = Counter(collective_bytes(bodies.backward_input))
        halves.update(collective_bytes(bodies.backward_weight))
        assert halves == Counter(collective_bytes(bodies.backward))


@given(plans(families=EVERY))
def test_weight_gradients_find_what_they_read(made: TrainingPlan) -> None:
    """Whatever a step of W reads is live: kept by I or made by W; and W leaves no byte of a microbatch."""
    for bodies in _stages(made):
        live = {f"{index}.x" for index in range(len(bodies.forward.segments))}
        live |= {f"{index + 1}.g" for index in range(len(bodies.forward.segments))}
        for body in (bodies.forward, bodies.backward_input, bodies.backward_weight):
            for segment in body.segments:
                for operation in segment.operations:
                    assert {tensor.name for tensor in operation.reads} <= live
                    live |= {tensor.name for tensor in operation.creates}
                    live -= {tensor.name for tensor in operation.frees}


@given(plans(families=EVERY))
def test_weight_gradients_have_forwards_flops(made: TrainingPlan) -> None:
    """W has the FLOPs of forward's products with weights, and I as many besides attention's."""
    for bodies in _stages(made):
        products, inputs = (
            sum(op.flops for s in body.segments for op in s.operations if op.kind == "matmul")
            for body in (bodies.forward, bodies.backward_input)
        )
        assert bodies.backward_weight.flops == inputs == products


@given(plans(families=EVERY))
def test_a_segments_peak_is_over_all_its_levels(made: TrainingPlan) -> None:
    """The highest moment is at least its start and its end, and no operation is negative in anything."""
    for bodies in _stages(made):
        for body in attrs.astuple(bodies, recurse=False):
            for segment in body.segments:
                left, highest = segment_memory(segment)
                assert highest.sum() >= max(0, left.sum())
                for op in segment.operations:
                    sizes = (op.flops, op.moved_bytes, op.kernels, op.payload_bytes)
                    assert min(sizes) >= 0
                    assert all(t.bytes >= 0 for t in (*op.creates, *op.frees))


@given(plans(families=EVERY))
def test_collectives_have_a_group_of_more_than_one(made: TrainingPlan) -> None:
    """Nobody talks to itself, what is handed over is more than nothing, and computing has no group.

    Whatever a segment starts it waits for.
    """
    for bodies in _stages(made):
        for body in attrs.astuple(bodies, recurse=False):
            for segment in body.segments:
                for op in segment.operations:
                    if op.kind in COLLECTIVES:
                        assert group_size(made.topology, op.group) > 1
                        assert op.payload_bytes > 0 and op.flops == op.moved_bytes == op.kernels == 0
                    else:
                        assert (op.group, op.payload_bytes) == ("cp" if op.kind == WAIT else "", 0)
                starts = sum(op.asynchronous for op in segment.communication)
                assert starts == sum(op.kind == WAIT for op in segment.communication)
            totals = collective_bytes(body)
            assert sum(totals.values()) == sum(
                op.payload_bytes for s in body.segments for op in s.operations if op.kind in COLLECTIVES
            )


@given(plans(families=EVERY))
def test_sequence_parallelism_hands_over_as_much_as_all_reduces(made: TrainingPlan) -> None:
    """Only gathers, scatters and sums of statistics over tp; without it, only sums."""
    kinds = {
        op.kind
        for bodies in _stages(made)
        for body in attrs.astuple(bodies, recurse=False)
        for segment in body.segments
        for op in segment.collectives
        if op.group == "tp"
    }
    allowed = {"all_reduce", "all_gather", "reduce_scatter"} if made.sequence_parallel else {"all_reduce"}
    assert kinds <= allowed
