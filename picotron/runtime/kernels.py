"""The tensor steps that segments are made of, forward and backward.

Each allocates exactly what the planner's bodies say and frees it as soon as they say; the names there and
here are the same. Shapes: T tokens (flattened, sequence by sequence), H hidden, d one head.
Norms and rotations work in place on what they own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.nn import functional

from picotron.planner.model import RopeScaling
from picotron.runtime import flash


class Norm(Protocol):
    """A norm over hidden that keeps only its statistics and computes its output again in backward."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The normed x and its statistics."""

    def again(self, x: torch.Tensor, statistics: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The normed x once more."""

    def backward(
        self, grad: torch.Tensor, x: torch.Tensor, statistics: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        """The gradient of x; ``grad`` is that of the output. Weight gradients accumulate."""


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which sums over many elements of ``dtype`` are taken and kept: never below fp32."""
    return torch.promote_types(dtype, torch.float32)


def _times(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """The product, computed as precisely as ``factor`` is and rounded once to the format of ``x``."""
    return torch.mul(x, factor, out=torch.empty_like(x))


def _wide(weight: torch.Tensor) -> torch.Tensor:
    """A norm's weight as torch's kernels take it: on CPU they keep statistics in the format of the weight."""
    return weight if weight.is_cuda else weight.to(statistics_dtype(weight.dtype))


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
        """The gradient of x.

        Layer norm's kernel with a mean of 0 does all but one step: it takes the mean over the row of what
        comes in off it, which is given back.
        """
        (inverse,) = statistics
        size = x.shape[-1]
        dx, dweight, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, [size], torch.zeros_like(inverse), inverse, _wide(self.weight), None, [True, True, False]
        )
        self.gradient.add_(dweight)
        taken = torch.mv(grad.reshape(-1, size), self.weight).view_as(inverse).mul_(inverse)
        out: torch.Tensor = dx.add_(taken, alpha=1 / size)
        return out


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
        """Scale and shift as the kernels take them."""
        return _wide(self.weight), _wide(self.bias)

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
    sign = -1 if backwards else 1
    for part in _at_a_time(x):
        first, second = part.chunk(2, dim=-1)
        half = first.clone()
        first.mul_(cosine).addcmul_(second, sine, value=-sign)
        second.mul_(cosine).addcmul_(half, sine, value=sign)


def _at_a_time(x: torch.Tensor) -> Sequence[torch.Tensor]:
    """What several steps over x [batch, ...] take at a time: on a processor one sequence, for its caches."""
    return torch.split(x, 1) if x.device.type == "cpu" else (x,)


@runtime_checkable
class AttentionCore(Protocol):
    """Attention that has been computed and whose backward has not; its attributes hold its tensors.

    They may be replaced by equal ones before ``backward``.
    """

    def run(self) -> None:
        """Compute what backward needs, for the first time or after ``drop``."""

    def drop(self) -> None:
        """Let go of all that ``run`` gives."""

    def context(self) -> torch.Tensor:
        """What was attended to, [T, heads * d]."""

    def backward(self, grad: torch.Tensor) -> list[torch.Tensor]:
        """Gradients of q, k and v, each [T, heads * d], from that of the context."""


class Attention:
    """Causal attention over local heads by torch's own fused kernels, forward and backward.

    ``tensors`` is all that backward needs: q, k and v [batch, heads, s, d], then what the kernel leaves, its
    output first.
    """

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Q [batch, s, heads, d]; k and v [batch, s, kv heads, d]."""
        self.tensors = [part.transpose(1, 2) for part in (q, k, v)]
        self._kernel: AttentionKernel = Flash() if flash.takes(q) else Island()
        self.run()

    def run(self) -> None:
        """The kernel's forward, for the first time or after ``drop``."""
        self.tensors += self._kernel.forward(*self.tensors)

    def drop(self) -> None:
        """Let go of what the kernel left; q, k and v stay."""
        del self.tensors[3:]

    def context(self) -> torch.Tensor:
        """What was attended to, [T, heads * d]; it may outlive the attention."""
        return self.tensors[3].transpose(1, 2).flatten(0, 1).flatten(1)

    def backward(self, grad: torch.Tensor) -> list[torch.Tensor]:
        """Gradients of q, k and v, each [T, heads * d]; ``grad`` is [T, heads * d]. Frees all tensors."""
        tensors = self.tensors
        del self.tensors
        batch, heads, s, d = tensors[3].shape
        upstream = grad.view(batch, s, heads, d).transpose(1, 2)
        gradients = self._kernel.backward(upstream, tensors)
        return [part.transpose(1, 2).flatten(0, 1).flatten(1) for part in gradients]


class AttentionKernel(Protocol):
    """A fused causal attention whose backward is told all tensors again."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Sequence[torch.Tensor]:
        """The output, then all else that backward needs beside q, k and v."""

    def backward(self, grad: torch.Tensor, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Gradients of q, k and v, from that of the output; ``tensors``: q, k, v and what forward gave."""


class Flash:
    """Torch's own flash kernels, called by name (Dao et al. 2022, arXiv:2205.14135)."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Sequence[torch.Tensor]:
        """Output and log-sum-exp."""
        return flash.forward(q, k, v, causal=True)

    def backward(self, grad: torch.Tensor, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Gradients of q, k and v."""
        q, k, v, out, log_sum_exp = tensors
        return flash.backward(grad, q, k, v, out, log_sum_exp, causal=True)


class Island:
    """Whatever kernel torch chooses, by an autograd graph of its own that holds no tensor.

    Hooks hand out what the graph would save, and are asked for it in backward.
    """

    def __init__(self) -> None:
        self._slots: list[torch.Tensor] = []

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Sequence[torch.Tensor]:
        """Output, then what the graph needs."""
        saved: list[torch.Tensor] = []
        slots = self._slots = []

        def pack(tensor: torch.Tensor) -> int:
            saved.append(tensor.detach())
            return len(saved) - 1

        leaves = [part.detach().requires_grad_() for part in (q, k, v)]
        with torch.enable_grad(), saved_tensors_hooks(pack, slots.__getitem__):
            query, key, value = leaves
            out = functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
            )
        self._output, self._inputs = get_gradient_edge(out), [get_gradient_edge(leaf) for leaf in leaves]
        for leaf in leaves:
            leaf.data = leaf.new_empty(0)  # the graph's ends hold them
        found = [out.detach(), *saved]
        saved.clear()  # the hooks live as long as the graph
        return found

    def backward(self, grad: torch.Tensor, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Gradients of q, k and v."""
        self._slots += tensors[4:]
        return torch.autograd.grad(self._output, self._inputs, grad)


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
    elif adds_products(gradient, left):
        gradient.add_(torch.mm(left, right))
    else:
        torch.addmm(gradient, left, right, out_dtype=gradient.dtype, out=gradient)


def adds_products(gradient: torch.Tensor, operand: torch.Tensor) -> bool:
    """Whether a product of such operands is made first, in their format, and then added to ``gradient``."""
    return gradient.dtype != operand.dtype and not gradient.is_cuda
