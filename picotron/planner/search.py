"""The best plans of the whole space for a model, a machine and a workload.

``walk`` covers the space with the vectorised estimates and bounds; the exact simulator prices the finalists
when they are asked for (``SearchResult.simulated``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from attrs import evolve

from picotron.errors import PlanError
from picotron.planner.candidates import Plans
from picotron.planner.cluster import ClusterSpec
from picotron.planner.interval import known_interval
from picotron.planner.kept import Kept, Wanted
from picotron.planner.misfit import fits_nowhere
from picotron.planner.model import ModelSpec
from picotron.planner.priced import prices
from picotron.planner.search_result import Progress, SearchResult
from picotron.planner.software import SoftwareProfile, software_columns, software_profile
from picotron.planner.space import Space, make_space, taken
from picotron.planner.validators import is_between, is_size, shown
from picotron.planner.walk import covered
from picotron.planner.workload import Workload

KEEP = 20
REACH = 1.5


def search(
    model: ModelSpec,
    cluster: ClusterSpec,
    work: Workload,
    *,
    profile: str | SoftwareProfile | None = None,
    memory_limit_bytes: int | None = None,
    keep: int = KEEP,
    reach: float = REACH,
    progress: Progress | None = None,
    **choices: Any,
) -> SearchResult:
    """The fastest plans that fit, and the front of those that none beats in both time and memory.

    ``choices`` fix any choice of the space by its name in ``plan`` (``tp=8``, ``schedule=("1f1b", "zb-v")``;
    also ``recompute_layers`` and ``offload`` as shares of the layers, ``shard`` "all" or "node", ``ends``).
    ``profile``: the software that runs the plans, the cluster's own by default. ``keep``: how many of the
    fastest are kept, each with other degrees or another microbatch; the front goes on to plans ``reach``
    times as slow as the best.
    ``progress`` is called with a line now and then. Raises PlanError, saying which rule and what would help,
    where nothing can be planned or nothing fits.
    """
    for name, value, kind in (
        ("model", model, ModelSpec),
        ("cluster", cluster, ClusterSpec),
        ("work", work, Workload),
    ):
        if not isinstance(value, kind):
            raise PlanError(f"{name} must be a {kind.__name__}, got {type(value).__name__}")
    if not is_size(keep):
        raise PlanError(f"keep must be a whole number of at least 1, got {shown(keep)}")
    if not is_between(reach, 1, float("inf")):
        raise PlanError(f"reach must be a number of at least 1, got {shown(reach)}")
    limit = cluster.device.memory_bytes if memory_limit_bytes is None else memory_limit_bytes
    if not is_size(limit):
        raise PlanError(f"memory_limit_bytes must be a whole number of at least 1, got {shown(limit)}")
    if profile is not None:
        software = profile if isinstance(profile, SoftwareProfile) else software_profile(profile)
        cluster = evolve(cluster, profile=software)
    space = make_space(model, cluster, work, **choices)
    priced = prices(space, software_columns(cluster.profile, cluster.device.architecture))
    kept, counts = covered(
        space, priced, Wanted(limit_bytes=limit, keep=keep, reach=reach), progress=progress
    )
    if not len(kept.seconds):
        raise fits_nowhere(space, priced, limit)
    fastest, front = kept.fastest(), kept.front()
    return SearchResult(
        space=space,
        prices=priced,
        fastest=_plans(space, kept, fastest),
        pareto=_plans(space, kept, front),
        counts=counts,
        limit_bytes=limit,
        interval=known_interval(cluster, experts=model.experts is not None),
    )


def _plans(space: Space, kept: Kept, which: np.ndarray) -> Plans:
    return Plans(
        space=space, rows=taken(kept.rows, which), seconds=kept.seconds[which], bytes=kept.bytes[which]
    )
