"""Network connections of the process, as the kernel lists them (Linux): to end what waits on one."""

from __future__ import annotations

import os
import socket
from collections.abc import Collection
from contextlib import suppress

_LIST = "/proc/self/fd"


def open_connections() -> frozenset[str]:
    """Names of the sockets that are open now; of a system that does not list them, none."""
    found = set()
    for descriptor in os.listdir(_LIST) if os.path.isdir(_LIST) else ():
        with suppress(OSError):
            found.add(os.readlink(f"{_LIST}/{descriptor}"))
    return frozenset(name for name in found if name.startswith("socket:"))


def break_off(names: Collection[str]) -> None:
    """Shut down those of the sockets that are network connections: whoever waits on one is told at once.

    A socket that listens is left alone, and so is one of another kind; each stays open until its owner
    closes it.
    """
    for descriptor in os.listdir(_LIST) if names else ():
        with suppress(OSError):
            if os.readlink(f"{_LIST}/{descriptor}") in names:
                with socket.socket(fileno=os.dup(int(descriptor))) as connection:
                    if connection.family in (socket.AF_INET, socket.AF_INET6):
                        connection.getpeername()
                        connection.shutdown(socket.SHUT_RDWR)
