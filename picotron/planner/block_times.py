"""Blocks of a layer and what they are made of: products, casts, elementwise kernels, collectives.

A block's seconds are kept by cause, forward and backward. Products are cut as tensor, context and expert
parallelism cut them; a backward multiplies each twice. Only the layers' own linear products may be narrow;
the attention core, the router and the head stay in 16 bits. Elementwise kernels take their bytes, by the
passes that each kernel set makes. Sources: Shoeybi et al. 2019, arXiv:1909.08053; Korthikanti et al. 2022,
arXiv:2205.05198.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from attrs import field, frozen

from picotron.planner.cases import Cases, Column
from picotron.planner.constants import Constants
from picotron.planner.kernels import Rates, matmul_seconds
from picotron.planner.network import Links, all_reduce_seconds, group, ring_seconds, strides

Seconds = Mapping[str, Column]
CORE = ("matmul", "attention", "elementwise")
Product = tuple[Column, Column, Column, bool]  # m, n, k, whether in the layers' own narrow format
BACKWARD_KERNELS = 1.6  # launches of a backward beside its forward's


@frozen(kw_only=True, eq=False)
class Block:
    """One kind of layer or end: seconds of a microbatch by cause, and how many kernels are launched."""

    forward: Seconds = field(factory=dict)
    backward: Seconds = field(factory=dict)
    forward_kernels: Column = field(factory=lambda: np.zeros(()))
    launches: Column = field(factory=lambda: np.zeros(()))  # of them, those that the host launches one by one
    waits: Column = field(factory=lambda: np.zeros(()))  # seconds of the device for the host, both passes

    @property
    def backward_kernels(self) -> Column:
        """Launches of its backward."""
        return BACKWARD_KERNELS * self.forward_kernels


@frozen(kw_only=True, eq=False)
class Here:
    """What all blocks need: sizes of one device's part of a microbatch, rates and links."""

    cases: Cases
    constants: Constants
    rates: Rates
    link: Links
    tokens: Column  # of a tensor-parallel group's microbatch
    local: Column  # of them, those a rank keeps between blocks (fewer under sequence parallelism)

    @property
    def ungraphed(self) -> Column:
        """1 where the host launches the kernels of whatever is no expert, 0 where graphs hold them."""
        return np.where(self.cases.software.graphs > 0, 0.0, 1.0)

    def passes(self, name: str, elements: Column) -> Column:
        """Seconds of the elementwise kernels ``name`` over ``elements``, forward and backward together."""
        count = self.constants.by(f"{name}_passes", self.cases.software.kernels)
        return self.moved(count * elements * self.cases.work.compute_bytes)

    def moved(self, count: Column) -> Column:
        """Seconds of moving so many bytes by elementwise kernels."""
        seconds: Column = self.constants["elementwise_factor"] * count / self.rates.bytes_per_second
        return seconds


def weighted(blocks: Sequence[tuple[Block, Column | float]]) -> Block:
    """The blocks one after another, each so many times (a share of a layer, a number of layers)."""
    forward: dict[str, Column] = {}
    backward: dict[str, Column] = {}
    kernels: Column = np.zeros(())
    launches: Column = np.zeros(())
    waits: Column = np.zeros(())
    for block, times in blocks:
        for total, part in ((forward, block.forward), (backward, block.backward)):
            for cause, seconds in part.items():
                total[cause] = total[cause] + seconds * times if cause in total else seconds * times
        kernels = kernels + block.forward_kernels * times
        launches = launches + block.launches * times
        waits = waits + block.waits * times
    return Block(forward=forward, backward=backward, forward_kernels=kernels, launches=launches, waits=waits)


def total(seconds: Seconds, causes: Sequence[str] | None = None) -> Column:
    """The sum over ``causes`` (all of them by default)."""
    zero: Column = np.zeros(())
    return sum((value for cause, value in seconds.items() if causes is None or cause in causes), zero)


def products_seconds(
    here: Here,
    products: Sequence[Product],
    groups: Column | float = 1.0,
    launches: Column | float = 1.0,
) -> tuple[Column, Column]:
    """Seconds of products forward, and of the two that each has backward."""

    def seconds(m: Column, n: Column, k: Column, narrow: bool, output: Column | None = None) -> Column:
        return matmul_seconds(
            here.rates, m, n, k, narrow=narrow, groups=groups, launches=launches, output_bytes=output
        )

    forward: Column = np.zeros(())
    backward: Column = np.zeros(())
    added = 2.0 * here.cases.work.gradient_bytes  # a weight's gradient is added to what is there
    for m, n, k, narrow in products:
        forward = forward + seconds(m, n, k, narrow)
        backward = backward + seconds(m, k, n, narrow) + seconds(n, k, m, narrow, added)
    return forward, backward


def casts_seconds(
    here: Here, products: Sequence[Product], groups: Column | float = 1.0
) -> tuple[Column, Column]:
    """Seconds of casting the operands of narrow products: inputs forward, output gradients backward."""
    if not np.any(here.rates.is_narrow):
        return np.zeros(()), np.zeros(())
    size = here.constants["cast_bytes"] * here.rates.is_narrow * groups
    inputs = sum((m * k for m, _, k, narrow in products if narrow), np.zeros(()))
    gradients = sum((m * n for m, n, _, narrow in products if narrow), np.zeros(()))
    return here.moved(size * inputs), here.moved(size * gradients)


def tensor_seconds(here: Here) -> Column:
    """The tensor-parallel collectives of one block and pass: an all-reduce, or its two halves."""
    cases, layout = here.cases, here.cases.layout
    if not np.any(layout.tp > 1):
        return np.zeros(())
    where = group(cases, layout.tp, strides(cases)["tp"])
    payload = here.tokens * cases.model.hidden * cases.work.compute_bytes
    halves = 2.0 * ring_seconds(here.link, payload, where)
    whole = all_reduce_seconds(here.link, payload, where)
    seconds = np.where(layout.sequence_parallel > 0, halves, whole)
    return seconds * (1.0 - cases.software.tensor_overlap)


def dense_mlp(here: Here, inner: Column) -> Block:
    """Norm, an MLP of ``inner`` channels on this rank, gated or not, and residual sum."""
    model = here.cases.model
    wide = np.where(model.gated > 0, 2.0, 1.0)
    products = [
        (here.tokens, wide * inner, model.hidden, True),
        (here.tokens, model.hidden, inner, True),
    ]
    forward, backward = products_seconds(here, products)
    cast, cast_backward = casts_seconds(here, products)
    moved = here.passes("norm", here.local * model.hidden) + here.passes(
        "residual", here.local * model.hidden
    )
    moved = moved + here.passes("activation", here.tokens * inner * (1.0 + wide) / 3.0)
    around = tensor_seconds(here)
    return Block(
        forward={"matmul": forward, "elementwise": 0.4 * moved + cast, "tensor": around},
        backward={"matmul": backward, "elementwise": 0.6 * moved + cast_backward, "tensor": around},
        forward_kernels=0.5 * layer_kernels(here),
        launches=0.5 * layer_kernels(here) * here.ungraphed,
    )


def layer_kernels(here: Here) -> Column:
    """Launches of a dense layer's forward."""
    layout = here.cases.layout
    count: Column = here.constants.by("kernel_counts", here.cases.software.kernels)
    count = count + here.constants["narrow_kernels"] * here.rates.is_narrow
    return count + np.where(layout.tp > 1, 6.0, 0.0)
