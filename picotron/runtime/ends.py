"""The model's ends: embedding, and head with the loss over a vocabulary that tensor parallelism cuts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from picotron.planner.layout import even_ranges
from picotron.planner.model import Segment
from picotron.runtime.compiled import logit_gradient
from picotron.runtime.kernels import statistics_dtype, vocabulary_slice
from picotron.runtime.segment import Context, Saved, SegmentRunner, Tokens


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


class Head(SegmentRunner):
    """Final norm, vocabulary-parallel logits and the loss summed over valid tokens.

    Forward leaves in the logits' memory the gradient of (loss sum / valid tokens of the step); in chunks of
    tokens, that of the normed input, and has added the table's.
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
        if self.dims.loss_chunks > 1:
            saved["dnormed"] = self.context.reduce(self._in_chunks(self._normed(x, saved), labels))
        else:
            logits = self.logits(x, saved)
            wide = self._wide(logits)
            del logits
            self._logit_gradient(wide, labels)
            saved["logits"] = wide.to(x.dtype)
        return x.new_empty(0), saved

    def _in_chunks(self, source: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The gradient of ``source``, the normed input; that of the table is added to."""
        dnormed = torch.empty_like(source)
        for first, stop in even_ranges(self.dims.tokens, self.dims.loss_chunks):
            logits = torch.mm(source[first:stop], self.weight.t())
            wide = self._wide(logits)
            del logits
            self._logit_gradient(wide, labels[first:stop])
            logits = wide.to(source.dtype)
            del wide
            self._multiply("table", logits, source[first:stop])
            torch.mm(logits, self.weight, out=dnormed[first:stop])
            del logits
        return dnormed

    @property
    def _compiled(self) -> bool:
        """Whether one kernel makes the loss; it reads and writes logits in their own format."""
        return self.dims.compiled and self.dims.tp == 1

    def _wide(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits in the format in which the loss is computed, step by step."""
        return logits if self._compiled else logits.to(statistics_dtype(logits.dtype))

    def _logit_gradient(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Cross-entropy over the cut vocabulary, in place (Shoeybi et al. 2019, section 3)."""
        context, tp = self.context, self.dims.tp
        if self._compiled:
            logit_gradient(logits, context.statistics, labels)
            return
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
        if "dnormed" in saved:
            return self._norm_backward(saved, saved.pop("dnormed"), last=True)
        return self._norm_backward(saved, self._input_backward(saved, [saved.pop("logits")]))

    def _input_gradient(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.mm(gradients[0], self.weight)

    def _weight_gradients(
        self, saved: Saved, gradients: Sequence[torch.Tensor], source: torch.Tensor | None
    ) -> None:
        self._add_product(saved, "table", gradients[0], source)
