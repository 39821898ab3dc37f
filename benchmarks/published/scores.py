"""How well predictions agree with measurements: relative errors, rank correlation and regret."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from attrs import frozen

REPEAT_NOISE = 0.03  # standard deviation of a published step time under repetition and between releases
_DRAWS = 1000
_SEED = 20210404


@frozen
class Errors:
    """Of predicted over measured, less 1; ``count`` of 0 leaves the rest at NaN."""

    count: int
    mean_absolute: float = float("nan")
    median_absolute: float = float("nan")
    mean: float = float("nan")
    median: float = float("nan")


@frozen
class Ranking:
    """How well predictions rank the layouts of one model on one machine, and what repeat noise alone allows.

    ``regret``: how much slower than the measured best the layout ranked first was measured.
    """

    layouts: int
    spearman: float
    ceiling: float
    regret: float
    noise_regret: float


def relative_errors(predicted: Sequence[float], measured: Sequence[float]) -> Errors:
    """Errors over the pairs in which both are there; None and NaN are not."""
    ours, theirs = np.array(predicted, dtype=float), np.array(measured, dtype=float)
    there = np.isfinite(ours) & np.isfinite(theirs)
    error = ours[there] / theirs[there] - 1
    if not error.size:
        return Errors(0)
    size = np.abs(error)
    return Errors(
        error.size, *(float(v) for v in (size.mean(), np.median(size), error.mean(), np.median(error)))
    )


def ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 1, ties sharing their mean rank: (10, 30, 10) has ranks (1.5, 3, 1.5)."""
    _, place, count = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[place]


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation of Spearman 1904; NaN where all of one side is tied."""
    x, y = ranks(a), ranks(b)
    x, y = x - x.mean(), y - y.mean()
    spread = float(np.sqrt((x**2).sum() * (y**2).sum()))
    return float((x * y).sum()) / spread if spread else float("nan")


def regret(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """How much slower than the measured best the layout is that is predicted fastest."""
    return float(measured[int(np.argmin(predicted))] / np.min(measured)) - 1


def ranking(predicted: Sequence[float], measured: Sequence[float]) -> Ranking:
    """Both scores, beside those of a perfect model whose measurements repeat within ``REPEAT_NOISE``."""
    draw = np.random.default_rng(_SEED).normal(0, REPEAT_NOISE, (_DRAWS, len(measured)))
    repeats = np.asarray(measured, dtype=float) * np.exp(draw)
    return Ranking(
        len(measured),
        spearman(predicted, measured),
        float(np.mean([spearman(repeat, measured) for repeat in repeats])),
        regret(predicted, measured),
        float(np.mean([regret(repeat, measured) for repeat in repeats])),
    )
