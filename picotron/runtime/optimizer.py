"""Learning rate, clipping and the optimizer's update, over flat ranges of memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from attrs import frozen

from picotron.planner.workload import Workload

CLIP_EPSILON = 1e-6  # as torch.nn.utils.clip_grad_norm_
ADAM_EPSILON = 1e-8
MOMENT_NAMES: Mapping[str, tuple[str, ...]] = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ()}


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


@frozen
class Verdict:
    """What becomes of a step, decided on its device and unknown to the host, which need not wait for it.

    Fused kernels divide gradients by ``scale``, fp32 to them, and do nothing at all where ``skip`` is 1.
    """

    scale: torch.Tensor
    skip: torch.Tensor


def verdict(statistics: torch.Tensor, max_norm: float) -> Verdict:
    """From squared gradient norm, loss and tokens of the world: how to clip, and whether to skip the step."""
    skip = torch.isfinite(statistics).all().logical_not().to(torch.float32)
    norm = statistics[0].sqrt()
    scale = (norm + CLIP_EPSILON).div(max_norm).clamp(min=1) if max_norm else torch.ones_like(norm)
    return Verdict(scale.to(torch.float32), skip)


def clip_coefficient(norm: float, max_norm: float) -> float:
    """What gradients of global ``norm`` are multiplied by; 1 where clipping is off."""
    return 1.0 if max_norm == 0 else min(1.0, max_norm / (norm + CLIP_EPSILON))


@frozen(kw_only=True)
class Range:
    """Neighbouring elements that one update treats alike: of weights, gradients and moments, by name."""

    weights: torch.Tensor
    gradients: torch.Tensor
    moments: Mapping[str, torch.Tensor]
    decays: bool


class Optimizer:
    """The workload's optimizer over flat ranges: AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) or SGD.

    Its arithmetic is torch's fused kernels', called once for all that decays and once for all that does not.
    One count of steps serves all ranges. Gradients narrower than the weights are copied to their width first.
    """

    def __init__(self, work: Workload, ranges: Sequence[Range], device: torch.device) -> None:
        self.work = work
        self.ranges = tuple(ranges)
        self.num_updates = (
            [torch.zeros((), dtype=torch.float32, device=device)] if MOMENT_NAMES[work.optimizer] else []
        )

    def tensors(self) -> list[torch.Tensor]:
        """The state it keeps."""
        return [*self.num_updates, *(moment for own in self.ranges for moment in own.moments.values())]

    def update(self, rate: float, decided: Verdict | None = None) -> None:
        """One step at a learning rate of ``rate``, clipped and skipped as was ``decided`` on the device."""
        for count in self.num_updates:
            count.add_(1)
            if decided is not None:
                count.sub_(decided.skip)
        scaling = {} if decided is None else {"grad_scale": decided.scale, "found_inf": decided.skip}
        gradients = {id(own): own.gradients.to(own.weights.dtype) for own in self.ranges}
        for decays in (True, False):
            chosen = [own for own in self.ranges if own.decays is decays and own.weights.numel()]
            if chosen:
                decay = self.work.weight_decay if decays else 0.0
                update = self._sgd if self.work.optimizer == "sgd" else self._adamw
                update(chosen, [gradients[id(own)] for own in chosen], rate, decay, scaling)

    def _adamw(
        self,
        chosen: Sequence[Range],
        gradients: list[torch.Tensor],
        rate: float,
        decay: float,
        scaling: Mapping[str, torch.Tensor],
    ) -> None:
        torch._fused_adamw_(
            [own.weights for own in chosen],
            gradients,
            [own.moments["exp_avg"] for own in chosen],
            [own.moments["exp_avg_sq"] for own in chosen],
            [],
            self.num_updates * len(chosen),
            lr=rate,
            beta1=self.work.beta1,
            beta2=self.work.beta2,
            weight_decay=decay,
            eps=ADAM_EPSILON,
            amsgrad=False,
            maximize=False,
            **scaling,
        )

    def _sgd(
        self,
        chosen: Sequence[Range],
        gradients: list[torch.Tensor],
        rate: float,
        decay: float,
        scaling: Mapping[str, torch.Tensor],
    ) -> None:
        torch._fused_sgd_(
            [own.weights for own in chosen],
            gradients,
            [],
            weight_decay=decay,
            momentum=0.0,
            lr=rate,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
            **scaling,
        )
