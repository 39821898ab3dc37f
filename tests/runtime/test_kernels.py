"""Forward and backward of every kernel are autograd's over the same formula, in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy

import pytest
import torch
from torch.nn import functional

from picotron.planner.model import RopeScaling
from picotron.runtime.kernels import (
    Attention,
    Island,
    LayerNorm,
    RmsNorm,
    rotary_tables,
    rotate,
    scaled_frequencies,
    vocabulary_slice,
)
from picotron.runtime.memory import MemoryTracker

EPS = 1e-5


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def gradients(
    formula: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], upstream: torch.Tensor
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """The formula's value, and autograd's gradients of its inputs."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    value = formula(*leaves)
    return value.detach(), torch.autograd.grad(value, leaves, upstream)


@pytest.mark.parametrize("shape", [(7, 12), (2, 5, 3, 6)], ids=["hidden", "heads"])
def test_rms_norm_is_autograds(shape: tuple[int, ...]) -> None:
    """X / sqrt(mean(x²) + eps) · weight; its weight gradient is added to what is there."""
    x, weight, grad = random(*shape), random(shape[-1], seed=1), random(*shape, seed=2)
    accumulated = random(shape[-1], seed=3)
    value, (dx, dweight) = gradients(
        lambda x, w: x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * w, (x, weight), grad
    )
    norm = RmsNorm(weight, before := accumulated.clone(), EPS)
    found, statistics = norm.forward(x)
    close(found, value)
    close(norm.again(x, statistics), value)
    close(norm.backward(grad.clone(), x, statistics), dx)
    close(before, accumulated + dweight)


def test_layer_norm_is_autograds() -> None:
    """(x - mean) / sqrt(var + eps) · weight + bias; weight and bias gradients are added to what is there."""
    x, weight, bias, grad = random(7, 12), random(12, seed=1), random(12, seed=2), random(7, 12, seed=3)

    def formula(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + EPS) * w + b

    value, (dx, dweight, dbias) = gradients(formula, (x, weight, bias), grad)
    norm = LayerNorm(weight, dw := torch.ones_like(weight), bias, db := torch.ones_like(bias), EPS)
    found, statistics = norm.forward(x)
    close(found, value)
    close(norm.again(x, statistics), value)
    close(norm.backward(grad.clone(), x, statistics), dx)
    close(dw, 1 + dweight)
    close(db, 1 + dbias)


