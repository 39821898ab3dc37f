"""Attention of one block at a time, held against torch's attention of all at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from picotron.errors import ExecutionError
from picotron.planner.body import WAIT, Operation
from picotron.planner.context import token_positions
from picotron.runtime import flash
from picotron.runtime.backend import Backend
from picotron.runtime.communicator import Communicator
from picotron.runtime.ring import products
from picotron.runtime.simulated import simulate


def drawn(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers of a normal distribution, [batch, s, heads, d] seen as [batch, heads, s, d]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)]
)
def test_parts_of_the_keys_merge_into_all(kv_heads: int, dtype: torch.dtype, tolerance: float) -> None:
    """Own keys causally and earlier ones in full: context and gradients are those of torch's attention."""
    s, d = 6, 8
    query, upstream = (drawn(2, s, 4, d, seed=seed, dtype=dtype) for seed in (0, 3))
    key, value = (drawn(2, 2 * s, kv_heads, d, seed=seed, dtype=dtype) for seed in (1, 2))
    leaves = [part.detach().clone().requires_grad_() for part in (query, key, value)]
    mask = torch.ones(s, 2 * s, dtype=torch.bool).tril(diagonal=s)
    whole = functional.scaled_dot_product_attention(*leaves, attn_mask=mask, enable_gqa=True)
    expected = torch.autograd.grad(whole, leaves, upstream)

    blocks = [(slice(s, 2 * s), True), (slice(0, s // 2), False), (slice(s // 2, s), False)]
    out, sums = flash.forward(query, key[:, :, blocks[0][0]], value[:, :, blocks[0][0]], causal=True)
    out = out.to(sums.dtype)
    for keys, causal in blocks[1:]:
        part, part_sums = flash.forward(query, key[:, :, keys], value[:, :, keys], causal=causal)
        flash.merge(out, sums, part.to(out.dtype), part_sums)
    out = out.to(dtype)
    torch.testing.assert_close(out, whole.detach(), rtol=tolerance, atol=tolerance)

    dq, dk, dv = (torch.zeros_like(part) for part in (query, key, value))
    for keys, causal in blocks:
        found = flash.backward(upstream, query, key[:, :, keys], value[:, :, keys], out, sums, causal=causal)
        dq += found[0]
        dk[:, :, keys] += found[1]
        dv[:, :, keys] += found[2]
    for own, theirs in zip((dq, dk, dv), expected, strict=True):
        torch.testing.assert_close(own, theirs, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("cp", [2, 3, 4])
def test_a_ring_multiplies_what_the_mask_leaves_and_nothing_else(cp: int) -> None:
    """Every (query, earlier key) pair of a sequence once, and in each step as many on every rank."""
    seq_len = 4 * cp
    seen = np.zeros((seq_len, seq_len), dtype=int)
    own = seq_len // cp
    for rank in range(cp):
        places = token_positions(seq_len, cp, rank, "ring")
        seen[np.ix_(places, places)] += np.tri(own, dtype=int)
        for step in range(1, cp):
            block = token_positions(seq_len, cp, (rank - step) % cp, "ring")
            spans = products(own, rank, cp, step)
            assert [len(places[q]) * len(block[k]) for q, k in spans] == [own * own // 4] * 2
            for queries, keys in spans:
                seen[np.ix_(places[queries], block[keys])] += 1
    assert (seen == np.tri(seq_len, dtype=int)).all()


def test_an_exchange_is_waited_for_where_the_plan_says() -> None:
    """Not before, not after another collective, and not left under way."""
    step = Operation(name="keys", kind="exchange", group="cp", payload_bytes=8, asynchronous=True)
    planned = (step, Operation(name="wait for keys", kind=WAIT, group="cp"))

    def rank_main(backend: Backend) -> str:
        group = backend.new_group(range(2), "cp")
        communicator = Communicator(backend, {"cp": group})
        received, sent = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        communicator.open("F0 attention", 3, planned)
        with pytest.raises(ExecutionError, match="exchange 'keys' over cp, got wait over cp"):
            communicator.wait(None, "cp")  # type: ignore[arg-type]
        handle = communicator.start_exchange(received, sent, "cp")
        with pytest.raises(ExecutionError, match="next collective is wait 'wait for keys'"):
            communicator.start_exchange(received, sent, "cp")
        with pytest.raises(ExecutionError, match="ended before its planned wait"):
            communicator.close()
        communicator.wait(handle, "cp")
        communicator.close()
        assert communicator.payload_bytes == {("exchange", "cp"): 8}
        return str(received.item())

    assert simulate(rank_main, 2) == ["1.0", "1.0"]
