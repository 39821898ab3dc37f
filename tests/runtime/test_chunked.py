"""Products of an input that is gathered in chunks: those of the whole, and no more than two chunks stand."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from picotron.runtime import chunked
from picotron.runtime.backend import Backend
from picotron.runtime.memory import MemoryTracker
from picotron.runtime.pipeline import Session
from picotron.runtime.simulated import simulate
from tests.runtime.models import random_weights, tiny_model, tiny_plan, tiny_workload


@pytest.mark.parametrize(("seq_len", "chunks"), [(8, 4), (6, 2)])
def test_chunks_make_the_rows_of_the_whole(seq_len: int, chunks: int) -> None:
    """Two ranks, weights of two widths, one with a bias: rows of rank 0 first, as if gathered at once."""
    work = tiny_workload(global_batch=2, seq_len=seq_len)
    made = tiny_plan(tiny_model("llama"), work, tp=2, micro_batch=2, tensor_overlap="chunked")
    d = made.dims()
    draw = torch.Generator().manual_seed(0)
    shapes = ((d.tokens, 24), (5, 24), (7, 24), (7,))
    full, *weights, bias = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in shapes)
    biases = [None, bias]

    def main(backend: Backend) -> tuple[list[torch.Tensor], int]:
        communicator = Session(made, backend, random_weights).communicator
        communicator.measuring = True
        communicator.open("F0", 0, made.bodies(0).forward.segments[1].communication)
        local = full.chunk(2)[backend.rank].clone()
        with torch.no_grad(), MemoryTracker([local, *weights, bias]) as tracker:
            before = tracker.live_bytes
            outputs = chunked.products(communicator, d, local, weights, biases)
            return outputs, tracker.peak_bytes - before

    for outputs, peak in simulate(main, 2):
        for found, weight, added in zip(outputs, weights, biases, strict=True):
            torch.testing.assert_close(found, functional.linear(full, weight, added), rtol=1e-12, atol=1e-12)
        assert d.gather_chunks == chunks
        assert peak == 8 * d.tokens * (5 + 7) + 2 * full.nbytes // chunks
