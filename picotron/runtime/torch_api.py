"""Functions written against plain ``torch.distributed``, unchanged, on the ranks of a simulated world.

Inside ``torch_world`` everything in ``torch.distributed`` that goes through process groups works as after
``init_process_group``: collectives and messages, new groups and meshes, functional collectives, and what is
built of them (DistributedDataParallel, fully_shard, DTensor, torch.distributed.pipelining). Calls of
``init_process_group`` (for any backend) and ``destroy_process_group`` inside it do what a reader expects.

What cannot be, since ranks share a process: environment variables of a rank (RANK, LOCAL_RANK), a default
store (each rank sees one of its own), devices other than the CPU, polling, torch.profiler on several ranks.
What is refused: receives from any source, messages to oneself, groups that only their members open
(``use_local_synchronization``), ``split_group`` and ``monitored_barrier``.

Private parts of torch that this leans on, used here, in ``torch_group`` and in ``torch_work``:

- ``distributed_c10d._world``, which torch calls its extension point: one state of groups a thread;
  ``_register_pg_in_world``, ``_process_group_name``; and that a default group which has a method
  ``new_group`` is asked for new groups.
- ``_set_thread_isolation_mode``: a registry of group names a thread, for C++ and functional collectives.
- That meshes of a backend called "threaded" know their thread, so that caches keep them apart.
- A Python ``ProcessGroup`` and ``Work`` that C++ calls back; ``_current_autograd_node`` and the autograd
  engine's ``queue_callback``.
- ``init_process_group`` and ``batch_isend_irecv`` are given another body while a world is open, since
  functions may have imported them by name: one that asks whether the calling thread is a rank.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from attrs import define, field

from picotron.errors import ExecutionError
from picotron.runtime.backend import Backend
from picotron.runtime.torch_group import BACKEND_NAME, SimulatedGroup
from picotron.runtime.torch_work import Posted

KNOWN_TORCH = ("2.13.0",)

_NEEDED = {
    "torch.distributed.distributed_c10d": (
        "_World",
        "_world",
        "_process_group_name",
        "_register_pg_in_world",
    ),
    "torch._C._distributed_c10d": ("_set_thread_isolation_mode",),
    "torch._C": ("_current_autograd_node",),
}

_INSTALLING = threading.Lock()

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import _world  # the bodies below run in torch's own module


@contextmanager
def torch_world(backend: Backend) -> Iterator[None]:
    """Inside, on this rank's thread, ``torch.distributed`` is initialised over ``backend``'s world.

    Collective over the world. Work that nobody has waited for is waited for at the end, unless there is an
    error. Other threads, and this one afterwards, see the ``torch.distributed`` that was there.
    """
    _check_torch()
    with _installed() as worlds:
        worlds.enter(backend)
        try:
            worlds.mine.open()
            yield
            worlds.mine.posted.drain()
        finally:
            worlds.leave()


def _check_torch() -> None:
    """ExecutionError if torch lacks a private part that this room leans on."""
    lacking = [
        f"{module}.{name}"
        for module, names in _NEEDED.items()
        for name in names
        if not hasattr(_resolve(module), name)
    ]
    if lacking:
        raise ExecutionError(
            f"torch.distributed on simulated ranks is known to work with torch {', '.join(KNOWN_TORCH)}: "
            f"{torch.__version__} lacks {', '.join(lacking)}"
        )


def _resolve(module: str) -> Any:
    found: Any = torch
    for name in module.split(".")[1:]:
        found = getattr(found, name, None)
    return found


def _c10d() -> Any:
    return dist.distributed_c10d


@define(eq=False)
class _RankWorld:
    """The state of torch.distributed on one rank; the fields that torch knows have torch's names."""

    posted: Posted
    is_claimed: bool = False  # by the function's own init_process_group
    default_pg: Any = None
    pg_map: dict[Any, Any] = field(factory=dict)
    pg_names: dict[Any, Any] = field(factory=dict)
    pg_group_ranks: dict[Any, Any] = field(factory=dict)
    pg_backend_config: dict[Any, Any] = field(factory=dict)
    group_count: int = 0
    tags_to_pg: dict[str, list[Any]] = field(factory=dict)
    pg_to_tag: dict[Any, str] = field(factory=dict)
    pg_coalesce_state: dict[Any, list[Any]] = field(factory=dict)
    comms: list[Any] = field(factory=list)

    @property
    def pg_config_info(self) -> Any:
        """As torch's own, of these groups."""
        return _c10d()._World.pg_config_info.fget(self)

    def open(self) -> None:
        """Open the default group."""
        backend, c10d = self.posted.backend, _c10d()
        ranks = range(backend.world_size)
        name = c10d._process_group_name([], use_hashed_name=False)
        group = SimulatedGroup(self.posted, backend.new_group(ranks, "world"), ranks, name, "default_pg")
        c10d._register_pg_in_world(
            group,
            backend_name=BACKEND_NAME,
            store=group.get_group_store(),
            group_name=name,
            backend_config=f"cpu:{BACKEND_NAME}",
            rank_mapping={rank: rank for rank in ranks},
            add_to_default_tag=True,
        )
        self.default_pg = group

    def initialise(self, given: dict[str, Any]) -> None:
        """What init_process_group does here: the world is there already, unless it was destroyed."""
        if self.is_claimed and self.default_pg is not None:
            raise ValueError("init_process_group must be called once, got a second call")
        backend = self.posted.backend
        for name, value in (("world_size", backend.world_size), ("rank", backend.rank)):
            if given.get(name, -1) not in (-1, value):
                raise ExecutionError(
                    f"{name} must be that of the simulated world, {value}, got {given[name]}",
                    rank=backend.rank,
                    action="init_process_group",
                )
        self.is_claimed = True
        if self.default_pg is None:
            self.open()


