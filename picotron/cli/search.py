"""``picotron search``: the best plans of the whole space, and why a layout is not among them."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from attrs import asdict, fields

from picotron.cli.common import STANDARD, Subparsers, command, write_json, write_out, write_result
from picotron.cli.plan import add_request, add_workload
from picotron.errors import PlanError
from picotron.planner.candidates import Plans, Row, choice, in_words
from picotron.planner.cases import ORDERS, RECOMPUTES, SCHEDULE_NAMES
from picotron.planner.cluster import ClusterSpec
from picotron.planner.draw_search import draw_search
from picotron.planner.model import ModelSpec
from picotron.planner.refine import Refined
from picotron.planner.search import KEEP, REACH, search
from picotron.planner.search_result import SIMULATED, SearchResult
from picotron.planner.serialize import plan_to_json
from picotron.planner.software import profile_names
from picotron.planner.space import CHOICES
from picotron.planner.why import Why
from picotron.planner.workload import Workload

EXAMPLE = (
    "picotron search llama-3.1-405b --cluster h100:2048x8 --global-batch 2048 --seq-len 8192 "
    '--tp 4,8 --why "tp=8 pp=8 cp=1" -o best.json'
)
CHOICE_HELP = {
    "dp": "data-parallel degree",
    "pp": "pipeline ranks",
    "cp": "context-parallel degree",
    "tp": "tensor-parallel degree",
    "ep": "expert-parallel degree",
    "etp": "tensor-parallel degree of the experts",
    "virtual_stages": "stages of each pipeline rank",
    "schedule": ", ".join(SCHEDULE_NAMES),
    "micro_batch": "sequences of a microbatch",
    "zero_stage": "0 to 3: what data-parallel ranks share rather than copy",
    "shard": "all, node, or how many ranks share one sharded copy",
    "sequence_parallel": "1 or 0: cut the tokens between tensor-parallel regions too",
    "recompute": ", ".join(RECOMPUTES),
    "recompute_layers": "share of the layers that is recomputed, 0 to 1",
    "offload": "share of the layers whose activations are kept in host memory, 0 to 1",
    "ends": "1: embedding and head count as a layer each when stages are cut; 0: layers cut evenly",
    "order": "axes, slowest first, as in pp,dp,cp,tp",
}
GIB = 2**30


def add_parser(subparsers: Subparsers) -> None:
    """Declare ``picotron search``."""
    parser = command(
        subparsers,
        "search",
        _execute,
        summary="find the fastest plans that fit, and say why others do not",
        example=EXAMPLE,
        json_help="print plans, front and counts as JSON, in bytes and seconds",
    )
    add_request(parser, "the best plan")
    parser.add_argument("--profile", help=f"{', '.join(profile_names())} (default: the cluster's own)")
    parser.add_argument(
        "--memory-limit", type=float, metavar="GIB", help="of each device (default: all it has)"
    )
    parser.add_argument("--top", type=int, default=10, metavar="N", help="plans shown (default 10)")
    parser.add_argument(
        "--simulate",
        type=int,
        metavar="N",
        help=f"plans that the exact simulator prices too (default {SIMULATED}, or as many as are quick)",
    )
    parser.add_argument(
        "--refine",
        action="store_true",
        help="cut the layers of the best plan into stages as the simulator likes best",
    )
    parser.add_argument(
        "--reach",
        type=float,
        default=REACH,
        metavar="X",
        help=f"the front goes on to plans X times as slow as the best (default {REACH:g})",
    )
    parser.add_argument(
        "--why",
        action="append",
        default=[],
        metavar="LAYOUT",
        help='why a layout, as in "tp=4 pp=8", is not the best',
    )
    choices = parser.add_argument_group("choices, each fixed to a value or to several with commas between")
    for name in CHOICES:
        choices.add_argument(
            f"--{name.replace('_', '-')}",
            dest=name,
            default=argparse.SUPPRESS,
            metavar="VALUE",
            help=CHOICE_HELP[name],
        )
    add_workload(parser.add_argument_group("what is trained, and how"))


def result_data(result: SearchResult, count: int) -> dict[str, Any]:
    """A search's result as values that JSON has."""
    return {
        "best": plans_data(result.fastest[:1])[0],
        "plans": plans_data(result.fastest[:count]),
        "pareto": plans_data(result.pareto),
        "simulated": [
            {
                "step_seconds": found.step_seconds,
                "reserved_bytes": found.reserved_bytes,
                "misfit": result.misfit(index) or None,
            }
            for index, found in sorted(result.predictions.items())
        ],
        "ties": len(result.ties),
        "interval": result.interval.half if result.interval else None,
        "limit_bytes": result.limit_bytes,
        "counts": {**asdict(result.counts), "refused": dict(result.counts.refused)},
    }


