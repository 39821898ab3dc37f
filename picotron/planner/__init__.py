"""The planner wing: what a training run does, as pure data and pure functions, with no device in sight.

Every room is a module. The classes and functions below are found in their rooms when first asked for;
``plan`` and ``predict`` are rooms here, and functions of ``picotron`` itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from picotron.planner.cluster import ClusterSpec
    from picotron.planner.model import ModelSpec
    from picotron.planner.pipeline import Schedule
    from picotron.planner.plan import TrainingPlan
    from picotron.planner.predict import Prediction
    from picotron.planner.search_result import SearchResult
    from picotron.planner.serialize import Difference, diff, fingerprint, load_plan, save_plan
    from picotron.planner.topology import Topology
    from picotron.planner.workload import Workload

__all__ = [
    "ClusterSpec",
    "Difference",
    "ModelSpec",
    "Prediction",
    "Schedule",
    "SearchResult",
    "Topology",
    "TrainingPlan",
    "Workload",
    "diff",
    "fingerprint",
    "load_plan",
    "save_plan",
]

_ROOMS = {
    "ClusterSpec": "cluster",
    "Difference": "serialize",
    "ModelSpec": "model",
    "Prediction": "predict",
    "Schedule": "pipeline",
    "SearchResult": "search_result",
    "Topology": "topology",
    "TrainingPlan": "plan",
    "Workload": "workload",
    "diff": "serialize",
    "fingerprint": "serialize",
    "load_plan": "serialize",
    "save_plan": "serialize",
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """The public name, from its room."""
        if name not in _ROOMS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    """The public names, and those of the rooms that are open."""
    return sorted({*globals(), *__all__})
