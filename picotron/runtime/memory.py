"""Live bytes as they really are: every tensor storage that an operation makes, until it dies.

A dispatch mode sees each operation's outputs; weak references tell when a storage is gone. What an operation
uses inside itself is not seen, nor is an allocator's rounding. The mode is the thread's own, so each
simulated rank is measured alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from threading import RLock
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts live storage bytes while active; ``peak_bytes`` is the most since ``restart_peak``."""

    def __init__(self, standing: Iterable[torch.Tensor] = ()) -> None:
        """``standing``: tensors that live already and are to be counted."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = 0
        self.peak_bytes = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._counting = RLock()  # a backend's own thread may be the one that lets go of a storage
        for tensor in standing:
            self._note(tensor)

    def restart_peak(self) -> None:
        """Begin a new stretch whose peak is wanted."""
        self.peak_bytes = self.live_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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
        with self._counting:
            self._known[key] = weakref.ref(storage, lambda _: self._forget(key, size))
            self.live_bytes += size
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _forget(self, key: int, size: int) -> None:
        with self._counting:
            del self._known[key]
            self.live_bytes -= size
