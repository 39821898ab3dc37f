"""The space of layouts: the choices, the values each may take, and their combinations as columns.

A candidate is one distinct tuple of all choices. The space is a tree. A *cell* is a choice of degrees and
microbatch (``CELL``); under it lie the same few choices again and again: sequence parallelism and axis order
(a *body*), schedule with its stages and their cut, then sharding, recomputation and offload. ``Inner`` counts
what lies under each cell without making it, so that a bound can cut a cell and say how many candidates went.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from attrs import fields, frozen

from picotron.errors import PlanError
from picotron.planner.cases import ORDERS, RECOMPUTES, SCHEDULE_NAMES, LayoutColumns
from picotron.planner.cluster import ClusterSpec
from picotron.planner.constraints import (
    CONSTRAINTS,
    REPRESENTATIVES,
    Constraint,
    Facts,
    Rows,
    facts,
    first_orders,
)
from picotron.planner.model import ModelSpec
from picotron.planner.records import hint
from picotron.planner.validators import is_integer, shown
from picotron.planner.workload import Workload

CELL = ("tp", "cp", "pp", "dp", "ep", "etp", "micro_batch")
CHOICES = tuple(attribute.name for attribute in fields(LayoutColumns))
SHARES = (0.25, 0.5, 0.75, 1.0)  # of the layers, recomputed whole
OFFLOADS = (0.0, 0.5, 1.0)  # of the layers, their saved activations in host memory
FRACTIONS = ("recompute_layers", "offload")
NAMES: Mapping[str, tuple[Any, ...]] = {
    "schedule": SCHEDULE_NAMES,
    "recompute": RECOMPUTES,
    "order": ORDERS,
}
ALL_RANKS, NODE_RANKS = 0, -1  # codes of a shard that each layout has by another number


@frozen(kw_only=True, eq=False)
class Space:
    """The request as facts, and the values that each choice may take (codes of ``LayoutColumns``)."""

    model: ModelSpec
    cluster: ClusterSpec
    work: Workload
    known: Facts
    domains: Mapping[str, tuple[float, ...]]
    asked: Mapping[str, Any]


def make_space(model: ModelSpec, cluster: ClusterSpec, work: Workload, **asked: Any) -> Space:
    """The whole space of a request, less what ``asked`` fixes: a value, or a sequence of values, a choice.

    Raises PlanError for a choice or a value that there is not.
    """
    known = facts(model, cluster, work)
    for name in asked:
        if name not in CHOICES:
            raise PlanError(
                f"a choice must be one of {', '.join(CHOICES)}, got {name!r}{hint(name, CHOICES)}"
            )
    domains = _default_domains(known)
    for name, value in asked.items():
        if value is not None:
            domains[name] = _domain(name, value)
    for name in FRACTIONS:
        domains[name] = tuple(dict.fromkeys(_whole_layers(share, known.layers) for share in domains[name]))
    given = {name: value for name, value in asked.items() if value is not None}
    return Space(model=model, cluster=cluster, work=work, known=known, domains=domains, asked=given)


def _default_domains(known: Facts) -> dict[str, tuple[float, ...]]:
    ranks = divisors(known.devices)
    return {
        **dict.fromkeys(("pp", "cp", "tp", "dp"), ranks),
        "micro_batch": divisors(known.global_batch),
        "ep": divisors(known.experts) if known.experts else (1,),
        "etp": divisors(known.devices_per_node) if known.experts else (1,),
        "schedule": tuple(range(len(SCHEDULE_NAMES))),
        "virtual_stages": tuple(range(1, known.layers + 1)),
        "sequence_parallel": (1, 0),
        "zero_stage": (0, 1, 2, 3),
        "shard": (ALL_RANKS, NODE_RANKS),
        "recompute": tuple(range(len(RECOMPUTES))),
        "recompute_layers": SHARES,
        "offload": OFFLOADS,
        "ends": (0, 1),
        "order": tuple(range(len(ORDERS))),
    }


def divisors(number: int) -> tuple[int, ...]:
    """All divisors, ascending.

    >>> divisors(12)
    (1, 2, 3, 4, 6, 12)
    """
    small = [factor for factor in range(1, int(number**0.5) + 1) if number % factor == 0]
    return tuple(dict.fromkeys([*small, *(number // factor for factor in reversed(small))]))


def _whole_layers(share: float, layers: int) -> float:
    """The nearest share that is a whole number of layers, and of any share above 0 at least one."""
    return max(round(share * layers), int(share > 0)) / layers


def _domain(name: str, value: Any) -> tuple[float, ...]:
    """The codes of one asked value or of a sequence of them."""
    is_order = name == "order" and isinstance(value, tuple | list) and set(value) <= set(ORDERS[0])
    many = isinstance(value, list | tuple | set | range) and not is_order
    found = tuple(dict.fromkeys(code(name, one) for one in (value if many else (value,))))
    if not found:
        raise PlanError(f"{name} must have a value at least, got {value!r}; leave it out for all of them")
    return found


def code(name: str, value: Any) -> float:
    """The number that stands for one value of a choice in its column. Raises PlanError for no such value."""
    if name in NAMES:
        known = NAMES[name]
        wanted = tuple(value) if name == "order" and isinstance(value, tuple | list) else value
        if wanted in known:
            return known.index(wanted)
        choices = ", ".join(",".join(one) if name == "order" else one for one in known)
        near = hint(value, known) if isinstance(value, str) and name != "order" else ""
        raise PlanError(f"{name} must be one of {choices}, got {shown(value)}{near}")
    if name == "shard" and value in ("all", "node"):
        return ALL_RANKS if value == "all" else NODE_RANKS
    if name in FRACTIONS:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise PlanError(f"{name} must be a share of the layers from 0 to 1, got {shown(value)}")
        return float(value)
    if name in ("sequence_parallel", "ends"):
        if value not in (0, 1):
            raise PlanError(f"{name} must be True or False, got {shown(value)}")
        return int(value)
    least, most = (0, 3) if name == "zero_stage" else (1, 2**31)
    if not is_integer(value) or not least <= value <= most:
        rule = "0, 1, 2 or 3" if name == "zero_stage" else "a whole number of at least 1"
        raise PlanError(f"{name} must be {rule}, got {shown(value)}")
    return value


def length(rows: Rows) -> int:
    """How many rows."""
    return len(next(iter(rows.values()))) if rows else 0


def taken(rows: Rows, which: np.ndarray) -> Rows:
    """The rows of a mask or of indices."""
    return {name: column[which] for name, column in rows.items()}


def joined(parts: Sequence[Rows]) -> Rows:
    """Rows one after another."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def crossed(rows: Rows, **values: Sequence[float]) -> Rows:
    """Every row with every tuple of ``values`` (columns of one length); a row's tuples stay together."""
    count = len(next(iter(values.values())))
    found = {name: np.repeat(column, count) for name, column in rows.items()}
    for name, column in values.items():
        kind = np.float64 if name in FRACTIONS else np.int64
        found[name] = np.tile(np.asarray(column, dtype=kind), length(rows))
    return found


