"""What a search keeps of the candidates it has seen, and whether a bound says that others may matter.

Ties are told apart by the choices themselves, so that what is kept does not depend on what was seen first;
and a candidate is let go on a bound's word only if another fits, holds no more and is strictly faster.
"""

from __future__ import annotations

import numpy as np
from attrs import define, field, frozen

from picotron.planner.constraints import Rows
from picotron.planner.space import CELL, CHOICES, taken

TIE = 1e-9  # relative difference below which two times are not told apart


@frozen(kw_only=True)
class Wanted:
    """What a search keeps: what fits ``limit_bytes``, the ``keep`` fastest, and the front up to ``reach``."""

    limit_bytes: int
    keep: int
    reach: float


@define(kw_only=True, eq=False)
class Kept:
    """The candidates found so far that are among the fastest or on the front."""

    wanted: Wanted
    rows: Rows = field(factory=lambda: {name: np.zeros(0) for name in CHOICES})
    seconds: np.ndarray = field(factory=lambda: np.zeros(0))
    bytes: np.ndarray = field(factory=lambda: np.zeros(0))
    _front_seconds: np.ndarray = field(init=False, factory=lambda: np.zeros(0))
    _front_bytes: np.ndarray = field(init=False, factory=lambda: np.zeros(0))
    _slowest: float = field(init=False, default=np.inf)  # of the fastest that are kept
    horizon: float = field(init=False, default=np.inf)  # what is slower has no place on the front

    def add(self, rows: Rows, seconds: np.ndarray, size: np.ndarray) -> None:
        """Take in candidates that fit."""
        useful = self.may_matter(seconds, size)
        rows = taken(rows, useful)
        self.rows = {name: np.concatenate([self.rows[name], rows[name]]) for name in CHOICES}
        self.seconds = np.concatenate([self.seconds, _rounded(seconds[useful])])
        self.bytes = np.concatenate([self.bytes, size[useful]])
        self._drop_repeats()
        fastest, front = self.fastest(), self.front()
        which = np.unique(np.concatenate([fastest, front]))
        self._front_seconds, self._front_bytes = self.seconds[front], self.bytes[front]
        if len(fastest) == self.wanted.keep:
            self._slowest = float(self.seconds[fastest[-1]])
        if len(fastest):
            self.horizon = float(self.seconds[fastest[0]]) * self.wanted.reach
        self.rows = taken(self.rows, which)
        self.seconds, self.bytes = self.seconds[which], self.bytes[which]

    def may_matter(self, seconds: np.ndarray, size: np.ndarray) -> np.ndarray:
        """Whether candidates that take and hold at least so much may be kept; any shapes that broadcast."""
        at = np.searchsorted(-self._front_bytes, -np.asarray(size), side="left")
        quickest = np.append(self._front_seconds, np.inf)[at]  # of those that hold no more
        ceiling = np.maximum(np.minimum(quickest, self.horizon), self._slowest) * (1 + TIE)
        matters: np.ndarray = (size <= self.wanted.limit_bytes) & (seconds <= ceiling)
        return matters

    def fastest(self) -> np.ndarray:
        """Indices of the fastest of each cell, in order; of equally fast ones the plainest, then smallest."""
        plain = [self.rows[name] for name in ("zero_stage", "recompute_layers", "recompute", "offload")]
        order = self._ordered([np.round(self.bytes), *plain])
        degrees = np.stack([self.rows[name][order] for name in CELL])
        _, first = np.unique(degrees, axis=1, return_index=True)
        found: np.ndarray = order[np.sort(first)[: self.wanted.keep]]
        return found

    def front(self) -> np.ndarray:
        """Indices of those that none beats in both time and memory, fastest first."""
        order = self._ordered([np.round(self.bytes)])
        if not len(order):
            return order
        size = np.round(self.bytes[order])
        leads = np.append(True, size[1:] < np.minimum.accumulate(size)[:-1])
        near = self.seconds[order] <= self.seconds[order[0]] * self.wanted.reach
        found: np.ndarray = order[leads & near]
        return found

    def _ordered(self, next_keys: list[np.ndarray]) -> np.ndarray:
        """By time, then the keys (the last first), then the choices: the same whatever was found first."""
        choices = [self.rows[name] for name in reversed(CHOICES)]
        return np.lexsort((*choices, *next_keys, self.seconds))

    def _drop_repeats(self) -> None:
        """Keep each candidate once."""
        table = np.stack([self.rows[name] for name in CHOICES])
        _, first = np.unique(table, axis=1, return_index=True)
        self.rows = taken(self.rows, first)
        self.seconds, self.bytes = self.seconds[first], self.bytes[first]


def _rounded(seconds: np.ndarray) -> np.ndarray:
    """Times without their last digits, in which equal sums of other order differ."""
    scale = 10.0 ** (11 - np.ceil(np.log10(np.maximum(seconds, 1e-30))))
    rounded: np.ndarray = np.round(seconds * scale) / scale
    return rounded
