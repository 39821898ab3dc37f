"""How far a predicted time may be off: the error on published runs that the constants were not fitted on.

``presets/errors.json`` is written by the calibration: for each architecture, dense or with experts, the
quantiles of the absolute relative error, every family of runs predicted with constants fitted on the others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files

QUANTILE = "median"  # half of the held-out runs are nearer than this


def relative_interval(architecture: str = "any", *, experts: bool = False) -> float:
    """The relative error to expect of a step's seconds on devices of ``architecture``.

    Where too few runs of it are known, that of all architectures.
    """
    kind = "moe" if experts else "dense"
    table = _table()
    row = table.get(f"{architecture}/{kind}", table[f"any/{kind}"])
    return float(row[QUANTILE])


@cache
def _table() -> Mapping[str, Mapping[str, float]]:
    text = (files("picotron.planner") / "presets" / "errors.json").read_text(encoding="utf-8")
    table: Mapping[str, Mapping[str, float]] = json.loads(text)
    return table
