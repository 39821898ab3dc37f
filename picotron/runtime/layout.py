"""Slices of parameters: cutting whole tensors, putting them together again, and first values."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from picotron.errors import ExecutionError
from picotron.planner.layout import Placement, cut_ranges
from picotron.planner.plan import TrainingPlan
from picotron.planner.topology import Coordinate, coordinate

WeightSource = Callable[[Placement], torch.Tensor]  # the whole tensor of a placement

DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}
WIDTHS = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}  # by bytes, of gradients and main weights


def slice_of(whole: torch.Tensor, placement: Placement, where: Coordinate) -> torch.Tensor:
    """The part of ``whole`` that lives at ``where``, contiguous and with memory of its own."""
    cut = placement.cut
    if cut is None:
        return whole.clone()
    ranges = cut_ranges(cut, placement.shape[cut.dim], getattr(where, cut.axis))
    parts = [whole.narrow(cut.dim, start, stop - start) for start, stop in ranges]
    return torch.cat(parts, dim=cut.dim).contiguous()


def place_slice(whole: torch.Tensor, part: torch.Tensor, placement: Placement, where: Coordinate) -> None:
    """Write ``part``, which lives at ``where``, into its place in ``whole``: undoes ``slice_of``."""
    cut = placement.cut
    if cut is None:
        whole.copy_(part)
        return
    at = 0
    for start, stop in cut_ranges(cut, placement.shape[cut.dim], getattr(where, cut.axis)):
        whole.narrow(cut.dim, start, stop - start).copy_(part.narrow(cut.dim, at, stop - start))
        at += stop - start


def initial_weights(plan: TrainingPlan) -> WeightSource:
    """First values that depend on the seed and the parameter's name only, never on the topology."""
    std = plan.model.init_std

    def draw(placement: Placement) -> torch.Tensor:
        if placement.init == "ones":
            return torch.ones(placement.shape)
        if placement.init == "zeros":
            return torch.zeros(placement.shape)
        name = placement.tied_to or placement.name
        digest = hashlib.sha256(f"{plan.workload.seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.empty(placement.shape).normal_(0.0, std, generator=generator)

    return draw


def given_weights(tensors: Mapping[str, torch.Tensor]) -> WeightSource:
    """Values from a mapping of Hugging Face names to whole tensors."""

    def look_up(placement: Placement) -> torch.Tensor:
        name = placement.tied_to or placement.name
        if name not in tensors:
            raise ExecutionError(f"the weights must hold {name}, got {len(tensors)} other tensors")
        if tuple(tensors[name].shape) != placement.shape:
            raise ExecutionError(
                f"{name} must have shape {placement.shape}, got {tuple(tensors[name].shape)}"
            )
        return tensors[name]

    return look_up


def assemble(plan: TrainingPlan, parts: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Whole tensors by name from every rank's slices; a tied copy is left out."""
    whole: dict[str, torch.Tensor] = {}
    for rank, own in enumerate(parts):
        where = coordinate(plan.topology, rank)
        for placement in _untied(plan.held(where)):
            if placement.name not in whole:
                whole[placement.name] = own[placement.name].new_empty(placement.shape)
            place_slice(whole[placement.name], own[placement.name], placement, where)
    return whole


def _untied(placements: Iterable[Placement]) -> Iterable[Placement]:
    return (placement for placement in placements if placement.tied_to is None)
