"""The decoder's segments: each knows its forward, and its backward from what forward saved.

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
from typing import Any, Protocol

import torch
from attrs import define
from torch.nn import functional

from picotron.planner.body import Dims
from picotron.planner.layout import even_ranges
from picotron.planner.model import ModelSpec, Segment
from picotron.runtime.communicator import Communicator
from picotron.runtime.kernels import (
    Attention,
    LayerNorm,
    Norm,
    RmsNorm,
    add_product,
    rotate,
    statistics_dtype,
    vocabulary_slice,
)

Saved = dict[str, Any]
Product = tuple[str, torch.Tensor, torch.Tensor | None]  # weight, gradient of the output, input or NORMED
NORMED = None  # the norm of the segment's x, computed again when it is multiplied


class Tokens(Protocol):
    """One microbatch's token ids and labels, each flattened to [T]; -100 labels a token without loss."""

    def token_ids(self) -> torch.Tensor:
        """Fresh on the device."""

    def labels(self) -> torch.Tensor:
        """Fresh on the device."""


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

    def _make_norm(self, names: list[str]) -> Norm:
        eps = self.context.model.norm_eps
        if len(names) == 1:
            return RmsNorm(self.w[names[0]], self.d[names[0]], eps)
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
        assert self.norm is not None
        normed, statistics = self.norm.forward(x)
        saved.update(x=x, statistics=statistics)
        return self.context.gather(normed)

    def _normed_again(self, saved: Saved, *, last: bool = False) -> torch.Tensor:
        """The gathered norm of x once more; ``last``: nobody needs x and its statistics after that."""
        assert self.norm is not None
        take = saved.pop if last else saved.__getitem__
        return self.context.gather(self.norm.again(take("x"), take("statistics")))

    def _norm_backward(self, saved: Saved, dnormed: torch.Tensor) -> torch.Tensor:
        """From the local gradient of the normed x to that of x."""
        assert self.norm is not None
        return self.norm.backward(dnormed, saved["x"], saved["statistics"])

    def _add_bias_gradient(self, name: str, gradient: torch.Tensor) -> None:
        if name in self.d:
            self.d[name].add_(gradient.sum(0, dtype=statistics_dtype(gradient.dtype)))


class Embedding(SegmentRunner):
    """Token table, cut over the vocabulary, and learned positions where the model has them."""

    def __init__(self, context: Context, segment: Segment) -> None:
        super().__init__(context, segment)
        self.table = next(short for short in self.w if short in ("embed_tokens.weight", "wte.weight"))

    def forward(self, x: torch.Tensor, microbatch: Tokens) -> tuple[torch.Tensor, Saved]:
        """(y, saved); x is not looked at."""
        ids = microbatch.token_ids()
        context = self.context
        if self.dims.tp == 1:
            full = functional.embedding(ids, self.w[self.table])
        else:
            local, outside = vocabulary_slice(ids, *context.vocabulary)
            full = functional.embedding(local, self.w[self.table])
            full.masked_fill_(outside.unsqueeze(1), 0)
            del local, outside
        y = context.reduce(full)
        del full
        if context.positions is not None:
            y.add_(functional.embedding(context.positions, self.w["wpe.weight"]))
        return y, {"ids": ids}

    def backward(self, saved: Saved, dy: torch.Tensor) -> torch.Tensor:
        """An empty tensor: nothing lies before the embedding."""
        dx = self.backward_input(saved, dy)
        self.backward_weight(saved)
        return dx

    def backward_input(self, saved: Saved, dy: torch.Tensor) -> torch.Tensor:
        """An empty tensor; all there is to do is for the tables."""
        saved["dy"] = dy
        return dy.new_empty(0)

    def backward_weight(self, saved: Saved) -> None:
        """Add each token's gradient to its row of the table, and to its position's."""
        context, ids, dy = self.context, saved.pop("ids"), saved.pop("dy")
        if context.positions is not None:
            wpe = self.d["wpe.weight"]
            wpe.index_add_(0, context.positions, dy.to(wpe.dtype))
        full, table = context.gather(dy), self.d[self.table]
        if self.dims.tp > 1:
            local, outside = vocabulary_slice(ids, *context.vocabulary)
            full.masked_fill_(outside.unsqueeze(1), 0)
            table.index_add_(0, local, full.to(table.dtype))
        else:
            table.index_add_(0, ids, full.to(table.dtype))


