"""Anyone's function on simulated ranks, written for Picotron's ``Backend`` or for plain torch.distributed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from picotron.errors import PlanError
from picotron.planner.cluster import ClusterSpec
from picotron.planner.faults import Fault
from picotron.planner.prices import cluster_price
from picotron.planner.records import write_text
from picotron.planner.validators import is_size, shown
from picotron.runtime.backend import Backend
from picotron.runtime.messages import Semantics
from picotron.runtime.simulated import results, simulation
from picotron.runtime.trace import chrome_trace
from picotron.runtime.world import Clock, World

T = TypeVar("T")

Api = Literal["picotron", "torch.distributed"]


def simulate_ranks(
    function: Callable[..., T],
    world_size: int,
    *,
    api: Api = "picotron",
    seed: int = 0,
    semantics: Semantics = "rendezvous",
    faults: Fault | Iterable[Fault] = (),
    cluster: ClusterSpec | None = None,
    clock: Clock = "planned",
    memory_bytes: int | None = None,
    patience_seconds: float | None = None,
    preempt: float = 0.0,
    device: str = "cpu",
    timeout_seconds: float | None = None,
    trace: str | Path | None = None,
) -> list[T]:
    """What ``function`` returned on every rank of a simulated world, in rank order.

    ``api``: "picotron" calls ``function(backend)``; "torch.distributed" calls ``function()``, in which
    torch.distributed is initialised for that rank and does what it does on processes. With a ``cluster``,
    communication takes the time of its links on the virtual clock; without, none. ``trace`` names a file for
    a picture of that time, which Perfetto opens. The rest is as in ``picotron.runtime.world.World``.
    Raises PlanError for a request that makes no world, else the first exception of any rank, with the seed
    that repeats it in a note.
    """
    if not callable(function):
        raise PlanError(f"function must be callable, got {shown(function)}")
    if not is_size(world_size):
        raise PlanError(f"world_size must be a whole number of at least 1, got {shown(world_size)}")
    if api not in get_args(Api):
        raise PlanError(f"api must be one of {', '.join(get_args(Api))}, got {shown(api)}")
    if cluster is not None and not isinstance(cluster, ClusterSpec):
        raise PlanError(f"cluster must be a ClusterSpec, got {shown(cluster)}; use ClusterSpec.preset(...)")
    if cluster is not None and world_size > cluster.num_devices:
        raise PlanError(
            f"world_size must be at most the cluster's {cluster.num_devices} devices, got {world_size}"
        )
    world = World(
        seed=seed,
        semantics=semantics,
        faults=faults,
        price=None if cluster is None else cluster_price(cluster),
        clock=clock,
        memory_bytes=memory_bytes,
        patience_seconds=patience_seconds,
        preempt=preempt,
        device=device,
        keep_events=trace is not None,
    )
    on_rank = on_torch(function) if api == "torch.distributed" else function
    found = simulation(on_rank, world_size, world, timeout_seconds=timeout_seconds)
    if trace is not None:
        try:
            write_text(trace, chrome_trace(found.spans), "a trace")
        except PlanError as error:
            if found.failure is None:
                raise
            found.failure.add_note(str(error))
    return results(found)


def on_torch(function: Callable[[], T]) -> Callable[[Backend], T]:
    """``function``, written against plain torch.distributed, as one of a simulated rank's backend."""
    from picotron.runtime.torch_api import torch_world

    def on_rank(backend: Any) -> T:
        with torch_world(backend):
            return function()

    return on_rank
