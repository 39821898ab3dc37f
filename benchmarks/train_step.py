"""Speed and memory of Picotron's training step beside plain PyTorch's, in one run of one script.

Each row sets two sides against each other, which take turns: a round of one, a round of the other, and so on.
Every side is one or more processes of its own that were started before, with one thread for torch each;
those whose turn it is not wait on a pipe. A round is some training steps; what counts is the CPU time of all
processes of a side, since wall time on a shared machine says little. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np
import torch
from attrs import asdict, field, frozen
from peers import DdpTrainer, PlainTrainer

from picotron.planner.cluster import ClusterSpec
from picotron.planner.model import ModelSpec
from picotron.planner.plan import TrainingPlan, plan
from picotron.planner.workload import Workload
from picotron.runtime.backend import Backend
from picotron.runtime.data import ByteText, HostBatch, standard_library_text, step_batches
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


CASES = {
    "W": Case(hidden=256, layers=8, heads=4, intermediate=688, seq_len=256),
    "tiny": Case(hidden=32, layers=2, heads=4, intermediate=48, seq_len=16),
}


@frozen
class Side:
    """What one side runs: an engine of ENGINES and the arguments of its plan."""

    engine: str
    parallel: dict[str, Any] = field(factory=dict)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return math.prod(self.parallel.get(axis, 1) for axis in ("dp", "pp", "tp"))

    @property
    def num_processes(self) -> int:
        """Simulated ranks are threads of one process."""
        return 1 if self.engine == "simulated" else self.world_size

    def __str__(self) -> str:
        engine = {"torch": "plain PyTorch", "ddp": "DDP"}.get(self.engine, f"Picotron, {self.engine}")
        degrees = " ".join(f"{axis}{n}" for axis in ("dp", "pp", "tp") if (n := self.parallel.get(axis)))
        sequence = ", sequence parallel" if self.parallel.get("sequence_parallel") else ""
        return (
            f"{engine}{' ' if degrees else ''}{degrees}{sequence}, microbatch {self.parallel['micro_batch']}"
        )


@frozen
class Row:
    """A line of the table."""

    ours: Side
    peer: Side


def _row(ours: str, parallel: dict[str, Any], peer: str = "torch", peer_micro_batch: int = 1) -> Row:
    """Without ``micro_batch`` the microbatch is one sample; DDP has the ranks that we have."""
    theirs = {"dp": parallel["dp"]} if peer == "ddp" else {}
    return Row(
        Side(ours, {"micro_batch": 1, **parallel}), Side(peer, {"micro_batch": peer_micro_batch, **theirs})
    )


CUBE = {"dp": 2, "pp": 2, "tp": 2, "sequence_parallel": False}
WHOLE = {"tp": 2, "micro_batch": 8, "sequence_parallel": False}
ROWS = {
    "control": _row("torch", {}),
    "single": _row("simulated", {}),
    "single-full": _row("simulated", {"micro_batch": 8}, peer_micro_batch=8),
    "ddp": _row("gloo", {"dp": 2}, "ddp"),
    "ddp-full": _row("gloo", {"dp": 2, "micro_batch": 4}, "ddp", peer_micro_batch=4),
    "pp2-simulated": _row("simulated", {"pp": 2}),
    "pp2-gloo": _row("gloo", {"pp": 2}),
    "tp2-simulated": _row("simulated", WHOLE, peer_micro_batch=8),
    "tp2-gloo": _row("gloo", WHOLE, peer_micro_batch=8),
    "tp2-sp-gloo": _row("gloo", {**WHOLE, "sequence_parallel": True}, peer_micro_batch=8),
    "dp2-pp2-tp2-simulated": _row("simulated", CUBE),
    "dp2-pp2-tp2-gloo": _row("gloo", CUBE),
}


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


@frozen(kw_only=True)
class Report:
    """What one process did on command. ``peak_bytes`` are its ranks', after a measured step."""

    cpu_seconds: float
    wall_seconds: float
    losses: tuple[float, ...]
    peak_bytes: tuple[int, ...] = ()


@frozen
class Command:
    """Take ``steps`` steps, or one whose memory is measured."""

    steps: int
    measured: bool = False


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
                Report(cpu_seconds=cpu, wall_seconds=wall, losses=tuple(losses), peak_bytes=tuple(peaks))
            )


def alone(value: object) -> list[Any]:
    """What a rank that is a process gathers within it."""
    return [value]


