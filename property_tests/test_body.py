"""Theorems about bodies: their FLOPs are the model's, and their tensors are born once and die once."""

from __future__ import annotations

from hypothesis import given

from picotron.planner.body import COLLECTIVES, Tensor, collective_bytes, segment_memory
from picotron.planner.flops import matmuls
from picotron.planner.plan import TrainingPlan
from picotron.planner.topology import group_size
from property_tests.strategies import DENSE, SPARSE, plans

EVERY = DENSE + SPARSE


@given(plans())
def test_forward_flops_are_the_models(made: TrainingPlan) -> None:
    """Segment by segment, on the rank with the largest slices; context-parallel ranks share causal pairs."""
    for stage, own in enumerate(made.stage_segments):
        forward, backward = made.bodies(stage)
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
    """A stage is given input and output's gradient; F and B leave output and input's gradient alone."""
    for stage, own in enumerate(made.stage_segments):
        forward, backward = made.bodies(stage)
        boundary, last = made.dims().local_bytes, made.topology.pp - 1
        live = {"0.x": Tensor("0.x", boundary)} if stage else {}
        for body in (forward, backward):
            if body is backward and stage < last:
                assert live.pop(f"{len(own)}.x") == Tensor(f"{len(own)}.x", boundary)
                live[f"{len(own)}.g"] = Tensor(f"{len(own)}.g", boundary, "workspace")
            for segment in body.segments:
                for operation in segment.operations:
                    for tensor in operation.creates:
                        assert tensor.name not in live
                        live[tensor.name] = tensor
                    for tensor in operation.frees:
                        assert live.pop(tensor.name) == tensor
        assert list(live.values()) == ([Tensor("0.g", boundary, "workspace")] if stage else [])


@given(plans(families=EVERY))
def test_a_segments_peak_is_over_all_its_levels(made: TrainingPlan) -> None:
    """The highest moment is at least its start and its end, and no operation is negative in anything."""
    for stage in range(made.topology.pp):
        for body in made.bodies(stage):
            for segment in body.segments:
                left, highest = segment_memory(segment)
                assert highest.sum() >= max(0, left.sum())
                for op in segment.operations:
                    sizes = (op.flops, op.moved_bytes, op.kernels, op.payload_bytes)
                    assert min(sizes) >= 0
                    assert all(t.bytes >= 0 for t in (*op.creates, *op.frees))


@given(plans(families=EVERY))
def test_collectives_have_a_group_of_more_than_one(made: TrainingPlan) -> None:
    """Nobody talks to itself, what is handed over is more than nothing, and computing has no group."""
    for stage in range(made.topology.pp):
        for body in made.bodies(stage):
            for segment in body.segments:
                for op in segment.operations:
                    if op.kind in COLLECTIVES:
                        assert group_size(made.topology, op.group) > 1
                        assert op.payload_bytes > 0 and op.flops == op.moved_bytes == op.kernels == 0
                    else:
                        assert (op.group, op.payload_bytes) == ("", 0)
            totals = collective_bytes(body)
            assert sum(totals.values()) == sum(
                op.payload_bytes for s in body.segments for op in s.operations if op.kind in COLLECTIVES
            )


@given(plans(families=EVERY))
def test_sequence_parallelism_hands_over_as_much_as_all_reduces(made: TrainingPlan) -> None:
    """Only gathers, scatters and sums of statistics over tp; without it, only sums."""
    kinds = {
        op.kind
        for stage in range(made.topology.pp)
        for body in made.bodies(stage)
        for segment in body.segments
        for op in segment.collectives
        if op.group == "tp"
    }
    allowed = {"all_reduce", "all_gather", "reduce_scatter"} if made.sequence_parallel else {"all_reduce"}
    assert kinds <= allowed
