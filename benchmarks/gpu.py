"""A Llama of a billion parameters on one GPU: Picotron's NCCL backend beside plain PyTorch's compiled step.

Both sides train the same model from the same weights on the same batches: bf16 products, fp32 main weights,
fused AdamW, clipping. The peer is ``peers.Llama`` under autocast, ``torch.compile`` and flash attention. They
take turns in one process, since a GPU's clock drifts. Memory is the allocator's own peak, of each side alone,
set against the plan; the step's seconds are set against ``predict``.

Without a GPU there is one line and exit code 2, but for ``--dry-run``, which trains a tiny model on the CPU
over gloo by the same lines; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch
import torch.distributed as dist
from attrs import asdict, field, frozen
from peers import Llama, adamw
from teams import aligned, count, rank_batches, ratio_interval, say
from torch import nn

from picotron.errors import PlanError
from picotron.planner.layout import Placement
from picotron.planner.memory import memory_timeline
from picotron.planner.model import ModelSpec
from picotron.planner.plan import TrainingPlan, plan
from picotron.planner.predict import model_flops, predict
from picotron.planner.workload import Workload
from picotron.runtime.cluster import detect
from picotron.runtime.data import HostBatch
from picotron.runtime.distributed import DistributedBackend, Processes
from picotron.runtime.layout import initial_weights
from picotron.runtime.memory import MemoryTracker, storage_bytes
from picotron.runtime.pipeline import Session
from picotron.runtime.run import check_runnable

WARMUP_STEPS = 3
BILLION = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 32_000}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256}


@frozen(kw_only=True)
class Measured:
    """One side: seconds of a step in each round, tokens a second and MFU by the median, and peak bytes."""

    what: str
    seconds: tuple[float, ...]
    tokens_per_second: float
    mfu: float
    peak_bytes: int
    losses: tuple[float, ...] = field(repr=False)


@frozen(kw_only=True)
class Report:
    """Both sides, and ours beside what the plan says: ratios are measured over planned or predicted.

    ``speed`` is ours over the peer's in tokens a second, with the bootstrap's 95 % interval.
    """

    device: str
    model: str
    num_parameters: int
    ours: Measured
    peer: Measured
    speed: float
    speed_interval: tuple[float, float]
    max_loss_difference: float
    planned_peak_bytes: int
    memory: float
    predicted_seconds: float
    time: float


class Trainer(Protocol):
    """One side."""

    def step(self, batches: Sequence[HostBatch]) -> float:
        """The mean loss."""


def make_plan(arguments: argparse.Namespace) -> TrainingPlan:
    """One rank's plan on the device found here. Raises PlanError where the device has no preset."""
    tiny = arguments.dry_run
    sizes = TINY if tiny else BILLION
    seq_len = 32 if tiny else 4096
    heads = {"num_attention_heads": 4 if tiny else 32, "num_key_value_heads": 2 if tiny else 8}
    config: dict[str, Any] = {
        "model_type": "llama",
        "max_position_embeddings": seq_len,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        **sizes,
        **heads,
    }
    work = Workload(
        global_batch=arguments.batch,
        seq_len=seq_len,
        precision="fp32" if tiny else "bf16",
        learning_rate=1e-4,
        max_grad_norm=1.0,
    )
    cluster = detect(1, kind="cpu" if tiny else "cuda")
    made = plan(
        ModelSpec.from_hf(config),
        cluster,
        work,
        dp=1,
        micro_batch=arguments.micro_batch,
        compile=not (tiny or arguments.eager),
    )
    check_runnable(made, "gloo" if tiny else "nccl")
    return made


class Ours:
    """Picotron's session on a backend of one rank."""

    def __init__(self, made: TrainingPlan, backend: DistributedBackend) -> None:
        self.session = Session(made, backend)

    def step(self, batches: Sequence[HostBatch]) -> float:
        """The mean loss."""
        return self.session.step(batches).loss


