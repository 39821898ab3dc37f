"""Distributed training plans as immutable values: found, priced, drawn and then executed unchanged.

Names are found in their rooms when first asked for, so importing Picotron loads nothing else; the names of
the runtime wing need torch, and are left out of ``__all__`` so that ``from picotron import *`` does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from picotron.errors import ExecutionError, PlanError
    from picotron.planner.catalogue import make_schedule
    from picotron.planner.check import check
    from picotron.planner.cluster import ClusterSpec
    from picotron.planner.explain import Explanation, explain
    from picotron.planner.megatron import to_megatron
    from picotron.planner.megatron_import import from_megatron
    from picotron.planner.model import ModelSpec
    from picotron.planner.optimise import OptimisedSchedule, optimise
    from picotron.planner.pipeline import Schedule
    from picotron.planner.plan import TrainingPlan, plan
    from picotron.planner.predict import Prediction, predict
    from picotron.planner.schedule_memory import ScheduleMemory
    from picotron.planner.schedule_times import PipelineCosts
    from picotron.planner.search import search
    from picotron.planner.search_result import SearchResult
    from picotron.planner.serialize import Difference, diff, fingerprint, load_plan, save_plan
    from picotron.planner.simulate import simulate_step
    from picotron.planner.topology import Topology
    from picotron.planner.torchtitan import to_torchtitan
    from picotron.planner.workload import Workload
    from picotron.runtime.compare import compare as compare
    from picotron.runtime.fuzz import fuzz as fuzz
    from picotron.runtime.ranks import simulate_ranks as simulate_ranks
    from picotron.runtime.run import Measurement as Measurement
    from picotron.runtime.run import run as run

__all__ = [
    "ClusterSpec",
    "Difference",
    "ExecutionError",
    "Explanation",
    "ModelSpec",
    "OptimisedSchedule",
    "PipelineCosts",
    "PlanError",
    "Prediction",
    "Schedule",
    "ScheduleMemory",
    "SearchResult",
    "Topology",
    "TrainingPlan",
    "Workload",
    "check",
    "diff",
    "explain",
    "fingerprint",
    "from_megatron",
    "load_plan",
    "make_schedule",
    "optimise",
    "plan",
    "predict",
    "save_plan",
    "search",
    "simulate_step",
    "to_megatron",
    "to_torchtitan",
]

__version__ = "0.1.0"

_PLANNER = {
    "ClusterSpec": "picotron.planner.cluster",
    "Difference": "picotron.planner.serialize",
    "ExecutionError": "picotron.errors",
    "Explanation": "picotron.planner.explain",
    "ModelSpec": "picotron.planner.model",
    "OptimisedSchedule": "picotron.planner.optimise",
    "PipelineCosts": "picotron.planner.schedule_times",
    "PlanError": "picotron.errors",
    "Prediction": "picotron.planner.predict",
    "Schedule": "picotron.planner.pipeline",
    "ScheduleMemory": "picotron.planner.schedule_memory",
    "SearchResult": "picotron.planner.search_result",
    "Topology": "picotron.planner.topology",
    "TrainingPlan": "picotron.planner.plan",
    "Workload": "picotron.planner.workload",
    "check": "picotron.planner.check",
    "diff": "picotron.planner.serialize",
    "explain": "picotron.planner.explain",
    "fingerprint": "picotron.planner.serialize",
    "from_megatron": "picotron.planner.megatron_import",
    "load_plan": "picotron.planner.serialize",
    "make_schedule": "picotron.planner.catalogue",
    "optimise": "picotron.planner.optimise",
    "plan": "picotron.planner.plan",
    "predict": "picotron.planner.predict",
    "save_plan": "picotron.planner.serialize",
    "search": "picotron.planner.search",
    "simulate_step": "picotron.planner.simulate",
    "to_megatron": "picotron.planner.megatron",
    "to_torchtitan": "picotron.planner.torchtitan",
}
_RUNTIME = {
    "Measurement": "picotron.runtime.run",
    "compare": "picotron.runtime.compare",
    "fuzz": "picotron.runtime.fuzz",
    "simulate_ranks": "picotron.runtime.ranks",
    "run": "picotron.runtime.run",
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """The public name, from its room (PEP 562)."""
        room = _PLANNER.get(name) or _RUNTIME.get(name)
        if room is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        try:
            return getattr(import_module(room), name)
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            words = f"picotron.{name} needs torch; install it with: pip install 'picotron[torch]'"
            raise ModuleNotFoundError(words, name="torch") from error


def __dir__() -> list[str]:
    """The public names of both wings."""
    return sorted({*globals(), *_PLANNER, *_RUNTIME})
