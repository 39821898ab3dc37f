"""Sides of ``runtime.py``: processes over gloo that train, and count what they send, hold and use.

A turn's report has, beside CPU time, the bytes that the process's sockets sent. After the turns a process is
asked to ``Look``: at its live tensors, at what gloo was given, at its memory, or at where its time goes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch.distributed as dist
from attrs import frozen
from counters import (
    Payload,
    gloo_payload,
    loopback_bytes,
    peak_resident_bytes,
    resident_bytes,
    restart_resident_peak,
    sent_bytes,
    thread_seconds,
)
from teams import Case, Command, PicotronTrainer, Report, Side, Trainer, make_plan, rank_batches, team

from picotron.planner.plan import TrainingPlan
from picotron.planner.topology import coordinate
from picotron.runtime.data import HostBatch

Batches = Sequence[tuple[HostBatch, ...]]
OURS = ("gloo", "sockets")  # with and without the memory that processes of a host share


@frozen(kw_only=True)
class Look(Command):
    """Take ``steps`` steps and look at ``what``: "memory", "payload", "resident" or "profile"."""

    what: str


@frozen(kw_only=True)
class Counted(Report):
    """A turn of one process, with what it sent; and what it saw where it was told to look.

    ``other_seconds`` are CPU seconds of threads other than the main one; ``loopback_bytes`` are the whole
    machine's. ``resident_bytes`` are by how much memory rose at most since everything was imported.
    """

    sent_bytes: int = 0
    loopback_bytes: int = 0
    other_seconds: float = 0.0
    payload: Payload = ()
    resident_bytes: int = 0
    profile: Any = None


class Server:
    """One process: its trainer, and the commands that it obeys."""

    def __init__(self, trainer: Trainer, batches: Batches, imported_bytes: int) -> None:
        self.trainer, self.batches, self.imported_bytes = trainer, batches, imported_bytes
        self.done = 0

    def chosen(self) -> tuple[HostBatch, ...]:
        """The next step's batches."""
        self.done += 1
        return self.batches[(self.done - 1) % len(self.batches)]

    def take(self, steps: int) -> tuple[float, ...]:
        """Losses of so many steps."""
        return tuple(self.trainer.step(self.chosen()) for _ in range(steps))

    def look(self, command: Look) -> dict[str, Any]:
        """What there is to see, in the fields of ``Counted``."""
        if command.what == "memory":
            loss, peak = self.trainer.measured_step(self.chosen())
            return {"losses": (loss,), "peak_bytes": (peak,)}
        if command.what == "payload":
            losses: list[float] = []
            payload = gloo_payload(lambda: losses.extend(self.take(command.steps)))
            own = getattr(self.trainer, "payload", None)
            return {"losses": tuple(losses), "payload": payload if own is None else own()}
        if command.what == "resident":
            restart_resident_peak()
            losses_then = self.take(command.steps)
            return {"losses": losses_then, "resident_bytes": peak_resident_bytes() - self.imported_bytes}
        from cpu_profile import profiled

        return {"profile": profiled(self, command.steps)}

    def obey(self, command: Command) -> Counted:
        """A turn, counted; or a look."""
        if isinstance(command, Look):
            seen = self.look(command)
            return Counted(cpu_seconds=0.0, wall_seconds=0.0, count=command.steps, **seen)
        before = time.process_time(), time.perf_counter(), sent_bytes(), loopback_bytes(), thread_seconds()
        losses = self.take(command.steps)
        cpu, wall = time.process_time() - before[0], time.perf_counter() - before[1]
        return Counted(
            cpu_seconds=cpu,
            wall_seconds=wall,
            count=command.steps,
            losses=losses,
            sent_bytes=sent_bytes() - before[2],
            loopback_bytes=loopback_bytes() - before[3],
            other_seconds=sum(thread_seconds()[1].values()) - sum(before[4][1].values()),
        )

    def serve(self, connection: Connection) -> None:
        """Obey until None comes."""
        connection.send("ready")
        while (command := connection.recv()) is not None:
            connection.send(self.obey(command))


class CountedTrainer(PicotronTrainer):
    """Picotron's session, which counts what it gives to its backend."""

    counted: tuple[tuple[str, str, int], ...] = ()

    def step(self, batches: Sequence[HostBatch]) -> float:
        """The global mean loss."""
        result = self.session.step(batches)
        self.counted = result.payload_bytes
        return result.loss

    def payload(self) -> Payload:
        """Of the last step, as gloo would count it: what a rank gives, so of a gather its own part."""
        sizes: dict[str, int] = {}
        for kind, group, size in self.counted:
            if kind != "recv":
                part = self.session.communicator.groups[group].size if kind == "all_gather" else 1
                sizes[kind] = sizes.get(kind, 0) + size // part
        return tuple((kind, 0, size) for kind, size in sorted(sizes.items()))


PEERS = {  # module and class of each engine; only its own processes import it
    "torch": ("peers", "PlainTrainer"),
    "ddp": ("peers", "DdpTrainer"),
    "dtensor": ("torch_peers", "DTensorTrainer"),
    "fsdp": ("torch_peers", "FsdpTrainer"),
    "torch-1f1b": ("torch_peers", "PipelinesTrainer"),
    "torch-cube": ("torch_peers", "PipelinesTrainer"),
    "deepspeed": ("deepspeed_peer", "DeepSpeedTrainer"),
    "original": ("original_peer", "OriginalTrainer"),
}


def peer_kind(engine: str, original: Path | None) -> Callable[[TrainingPlan], Trainer]:
    """A peer's trainer, imported with all that it needs."""
    module, name = PEERS[engine]
    kind: Any = getattr(import_module(module), name)
    return partial(kind, original) if engine == "original" else kind


def peer_rank(trainer: Trainer, made: TrainingPlan) -> int:
    """The data-parallel rank of this process: the original counts its own way, and says so itself."""
    groups: Any = getattr(trainer, "groups", None)
    if groups is None:
        return coordinate(made.topology, int(os.environ["RANK"])).dp
    index: int = groups.dp_rank
    return index


def serve_rank(case: Case, side: Side, original: Path | None, connection: Connection) -> None:
    """One process of a side."""
    made = make_plan(case, side)
    with ExitStack() as stack:
        if side.engine in OURS:
            from picotron.runtime.distributed import DistributedBackend

            shared = side.engine == "gloo"
            backend = stack.enter_context(DistributedBackend.open("cpu", shared_memory=shared))
            imported = resident_bytes()
            ours = CountedTrainer(made, backend)
            trainer: Trainer = ours
            batches: Batches = rank_batches(made, ours.session.where.dp)
        else:
            kind = peer_kind(side.engine, original)
            imported = resident_bytes()
            trainer = kind(made)
            batches = rank_batches(made, peer_rank(trainer, made))
        Server(trainer, batches, imported).serve(connection)
        if dist.is_initialized() and side.engine not in OURS:
            dist.destroy_process_group()


def rank_team(case: Case, side: Side, original: Path | None = None) -> Any:
    """The processes of a side, ready, as a context."""
    return team(str(side), partial(serve_rank, case, side, original), side.num_processes)