class SplitAttention(SegmentRunner):
    """Grouped-query attention with separate projections (llama, qwen2, qwen3)."""

    def __init__(self, context: Context, segment: Segment) -> None:
        super().__init__(context, segment)
        d, eps = context.dims, context.model.norm_eps
        self.heads = {"q": d.heads, "k": d.kv_heads, "v": d.kv_heads}
        self.head_norms = {
            name: RmsNorm(self.w[f"{name}_norm.weight"], self.d[f"{name}_norm.weight"], eps)
            for name in ("q", "k")
            if f"{name}_norm.weight" in self.w
        }

    def _by_head(self, name: str, part: torch.Tensor) -> torch.Tensor:
        return part.view(self.dims.batch, self.dims.seq_len, self.heads[name], self.dims.head_dim)

    def forward(self, x: torch.Tensor, microbatch: Tokens) -> tuple[torch.Tensor, Saved]:
        """(y, saved)."""
        saved: Saved = {}
        source = self._normed(x, saved)
        parts = {
            name: self._by_head(
                name,
                functional.linear(source, self.w[f"{name}_proj.weight"], self.w.get(f"{name}_proj.bias")),
            )
            for name in ("q", "k", "v")
        }
        del source
        for name, norm in self.head_norms.items():
            raw = parts[name]
            parts[name], statistics = norm.forward(raw)
            saved[f"{name}_raw"] = raw, statistics
        for name in ("q", "k"):
            if self.context.rotary is not None:
                rotate(parts[name], *self.context.rotary)
        attention = Attention(parts["q"], parts["k"], parts["v"])
        saved["attention"] = attention
        y = self.context.reduce(torch.mm(attention.context(), self.w["o_proj.weight"].t()))
        if "o_proj.bias" in self.w:
            y.add_(self.w["o_proj.bias"])
        return y.add_(x), saved

    def backward(self, saved: Saved, dy: torch.Tensor) -> torch.Tensor:
        """The gradient of x."""
        attention: Attention = saved.pop("attention")
        self._add_bias_gradient("o_proj.bias", dy)
        full = self.context.gather(dy)
        self._add_product(saved, "o_proj.weight", full, attention.context())
        dcontext = torch.mm(full, self.w["o_proj.weight"])
        del full
        dq, dk, dv = attention.backward(dcontext)
        del attention, dcontext
        for name, gradient in (("q", dq), ("k", dk)):
            if self.context.rotary is not None:
                rotate(self._by_head(name, gradient), *self.context.rotary, backwards=True)
        for name, gradient in (("q", dq), ("k", dk)):
            if name in self.head_norms:
                raw, statistics = saved.pop(f"{name}_raw")
                self.head_norms[name].backward(self._by_head(name, gradient), raw, statistics)
                del raw, statistics
        source = self._source(saved)
        for name, gradient in (("q", dq), ("k", dk), ("v", dv)):
            self._add_product(saved, f"{name}_proj.weight", gradient, source)
            self._add_bias_gradient(f"{name}_proj.bias", gradient)
        del source, gradient
        dnormed = torch.mm(dq, self.w["q_proj.weight"])
        dnormed.addmm_(dk, self.w["k_proj.weight"])
        dnormed.addmm_(dv, self.w["v_proj.weight"])
        del dq, dk, dv
        dnormed = self.context.reduce(dnormed)
        return self._norm_backward(saved, dnormed).add_(dy)


