"""The CUDA path: simulated ranks that share a GPU, and NCCL with a world of one. Skipped without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import HashStore

from picotron.errors import ExecutionError
from picotron.planner.memory import memory_timeline
from picotron.planner.plan import TrainingPlan
from picotron.runtime import flash
from picotron.runtime.backend import Backend
from picotron.runtime.compiled import missing_compiler
from picotron.runtime.data import step_batches
from picotron.runtime.distributed import DistributedBackend, Processes
from picotron.runtime.memory import OutOfMemoryError
from picotron.runtime.pipeline import Session
from picotron.runtime.run import run
from picotron.runtime.simulated import simulate
from tests.runtime.models import (
    TOLERANCE,
    RankReport,
    assert_as_planned,
    distance,
    random_samples,
    random_weights,
    reference,
    single_rank,
    tiny_model,
    tiny_plan,
    tiny_workload,
    train_rank,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PLANS: dict[str, dict[str, Any]] = {
    "one": {},
    "dp-pp-tp": {"dp": 2, "pp": 2, "tp": 2},
    "ring": {"cp": 2, "tp": 2},
    "heads": {"cp": 2, "context": "all_to_all"},
    "split": {"pp": 2, "schedule": "zb-h1"},
    "recompute": {"pp": 2, "recompute": "full"},
    "offload": {"offload": True},
    "chunks": {"loss_chunks": 2, "tp": 2, "tensor_overlap": "weight_gradient"},
    "chunked": {"tp": 2, "tensor_overlap": "chunked"},
}


@pytest.fixture
def nccl() -> Iterator[DistributedBackend]:
    """A world of one process, on the first GPU."""
    alone = Processes(rank=0, world_size=1, local_rank=0, store=HashStore())
    with DistributedBackend(alone, device="cuda") as backend:
        yield backend


def on_gpu(made: TrainingPlan, *, seed: int = 0, steps: int = 3, **world: Any) -> list[RankReport]:
    """A simulated training on the GPU; gradients come back on the CPU."""
    data = random_samples(made.model.vocab_size, made.workload.seq_len)

    def program(backend: Backend) -> RankReport:
        report = train_rank(backend, made, data, steps=steps)
        return RankReport(
            results=report.results,
            gradients=tuple({n: g.cpu() for n, g in step.items()} for step in report.gradients),
        )

    size = made.topology.world_size
    return simulate(program, size, seed=seed, device="cuda", timeout_seconds=120, **world)


@pytest.mark.parametrize("name", PLANS)
def test_simulated_ranks_on_one_gpu_train_as_a_cpu_does(name: str) -> None:
    """Loss, norm and gradients in fp64, by planned rows and bytes, and the same bits for another seed."""
    made = tiny_plan(tiny_model("llama", layers=2), tiny_workload(), **PLANS[name])
    reports = on_gpu(made)
    found = distance(made, reports, reference(single_rank(made), steps=3))
    assert found.largest <= TOLERANCE["fp64"], found
    assert_as_planned(made, reports)
    again = on_gpu(made, seed=1)
    assert [report.results[-1].loss for report in again] == [report.results[-1].loss for report in reports]


def test_random_state_is_each_ranks_own_on_the_gpu_too() -> None:
    """What a rank draws does not depend on who has drawn before, and the caller's state is left alone."""

    def program(backend: Backend) -> list[float]:
        drawn = [torch.rand(1, device=backend.device).item() for _ in range(2)]
        backend.barrier()
        with backend.random_scope(7) as generator:
            drawn.append(torch.rand(1, device=backend.device, generator=generator).item())
        return [*drawn, torch.rand(1, device=backend.device).item()]

    before = torch.cuda.get_rng_state()
    first, second = simulate(program, 2, device="cuda"), simulate(program, 2, device="cuda", seed=3)
    assert first == second and first[0] == first[1]
    assert torch.equal(before, torch.cuda.get_rng_state())


def test_each_simulated_rank_has_a_device_of_its_own_size() -> None:
    """The rank that needs more is named, though the GPU has room."""
    made = tiny_plan(tiny_model("llama"), tiny_workload(), dp=2)
    limit = memory_timeline(made, 0).max_bytes - 1
    with pytest.raises(OutOfMemoryError, match="out of memory"):
        on_gpu(made, memory_bytes=limit)


