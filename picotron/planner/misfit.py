"""Why a search has nothing to return: no layout meets the constraints, or none fits; and what would help."""

from __future__ import annotations

import numpy as np
from attrs import evolve

from picotron.errors import PlanError
from picotron.planner.bounds import along, standing_bytes
from picotron.planner.candidates import in_words, row_of
from picotron.planner.cluster import MOST_DEVICES, ClusterSpec, preset_names
from picotron.planner.constraints import CONSTRAINTS, REPRESENTATIVES, Rows, broken
from picotron.planner.priced import Prices
from picotron.planner.space import (
    ALL_RANKS,
    CELL,
    CHOICES,
    NODE_RANKS,
    Space,
    cells,
    crossed,
    length,
    make_space,
    memory_modes,
    node_ranks,
    schedulable,
    schedule_table,
    shardings,
    taken,
    with_bodies,
)

GIB = 2**30
LOOKED_AT = 16  # cells whose fullest rank must hold least
MOST_ROWS = 200_000
MOST_RULES = 2  # told of a layout that breaks several


def refusal(space: Space) -> PlanError:
    """No layout meets every constraint: the one that comes nearest, the rules that it breaks and a remedy."""
    rows = _asked_for(space)
    rules = (*CONSTRAINTS, *REPRESENTATIVES)
    breaks = broken(space.known, rows, rules)
    nearest = int(breaks.sum(axis=0).argmin())
    row = row_of(rows, nearest)
    found = [rule for rule, bad in zip(rules, breaks[:, nearest], strict=True) if bad]
    found.sort(key=lambda rule: rule.name == "devices")  # it follows from the others where dp is left open
    sentences = [rule.explain(space.known, row) for rule in found[:MOST_RULES]]
    asked = ", ".join(f"{name}={value}" for name, value in space.asked.items())
    return PlanError(
        f"no layout of {space.model.name} on {space.known.devices} devices meets every rule"
        + (f" with {asked}" if asked else "")
        + f"; the nearest, {in_words(row)}: {'; and '.join(sentences) or 'leave a choice open'}"
    )


