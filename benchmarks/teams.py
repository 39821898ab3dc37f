"""Sides of a benchmark: processes that stand ready, take turns and say what CPU time each turn took.

Every side is one or more processes of its own that were started before, with one thread for torch each;
those whose turn it is not wait on a pipe. ``Side`` names a training of Picotron's or of a peer's; any other
work joins by a function that answers each ``Command`` with a ``Report``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from attrs import asdict, field, frozen
from peers import DdpTrainer, PipelineTrainer, PlainTrainer, TensorParallelTrainer

from picotron.planner.cluster import ClusterSpec
from picotron.planner.model import ModelSpec
from picotron.planner.plan import TrainingPlan, plan
from picotron.planner.workload import Workload
from picotron.runtime.backend import Backend
from picotron.runtime.data import ByteText, HostBatch, standard_library_text, step_batches
from picotron.runtime.loopback import children
from picotron.runtime.pipeline import Session

WARMUP_STEPS = 2
TIMEOUT_SECONDS = 600.0  # for a team to answer
DRAWS = 10_000  # of the bootstrap
NUM_BATCHES = 16  # different steps' batches, made before; they come round again


@frozen(kw_only=True)
class Case:
    """A model and how much of it is trained in a step."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    seq_len: int
    vocab: int = 256
    global_batch: int = 8


WORKLOAD_W = Case(hidden=256, layers=8, heads=4, intermediate=688, seq_len=256)

_ENGINE_NAMES = {
    "torch": "plain PyTorch",
    "ddp": "DDP",
    "threaded-ddp": "DDP, threads of one process",
    "threaded-tp": "PyTorch tensor parallel, threads of one process",
    "torch-pipeline": "torch.distributed.pipelining",
    "sockets": "Picotron, gloo without shared memory",
    "dtensor": "DTensor",
    "fsdp": "FSDP2",
    "torch-1f1b": "torch.distributed.pipelining",
    "torch-cube": "FSDP2, pipelining and DTensor",
    "deepspeed": "DeepSpeed",
    "original": "the original picotron",
}


@frozen
class Side:
    """What one side trains: an engine of ENGINES and the arguments of its plan."""

    engine: str
    parallel: dict[str, Any] = field(factory=dict)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return math.prod(self.parallel.get(axis, 1) for axis in ("dp", "pp", "cp", "tp"))

    @property
    def num_processes(self) -> int:
        """Simulated ranks are threads of one process, and so are those of PyTorch's threaded group."""
        return 1 if self.engine in ("simulated", "threaded-ddp", "threaded-tp") else self.world_size

    def __str__(self) -> str:
        engine = _ENGINE_NAMES.get(self.engine, f"Picotron, {self.engine}")
        axes = ("dp", "pp", "cp", "tp")
        degrees = " ".join(f"{axis}{n}" for axis in axes if (n := self.parallel.get(axis)))
        sequence = ", sequence parallel" if self.parallel.get("sequence_parallel") else ""
        sharded = f", ZeRO-{stage}" if (stage := self.parallel.get("zero_stage")) else ""
        sequence += ", attention by heads" if self.parallel.get("context") == "all_to_all" else ""
        schedule = f" {name}" if (name := self.parallel.get("schedule")) else ""
        saving = f", recompute {mode}" if (mode := self.parallel.get("recompute")) else ""
        saving += ", offloading" if self.parallel.get("offload") else ""
        return (
            f"{engine}{' ' if degrees else ''}{degrees}{schedule}{sequence}{sharded}{saving}, "
            f"microbatch {self.parallel['micro_batch']}"
        )


