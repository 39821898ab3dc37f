"""What a segment of the decoder is: it knows its forward, and its backward from what forward saved.

``forward(x, microbatch)`` returns (y, saved); ``backward(saved, dy)`` accumulates weight gradients and
returns dx. Nothing stands between the two but ``saved``, so the walker may pause between any two segments.
x and y are [tokens, hidden], a tensor-parallel share of the tokens under sequence parallelism.

``backward`` may come in two halves: ``backward_input`` returns dx and leaves in ``saved`` the products of
weight gradients, which ``backward_weight`` multiplies at any later time (I and W of Qi et al. 2023,
arXiv:2401.10241). Gradients of norms and biases are no products and are accumulated in the first half.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from attrs import define
from torch.nn import functional

from picotron.planner.body import Dims
from picotron.planner.layout import even_ranges
from picotron.planner.model import ModelSpec, Segment
from picotron.runtime import chunked
from picotron.runtime.backend import Handle
from picotron.runtime.communicator import Communicator
from picotron.runtime.compiled import CompiledRmsNorm
from picotron.runtime.heads import HeadsAttention
from picotron.runtime.kernels import (
    Attention,
    AttentionCore,
    LayerNorm,
    Norm,
    RmsNorm,
    add_product,
    statistics_dtype,
)
from picotron.runtime.ring import RingAttention

Saved = dict[str, Any]
Product = tuple[str, torch.Tensor, torch.Tensor | None]  # weights, gradient of the output, input or NORMED
NORMED = None  # the norm of the segment's x, computed again when it is multiplied


class Tokens(Protocol):
    """One microbatch's token ids and labels, each flattened to [T]; -100 labels a token without loss."""

    def token_ids(self) -> torch.Tensor:
        """Fresh on the device."""

    def labels(self) -> torch.Tensor:
        """Fresh on the device."""


@define
class Pending:
    """A sum over tp that is under way."""

    communicator: Communicator
    handle: Handle
    summed: torch.Tensor
    source: torch.Tensor  # lives as long

    def wait(self) -> torch.Tensor:
        """The sum."""
        self.communicator.wait(self.handle, "tp")
        return self.summed


@define(kw_only=True)
class Context:
    """What all segments of a rank share."""

    model: ModelSpec
    dims: Dims
    tp_index: int
    communicator: Communicator
    weights: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]
    statistics: torch.Tensor  # squared gradient norm, loss sum, valid tokens (fp64)
    rotary: tuple[torch.Tensor, torch.Tensor] | None
    positions: torch.Tensor | None

    def gather(self, local: torch.Tensor) -> torch.Tensor:
        """All tokens of ``local``, or ``local`` itself without sequence parallelism."""
        if not self.dims.sequence_parallel:
            return local
        full = local.new_empty(self.dims.tokens, *local.shape[1:])
        self.communicator.all_gather(full, local, "tp")
        return full

    def reduce(self, full: torch.Tensor) -> torch.Tensor:
        """``full`` summed over tp: this rank's tokens of it, or in place without sequence parallelism."""
        if self.dims.sequence_parallel:
            local = full.new_empty(self.dims.local_tokens, *full.shape[1:])
            self.communicator.reduce_scatter(local, full, "tp")
            return local
        if self.dims.tp > 1:
            self.communicator.all_reduce(full, "tp")
        return full

    def start_reduce(self, full: torch.Tensor) -> Pending:
        """As ``reduce`` over more than one rank, under way until the result is asked for."""
        if not self.dims.sequence_parallel:
            return Pending(self.communicator, self.communicator.post_all_reduce(full, "tp"), full, full)
        local = full.new_empty(self.dims.local_tokens, *full.shape[1:])
        handle = self.communicator.post_reduce_scatter(local, full, "tp")
        return Pending(self.communicator, handle, local, full)

    def attend(self, parts: dict[str, torch.Tensor]) -> AttentionCore:
        """Causal attention of q, k and v, each [batch, s, heads, d]; over all ranks that share sequences.

        ``parts`` may come back empty: what it held lives no longer than it is needed.
        """
        if self.dims.context == 1:
            return Attention(parts["q"], parts["k"], parts["v"])
        if self.dims.context_parallel == "ring":
            return RingAttention(parts, self.communicator)
        return HeadsAttention(parts, self.communicator)

    @property
    def vocabulary(self) -> tuple[int, int]:
        """First id and number of ids in this rank's slice."""
        start, stop = even_ranges(self.model.vocab_size, self.dims.tp)[self.tp_index]
        return start, stop - start


