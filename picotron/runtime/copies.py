"""Copies of what a layer has saved: from its device to the host, and back.

What is copied is any structure of dicts, lists, tuples and attentions with tensors in it. Memory goes over
once, however many views of it the structure has, and comes back with the same views. Whole numbers, such as
the state of a kernel's random generator, stay. On CUDA the host's memory is pinned and copies run on a stream
of their own. On a CPU the host is the device; what is copied there is made unseen by memory trackers, and so
counts as the host's.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from attrs import define, frozen

from picotron.runtime.backend import unseen
from picotron.runtime.kernels import AttentionCore


@frozen(eq=False)
class HostTensor:
    """A view of memory that is on the host."""

    memory: torch.Tensor
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@define
class Copied:
    """A structure on the other side, or on its way there; ``event`` is its arrival on CUDA."""

    value: Any
    bytes: int
    event: torch.cuda.Event | None = None


class Copies:
    """What passes between one rank's device and its host."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: torch.cuda.Stream | None = _new_stream(device) if device.type == "cuda" else None

    def to_host(self, value: Any) -> Copied:
        """Begin to copy ``value`` to the host; its tensors are to stay as they are until ``arrive``."""
        memories: dict[int, torch.Tensor] = {}

        def move(tensor: torch.Tensor) -> torch.Tensor | HostTensor:
            if not tensor.is_floating_point():
                return tensor
            storage = tensor.untyped_storage()
            if storage._cdata not in memories:
                memories[storage._cdata] = self._on_host(tensor)
            memory = memories[storage._cdata]
            return HostTensor(memory, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

        return self._moved(value, move, memories)

    def to_device(self, copied: Copied) -> Copied:
        """Begin to copy back what ``to_host`` gave; its tensors are to be used only after ``arrive``."""
        memories: dict[int, torch.Tensor] = {}

        def move(tensor: torch.Tensor | HostTensor) -> torch.Tensor:
            if isinstance(tensor, torch.Tensor):
                return tensor
            key = id(tensor.memory)
            if key not in memories:
                memories[key] = self._on_device(tensor.memory)
            return memories[key].as_strided(tensor.size, tensor.stride, tensor.offset)

        return self._moved(copied.value, move, memories)

    def arrive(self, copied: Copied) -> None:
        """Whatever the device does next comes after the copy."""
        if copied.event is not None:
            torch.cuda.current_stream(self.device).wait_event(copied.event)

    def _moved(self, value: Any, move: Callable[[Any], Any], memories: dict[int, torch.Tensor]) -> Copied:
        if self._stream is not None:  # what is copied is made before, and where it lands is free by then
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        moved = mapped(value, move)
        event = None if self._stream is None else self._stream.record_event()
        return Copied(moved, sum(memory.nbytes for memory in memories.values()), event)

    def _on_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """All memory behind ``tensor``, on the host."""
        with unseen(), torch.cuda.stream(self._stream):
            numel = tensor.untyped_storage().nbytes() // tensor.element_size()
            memory = torch.empty(numel, dtype=tensor.dtype, pin_memory=self._stream is not None)
            return memory.copy_(tensor.as_strided((numel,), (1,), 0), non_blocking=True)

    def _on_device(self, memory: torch.Tensor) -> torch.Tensor:
        """The same memory on the device."""
        found = torch.empty(memory.shape, dtype=memory.dtype, device=self.device)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with unseen(), torch.cuda.stream(self._stream):
            return found.copy_(memory, non_blocking=True)


def _new_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def mapped(value: Any, move: Callable[[Any], Any]) -> Any:
    """The same structure with each tensor, here or on the host, replaced by what ``move`` makes of it."""
    if isinstance(value, torch.Tensor | HostTensor):
        return move(value)
    if isinstance(value, dict):
        return {name: mapped(part, move) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(mapped(part, move) for part in value)
    if isinstance(value, AttentionCore):
        other = copy(value)
        vars(other).update(mapped(vars(value), move))
        return other
    return value
