"""Attention segments: projections apart in the checkpoint (llama, qwen2, qwen3) or fused there (gpt2).

What one product has made, queries, keys and values side by side in one tensor, the kernel reads in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from picotron.planner.model import Segment
from picotron.runtime.fused import Projections
from picotron.runtime.kernels import AttentionCore, rotate
from picotron.runtime.segment import Context, Saved, SegmentRunner, Tokens


class AttentionSegment(SegmentRunner):
    """What both kinds have in common: heads as views, and the attention core."""

    def __init__(self, context: Context, segment: Segment) -> None:
        super().__init__(context, segment)
        d = context.dims
        self.heads = {"q": d.heads, "k": d.kv_heads, "v": d.kv_heads}
        self.widths = [count * d.head_dim for count in self.heads.values()]

    def by_head(self, qkv: torch.Tensor) -> dict[str, torch.Tensor]:
        """Queries, keys and values [batch, s, heads, head_dim], views of ``qkv`` [T, their columns]."""
        parts = zip(self.heads.items(), torch.split(qkv, self.widths, dim=1), strict=True)
        return {name: self._by_head(part, count) for (name, count), part in parts}

    def _by_head(self, part: torch.Tensor, count: int) -> torch.Tensor:
        d = self.dims
        return part.view(d.batch, d.seq_len, count, d.head_dim)


class SplitAttention(AttentionSegment):
    """Grouped-query attention with separate projections (llama, qwen2, qwen3)."""

    def __init__(self, context: Context, segment: Segment) -> None:
        super().__init__(context, segment)
        self.qkv = Projections(["q_proj", "k_proj", "v_proj"], self.w, self.d)
        self.head_norms = {
            name: self._rms_norm(f"{name}_norm.weight")
            for name in ("q", "k")
            if f"{name}_norm.weight" in self.w
        }

    def forward(self, x: torch.Tensor, microbatch: Tokens) -> tuple[torch.Tensor, Saved]:
        """(y, saved)."""
        saved: Saved = {}
        outputs = dict(zip("qkv", self.qkv.outputs(partial(self._input_products, x, saved)), strict=True))
        parts = {name: self._by_head(outputs.pop(name), count) for name, count in self.heads.items()}
        for name, norm in self.head_norms.items():
            raw = parts[name]
            parts[name], statistics = norm.forward(raw)
            saved[f"{name}_raw"] = raw, statistics
            del raw, statistics
        if self.context.rotary is not None:
            for name in ("q", "k"):
                rotate(parts[name], *self.context.rotary)
        attention = saved["attention"] = self.context.attend(parts)
        del parts
        y = self.context.reduce(torch.mm(attention.context(), self.w["o_proj.weight"].t()))
        if "o_proj.bias" in self.w:
            y.add_(self.w["o_proj.bias"])
        return y.add_(x), saved

    def backward(self, saved: Saved, dy: torch.Tensor) -> torch.Tensor:
        """The gradient of x."""
        attention: AttentionCore = saved.pop("attention")
        self._add_bias_gradient("o_proj.bias", dy)
        full = self.context.gather(dy)
        self._add_product(saved, "o_proj.weight", full, attention.context())
        dcontext = torch.mm(full, self.w["o_proj.weight"])
        del full
        gradients = attention.backward(dcontext)
        del attention, dcontext
        self._before_core(saved, gradients)
        dnormed = self._input_backward(saved, gradients)
        return self._norm_backward(saved, dnormed).add_(dy)

    def _input_gradient(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        return self.qkv.input_gradient(gradients)

    def _weight_gradients(
        self, saved: Saved, gradients: Sequence[torch.Tensor], source: torch.Tensor | None
    ) -> None:
        for name, gradient in zip(self.qkv.names, gradients, strict=True):
            self._add_product(saved, f"{name}.weight", gradient, source)
        self.qkv.add_bias_gradients(gradients)

    def _before_core(self, saved: Saved, gradients: list[torch.Tensor]) -> None:
        """Make ``gradients`` of what the kernel read those of what the projections gave."""
        for place, name in enumerate("qk"):
            gradient = self._by_head(gradients[place], self.heads[name])
            if self.context.rotary is not None:
                rotate(gradient, *self.context.rotary, backwards=True)
            if name in self.head_norms:
                before = self.head_norms[name].backward(gradient, *saved.pop(f"{name}_raw"))
                gradients[place] = before.view_as(gradients[place])


class FusedAttention(AttentionSegment):
    """Attention with one fused projection in Conv1D orientation [in, out] (gpt2)."""

    conv1d = True

    def forward(self, x: torch.Tensor, microbatch: Tokens) -> tuple[torch.Tensor, Saved]:
        """(y, saved)."""
        saved: Saved = {}
        [qkv] = self._input_products(x, saved, [self.w["c_attn.weight"].t()], [self.w["c_attn.bias"]])
        parts = self.by_head(qkv)
        del qkv
        attention = saved["attention"] = self.context.attend(parts)
        del parts
        y = self.context.reduce(torch.mm(attention.context(), self.w["c_proj.weight"]))
        return y.add_(self.w["c_proj.bias"]).add_(x), saved

    def backward(self, saved: Saved, dy: torch.Tensor) -> torch.Tensor:
        """The gradient of x."""
        attention: AttentionCore = saved.pop("attention")
        self._add_bias_gradient("c_proj.bias", dy)
        full = self.context.gather(dy)
        self._add_product(saved, "c_proj.weight", full, attention.context())
        dcontext = torch.mm(full, self.w["c_proj.weight"].t())
        del full
        gradients = attention.backward(dcontext)
        del attention, dcontext
        gradients = [torch.cat(gradients, dim=1)]
        dnormed = self._input_backward(saved, gradients)
        return self._norm_backward(saved, dnormed).add_(dy)

    def _input_gradient(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.mm(gradients[0], self.w["c_attn.weight"].t())

    def _weight_gradients(
        self, saved: Saved, gradients: Sequence[torch.Tensor], source: torch.Tensor | None
    ) -> None:
        self._add_product(saved, "c_attn.weight", gradients[0], source)
        self._add_bias_gradient("c_attn.bias", gradients[0])
