"""What a process sends, holds and uses, as the system or PyTorch itself counts it: the same for every side.

- Sent bytes are those of the process's own TCP sockets (``tcpi_bytes_sent`` of Linux's TCP_INFO), so what
  other processes send is not among them; ``loopback_bytes`` counts the whole machine's.
- The payload is what gloo was given: PyTorch's profiler records every operation of the process group by name,
  shape and type, whoever called it (Python, DDP in C++, autograd).
- Threads are told apart by ``/proc/self/task``: the main one is the trainer's, the others are gloo's.
"""

from __future__ import annotations

import gc
import os
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from weakref import ref

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BYTES_SENT_OFFSET = 200  # of tcpi_bytes_sent in Linux's struct tcp_info, since 4.19
ITEM_BYTES = {"float": 4, "double": 8, "c10::BFloat16": 2, "c10::Half": 2, "long int": 8, "int": 4}
SENDING = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send")


def sent_bytes() -> int:
    """By this process's TCP connections that are open, since they were; 0 where the system does not tell."""
    return sum(map(_socket_bytes, Path("/proc/self/fd").glob("*"))) if hasattr(socket, "TCP_INFO") else 0


def _socket_bytes(link: Path) -> int:
    try:
        if not os.readlink(link).startswith("socket:"):
            return 0
        with socket.socket(fileno=os.dup(int(link.name))) as copy:
            told = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 512)
    except OSError:  # closed meanwhile, or no TCP socket
        return 0
    if len(told) < BYTES_SENT_OFFSET + 8:
        return 0
    number: int = struct.unpack_from("=Q", told, BYTES_SENT_OFFSET)[0]
    return number


def loopback_bytes() -> int:
    """That the machine's loopback has carried, whoever sent them; 0 where the system does not tell."""
    try:
        lines = Path("/proc/net/dev").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[9]) for line in lines if line.split()[0] == "lo:"), 0)


def _status(name: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    return _status("VmRSS")


def peak_resident_bytes() -> int:
    """The most that was in RAM at a time since ``restart_resident_peak``."""
    return _status("VmHWM")


def restart_resident_peak() -> None:
    """Forget the peak so far, where the system lets a process do that."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def thread_seconds() -> tuple[float, dict[str, float]]:
    """CPU seconds of this process's main thread, and of its other living threads by name."""
    main, others = 0.0, Counter[str]()
    for folder in Path("/proc/self/task").glob("*"):
        try:
            name = (folder / "comm").read_text(encoding="utf-8").strip()
            seconds = int((folder / "schedstat").read_text(encoding="ascii").split()[0]) / 1e9
        except OSError:  # ended meanwhile
            continue
        if int(folder.name) == os.getpid():
            main = seconds
        else:
            others[name] += seconds
    return main, dict(others)


Payload = tuple[tuple[str, int, int], ...]  # operation, how often, bytes given to it


def gloo_payload(work: Callable[[], object]) -> Payload:
    """What gloo was given to send while ``work`` ran, by operation.

    Gloo answers ``reduce_scatter`` with an ``all_reduce`` of the whole, and is counted so.
    """
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as watched:
        work()
    results: Any = watched.profiler
    times, sizes = Counter[str](), Counter[str]()
    for event in results.kineto_results.events():
        backend, _, name = event.name().partition(":")
        if backend != "gloo" or name not in SENDING:
            continue
        times[name] += 1
        for shape, kind in zip(event.shapes(), event.dtypes(), strict=True):
            sizes[name] += int(torch.Size(shape).numel()) * ITEM_BYTES.get(kind, 1)
    return tuple((name, times[name], sizes[name]) for name in sorted(times))


def living_tensors() -> Iterator[torch.Tensor]:
    """Every plain tensor that Python can reach; a wrapper's inner tensors are plain ones."""
    for found in gc.get_objects():
        if type(found) in (torch.Tensor, torch.nn.Parameter) and found.device.type == "cpu":
            yield found


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts live storage bytes while active, also of storages that are resized in place.

    Picotron's ``MemoryTracker`` notes a storage's size when it first sees it, which is right for code that
    resizes none; FSDP2 and DeepSpeed do, so every known storage is looked at again after each operation.
    Operations on DTensors are seen as those on their local tensors.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known: dict[int, ref[torch.UntypedStorage]] = {}
        self.peak_bytes = 0
        for tensor in living_tensors():
            self._note(tensor)
        self._look()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind not in (torch.Tensor, torch.nn.Parameter) for kind in types):
            return NotImplemented  # then the wrapper asks for its local operations, which come here
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu":
                self._note(leaf)
        self._look()
        return out

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self._known[storage._cdata] = ref(storage)

    def _look(self) -> None:
        total, gone = 0, []
        for key, known in self._known.items():
            storage = known()
            if storage is None:
                gone.append(key)
            else:
                total += storage.nbytes()
        for key in gone:
            del self._known[key]
        self.peak_bytes = max(self.peak_bytes, total)