class FusedAttention(SegmentRunner):
    """Attention with one fused projection in Conv1D orientation [in, out] (gpt2)."""

    conv1d = True

    def forward(self, x: torch.Tensor, microbatch: Tokens) -> tuple[torch.Tensor, Saved]:
        """(y, saved)."""
        saved: Saved = {}
        d = self.dims
        source = self._normed(x, saved)
        fused = torch.addmm(self.w["c_attn.bias"], source, self.w["c_attn.weight"])
        del source
        q, k, v = (part.view(d.batch, d.seq_len, d.heads, d.head_dim) for part in fused.chunk(3, dim=1))
        attention = Attention(q, k, v)
        saved["attention"] = attention
        del fused, q, k, v
        y = self.context.reduce(torch.mm(attention.context(), self.w["c_proj.weight"]))
        return y.add_(self.w["c_proj.bias"]).add_(x), saved

    def backward(self, saved: Saved, dy: torch.Tensor) -> torch.Tensor:
        """The gradient of x."""
        attention: Attention = saved.pop("attention")
        self._add_bias_gradient("c_proj.bias", dy)
        full = self.context.gather(dy)
        self._add_product(saved, "c_proj.weight", full, attention.context())
        dcontext = torch.mm(full, self.w["c_proj.weight"].t())
        del full
        parts = attention.backward(dcontext)
        del attention, dcontext
        saved["gradient"] = torch.cat(parts, dim=1)
        del parts
        return _fused_input_backward(self, "c_attn", saved, dy)


def _fused_input_backward(segment: SegmentRunner, name: str, saved: Saved, dy: torch.Tensor) -> torch.Tensor:
    """Backward of the residual and of ``norm(x) @ weight + bias``, whose gradient is in ``saved``."""
    gradient = saved.pop("gradient")
    segment._add_product(saved, f"{name}.weight", gradient, segment._source(saved))
    segment._add_bias_gradient(f"{name}.bias", gradient)
    dnormed = torch.mm(gradient, segment.w[f"{name}.weight"].t())
    del gradient
    dnormed = segment.context.reduce(dnormed)
    dx = segment._norm_backward(saved, dnormed)
    del dnormed
    return dx.add_(dy)


class GatedMlp(SegmentRunner):
    """silu(gate) * up, then down (Shazeer 2020, arXiv:2002.05202)."""

    def forward(self, x: torch.Tensor, microbatch: Tokens) -> tuple[torch.Tensor, Saved]:
        """(y, saved)."""
        saved: Saved = {}
        source = self._normed(x, saved)
        gate = functional.linear(source, self.w["gate_proj.weight"], self.w.get("gate_proj.bias"))
        up = functional.linear(source, self.w["up_proj.weight"], self.w.get("up_proj.bias"))
        del source
        saved.update(gate=gate, up=up)
        product = functional.silu(gate).mul_(up)
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
        active = functional.silu(gate)
        product = active * up
        self._add_bias_gradient("down_proj.bias", dy)
        full = self.context.gather(dy)
        self._add_product(saved, "down_proj.weight", full, product)
        del product
        dproduct = torch.mm(full, self.w["down_proj.weight"])
        del full
        dup = active.mul_(dproduct)
        dproduct.mul_(up)
        del up, active
        dgate = torch.ops.aten.silu_backward(dproduct, gate)
        del dproduct, gate
        source = self._source(saved)
        for name, gradient in (("gate_proj", dgate), ("up_proj", dup)):
            self._add_product(saved, f"{name}.weight", gradient, source)
            self._add_bias_gradient(f"{name}.bias", gradient)
        del source, gradient
        dnormed = torch.mm(dgate, self.w["gate_proj.weight"])
        dnormed.addmm_(dup, self.w["up_proj.weight"])
        del dgate, dup
        dnormed = self.context.reduce(dnormed)
        return self._norm_backward(saved, dnormed).add_(dy)


class PlainMlp(SegmentRunner):
    """gelu(fc), then proj, in Conv1D orientation (gpt2)."""

    conv1d = True

    def forward(self, x: torch.Tensor, microbatch: Tokens) -> tuple[torch.Tensor, Saved]:
        """(y, saved)."""
        saved: Saved = {}
        source = self._normed(x, saved)
        fc = torch.addmm(self.w["c_fc.bias"], source, self.w["c_fc.weight"])
        del source
        saved["fc"] = fc
        active = functional.gelu(fc, approximate="tanh")
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
        saved["gradient"] = torch.ops.aten.gelu_backward(dactive, fc, approximate="tanh")
        del dactive, fc
        return _fused_input_backward(self, "c_fc", saved, dy)


