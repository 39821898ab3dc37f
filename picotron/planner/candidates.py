"""Candidates one at a time: a row of choices as a plan, a plan as a row, and a row in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, overload

import numpy as np
from attrs import frozen

from picotron.errors import PlanError
from picotron.planner.cases import ORDERS, RECOMPUTES, SCHEDULE_NAMES
from picotron.planner.columns_of import layout_columns
from picotron.planner.constraints import Rows, ends_can_weigh
from picotron.planner.layout import even_ranges
from picotron.planner.plan import TrainingPlan, plan
from picotron.planner.space import CHOICES, FRACTIONS, Space, length, taken
from picotron.planner.topology import AXES

Row = Mapping[str, float]
"""One candidate: a number for each choice, coded as in ``LayoutColumns``."""


def row_of(rows: Rows, index: int) -> Row:
    """One row as plain numbers, in the order of ``CHOICES``."""
    return {name: rows[name][index].item() for name in CHOICES}


def stage_layers(layers: int, stages: int, ends: bool) -> tuple[int, ...]:
    """Layers of each stage: cut evenly, longer stages first; or with embedding and head as a layer each.

    >>> stage_layers(10, 4, False), stage_layers(10, 4, True)
    ((3, 3, 2, 2), (2, 3, 3, 2))
    """
    if not ends:
        return tuple(stop - start for start, stop in even_ranges(layers, stages))
    first, *middle, last = stage_layers(layers + 2, stages, False)
    return (first - 1, *middle, last - 1)


def spread(layers: int, share: float) -> tuple[bool, ...]:
    """Which of the layers are among a share of them, as evenly spread as can be.

    >>> spread(4, 0.5)
    (False, True, False, True)
    """
    count = round(share * layers)
    return tuple((index + 1) * count // layers > index * count // layers for index in range(layers))


def plan_of(space: Space, row: Row) -> TrainingPlan:
    """The plan of one candidate. Raises PlanError where the row is none."""
    layers, stages = space.model.num_layers, int(row["pp"] * row["virtual_stages"])
    options: dict[str, Any] = {
        name: int(row[name])
        for name in ("dp", "pp", "cp", "tp", "ep", "etp", "virtual_stages", "micro_batch")
    }
    options["bucket_bytes"] = int(space.cluster.profile.bucket_bytes)
    options["schedule"] = SCHEDULE_NAMES[int(row["schedule"])]
    options["order"] = ORDERS[int(row["order"])]
    options["sequence_parallel"] = bool(row["sequence_parallel"])
    options["stage_layers"] = stage_layers(layers, stages, bool(row["ends"]))
    if row["zero_stage"]:
        options["zero_stage"] = int(row["zero_stage"])
        if row["shard"] != row["dp"] * row["cp"]:
            options["shard"] = int(row["shard"])
    if row["recompute"]:
        mode = RECOMPUTES[int(row["recompute"])]
        chosen = spread(layers, row["recompute_layers"])
        options["recompute"] = tuple(mode if one else "none" for one in chosen)
    if row["offload"]:
        options["offload"] = spread(layers, row["offload"])
    return plan(space.model, space.cluster, space.work, **options)


def row_of_plan(made: TrainingPlan) -> Row:
    """The choices of a plan, as one row."""
    found = layout_columns(made)
    return {name: float(getattr(found, name)) for name in CHOICES}


def in_words(row: Row, *, layers: int | None = None) -> str:
    """A candidate for people, without the choices that are as usual."""
    parts = [f"{name}={int(row[name])}" for name in ("tp", "cp", "pp", "dp") if row[name] > 1 or name == "tp"]
    parts += [f"{name}={int(row[name])}" for name in ("ep", "etp") if row[name] > 1]
    parts.append(f"micro_batch={int(row['micro_batch'])}")
    if row["pp"] > 1:
        parts.append(SCHEDULE_NAMES[int(row["schedule"])])
        parts += [f"virtual_stages={int(row['virtual_stages'])}"] * (row["virtual_stages"] > 1)
    parts += ["sequence_parallel"] * bool(row["sequence_parallel"])
    if row["zero_stage"]:
        over = "" if row["shard"] == row["dp"] * row["cp"] else f" over {int(row['shard'])} ranks"
        parts.append(f"zero_stage={int(row['zero_stage'])}{over}")
    if row["recompute"]:
        share = (
            "" if row["recompute_layers"] == 1 else f" of {_percent(row['recompute_layers'])} of the layers"
        )
        parts.append(f"recompute={RECOMPUTES[int(row['recompute'])]}{share}")
    if row["offload"]:
        parts.append(f"offload of {_percent(row['offload'])} of the layers")
    parts += ["ends=1"] * bool(row["ends"])
    if ORDERS[int(row["order"])] != AXES:
        parts.append(f"order={','.join(ORDERS[int(row['order'])])}")
    return " ".join(parts)


def _percent(share: float) -> str:
    return f"{share:.0%}".replace("%", " %")


def representative(space: Space, row: Row) -> Row:
    """The candidate that runs alike and is counted in the row's place.

    Raises PlanError where a named value is no candidate's, such as a share of a shard that divides nothing.
    """
    found = dict(row)
    if found["pp"] == 1:
        found |= {"schedule": SCHEDULE_NAMES.index("1f1b"), "virtual_stages": 1}
    if found["dp"] * found["cp"] == 1:
        found["zero_stage"] = 0
    if not found["zero_stage"]:
        found["shard"] = 1
    if not found["recompute"] or not found["recompute_layers"]:
        found |= {"recompute": 0, "recompute_layers": 0.0}
    if found["tp"] == 1:
        found["sequence_parallel"] = 0
    stages = np.array([found["pp"] * found["virtual_stages"]])
    if not ends_can_weigh(space.known, stages.astype(np.int64))[0]:
        found["ends"] = 0
    moving = [axis for axis in ORDERS[int(found["order"])] if axis == "tp" or found[axis] > 1]
    same = [
        index
        for index, order in enumerate(ORDERS)
        if [axis for axis in order if axis == "tp" or found[axis] > 1] == moving
    ]
    found["order"] = same[0]
    return {name: found[name] for name in CHOICES}


def rows_of(rows: Sequence[Row]) -> Rows:
    """Columns of several rows."""
    return {
        name: np.array([row[name] for row in rows], dtype=np.float64 if name in FRACTIONS else np.int64)
        for name in CHOICES
    }


@frozen(kw_only=True, eq=False, repr=False)
class Plans(Sequence[TrainingPlan]):
    """Plans that are built when looked at, with each one's seconds of a step and bytes of a device."""

    space: Space
    rows: Rows
    seconds: np.ndarray
    bytes: np.ndarray

    def __len__(self) -> int:
        return length(self.rows)

    @overload
    def __getitem__(self, index: int) -> TrainingPlan: ...

    @overload
    def __getitem__(self, index: slice) -> Plans: ...

    def __getitem__(self, index: int | slice) -> TrainingPlan | Plans:
        """The plan at ``index``, or some of them, still to be built."""
        if isinstance(index, slice):
            return Plans(
                space=self.space,
                rows=taken(self.rows, np.arange(len(self))[index]),
                seconds=self.seconds[index],
                bytes=self.bytes[index],
            )
        if not -len(self) <= index < len(self):
            raise IndexError(f"a plan's number must be below {len(self)}, got {index}")
        return plan_of(self.space, row_of(self.rows, index))

    def row(self, index: int) -> Row:
        """The choices of the plan at ``index``, without building it."""
        return row_of(self.rows, index)

    def __repr__(self) -> str:
        return f"<{len(self)} plans, of which none is built until it is looked at>"


def named_choices(text: str) -> dict[str, Any]:
    """The choices in a text such as ``tp=4 pp=8 schedule=1f1b``. Raises PlanError for a word that is none.

    >>> named_choices("tp=4 recompute=full offload=0.5")
    {'tp': 4, 'recompute': 'full', 'offload': 0.5}
    """
    found = {}
    for word in text.split():
        name, equals, value = word.partition("=")
        if not equals or not value:
            raise PlanError(f"a layout must be written as tp=4 pp=8, got {word!r}")
        found[name.replace("-", "_")] = choice(name.replace("-", "_"), value)
    return found


def choice(name: str, text: str) -> Any:
    """One value of a choice, or several with commas between, as ``search`` takes them."""
    if name == "order":
        return tuple(item.strip() for item in text.split(","))
    values = tuple(_value(item.strip()) for item in text.split(","))
    return values[0] if len(values) == 1 else values


def _value(text: str) -> Any:
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text
