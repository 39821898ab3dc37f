"""What a layout must meet, stated as data: used to prune millions of layouts, and to say why one is refused.

Each ``Constraint`` has a test over columns of layouts (one bool a row) and a sentence with its remedy. A
layout passes the whole table exactly if ``plan`` accepts it. ``REPRESENTATIVES`` has the same form and leaves
one of the layouts that would run alike: what it refuses could be planned, and is covered by another name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from attrs import frozen

from picotron.planner.cases import ORDERS, RECOMPUTES, SCHEDULE_NAMES
from picotron.planner.catalogue import SCHEDULES
from picotron.planner.cluster import ClusterSpec
from picotron.planner.model import ModelSpec
from picotron.planner.plan import MAX_ACTIONS
from picotron.planner.workload import Workload

Rows = dict[str, np.ndarray]
"""Layouts, one column a choice; the names are those of ``LayoutColumns``."""


@frozen(kw_only=True)
class Facts:
    """The numbers of a request that constraints read."""

    devices: int
    devices_per_node: int
    global_batch: int
    seq_len: int
    layers: int
    heads: int
    kv_heads: int  # 0: latent attention, whose heads are never shared
    intermediate: int
    vocab: int
    positions: int  # learned ones; 0: rotary
    experts: int
    expert_intermediate: int
    shared_intermediate: int


def facts(model: ModelSpec, cluster: ClusterSpec, work: Workload) -> Facts:
    """What constraints read of one request."""
    experts = model.experts
    return Facts(
        devices=cluster.num_devices,
        devices_per_node=cluster.devices_per_node,
        global_batch=work.global_batch,
        seq_len=work.seq_len,
        layers=model.num_layers,
        heads=model.num_heads,
        kv_heads=0 if model.latent_attention else model.num_kv_heads,
        intermediate=model.intermediate_size,
        vocab=model.vocab_size,
        positions=model.max_positions if model.rope_theta is None else 0,
        experts=experts.num_experts if experts else 0,
        expert_intermediate=experts.intermediate_size if experts else 0,
        shared_intermediate=experts.shared_intermediate_size if experts else 0,
    )


Test = Callable[[Facts, Rows], np.ndarray]


@frozen(kw_only=True)
class Constraint:
    """A rule over choices: which rows meet it, and what is said of one that does not.

    ``choices`` are the columns that ``allows`` reads. ``sentence`` and ``remedy`` are formatted with the
    request's facts and the row's values.
    """

    name: str
    choices: tuple[str, ...]
    allows: Test
    sentence: str
    remedy: str

    def explain(self, known: Facts, row: Mapping[str, float]) -> str:
        """The sentence of one row that breaks the rule, and what would help."""
        from attrs import asdict

        values = {**asdict(known), **{name: _plain(name, value) for name, value in row.items()}}
        values["num_microbatches"] = known.global_batch // max(1, int(row["dp"]) * int(row["micro_batch"]))
        return f"{self.sentence.format(**values)}; {self.remedy.format(**values)}"


def _plain(name: str, value: float) -> object:
    """A column's value as its caller would write it."""
    if name == "schedule":
        return SCHEDULE_NAMES[int(value)]
    if name == "recompute":
        return RECOMPUTES[int(value)]
    if name == "order":
        return ",".join(ORDERS[int(value)])
    return float(value) if float(value) != int(value) else int(value)


_TAKES_ANY = np.array([SCHEDULES[name].virtual_stages == "any" for name in SCHEDULE_NAMES])
_STAGES = np.array(
    [
        0 if SCHEDULES[name].virtual_stages == "any" else SCHEDULES[name].virtual_stages
        for name in SCHEDULE_NAMES
    ],
    dtype=np.int64,
)
_ACTIONS = np.array([3 if SCHEDULES[name].splits_backward else 2 for name in SCHEDULE_NAMES])
_ONE_RANK_SCHEDULE = SCHEDULE_NAMES.index("1f1b")


def _divides(number: int, columns: np.ndarray) -> np.ndarray:
    result: np.ndarray = number % columns == 0
    return result


