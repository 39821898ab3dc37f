"""Any ``torch.nn.Module`` in the place of a segment that the plan calls foreign.

The module maps [batch, seq_len, hidden] to the same shape, norm and residual included, and has the parameters
of the segment it stands for: their values are the session's, whatever the module was made with. Its backward
is autograd's, inside the segment and on detached inputs. A split backward walks the graph twice, for the
gradient of the input and for those of the weights, and the plan prices both walks. What the graph saves is
autograd's choice, so the plan's live bytes hold for other segments alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch.func import functional_call

from picotron.errors import PlanError
from picotron.planner.actions import I
from picotron.planner.model import Segment
from picotron.planner.plan import TrainingPlan
from picotron.planner.stage import segment_name
from picotron.runtime.segments import Context, Saved, SegmentRunner, Tokens

Modules = Mapping[str, torch.nn.Module]  # by name of the segment that each stands for: "mlp 0"


class ForeignSegment(SegmentRunner):
    """A segment that ``module`` computes."""

    def __init__(self, context: Context, segment: Segment, module: torch.nn.Module) -> None:
        super().__init__(context, segment)
        self._module = module
        self._short = {name: short_name(name) for name, _ in module.named_parameters()}

    def forward(self, x: torch.Tensor, microbatch: Tokens) -> tuple[torch.Tensor, Saved]:
        """(y, the graph)."""
        leaf = x.detach().view(self.dims.batch, self.dims.seq_len, -1).requires_grad_()
        weights = {name: self.w[short].detach().requires_grad_() for name, short in self._short.items()}
        with torch.enable_grad():
            y: torch.Tensor = functional_call(self._module, weights, (leaf,))
        return y.detach().reshape(x.shape), {"y": y, "leaf": leaf, "weights": weights}

    def backward(self, saved: Saved, dy: torch.Tensor) -> torch.Tensor:
        """The gradient of x, and those of the weights, in one walk of the graph."""
        leaf, weights = saved["leaf"], saved["weights"]
        dx, *found = _gradients(saved["y"], [leaf, *weights.values()], dy, keep=False)
        self._accumulate(weights, found)
        return _as_input(dx, dy)

    def backward_input(self, saved: Saved, dy: torch.Tensor) -> torch.Tensor:
        """The gradient of x; the graph stays."""
        saved["dy"] = dy
        (dx,) = _gradients(saved["y"], [saved["leaf"]], dy, keep=True)
        return _as_input(dx, dy)

    def backward_weight(self, saved: Saved) -> None:
        """The gradients of the weights, in a second walk."""
        weights = saved["weights"]
        self._accumulate(weights, _gradients(saved["y"], [*weights.values()], saved["dy"], keep=False))

    def _accumulate(self, names: Iterable[str], gradients: Iterable[torch.Tensor | None]) -> None:
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                self.d[self._short[name]].add_(gradient)


def _gradients(
    y: torch.Tensor, inputs: Sequence[torch.Tensor], dy: torch.Tensor, *, keep: bool
) -> Sequence[torch.Tensor | None]:
    """Gradients of ``inputs``; None for one that y does not depend on. ``keep`` the graph for more."""
    return torch.autograd.grad(y, inputs, dy.view_as(y), retain_graph=keep, allow_unused=True)


def _as_input(dx: torch.Tensor | None, dy: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(dy) if dx is None else dx.reshape(dy.shape)


def short_name(name: str) -> str:
    """The last two words of a parameter's name, by which a segment knows it."""
    return ".".join(name.split(".")[-2:])


def check_modules(plan: TrainingPlan, modules: Modules) -> None:
    """Raise PlanError unless ``modules`` are those that the plan names and each can be its segment."""
    if set(modules) != set(plan.foreign):
        given, planned = (", ".join(sorted(names)) or "none" for names in (modules, plan.foreign))
        raise PlanError(
            f"modules must be those of the plan's foreign segments: {planned}, got {given}; pass these, or "
            "plan with foreign naming those"
        )
    segments = {segment_name(one): one for stage in plan.stage_segments for one in stage}
    for name, module in modules.items():
        if _is_compiled(module) and bool((plan.schedule.orders.phase == I).any()):
            raise PlanError(
                f"{plan.schedule.name} splits backwards in two, and the compiled module for {name} has one "
                "for all gradients together; pass the module uncompiled or plan whole backwards"
            )
        _check_parameters(name, segments[name], module)


def _is_compiled(module: torch.nn.Module) -> bool:
    """Whether ``torch.compile`` has been here, by function or in place."""
    return any(hasattr(one, "_orig_mod") or one._compiled_call_impl is not None for one in module.modules())


def _check_parameters(name: str, segment: Segment, module: torch.nn.Module) -> None:
    wanted = {short_name(parameter.name): tuple(parameter.shape) for parameter in segment.parameters}
    given = {short_name(own): tuple(parameter.shape) for own, parameter in module.named_parameters()}
    if wanted != given:
        raise PlanError(f"the module for {name} must have the parameters {wanted}, got {given}")
