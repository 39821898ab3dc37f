"""What a simulated collective does with its members' tensors, all at once and in group order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch


def _all_reduce(parts: list[tuple[torch.Tensor, str]]) -> None:
    total, op = parts[0]
    _accumulate(total, [tensor for tensor, _ in parts[1:]], op)
    for tensor, _ in parts[1:]:
        tensor.copy_(total)


def _reduce_scatter(parts: list[tuple[torch.Tensor, torch.Tensor, str]]) -> None:
    total, op = parts[0][1].clone(), parts[0][2]
    _accumulate(total, [tensor for _, tensor, _ in parts[1:]], op)
    for (output, _, _), piece in zip(parts, total.chunk(len(parts)), strict=True):
        output.copy_(piece)


def _accumulate(total: torch.Tensor, others: list[torch.Tensor], op: str) -> None:
    """Reduce ``others``, in their order, into ``total``."""
    for other in others:
        if op == "max":
            torch.maximum(total, other, out=total)
        else:
            total.add_(other)
    if op == "avg":
        total.div_(len(others) + 1)


def _all_gather(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    whole = parts[0][0]
    for (_, tensor), piece in zip(parts, whole.chunk(len(parts)), strict=True):
        if piece.data_ptr() != tensor.data_ptr():
            piece.copy_(tensor)
    for output, _ in parts[1:]:
        output.copy_(whole)


def _all_to_all(
    parts: list[tuple[torch.Tensor, torch.Tensor, tuple[int, ...], tuple[int, ...]]],
) -> str | None:
    for i, (_, _, _, sent) in enumerate(parts):
        for j, (_, _, received, _) in enumerate(parts):
            if sent[j] != received[i]:
                return (
                    "what one member sends the other must expect: "
                    f"member {i} sends {sent[j]} rows to member {j}, which expects {received[i]}"
                )
    outgoing = [torch.split(tensor, list(sent)) for _, tensor, _, sent in parts]
    for j, (output, _, received, _) in enumerate(parts):
        for piece, pieces in zip(torch.split(output, list(received)), outgoing, strict=True):
            piece.copy_(pieces[j])
    return None


def _broadcast(parts: list[tuple[torch.Tensor, int]]) -> None:
    source = parts[parts[0][1]][0]
    for tensor, _ in parts:
        if tensor is not source:
            tensor.copy_(source)


ARITHMETIC: Mapping[str, Callable[[list[Any]], str | None]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "broadcast": _broadcast,
}