class Peer:
    """Plain PyTorch: fp32 weights, bf16 products by autocast, the whole module compiled."""

    def __init__(self, made: TrainingPlan, device: torch.device, *, compiled: bool) -> None:
        draw = initial_weights(made)
        module = Llama(made.model, made.workload.seq_len)
        module.load_state_dict({p.name: _fp32(draw(p), p) for p in made.layout})
        module.to(device)
        self.device, self.made = device, made
        self.parameters = list(module.parameters())
        self.optimizer = adamw(module, made.workload)
        self.module: nn.Module = torch.compile(module) if compiled else module  # type: ignore[assignment]

    def step(self, batches: Sequence[HostBatch]) -> float:
        """The mean loss."""
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for batch in batches:
            ids, targets = (self._on_device(array) for array in (batch.ids, batch.targets))
            with self._precision(), self._attention():
                loss = self.module(ids, targets) / len(batches)
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.parameters, self.made.workload.max_grad_norm)
        self.optimizer.step()
        return total.item()

    def _on_device(self, array: Any) -> torch.Tensor:
        source = torch.from_numpy(array)
        return source.pin_memory().to(self.device, non_blocking=True) if self._is_cuda else source

    @property
    def _is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def _precision(self) -> AbstractContextManager[object]:
        return torch.autocast("cuda", dtype=torch.bfloat16) if self._is_cuda else nullcontext()

    def _attention(self) -> AbstractContextManager[object]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        return sdpa_kernel(SDPBackend.FLASH_ATTENTION) if self._is_cuda else nullcontext()


def _fp32(tensor: torch.Tensor, placement: Placement) -> torch.Tensor:
    assert tensor.shape == torch.Size(placement.shape)
    return tensor.to(torch.float32)


def peak_bytes(trainer: Trainer, batches: Sequence[HostBatch], before: int) -> int:
    """The most bytes that are allocated in a step, beyond what was before the side was made."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        trainer.step(batches)
        return torch.cuda.max_memory_allocated() - before
    if isinstance(trainer, Ours):
        result = trainer.session.step(batches, measure_memory=True)
        assert result.memory is not None
        return result.memory.max_bytes
    assert isinstance(trainer, Peer)
    with MemoryTracker(trainer.parameters) as tracker:
        trainer.step(batches)
    states = [v for state in trainer.optimizer.state.values() for v in state.values()]
    return tracker.peak_bytes + storage_bytes(v for v in states if isinstance(v, torch.Tensor))


def allocated() -> int:
    """Bytes that are allocated now, the matrix library's workspace having been."""
    if not torch.cuda.is_available():
        return 0
    one = torch.ones(16, 16, device="cuda", dtype=torch.bfloat16)
    torch.mm(one, one)
    return torch.cuda.memory_allocated()


def timed(trainer: Trainer, batches: Sequence[Sequence[HostBatch]]) -> tuple[float, list[float]]:
    """Seconds of one of the steps over ``batches``, and the losses; every step ends by reading its loss."""
    started = time.perf_counter()
    losses = [trainer.step(batch) for batch in batches]
    return (time.perf_counter() - started) / len(batches), losses


def measure(made: TrainingPlan, backend: DistributedBackend, arguments: argparse.Namespace) -> Report:
    """Both sides: warm up and memory one after the other, then rounds by turns."""
    batches = rank_batches(made, 0)
    trainers: list[Trainer] = []
    peaks, losses = [], []
    for make in (
        lambda: Ours(made, backend),
        lambda: Peer(made, backend.device, compiled=not arguments.eager_peer),
    ):
        before = allocated()
        trainer: Trainer = make()
        say(f"warming up {type(trainer).__name__.lower()}")
        _, first = timed(trainer, batches[:WARMUP_STEPS])
        peaks.append(peak_bytes(trainer, batches[WARMUP_STEPS], before))
        trainers.append(trainer)
        losses.append(first)
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(arguments.rounds):
        chosen = [
            batches[(turn * arguments.steps_per_round + i) % len(batches)]
            for i in range(arguments.steps_per_round)
        ]
        for side, trainer in enumerate(trainers):
            spent, more = timed(trainer, chosen)
            seconds[side].append(spent)
            losses[side] += more
        say(f"round {turn + 1}: {seconds[0][-1]:.4f} s, peer {seconds[1][-1]:.4f} s")
    names = (
        "Picotron" + (", compiled" if made.compile else ""),
        "PyTorch" + ("" if arguments.eager_peer else ", compiled"),
    )
    sides = [_measured(made, *of_side) for of_side in zip(names, seconds, peaks, losses, strict=True)]
    return _report(made, *sides)


