"""What a device asks for, as far as a CPU can tell: its clock, its one stream, the choice of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from attrs import define, field

import picotron as pt
from picotron.cli import main
from picotron.errors import ExecutionError, PlanError
from picotron.runtime import flash, simulated_rank
from picotron.runtime.backend import Backend
from picotron.runtime.simulated import simulate
from picotron.runtime.stamps import DeviceClock


@define(eq=False)
class FakeDevice:
    """A device whose events are passed when someone waits, in milliseconds that a list foretells."""

    times: list[float]
    events: list[FakeEvent] = field(factory=list)

    def new_event(self) -> FakeEvent:
        self.events.append(FakeEvent(self.times[len(self.events)]))
        return self.events[-1]


@define(eq=False)
class FakeEvent:
    milliseconds: float
    recorded: bool = False
    passed: bool = False

    def record(self) -> None:
        self.recorded = True

    def synchronize(self) -> None:
        self.passed = self.recorded

    def elapsed_time(self, end_event: FakeEvent) -> float:
        assert self.passed and end_event.passed, "torch raises for an event that the device has not passed"
        return end_event.milliseconds - self.milliseconds


def test_a_devices_clock_is_read_after_the_step_and_not_before() -> None:
    """Marks are events that nobody waits for until seconds are asked for; those count from the first."""
    device = FakeDevice([5000.0, 5002.0, 5001.5])
    clock = DeviceClock(device.new_event)
    start, late, early = clock.mark(), clock.mark(), clock.mark()
    assert all(event.recorded and not event.passed for event in device.events)
    assert clock.seconds(start, [early, late]) == pytest.approx([1.5e-3, 2e-3])
    assert clock.seconds(start, []) == []


def test_a_rank_that_communicates_from_a_stream_of_its_own_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Other ranks could read before it has written."""

    def program(backend: Backend) -> None:
        group = backend.new_group(range(2))
        backend.barrier()
        if backend.rank == 1:
            monkeypatch.setattr(simulated_rank, "on_default_stream", lambda device: False)
            backend.all_reduce(torch.ones(1), group).wait()

    with pytest.raises(ExecutionError, match="default stream") as told:
        simulate(program, 2)
    assert told.value.rank == 1


def test_the_command_line_names_the_device_of_simulated_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cpu runs; cuda without a GPU is a request that cannot be met, and so is a device of real ranks."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cluster = pt.ClusterSpec.preset("cpu", devices_per_node=2)
    work = pt.Workload(global_batch=2, seq_len=8, precision="fp32")
    made = pt.plan(pt.ModelSpec.from_hf("llama-tiny"), cluster, work, dp=2)
    pt.save_plan(made, tmp_path / "plan.json")
    asked = ["train", str(tmp_path / "plan.json"), "--steps", "1", "--json", "--out"]
    assert main([*asked, str(tmp_path / "one"), "--device", "cpu"]) == 0
    assert main([*asked, str(tmp_path / "two"), "--device", "cuda"]) == 2
    assert "device must be cpu, or cuda where there is a GPU, got cuda" in capsys.readouterr().err
    assert not (tmp_path / "two").exists()
    with pytest.raises(PlanError, match="only simulated ranks take device"):
        pt.run(made, [], steps=1, backend="gloo", device="cpu")


def test_a_gpu_that_is_not_there_is_refused_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one GPU the first is all there is."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(PlanError, match="one of this machine's 1 GPUs, got cuda:3"):
        simulate(lambda backend: None, 2, device="cuda:3")


@pytest.mark.parametrize("causal", [True, False])
def test_attention_with_its_scores_in_memory_is_the_flash_kernels(causal: bool) -> None:
    """For what CUDA's flash kernels do not take: context, statistics and gradients, heads being shared."""
    shapes = [(2, 6, 4, 8), (2, 6, 2, 8), (2, 6, 2, 8)]
    drawn = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(shape, dtype=torch.float64, generator=drawn).transpose(1, 2) for shape in shapes
    )
    wanted = flash.forward(query, key, value, causal=causal)
    found = flash.plain_forward(query, key, value, causal=causal)
    gradient = torch.randn_like(wanted[0])
    theirs_back = flash.backward(gradient, query, key, value, *wanted, causal=causal)
    own_back = flash.plain_backward(gradient, query, key, value, *found, causal=causal)
    for own, theirs in zip((*found, *own_back), (*wanted, *theirs_back), strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-12, atol=1e-12)
        assert own.transpose(1, 2).is_contiguous() or own.dim() == 3