def make_plan(case: Case, side: Side) -> TrainingPlan:
    """The plan of a side; of a peer's, the model, the workload and the microbatches are used."""
    config = {
        "model_type": "llama",
        "vocab_size": case.vocab,
        "hidden_size": case.hidden,
        "intermediate_size": case.intermediate,
        "num_hidden_layers": case.layers,
        "num_attention_heads": case.heads,
        "num_key_value_heads": case.heads,
        "max_position_embeddings": case.seq_len,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
    work = Workload(
        global_batch=case.global_batch,
        seq_len=case.seq_len,
        precision="fp32",
        learning_rate=1e-3,
        max_grad_norm=0.0,
    )
    cluster = ClusterSpec.preset("cpu", devices_per_node=side.world_size)
    return plan(ModelSpec.from_hf(config), cluster, work, **{"dp": 1, **side.parallel})


def whole_samples(seq_len: int) -> ByteText:
    """Text of which every sample is full, so that the mean of microbatches' means is the mean."""
    text = standard_library_text(seq_len)
    return ByteText(text.data[: (len(text.data) - 1) // seq_len * seq_len + 1], seq_len)


def rank_batches(made: TrainingPlan, dp_index: int) -> list[tuple[HostBatch, ...]]:
    """The batches of NUM_BATCHES steps of one data-parallel rank."""
    text, size = whole_samples(made.workload.seq_len), made.workload.global_batch
    return [step_batches(made, text, consumed=step * size, dp_index=dp_index) for step in range(NUM_BATCHES)]


class Trainer(Protocol):
    """One rank of a side."""

    def step(self, batches: Sequence[HostBatch]) -> float:
        """The global mean loss."""

    def measured_step(self, batches: Sequence[HostBatch]) -> tuple[float, int]:
        """The global mean loss and this rank's peak of live bytes."""


class PicotronTrainer:
    """One rank of a Picotron session."""

    def __init__(self, made: TrainingPlan, backend: Backend) -> None:
        self.session = Session(made, backend)

    def step(self, batches: Sequence[HostBatch]) -> float:
        """The global mean loss."""
        return self.session.step(batches).loss

    def measured_step(self, batches: Sequence[HostBatch]) -> tuple[float, int]:
        """The global mean loss and this rank's peak of live bytes."""
        result = self.session.step(batches, measure_memory=True)
        assert result.memory is not None
        return result.loss, result.memory.max_bytes


@frozen
class Command:
    """Take ``steps`` steps, or one whose memory is measured."""

    steps: int
    measured: bool = False


@frozen(kw_only=True)
class Report:
    """What one process did on command: ``count`` of what is measured, such as steps.

    ``peak_bytes`` are its ranks', after a measured step.
    """

    cpu_seconds: float
    wall_seconds: float
    count: int
    losses: tuple[float, ...] = ()
    peak_bytes: tuple[int, ...] = ()


Reports = tuple[Report, ...]  # of every process of a side
Gather = Callable[[object], list[Any]]  # every rank's value, within a process


def serve(
    connection: Connection,
    trainer: Trainer,
    batches: Sequence[tuple[HostBatch, ...]],
    first: bool,
    gather: Gather,
) -> None:
    """Obey the commands that come through the pipe, until None does; only the ``first`` rank reads it."""
    done = 0
    gather(None)
    if first:
        connection.send("ready")
    while (command := gather(connection.recv() if first else None)[0]) is not None:
        cpu, wall = time.process_time(), time.perf_counter()
        losses, peak = [], 0
        for _ in range(command.steps):
            chosen = batches[done % len(batches)]
            if command.measured:
                loss, peak = trainer.measured_step(chosen)
            else:
                loss = trainer.step(chosen)
            losses.append(loss)
            done += 1
        peaks = gather(peak)
        if first:
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            connection.send(
                Report(
                    cpu_seconds=cpu,
                    wall_seconds=wall,
                    count=command.steps,
                    losses=tuple(losses),
                    peak_bytes=tuple(peaks),
                )
            )


def serve_work(connection: Connection, work: Callable[[], int]) -> None:
    """Obey by doing ``work``, which says how many of what is measured it did, once a step."""
    connection.send("ready")
    while (command := connection.recv()) is not None:
        cpu, wall = time.process_time(), time.perf_counter()
        count = sum(work() for _ in range(command.steps))
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        connection.send(Report(cpu_seconds=cpu, wall_seconds=wall, count=count))


def alone(value: object) -> list[Any]:
    """What a rank that is a process gathers within it."""
    return [value]


def serve_peer(kind: type[PlainTrainer], made: TrainingPlan, connection: Connection) -> None:
    """A process of plain PyTorch, of DDP or of its pipeline."""
    dp_index = int(os.environ["RANK"]) if made.topology.dp > 1 else 0
    serve(connection, kind(made), rank_batches(made, dp_index), True, alone)


def serve_threads(kind: type[PlainTrainer], made: TrainingPlan, connection: Connection) -> None:
    """A peer's ranks as threads of one process, over the threaded group of PyTorch's own tests."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.multi_threaded_pg import _install_threaded_pg

    size = made.topology.world_size
    values, meeting, store = [None] * size, threading.Barrier(size), dist.HashStore()
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    _install_threaded_pg()

    def gather(rank: int, value: Any) -> list[Any]:
        values[rank] = value
        meeting.wait()
        found = list(values)
        meeting.wait()
        return found

    def rank_main(rank: int) -> None:
        torch.set_num_threads(1)
        try:
            dist.init_process_group("threaded", rank=rank, world_size=size, store=store)
            batches = rank_batches(made, rank if made.topology.dp > 1 else 0)
            serve(connection, kind(made), batches, rank == 0, partial(gather, rank))
        except BaseException:
            connection.send(traceback.format_exc())  # the others wait for this rank; the team ends them all

    threads = [threading.Thread(target=rank_main, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def serve_gloo(made: TrainingPlan, connection: Connection) -> None:
    """One of Picotron's processes over gloo."""
    from picotron.runtime.distributed import DistributedBackend

    with DistributedBackend.open("cpu") as backend:
        trainer = PicotronTrainer(made, backend)
        serve(connection, trainer, rank_batches(made, trainer.session.where.dp), True, alone)


def serve_simulated(made: TrainingPlan, connection: Connection) -> None:
    """Picotron's ranks as threads of one process."""
    from picotron.runtime.simulated import simulate

    def rank_main(backend: Backend) -> None:
        trainer = PicotronTrainer(made, backend)
        batches = rank_batches(made, trainer.session.where.dp)
        serve(connection, trainer, batches, backend.rank == 0, backend.gather_objects)

    simulate(rank_main, made.topology.world_size)


ENGINES: dict[str, Callable[[TrainingPlan, Connection], None]] = {
    "torch": partial(serve_peer, PlainTrainer),
    "ddp": partial(serve_peer, DdpTrainer),
    "threaded-ddp": partial(serve_threads, DdpTrainer),
    "threaded-tp": partial(serve_threads, TensorParallelTrainer),
    "torch-pipeline": partial(serve_peer, PipelineTrainer),
    "gloo": serve_gloo,
    "simulated": serve_simulated,
}


def serve_side(case: Case, side: Side, connection: Connection) -> None:
    """One process of a side that trains."""
    ENGINES[side.engine](make_plan(case, side), connection)


def process_main(connection: Connection, main: Callable[[Connection], None]) -> None:
    """What each process runs; what goes wrong is told through the pipe."""
    try:
        main(connection)
    except BaseException:
        connection.send(traceback.format_exc())
        raise


@frozen
class Team:
    """The processes of one side, by their pipes."""

    name: str
    connections: tuple[Connection, ...]

    def obey(self, command: Command) -> Reports:
        """Every process's report. Raises RuntimeError with a process's traceback."""
        for connection in self.connections:
            connection.send(command)
        return tuple(_answer(connection, self.name) for connection in self.connections)


def _answer(connection: Connection, name: str) -> Any:
    if not connection.poll(TIMEOUT_SECONDS):
        raise RuntimeError(f"a process of {name} must answer within {TIMEOUT_SECONDS} s")
    try:
        answer = connection.recv()
    except EOFError:
        raise RuntimeError(f"a process of {name} ended without an answer") from None
    if isinstance(answer, str) and answer != "ready":
        raise RuntimeError(f"a process of {name} failed:\n{answer}")
    return answer


@contextmanager
def team(name: str, main: Callable[[Connection], None], num_processes: int = 1) -> Iterator[Team]:
    """Processes that run ``main``, ready; they end with the block."""
    with children(process_main, num_processes, main) as made:
        for child in made:
            _answer(child.connection, name)
        yield Team(name, tuple(child.connection for child in made))


@contextmanager
def side_team(case: Case, side: Side) -> Iterator[Team]:
    """The processes of a side that trains."""
    with team(str(side), partial(serve_side, case, side), side.num_processes) as made:
        yield made


def take_turns(teams: Sequence[Team], *, rounds: int, steps: int) -> list[list[Reports]]:
    """Each team's reports: of its warm-up, then of its rounds; the teams take turns."""
    taken = [[each.obey(Command(WARMUP_STEPS))] for each in teams]
    for _ in range(rounds):
        for each, reports in zip(teams, taken, strict=True):
            reports.append(each.obey(Command(steps)))
    return taken


def cpu_seconds(reports: Reports) -> float:
    """Of one of what was counted, over all processes."""
    return sum(report.cpu_seconds for report in reports) / reports[0].count


def losses(reports: Sequence[Reports]) -> tuple[float, ...]:
    """Of every step, as the first process saw it."""
    return tuple(loss for each in reports for loss in each[0].losses)


def loss_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """How far the losses of two sides ever were apart."""
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def ratio_interval(above: Sequence[float], below: Sequence[float]) -> tuple[float, float]:
    """The middle 95 % of the ratio of medians, over rounds drawn with replacement.

    A round of one side is drawn together with the other's of the same turn: they share the machine's mood.
    """
    drawn = np.random.default_rng(0).integers(0, len(above), (DRAWS, len(above)))
    ratios = np.median(np.asarray(above)[drawn], axis=1) / np.median(np.asarray(below)[drawn], axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """A table as text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


def _processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _names(known: Mapping[str, object], text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(
            f"rows must be among {', '.join(known)}, separated by commas, got {', '.join(unknown)}"
        )
    return names


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def parser(
    description: str | None, cases: Mapping[str, Case], rows: Mapping[str, object], *, steps: int
) -> argparse.ArgumentParser:
    """The options that benchmarks have in common; ``steps`` in a turn unless told otherwise."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--model", choices=cases, default="W", help="what is trained (default: %(default)s)")
    made.add_argument("--rounds", type=count, default=9, help="turns of each side (default: %(default)s)")
    made.add_argument(
        "--steps-per-round", type=count, default=steps, help="steps in a turn (default: %(default)s)"
    )
    made.add_argument(
        "--rows",
        type=partial(_names, rows),
        default=tuple(rows),
        help=f"which of {', '.join(rows)} (default: all)",
    )
    made.add_argument("--json", type=Path, metavar="FILE", help="write everything measured to FILE")
    return made


def write_report(arguments: argparse.Namespace, case: Case, results: Sequence[Any]) -> None:
    """The JSON, if it was asked for."""
    if arguments.json is None:
        return
    report = {
        "command": ["python", *sys.argv],
        "machine": machine(),
        "model": arguments.model,
        "case": asdict(case),
        "rounds": arguments.rounds,
        "steps_per_round": arguments.steps_per_round,
        "rows": [asdict(result) for result in results],
    }
    arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
