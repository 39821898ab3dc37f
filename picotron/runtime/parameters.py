"""A rank's parameters, their gradients in the plan's buckets, and the optimizer that moves them."""

from __future__ import annotations

import math

import torch

from picotron.planner.body import Category
from picotron.planner.layout import local_shape
from picotron.planner.plan import TrainingPlan
from picotron.planner.topology import Coordinate
from picotron.runtime.layout import DTYPES, WIDTHS, WeightSource, slice_of
from picotron.runtime.optimizer import (
    clip_coefficient,
    learning_rate,
    make_optimizer,
    optimizer_tensors,
    owned_square_norm,
)


class Parameters:
    """What one rank holds of the model's parameters.

    ``weights`` and ``gradients`` are by name; gradients are views of ``buckets``, one flat buffer for each
    (stage, index) of the plan's buckets. ``main`` are the weights that the optimizer moves: the weights
    themselves or, where the plan computes in 16 bits, fp32 ones that the weights are rounded from.
    """

    def __init__(
        self, plan: TrainingPlan, where: Coordinate, device: torch.device, source: WeightSource
    ) -> None:
        self.plan, self.where = plan, where
        self.placements = plan.held(where)
        self.dtype, form = DTYPES[plan.workload.precision], plan.format
        self.gradient_dtype, self.reduce_dtype = WIDTHS[form.gradient], WIDTHS[form.reduce]
        self.weights = self.main = self._views(device, WIDTHS.get(form.main, self.dtype))
        for placement in self.placements:
            self.main[placement.name].copy_(slice_of(source(placement), placement, where))
        if form.main:
            self.weights = self._views(device, self.dtype)
            torch._foreach_copy_(list(self.weights.values()), list(self.main.values()))
        self.buckets: dict[tuple[int, int], torch.Tensor] = {}
        self.gradients: dict[str, torch.Tensor] = {}
        self._open_buckets(device)
        self.optimizer = make_optimizer(plan.workload, self.main, self.gradients)

    def _views(self, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Views of one flat buffer, in plan order, so that projections of one input are one weight."""
        shapes = {p.name: local_shape(p, self.where) for p in self.placements}
        flat = torch.empty(sum(map(math.prod, shapes.values())), dtype=dtype, device=device)
        parts = torch.split(flat, [*map(math.prod, shapes.values())])
        return {name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}

    def _open_buckets(self, device: torch.device) -> None:
        """One flat gradient buffer a bucket, and each parameter's view of its own."""
        stages = self.plan.rank_stages(self.where.pp)
        for bucket in (bucket for stage in stages for bucket in self.plan.stage_buckets[stage]):
            sizes = [self.weights[name].numel() for name in bucket.names]
            buffer = torch.zeros(sum(sizes), dtype=self.gradient_dtype, device=device)
            for name, part in zip(bucket.names, torch.split(buffer, sizes), strict=True):
                self.gradients[name] = part.view(self.weights[name].shape)
            self.buckets[bucket.stage, bucket.index] = buffer

    def standing(self) -> dict[Category, list[torch.Tensor]]:
        """What lives between steps, by the plan's categories."""
        main = [] if self._is_main() else list(self.main.values())
        return {
            "parameters": list(self.weights.values()),
            "gradients": list(self.buckets.values()),
            "optimizer": [*main, *optimizer_tensors(self.optimizer)],
        }

    def _is_main(self) -> bool:
        """Whether the weights are their own main ones."""
        return not self.plan.format.main

    def zero_gradients(self) -> None:
        """Forget the gradients of the step before."""
        for bucket in self.buckets.values():
            bucket.zero_()

    def square_norm(self) -> torch.Tensor:
        """Sum of squares (fp64) of the gradients that this rank counts for the world."""
        return owned_square_norm(self.placements, self.where, self.gradients)

    def update(self, step: int, norm: float) -> None:
        """The optimizer's step ``step``, after clipping gradients whose norm over the world is ``norm``."""
        work = self.plan.workload
        coefficient = clip_coefficient(norm, work.max_grad_norm)
        if coefficient < 1.0:
            for bucket in self.buckets.values():
                bucket.mul_(coefficient)
        rate = learning_rate(work, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        copied = [name for name, main in self.main.items() if main.dtype != self.gradient_dtype]
        for name in copied:
            self.main[name].grad = self.gradients[name].to(self.main[name].dtype)
        self.optimizer.step()
        for name in copied:
            self.main[name].grad = None
        if not self._is_main():
            torch._foreach_copy_(list(self.weights.values()), list(self.main.values()))
