"""Gradient norm, clipping, learning rate and update, over the plan's buckets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from picotron.planner.layout import Placement, counts_in_norm
from picotron.planner.topology import Coordinate
from picotron.planner.workload import Workload

CLIP_EPSILON = 1e-6  # as torch.nn.utils.clip_grad_norm_


def learning_rate(work: Workload, step: int) -> float:
    """The rate of update ``step`` (from 0): linear warm-up, then a cosine down to the stated share."""
    if step < work.warmup_steps:
        return work.learning_rate * (step + 1) / work.warmup_steps
    if not work.decay_steps:
        return work.learning_rate
    span = max(1, work.decay_steps - work.warmup_steps)
    progress = min(1.0, (step - work.warmup_steps) / span)
    floor = work.min_learning_rate_ratio
    return work.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(
    work: Workload, weights: Mapping[str, torch.Tensor], gradients: Mapping[str, torch.Tensor]
) -> torch.optim.Optimizer:
    """The plan's optimizer over ``weights``; matrices alone decay.

    It reads ``gradients`` in place where they are of the weights' format; others are to be copied to it.
    """
    for name, weight in weights.items():
        if gradients[name].dtype == weight.dtype:
            weight.grad = gradients[name]
    groups = [
        {"params": [w for w in weights.values() if w.dim() > 1], "weight_decay": work.weight_decay},
        {"params": [w for w in weights.values() if w.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if work.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=work.learning_rate, fused=True)
    return torch.optim.AdamW(groups, lr=work.learning_rate, betas=(work.beta1, work.beta2), fused=True)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The state it keeps."""
    return [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]


def owned_square_norm(
    placements: Iterable[Placement], where: Coordinate, gradients: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Sum of squares (fp64) of the gradients that this rank counts for the world."""
    norms = [
        torch.linalg.vector_norm(gradients[p.name], dtype=torch.float64)
        for p in placements
        if counts_in_norm(p, where)
    ]
    if not norms:
        return torch.zeros((), dtype=torch.float64, device=next(iter(gradients.values())).device)
    return torch.stack(norms).square().sum()


def clip_coefficient(norm: float, max_norm: float) -> float:
    """What gradients of global ``norm`` are multiplied by; 1 where clipping is off."""
    return 1.0 if max_norm == 0 else min(1.0, max_norm / (norm + CLIP_EPSILON))