def _measured(
    made: TrainingPlan, what: str, seconds: Sequence[float], peak: int, losses: Sequence[float]
) -> Measured:
    typical = median(seconds)
    prediction = predict(made)
    peak_flops = model_flops(made, "full") / prediction.step_seconds / prediction.mfu
    return Measured(
        what=what,
        seconds=tuple(seconds),
        tokens_per_second=made.workload.global_batch * made.workload.seq_len / typical,
        mfu=model_flops(made, "full") / typical / peak_flops,
        peak_bytes=peak,
        losses=tuple(losses),
    )


def _report(made: TrainingPlan, ours: Measured, peer: Measured) -> Report:
    prediction, planned = predict(made), memory_timeline(made, 0).max_bytes
    return Report(
        device=made.cluster.device.name,
        model=made.model.name,
        num_parameters=sum(torch.Size(p.shape).numel() for p in made.layout),
        ours=ours,
        peer=peer,
        speed=ours.tokens_per_second / peer.tokens_per_second,
        speed_interval=ratio_interval(peer.seconds, ours.seconds),
        max_loss_difference=max(abs(a - b) for a, b in zip(ours.losses, peer.losses, strict=True)),
        planned_peak_bytes=planned,
        memory=ours.peak_bytes / planned,
        predicted_seconds=prediction.step_seconds,
        time=median(ours.seconds) / prediction.step_seconds,
    )


def table(report: Report) -> str:
    """For a person."""
    sides = [
        (side.what, f"{side.tokens_per_second:,.0f}", f"{side.mfu:.1%}", f"{side.peak_bytes / 1e9:.3f}")
        for side in (report.ours, report.peer)
    ]
    low, high = report.speed_interval
    lines = [
        f"{report.num_parameters / 1e9:.3f} billion parameters on {report.device}",
        aligned([("side", "tokens/s", "MFU", "peak GB"), *sides]),
        f"speed {report.speed:.3f} of the peer's ({low:.3f} to {high:.3f}); at least 1 is aimed at",
        f"peak {report.memory:.4f} of the plan's {report.planned_peak_bytes:,} bytes; 0.95 to 1 is aimed at",
        f"step {report.time:.3f} of the predicted {report.predicted_seconds:.4g} s; 0.9 to 1.1 is aimed at",
        f"losses at most {report.max_loss_difference:.2g} apart",
    ]
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--batch", type=count, default=8, help="sequences of a step (default: %(default)s)")
    made.add_argument("--micro-batch", type=count, default=2, help="sequences at once (default: %(default)s)")
    made.add_argument("--rounds", type=count, default=11, help="turns of each side (default: %(default)s)")
    made.add_argument(
        "--steps-per-round", type=count, default=4, help="steps in a turn (default: %(default)s)"
    )
    made.add_argument("--eager", action="store_true", help="our side without compile=True")
    made.add_argument("--eager-peer", action="store_true", help="leave the peer's torch.compile out")
    made.add_argument("--dry-run", action="store_true", help="a tiny model on the CPU: does it run at all?")
    made.add_argument("--json", type=Path, metavar="FILE", help="write everything measured to FILE")
    return made


def main() -> int:
    """Measure, print the table, write the JSON; the exit code."""
    arguments = parser().parse_args()
    if not arguments.dry_run and not torch.cuda.is_available():
        say("this benchmark needs a CUDA device, and torch sees none; --dry-run tries it out on the CPU")
        return 2
    try:
        made = make_plan(arguments)
    except PlanError as error:
        say(str(error))
        return 2
    if arguments.dry_run:
        torch.set_num_threads(1)
    alone = Processes(rank=0, world_size=1, local_rank=0, store=dist.HashStore())
    with DistributedBackend(alone, device="cpu" if arguments.dry_run else "cuda") as backend:
        report = measure(made, backend, arguments)
    print(table(report))
    if arguments.json is not None:
        text = json.dumps(asdict(report), indent=2)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
