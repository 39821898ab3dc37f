"""Live bytes as they really are: every tensor storage that an operation makes, until it dies.

A dispatch mode sees each operation's outputs; weak references tell when a storage is gone; an elastic one,
whose memory comes and goes, is looked at again before every operation. What an operation uses inside itself
is not seen, nor is an allocator's rounding. The mode is the thread's own, so each simulated rank is measured
alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from threading import RLock
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from picotron.errors import ExecutionError

ELASTIC = "is_elastic"  # an attribute of a storage that is resized while it lives


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages behind ``tensors``, each counted once."""
    storages = {storage._cdata: storage.nbytes() for storage in (t.untyped_storage() for t in tensors)}
    return sum(storages.values())


class OutOfMemoryError(ExecutionError, torch.OutOfMemoryError):
    """The error that a real device raises, naming the rank; torch's handlers catch it too."""


class MemoryTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts live storage bytes while active; ``peak_bytes`` is the most since ``restart_peak``."""

    def __init__(
        self, standing: Iterable[torch.Tensor] = (), *, limit_bytes: int | None = None, rank: int = 0
    ) -> None:
        """``standing``: tensors that live already and are to be counted.

        An operation that makes more live than ``limit_bytes`` raises OutOfMemoryError, naming ``rank``.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._limit_bytes, self._rank = limit_bytes, rank
        self._live_bytes = 0
        self.peak_bytes = 0
        self._elastic: list[torch.UntypedStorage] = []  # whose size changes while they live
        self._elastic_bytes = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._counting = RLock()  # a backend's own thread may be the one that lets go of a storage
        for tensor in standing:
            self._note(tensor)

    @property
    def live_bytes(self) -> int:
        """Bytes of the storages that live now."""
        self._look_again()
        return self._live_bytes

    def restart_peak(self) -> None:
        """Begin a new stretch whose peak is wanted."""
        self.peak_bytes = self.live_bytes

    def _look_again(self) -> None:
        """Take note of elastic storages that have grown or shrunk."""
        if not self._elastic:
            return
        size = sum(storage.nbytes() for storage in self._elastic)
        with self._counting:
            self._live_bytes += size - self._elastic_bytes
            self._elastic_bytes = size
            self.peak_bytes = max(self.peak_bytes, self._live_bytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._look_again()
        out = func(*args, **(kwargs or {}))
        for leaf in (out,) if isinstance(out, torch.Tensor) else tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf)
        return out

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        if getattr(storage, ELASTIC, False):
            self._known[key] = weakref.ref(storage)
            self._elastic.append(storage)
            self._look_again()
        else:
            with self._counting:
                self._known[key] = weakref.ref(storage, lambda _: self._forget(key, size))
                self._live_bytes += size
                self.peak_bytes = max(self.peak_bytes, self._live_bytes)
        if self._limit_bytes is not None and self._live_bytes > self._limit_bytes:
            raise OutOfMemoryError(
                f"out of memory: an operation needs {size:,} bytes more, "
                f"{self._live_bytes - size:,} are live and the device holds {self._limit_bytes:,}",
                rank=self._rank,
            )

    def _forget(self, key: int, size: int) -> None:
        with self._counting:
            del self._known[key]
            self._live_bytes -= size