def tables(seq_len: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    return rotary_tables(torch.arange(seq_len), head_dim, 10000.0, None, torch.float64)


def test_rotary_tables_by_hand() -> None:
    """Position p and pair i turn by p / theta^(2i/d): with theta 100 and d = 4, by p and p / 10."""
    cosine, sine = rotary_tables(torch.arange(3), 4, 100.0, None, torch.float64)
    assert cosine.shape == sine.shape == (3, 1, 2)
    for position in range(3):
        for pair, angle in enumerate((position, position / 10)):
            assert float(cosine[position, 0, pair]) == pytest.approx(math.cos(angle), abs=1e-7)
            assert float(sine[position, 0, pair]) == pytest.approx(math.sin(angle), abs=1e-7)


def test_rotation_turns_each_pair() -> None:
    """Components i and i + d/2 are one complex number, multiplied by e^(i angle)."""
    x, (cosine, sine) = random(2, 5, 3, 6), tables(5, 6)
    rotated = x.clone()
    rotate(rotated, cosine, sine)
    turned = torch.complex(*x.chunk(2, dim=-1)) * torch.complex(cosine, sine)
    close(rotated, torch.cat((turned.real, turned.imag), dim=-1))


def test_rotating_backwards_is_the_gradient_and_the_inverse() -> None:
    """A rotation's transpose undoes it."""
    x, grad, (cosine, sine) = random(2, 5, 3, 6), random(2, 5, 3, 6, seed=1), tables(5, 6)

    def formula(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)

    value, (dx,) = gradients(formula, (x,), grad)
    found = grad.clone()
    rotate(found, cosine, sine, backwards=True)
    close(found, dx)
    rotate(value, cosine, sine, backwards=True)
    torch.testing.assert_close(value, x, rtol=0, atol=1e-6)  # the tables' angles are fp32


def test_scores_depend_on_the_distance_alone() -> None:
    """Rotated q · k is the same for positions (1, 0) and (5, 4), and another for (2, 0)."""
    q, k = (
        random(1, 1, 1, 8).expand(1, 6, 1, 8).clone(),
        random(1, 1, 1, 8, seed=1).expand(1, 6, 1, 8).clone(),
    )
    for part in (q, k):
        rotate(part, *tables(6, 8))
    scores = (q[0, :, 0] @ k[0, :, 0].T).tolist()
    assert scores[1][0] == pytest.approx(scores[5][4], abs=1e-6)
    assert scores[2][0] != pytest.approx(scores[1][0], abs=1e-3)


def test_linear_scaling_slows_every_frequency() -> None:
    """Factor 4: a quarter of each."""
    scaling = RopeScaling(kind="linear", factor=4.0)
    assert scaled_frequencies(torch.tensor([1.0, 0.5]), scaling).tolist() == [0.25, 0.125]


def test_llama3_scaling_slows_long_wavelengths_only() -> None:
    """Over 16 positions: 16 turns stay, half a turn is slowed eightfold, 2.5 turns lie halfway."""
    scaling = RopeScaling(
        kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=16
    )
    frequencies = torch.tensor([16.0, 0.5, 2.5], dtype=torch.float64) * 2 * torch.pi / 16
    expected = frequencies * torch.tensor([1.0, 1 / 8, (1 + 1 / 8) / 2], dtype=torch.float64)
    close(scaled_frequencies(frequencies, scaling), expected)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_is_autograds(kv_heads: int) -> None:
    """Causal softmax(q·k / sqrt(d))·v, four heads on one, two or four key/value heads."""
    batch, seq_len, heads, d = 2, 5, 4, 6
    q = random(batch, seq_len, heads, d)
    k, v = (random(batch, seq_len, kv_heads, d, seed=seed) for seed in (1, 2))
    grad = random(batch * seq_len, heads * d, seed=3)
    future = torch.ones(seq_len, seq_len, dtype=torch.bool).triu(1)

    def formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (part.repeat_interleave(heads // kv_heads, dim=2) for part in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(d)
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch * seq_len, heads * d)

    value, expected = gradients(formula, (q, k, v), grad)
    attention = Attention(q, k, v)
    close(attention.context(), value)
    for found, wanted in zip(attention.backward(grad), expected, strict=True):
        close(found, wanted.reshape(batch * seq_len, -1))


def test_attention_leaves_its_inputs_without_a_graph() -> None:
    """Autograd sees the island only: neither the inputs nor the context require gradients."""
    q = random(1, 3, 2, 4)
    attention = Attention(q, q.clone(), q.clone())
    assert not q.requires_grad
    assert not attention.context().requires_grad


def test_a_context_outlives_its_island() -> None:
    """After backward the context is what it was, and of the island nothing else is live."""
    q, k, v = (random(2, 8, 4, 6, seed=seed) for seed in range(3))
    with MemoryTracker() as tracker:
        context = (attention := Attention(q.clone(), k.clone(), v.clone())).context()
        before = context.tolist()
        gradients = attention.backward(torch.ones_like(context))
        del attention, gradients
        assert tracker.live_bytes == context.nbytes
    assert context.tolist() == before


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_an_island_is_the_kernel_that_torch_chooses(kv_heads: int) -> None:
    """Its output and gradients are those of the kernel called by name, from tensors put in its place."""
    parts = [random(2, 8, heads, 6, seed=seed) for seed, heads in enumerate((4, kv_heads, kv_heads))]
    grad = random(16, 24, seed=3)
    island, kernel = (Attention(*(part.clone() for part in parts)) for _ in range(2))
    island._kernel = Island()
    island.drop()
    with torch.no_grad():
        island.run()
    assert island.context().equal(kernel.context())
    again = copy(island)
    again.tensors = [tensor.clone() for tensor in island.tensors]
    for tensor in island.tensors:
        tensor.zero_()
    for ours, theirs in zip(again.backward(grad), kernel.backward(grad), strict=True):
        assert ours.equal(theirs)


def test_an_islands_graph_holds_no_tensor() -> None:
    """Without its tensors nothing is live, though it can still be run backward with others."""
    with MemoryTracker() as tracker:
        q = random(1, 8, 2, 4)
        attention = Attention(q, q.clone(), q.clone())
        attention._kernel, kept = (island := Island()), attention.tensors[:3]
        attention.tensors = [*kept, *island.forward(*kept)]
        del q, kept
        attention.tensors.clear()
        assert tracker.live_bytes == 0


def test_ids_outside_a_slice_are_masked() -> None:
    """Ids 3 and 4 are rows 0 and 1 of the slice [3, 5); all others, IGNORED too, become row 0 and masked."""
    ids = torch.tensor([3, 4, 5, 2, -100])
    local, outside = vocabulary_slice(ids, 3, 2)
    assert local.tolist() == [0, 1, 0, 0, 0]
    assert outside.tolist() == [False, False, True, True, True]
    assert ids.tolist() == [3, 4, 5, 2, -100]


def test_two_slices_add_up_to_the_table() -> None:
    """Masked look-ups in both halves sum to the whole table's."""
    table, ids = random(5, 3), torch.tensor([0, 4, 2, 3])
    total = torch.zeros(4, 3, dtype=torch.float64)
    for start, size in ((0, 3), (3, 2)):
        local, outside = vocabulary_slice(ids, start, size)
        total += functional.embedding(local, table[start : start + size]).masked_fill_(
            outside.unsqueeze(1), 0
        )
    close(total, functional.embedding(ids, table))
