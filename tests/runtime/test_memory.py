"""The tracker counts storages: when they are born, and when they die; a limit ends what exceeds it.

On simulated ranks a plan's bytes are the tracker's, byte for byte: at every segment's end, at the peak and at
the limit of a device.
"""

from __future__ import annotations

import pickle
import threading
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch

import picotron as pt
from picotron.errors import ExecutionError
from picotron.planner.faults import OutOfMemory
from picotron.planner.memory import memory_timeline
from picotron.planner.plan import TrainingPlan
from picotron.runtime.memory import MemoryTracker, OutOfMemoryError
from tests.runtime.models import random_samples, random_weights, tiny_model, tiny_plan, tiny_workload


def test_a_tensor_counts_until_it_dies() -> None:
    """1000 fp32 are 4000 bytes, and none once deleted."""
    with MemoryTracker() as tracker:
        tensor = torch.zeros(1000)
        assert tracker.live_bytes == 4000
        del tensor
        assert tracker.live_bytes == 0
    assert tracker.peak_bytes == 4000


def test_a_view_is_not_counted_again_and_keeps_its_storage() -> None:
    """A slice, a transpose and a detached alias are the same 4000 bytes."""
    with MemoryTracker() as tracker:
        tensor = torch.zeros(10, 100)
        views = [tensor[:5], tensor.t(), tensor.detach()]
        assert tracker.live_bytes == 4000
        del tensor
        assert tracker.live_bytes == 4000
        views.clear()
        assert tracker.live_bytes == 0


def test_work_in_place_takes_nothing() -> None:
    """In-place operations and ``out=`` make no storage; an expression makes one for its result."""
    tensor, other = torch.ones(1000), torch.ones(1000)
    with MemoryTracker([tensor, other]) as tracker:
        tensor.add_(other).mul_(2)
        torch.add(tensor, other, out=other)
        assert tracker.peak_bytes == 8000
        tensor = tensor + other
        assert tracker.peak_bytes == 12000
        assert tracker.live_bytes == 8000


def test_what_stood_before_is_counted_once() -> None:
    """Standing tensors count from the start; two of one storage, or one met again, count once."""
    standing = torch.zeros(100)
    with MemoryTracker([standing, standing[:10]]) as tracker:
        assert tracker.live_bytes == 400
        assert float(standing.sum()) == 0
        assert standing[50:].shape == (50,)
        assert tracker.live_bytes == 400


def test_the_peak_starts_again_where_it_is_asked_to() -> None:
    """After a stretch that held 800 bytes, one that holds 400 peaks at 400."""
    with MemoryTracker() as tracker:
        both = torch.zeros(100), torch.zeros(100)
        assert tracker.peak_bytes == 800
        kept = both[0]
        del both
        assert tracker.peak_bytes == 800
        tracker.restart_peak()
        assert (tracker.live_bytes, tracker.peak_bytes) == (400, 400)
        del kept


def test_several_outputs_count_each() -> None:
    """A maximum with its indices is 10 fp32 and 10 int64."""
    matrix = torch.rand(10, 10)
    with MemoryTracker() as tracker:
        values, indices = matrix.max(dim=1)
        assert tracker.live_bytes == 10 * 4 + 10 * 8
        del values, indices


def test_autograds_saved_tensors_count_while_the_graph_lives() -> None:
    """Sigmoid keeps its output for backward; the graph holds it when nobody else does."""
    x = torch.zeros(100, requires_grad=True)
    with MemoryTracker() as tracker:
        y = torch.sigmoid(x)
        total = y.sum()
        del y
        assert tracker.live_bytes == 400 + 4
        del total
        assert tracker.live_bytes == 0


def test_a_tracker_sees_its_own_thread_only() -> None:
    """What another thread makes meanwhile is not counted."""
    with MemoryTracker() as tracker:
        thread = threading.Thread(target=lambda: torch.zeros(1000).sum())
        thread.start()
        thread.join()
    assert tracker.peak_bytes == 0


def test_a_limit_is_the_last_byte_that_fits() -> None:
    """4000 bytes of 4000 fit, by whatever steps; what the next operation makes is told and does not stay."""
    with MemoryTracker(limit_bytes=4000, rank=3) as tracker:
        kept = torch.zeros(600)
        torch.zeros(400)
        more = torch.zeros(400)
        assert tracker.live_bytes == 4000
        with pytest.raises(OutOfMemoryError) as caught:
            kept.add(1)
        assert str(caught.value) == (
            "rank 3: out of memory: an operation needs 2,400 bytes more, 4,000 are live "
            "and the device holds 4,000"
        )
        del caught, more
        assert tracker.live_bytes == 2400
        assert torch.zeros(400).numel() == 400


