"""Fits the constants of the time model to published runs, and says how well it predicts runs it has not seen.

The constants that ``presets/constants.json`` marks as calibrated are fitted by least squares on
log(predicted / measured) within their bounds, with a robust loss, a weak prior at their assumed values, and
families weighted by the square root of their size. Each family has a scale of its own in the fit, with a
prior of one: what is peculiar to one cluster or release is not spread over the constants.

Errors are given three ways: after fitting all families; for each family by a fit without it (leave one family
out); and that again with one scale for the family, as one observed run would give.

    python benchmarks/calibrate.py                     # fit, and print errors by family
    python benchmarks/calibrate.py --write             # and write constants.json and errors.json
    python benchmarks/calibrate.py --no-fit            # errors of the constants as they are
    python benchmarks/calibrate.py --rows FILE --json OUT

Needs scipy (the ``dev`` extra).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attrs import evolve, fields, frozen

from picotron.planner.cases import ARCHITECTURES, Cases
from picotron.planner.constants import Constants, constant_table, default_constants, replaced
from picotron.planner.estimate import estimate_seconds

PRESETS = Path(__file__).parent.parent / "picotron" / "planner" / "presets"
ROWS = Path(__file__).parent / "data" / "measured.csv"
PRIOR = 0.25  # standard deviation of a constant's logarithm about its assumed value
NOISE = 0.05  # of log(predicted / measured): what a good model leaves
ROW_FIELDS = ("seconds", "families", "trust", "sparse", "ids")
SCALE = 0.04  # standard deviation of the logarithm of a family's own scale
TRUST = {"A": 1.0, "B": 1.0, "C": 0.2}


@frozen(kw_only=True)
class Table:
    """The rows that can be scored, with their columns."""

    cases: Cases
    seconds: np.ndarray
    families: np.ndarray
    trust: np.ndarray
    sparse: np.ndarray
    ids: np.ndarray

    def __len__(self) -> int:
        return len(self.seconds)


@frozen(kw_only=True)
class Knob:
    """One fitted value: its path in the table, its assumed value and bounds."""

    path: str
    assumed: float
    low: float
    high: float
    spread: float  # standard deviation of its logarithm about the assumed value


def taken(cases: Cases, keep: np.ndarray) -> Cases:
    """The cases that ``keep`` selects (a mask or indices over columns of shape (n,))."""

    def part(value: Any) -> Any:
        names = [f.name for f in fields(type(value))]
        return evolve(
            value, **{name: np.broadcast_to(getattr(value, name), (len(cases),))[keep] for name in names}
        )

    return Cases(
        **{name: part(getattr(cases, name)) for name in ("model", "work", "machine", "software", "layout")}
    )


def read_table(path: str | None) -> Table:
    from published import cases_of, read_rows

    rows = [row for row in read_rows(path or ROWS) if not row.skipped and row.measured_step_seconds]
    return Table(
        cases=cases_of(rows),
        seconds=np.array([row.measured_step_seconds for row in rows]),
        families=np.array([row.family for row in rows]),
        trust=np.array([row.trust for row in rows]),
        sparse=np.array([row.sparse for row in rows]),
        ids=np.array([row.id for row in rows]),
    )


def knobs() -> list[Knob]:
    raw = json.loads((PRESETS / "constants.json").read_text(encoding="utf-8"))
    found = []
    for name, constant in constant_table().items():
        assumed = raw[name].get("assumed", raw[name]["value"])
        for key in constant.calibrated:
            value: Any = assumed
            for part in key.split(".") if key else ():
                value = value[part]
            low, high = constant.bounds
            found.append(
                Knob(
                    path=f"{name}.{key}" if key else name,
                    assumed=value,
                    low=max(low, 1e-9),
                    high=high,
                    spread=raw[name].get("spread", PRIOR),
                )
            )
    return found


def with_values(found: Sequence[Knob], logs: np.ndarray) -> Constants:
    return replaced(
        default_constants(),
        {knob.path: float(value) for knob, value in zip(found, np.exp(logs), strict=True)},
    )


def weights(table: Table) -> np.ndarray:
    _, index, counts = np.unique(table.families, return_inverse=True, return_counts=True)
    trust = np.array([TRUST[name] for name in table.trust])
    return np.asarray(trust * (np.minimum(counts, 60) ** 0.5 / counts)[index] ** 0.5)


def fit(table: Table, found: Sequence[Knob], start: np.ndarray | None = None) -> np.ndarray:
    """Logarithms of the fitted constants."""
    from scipy.optimize import least_squares

    assumed = np.log([knob.assumed for knob in found])
    low, high = np.log([knob.low for knob in found]), np.log([knob.high for knob in found])
    spread = np.array([knob.spread for knob in found])
    root = weights(table)
    use = root > 0
    small, root, seconds = taken(table.cases, use), root[use], np.log(table.seconds[use])
    names, family = np.unique(table.families[use], return_inverse=True)
    count = len(found)

    def residuals(values: np.ndarray) -> np.ndarray:
        logs, scales = values[:count], values[count:]
        predicted = np.log(estimate_seconds(small, with_values(found, logs)).step_seconds)
        error = (predicted + scales[family] - seconds) / NOISE
        robust = np.sign(error) * np.sqrt(
            np.log1p(error**2 / 4) * 4
        )  # Cauchy: what no cause explains pulls little
        return np.concatenate([root * robust, (logs - assumed) / spread, scales / SCALE])

    begin = np.clip(assumed if start is None else start, low + 1e-6, high - 1e-6)
    wide = np.full(len(names), 0.3)
    result = least_squares(
        residuals,
        np.concatenate([begin, np.zeros(len(names))]),
        bounds=(np.concatenate([low, -wide]), np.concatenate([high, wide])),
        diff_step=1e-3,
        max_nfev=30,
        xtol=1e-4,
        ftol=1e-4,
    )
    return np.asarray(result.x[:count])


def log_errors(table: Table, constants: Constants) -> np.ndarray:
    return np.log(estimate_seconds(table.cases, constants).step_seconds / table.seconds)


def left_out(table: Table, found: Sequence[Knob], start: np.ndarray) -> np.ndarray:
    """log(predicted / measured) of every row, by constants fitted without its family."""
    errors = np.full(len(table), np.nan)
    for family in np.unique(table.families):
        inside = table.families == family
        rest = evolve(
            table,
            cases=taken(table.cases, ~inside),
            **{name: getattr(table, name)[~inside] for name in ROW_FIELDS},
        )
        errors[inside] = log_errors(table, with_values(found, fit(rest, found, start)))[inside]
        print(f"  without {family}: {_percent(errors[inside])}", file=sys.stderr, flush=True)
    return errors


def _percent(errors: np.ndarray) -> str:
    size = np.abs(np.expm1(errors)) * 100
    bias = np.expm1(np.median(errors)) * 100
    return f"median {np.median(size):5.1f} mean {np.mean(size):5.1f} bias {bias:+5.1f}"


def scaled(table: Table, errors: np.ndarray) -> np.ndarray:
    """Errors after one scale for each family (dense and sparse apart), its median error."""
    result = errors.copy()
    for family in np.unique(table.families):
        for sparse in (False, True):
            inside = (table.families == family) & (table.sparse == sparse)
            if inside.any():
                result[inside] -= np.median(errors[inside])
    return result


def report(table: Table, sets: Mapping[str, np.ndarray]) -> str:
    lines = []
    keys = [(f, s) for f in dict.fromkeys(table.families) for s in (False, True)]
    for family, sparse in keys:
        inside = (table.families == family) & (table.sparse == sparse)
        if not inside.any():
            continue
        name = f"{family}{' moe' if sparse else ''}"
        cells = "  |  ".join(f"{label} {_percent(errors[inside])}" for label, errors in sets.items())
        lines.append(f"{name:14s} {''.join(sorted(set(table.trust[inside]))):2s} {inside.sum():4d}  {cells}")
    good = table.trust != "C"
    for name, inside in (("dense A+B", good & ~table.sparse), ("moe A+B", good & table.sparse)):
        cells = "  |  ".join(f"{label} {_percent(errors[inside])}" for label, errors in sets.items())
        lines.append(f"{name:14s}    {inside.sum():4d}  {cells}")
    return "\n".join(lines)


def quantiles(table: Table, errors: np.ndarray) -> dict[str, Any]:
    """Absolute log errors at 50, 80 and 95 %, by architecture and dense or sparse, where 8 rows tell."""
    kinds = np.broadcast_to(table.cases.machine.architecture, (len(table),)).astype(int)
    good = table.trust != "C"
    found: dict[str, Any] = {}
    for sparse in (False, True):
        for index in (None, *range(len(ARCHITECTURES))):
            inside = good & (table.sparse == sparse) & ((kinds == index) if index is not None else True)
            if inside.sum() < 8:
                continue
            name = f"{'any' if index is None else ARCHITECTURES[index]}/{'moe' if sparse else 'dense'}"
            size = np.quantile(np.abs(errors[inside]), [0.5, 0.8, 0.95])
            found[name] = {
                "rows": int(inside.sum()),
                **{
                    key: round(float(value), 4)
                    for key, value in zip(("median", "p80", "p95"), size, strict=True)
                },
            }
    return found


def write_constants(table: Table, found: Sequence[Knob], logs: np.ndarray) -> None:
    path = PRESETS / "constants.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    for knob, value in zip(found, np.exp(logs), strict=True):
        name, _, key = knob.path.partition(".")
        entry = raw[name]
        entry.setdefault("assumed", json.loads(json.dumps(entry["value"])))
        short = float(f"{value:.4g}")
        if not key:
            entry["value"] = short
            continue
        inner, *rest = entry["value"], *key.split(".")
        for part in rest[:-1]:
            inner = inner[part]
        inner[rest[-1]] = short
    for name in {knob.path.partition(".")[0] for knob in found}:
        raw[name]["calibrated_on"] = sorted(set(table.families[table.trust != "C"].tolist()))
    path.write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rows", help="CSV with the header of data/measured.csv")
    parser.add_argument("--no-fit", action="store_true", help="errors of the constants as they are")
    parser.add_argument("--quick", action="store_true", help="no leave-one-out")
    parser.add_argument("--write", action="store_true", help="write constants.json and errors.json")
    parser.add_argument("--json", help="errors of every row")
    options = parser.parse_args(arguments)
    table = read_table(options.rows)
    sets = {"as is": log_errors(table, default_constants())}
    if not options.no_fit:
        found = knobs()
        logs = fit(table, found)
        fitted = with_values(found, logs)
        for knob, value in zip(found, np.exp(logs), strict=True):
            edge = "  at its bound" if min(value / knob.low, knob.high / value) < 1.01 else ""
            print(f"{knob.path:36s} {knob.assumed:10.4g} -> {value:10.4g}{edge}")
        sets = {"fitted": log_errors(table, fitted)}
        if not options.quick:
            sets["left out"] = left_out(table, found, logs)
            sets["scaled"] = scaled(table, sets["left out"])
        else:
            sets["scaled"] = scaled(table, sets["fitted"])
    print(report(table, sets))
    if options.json:
        Path(options.json).write_text(
            json.dumps(
                {"ids": table.ids.tolist(), **{name: errors.tolist() for name, errors in sets.items()}}
            )
        )
    if options.write and not options.no_fit:
        write_constants(table, found, logs)
        if "left out" in sets:
            text = json.dumps(quantiles(table, sets["left out"]), indent=1) + "\n"
            (PRESETS / "errors.json").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