def serve_peer(kind: type[PlainTrainer], made: TrainingPlan, connection: Connection) -> None:
    """A process of plain PyTorch or of DDP."""
    serve(connection, kind(made), rank_batches(made, int(os.environ["RANK"])), True, alone)


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
    "gloo": serve_gloo,
    "simulated": serve_simulated,
}


def process_main(connection: Connection, environment: dict[str, str], case: Case, side: Side) -> None:
    """What each process runs; what goes wrong is told through the pipe."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        ENGINES[side.engine](make_plan(case, side), connection)
    except BaseException:
        connection.send(traceback.format_exc())
        raise


@frozen
class Team:
    """The processes of one side, by their pipes."""

    side: Side
    connections: tuple[Connection, ...]

    def obey(self, command: Command) -> tuple[Report, ...]:
        """Every process's report. Raises RuntimeError with a process's traceback."""
        for connection in self.connections:
            connection.send(command)
        return tuple(_answer(connection, self.side) for connection in self.connections)


def _answer(connection: Connection, side: Side) -> Any:
    if not connection.poll(TIMEOUT_SECONDS):
        raise RuntimeError(f"a process of {side} must answer within {TIMEOUT_SECONDS} s")
    try:
        answer = connection.recv()
    except EOFError:
        raise RuntimeError(f"a process of {side} ended without an answer") from None
    if isinstance(answer, str) and answer != "ready":
        raise RuntimeError(f"a process of {side} failed:\n{answer}")
    return answer


@contextmanager
def team(case: Case, side: Side) -> Iterator[Team]:
    """The processes of ``side``, ready; they end with the block."""
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # port 0: one that is free
    context = multiprocessing.get_context("spawn")
    connections, processes = [], []
    try:
        for rank in range(side.num_processes):
            here, there = context.Pipe()
            environment = _environment(rank, side.num_processes, store.port)
            process = context.Process(target=process_main, args=(there, environment, case, side), daemon=True)
            process.start()
            there.close()
            connections.append(here)
            processes.append(process)
        for connection in connections:
            _answer(connection, side)
        yield Team(side, tuple(connections))
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
        for connection in connections:
            connection.close()


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
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


@frozen(kw_only=True)
class Measured:
    """One side of a row: seconds of a step in each round, ``cpu_seconds`` summed over the ranks."""

    what: str
    world_size: int
    cpu_seconds: tuple[float, ...]
    wall_seconds: tuple[float, ...]
    tokens_per_cpu_second: float
    tokens_per_wall_second: float
    peak_bytes_by_rank: tuple[int, ...]
    losses: tuple[float, ...] = field(repr=False)


@frozen(kw_only=True)
class Result:
    """A row, measured; ratios are ours over the peer's.

    ``speed`` is of tokens per CPU second, with the bootstrap's 95 % interval, ``wall_speed`` of tokens per
    wall second, ``memory`` of the fullest ranks' peaks.
    """

    row: str
    ours: Measured
    peer: Measured
    speed: float
    speed_interval: tuple[float, float]
    wall_speed: float
    memory: float
    max_loss_difference: float


def measure(name: str, case: Case, *, rounds: int, steps: int) -> Result:
    """Both sides of a row by turns, then a step of each whose memory is measured."""
    row = ROWS[name]
    with team(case, row.ours) as ours, team(case, row.peer) as peer:
        teams = (ours, peer)
        warm = [each.obey(Command(WARMUP_STEPS)) for each in teams]
        turns: tuple[list[Any], list[Any]] = ([], [])
        for _ in range(rounds):
            for each, taken in zip(teams, turns, strict=True):
                taken.append(each.obey(Command(steps)))
        last = [each.obey(Command(1, measured=True)) for each in teams]
    tokens = case.global_batch * case.seq_len
    sides = [
        _measured(each.side, [first, *taken, end], steps, tokens)
        for each, first, taken, end in zip(teams, warm, turns, last, strict=True)
    ]
    return compared(name, *sides)


def _measured(side: Side, reports: Sequence[tuple[Report, ...]], steps: int, tokens: int) -> Measured:
    """From every process's reports of warm-up, rounds and measured step."""
    timed, last = reports[1:-1], reports[-1]
    cpu = tuple(sum(report.cpu_seconds for report in each) / steps for each in timed)
    wall = tuple(max(report.wall_seconds for report in each) / steps for each in timed)
    return Measured(
        what=str(side),
        world_size=side.world_size,
        cpu_seconds=cpu,
        wall_seconds=wall,
        tokens_per_cpu_second=tokens / median(cpu),
        tokens_per_wall_second=tokens / median(wall),
        peak_bytes_by_rank=tuple(peak for report in last for peak in report.peak_bytes),
        losses=tuple(loss for each in reports for loss in each[0].losses),
    )