def test_what_stands_counts_against_the_limit() -> None:
    """A device that its standing tensors do not fit on is refused when they are told."""
    standing = torch.zeros(100)
    MemoryTracker([standing], limit_bytes=400)
    with pytest.raises(
        torch.OutOfMemoryError, match="needs 400 bytes more, 0 are live and the device holds 399"
    ):
        MemoryTracker([standing], limit_bytes=399)


def test_running_out_of_memory_is_both_errors_and_crosses_processes() -> None:
    """Torch's handlers and ours catch it; pickled, it is the same."""
    error = OutOfMemoryError("out of memory", rank=2, action="F0", position="row 1")
    assert isinstance(error, ExecutionError) and isinstance(error, torch.OutOfMemoryError)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is OutOfMemoryError
    assert str(again) == "rank 2, action F0, position row 1: out of memory"


@lru_cache
def plans() -> dict[str, TrainingPlan]:
    adamw = {"optimizer": "adamw", "max_grad_norm": 1.0, "global_batch": 4}
    return {
        "gpt2 dp2 pp2": tiny_plan(tiny_model("gpt2"), tiny_workload(global_batch=4), dp=2, pp=2),
        "llama tp2": tiny_plan(
            tiny_model("llama", tied=True), tiny_workload(global_batch=2), tp=2, sequence_parallel=True
        ),
        "qwen3 pp2 adamw": tiny_plan(tiny_model("qwen3", tied=True), tiny_workload(**adamw), pp=2),
        "llama zb-v": tiny_plan(
            tiny_model("llama", layers=4, tied=True), tiny_workload(**adamw), pp=2, schedule="zb-v"
        ),
        "gpt2 interleaved-zb": tiny_plan(
            tiny_model("gpt2", layers=4, tied=True),
            tiny_workload(global_batch=3),
            pp=2,
            tp=2,
            sequence_parallel=True,
            schedule="interleaved-zb",
        ),
        "qwen3 dualpipe-v": tiny_plan(
            tiny_model("qwen3", layers=4), tiny_workload(global_batch=5), pp=2, schedule="dualpipe-v"
        ),
        "llama saving": tiny_plan(
            tiny_model("llama", layers=3),
            tiny_workload(global_batch=2),
            recompute=("full", "selective", "none"),
            offload=(True, False, True),
        ),
        "qwen2 fp32 dp2 adamw": tiny_plan(
            tiny_model("qwen2"), tiny_workload(precision="fp32", **adamw), dp=2
        ),
    }


SEVERAL = ("llama zb-v", "gpt2 interleaved-zb", "qwen3 dualpipe-v")
NAMES = (*SEVERAL, "llama saving", "gpt2 dp2 pp2", "llama tp2", "qwen3 pp2 adamw", "qwen2 fp32 dp2 adamw")


def train(name: str, **settings: Any) -> pt.Measurement:
    """Two steps, the second of them measured."""
    return pt.run(plans()[name], random_samples(67, 8), steps=2, weights=random_weights, **settings)


@pytest.mark.parametrize(
    "semantics",
    ["rendezvous", "buffered", "batched"],
)
@pytest.mark.parametrize("name", ["gpt2 dp2 pp2", "qwen3 pp2 adamw", *SEVERAL])
def test_a_ranks_bytes_are_the_plans_however_messages_meet(name: str, semantics: str) -> None:
    """Live bytes at the end of every segment and row, and the step's peak, on every rank."""
    for rank, measured in enumerate(train(name, semantics=semantics).memory):
        planned = memory_timeline(plans()[name], rank)
        np.testing.assert_array_equal(measured.row, planned.row)
        np.testing.assert_array_equal(measured.operation, planned.operation)
        np.testing.assert_array_equal(measured.live_bytes, planned.live_bytes)
        assert measured.max_bytes == planned.max_bytes


@pytest.mark.parametrize("semantics", ["rendezvous", "buffered"])
@pytest.mark.parametrize("name", NAMES)
def test_a_device_of_the_planned_peak_is_just_enough(name: str, semantics: str) -> None:
    """Every rank with a device of its own planned peak: the run passes. A byte less on any one: it fails."""
    peaks = [
        memory_timeline(plans()[name], rank).max_bytes for rank in range(plans()[name].topology.world_size)
    ]
    enough = [OutOfMemory(rank=rank, at_bytes=peak) for rank, peak in enumerate(peaks)]
    found = train(name, semantics=semantics, faults=enough)
    assert [measured.max_bytes for measured in found.memory] == peaks
    for rank, peak in enumerate(peaks):
        with pytest.raises(torch.OutOfMemoryError, match=rf"the device holds {peak - 1:,}") as caught:
            train(name, semantics=semantics, faults=[OutOfMemory(rank=rank, at_bytes=peak - 1)])
        assert isinstance(caught.value, OutOfMemoryError)
        assert caught.value.rank == rank
    with pytest.raises(torch.OutOfMemoryError):
        train(name, semantics=semantics, memory_bytes=max(peaks) - 1)
    train(name, semantics=semantics, memory_bytes=max(peaks))
