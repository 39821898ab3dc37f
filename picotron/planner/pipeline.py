"""Which microbatch each pipeline rank works on, and when.

A ``Schedule`` orders actions: F, the forward of one microbatch through one stage, and B, its full
backward. It prints and parses as torch's pipelining does (``2F0``: stage 2, forward, microbatch 0).
Sources: Huang et al. 2019, GPipe, arXiv:1811.06965; Narayanan et al. 2019, PipeDream, for 1F1B.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from itertools import accumulate

from attrs import Attribute, field, frozen

from picotron.errors import PlanError

MAX_ACTIONS = 250_000  # of one step over all pipeline ranks


class Phase(StrEnum):
    """What an action computes."""

    FORWARD = "F"
    BACKWARD = "B"


_ACTION = re.compile(r"(\d+)([FB])(\d+)")


@frozen(order=True)
class Action:
    """One phase of one microbatch on one stage."""

    stage: int
    phase: Phase
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.phase}{self.microbatch}"


def parse_action(text: str) -> Action:
    """The action that prints as ``text``. Raises PlanError for anything else."""
    match = _ACTION.fullmatch(text.strip())
    if match is None:
        raise PlanError(f"an action must look like 2F0 (stage, F or B, microbatch), got {text!r}")
    return Action(int(match[1]), Phase(match[2]), int(match[3]))


@frozen(kw_only=True)
class Schedule:
    """For each pipeline rank, its actions in order; ``stage_ranks`` says which rank holds each stage.

    A value that exists is valid: every stage runs each microbatch forward once and backward once, in that
    order and on its own rank. That the ranks cannot wait for each other in a circle is checked when the
    schedule is lowered to a program.
    """

    name: str
    num_microbatches: int
    stage_ranks: tuple[int, ...]
    orders: tuple[tuple[Action, ...], ...] = field()

    @orders.validator
    def _valid(self, _: Attribute[object], orders: tuple[tuple[Action, ...], ...]) -> None:
        if set(self.stage_ranks) != set(range(len(orders))):
            raise PlanError(
                f"every rank must hold a stage: {len(orders)} ranks, stages on {self.stage_ranks}"
            )
        for rank, order in enumerate(orders):
            _check_order(self, rank, order)

    @property
    def num_ranks(self) -> int:
        """Pipeline ranks."""
        return len(self.orders)

    @property
    def num_stages(self) -> int:
        """Stages over all ranks."""
        return len(self.stage_ranks)

    def __str__(self) -> str:
        return schedule_to_csv(self)


def _check_order(schedule: Schedule, rank: int, order: Sequence[Action]) -> None:
    """Raise PlanError, naming the first offending action, unless ``order`` is complete and in order."""
    stages = {stage for stage, owner in enumerate(schedule.stage_ranks) if owner == rank}
    done: set[Action] = set()
    for position, action in enumerate(order):
        where = f"rank {rank}, position {position}, action {action}"
        if action.stage not in stages:
            raise PlanError(f"{where}: this rank holds stages {sorted(stages)}")
        if not 0 <= action.microbatch < schedule.num_microbatches:
            raise PlanError(f"{where}: microbatch must be in [0, {schedule.num_microbatches})")
        if action in done:
            raise PlanError(f"{where}: each action runs once")
        forward = Action(action.stage, Phase.FORWARD, action.microbatch)
        if action.phase is Phase.BACKWARD and forward not in done:
            raise PlanError(f"{where}: backward needs {forward} before it")
        done.add(action)
    expected = 2 * len(stages) * schedule.num_microbatches
    if len(done) != expected:
        raise PlanError(f"rank {rank} must run {expected} actions (an F and a B each), got {len(done)}")


def afab(num_ranks: int, num_microbatches: int) -> Schedule:
    """All forwards, then all backwards (GPipe): the smallest program, m activations held."""
    return _one_stage_a_rank("afab", num_ranks, num_microbatches, lambda rank: num_microbatches)


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Schedule:
    """1F1B (PipeDream-flush): rank s holds at most min(m, p - s) activations."""
    return _one_stage_a_rank(
        "1f1b", num_ranks, num_microbatches, lambda rank: min(num_ranks - rank, num_microbatches)
    )


def _one_stage_a_rank(
    name: str, num_ranks: int, num_microbatches: int, held: Callable[[int], int]
) -> Schedule:
    """Each rank runs ``held(rank)`` forwards, then alternates B and F, then the backwards left."""
    if num_ranks < 1 or num_microbatches < 1:
        raise PlanError(
            f"a schedule needs at least one rank and one microbatch, got {num_ranks} and {num_microbatches}"
        )

    if 2 * num_ranks * num_microbatches > MAX_ACTIONS:
        raise PlanError(
            f"a schedule may have at most {MAX_ACTIONS:,} actions, two for each microbatch and stage, "
            f"got {2 * num_ranks * num_microbatches:,}; use fewer microbatches"
        )

    def order(rank: int) -> Iterable[Action]:
        forwards = (Action(rank, Phase.FORWARD, index) for index in range(num_microbatches))
        backwards = (Action(rank, Phase.BACKWARD, index) for index in range(num_microbatches))
        for _ in range(held(rank)):
            yield next(forwards)
        for forward in forwards:
            yield next(backwards)
            yield forward
        yield from backwards

    return Schedule(
        name=name,
        num_microbatches=num_microbatches,
        stage_ranks=tuple(range(num_ranks)),
        orders=tuple(tuple(order(rank)) for rank in range(num_ranks)),
    )


SCHEDULES: dict[str, Callable[[int, int], Schedule]] = {"afab": afab, "1f1b": one_f_one_b}


def make_schedule(name: str, num_ranks: int, num_microbatches: int) -> Schedule:
    """The schedule of that name. Raises PlanError for an unknown one."""
    if name not in SCHEDULES:
        raise PlanError(f"schedule must be one of {', '.join(SCHEDULES)}, got {name!r}")
    return SCHEDULES[name](num_ranks, num_microbatches)


def peak_microbatches(schedule: Schedule, rank: int) -> int:
    """Most microbatches whose activations ``rank`` holds at once."""
    step = {Phase.FORWARD: 1, Phase.BACKWARD: -1}
    return max(accumulate(step[action.phase] for action in schedule.orders[rank]))


def schedule_to_csv(schedule: Schedule) -> str:
    """One line a rank, one cell an action: torch's compute-only pipelining CSV."""
    return "".join(",".join(map(str, order)) + "\n" for order in schedule.orders)


