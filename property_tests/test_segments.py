"""Theorem of segments: weight gradients that wait are the full backward's and take the planned bytes."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from picotron.planner.plan import TrainingPlan
from property_tests.strategies_runtime import decoders, overlaps
from tests.runtime.models import gradient_errors, tiny_plan, tiny_workload
from tests.runtime.phases import walk


@st.composite
def orders(draw: st.DrawFn, *, max_microbatches: int = 3) -> str:
    """Actions of up to ``max_microbatches``, each's F before its B, or before its I and that before its W."""
    backwards = draw(st.lists(st.sampled_from(["IW", "B"]), min_size=1, max_size=max_microbatches))
    numbers = [number for number, phases in enumerate(backwards) for _ in "F" + phases]
    order, seen = [], Counter[int]()
    for number in draw(st.permutations(numbers)):
        order.append(f"{('F' + backwards[number])[seen[number]]}{number}")
        seen[number] += 1
    return " ".join(order)


@st.composite
def stages(draw: st.DrawFn) -> TrainingPlan:
    """A whole decoder of one layer as one stage, on one or two tensor-parallel ranks."""
    tp = draw(st.integers(1, 2))
    batch = draw(st.integers(1, 2))
    work = tiny_workload(
        global_batch=batch,
        seq_len=2 * draw(st.integers(3, 8)),
        precision=draw(st.sampled_from(["fp64", "fp32"])),
    )
    cut = tp > 1 and draw(st.booleans())
    way = draw(st.sampled_from(overlaps(tp, cut, batch * work.seq_len)))
    parallel = {"tp": tp, "sequence_parallel": cut, "micro_batch": batch, "tensor_overlap": way}
    return tiny_plan(draw(decoders(layers=1, tp=tp)), work, **parallel)


@given(stages(), orders())
def test_weight_gradients_may_wait(made: TrainingPlan, order: str) -> None:
    """Bytes after every segment and at its highest moment are planned; gradients equal those of F and B."""
    numbers = sorted({action[1:] for action in order.split()})
    whole = walk(made, " ".join(f"F{number} B{number}" for number in numbers))
    for reference, found in zip(whole, walk(made, order), strict=True):
        assert found.measured == found.planned
        errors = gradient_errors(found.gradients, reference.gradients)
        assert max(errors.values()) <= {"fp64": 1e-12, "fp32": 1e-5}[made.workload.precision], errors
