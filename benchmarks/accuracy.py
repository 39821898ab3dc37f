"""The planner's estimates beside published measurements: errors of step time and peak memory, by family.

``--rows`` takes any CSV with the header of ``benchmarks/data/measured.csv``; empty cells are filled by
``benchmarks/published/imputation.json``, line by line and counted. A step time is read from the printed step
time, else from tokens/s, else from TFLOP/s or utilisation by the row's convention. Peaks that print allocated
bytes are scored apart from reserved ones and those of nvidia-smi. Where a family measures at least six
layouts of one model on one machine, the order is scored too: Spearman's rank correlation, and regret, each
beside what repeat noise of 3 % would leave a perfect model.

    python benchmarks/accuracy.py                                  # our copy of the table: seconds
    python benchmarks/accuracy.py --rows mine.csv --json out.json
    python benchmarks/accuracy.py --families vtrainm --errors 10   # the worst rows, and what each is made of
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen
from published import PublishedRow, cases_of, counts, read_rows, scored
from published.scores import Errors, Ranking, ranking, relative_errors

from picotron.errors import PlanError
from picotron.planner.estimate import estimate_seconds
from picotron.planner.estimate_memory import estimate_bytes

OUR_ROWS = Path(__file__).parent / "data" / "measured.csv"
FEWEST_LAYOUTS = 6
NONE = float("nan")


@frozen(eq=False)
class Scored:
    """A row beside its estimates, NaN where there is none, and what they are made of."""

    row: PublishedRow
    step_seconds: float = NONE
    peak_bytes: float = NONE
    causes: dict[str, float] | None = None
    classes: dict[str, float] | None = None

    @property
    def measured_step_seconds(self) -> float:
        return self.row.measured_step_seconds or NONE

    @property
    def measured_peak_bytes(self) -> float:
        return self.row.measured_peak_bytes or NONE

    def peaks(self, *kinds: str) -> float:
        """The measured peak if it is of one of these kinds."""
        return self.measured_peak_bytes if self.row.memory_kind in kinds else NONE


def estimated(rows: Sequence[PublishedRow]) -> list[Scored]:
    """Every row with its estimates; skipped ones without."""
    chosen = scored(rows)
    if not chosen:
        return [Scored(row) for row in rows]
    cases = cases_of(chosen)
    time, memory = estimate_seconds(cases), estimate_bytes(cases)
    of_kind = {"allocated": memory.allocated_bytes, "reserved": memory.pool_bytes}
    peak = [
        np.broadcast_to(of_kind.get(row.memory_kind, memory.reserved_bytes), (len(chosen),))[i]
        for i, row in enumerate(chosen)
    ]
    by_row = {
        id(row): Scored(
            row,
            float(time.step_seconds[i]),
            float(peak[i]),
            {name: float(seconds[i]) for name, seconds in _columns(time.causes, len(chosen))},
            {name: float(size[i]) for name, size in _columns(memory.classes, len(chosen))},
        )
        for i, row in enumerate(chosen)
    }
    return [by_row.get(id(row), Scored(row)) for row in rows]


def _columns(table: Any, length: int) -> Iterator[tuple[str, np.ndarray]]:
    return ((name, np.broadcast_to(column, (length,))) for name, column in table.items())


def groups(results: Sequence[Scored]) -> Iterator[tuple[str, list[Scored]]]:
    """Families, then the whole by what the targets speak of, each with its rows."""
    for family in dict.fromkeys(one.row.family for one in results):
        yield family, [one for one in results if one.row.family == family]
    kinds: tuple[tuple[str, Callable[[PublishedRow], bool]], ...] = (
        ("dense, trust A and B", lambda row: row.trust in ("A", "B") and not row.sparse),
        ("mixture of experts, A and B", lambda row: row.trust in ("A", "B") and row.sparse),
        ("trust C and unstated", lambda row: row.trust not in ("A", "B")),
        ("all", lambda _: True),
    )
    for name, belongs in kinds:
        yield name, [one for one in results if one.row.skipped is None and belongs(one.row)]


def sweeps(results: Sequence[Scored]) -> Iterator[tuple[str, Ranking]]:
    """Every group of at least six layouts of one family, model, machine and work, and how they were ranked.

    Repeats of one layout count once, by the geometric mean of what was measured.
    """
    found: dict[tuple[object, ...], list[Scored]] = {}
    for one in results:
        if math.isfinite(one.step_seconds) and math.isfinite(one.measured_step_seconds):
            row = one.row
            same = (row.family, row.model_name, *row.model.values(), row.gpu, row.num_gpus, row.precision)
            found.setdefault((*same, row.work["global_batch"], row.work["seq_len"]), []).append(one)
    for members in found.values():
        layouts: dict[tuple[object, ...], list[Scored]] = {}
        for one in members:
            layouts.setdefault((one.row.profile, *one.row.layout.values()), []).append(one)
        if len(layouts) < FEWEST_LAYOUTS:
            continue
        row = members[0].row
        measured = [_geometric([one.measured_step_seconds for one in same]) for same in layouts.values()]
        predicted = [_geometric([one.step_seconds for one in same]) for same in layouts.values()]
        label = f"{row.family} {row.model_name}, {row.num_gpus} {row.gpu}, batch {row.work['global_batch']:g}"
        yield label, ranking(predicted, measured)


def _geometric(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def as_object(one: Scored) -> dict[str, object]:
    """One row of the JSON report; null stands for what was not measured, printed or estimated."""
    row = one.row
    return {
        "id": row.id,
        "family": row.family,
        "trust": row.trust,
        "skipped": row.skipped,
        "measured_step_seconds": row.measured_step_seconds,
        "predicted_step_seconds": one.step_seconds if math.isfinite(one.step_seconds) else None,
        "measured_peak_bytes": row.measured_peak_bytes,
        "predicted_peak_bytes": one.peak_bytes if math.isfinite(one.peak_bytes) else None,
    }


# --- what is printed


def report(results: Sequence[Scored]) -> Iterator[str]:
    """The tables of errors and of layout sweeps, skipped rows and the lines of imputation."""
    yield from _error_tables(results)
    rankings = list(sweeps(results))
    if rankings:
        yield ""
        yield "Layout sweeps: Spearman / what repeat noise allows, regret / what repeat noise leaves"
        for label, score in rankings:
            yield (
                f"  {label}: {score.layouts} layouts, {score.spearman:.3f} / {score.ceiling:.3f}, "
                f"{score.regret:.1%} / {score.noise_regret:.1%}"
            )
    skipped = Counter(one.row.skipped for one in results if one.row.skipped)
    yield ""
    yield f"Skipped: {sum(skipped.values())} of {len(results)} rows"
    yield from (f"  {count:5d}  {reason}" for reason, count in skipped.most_common())
    yield ""
    yield "Imputed (rows, line of imputation.json)"
    applied = counts(one.row.imputed for one in results if one.row.skipped is None)
    yield from (f"  {count:5d}  {name}" for name, count in applied.items() if count)


def _error_tables(results: Sequence[Scored]) -> Iterator[str]:
    tables: tuple[tuple[str, Callable[[Scored], float], Callable[[Scored], float]], ...] = (
        ("Step time", lambda one: one.step_seconds, lambda one: one.measured_step_seconds),
        ("Peak memory, allocated", lambda one: one.peak_bytes, lambda one: one.peaks("allocated")),
        (
            "Peak memory, reserved or of nvidia-smi",
            lambda one: one.peak_bytes,
            lambda one: one.peaks("reserved", "nvidia-smi"),
        ),
    )
    for title, predicted, measured in tables:
        lines = [
            _error_line(
                name, relative_errors([predicted(m) for m in members], [measured(m) for m in members])
            )
            for name, members in groups(results)
        ]
        there = [line for line in lines if line]
        if there:
            yield f"{title:40s} rows  mean |e|  median |e|  mean e  median e"
            yield from there
            yield ""


def _error_line(name: str, errors: Errors) -> str:
    if not errors.count:
        return ""
    return (
        f"  {name:38s} {errors.count:4d}  {errors.mean_absolute:8.1%}  {errors.median_absolute:10.1%}"
        f"  {errors.mean:+6.1%}  {errors.median:+8.1%}"
    )


def worst(results: Sequence[Scored], number: int) -> Iterator[str]:
    """The rows of the largest errors of time, then of memory, each with what its estimate is made of."""
    for title, unit, error, parts in (
        ("step time", 1.0, lambda o: o.step_seconds / o.measured_step_seconds - 1, lambda o: o.causes),
        ("peak memory", 2.0**30, lambda o: o.peak_bytes / o.measured_peak_bytes - 1, lambda o: o.classes),
    ):
        known = [one for one in results if math.isfinite(error(one))]
        if known:
            yield f"Largest errors of {title} (parts in {'s' if unit == 1 else 'GiB'})"
        for one in sorted(known, key=lambda o: abs(math.log1p(error(o))), reverse=True)[:number]:
            made = sorted(parts(one).items(), key=lambda item: -item[1])
            shown = ", ".join(f"{name} {value / unit:.3g}" for name, value in made if value > 0)
            yield f"  {one.row.id} {one.row.model_name} {_layout(one.row)}: {error(one):+.1%}; {shown}"


def _layout(row: PublishedRow) -> str:
    names = ("dp", "tp", "pp", "cp", "ep", "virtual_stages", "micro_batch", "zero_stage", "recompute_layers")
    degrees = " ".join(f"{name}={row.layout[name]:g}" for name in names)
    return f"[{row.num_gpus} {row.gpu} {row.precision} {row.profile} {degrees}]"


def _selected(rows: Sequence[PublishedRow], families: str | None, trust: str | None) -> list[PublishedRow]:
    wanted = families.split(",") if families else None
    if wanted and (unknown := [name for name in wanted if name not in {row.family for row in rows}]):
        raise PlanError(f"--families must name families of the file, got {unknown}")
    return [
        row
        for row in rows
        if (not wanted or row.family in wanted) and (not trust or row.trust in trust.upper())
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=Path, default=OUR_ROWS, metavar="FILE", help="a CSV of measurements")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write one object a row")
    parser.add_argument("--families", metavar="A,B", help="only these families")
    parser.add_argument("--trust", metavar="AB", help="only rows of these trusts")
    parser.add_argument("--errors", type=int, default=0, metavar="N", help="list the N worst rows")
    options = parser.parse_args()
    try:
        results = estimated(_selected(read_rows(options.rows), options.families, options.trust))
    except PlanError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(report(results)))
    if options.errors:
        print("\n" + "\n".join(worst(results, options.errors)))
    if options.json:
        try:
            options.json.write_text(json.dumps([as_object(one) for one in results], indent=1) + "\n")
        except OSError as error:
            print(f"error: --json must be a file that can be written: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