class _Worlds:
    """What stands in for torch's own state of groups: each rank's on its thread, torch's on any other."""

    def __init__(self, ordinary: Any) -> None:
        self.__dict__.update(ordinary=ordinary, own=threading.local(), num_ranks=0, bodies={})

    @property
    def mine(self) -> Any:
        """What this thread sees."""
        return getattr(self.own, "world", self.ordinary)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.mine, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.mine, name, value)

    def enter(self, backend: Backend) -> None:
        """Make this thread a rank."""
        if hasattr(self.own, "world"):
            raise ExecutionError("a torch_world must not be entered twice at a time", rank=backend.rank)
        self.own.world = _RankWorld(Posted(backend))

    def leave(self) -> None:
        """Make this thread what it was."""
        self.mine.posted.let_go()
        del self.own.world

    def init_process_group(self, *args: Any, **kwargs: Any) -> None:
        """For threads that are ranks, and for others."""
        original = self.bodies[dist.init_process_group]
        if hasattr(self.own, "world"):
            self.mine.initialise(inspect.signature(original).bind(*args, **kwargs).arguments)
        else:
            original(*args, **kwargs)

    def batch_isend_irecv(self, *args: Any, **kwargs: Any) -> Any:
        """For threads that are ranks, and for others."""
        original = self.bodies[dist.batch_isend_irecv]
        if not hasattr(self.own, "world"):
            return original(*args, **kwargs)
        posted: Posted = self.mine.posted
        posted.batch = []
        try:
            works = original(*args, **kwargs)
        except BaseException:
            posted.batch = None
            raise
        posted.post_batch()
        return works


@contextmanager
def _installed() -> Iterator[_Worlds]:
    """Have torch ask which thread it is on, from the first rank that enters to the last that leaves."""
    c10d = _c10d()
    with _INSTALLING:
        if not isinstance(c10d._world, _Worlds):
            _install(c10d)
        worlds: _Worlds = c10d._world
        worlds.__dict__["num_ranks"] += 1
    try:
        yield worlds
    finally:
        with _INSTALLING:
            worlds.__dict__["num_ranks"] -= 1
            if worlds.num_ranks == 0:
                _restore(c10d, worlds)


def _install(c10d: Any) -> None:
    if BACKEND_NAME not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND_NAME, _refuse, devices=["cpu"])
    worlds = _Worlds(c10d._world)
    for public, body in (
        (dist.init_process_group, _init_process_group),
        (dist.batch_isend_irecv, _batch_isend_irecv),
    ):
        function = inspect.unwrap(public)
        worlds.bodies[public] = FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__
        )
        function.__code__, function.__defaults__ = body.__code__, None
    c10d._world = worlds
    torch._C._distributed_c10d._set_thread_isolation_mode(True)  # type: ignore[attr-defined]


def _restore(c10d: Any, worlds: _Worlds) -> None:
    torch._C._distributed_c10d._set_thread_isolation_mode(False)  # type: ignore[attr-defined]
    c10d._world = worlds.ordinary
    for public, original in worlds.bodies.items():
        function = inspect.unwrap(public)
        function.__code__, function.__defaults__ = original.__code__, original.__defaults__


def _init_process_group(*args: Any, **kwargs: Any) -> Any:
    return _world.init_process_group(*args, **kwargs)  # type: ignore[attr-defined]


def _batch_isend_irecv(*args: Any, **kwargs: Any) -> Any:
    return _world.batch_isend_irecv(*args, **kwargs)  # type: ignore[attr-defined]


def _refuse(*args: object) -> None:
    raise ExecutionError(f"process groups of backend {BACKEND_NAME!r} live on simulated ranks alone")
