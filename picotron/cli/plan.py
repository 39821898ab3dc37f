"""``picotron plan``: a plan from flags that bear the names of ``plan`` and of the fields of ``Workload``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from attrs import NOTHING, fields

from picotron.cli.common import (
    STANDARD,
    Subparsers,
    command,
    integers,
    modes,
    names,
    read_orders,
    truths,
    write_out,
    write_result,
)
from picotron.planner.body import TensorOverlap
from picotron.planner.catalogue import SCHEDULES
from picotron.planner.cluster import ClusterSpec
from picotron.planner.context import CONTEXTS
from picotron.planner.model import ModelSpec
from picotron.planner.pipeline import Schedule, schedule_of
from picotron.planner.plan import plan
from picotron.planner.serialize import plan_to_json
from picotron.planner.sharding import ACCUMULATES, RESHARDS
from picotron.planner.workload import Workload

EXAMPLE = (
    "picotron plan llama-3.1-70b --cluster h100:16x8 --global-batch 1024 --seq-len 8192 "
    "--tp 8 --pp 4 --dp 4 -o plan.json"
)
_INTEGER: dict[str, Any] = {"type": int, "metavar": "N"}
PLAN_FLAGS: dict[str, tuple[dict[str, Any], str]] = {
    "dp": (_INTEGER, "data-parallel degree (default: the devices that the others leave)"),
    "pp": (_INTEGER, "pipeline ranks (default 1)"),
    "cp": (_INTEGER, "context-parallel degree (default 1)"),
    "tp": (_INTEGER, "tensor-parallel degree (default 1)"),
    "ep": (_INTEGER, "expert-parallel degree, which cuts the same ranks again (default 1)"),
    "etp": (_INTEGER, "tensor-parallel degree of the experts (default 1)"),
    "order": ({"type": names, "metavar": "AXES"}, "axes, slowest first (default pp,dp,cp,tp)"),
    "schedule": ({}, f"{', '.join(SCHEDULES)}, or a .csv file of orders (default 1f1b)"),
    "virtual_stages": (_INTEGER, "stages of each pipeline rank (default: what the schedule has by itself)"),
    "micro_batch": (_INTEGER, "sequences of a microbatch (default 1)"),
    "sequence_parallel": (
        {"action": argparse.BooleanOptionalAction},
        "cut the tokens between tensor-parallel regions too (default: where it can)",
    ),
    "context": (
        {"choices": CONTEXTS},
        "how context-parallel ranks share sequences: keys and values go round them, or heads for tokens are "
        "exchanged (default ring, where it can)",
    ),
    "loss_chunks": (_INTEGER, "parts of a microbatch's tokens whose logits are made at a time (default 1)"),
    "tensor_overlap": (
        {"choices": get_args(TensorOverlap)},
        "what multiplies while tp ranks communicate: weights' gradients while an input's is summed; chunked: "
        "that, and a chunk of tokens while the next is gathered (default none)",
    ),
    "compile": (
        {"action": argparse.BooleanOptionalAction},
        "compile RMS norms, gates and the loss into one kernel each (default: no)",
    ),
    "stage_layers": ({"type": integers, "metavar": "LAYERS"}, "layers of each stage, as in 20,20,20,20"),
    "bucket_bytes": (_INTEGER, "bytes of a gradient bucket"),
    "zero_stage": (
        _INTEGER,
        "what data-parallel ranks share: 1 optimizer state, 2 gradients too, 3 parameters too (default 0)",
    ),
    "shard": (_INTEGER, "data-parallel ranks that share one sharded copy (default: all dp * cp)"),
    "accumulate": (
        {"choices": ACCUMULATES},
        "gradients of ZeRO 2 and 3: reduced into parts in every microbatch, or full until the last (default "
        "sharded)",
    ),
    "reshard": (
        {"choices": RESHARDS},
        "what parameters of ZeRO 3 are gathered for: an embedding, layer or head at a time, or a stage while "
        "consecutive cells use it (default unit)",
    ),
    "recompute": (
        {"type": modes, "metavar": "MODE"},
        "what backward computes again: none, selective (the attention core) or full, or one for each layer, "
        "as in full*8,none*24 (default none)",
    ),
    "offload": (
        {"type": truths, "nargs": "?", "const": True, "metavar": "LAYERS"},
        "keep saved activations in host memory; of some layers, as in yes*8,no*24",
    ),
    "foreign": (
        {"type": names, "metavar": "SEGMENTS"},
        'segments that a module of your own computes, as in "mlp 0,attention 1" (default none)',
    ),
}
WORKLOAD_HELP = {
    "global_batch": "sequences of a step, over all ranks",
    "seq_len": "tokens of a sequence",
    "precision": "number format; bf16 keeps fp32 main weights",
    "optimizer": "what updates the weights",
    "learning_rate": "the highest learning rate",
    "weight_decay": "decoupled weight decay",
    "beta1": "decay of the first moment",
    "beta2": "decay of the second moment",
    "warmup_steps": "steps over which the learning rate rises",
    "decay_steps": "step at which the learning rate has fallen to its least (0: it stays)",
    "min_learning_rate_ratio": "the least learning rate, as a share of the highest",
    "max_grad_norm": "gradients are clipped to this norm (0: they are not)",
    "gradient_dtype": "what gradients are accumulated in (default: fp32, and fp64 in fp64)",
    "reduce_dtype": "what gradients travel in between ranks (default: as they are kept)",
    "max_skipped_steps": "steps in a row without a finite loss that are passed over; one more ends the run",
    "seed": "of the initial weights and the order of samples",
}


def add_parser(subparsers: Subparsers) -> None:
    """Declare ``picotron plan``."""
    parser = command(
        subparsers,
        "plan",
        _execute,
        summary="make a plan, print it and save it",
        example=EXAMPLE,
        json_help="print the plan's JSON in place of its picture",
    )
    add_request(parser, "the plan")
    degrees = parser.add_argument_group("how the work is divided")
    for name, (options, words) in PLAN_FLAGS.items():
        degrees.add_argument(_flag(name), default=argparse.SUPPRESS, help=words, **options)
    add_workload(parser.add_argument_group("what is trained, and how"))


def add_request(parser: argparse.ArgumentParser, saved: str) -> None:
    """Declare what is asked for a model on a cluster, and where ``saved`` goes."""
    parser.add_argument("model", metavar="MODEL", help="a preset's name, or a path to a config.json")
    parser.add_argument("--cluster", required=True, help="h100, h100:16x8 (nodes x devices) or a .json file")
    parser.add_argument("-o", "--output", metavar="FILE", help=f"save {saved}; - prints its JSON")


def add_workload(group: Any) -> None:
    """One flag for each field of Workload."""
    types = get_type_hints(Workload)
    for attribute in fields(Workload):
        required = attribute.default is NOTHING
        words = WORKLOAD_HELP.get(attribute.name, attribute.name.replace("_", " "))
        group.add_argument(
            _flag(attribute.name),
            required=required,
            default=argparse.SUPPRESS,
            help=words if required or attribute.default is None else f"{words} (default {attribute.default})",
            **_accepted(types[attribute.name]),
        )


def _accepted(kind: Any) -> dict[str, Any]:
    """What argparse must know of a field's type: a number's, or the names of a Literal (or None)."""
    if get_origin(kind) is None:
        return {"type": kind, "metavar": "N"}
    return {"choices": get_args(kind if get_origin(kind) is Literal else get_args(kind)[0])}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _execute(arguments: argparse.Namespace) -> None:
    given = vars(arguments)
    options = {name: given[name] for name in PLAN_FLAGS if name in given}
    if "schedule" in options:
        options["schedule"] = read_schedule(options["schedule"])
    made = plan(
        ModelSpec.from_hf(arguments.model),
        ClusterSpec.parse(arguments.cluster),
        Workload(**{field.name: given[field.name] for field in fields(Workload) if field.name in given}),
        **options,
    )
    text = plan_to_json(made)
    if arguments.output is not None:
        write_result(arguments.output, text, "a plan")
    if arguments.output != STANDARD:
        write_out(text if arguments.json else str(made))


def read_schedule(source: str) -> str | Schedule:
    """The name of a schedule as it is, or the schedule in a CSV file, bearing the file's name."""
    if source == STANDARD:
        return schedule_of(read_orders(source))
    if not source.lower().endswith(".csv"):
        return source
    return schedule_of(read_orders(source), name=Path(source).stem)
