"""A schedule: which microbatch each pipeline rank works on, and when.

F is the forward of one microbatch through one stage, B its full backward, I and W the two halves of that: the
gradient of the stage's input, and those of its weights. A rank holds one stage or several.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable

import numpy as np
from attrs import Attribute, field, frozen
from attrs.validators import instance_of

from picotron.errors import PlanError
from picotron.planner.actions import (
    B,
    Cell,
    Columns,
    F,
    I,
    Orders,
    W,
    cells,
    make_orders,
    parse_cells,
    stack_orders,
)
from picotron.planner.validators import shown, whole
from picotron.planner.validity import Offence, Where, first_offence, held_stages, placement

MAX_ACTIONS = 4_000_000  # of one step over all pipeline ranks


def _ranks(value: Iterable[int]) -> tuple[int, ...]:
    return tuple(value)


@frozen(kw_only=True)
class Schedule:
    """For each pipeline rank, its actions in order; ``stage_ranks`` says which rank holds each stage.

    A value that exists is valid: every stage runs each microbatch forward once and then back once (a B, or an
    I and then a W), on its own rank. That the ranks cannot wait for each other in a circle is checked apart.
    ``orders`` takes nested sequences too, of actions, their texts and pairs.

    ``bidirectional``: the later half of the microbatches runs stage s on the rank of the s-th stage from the
    end, so that every rank holds two stages and two ranks hold a copy of each (DualPipe).
    """

    name: str
    num_microbatches: int = field(validator=whole(1))
    stage_ranks: tuple[int, ...] = field(converter=_ranks)
    bidirectional: bool = field(default=False, validator=instance_of(bool))
    orders: Orders = field(converter=make_orders)

    @orders.validator
    def _valid(self, _: Attribute[object], orders: Orders) -> None:
        if not self.stage_ranks or set(self.stage_ranks) != set(range(len(orders))):
            raise PlanError(
                f"every rank must hold a stage: {len(orders)} ranks, stages on {self.stage_ranks}"
            )
        if self.bidirectional and self.num_microbatches % 2:
            raise PlanError(
                "a bidirectional schedule needs an even number of microbatches, half of them from each end, "
                f"got {self.num_microbatches}"
            )
        offence = first_offence(orders, self.where)
        if offence is not None:
            raise PlanError(offence.message)

    @property
    def where(self) -> Where:
        """Which rank runs what."""
        return Where(
            stage_ranks=self.stage_ranks,
            num_microbatches=self.num_microbatches,
            bidirectional=self.bidirectional,
        )

    @property
    def num_ranks(self) -> int:
        """Pipeline ranks."""
        return len(self.orders)

    @property
    def num_stages(self) -> int:
        """Stages over all ranks."""
        return len(self.stage_ranks)

    def rank_stages(self, rank: int) -> tuple[int, ...]:
        """The stages that a rank holds, ascending."""
        return tuple(held_stages(self.where, rank))

    def owner(self, stage: int, microbatch: int) -> int:
        """The rank that runs a microbatch on a stage."""
        return int(self.where.owners(np.array([stage]), np.array([microbatch]))[0])

    def __str__(self) -> str:
        return schedule_to_csv(self)

    def _repr_html_(self) -> str:
        """The schedule as a picture, for notebooks."""
        from picotron.planner.draw_schedule import orders_svg

        return orders_svg(self)


def loop_ranks(num_ranks: int, virtual_stages: int = 1) -> tuple[int, ...]:
    """The rank of each stage where stages go round the ranks (Narayanan et al. 2021, section 2.2.2)."""
    return tuple(stage % num_ranks for stage in range(num_ranks * virtual_stages))


def v_ranks(num_ranks: int) -> tuple[int, ...]:
    """The rank of each stage where stages go up the ranks and come back (Qi et al. 2024, 2405.15362)."""
    return (*range(num_ranks), *reversed(range(num_ranks)))


def check_sizes(num_ranks: int, num_microbatches: int, *, actions_per_microbatch: int) -> None:
    """Raise PlanError unless there are ranks and microbatches, and no more actions than MAX_ACTIONS."""
    for size in (num_ranks, num_microbatches):
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise PlanError(
                "a schedule needs at least one rank and one microbatch, "
                f"got {num_ranks!r} and {num_microbatches!r}"
            )
    if num_microbatches * actions_per_microbatch > MAX_ACTIONS:
        raise PlanError(
            f"a schedule may have at most {MAX_ACTIONS:,} actions, {actions_per_microbatch:,} for each "
            f"microbatch, got {num_microbatches * actions_per_microbatch:,}; use fewer microbatches"
        )


def peak_microbatches(schedule: Schedule, rank: int) -> int:
    """Most activations that ``rank`` holds at once: of a (stage, microbatch) from its F to its B or W."""
    phase = schedule.orders.phase[schedule.orders.span(rank)]
    step = np.zeros(4, dtype=np.int64)
    step[[F, B, I, W]] = 1, -1, 0, -1
    return int(step[phase].cumsum().max())


def schedule_to_csv(schedule: Schedule) -> str:
    """One line a rank, one cell an action: torch's compute-only pipelining CSV."""
    return "".join(",".join(cells(schedule.orders, rank)) + "\n" for rank in range(schedule.num_ranks))


def schedule_from_csv(text: str, *, name: str = "custom") -> Schedule:
    """The schedule that ``schedule_to_csv`` writes as ``text``; empty cells (idle slots) are skipped.

    Raises PlanError, naming line and cell, where the text is not a schedule.
    """
    return schedule_of(orders_from_csv(text), name=name)


def orders_from_csv(text: str) -> Orders:
    """The orders in a text, whether they are a schedule or not. Raises PlanError for a cell that is none."""
    if not isinstance(text, str):
        raise PlanError(f"orders must be a text of lines of cells, got {shown(text)}")
    ranks: list[Columns] = []
    try:
        for line in csv.reader(io.StringIO(text.removeprefix("\ufeff"))):
            ranks.append(parse_cells([cell for cell in line if cell.strip()]))
    except (PlanError, csv.Error) as error:
        raise PlanError(f"line {len(ranks) + 1}: {error}") from None
    return stack_orders(ranks)


def schedule_of(orders: Orders | Iterable[Iterable[Cell]], *, name: str = "custom") -> Schedule:
    """The schedule of these orders; stages and microbatches are those that they name.

    Raises PlanError where they are no schedule.
    """
    orders = make_orders(orders)
    where = where_of(orders)
    return Schedule(
        name=name,
        num_microbatches=where.num_microbatches,
        stage_ranks=where.stage_ranks,
        bidirectional=where.bidirectional,
        orders=orders,
    )


def where_of(orders: Orders) -> Where:
    """Which rank runs which stage, as the orders themselves tell.

    Raises PlanError where they cannot be a schedule: no actions, an idle rank, a gap in the numbers.
    """
    found = placement(orders)
    if isinstance(found, Offence):
        raise PlanError(found.message)
    return found
