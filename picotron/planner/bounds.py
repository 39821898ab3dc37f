"""Lower bounds on seconds and bytes of whole groups of candidates, with which a search cuts them unseen.

A bound is an estimate itself, of one member of the group, less the parts that other members may lack.

*Bytes*, of all candidates of one cell and sharding. The fullest rank holds at least what rank r holds,
whichever r, and that is at least its parameters, gradients and optimizer state, plus the process's own
memory. None of those depends on sequence parallelism, recomputation, offload, axis order or the number of
microbatches. Nor do a rank's layers depend on the number of its stages where they go round: dealt one after
another, longer first, rank r has v * base + ceil((extra - r) / p) of them, which is ceil((layers - r) / p)
for every v. So a step of one microbatch with one stage a rank stands for all looping schedules, one with
two stages for those that go up and back, and the cut of the layers is tried both ways: the least of the
four holds for all.

*Seconds*, of all candidates of one body and sharding. The slowest rank computes and communicates,
microbatch by microbatch, for at least the mean number of layers of a rank; more layers may let more of the
data-parallel transfers hide, but never more than the work that they add. With as many stages as layers the
gradients of most layers are ready before the last microbatch ends, which lets most hide. So an imagined
pipeline of (layers / p) stages a rank, each rank with the mean number of layers, takes least: without what
only a pipeline adds (bubble, transfers, waiting for the slowest of many nodes), which is never negative, and
without launches of kernels, which only add to a microbatch's seconds. Stages go round, or up and back, and
layers are counted with and without embedding and head; up and back without is never less than round
without, as its first rank has the head too: the least of the other three holds for all.

*Seconds*, of all candidates of one body, schedule and sharding. Bubble and transfers do not depend on the
sharding, so they add to the bound above; and the step without data parallelism, update and offload is a
bound too. The greater of both holds. The bubble is what the longest chain of F, I and W across ranks has more
than the microbatches of one (``bubbles``): never negative, and where recomputing lengthens I no shorter;
launches would lengthen it too, and are left out, as they might hide what recomputing adds.

*Seconds*, of all that differ in recomputation and offload alone. Recomputing adds work to every microbatch,
and as above lets no more hide than it adds; offloading only adds. The estimate without both, and without
launches, is a bound.

*Of all that differ in offload alone.* Its only part in the seconds is a cause of its own, that of what does
not hide behind computing, which grows with the share: with the least share a step is shortest. Its only part
in the bytes are the saved tensors in flight between forward and backward, of which more layers leave as the
share grows, and no more come back at a time than have left: with the greatest share least is held.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from picotron.planner.cases import SCHEDULE_NAMES, Column
from picotron.planner.constraints import Rows
from picotron.planner.estimate import CAUSES
from picotron.planner.priced import Prices
from picotron.planner.space import Shardings, length

PIPELINE = ("pipeline_bubble", "pipeline_transfer")  # causes that depend on the schedule, not on the sharding
ONCE = ("data", "optimizer", "offload")  # causes that sharding, recomputation and offload change
BODY = tuple(cause for cause in CAUSES if cause not in (*PIPELINE, "offload"))
KEPT: Rows = {name: np.zeros(()) for name in ("recompute", "recompute_layers", "offload")}
LAUNCHES = ("launch_seconds", "gap_seconds")  # constants that are 0 in a bound
WAITING = "straggler_share"
_PLACEMENTS: Rows = {  # the fewest stages of each placement, cut both ways
    "schedule": np.array([SCHEDULE_NAMES.index(name) for name in ("1f1b", "1f1b", "zb-v", "zb-v")]),
    "virtual_stages": np.array([1, 1, 2, 2]),
    "ends": np.array([0, 1, 0, 1]),
}


def along(rows: Mapping[str, np.ndarray], axis: int, axes: int) -> Rows:
    """Columns laid along one of ``axes`` axes, to broadcast with those along others."""
    shape = [1] * axes
    shape[axis] = -1
    return {name: np.asarray(column).reshape(shape) for name, column in rows.items()}


def standing_bytes(prices: Prices, cells: Rows, ways: Shardings) -> np.ndarray:
    """At least so many bytes are on the fullest rank of a cell, however it is run: [cell, way to shard]."""
    rows = along(cells, 1, 4) | along(_PLACEMENTS, 2, 4) | KEPT
    rows |= {"sequence_parallel": np.zeros(()), "order": np.zeros(())}
    rows |= {"zero_stage": ways.zero_stage[None, None, None], "shard": ways.shard[None, :, None]}
    shape = (1, length(cells), len(_PLACEMENTS["ends"]), len(ways.zero_stage))
    least: np.ndarray = np.broadcast_to(prices.always(rows), shape).min(axis=2)[0]
    return least


def body_seconds(prices: Prices, bodies: Rows, ways: Shardings) -> np.ndarray:
    """At least so long is a step of a body, however it is scheduled: [body, way to shard]."""
    placed = {name: _PLACEMENTS[name][[0, 1, 3]] for name in ("schedule", "ends")}
    rows = along(bodies, 1, 4) | along(placed, 2, 4) | KEPT
    mean = (prices.model.layers + 2 * rows["ends"]) / rows["pp"]
    rows["virtual_stages"] = np.where(rows["pp"] > 1, mean, 1.0)
    rows |= {"zero_stage": ways.zero_stage[None, None, None], "shard": ways.shard[None, :, None]}
    causes = prices.seconds(rows, without=(*LAUNCHES, WAITING), mean_layers=True).causes
    shape = (1, length(bodies), len(placed["ends"]), len(ways.zero_stage))
    least: np.ndarray = np.broadcast_to(_sum(causes, BODY), shape).min(axis=2)[0]
    return least


def schedule_seconds(prices: Prices, bodies: Rows, table: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Of a body under each schedule, [body, schedule]: at least a step, and what the pipeline alone adds."""
    schedules = {name: column for name, column in table.items() if name != "pp"}
    rows = along(bodies, 1, 3) | along(schedules, 2, 3) | KEPT
    rows |= {"zero_stage": np.zeros(()), "shard": np.ones(())}
    causes = prices.seconds(rows, without=LAUNCHES).causes
    shape = (1, length(bodies), length(table))
    step = _sum(causes, (cause for cause in CAUSES if cause not in ONCE))
    return np.broadcast_to(step, shape)[0], np.broadcast_to(_sum(causes, PIPELINE), shape)[0]


def sharded_seconds(prices: Prices, rows: Rows) -> np.ndarray:
    """At least so long is a step of each row, however it recomputes and offloads."""
    step = prices.seconds(along(rows, 1, 2) | KEPT, without=LAUNCHES).step_seconds
    found: np.ndarray = np.broadcast_to(step, (1, length(rows)))[0]
    return found


def _sum(parts: Mapping[str, Column], names: Iterable[str]) -> np.ndarray:
    total: np.ndarray = np.zeros(())
    for name in names:
        total = total + parts[name]
    return total
