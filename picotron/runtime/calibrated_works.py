"""What a calibration measures, apart: products, attention and kernels of many shapes, taking turns.

A work is a call and what it amounts to. Works take turns, so that no spell of a busy machine falls on one
alone and each finds the caches full of the others' tensors; what counts is the median of its turns, in CPU
seconds of the calling thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from statistics import median

import torch

from picotron.planner.fit_costs import ProductTiming
from picotron.runtime.kernels import Attention

Progress = Callable[[str], None]
Call = Callable[[], object]

TOKENS = (32, 128, 512)  # of a microbatch
WIDTHS = (64, 256, 768)  # of what goes in and of what comes out
# (batch, tokens of a sequence, heads, head_dim)
ATTENTIONS = (
    (1, 32, 4, 32),
    (1, 128, 4, 32),
    (2, 64, 4, 64),
    (1, 256, 4, 64),
    (1, 512, 2, 64),
    (1, 128, 2, 128),
)
KERNEL_ELEMENTS = tuple(2**power for power in range(11, 22, 2))
_LEAST_TURNS = 3
_LEAST_SECONDS = 1e-9
_LEAST_SHARE = 0.5  # that a backward takes of its forward, however disturbed


def take_turns(
    works: Mapping[str, Call], seconds: float, progress: Progress | None = None
) -> dict[str, float]:
    """Median CPU seconds of each work, which take turns for ``seconds`` in all, at least three each.

    ``progress`` is told the name of each before its first turn, which is not counted.
    """
    end = time.perf_counter() + seconds
    for name, call in works.items():
        if progress is not None:
            progress(name)
        call()
    taken: dict[str, list[float]] = {name: [] for name in works}
    while len(next(iter(taken.values()))) < _LEAST_TURNS or time.perf_counter() < end:
        for name, call in works.items():
            start = time.thread_time()
            call()
            taken[name].append(time.thread_time() - start)
    return {name: max(median(turns), _LEAST_SECONDS) for name, turns in taken.items()}


def product_timings(
    dtype: torch.dtype, seconds: float, progress: Progress | None = None
) -> dict[str, list[ProductTiming]]:
    """Timings of the products of a layer's "output" and of the gradients of its "input" and "weight"."""
    works: dict[str, Call] = {}
    shapes: dict[str, tuple[str, tuple[int, int, int, int]]] = {}
    for tokens, width_in, width_out in product(TOKENS, WIDTHS, WIDTHS):
        x, g = torch.ones(tokens, width_in, dtype=dtype), torch.ones(tokens, width_out, dtype=dtype)
        weight = torch.ones(width_out, width_in, dtype=dtype)
        total = torch.zeros(width_out, width_in, dtype=dtype)
        at = f"matmul {tokens}x{width_in}x{width_out}"
        for name, group, shape, call in (
            (f"{at} output", "output", (tokens, width_out, width_in, 1), _output(x, weight)),
            (f"{at} input", "input", (tokens, width_in, width_out, 1), _input(g, weight)),
            (f"{at} weight", "weight", (width_out, width_in, tokens, 1), _weight(total, g, x)),
        ):
            works[name], shapes[name] = call, (group, shape)
    found: dict[str, list[ProductTiming]] = {"output": [], "input": [], "weight": []}
    for name, taken in take_turns(works, seconds, progress).items():
        group, (m, n, k, batch) = shapes[name]
        found[group].append(ProductTiming(2 * m * n * k * batch, (m, n, k, batch), taken))
    return found


def _output(x: torch.Tensor, weight: torch.Tensor) -> Call:
    return lambda: torch.nn.functional.linear(x, weight)


def _input(g: torch.Tensor, weight: torch.Tensor) -> Call:
    return lambda: torch.mm(g, weight)


def _weight(total: torch.Tensor, g: torch.Tensor, x: torch.Tensor) -> Call:
    return lambda: total.addmm_(g.t(), x)


def attention_timings(
    dtype: torch.dtype, seconds: float, progress: Progress | None = None
) -> dict[str, list[ProductTiming]]:
    """Timings of causal attention, "forward" and "backward", with the planner's count of their FLOPs."""
    works: dict[str, Call] = {}
    for shape in ATTENTIONS:
        batch, tokens, heads, width = shape
        parts = [torch.ones(batch, tokens, heads, width, dtype=dtype) for _ in range(3)]
        upstream = torch.ones(batch * tokens, heads * width, dtype=dtype)
        at = "attention {}x{}x{}x{}".format(*shape)
        works[f"{at} forward"] = _attend(parts)
        works[f"{at} both"] = _attend_both(parts, upstream)
    taken = take_turns(works, seconds, progress)
    found: dict[str, list[ProductTiming]] = {"forward": [], "backward": []}
    for shape in ATTENTIONS:
        batch, tokens, heads, width = shape
        at = "attention {}x{}x{}x{}".format(*shape)
        forward = taken[f"{at} forward"]
        backward = max(taken[f"{at} both"] - forward, _LEAST_SHARE * forward)
        scores, as_product = batch * heads * tokens * (tokens + 1), (tokens, tokens, width, batch * heads)
        found["forward"].append(ProductTiming(2 * scores * width, as_product, forward))
        found["backward"].append(ProductTiming(5 * scores * width, as_product, backward))
    return found


def _attend(parts: Sequence[torch.Tensor]) -> Call:
    return lambda: Attention(*parts).context()


def _attend_both(parts: Sequence[torch.Tensor], upstream: torch.Tensor) -> Call:
    def both() -> None:
        attention = Attention(*parts)
        attention.context()
        attention.backward(upstream)

    return both


def kernel_timings(
    dtype: torch.dtype, seconds: float, progress: Progress | None = None
) -> list[tuple[int, float]]:
    """(bytes read and written, seconds) of kernels such as layers are made of, over tensors of many sizes."""
    works: dict[str, Call] = {}
    moved: dict[str, int] = {}
    for elements in KERNEL_ELEMENTS:
        for name, passes, call in _kernels(elements, dtype):
            works[f"{name} of {elements}"] = call
            moved[f"{name} of {elements}"] = passes * elements * dtype.itemsize
    return [(moved[name], taken) for name, taken in take_turns(works, seconds, progress).items()]


def _kernels(elements: int, dtype: torch.dtype) -> Iterable[tuple[str, int, Call]]:
    """Name, times that the elements are read or written, and call."""
    a, b = torch.ones(elements // 64, 64, dtype=dtype), torch.ones(elements // 64, 64, dtype=dtype)
    yield "scale", 2, lambda: torch.mul(a, 0.5)
    yield "add", 3, lambda: b.add_(a)
    yield "activation", 2, lambda: torch.nn.functional.silu(a)
