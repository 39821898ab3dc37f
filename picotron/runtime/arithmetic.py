"""What a simulated collective does with its members' tensors, all at once and in group order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

BLOCK = 2**16  # elements summed and copied at a time on a CPU, so that they stay in a core's cache


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous tensor."""
    return as_elements(tensor).view(torch.uint8)


def as_elements(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor in one dim; one of a single element may have any stride, which torch minds."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def flip_bit(tensor: torch.Tensor, element: int, bit: int) -> None:
    """Invert one bit of one element, both counted modulo what there is."""
    if not tensor.numel():
        return
    content = as_bytes(tensor)
    size = tensor.element_size()
    byte = (element % tensor.numel()) * size + bit % (8 * size) // 8
    content[byte] ^= 1 << bit % 8


def _all_reduce(parts: list[tuple[torch.Tensor, str]]) -> None:
    op = parts[0][1]
    flat = [as_elements(tensor) for tensor, _ in parts]
    block = BLOCK if flat[0].device.type == "cpu" else max(flat[0].numel(), 1)
    for first in range(0, max(flat[0].numel(), 1), block):
        total, *others = own = [tensor[first : first + block] for tensor in flat]
        reduce_into(total, own, op)
        for other in others:
            other.copy_(total)


def _reduce_scatter(parts: list[tuple[torch.Tensor, torch.Tensor, str]]) -> None:
    pieces = [tensor.chunk(len(parts)) for _, tensor, _ in parts]
    for place, (output, whole, op) in enumerate(parts):
        own = [piece[place] for piece in pieces]
        inside = output.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        total = torch.empty_like(output) if inside else output
        reduce_into(total, own, op)
        if inside:
            output.copy_(total)


_REDUCE: Mapping[str, Callable[..., torch.Tensor]] = {
    "sum": torch.add,
    "avg": torch.add,
    "max": torch.maximum,
}


def reduce_into(total: torch.Tensor, tensors: list[torch.Tensor], op: str) -> None:
    """Write to ``total``, which may be the first of them, what ``tensors`` are together, in their order."""
    combine = torch.logical_or if total.dtype == torch.bool else _REDUCE[op]
    so_far = tensors[0]
    for tensor in tensors[1:]:
        so_far = combine(so_far, tensor, out=total)
    if len(tensors) == 1 and total is not tensors[0]:
        total.copy_(tensors[0])
    if op == "avg":
        total.div_(len(tensors))


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


def _exchange(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for index, (output, _) in enumerate(parts):
        output.copy_(parts[index - 1][1])


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
    "exchange": _exchange,
    "broadcast": _broadcast,
}