def test_a_stream_of_ones_own_is_refused() -> None:
    """Its work would not stand before the other ranks'."""

    def program(backend: Backend) -> None:
        group = backend.new_group(range(2))
        stream: Any = torch.cuda.Stream
        with torch.cuda.stream(stream()):
            backend.all_reduce(torch.ones(1, device=backend.device), group).wait()

    with pytest.raises(ExecutionError, match="default stream"):
        simulate(program, 2, device="cuda")


def test_nccl_alone_trains_as_a_cpu_does_on_the_devices_clock(nccl: DistributedBackend) -> None:
    """The rows are the plan's, in order on the compute stream, and lie within the step."""
    made = tiny_plan(tiny_model("llama"), tiny_workload())
    data = random_samples(made.model.vocab_size, made.workload.seq_len)
    measured = run(made, data, steps=3, backend=nccl, weights=random_weights)
    wanted = [result.loss for result in reference(single_rank(made), steps=3).results]
    assert measured.losses == pytest.approx(wanted, rel=1e-10)
    assert measured.clock == "device"
    line = measured.timeline
    assert (line.start >= 0).all() and (line.end >= line.start).all()
    assert line.end.max() <= measured.seconds[measured.measured_step] * 1.001


def big_plan(**more: Any) -> TrainingPlan:
    """Layers of a size at which what an allocator rounds up is nothing."""
    model = tiny_model(
        "llama", heads=16, kv_heads=4, head_dim=64, vocab=8192, hidden_size=1024, intermediate_size=4096
    )
    work = tiny_workload(global_batch=4, seq_len=1024, precision="fp32", optimizer="adamw", max_grad_norm=1.0)
    return tiny_plan(model, work, micro_batch=2, bucket_bytes=1 << 26, **more)


def one_session(made: TrainingPlan, backend: Backend) -> tuple[Session, Any]:
    """A session that has trained for two steps, and the batches of the next."""
    data = random_samples(made.model.vocab_size, made.workload.seq_len, count=4)
    batches = step_batches(made, data, consumed=0, dp_index=0)
    session = Session(made, backend)
    for _ in range(2):
        session.step(batches)
    return session, batches


def test_allocated_memory_is_the_plans(nccl: DistributedBackend) -> None:
    """The allocator's peak is 95 to 100 % of the plan's, the matrix library's workspace aside."""
    one = torch.ones(16, 16, device="cuda")
    torch.mm(one, one)
    before, made = torch.cuda.memory_allocated(), big_plan()
    session, batches = one_session(made, nccl)
    torch.cuda.reset_peak_memory_stats()
    session.step(batches)
    share = (torch.cuda.max_memory_allocated() - before) / memory_timeline(made, 0).max_bytes
    assert 0.95 <= share <= 1.0


def test_no_row_waits_for_the_device(nccl: DistributedBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch raises at any call that synchronises the host, from the first row to the last."""
    session, batches = one_session(big_plan(), nccl)
    run_rows = Session._run_rows

    def guarded(self: Session, walk: Any) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            run_rows(self, walk)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Session, "_run_rows", guarded)
    session.step(batches)


@pytest.mark.skipif(missing_compiler("cuda") is not None, reason="torch.compile lacks a compiler")
def test_a_compiled_plan_trains_the_same_on_the_gpu() -> None:
    """By Triton's kernels."""
    made = tiny_plan(tiny_model("llama"), tiny_workload(), pp=2, compile=True)
    found = distance(made, on_gpu(made), reference(single_rank(made), steps=3))
    assert found.largest <= TOLERANCE["fp64"], found


def test_the_flash_kernel_takes_shared_heads_as_they_are() -> None:
    """In bf16: numbers are those of fp32 with scores in memory, and nothing but the output is allocated."""
    query, key, value = (
        torch.randn(2, 256, heads, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for heads in (8, 2, 2)
    )
    assert flash.takes(query) and not flash.takes(query.float())
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out, log_sum_exp = flash.forward(query, key, value, causal=True)
    allocated = torch.cuda.max_memory_allocated() - before
    assert allocated <= out.nbytes + log_sum_exp.nbytes + 4096
    wanted = flash.plain_forward(query.float(), key.float(), value.float(), causal=True)
    torch.testing.assert_close(out.float(), wanted[0], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(log_sum_exp, wanted[1], rtol=1e-3, atol=1e-3)
