"""Memory that a process shows to others of its host: regions, filled again once all have read them.

A region begins with one flag a reader, set by that reader alone when it has done with the region; the owner
looks at the flags before it uses the region again. So nobody waits for memory, and no lock is needed. The
order of the two writes (reading, then the flag) is that of x86-64 processors, which keep it.
"""

from __future__ import annotations

import mmap
import os
from collections import deque
from collections.abc import Collection

import torch
from attrs import field, frozen

MAX_READERS = 64  # bytes of flags before a region's content: one cache line
VIRTUAL_BYTES = 1 << 34  # of address space; memory is taken only where something has been written
_GRAIN_BYTES = 4096


@frozen
class Region:
    """A part of an arena, by the place of its flags; ``readers`` are still to say that they have done."""

    offset: int
    room_bytes: int
    content: torch.Tensor = field(eq=False, repr=False)  # uint8
    readers: tuple[int, ...] = ()


def make_file() -> int:
    """A file of memory without a name; it is gone with the last process that has it open."""
    descriptor = os.memfd_create("picotron")
    os.ftruncate(descriptor, VIRTUAL_BYTES)
    return descriptor


class Window:
    """Somebody's arena as this process sees it."""

    def __init__(self, descriptor: int) -> None:
        self.memory = mmap.mmap(descriptor, VIRTUAL_BYTES)
        self._views: dict[tuple[int, int], torch.Tensor] = {}

    def content(self, offset: int, size_bytes: int) -> torch.Tensor:
        """The bytes of the region whose flags are at ``offset``."""
        if not size_bytes:
            return torch.empty(0, dtype=torch.uint8)
        key = offset, size_bytes
        if key not in self._views:
            self._views[key] = torch.frombuffer(
                self.memory, dtype=torch.uint8, count=size_bytes, offset=offset + MAX_READERS
            )
        return self._views[key]

    def done(self, offset: int, reader: int) -> None:
        """Say that ``reader`` has done with the region."""
        self.memory[offset + reader] = 1


class Arena(Window):
    """The process's own."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor)
        self._used_bytes = 0
        self._lent: dict[int, deque[Region]] = {}  # by room, the oldest first

    def lend(self, size_bytes: int, readers: Collection[int]) -> Region:
        """A region of that size which nobody reads any more, for ``readers`` to read."""
        room = -(-(size_bytes + MAX_READERS) // _GRAIN_BYTES) * _GRAIN_BYTES
        lent = self._lent.setdefault(room, deque())
        if lent and self._is_free(lent[0]):
            offset = lent.popleft().offset
        else:
            offset, self._used_bytes = self._used_bytes, self._used_bytes + room
            if self._used_bytes > VIRTUAL_BYTES:
                raise MemoryError(f"{VIRTUAL_BYTES} bytes are under way to ranks that do not receive")
        for reader in readers:
            self.memory[offset + reader] = 0
        region = Region(offset, room, self.content(offset, size_bytes), tuple(readers))
        lent.append(region)
        return region

    def _is_free(self, region: Region) -> bool:
        return all(self.memory[region.offset + reader] for reader in region.readers)
