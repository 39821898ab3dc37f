"""A plan with ``compile=True`` trains as the eager one does, in the memory that its bodies say."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest

from picotron.errors import PlanError
from picotron.planner.memory import memory_timeline
from picotron.planner.predict import predict
from picotron.runtime import compiled
from picotron.runtime import run as run_module
from picotron.runtime.compiled import missing_compiler
from tests.runtime.models import (
    TOLERANCE,
    assert_as_planned,
    distance,
    memory_shares,
    random_samples,
    reference,
    single_rank,
    tiny_model,
    tiny_plan,
    tiny_workload,
    train,
)

LACKING = missing_compiler("cpu")


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, where it compiles
@pytest.mark.skipif(LACKING is not None, reason=f"torch.compile lacks {LACKING}")
def test_a_compiled_plan_trains_the_same_in_the_memory_of_its_bodies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Norms, gates and the loss, over two stages whose backward is split.

    To spare time only those that write in place to what they read are really compiled.
    """
    really, compiled_of = (compiled._norm_backward, compiled._swiglu_backward), compiled._compiled
    monkeypatch.setattr(compiled, "_compiled", lambda body: compiled_of(body) if body in really else body)
    settings: Any = import_module("torch._inductor.config")
    monkeypatch.setattr(settings, "compile_threads", 1)  # processes that compile would each import torch
    monkeypatch.setattr(settings, "cpp_cache_precompile_headers", False)
    model, work = tiny_model("llama"), tiny_workload(global_batch=4)
    made = tiny_plan(model, work, pp=2, schedule="zb-h1", compile=True)
    reports = train(made, random_samples(67, 8), steps=2, measure_from=1, timeout_seconds=300)
    found = distance(made, reports, reference(single_rank(made), steps=2))
    assert found.largest <= TOLERANCE["fp64"], found
    assert_as_planned(made, reports)
    shares = memory_shares(made, reports)
    assert min(shares) >= 0.98 and max(shares) <= 1.0


def test_compiled_kernels_are_planned_with_less_memory_and_less_time() -> None:
    """No activation is kept beside the product, and what is moved goes over the memory once."""
    model, work = tiny_model("llama", intermediate_size=512), tiny_workload(precision="fp32", seq_len=32)
    eager, fused = (tiny_plan(model, work, compile=flag) for flag in (False, True))
    assert memory_timeline(fused, 0).max_bytes < memory_timeline(eager, 0).max_bytes
    assert predict(fused).step_seconds < predict(eager).step_seconds
    assert "compiled" in str(fused) and "compiled" not in str(eager)


def test_what_cannot_be_compiled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the plan where bodies have no such kernels, by the run where there is no compiler."""
    with pytest.raises(PlanError, match="compile must be True or False"):
        tiny_plan(tiny_model("llama"), compile=1)
    monkeypatch.setattr(run_module, "missing_compiler", lambda kind: "a C++ compiler")
    lacking = run_module.unsupported(tiny_plan(tiny_model("llama"), compile=True))
    assert lacking == ("compile=True without a C++ compiler (runnable: compile=False)",)
