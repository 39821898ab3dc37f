"""Orders of small pipelines, valid and spoilt, drawn by a numpy generator (thousands in seconds)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from property_tests.oracle_check import Act, Case

MOST_ACTIONS = 36


class Shape:
    """A placement: who runs each stage and microbatch."""

    def __init__(self, rng: np.random.Generator) -> None:
        while True:
            self.num_ranks = int(rng.integers(1, 5))
            self.kind = str(rng.choice(["line", "loop", "v", "both"]))
            self.num_microbatches = int(rng.integers(1, 5))
            if self.kind == "both":
                self.num_microbatches += self.num_microbatches % 2
            forth = list(range(self.num_ranks))
            self.stage_ranks = {
                "line": forth,
                "loop": forth * 2,
                "v": forth + forth[::-1],
                "both": forth,
            }[self.kind]
            if 2 * len(self.stage_ranks) * self.num_microbatches <= MOST_ACTIONS:
                break

    @property
    def owner(self) -> dict[tuple[int, int], int]:
        ranks, half = self.stage_ranks, self.num_microbatches // 2
        return {
            (stage, index): ranks[-1 - stage if self.kind == "both" and index >= half else stage]
            for stage in range(len(ranks))
            for index in range(self.num_microbatches)
        }


def draw_orders(rng: np.random.Generator, shape: Shape) -> Case:
    """Valid orders: as one worker would run them in some order, some then shuffled, some with pairs."""
    orders: Case = [[] for _ in range(shape.num_ranks)]
    owner = shape.owner
    for act in _one_worker(rng, shape):
        orders[owner[act[0], act[2]]].append((act,))
    if rng.random() < 0.35:
        for own in orders:
            for _ in range(int(rng.integers(1, 4))):
                _slide(rng, own)
    return [_paired(rng, own) for own in orders] if rng.random() < 0.3 else orders


def _one_worker(rng: np.random.Generator, shape: Shape) -> list[Act]:
    """Everything in an order that one worker could run; weight gradients come some time after their I."""
    split = float(rng.choice([0.0, 0.0, 0.5, 1.0]))
    num_stages = len(shape.stage_ranks)
    lives: list[list[Act]] = [
        [(stage, "F", index) for stage in range(num_stages)]
        + [(stage, "I" if rng.random() < split else "B", index) for stage in reversed(range(num_stages))]
        for index in range(shape.num_microbatches)
    ]
    left = [iter(life) for life in lives]
    done: list[Act] = []
    late: list[Act] = []
    for turn in _turns(rng, list(map(len, lives))):
        stage, phase, index = next(left[turn])
        done.append((stage, phase, index))
        late += [(stage, "W", index)] if phase == "I" else []
        while late and rng.random() < 0.4:
            done.append(late.pop(int(rng.integers(len(late)))))
    return done + late


def _turns(rng: np.random.Generator, lengths: list[int]) -> list[int]:
    """Which microbatch goes on: any at random, or one after the other begun and all in turn."""
    if rng.random() < 0.4:
        turns = [index for index, length in enumerate(lengths) for _ in range(length)]
        return [int(turn) for turn in rng.permutation(turns)]
    gap = int(rng.integers(1, 4))
    keys = [(step + gap * index, index) for index, length in enumerate(lengths) for step in range(length)]
    return [index for _, index in sorted(keys)]


def _slide(rng: np.random.Generator, own: list[tuple[Act, ...]]) -> None:
    """Move an action past neighbours of other microbatches or stages, so that the order stays valid."""
    if len(own) < 2:
        return
    at, step = int(rng.integers(len(own))), int(rng.choice([-1, 1]))
    for _ in range(int(rng.integers(1, 6))):
        to = at + step
        if not 0 <= to < len(own):
            return
        mine, other = own[at][0], own[to][0]
        if (mine[0], mine[2]) == (other[0], other[2]):
            return
        own[at], own[to], at = own[to], own[at], to


def _paired(rng: np.random.Generator, own: list[tuple[Act, ...]]) -> list[tuple[Act, ...]]:
    """Neighbours joined that may overlap."""
    out: list[tuple[Act, ...]] = []
    for cell in own:
        before = out[-1] if out else ()
        fits = (
            len(before) == 1
            and before[0][1] == "F"
            and cell[0][1] in "BI"
            and (before[0][0], before[0][2]) != (cell[0][0], cell[0][2])
        )
        if fits and rng.random() < 0.7:
            out[-1] = (before[0], cell[0])
        else:
            out.append(cell)
    return out


def mutate(rng: np.random.Generator, case: Case) -> Case:
    """The orders with one thing changed."""
    case = [list(own) for own in case]
    rank = int(rng.integers(len(case)))
    if case[rank]:
        MUTATIONS[int(rng.integers(len(MUTATIONS)))](rng, case, rank)
    return case


def _swap(rng: np.random.Generator, case: Case, rank: int) -> None:
    at, other = (int(rng.integers(len(case[rank]))) for _ in range(2))
    case[rank][at], case[rank][other] = case[rank][other], case[rank][at]


def _swap_neighbours(rng: np.random.Generator, case: Case, rank: int) -> None:
    at = int(rng.integers(len(case[rank])))
    case[rank][at : at + 2] = case[rank][at : at + 2][::-1]


def _move(rng: np.random.Generator, case: Case, rank: int) -> None:
    cell = case[rank].pop(int(rng.integers(len(case[rank]))))
    case[rank].insert(int(rng.integers(len(case[rank]) + 1)), cell)


def _drop(rng: np.random.Generator, case: Case, rank: int) -> None:
    case[rank].pop(int(rng.integers(len(case[rank]))))


def _double(rng: np.random.Generator, case: Case, rank: int) -> None:
    cell = case[rank][int(rng.integers(len(case[rank])))]
    case[rank].insert(int(rng.integers(len(case[rank]) + 1)), cell)


def _rename(rng: np.random.Generator, case: Case, rank: int) -> None:
    """Another stage, phase or microbatch."""
    at = int(rng.integers(len(case[rank])))
    cell = list(case[rank][at])
    half = int(rng.integers(len(cell)))
    stage, phase, index = cell[half]
    stage, phase, index = (
        (max(0, stage + int(rng.choice([-1, 1]))), phase, index),
        (stage, str(rng.choice(list("FBIW"))), index),
        (stage, phase, max(0, index + int(rng.choice([-1, 1])))),
    )[int(rng.integers(3))]
    cell[half] = (stage, phase, index)
    case[rank][at] = tuple(cell)


def _send_away(rng: np.random.Generator, case: Case, rank: int) -> None:
    """An action to another rank."""
    cell = case[rank].pop(int(rng.integers(len(case[rank]))))
    other = int(rng.integers(len(case)))
    case[other].insert(int(rng.integers(len(case[other]) + 1)), cell)


def _swap_ranks(rng: np.random.Generator, case: Case, rank: int) -> None:
    other = int(rng.integers(len(case)))
    case[rank], case[other] = case[other], case[rank]


def _join(rng: np.random.Generator, case: Case, rank: int) -> None:
    """Two neighbours into a pair, fit or not, or a pair into two."""
    at = int(rng.integers(len(case[rank])))
    acts = [act for cell in case[rank][at : at + 2] for act in cell]
    joined = len(acts) == 2 and len(case[rank][at]) == 1
    case[rank][at : at + 2] = [(acts[0], acts[1])] if joined else [(act,) for act in acts]


def _split(rng: np.random.Generator, case: Case, rank: int) -> None:
    """A B into an I and a W right behind it, or somewhere later."""
    singles = [at for at, cell in enumerate(case[rank]) if len(cell) == 1 and cell[0][1] == "B"]
    if singles:
        at = int(rng.choice(singles))
        stage, _, index = case[rank][at][0]
        case[rank][at] = ((stage, "I", index),)
        case[rank].insert(int(rng.integers(at + 1, len(case[rank]) + 1)), ((stage, "W", index),))


MUTATIONS = (
    *(_swap, _swap_neighbours, _swap_neighbours, _move, _move, _split),  # often leave the orders valid
    *(_drop, _double, _rename, _send_away, _swap_ranks, _join),
)


def draw_case(rng: np.random.Generator) -> tuple[Shape, Case]:
    """A placement, and orders that were made for it, in half of the cases then spoilt up to three times."""
    shape = Shape(rng)
    case = draw_orders(rng, shape)
    for _ in range(int(rng.choice([0, 0, 1, 1, 2, 3]))):
        case = mutate(rng, case)
    return shape, case


def cells_text(case: Case) -> list[list[str]]:
    """The cells as they are written."""
    return [[_cell_text(cell) for cell in own] for own in case]


def _cell_text(cell: Sequence[Act]) -> str:
    texts = [f"{stage}{phase}{index}" for stage, phase, index in cell]
    return texts[0] if len(texts) == 1 else f"({texts[0]};{texts[1]})OVERLAP_F_B"