def _shared_evenly(known: Facts, rows: Rows) -> np.ndarray:
    if not known.kv_heads:
        return np.ones(len(rows["tp"]), dtype=bool)
    even: np.ndarray = (known.kv_heads % rows["tp"] == 0) | (rows["tp"] % known.kv_heads == 0)
    return even


def num_microbatches(known: Facts, rows: Rows) -> np.ndarray:
    """Microbatches of one data-parallel rank in a step."""
    count: np.ndarray = known.global_batch // (rows["dp"] * rows["micro_batch"])
    return count


def num_actions(known: Facts, rows: Rows) -> np.ndarray:
    """Actions of a step over all pipeline ranks; pairs of DualPipe-V are counted as if none were whole."""
    per_microbatch = _ACTIONS[rows["schedule"]] * rows["pp"] * rows["virtual_stages"]
    count: np.ndarray = per_microbatch * num_microbatches(known, rows)
    return count


def first_orders(orders: Sequence[int], rows: Rows) -> np.ndarray:
    """Which rows have the first of those ``orders`` that agree on the axes of more than one rank."""
    table = np.zeros((2, 2, 2, len(ORDERS)), dtype=bool)
    for moving in np.ndindex(2, 2, 2):
        moves = {axis for axis, on in zip(("pp", "dp", "cp"), moving, strict=True) if on} | {"tp"}
        seen: list[list[str]] = []
        for index in orders:
            left = [axis for axis in ORDERS[index] if axis in moves]
            table[(*moving, index)] = left not in seen
            seen.append(left)
    first: np.ndarray = table[
        (*(np.asarray(rows[axis] > 1, dtype=int) for axis in ("pp", "dp", "cp")), rows["order"])
    ]
    return first


