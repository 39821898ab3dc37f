"""The tensor steps that segments are made of, forward and backward.

Each allocates exactly what the planner's bodies say and frees it as soon as they say; the names there and
here are the same. Shapes: T tokens (flattened, sequence by sequence), H hidden, d one head.
Norms and rotations work in place on what they own.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn import functional

from picotron.planner.model import RopeScaling


class Norm(Protocol):
    """A norm over hidden that keeps only its statistics and computes its output again in backward."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The normed x and its statistics."""

    def again(self, x: torch.Tensor, statistics: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The normed x once more."""

    def backward(
        self, grad: torch.Tensor, x: torch.Tensor, statistics: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        """The gradient of x; ``grad``, that of the output, is consumed. Weight gradients accumulate."""


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which sums over many elements of ``dtype`` are taken and kept: never below fp32."""
    return torch.promote_types(dtype, torch.float32)


def _times(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """The product, computed as precisely as ``factor`` is and rounded once to the format of ``x``."""
    return torch.mul(x, factor, out=torch.empty_like(x))


class RmsNorm:
    """Root mean square norm (Zhang and Sennrich 2019, arXiv:1910.07467) over the last dimension."""

    def __init__(self, weight: torch.Tensor, gradient: torch.Tensor, eps: float) -> None:
        self.weight, self.gradient, self.eps = weight, gradient, eps

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The normed x and the inverse root mean square of each row."""
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=statistics_dtype(x.dtype))
        inverse.square_().div_(x.shape[-1]).add_(self.eps).rsqrt_()
        return self.again(x, (inverse,)), (inverse,)

    def again(self, x: torch.Tensor, statistics: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The normed x from its statistics."""
        return _times(x, statistics[0]).mul_(self.weight)

    def backward(
        self, grad: torch.Tensor, x: torch.Tensor, statistics: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        """The gradient of x, in the memory of ``grad``."""
        (inverse,) = statistics
        unit = _times(x, inverse)
        product = grad * unit
        self.gradient.add_(product.sum(dim=tuple(range(product.dim() - 1)), dtype=inverse.dtype))
        dot = product @ self.weight
        del product
        grad.mul_(self.weight)
        grad.addcmul_(unit, dot.unsqueeze(-1), value=-1 / x.shape[-1])
        return grad.mul_(inverse)


class LayerNorm:
    """Layer norm (Ba et al. 2016, arXiv:1607.06450) over the last dimension."""

    def __init__(
        self,
        weight: torch.Tensor,
        gradient: torch.Tensor,
        bias: torch.Tensor,
        bias_gradient: torch.Tensor,
        eps: float,
    ) -> None:
        self.weight, self.gradient, self.eps = weight, gradient, eps
        self.bias, self.bias_gradient = bias, bias_gradient

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The normed x, and mean and inverse deviation of each row."""
        normed, mean, inverse = torch.native_layer_norm(x, x.shape[-1:], *self._affine(), self.eps)
        return normed, (mean, inverse)

    def _affine(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and shift; on CPU the format of theirs is that of the statistics."""
        if self.weight.is_cuda:
            return self.weight, self.bias
        wide = statistics_dtype(self.weight.dtype)
        return self.weight.to(wide), self.bias.to(wide)

    def again(self, x: torch.Tensor, statistics: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The normed x once more."""
        return self.forward(x)[0]

    def backward(
        self, grad: torch.Tensor, x: torch.Tensor, statistics: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        """The gradient of x."""
        mean, inverse = statistics
        dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
            grad, x, list(x.shape[-1:]), mean, inverse, *self._affine(), [True, True, True]
        )
        self.gradient.add_(dweight)
        self.bias_gradient.add_(dbias)
        out: torch.Tensor = dx
        return out


def rotary_tables(
    positions: torch.Tensor, head_dim: int, theta: float, scaling: RopeScaling | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine [s, 1, d/2] of each position (Su et al. 2021, RoFormer, arXiv:2104.09864)."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64, device=positions.device).to(torch.float32)
    frequencies: torch.Tensor = 1.0 / torch.pow(theta, exponent / head_dim)
    if scaling is not None:
        frequencies = scaled_frequencies(frequencies, scaling)
    angles = positions.to(torch.float32).unsqueeze(1) * frequencies
    return angles.cos().to(dtype).unsqueeze(1), angles.sin().to(dtype).unsqueeze(1)


def scaled_frequencies(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Frequencies stretched for longer contexts: linear, or by wavelength as Llama 3.1 does."""
    if scaling.kind == "linear":
        return frequencies / float(scaling.factor)
    wavelengths = 2 * torch.pi / frequencies
    turns = scaling.original_max_positions / wavelengths
    share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    share = share.clamp(0.0, 1.0)
    return (1 - share) * frequencies / float(scaling.factor) + share * frequencies


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, *, backwards: bool = False) -> None:
    """Rotate x [batch, s, heads, d] by its positions, in place; ``backwards`` undoes it."""
    first, second = x.chunk(2, dim=-1)
    sign = -1 if backwards else 1
    half = first.clone()
    first.mul_(cosine).addcmul_(second, sine, value=-sign)
    second.mul_(cosine).addcmul_(half, sine, value=sign)


class Attention:
    """Causal attention over local heads, with torch's own fused kernel and its own backward.

    The kernel's graph is an island: it is built on detached inputs and used once.
    """

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Q [batch, s, heads, d]; k and v [batch, s, kv heads, d]."""
        self.leaves = [part.transpose(1, 2).detach().requires_grad_() for part in (q, k, v)]
        with torch.enable_grad():
            query, key, value = self.leaves
            self.out = functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=q.shape[2] != k.shape[2]
            )

    def context(self) -> torch.Tensor:
        """What was attended to, [T, heads * d]; it may outlive the island."""
        return self.out.detach().transpose(1, 2).flatten(0, 1).flatten(1)

    def backward(self, grad: torch.Tensor) -> list[torch.Tensor]:
        """Gradients of q, k and v, each [T, heads * d]; ``grad`` is [T, heads * d]. Frees the island."""
        out, leaves = self.out, self.leaves
        del self.out, self.leaves
        batch, heads, s, d = out.shape
        upstream = grad.view(batch, s, heads, d).transpose(1, 2)
        gradients = torch.autograd.grad(out, leaves, upstream)
        return [part.transpose(1, 2).flatten(0, 1).flatten(1) for part in gradients]


def vocabulary_slice(ids: torch.Tensor, start: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids counted from ``start`` (0 where outside), and which fall outside [start, start + size)."""
    local = ids - start
    outside = local.ge(size)
    below = local.lt(0)
    outside.logical_or_(below)
    del below
    return local.masked_fill_(outside, 0), outside


def add_product(gradient: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add ``left @ right`` to ``gradient``, which may be in a wider format.

    A GPU then sums and adds in the wider one; a CPU rounds the product to the format of its operands first.
    """
    if gradient.dtype == left.dtype:
        gradient.addmm_(left, right)
    elif gradient.is_cuda:
        torch.addmm(gradient, left, right, out_dtype=gradient.dtype, out=gradient)
    else:
        gradient.add_(torch.mm(left, right))
