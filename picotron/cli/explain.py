"""``picotron explain``: where each millisecond and byte of a plan goes, and what would change them."""

from __future__ import annotations

import argparse
import os
import re
import sys
from typing import Any, get_args, get_origin, get_type_hints

from picotron.cli.common import Subparsers, command, read_plan, write_json, write_out
from picotron.cli.plan import PLAN_FLAGS, read_schedule
from picotron.errors import PlanError
from picotron.planner.draw_explanation import draw_explanation, draw_what_if
from picotron.planner.explain import MOST_CHANGES, explain, what_if
from picotron.planner.plan import TrainingPlan
from picotron.planner.records import hint
from picotron.planner.what_if import SETTINGS, other_device, other_network
from picotron.planner.workload import Workload

_FACTOR = re.compile(r"([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)x?")
_TRUTHS = {"yes": True, "true": True, "no": False, "false": False}
_WHAT_IFS = ("settings", "network", "bandwidth", "latency", "device", "profile")


def add_parser(subparsers: Subparsers) -> None:
    """Declare ``picotron explain``."""
    parser = command(
        subparsers,
        "explain",
        _execute,
        summary="chart where each millisecond and byte of a plan goes, or what a change would do to them",
        example="picotron explain plan.json\n"
        "  picotron explain plan.json --set tp=4 --set micro_batch=2\n"
        "  picotron explain plan.json --network 2x --json\n"
        "  picotron explain plan.json --device h200 --profile megatron-2024",
        json_help="print JSON in place of the chart, in seconds and bytes",
    )
    parser.add_argument("plan", metavar="PLAN", help="a plan's file, or -")
    changes = parser.add_argument_group("what if: any of these shows the difference, cause by cause")
    changes.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help=f"another value of the plan, again for each; of {', '.join(SETTINGS)}",
    )
    changes.add_argument(
        "--network", type=_factor, metavar="FACTOR", help="times the rate between nodes, as in 2x"
    )
    changes.add_argument("--bandwidth", type=_factor, metavar="FACTOR", help="times the rate of every link")
    changes.add_argument("--latency", type=_factor, metavar="FACTOR", help="times the latency of every link")
    changes.add_argument("--device", metavar="NAME", help="another machine, such as h200, with its own links")
    changes.add_argument("--profile", metavar="NAME", help="another software profile")
    parser.add_argument(
        "--from-profile",
        metavar="NAME",
        help="the software profile to begin with (default: the cluster's own)",
    )
    parser.add_argument(
        "--changes",
        type=int,
        default=MOST_CHANGES,
        metavar="N",
        help=f"single changes to look for ({MOST_CHANGES}; 0: none)",
    )
    parser.add_argument(
        "--colour", choices=("auto", "always", "never"), default="auto", help="of the text (default auto)"
    )


def _factor(text: str) -> float:
    """A positive factor such as 2x or 0.5."""
    match = _FACTOR.fullmatch(text.strip())
    if match is None or not 0 < float(match[1]) < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive factor such as 2x or 0.5, got {text!r}")
    return float(match[1])


def _execute(arguments: argparse.Namespace) -> None:
    if not 0 <= arguments.changes <= 100:
        raise PlanError(f"--changes must be in [0, 100], got {arguments.changes}")
    plan = read_plan(arguments.plan)
    found: Any
    if any(getattr(arguments, name) for name in _WHAT_IFS):
        found = _what_if(plan, arguments)
        draw: Any = draw_what_if
    else:
        found = explain(plan, profile=arguments.from_profile, changes=arguments.changes)
        draw = draw_explanation
    if arguments.json:
        write_json(found.data)
    else:
        write_out(draw(found, colour=_coloured(arguments)))


def _what_if(plan: TrainingPlan, arguments: argparse.Namespace) -> Any:
    pairs = list(map(_setting, arguments.settings))
    settings = dict(pairs)
    if len(settings) < len(pairs):
        raise PlanError(f"--set must name each setting once, got {' '.join(arguments.settings)}")
    if "cluster" in settings and arguments.device:
        raise PlanError("--device and --set cluster contradict each other: give one of them")
    factors = {
        name: getattr(arguments, name)
        for name in ("network", "bandwidth", "latency")
        if getattr(arguments, name) is not None
    }
    asked = [*arguments.settings, *(f"{name} {factor:g}x" for name, factor in factors.items())]
    cluster = None
    if "cluster" not in settings and (arguments.device or factors):
        cluster = other_device(plan.cluster, arguments.device) if arguments.device else plan.cluster
        asked += [f"device {arguments.device}"] if arguments.device else []
        cluster = other_network(cluster, **factors)
    elif factors:
        raise PlanError("--network, --bandwidth and --latency must come without --set cluster")
    asked += [f"profile {arguments.profile}"] if arguments.profile else []
    return what_if(
        plan,
        settings,
        cluster=cluster,
        profile=arguments.from_profile,
        profile_after=arguments.profile,
        asked=asked,
    )


def _setting(text: str) -> tuple[str, Any]:
    """The name and value of ``tp=4``. Raises PlanError for a name or a value that a plan does not take."""
    name, equals, value = text.partition("=")
    name = name.strip().replace("-", "_")
    if not equals or not value:
        raise PlanError(f"--set must look like NAME=VALUE, got {text!r}")
    if name not in SETTINGS:
        raise PlanError(f"--set must name one of {', '.join(SETTINGS)}, got {name!r}{hint(name, SETTINGS)}")
    if name == "schedule":
        return name, read_schedule(value)
    try:
        return name, _parsed(name, value.strip())
    except (ValueError, argparse.ArgumentTypeError) as error:
        words = str(error) if isinstance(error, argparse.ArgumentTypeError) else f"got {value!r}"
        raise PlanError(f"--set {name} must have a value of its kind, {words}") from None


def _parsed(name: str, value: str) -> Any:
    """A value as the flag of that name takes it."""
    if name == "sequence_parallel":
        if value.lower() not in _TRUTHS:
            raise ValueError
        return _TRUTHS[value.lower()]
    if name in PLAN_FLAGS:
        return PLAN_FLAGS[name][0].get("type", str)(value)
    kind = get_type_hints(Workload).get(name, str)
    if get_origin(kind) is None:
        return kind(value)
    if value not in get_args(kind):
        raise argparse.ArgumentTypeError(f"one of {', '.join(get_args(kind))}, got {value!r}")
    return value


def _coloured(arguments: argparse.Namespace) -> bool:
    """Whether the text is for a terminal that shows colours (https://no-color.org)."""
    if arguments.colour == "auto":
        return sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return bool(arguments.colour == "always")