def _asked_for(space: Space) -> Rows:
    """Combinations of the asked values, allowed or not; what was not asked for is at its plainest."""
    known, rows = space.known, {"tp": np.array(space.domains["tp"], dtype=np.int64)}
    for name in (
        "cp",
        "pp",
        "dp",
        "micro_batch",
        "ep",
        "etp",
        "sequence_parallel",
        "schedule",
        "virtual_stages",
    ):
        if name == "dp" and name not in space.asked:
            left = known.devices // (rows["tp"] * rows["cp"] * rows["pp"])
            rows = rows | {"dp": np.maximum(1, left)}
            continue
        plainest = {"sequence_parallel": (0,), "schedule": (1,), "virtual_stages": (1,)}.get(name)
        values = space.domains[name] if name in space.asked or plainest is None else plainest
        if name == "virtual_stages" and "virtual_stages" not in space.asked and "schedule" in space.asked:
            values = (1, 2)
        fits = max(1, MOST_ROWS // length(rows))
        rows = crossed(rows, **{name: values[:fits]})
    ranks = rows["dp"] * rows["cp"]
    stages, asked = space.domains["zero_stage"], space.domains["shard"][0]
    sharded = "shard" in space.asked and asked != ALL_RANKS
    stage = int(next(filter(None, stages), 0) if sharded else stages[0])
    shard = np.where(stage > 0, ranks, 1)
    if sharded:
        shard = node_ranks(known, rows) if asked == NODE_RANKS else np.full(len(ranks), asked)
        shard = np.maximum(shard, 1 if stage else 2)  # without ZeRO any shard is one too many
    plain = {
        "zero_stage": stage,
        "recompute": 0,
        "recompute_layers": 0,
        "offload": 0,
        "ends": space.domains["ends"][0],
    }
    plain["order"] = space.domains["order"][0] if "order" in space.asked else 0
    return rows | {"shard": shard} | {name: np.full(len(ranks), int(value)) for name, value in plain.items()}


def fits_nowhere(space: Space, priced: Prices, limit_bytes: int) -> PlanError:
    """No layout fits: the one that is nearest to it, how much too much, and what would do."""
    size, row = least_bytes(space, priced)
    helps = [_more_devices(space, priced, limit_bytes), _other_device(space, size, limit_bytes)]
    remedies = "; ".join(filter(None, helps)) or "take a smaller model, or open the choices that are fixed"
    asked = ", ".join(f"{name}={value}" for name, value in space.asked.items())
    return PlanError(
        f"{space.model.name} fits nowhere on {space.cluster.name}"
        + (f" with {asked}" if asked else "")
        + f": the nearest layout, {in_words(row)}, needs {size / GIB:.2f} GiB of {limit_bytes / GIB:.2f} "
        f"on its fullest device, {(size - limit_bytes) / GIB:.2f} too much; {remedies}"
    )


def least_bytes(space: Space, priced: Prices) -> tuple[float, dict[str, float]]:
    """The candidate that holds least on its fullest device, among the cells whose state is smallest."""
    roots, _ = cells(space)
    if not length(roots):
        return float("inf"), {}
    ways = shardings(space, roots)
    standing = np.where(ways.valid, standing_bytes(priced, roots, ways), np.inf).min(axis=1)
    order = np.lexsort((roots["micro_batch"], standing))[:LOOKED_AT]
    bodies = with_bodies(space, taken(roots, order))
    bodies = taken(bodies, bodies["order"] == bodies["order"][0]) if length(bodies) else bodies
    best: tuple[float, dict[str, float]] = (float("inf"), {})
    modes = np.array(memory_modes(space)).reshape(-1, 3).T
    for pp in np.unique(bodies["pp"]):
        table = schedule_table(space, int(pp))
        own = taken(bodies, bodies["pp"] == pp)
        if not length(table):
            continue
        ways = shardings(space, own)
        valid = schedulable(space, own, table)[:, :, None, None] & ways.valid[:, None, :, None]
        grid = along(own, 1, 5) | along({n: c for n, c in table.items() if n != "pp"}, 2, 5)
        grid |= {"zero_stage": ways.zero_stage[:, None], "shard": ways.shard[None, :, None, :, None]}
        grid |= dict(zip(("recompute", "recompute_layers", "offload"), modes, strict=True))
        size = np.broadcast_to(priced.memory(grid).reserved_bytes, (1, *valid.shape[:3], modes.shape[1]))
        size = np.where(valid[None], size, np.inf)
        at = np.unravel_index(int(size.argmin()), size.shape)
        if size[at] < best[0]:
            row = {name: float(np.broadcast_to(grid[name], size.shape)[at]) for name in CHOICES}
            best = (float(size[at]), row)
    return best


def _more_devices(space: Space, priced: Prices, limit_bytes: int) -> str:
    """How many times the nodes would do, if any number does."""
    for times in (2, 4, 8, 16, 32, 64, 128, 256):
        nodes = space.cluster.nodes * times
        if nodes * space.cluster.devices_per_node > MOST_DEVICES:
            break
        open_ = {name: value for name, value in space.asked.items() if name not in CELL}
        larger = make_space(space.model, evolve(space.cluster, nodes=nodes), space.work, **open_)
        if least_bytes(larger, priced)[0] <= limit_bytes:
            return f"{nodes * space.cluster.devices_per_node} such devices would do"
    return ""


def _other_device(space: Space, size: float, limit_bytes: int) -> str:
    """The shipped devices on which the same layout would fit."""
    if limit_bytes < space.cluster.device.memory_bytes and size <= space.cluster.device.memory_bytes:
        return f"a limit of {np.ceil(size / GIB):.0f} GiB would do"
    machines = [ClusterSpec.preset(name) for name in preset_names()]
    larger = [
        one.name.split(":")[0]
        for one in machines
        if one.device.memory_bytes >= size and one.device.kind != "cpu"
    ]
    return f"devices that hold enough: {', '.join(larger)}" if larger else ""
