"""The tracker counts storages: when they are born, and when they die."""

from __future__ import annotations

import threading

import torch

from picotron.runtime.memory import MemoryTracker


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