def ready(table: Iterable[Constraint], names: Iterable[str], new: Iterable[str]) -> tuple[Constraint, ...]:
    """The constraints that can be tested with columns ``names``, and could not without ``new``."""
    have, fresh = set(names), set(new)
    return tuple(c for c in table if set(c.choices) <= have and (set(c.choices) & fresh))


def cells(space: Space) -> tuple[Rows, Counter[str]]:
    """The cells that meet every constraint on their columns, and how many did not, by the first one broken.

    The refused are combinations of degrees that never become candidates.
    """
    refused: Counter[str] = Counter()
    rows: Rows = {}
    for new in (("tp",), ("cp",), ("pp",), ("dp",), ("ep",), ("etp",), ("micro_batch",)):
        rows = _with_dp(space, rows) if new == ("dp",) else _begun(space, rows, new[0])
        for constraint in ready(CONSTRAINTS, rows, new):
            allowed = constraint.allows(space.known, rows)
            refused[constraint.name] += int(np.count_nonzero(~allowed))
            rows = taken(rows, allowed)
    positions = next(c for c in CONSTRAINTS if c.name == "positions")
    if length(rows) and not positions.allows(space.known, rows).all():
        refused["positions"] += length(rows)
        rows = taken(rows, np.zeros(length(rows), dtype=bool))
    return rows, +refused


def _begun(space: Space, rows: Rows, name: str) -> Rows:
    values = space.domains[name]
    return crossed(rows, **{name: values}) if rows else {name: np.asarray(values, dtype=np.int64)}


def _with_dp(space: Space, rows: Rows) -> Rows:
    """Each row with the dp that its degrees leave (rounded, where they leave none), or each dp asked for."""
    if "dp" in space.asked:
        return _begun(space, rows, "dp")
    left = space.known.devices // (rows["tp"] * rows["cp"] * rows["pp"])
    return {**rows, "dp": np.maximum(1, left)}


