"""The processor and memory of the machine we run on, and one thread of it to measure on."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def cpu_name() -> str:
    """What the system calls the processor."""
    return platform.processor() or platform.machine() or "cpu"


def memory_bytes() -> int:
    """All of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@contextmanager
def one_thread() -> Iterator[None]:
    """The body with one intra-op thread of torch; the threads it had come back after."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
