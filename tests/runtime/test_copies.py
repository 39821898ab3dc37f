"""What a layer saves goes to the host and comes back as it was; only then is its memory given up."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from picotron.errors import ExecutionError
from picotron.runtime.backend import Backend
from picotron.runtime.communicator import Communicator
from picotron.runtime.copies import Copies
from picotron.runtime.kernels import Attention
from picotron.runtime.memory import MemoryTracker
from picotron.runtime.simulated import simulate

HOST = torch.device("cpu")


def saved() -> list[dict[str, Any]]:
    """Of two segments: q, k and v are views of one tensor; a whole number stays."""
    fused = torch.randn(2, 5, 4, 18, dtype=torch.float64)
    first: dict[str, Any] = {"attention": Attention(*fused.chunk(3, dim=-1)), "statistics": (torch.ones(3),)}
    return [first, {"gate": torch.randn(7), "seed": torch.tensor(7)}]


def tensors(value: list[dict[str, Any]]) -> list[torch.Tensor]:
    """All of them, in order."""
    return [*value[0]["attention"].tensors, *value[0]["statistics"], value[1]["gate"]]


def test_a_structure_comes_back_with_its_views() -> None:
    """Bits, shapes and strides are the same, each memory is there once, and attention goes on from it."""
    torch.manual_seed(0)
    original, copies = saved(), Copies(HOST)
    away = copies.to_host(original)
    back = copies.to_device(away)
    copies.arrive(back)
    expected_bytes = 8 * (2 * 5 * 4 * 18 + 2 * 5 * 4 * 6 + 2 * 5 * 4) + 4 * 3 + 4 * 7
    assert away.bytes == back.bytes == expected_bytes
    for one, other in zip(tensors(original), tensors(back.value), strict=True):
        assert one.equal(other) and one.stride() == other.stride()
        assert one.data_ptr() != other.data_ptr()
    q, k, v, *_ = back.value[0]["attention"].tensors
    assert q.untyped_storage()._cdata == k.untyped_storage()._cdata == v.untyped_storage()._cdata
    assert back.value[1]["seed"] is original[1]["seed"]
    upstream = torch.randn(10, 24, dtype=torch.float64)
    pair = (one[0]["attention"].backward(upstream) for one in (original, back.value))
    assert all(one.equal(other) for one, other in zip(*pair, strict=True))


def test_what_is_on_the_host_takes_no_memory_of_the_device() -> None:
    """Live bytes: the original alone, nothing once it is let go of, and the copy that came back."""
    with MemoryTracker() as tracker:
        original, copies = saved()[:1], Copies(HOST)
        tracker.restart_peak()
        before = tracker.live_bytes
        away = copies.to_host(original)
        assert (tracker.live_bytes, tracker.peak_bytes) == (before, before)
        del original
        assert tracker.live_bytes == 0
        back = copies.to_device(away)
        assert tracker.live_bytes == back.bytes == before


@pytest.mark.parametrize(("told", "words"), [((16, 8), "got 24"), ((16,), "got 16"), ((), "got 0")])
def test_another_size_than_the_plans_is_refused(told: tuple[int, ...], words: str) -> None:
    """When the row's copy is waited for; parts that make up the planned 20 bytes are counted."""

    def act(backend: Backend, parts: tuple[int, ...]) -> Communicator:
        communicator = Communicator(backend, {})
        handle = communicator.start_copy("offload", 20)
        for size in parts:
            communicator.copied("offload", size)
        handle.wait()
        return communicator

    with pytest.raises(ExecutionError, match=f"offload must carry the planned 20 bytes, {words}"):
        simulate(lambda backend: act(backend, told), 1)
    (found,) = simulate(lambda backend: act(backend, (16, 4)), 1)
    assert found.payload_bytes == {("offload", "host"): 20}


def test_copies_of_a_kind_run_one_after_the_other_beside_the_rank() -> None:
    """Two of 3 s each, posted at 0 s and 1 s, end at 3 s and 6 s; the other direction has its own stream."""

    def act(backend: Backend) -> list[tuple[float, float] | None]:
        handles = [backend.copy("offload", 30)]
        backend.spend(1.0)
        handles += [backend.copy("offload", 30), backend.copy("reload", 30)]
        for handle in handles:
            handle.wait()
        return [*(handle.span for handle in handles), (0.0, backend.mark())]

    (found,) = simulate(act, 1, price=lambda kind, group, ranks, size: size / 10)
    assert found == [(0.0, 3.0), (3.0, 6.0), (1.0, 4.0), (0.0, 6.0)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: copies on a stream of their own")
def test_a_gpu_copies_on_a_stream_of_its_own() -> None:
    """Whatever is written to the memory after ``arrive`` is no part of the copy, in either direction."""
    copies = Copies(torch.device("cuda"))
    tensor = torch.arange(2.0**24, device="cuda")
    away = copies.to_host({"x": tensor})
    copies.arrive(away)
    tensor.zero_()
    back = copies.to_device(away)
    copies.arrive(back)
    assert (back.value["x"].double().sum() == (2.0**24 - 1) * 2.0**23).item()
