"""Projections of one input as one product: weights that lie side by side in memory are one weight.

Parameters of a segment lie in plan order, so that the rows of q, k and v, or of gate and up, follow each
other: one product makes all outputs. Where they do not (their memory is laid out otherwise) each part is
multiplied by itself, into its columns of the same tensor. Gradients of outputs that are made apart stay
apart: to join them costs more than one product saves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch

from picotron.runtime.kernels import add_product, adds_products, statistics_dtype


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
    """Projections of one input by their names ("q_proj"): weights [out, in], outputs side by side [T, out].

    ``weights`` and ``gradients`` are looked into whenever they are needed: what is in them may change.
    """

    def __init__(
        self, names: Sequence[str], weights: Mapping[str, torch.Tensor], gradients: Mapping[str, torch.Tensor]
    ) -> None:
        self.names, self.weights, self.gradients = tuple(names), weights, gradients
        self.sizes = [weights[f"{name}.weight"].shape[0] for name in names]
        self.has_bias = f"{names[0]}.bias" in weights
        self._known: dict[tuple[str, bool], tuple[list[torch.Tensor], torch.Tensor | None]] = {}

    def _parts(self, kind: str, *, gradient: bool = False) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """The parts' weights or biases, or gradients of those, and all in one where they are side by side."""
        held = self.gradients if gradient else self.weights
        known = self._known.get((kind, gradient))
        if known is not None and all(
            held[f"{name}.{kind}"] is part for name, part in zip(self.names, known[0], strict=True)
        ):
            return known
        parts = [held[f"{name}.{kind}"] for name in self.names]
        found = self._known[kind, gradient] = parts, side_by_side(parts)
        return found

    def output(self, source: torch.Tensor) -> torch.Tensor:
        """All outputs of ``source`` [T, in]."""
        parts, whole = self._parts("weight")
        biases, bias = self._parts("bias") if self.has_bias else ([], None)
        if whole is not None:
            out = torch.mm(source, whole.t()) if bias is None else torch.addmm(bias, source, whole.t())
        else:
            out = source.new_empty(source.shape[0], sum(self.sizes))
            for part, columns in zip(parts, torch.split(out, self.sizes, dim=1), strict=True):
                torch.mm(source, part.t(), out=columns)
        if whole is None or bias is None:
            for own, columns in zip(biases, torch.split(out, self.sizes, dim=1), strict=False):
                columns.add_(own)
        return out

    def input_gradient(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        """The gradient of the input from those of the outputs, [T, out] each."""
        first, *others = zip(gradients, self._parts("weight")[0], strict=True)
        found = torch.mm(*first)
        for gradient, part in others:
            found.addmm_(gradient, part)
        return found

    def add_weight_gradient(self, gradients: Sequence[torch.Tensor], source: torch.Tensor) -> None:
        """Add the products of ``gradients``, [T, out] each, and ``source`` to the weights' gradients."""
        for gradient, part in zip(gradients, self._parts("weight", gradient=True)[0], strict=True):
            add_product(part, gradient.t(), source)

    def add_bias_gradient(self, gradients: Sequence[torch.Tensor]) -> None:
        """Add the sums of ``gradients`` over tokens to the biases' gradients, if there are biases."""
        if self.has_bias:
            for gradient, part in zip(gradients, self._parts("bias", gradient=True)[0], strict=True):
                part.add_(gradient.sum(0, dtype=statistics_dtype(gradient.dtype)))


class EqualProjections(Projections):
    """Projections of equal sizes, whose outputs lie one behind the other: [projections, T, out].

    Each is contiguous, as steps that take one element of each at a time like it.
    """

    def output(self, source: torch.Tensor) -> torch.Tensor:
        """All outputs of ``source`` [T, in]."""
        parts, whole = self._parts("weight")
        if whole is not None:
            out = torch.bmm(self._each(source), whole.view(len(parts), -1, source.shape[1]).transpose(1, 2))
        else:
            out = source.new_empty(len(parts), source.shape[0], self.sizes[0])
            for part, plane in zip(parts, out.unbind(), strict=True):
                torch.mm(source, part.t(), out=plane)
        if self.has_bias:
            for bias, plane in zip(self._parts("bias")[0], out.unbind(), strict=True):
                plane.add_(bias)
        return out

    def add_weight_gradient(
        self, gradients: torch.Tensor | Sequence[torch.Tensor], source: torch.Tensor
    ) -> None:
        """Add the products of ``gradients`` [projections, T, out] and ``source`` to the gradients."""
        parts, whole = self._parts("weight", gradient=True)
        if isinstance(gradients, torch.Tensor) and adds_products(parts[0], source):
            product = torch.bmm(gradients.transpose(1, 2), self._each(source))
            for part, plane in zip(parts, product.unbind(), strict=True):
                part.add_(plane)
            return
        if whole is None or not isinstance(gradients, torch.Tensor) or whole.dtype != source.dtype:
            super().add_weight_gradient([*gradients], source)
            return
        stacked = whole.view(len(gradients), -1, source.shape[1])
        stacked.baddbmm_(gradients.transpose(1, 2), self._each(source))

    def _each(self, source: torch.Tensor) -> torch.Tensor:
        return source.expand(len(self.names), *source.shape)
