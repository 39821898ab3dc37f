"""Projections of one input: weights that lie side by side in memory are one weight of one product.

Parameters of a segment lie in plan order, so that the rows of q, k and v, or of gate and up, follow each
other. An accelerator makes all outputs by one product, side by side. A processor multiplies each by itself:
its arithmetic is no slower for that, while what follows, and the allocator, like several small tensors better
than a large one with steps between the rows of its parts. Either way the outputs have the same bytes in all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch

from picotron.runtime.kernels import statistics_dtype

Multiply = Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor | None]], list[torch.Tensor]]
"""From weights [out, in] and biases to the products with one input."""


def side_by_side(parts: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The rows of all ``parts`` as one tensor without a copy; None where they do not follow each other."""
    first = parts[0]
    if any(part.untyped_storage()._cdata != first.untyped_storage()._cdata for part in parts):
        return None
    if not all(part.is_contiguous() and part.shape[1:] == first.shape[1:] for part in parts):
        return None
    if any(one.storage_offset() + one.numel() != two.storage_offset() for one, two in pairwise(parts)):
        return None
    shape = (sum(part.shape[0] for part in parts), *first.shape[1:])
    return first.as_strided(shape, first.stride())


class Projections:
    """Projections of one input by their names ("q_proj"), with weights [out, in] and perhaps biases [out].

    ``weights`` and ``gradients`` are looked into whenever they are needed: what is in them may change.
    """

    def __init__(
        self, names: Sequence[str], weights: Mapping[str, torch.Tensor], gradients: Mapping[str, torch.Tensor]
    ) -> None:
        self.names, self._weights, self._gradients = tuple(names), weights, gradients
        self.has_bias = f"{names[0]}.bias" in weights
        self.together = weights[f"{names[0]}.weight"].device.type != "cpu"

    def outputs(self, multiply: Multiply) -> list[torch.Tensor]:
        """What each projection makes, [T, out], of the input that ``multiply`` knows."""
        weights = self._each(self._weights, "weight")
        biases = self._each(self._weights, "bias") if self.has_bias else [None] * len(weights)
        weight = side_by_side(weights) if self.together else None
        if weight is None:
            return multiply(weights, biases)
        sizes = [part.shape[0] for part in weights]
        [joined] = multiply([weight], [None])
        outputs = [*torch.split(joined, sizes, dim=1)]
        for output, bias in zip(outputs, biases, strict=True):
            if bias is not None:
                output.add_(bias)
        return outputs

    def input_gradient(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        """The gradient of the input from those of the outputs, [T, out] each."""
        first, *others = zip(gradients, self._each(self._weights, "weight"), strict=True)
        found = torch.mm(*first)
        for gradient, weight in others:
            found.addmm_(gradient, weight)
        return found

    def add_bias_gradients(self, gradients: Sequence[torch.Tensor]) -> None:
        """Add the sums over tokens of ``gradients`` to the biases' gradients, if there are biases."""
        if self.has_bias:
            for gradient, bias in zip(gradients, self._each(self._gradients, "bias"), strict=True):
                bias.add_(gradient.sum(0, dtype=statistics_dtype(gradient.dtype)))

    def _each(self, held: Mapping[str, torch.Tensor], kind: str) -> list[torch.Tensor]:
        return [held[f"{name}.{kind}"] for name in self.names]
