"""How far a predicted time may be off: the error on runs that the constants were not fitted on.

``presets/errors.json`` is written by the calibration: for each architecture, dense or with experts, the
quantiles of |log(predicted / measured)| over published runs on accelerators, every family of runs estimated
with constants fitted on the others. Whatever was not measured is unknown: a CPU without measured costs, an
accelerator whose own costs were measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from attrs import field, frozen

from picotron.planner.cluster import ClusterSpec
from picotron.planner.validators import between

QUANTILE = "median"  # half of the held-out runs are nearer than this
WIDER = "p80"  # 80 % are


@frozen(kw_only=True)
class Interval:
    """Errors of known runs: ``half`` of them are nearer than one, ``most`` (80 %) than the other.

    An error is |log(predicted / measured)|, a factor's logarithm, for small ones the relative error.
    ``source`` says which runs.
    """

    half: float = field(validator=between(0, 10))
    most: float | None = None
    source: str = ""

    def half_range(self, seconds: float) -> tuple[float, float]:
        """Between which seconds half of such runs are."""
        return _around(seconds, self.half)

    def most_range(self, seconds: float) -> tuple[float, float] | None:
        """Between which seconds 80 % of such runs are, if that is known."""
        return None if self.most is None else _around(seconds, self.most)


def _around(seconds: float, error: float) -> tuple[float, float]:
    return seconds * math.exp(-error), seconds * math.exp(error)


MEASURED_CPU = Interval(
    half=0.08,  # the largest median of several runs of the benchmark: 5.3 to 8.1 %
    most=0.13,  # the largest error of any layout in the last of them: 13.5 %
    source="CPU seconds of 17 layouts on one calibrated machine, benchmarks/this_machine.py",
)


def known_interval(cluster: ClusterSpec, *, experts: bool = False) -> Interval | None:
    """What is known of the error of a step's seconds on ``cluster``; None where nothing is.

    On a CPU whose costs were measured it is that of CPU seconds: with a core for each rank, of the step.
    """
    device, is_measured = cluster.device, cluster.efficiency.measured is not None
    if device.kind == "cpu":
        return MEASURED_CPU if is_measured else None
    if is_measured:
        return None
    kind = "moe" if experts else "dense"
    own = f"{device.architecture}/{kind}"
    name = own if own in _table() else f"any/{kind}"
    row = _table()[name]
    among = f"{device.architecture} GPUs" if name == own else f"GPUs other than {device.architecture}"
    what = "runs with experts" if experts else "dense runs"
    return Interval(
        half=float(row[QUANTILE]),
        most=float(row[WIDER]),
        source=f"held-out error of closed forms on {row['rows']:.0f} published {what} on {among}",
    )


def interval_data(interval: Interval | None, seconds: float) -> dict[str, Any]:
    """What is known as values that JSON has: errors, ranges in seconds and source; None where nothing is."""
    half = interval.half_range(seconds) if interval else (None, None)
    most = (interval.most_range(seconds) if interval else None) or (None, None)
    return {
        "interval": interval.half if interval else None,
        "interval_of": "half of known runs",
        "interval_source": interval.source if interval else None,
        "step_seconds_low": half[0],
        "step_seconds_high": half[1],
        "wide_interval": interval.most if interval else None,
        "wide_interval_of": "80 % of known runs",
        "wide_step_seconds_low": most[0],
        "wide_step_seconds_high": most[1],
    }


@cache
def _table() -> Mapping[str, Mapping[str, float]]:
    text = (files("picotron.planner") / "presets" / "errors.json").read_text(encoding="utf-8")
    table: Mapping[str, Mapping[str, float]] = json.loads(text)
    return table