def plans_data(plans: Plans) -> list[dict[str, Any]]:
    """Each plan's choices, seconds of a step and bytes of the fullest device."""
    return [
        {
            "layout": in_words(plans.row(index)),
            "choices": named_choices_of(plans.row(index)),
            "step_seconds": float(plans.seconds[index]),
            "reserved_bytes": round(float(plans.bytes[index])),
        }
        for index in range(len(plans))
    ]


def named_choices_of(row: Row) -> dict[str, Any]:
    """A row's choices as a person writes them: names, whole numbers, shares, true and false."""
    names = {"schedule": SCHEDULE_NAMES, "recompute": RECOMPUTES, "order": ORDERS}
    kinds: dict[str, Any] = dict.fromkeys(("recompute_layers", "offload"), float)
    kinds |= dict.fromkeys(("sequence_parallel", "ends"), bool)
    return {
        name: names[name][int(value)] if name in names else kinds.get(name, int)(value)
        for name, value in row.items()
    }


def _execute(arguments: argparse.Namespace) -> None:
    given = vars(arguments)
    limit = arguments.memory_limit
    if arguments.top < 1:
        raise PlanError(f"top must be at least 1, got {arguments.top}")
    if arguments.simulate is not None and arguments.simulate < 0:
        raise PlanError(f"simulate must be at least 0, got {arguments.simulate}")
    result = search(
        ModelSpec.from_hf(arguments.model),
        ClusterSpec.parse(arguments.cluster),
        Workload(**{field.name: given[field.name] for field in fields(Workload) if field.name in given}),
        profile=arguments.profile,
        memory_limit_bytes=None if limit is None else _bytes(limit),
        keep=max(KEEP, arguments.top),
        reach=arguments.reach,
        progress=_tell if sys.stderr.isatty() else None,
        **{name: choice(name, given[name]) for name in CHOICES if name in given},
    )
    reasons = [result.why(layout) for layout in arguments.why]
    refined = result.refined() if arguments.refine else None
    if arguments.output is not None:
        best = result.best if refined is None else refined.plan
        write_result(arguments.output, plan_to_json(best), "a plan")
    if arguments.output == STANDARD:
        return
    left = _simulate(result, arguments.simulate)
    if arguments.json:
        data = result_data(result, arguments.top)
        data |= {"refined": None if refined is None else _refined_data(refined)}
        write_json(data | {"why": [_why_data(reason) for reason in reasons]})
        return
    lines = [draw_search(result, arguments.top), left, f"1 refined: {refined}" if refined else ""]
    write_out("\n\n".join([*filter(None, lines), *map(str, reasons)]))


def _simulate(result: SearchResult, count: int | None) -> str:
    """Simulate as many plans as are asked for, or the first few; says which were left out as too large."""
    wanted = min(SIMULATED if count is None else count, len(result))
    quick = [result.is_quick(index) for index in range(wanted)]
    taken = wanted if count is not None or all(quick) else quick.index(False)
    result.simulated(taken, _tell if sys.stderr.isatty() else None)
    if taken == wanted:
        return ""
    return f"not simulated from plan {taken + 1} on, which would take long: --simulate {wanted} does it"


def _bytes(gib: float) -> int:
    """GiB as bytes."""
    if not 0 < gib < float("inf"):
        raise PlanError(f"--memory-limit must be a positive number of GiB, got {gib:g}; leave it out for all")
    return round(gib * GIB)


def _why_data(reason: Why) -> dict[str, Any]:
    names = ("verdict", "named", "layout", "sentence", "limit_bytes", "rank", "bytes")
    return {
        **{name: getattr(reason, name) for name in names},
        "step_seconds": reason.seconds if reason.bytes else None,
        "causes": dict(reason.causes),
        "classes": dict(reason.classes),
        "changes": [change.words for change in reason.changes],
    }


def _refined_data(refined: Refined) -> dict[str, Any]:
    return {
        "stage_layers": list(refined.plan.stage_layers),
        "step_seconds": refined.prediction.step_seconds,
        "before_seconds": refined.before.step_seconds,
    }


def _tell(text: str) -> None:
    print(f"picotron: {text}", file=sys.stderr)
