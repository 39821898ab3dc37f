"""``picotron train``: run a plan, keep everything it leaves, and close with predicted beside measured."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from picotron.cli.common import Subparsers, command, read_plan, write_json, write_out
from picotron.errors import PlanError
from picotron.planner.faults import fault_from_text
from picotron.planner.model import ModelSpec
from picotron.planner.plan import TrainingPlan, plan
from picotron.planner.predict import predict
from picotron.planner.serialize import fingerprint
from picotron.planner.workload import Workload

if TYPE_CHECKING:
    from picotron.runtime.data import Dataset
    from picotron.runtime.pipeline import StepResult
    from picotron.runtime.train import Report

DEFAULT_MODEL = "llama-tiny"
DEFAULT_WORKLOAD = Workload(
    global_batch=16,
    seq_len=128,
    precision="fp32",
    learning_rate=3e-3,
    warmup_steps=10,
    decay_steps=80,
)
DEFAULT_MICRO_BATCH = 2


def add_parser(subparsers: Subparsers) -> None:
    """Declare ``picotron train``."""
    parser = command(
        subparsers,
        "train",
        _execute,
        summary="train a plan: simulated ranks in this process, or one rank a process under torchrun",
        example="picotron train plan.json --data book.txt --steps 200 --out runs/book",
        json_help="print what was measured as JSON, instead of pictures",
    )
    parser.add_argument(
        "plan",
        metavar="PLAN",
        nargs="?",
        help=f"a plan's file, or -; left out: {DEFAULT_MODEL} on 8 ranks (dp=2, pp=2, tp=2)",
    )
    parser.add_argument(
        "--data", metavar="PATH", help="a text file or folder, read as bytes; left out: Python's own library"
    )
    parser.add_argument("--steps", type=int, default=60, help="training steps (default: 60)")
    parser.add_argument("--out", metavar="FOLDER", help="the run's own folder (default: a new one in runs/)")
    parser.add_argument("--save-every", type=int, default=20, metavar="N", help="steps between saved weights")
    parser.add_argument("--weights", metavar="PATH", help="safetensors file or folder to start from")
    parser.add_argument(
        "--backend",
        choices=("simulated", "gloo", "nccl"),
        help="default: simulated; under torchrun nccl with a GPU for each process, else gloo",
    )
    parser.add_argument(
        "--timeout-seconds",
        type=float,
        metavar="S",
        help="how long one operation may take (default: 600; of simulated ranks, the whole run: no limit); "
        "a rank that dies ends the others within 6 s, whatever this says",
    )
    simulated = parser.add_argument_group("simulated ranks only")
    simulated.add_argument(
        "--seed", type=int, default=0, help="which interleaving the ranks take (default: 0)"
    )
    simulated.add_argument(
        "--semantics",
        choices=("buffered", "rendezvous", "batched"),
        help="when a send is complete (default: rendezvous, when its receive is posted)",
    )
    simulated.add_argument(
        "--fault",
        metavar="KIND:NAME=VALUE,...",
        action="append",
        default=[],
        help="what goes wrong, such as kill:rank=3,at=17,step=1, where at is a row of the rank's program; "
        "kinds: kill, pause, slow, corrupt, drop, outofmemory; may be given more than once",
    )
    simulated.add_argument(
        "--memory-bytes", type=int, metavar="N", help="what each rank's device holds (default: no limit)"
    )
    simulated.add_argument(
        "--device", metavar="DEVICE", help="cpu (default), or cuda: all ranks share one GPU, and take turns"
    )


def default_plan() -> TrainingPlan:
    """The plan that ``picotron train`` runs when it is given none, priced for this machine."""
    from picotron.runtime.cluster import calibrate

    cluster = calibrate(seconds=1.0, num_ranks=8)
    return plan(
        ModelSpec.from_hf(DEFAULT_MODEL),
        cluster,
        DEFAULT_WORKLOAD,
        micro_batch=DEFAULT_MICRO_BATCH,
        dp=2,
        pp=2,
        tp=2,
    )


def environment_number(name: str, default: int) -> int:
    """The whole number that the launcher put into the environment. Raises PlanError for anything else."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise PlanError(
            f"the environment's {name} must be a whole number, got {text!r}; launch with torchrun"
        )
    return int(text)


def chosen_backend(asked: str | None) -> str:
    """What the user named; else what the launcher makes plain."""
    if asked is not None:
        return asked
    if "RANK" not in os.environ:
        return "simulated"
    import torch

    ranks_here = environment_number("LOCAL_WORLD_SIZE", environment_number("WORLD_SIZE", 1))
    return "nccl" if torch.cuda.is_available() and torch.cuda.device_count() >= ranks_here else "gloo"