class Head(SegmentRunner):
    """Final norm, vocabulary-parallel logits and the loss summed over valid tokens.

    Forward leaves in the logits' memory the gradient of (loss sum / valid tokens of the step).
    """

    def __init__(self, context: Context, segment: Segment) -> None:
        super().__init__(context, segment)
        name = next(
            n
            for n in ("lm_head.weight", "model.embed_tokens.weight", "transformer.wte.weight")
            if n in context.weights
        )
        self.weight = context.weights[name]
        self.d["table"] = context.gradients[name]  # it may be the embedding's

    def logits(self, x: torch.Tensor, saved: Saved) -> torch.Tensor:
        """The rank's slice of the logits, [T, vocabulary / tp]."""
        source = self._normed(x, saved)
        return torch.mm(source, self.weight.t())

    def forward(self, x: torch.Tensor, microbatch: Tokens) -> tuple[torch.Tensor, Saved]:
        """(an empty tensor, saved); the loss is added to the context's statistics."""
        saved: Saved = {}
        labels = microbatch.labels()
        logits = self.logits(x, saved)
        work = logits.to(statistics_dtype(logits.dtype))
        del logits
        self._logit_gradient(work, labels)
        saved["logits"] = work.to(x.dtype)
        return x.new_empty(0), saved

    def _logit_gradient(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Cross-entropy over the cut vocabulary, in place (Shoeybi et al. 2019, section 3)."""
        context, tp = self.context, self.dims.tp
        top = logits.amax(dim=-1, keepdim=True)
        if tp > 1:
            context.communicator.all_reduce(top, "tp", "max")
        logits.sub_(top)
        del top
        outside = None
        if tp > 1:
            local, outside = vocabulary_slice(labels, *context.vocabulary)
        else:
            local = labels.clamp(min=0)
        target = logits.gather(1, local.unsqueeze(1)).squeeze(1)
        if outside is not None:
            target.masked_fill_(outside, 0)
        total = logits.exp_().sum(dim=-1)
        if tp > 1:
            stacked = torch.stack((target, total))
            del target, total
            context.communicator.all_reduce(stacked, "tp")
            target, total = stacked.unbind()
            del stacked
        valid = labels.ge(0)
        loss = total.log().sub_(target).mul_(valid)
        context.statistics[1].add_(loss.sum(dtype=torch.float64))
        del loss
        logits.div_(total.unsqueeze(1))
        minus = torch.full_like(target, -1) if outside is None else outside.to(logits.dtype).sub_(1)
        logits.scatter_add_(1, local.unsqueeze(1), minus.unsqueeze(1))
        del minus, target, total, local, outside
        weight = valid.to(logits.dtype).div_(context.statistics[2])
        logits.mul_(weight.unsqueeze(1))

    def backward(self, saved: Saved, dy: torch.Tensor) -> torch.Tensor:
        """The gradient of x; dy is not looked at."""
        logits = saved.pop("logits")
        self._add_product(saved, "table", logits, self._source(saved))
        dnormed = torch.mm(logits, self.weight)
        del logits
        dnormed = self.context.reduce(dnormed)
        return self._norm_backward(saved, dnormed)


def make_runner(context: Context, segment: Segment) -> SegmentRunner:
    """The segment that runs ``segment`` of the plan."""
    roles = {parameter.role for parameter in segment.parameters}
    if segment.kind == "attention":
        return (FusedAttention if "fused_qkv" in roles else SplitAttention)(context, segment)
    if segment.kind == "mlp":
        return (GatedMlp if context.model.gated_mlp else PlainMlp)(context, segment)
    return {"embedding": Embedding, "head": Head}[segment.kind](context, segment)