def node_ranks(known: Facts, rows: Rows) -> np.ndarray:
    """Ranks of dp * cp in one node, as far as they divide dp * cp."""
    room = np.maximum(1, known.devices_per_node // rows["tp"])
    found: np.ndarray = np.gcd(rows["dp"] * rows["cp"], room)
    return found


@frozen(kw_only=True, eq=False)
class Shardings:
    """The ways to shard the state of each row: ``shard`` and ``valid`` [row, way], ``zero_stage`` [way]."""

    zero_stage: np.ndarray
    shard: np.ndarray
    valid: np.ndarray


def shardings(space: Space, rows: Rows) -> Shardings:
    """Every ZeRO stage, over all ranks of dp * cp or as few as share a node, where that is another number.

    Who asks for a shard asks for something to be sharded.
    """
    ways = [
        (stage, shard)
        for stage in space.domains["zero_stage"]
        for shard in (space.domains["shard"] if stage else (ALL_RANKS,))
    ]
    stage, wanted = (np.array([way[part] for way in ways], dtype=np.int64) for part in (0, 1))
    ranks, node = (rows["dp"] * rows["cp"])[:, None], node_ranks(space.known, rows)[:, None]
    shard = np.where(wanted == ALL_RANKS, ranks, np.where(wanted == NODE_RANKS, node, wanted))
    valid = (ranks % shard == 0) & ((stage == 0) | ((ranks > 1) & (shard > 1)))
    if ALL_RANKS in space.domains["shard"]:
        valid &= (wanted == ALL_RANKS) | (shard < ranks)
    elif 1 not in space.domains["shard"]:
        valid &= stage > 0
    return Shardings(zero_stage=stage, shard=np.where(stage == 0, 1, shard), valid=valid)


def memory_modes(space: Space) -> list[tuple[float, float, float]]:
    """(recompute, share of layers, offload), cheapest in time first."""
    pairs = [
        (mode, share)
        for mode in sorted(space.domains["recompute"])
        for share in (
            space.domains["recompute_layers"] if mode == len(RECOMPUTES) - 1 else (float(mode > 0),)
        )
    ]
    pairs = [(mode, share) for mode, share in pairs if mode == 0 or share > 0]
    return [(*pair, offload) for pair in pairs for offload in space.domains["offload"]]


def with_bodies(space: Space, rows: Rows) -> Rows:
    """Every row with sequence parallelism and axis order."""
    rows = crossed(rows, sequence_parallel=space.domains["sequence_parallel"])
    rows = allowed_rows(space, rows, ("sequence_parallel",))
    orders = [int(order) for order in space.domains["order"]]
    rows = crossed(rows, order=orders)
    return taken(rows, first_orders(orders, rows))


def schedule_table(space: Space, pp: int) -> Rows:
    """Schedule, stages a rank and how layers are cut, for ``pp`` pipeline ranks."""
    pairs = np.array(
        [(s, v) for s in space.domains["schedule"] for v in stage_counts(space, pp)], dtype=np.int64
    ).reshape(-1, 2)
    table: Rows = {
        "schedule": pairs[:, 0],
        "virtual_stages": pairs[:, 1],
        "pp": np.full(len(pairs), pp, dtype=np.int64),
    }
    for rules in (CONSTRAINTS, REPRESENTATIVES):
        for constraint in ready(rules, table, ("schedule", "virtual_stages")):
            table = taken(table, constraint.allows(space.known, table))
    return represented(space, crossed(table, ends=space.domains["ends"]), ("ends",))


def schedulable(space: Space, rows: Rows, table: Rows) -> np.ndarray:
    """Which rows can take which schedules of the table, [row, schedule]: not too many actions a step."""
    actions = next(constraint for constraint in CONSTRAINTS if constraint.name == "actions")
    both = {name: column[:, None] for name, column in rows.items()} | {
        name: column[None] for name, column in table.items()
    }
    return np.broadcast_to(actions.allows(space.known, both), (length(rows), length(table)))


def stage_counts(space: Space, pp: int) -> tuple[int, ...]:
    """Stages a rank worth a candidate: the fewest for each number of layers that the longest stage can have.

    More stages of the same longest one shorten no bubble and add transfers. What a caller asks for is taken
    as it is.
    """
    layers, wanted = space.known.layers, space.domains["virtual_stages"]
    if "virtual_stages" in space.asked:
        return tuple(int(v) for v in wanted if pp * v <= layers)
    depths = range(1, -(-layers // pp) + 1)
    return tuple(sorted({count for depth in depths if pp * (count := -(-layers // (pp * depth))) <= layers}))


def allowed_rows(space: Space, rows: Rows, new: tuple[str, ...]) -> Rows:
    """The rows that meet the constraints on the ``new`` columns."""
    for constraint in ready(CONSTRAINTS, rows, new):
        rows = taken(rows, constraint.allows(space.known, rows))
    return rows


def represented(space: Space, rows: Rows, new: tuple[str, ...]) -> Rows:
    """The rows that represent those that would run alike."""
    for constraint in ready(REPRESENTATIVES, rows, new):
        rows = taken(rows, constraint.allows(space.known, rows))
    return rows