def _execute(arguments: argparse.Namespace) -> None:
    if arguments.plan is None and "RANK" in os.environ:
        raise PlanError("under torchrun every rank must have the same plan, got none; name a plan's file")
    _check_torch()
    from picotron.runtime.compare import compare
    from picotron.runtime.record import finite_or_none
    from picotron.runtime.train import check_request, new_run_folder, train
    from picotron.runtime.weights import saved_weights

    first = environment_number("RANK", 0) == 0
    talk = first and not arguments.json
    if talk and arguments.plan is None:
        print("measuring this machine for the estimate ...", file=sys.stderr)
    chosen = default_plan() if arguments.plan is None else read_plan(arguments.plan)
    dataset = _dataset(arguments.data, chosen.workload.seq_len)
    folder = Path(arguments.out) if arguments.out is not None else new_run_folder("runs", chosen.model.name)
    backend = chosen_backend(arguments.backend)
    weights = None if arguments.weights is None else saved_weights(arguments.weights)
    if first:
        check_request(
            chosen,
            dataset,
            folder,
            steps=arguments.steps,
            backend=backend,
            save_every=arguments.save_every,
        )
    if talk:
        write_out(str(chosen))
        write_out(f"\ntraining {arguments.steps} steps into {folder} ...")
    measurement = train(
        chosen,
        dataset,
        folder,
        steps=arguments.steps,
        backend=backend,
        save_every=arguments.save_every,
        weights=weights,
        report=_progress(arguments.steps) if talk else None,
        seed=arguments.seed,
        **_world(arguments),
    )
    if measurement is None or not first:
        return
    comparison = compare(predict(chosen), measurement)
    if arguments.json:
        write_json(
            {
                "folder": str(folder),
                "fingerprint": fingerprint(chosen),
                "first_loss": finite_or_none(measurement.losses[0]),
                "last_loss": finite_or_none(measurement.losses[-1]),
                "skipped_steps": list(measurement.skipped),
                "promises_kept": comparison.promises_kept,
            }
        )
        return
    write_out(f"\nloss {measurement.losses[0]:.4f} -> {measurement.losses[-1]:.4f} nat\n")
    if measurement.skipped:
        which = ", ".join(map(str, measurement.skipped))
        write_out(f"steps skipped, their loss or gradient norm not being finite: {which}\n")
    write_out(f"predicted beside measured (step {measurement.measured_step}):\n{comparison}")
    write_out(f"\neverything is in {folder}; the plan runs unchanged on processes of its own:")
    world = chosen.topology.world_size
    write_out(f"  torchrun --nproc-per-node {world} -m picotron train {folder}/plan.json")


def _world(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was asked of the world that the ranks are in."""
    asked = {
        "semantics": arguments.semantics,
        "faults": [fault_from_text(text) for text in arguments.fault],
        "memory_bytes": arguments.memory_bytes,
        "device": arguments.device,
        "timeout_seconds": arguments.timeout_seconds,
    }
    return {name: value for name, value in asked.items() if value is not None and value != []}


def _check_torch() -> None:
    try:
        import torch  # noqa: F401
    except ImportError:
        raise PlanError(
            "training needs torch, which is not installed; pip install 'picotron[torch]'"
        ) from None


def _dataset(path: str | None, seq_len: int) -> Dataset:
    from picotron.runtime.data import byte_text, standard_library_text

    return standard_library_text(seq_len) if path is None else byte_text(path, seq_len)


def _progress(steps: int) -> Report:
    """A report that rewrites one line on a terminal, and prints every tenth step elsewhere."""
    live = sys.stderr.isatty()

    def report(result: StepResult, seconds: float, left: float) -> None:
        done = result.step + 1
        rate = result.num_tokens / seconds if seconds > 0 else 0.0
        text = (
            f"step {done:>{len(str(steps))}}/{steps}  loss {result.loss:.4f}  "
            f"grad norm {result.grad_norm:.3f}  {rate:,.0f} tokens/s  {left:.0f} s left"
            f"{'  skipped' if result.skipped else ''}"
        )
        if live:
            print(f"\r{text:<90}", end="\n" if done == steps else "", file=sys.stderr, flush=True)
        elif result.skipped or done == 1 or done % 10 == 0 or done == steps:
            print(text, file=sys.stderr, flush=True)

    return report
