"""The steps bound by memory, each compiled by ``torch.compile`` into one kernel that reads and writes once.

They stand in for those of ``kernels`` where a plan says ``compile=True``, and give the same numbers but for
rounding: sums are taken in fp32 at least. What they return is allocated before them and written in place; the
compiler's own scratch is a number a row, which no tracker sees. Shapes as in ``kernels``. Rotary positions
are not here: a compiler that is given two views of one tensor to change copies all of it.

A kernel is compiled for the first sizes that it meets and again, once, for any.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from picotron.runtime.backend import unseen
from picotron.runtime.kernels import RmsNorm


@cache
def _compiled(body: Callable[..., None]) -> Callable[..., None]:
    compiled: Callable[..., None] = torch.compile(body, fullgraph=True)
    return compiled


@cache
def missing_compiler(device_type: str) -> str | None:
    """What ``torch.compile`` lacks for kernels on "cpu" or "cuda"; None where it can."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "a C++ compiler"
    return "Triton" if device_type == "cuda" and find_spec("triton") is None else None


def run(body: Callable[..., None], *tensors: Any) -> None:
    """``body``, compiled, on ``tensors``; what it writes it is given."""
    with unseen():
        _compiled(body)(*tensors)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _norm(out: torch.Tensor, inverse: torch.Tensor, x: torch.Tensor, w: torch.Tensor, eps: float) -> None:
    wide = _wide(x)
    found = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    inverse.copy_(found)
    out.copy_(wide * found * w)


def _norm_again(out: torch.Tensor, inverse: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> None:
    out.copy_(_wide(x) * inverse * w)


def _norm_backward(
    out: torch.Tensor,
    dweight: torch.Tensor,
    grad: torch.Tensor,
    x: torch.Tensor,
    inverse: torch.Tensor,
    w: torch.Tensor,
) -> None:
    wide, unit = _wide(grad), _wide(x) * inverse
    scaled = wide * w
    mean = (scaled * unit).mean(-1, keepdim=True)
    out.copy_((scaled - unit * mean) * inverse)
    dweight.add_((wide * unit).flatten(0, -2).sum(0))


class CompiledRmsNorm(RmsNorm):
    """Root mean square norm, forward and backward in a kernel each."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The normed x and the inverse root mean square of each row."""
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        inverse = out.new_empty(*x.shape[:-1], 1, dtype=torch.promote_types(x.dtype, torch.float32))
        run(_norm, out, inverse, x, self.weight, self.eps)
        return out, (inverse,)

    def again(self, x: torch.Tensor, statistics: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The normed x from its statistics."""
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        run(_norm_again, out, statistics[0], x, self.weight)
        return out

    def backward(
        self, grad: torch.Tensor, x: torch.Tensor, statistics: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        """The gradient of x."""
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        run(_norm_backward, out, self.gradient, grad, x, statistics[0], self.weight)
        return out


def _swiglu(out: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> None:
    wide = _wide(gate)
    out.copy_(wide * torch.sigmoid(wide) * up)


def _swiglu_backward(gate: torch.Tensor, up: torch.Tensor, grad: torch.Tensor) -> None:
    wide, other, incoming = _wide(gate), _wide(up), _wide(grad)
    share = torch.sigmoid(wide)
    dgate = incoming * other * share * (1 + wide * (1 - share))
    dup = incoming * wide * share
    gate.copy_(dgate)
    up.copy_(dup)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up."""
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    run(_swiglu, out, gate, up)
    return out


def swiglu_backward(gate: torch.Tensor, up: torch.Tensor, grad: torch.Tensor) -> None:
    """Write to ``gate`` and ``up`` their own gradients; ``grad`` is that of their ``swiglu``."""
    run(_swiglu_backward, gate, up, grad)


def _loss(logits: torch.Tensor, statistics: torch.Tensor, labels: torch.Tensor) -> None:
    wide = _wide(logits)
    valid = (labels >= 0).unsqueeze(1)
    places = torch.arange(logits.shape[1], device=logits.device)
    own = places == labels.unsqueeze(1)
    shifted = wide - wide.amax(-1, keepdim=True)
    total = shifted.exp().sum(-1, keepdim=True)
    target = torch.where(own, shifted, 0).sum(-1, keepdim=True)
    loss = torch.where(valid, total.log() - target, 0).to(torch.float64).sum()
    weight = valid / statistics[2]
    gradient = (shifted.exp() / total - own.to(wide.dtype)) * weight.to(wide.dtype)
    statistics[1].add_(loss)
    logits.copy_(gradient)


def logit_gradient(logits: torch.Tensor, statistics: torch.Tensor, labels: torch.Tensor) -> None:
    """Cross-entropy over the whole vocabulary: ``logits`` become their gradient.

    ``statistics``: squared norm, sum of losses (added to) and valid tokens of the step.
    """
    run(_loss, logits, statistics, labels)