def schedule_from_csv(text: str, *, name: str = "custom") -> Schedule:
    """The schedule that ``schedule_to_csv`` writes as ``text``; empty cells (idle slots) are skipped.

    Raises PlanError, naming line and cell, where the text is not a schedule.
    """
    orders: list[tuple[Action, ...]] = []
    try:
        for cells in csv.reader(io.StringIO(text)):
            orders.append(tuple(parse_action(cell) for cell in cells if cell.strip()))
    except (PlanError, csv.Error) as error:
        raise PlanError(f"line {len(orders) + 1}: {error}") from None
    actions = [action for order in orders for action in order]
    if not actions:
        raise PlanError("a schedule needs at least one action, got an empty text")
    owners = {action.stage: rank for rank, order in enumerate(orders) for action in order}
    if sorted(owners) != list(range(len(owners))):
        raise PlanError(f"stages must be numbered from 0 without gaps, got {sorted(owners)}")
    return Schedule(
        name=name,
        num_microbatches=max(action.microbatch for action in actions) + 1,
        stage_ranks=tuple(owners[stage] for stage in range(len(owners))),
        orders=tuple(orders),
    )


def stage_split(
    layer_costs: Sequence[float], num_stages: int, *, first: float = 0.0, last: float = 0.0
) -> tuple[int, ...]:
    """Layers a stage, in order, so that the dearest stage costs least; every layer is in exactly one.

    ``first`` and ``last`` are what the embedding and the head add to the end stages, in the unit of
    ``layer_costs``. Among the splits with the least maximum it takes one with the least sum of squares.
    Exact, by dynamic programming over prefixes: O(layers² · stages).
    Raises PlanError when there are more stages than layers.
    """
    num_layers = len(layer_costs)
    if not 1 <= num_stages <= num_layers:
        raise PlanError(
            f"stages must be in [1, {num_layers}], one layer at least in each, got {num_stages}; lower pp"
        )
    sums = [0.0, *accumulate(layer_costs)]

    def cost(start: int, stop: int, stage: int) -> float:
        ends = first * (stage == 0) + last * (stage == num_stages - 1)
        return sums[stop] - sums[start] + ends

    limit, _ = _best_cuts(num_layers, num_stages, cost, max)
    tolerance = limit * (1 + 1e-12)

    def squared(start: int, stop: int, stage: int) -> float:
        value = cost(start, stop, stage)
        return value * value if value <= tolerance else float("inf")

    _, cuts = _best_cuts(num_layers, num_stages, squared, lambda left, right: left + right)
    return tuple(stop - start for start, stop in zip([0, *cuts[:-1]], cuts, strict=True))


def _best_cuts(
    num_layers: int,
    num_stages: int,
    cost: Callable[[int, int, int], float],
    join: Callable[[float, float], float],
) -> tuple[float, list[int]]:
    """Least joined cost of cutting the layers into stages, and where each stage stops."""
    best = {0: (0.0, [])}  # type: dict[int, tuple[float, list[int]]]
    for stage in range(num_stages):
        left = num_stages - stage - 1
        stops = range(stage + 1, num_layers - left + 1) if left else [num_layers]
        best = {
            stop: min(
                (
                    (join(total, cost(start, stop, stage)), [*cuts, stop])
                    for start, (total, cuts) in best.items()
                    if start < stop
                ),
                key=lambda found: found[0],
            )
            for stop in stops
        }
    return best[num_layers]