class SegmentRunner(ABC):
    """Common to all segments: its parameters by the last two words of their names, and its norm."""

    conv1d = False  # whether weights are [in, out]

    def __init__(self, context: Context, segment: Segment) -> None:
        self.context, self.dims = context, context.dims
        names = {".".join(p.name.split(".")[-2:]): p.name for p in segment.parameters}
        self.w = {short: context.weights[name] for short, name in names.items()}
        self.d = {short: context.gradients[name] for short, name in names.items()}
        norms = [".".join(p.name.split(".")[-2:]) for p in segment.parameters if p.role == "norm"]
        self.norm = self._make_norm(norms) if norms else None

    def _rms_norm(self, name: str) -> RmsNorm:
        kind = CompiledRmsNorm if self.dims.compiled else RmsNorm
        return kind(self.w[name], self.d[name], self.context.model.norm_eps)

    def _make_norm(self, names: list[str]) -> Norm:
        eps = self.context.model.norm_eps
        if len(names) == 1:
            return self._rms_norm(names[0])
        weight, bias = sorted(names, reverse=True)
        return LayerNorm(self.w[weight], self.d[weight], self.w[bias], self.d[bias], eps)

    @abstractmethod
    def forward(self, x: torch.Tensor, microbatch: Tokens) -> tuple[torch.Tensor, Saved]:
        """(y, saved)."""

    @abstractmethod
    def backward(self, saved: Saved, dy: torch.Tensor) -> torch.Tensor:
        """The gradient of x; weight products are multiplied at once unless ``saved`` has a queue for them."""

    def backward_input(self, saved: Saved, dy: torch.Tensor) -> torch.Tensor:
        """The gradient of x; what the weights' gradients are multiplied from stays in ``saved``."""
        saved["products"] = deque()
        return self.backward(saved, dy)

    def backward_weight(self, saved: Saved) -> None:
        """Multiply what ``backward_input`` left, in its order; a tensor is let go of after its last use."""
        products: deque[Product] = saved["products"]
        normed = None
        while products:
            name, gradient, source = products.popleft()
            if source is NORMED:
                normed = self._normed_again(saved, last=True) if normed is None else normed
                source = normed
            self._multiply(name, gradient, source)
        del saved["products"]

    def _add_product(
        self, saved: Saved, name: str, gradient: torch.Tensor, source: torch.Tensor | None
    ) -> None:
        """Add a product to a weight's gradient, now or (where ``saved`` has a queue for it) in W."""
        if "products" in saved:
            saved["products"].append((name, gradient, source))
        else:
            assert source is not NORMED
            self._multiply(name, gradient, source)

    def _multiply(self, name: str, gradient: torch.Tensor, source: torch.Tensor) -> None:
        left, right = (source, gradient) if self.conv1d else (gradient, source)
        add_product(self.d[name], left.t(), right)

    def _source(self, saved: Saved) -> torch.Tensor | None:
        """The gathered norm of x for weight products: computed again, or left to W."""
        return NORMED if "products" in saved else self._normed_again(saved)

    def _normed(self, x: torch.Tensor, saved: Saved) -> torch.Tensor:
        """The gathered norm of x; saves x and the norm's statistics."""
        return self.context.gather(self._local_normed(x, saved))

    def _local_normed(self, x: torch.Tensor, saved: Saved) -> torch.Tensor:
        assert self.norm is not None
        normed, statistics = self.norm.forward(x)
        saved.update(x=x, statistics=statistics)
        return normed

    def _input_products(
        self,
        x: torch.Tensor,
        saved: Saved,
        weights: Sequence[torch.Tensor],
        biases: Sequence[torch.Tensor | None],
    ) -> list[torch.Tensor]:
        """Of the gathered norm of x, [T, out] with each of ``weights`` [out, in]; saves as ``_normed``."""
        if self.dims.tensor_overlap == "chunked":
            normed = self._local_normed(x, saved)
            return chunked.products(self.context.communicator, self.dims, normed, weights, biases)
        source = self._normed(x, saved)
        return [functional.linear(source, *pair) for pair in zip(weights, biases, strict=True)]

    def _normed_again(self, saved: Saved, *, last: bool = False) -> torch.Tensor:
        """The gathered norm of x once more; ``last``: nobody needs x and its statistics after that."""
        assert self.norm is not None
        take = saved.pop if last else saved.__getitem__
        return self.context.gather(self.norm.again(take("x"), take("statistics")))

    def _norm_backward(self, saved: Saved, dnormed: torch.Tensor, *, last: bool = False) -> torch.Tensor:
        """From the local gradient of the normed x to that of x; ``last``: no product needs the norm again."""
        assert self.norm is not None
        take = saved.pop if last else saved.__getitem__
        return self.norm.backward(dnormed, take("x"), take("statistics"))

    def _add_bias_gradient(self, name: str, gradient: torch.Tensor) -> None:
        if name in self.d:
            self.d[name].add_(gradient.sum(0, dtype=statistics_dtype(gradient.dtype)))

    def _input_backward(self, saved: Saved, gradients: list[torch.Tensor]) -> torch.Tensor:
        """Gradient of the normed x from ``gradients`` of its products, which are let go of; and the weights'.

        Where they overlap, these are multiplied while that one is summed over tp.
        """
        context = self.context
        if self.dims.tensor_overlap == "none":
            self._weight_gradients(saved, gradients, self._source(saved))
            dnormed = self._input_gradient(gradients)
            gradients.clear()
            return context.reduce(dnormed)
        source = self._source(saved) if self.dims.sequence_parallel else None
        pending = context.start_reduce(self._input_gradient(gradients))
        source = source if self.dims.sequence_parallel else self._source(saved)
        self._weight_gradients(saved, gradients, source)
        gradients.clear()
        del source
        return pending.wait()

    def _input_gradient(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        """Of the normed x, this rank's part, from ``gradients`` of its products."""
        raise NotImplementedError(f"{type(self).__name__} multiplies no normed input")

    def _weight_gradients(
        self, saved: Saved, gradients: Sequence[torch.Tensor], source: torch.Tensor | None
    ) -> None:
        """Add the weights' from ``gradients`` and the normed x, and those of biases."""
        raise NotImplementedError(f"{type(self).__name__} multiplies no normed input")