def ends_can_weigh(known: Facts, stages: np.ndarray) -> np.ndarray:
    """Whether counting embedding and head as a layer each leaves no stage empty, and is not the even cut."""
    slots = known.layers + 2
    can: np.ndarray = (stages >= 3) & (slots // stages >= 2) & (slots % stages != 1)
    return can


CONSTRAINTS: tuple[Constraint, ...] = (
    Constraint(
        name="devices",
        choices=("pp", "dp", "cp", "tp"),
        allows=lambda known, rows: rows["pp"] * rows["dp"] * rows["cp"] * rows["tp"] == known.devices,
        sentence="pp * dp * cp * tp must be the cluster's {devices} devices, got {pp} * {dp} * {cp} * {tp}",
        remedy="leave dp out, or take degrees whose product divides {devices}",
    ),
    Constraint(
        name="heads",
        choices=("tp",),
        allows=lambda known, rows: _divides(known.heads, rows["tp"]),
        sentence="tp must divide the {heads} query heads, got tp={tp}",
        remedy="take a divisor of {heads}",
    ),
    Constraint(
        name="kv_heads",
        choices=("tp",),
        allows=_shared_evenly,
        sentence="tp must divide the {kv_heads} key/value heads or be a multiple of them, got tp={tp}",
        remedy="take a divisor or a multiple of {kv_heads}",
    ),
    Constraint(
        name="intermediate",
        choices=("tp",),
        allows=lambda known, rows: _divides(known.intermediate, rows["tp"]),
        sentence="tp must divide intermediate_size {intermediate}, got tp={tp}",
        remedy="take a divisor of {intermediate}",
    ),
    Constraint(
        name="shared_experts",
        choices=("tp",),
        allows=lambda known, rows: _divides(known.shared_intermediate, rows["tp"]),
        sentence="tp must divide the shared experts' size {shared_intermediate}, got tp={tp}",
        remedy="take a divisor of {shared_intermediate}",
    ),
    Constraint(
        name="vocabulary",
        choices=("tp",),
        allows=lambda known, rows: rows["tp"] <= known.vocab,
        sentence="tp must be at most the vocabulary of {vocab}, got tp={tp}",
        remedy="lower tp",
    ),
    Constraint(
        name="positions",
        choices=(),
        allows=lambda known, rows: np.full(
            len(next(iter(rows.values()))), not known.positions or known.seq_len <= known.positions
        ),
        sentence="seq_len must be at most the model's {positions} learned positions, got {seq_len}",
        remedy="shorten the sequences or take a model with rotary positions",
    ),
    Constraint(
        name="context",
        choices=("cp",),
        allows=lambda known, rows: _divides(known.seq_len, np.where(rows["cp"] > 1, 2 * rows["cp"], 1)),
        sentence="2 * cp must divide seq_len {seq_len}, got cp={cp}",
        remedy="take half a divisor of {seq_len}: a ring's ranks have an early and a late chunk each",
    ),
    Constraint(
        name="layers",
        choices=("pp",),
        allows=lambda known, rows: rows["pp"] <= known.layers,
        sentence="pp must be at most the model's {layers} layers, got pp={pp}",
        remedy="lower pp",
    ),
    Constraint(
        name="no_experts",
        choices=("ep", "etp"),
        allows=lambda known, rows: (rows["ep"] * rows["etp"] == 1) | (known.experts > 0),
        sentence="ep and etp need a model with experts, got ep={ep} etp={etp}",
        remedy="leave them out",
    ),
    Constraint(
        name="experts",
        choices=("ep",),
        allows=lambda known, rows: (known.experts == 0) | (rows["ep"] <= known.experts),
        sentence="ep must be at most the {experts} experts, got ep={ep}",
        remedy="lower ep",
    ),
    Constraint(
        name="expert_size",
        choices=("etp",),
        allows=lambda known, rows: (known.experts == 0) | _divides(known.expert_intermediate, rows["etp"]),
        sentence="etp must divide the experts' size {expert_intermediate}, got etp={etp}",
        remedy="take a divisor of {expert_intermediate}",
    ),
    Constraint(
        name="expert_ranks",
        choices=("dp", "cp", "tp", "ep", "etp"),
        allows=lambda known, rows: rows["dp"] * rows["cp"] * rows["tp"] % (rows["ep"] * rows["etp"]) == 0,
        sentence="ep * etp must divide dp * cp * tp, got {ep} * {etp} and {dp} * {cp} * {tp}",
        remedy="lower ep or etp: expert parallelism cuts the same ranks again",
    ),
    Constraint(
        name="batch",
        choices=("dp", "micro_batch"),
        allows=lambda known, rows: _divides(known.global_batch, rows["dp"] * rows["micro_batch"]),
        sentence="dp * micro_batch must divide global_batch {global_batch}, got {dp} * {micro_batch}",
        remedy="lower micro_batch, or move ranks from dp to pp, cp or tp",
    ),
    Constraint(
        name="shard",
        choices=("zero_stage", "shard", "dp", "cp"),
        allows=lambda known, rows: (
            (rows["zero_stage"] == 0) | (rows["dp"] * rows["cp"] % np.maximum(rows["shard"], 1) == 0)
        ),
        sentence="shard must divide the dp * cp data-parallel ranks, got shard={shard} and {dp} * {cp}",
        remedy="leave it out to share over all of them",
    ),
    Constraint(
        name="sequence_parallel",
        choices=("sequence_parallel", "tp"),
        allows=lambda known, rows: (rows["sequence_parallel"] == 0) | (rows["tp"] > 1),
        sentence="sequence_parallel needs tp > 1, got tp={tp}",
        remedy="leave it out",
    ),
    Constraint(
        name="tokens",
        choices=("sequence_parallel", "tp", "cp", "micro_batch"),
        allows=lambda known, rows: (
            (rows["sequence_parallel"] == 0)
            | (rows["micro_batch"] * known.seq_len // rows["cp"] % rows["tp"] == 0)
        ),
        sentence=(
            "sequence parallelism needs tp to divide the tokens of a microbatch, "
            "got micro_batch={micro_batch} * seq_len={seq_len} / cp={cp} and tp={tp}"
        ),
        remedy="change micro_batch or seq_len, or turn sequence_parallel off",
    ),
    Constraint(
        name="schedule_stages",
        choices=("schedule", "virtual_stages"),
        allows=lambda known, rows: (
            _TAKES_ANY[rows["schedule"]] | (_STAGES[rows["schedule"]] == rows["virtual_stages"])
        ),
        sentence="virtual_stages={virtual_stages} is not what {schedule} has",
        remedy="leave virtual_stages out, or take interleaved, bfs or interleaved-zb",
    ),
    Constraint(
        name="stages",
        choices=("pp", "virtual_stages"),
        allows=lambda known, rows: rows["pp"] * rows["virtual_stages"] <= known.layers,
        sentence="pp * virtual_stages must be at most the {layers} layers, got {pp} * {virtual_stages}",
        remedy="lower one of the two, or take a schedule with fewer stages a rank",
    ),
    Constraint(
        name="actions",
        choices=("schedule", "virtual_stages", "pp", "dp", "micro_batch"),
        allows=lambda known, rows: num_actions(known, rows) <= MAX_ACTIONS,
        sentence=(
            f"a step may have at most {MAX_ACTIONS:,} actions, "
            "got pp={pp} * virtual_stages={virtual_stages} stages of {num_microbatches} microbatches"
        ),
        remedy="raise micro_batch or dp",
    ),
)

REPRESENTATIVES: tuple[Constraint, ...] = (
    Constraint(
        name="one_pipeline_rank",
        choices=("pp", "schedule", "virtual_stages"),
        allows=lambda known, rows: (
            (rows["pp"] > 1) | ((rows["schedule"] == _ONE_RANK_SCHEDULE) & (rows["virtual_stages"] == 1))
        ),
        sentence="with one pipeline rank there is nothing to schedule, got {schedule}",
        remedy="it is covered as 1f1b",
    ),
    Constraint(
        name="one_stage_a_rank",
        choices=("schedule", "virtual_stages"),
        allows=lambda known, rows: ~_TAKES_ANY[rows["schedule"]] | (rows["virtual_stages"] > 1),
        sentence="{schedule} with one stage a rank does what 1f1b, afab or zb-h1 does and holds no less",
        remedy="it is covered by those",
    ),
    Constraint(
        name="nothing_to_shard",
        choices=("zero_stage", "dp", "cp"),
        allows=lambda known, rows: (rows["zero_stage"] == 0) | (rows["dp"] * rows["cp"] > 1),
        sentence="ZeRO shards nothing over one rank, got zero_stage={zero_stage} with dp={dp} cp={cp}",
        remedy="it is covered as zero_stage=0",
    ),
    Constraint(
        name="shared_by_one",
        choices=("zero_stage", "shard"),
        allows=lambda known, rows: (rows["shard"] == 1) == (rows["zero_stage"] == 0),
        sentence="ZeRO over shard={shard} rank shards nothing, and nothing is shared without it",
        remedy="it is covered as zero_stage=0",
    ),
    Constraint(
        name="order",
        choices=("order", "pp", "dp", "cp"),
        allows=lambda known, rows: first_orders(range(len(ORDERS)), rows),
        sentence="the order {order} differs from another only in axes of one rank",
        remedy="it is covered as the first of those that agree",
    ),
    Constraint(
        name="ends",
        choices=("ends", "pp", "virtual_stages"),
        allows=lambda known, rows: (
            (rows["ends"] == 0) | ends_can_weigh(known, rows["pp"] * rows["virtual_stages"])
        ),
        sentence=(
            "counting embedding and head as a layer each cuts {layers} layers into "
            "{pp} * {virtual_stages} stages as evenly as not, or leaves one empty"
        ),
        remedy="it is covered as ends=0",
    ),
)


def broken(known: Facts, rows: Rows, table: Sequence[Constraint] = CONSTRAINTS) -> np.ndarray:
    """Which rows break which constraints of a table: [constraint, row]. Each row has all choices."""
    count = len(next(iter(rows.values())))
    masks = [~np.broadcast_to(constraint.allows(known, rows), count) for constraint in table]
    return np.array(masks).reshape(len(table), count)
