"""Processes of this machine that can open gloo with each other, launched as torchrun would.

Each is fresh (spawned, not forked), has torchrun's variables for loopback and one torch thread, and talks to
whoever launched it through a pipe of its own. The store that they meet at is in the launching process.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

import torch
from attrs import frozen


@frozen
class Child:
    """One process, by rank in a tuple of them, and this end of its pipe."""

    process: SpawnProcess
    connection: Connection


@contextmanager
def children(main: Callable[..., None], world_size: int, *arguments: object) -> Iterator[tuple[Child, ...]]:
    """Processes that run ``main(connection, *arguments)``; none is left when the block ends.

    ``main`` is importable by name, and arguments are pickled. A process that ends closes its pipe, so that
    whoever receives from it learns by EOFError.
    """
    import torch.distributed as dist

    # Port 0: one that is free.
    store: Any = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    context = multiprocessing.get_context("spawn")
    made: list[Child] = []
    try:
        for rank in range(world_size):
            here, there = context.Pipe()
            work = there, environment(rank, world_size, store.port), main, arguments
            process = context.Process(target=_child_main, args=work, daemon=True)
            process.start()
            there.close()
            made.append(Child(process, here))
        yield tuple(made)
    finally:
        for child in made:
            child.process.kill()
        for child in made:
            child.process.join()
            child.process.close()
            child.connection.close()


def environment(rank: int, world_size: int, port: int) -> Mapping[str, str]:
    """Torchrun's variables, for loopback."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is in the process that launches
        "GLOO_SOCKET_IFNAME": "lo",
    }


def _child_main(
    connection: Connection,
    variables: Mapping[str, str],
    main: Callable[..., None],
    arguments: tuple[object, ...],
) -> None:
    os.environ.update(variables)
    torch.set_num_threads(1)
    main(connection, *arguments)