def compared(name: str, ours: Measured, peer: Measured) -> Result:
    """The row's ratios."""
    return Result(
        row=name,
        ours=ours,
        peer=peer,
        speed=ours.tokens_per_cpu_second / peer.tokens_per_cpu_second,
        speed_interval=speed_interval(ours.cpu_seconds, peer.cpu_seconds),
        wall_speed=ours.tokens_per_wall_second / peer.tokens_per_wall_second,
        memory=max(ours.peak_bytes_by_rank) / max(peer.peak_bytes_by_rank),
        max_loss_difference=max(abs(a - b) for a, b in zip(ours.losses, peer.losses, strict=True)),
    )


def speed_interval(ours: Sequence[float], peer: Sequence[float]) -> tuple[float, float]:
    """The middle 95 % of the ratio of medians, over rounds drawn with replacement.

    A round of ours is drawn together with the peer's that followed it: they share the machine's mood.
    """
    drawn = np.random.default_rng(0).integers(0, len(ours), (DRAWS, len(ours)))
    ratios = np.median(np.asarray(peer)[drawn], axis=1) / np.median(np.asarray(ours)[drawn], axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)


HEADINGS = (
    "row",
    "CPU ms/step",
    "peer's",
    "tokens/CPU s",
    "peer's",
    "speed",
    "95 %",
    "wall (hint)",
    "MB/rank",
    "peer's",
    "memory",
    "loss differs",
)


def table(results: Sequence[Result]) -> str:
    """The results as text, a line each."""
    lines = [HEADINGS, *map(_cells, results)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _cells(result: Result) -> tuple[str, ...]:
    ours, peer, (low, high) = result.ours, result.peer, result.speed_interval
    return (
        result.row,
        f"{median(ours.cpu_seconds) * 1e3:.1f}",
        f"{median(peer.cpu_seconds) * 1e3:.1f}",
        f"{ours.tokens_per_cpu_second:.0f}",
        f"{peer.tokens_per_cpu_second:.0f}",
        f"{result.speed:.3f}",
        f"{low:.3f}-{high:.3f}",
        f"{result.wall_speed:.2f}",
        f"{max(ours.peak_bytes_by_rank) / 1e6:.2f}",
        f"{max(peer.peak_bytes_by_rank) / 1e6:.2f}",
        f"{result.memory:.3f}",
        f"{result.max_loss_difference:.1e}",
    )


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


def _rows(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in ROWS]:
        raise argparse.ArgumentTypeError(
            f"rows must be among {', '.join(ROWS)}, separated by commas, got {', '.join(unknown)}"
        )
    return names


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", choices=CASES, default="W", help="what is trained (default: %(default)s)")
    made.add_argument("--rounds", type=_count, default=9, help="turns of each side (default: %(default)s)")
    made.add_argument(
        "--steps-per-round", type=_count, default=2, help="steps in a turn (default: %(default)s)"
    )
    made.add_argument(
        "--rows", type=_rows, default=tuple(ROWS), help=f"which of {', '.join(ROWS)} (default: all)"
    )
    made.add_argument("--json", type=Path, metavar="FILE", help="write everything measured to FILE")
    return made


def main() -> None:
    """Measure the rows asked for, print the table, write the JSON."""
    arguments = parser().parse_args()
    results = []
    for name in arguments.rows:
        print(f"{name}: {ROWS[name].ours} against {ROWS[name].peer}", file=sys.stderr, flush=True)
        started = time.perf_counter()
        result = measure(
            name, CASES[arguments.model], rounds=arguments.rounds, steps=arguments.steps_per_round
        )
        spent = time.perf_counter() - started
        print(
            f"  speed {result.speed:.3f}, memory {result.memory:.3f} ({spent:.0f} s)",
            file=sys.stderr,
            flush=True,
        )
        results.append(result)
    print(table(results))
    if arguments.json is not None:
        report = {
            "command": ["python", *sys.argv],
            "machine": machine(),
            "model": arguments.model,
            "case": asdict(CASES[arguments.model]),
            "rounds": arguments.rounds,
            "steps_per_round": arguments.steps_per_round,
            "rows": [asdict(result) for result in results],
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
