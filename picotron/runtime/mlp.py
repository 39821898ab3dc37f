"""MLP segments, with a gate (llama, qwen2, qwen3) or without (gpt2); backward computes the activation again.

In backward the gradients of gate and up take their memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch.nn import functional

from picotron.planner.model import Segment
from picotron.runtime.compiled import swiglu, swiglu_backward
from picotron.runtime.fused import Projections
from picotron.runtime.segment import Context, Saved, SegmentRunner, Tokens


class GatedMlp(SegmentRunner):
    """silu(gate) * up, then down (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, context: Context, segment: Segment) -> None:
        super().__init__(context, segment)
        self.gate_up = Projections(["gate_proj", "up_proj"], self.w, self.d)

    def forward(self, x: torch.Tensor, microbatch: Tokens) -> tuple[torch.Tensor, Saved]:
        """(y, saved)."""
        saved: Saved = {}
        gate, up = saved["gate"], saved["up"] = self.gate_up.outputs(partial(self._input_products, x, saved))
        product = swiglu(gate, up) if self.dims.compiled else functional.silu(gate).mul_(up)
        full = torch.mm(product, self.w["down_proj.weight"].t())
        del product
        y = self.context.reduce(full)
        del full
        if "down_proj.bias" in self.w:
            y.add_(self.w["down_proj.bias"])
        return y.add_(x), saved

    def backward(self, saved: Saved, dy: torch.Tensor) -> torch.Tensor:
        """The gradient of x."""
        gate, up = saved.pop("gate"), saved.pop("up")
        if self.dims.compiled:
            product = swiglu(gate, up)
        else:
            active = functional.silu(gate)
            product = active * up
        self._add_bias_gradient("down_proj.bias", dy)
        full = self.context.gather(dy)
        self._add_product(saved, "down_proj.weight", full, product)
        del product
        dproduct = torch.mm(full, self.w["down_proj.weight"])
        del full
        if self.dims.compiled:
            swiglu_backward(gate, up, dproduct)
        else:
            up.mul_(dproduct)  # the gradient of the activation, for a moment
            torch.ops.aten.silu_backward.grad_input(up, gate, grad_input=gate)
            torch.mul(active, dproduct, out=up)
            del active
        gradients = [gate, up]
        del dproduct, gate, up
        dnormed = self._input_backward(saved, gradients)
        return self._norm_backward(saved, dnormed).add_(dy)

    def _input_gradient(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        return self.gate_up.input_gradient(gradients)

    def _weight_gradients(
        self, saved: Saved, gradients: Sequence[torch.Tensor], source: torch.Tensor | None
    ) -> None:
        for name, gradient in zip(self.gate_up.names, gradients, strict=True):
            self._add_product(saved, f"{name}.weight", gradient, source)
        self.gate_up.add_bias_gradients(gradients)


class PlainMlp(SegmentRunner):
    """gelu(fc), then proj, in Conv1D orientation (gpt2)."""

    conv1d = True

    def forward(self, x: torch.Tensor, microbatch: Tokens) -> tuple[torch.Tensor, Saved]:
        """(y, saved)."""
        saved: Saved = {}
        weights, biases = [self.w["c_fc.weight"].t()], [self.w["c_fc.bias"]]
        [saved["fc"]] = self._input_products(x, saved, weights, biases)
        active = functional.gelu(saved["fc"], approximate="tanh")
        full = torch.mm(active, self.w["c_proj.weight"])
        del active
        y = self.context.reduce(full)
        del full
        return y.add_(self.w["c_proj.bias"]).add_(x), saved

    def backward(self, saved: Saved, dy: torch.Tensor) -> torch.Tensor:
        """The gradient of x."""
        fc = saved.pop("fc")
        active = functional.gelu(fc, approximate="tanh")
        self._add_bias_gradient("c_proj.bias", dy)
        full = self.context.gather(dy)
        self._add_product(saved, "c_proj.weight", full, active)
        del active
        dactive = torch.mm(full, self.w["c_proj.weight"].t())
        del full
        torch.ops.aten.gelu_backward.grad_input(dactive, fc, approximate="tanh", grad_input=fc)
        del dactive
        gradients = [fc]
        del fc
        dnormed = self._input_backward(saved, gradients)
        return self._norm_backward(saved, dnormed).add_(dy)

    def _input_gradient(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.mm(gradients[0], self.w["c_fc.weight"].t())

    def _weight_gradients(
        self, saved: Saved, gradients: Sequence[torch.Tensor], source: torch.Tensor | None
    ) -> None:
        self._add_product(saved, "c_fc.weight", gradients[0], source)
        self._add_bias_gradient("c_fc.bias", gradients[0])
