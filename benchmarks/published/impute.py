"""Filling what a row does not state: ``imputation.json``, applied line by line and counted.

The table is read in order. A line concerns one ``column``; it applies to a row whose column is still empty
and whose cells match (``match``: a regular expression a column, ``about`` for source, family, notes and model
name together, or a range of years), and gives a constant ``value``, the number that a ``pattern`` captures in
the text, or what the named ``rule`` (a function of ``model_rules`` or ``layout_rules``) makes of the row so
far. ``when``, ``then`` and ``source`` say the same in words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from . import layout_rules, model_rules
from .text import number_in

Facts = dict[str, Any]


def complete(facts: Facts) -> tuple[str, ...]:
    """Fills ``facts`` in place; returns the names of the lines that were applied, in order."""
    return tuple(line["name"] for line in table() if _applied(line, facts))


def counts(imputed: Iterable[tuple[str, ...]]) -> dict[str, int]:
    """How many rows each line of the table was applied to, in the table's order; unused lines count 0."""
    total = dict.fromkeys((line["name"] for line in table()), 0)
    for names in imputed:
        for name in names:
            total[name] += 1
    return total


@cache
def table() -> tuple[dict[str, Any], ...]:
    """The lines of the imputation table."""
    return tuple(json.loads((Path(__file__).parent / "imputation.json").read_text(encoding="utf-8")))


def rule(name: str) -> Callable[[Facts], Any]:
    """The function of that name in ``model_rules`` or ``layout_rules``."""
    function: Callable[[Facts], Any] | None = getattr(model_rules, name, None) or getattr(
        layout_rules, name, None
    )
    assert function is not None, f"imputation.json names the rule {name}, which there is not"
    return function


def _applied(line: Mapping[str, Any], facts: Facts) -> bool:
    column = line["column"]
    if facts.get(column) is not None or not _matches(line.get("match", {}), facts):
        return False
    value = _value(line, facts)
    if value is None:
        return False
    if isinstance(value, dict):  # a rule that fills several cells at once
        empty = {name: given for name, given in value.items() if facts.get(name) is None}
        facts.update(empty)
        facts.setdefault(column, line["name"])  # a mark, where the column is none of them
        return bool(empty)
    facts[column] = value
    return True


def _value(line: Mapping[str, Any], facts: Facts) -> Any:
    if "value" in line:
        return line["value"]
    if line["rule"] == "pattern":
        text = " ; ".join(facts[name] for name in line["about"].split())
        found = number_in(line["pattern"], text)
        return None if found is None else found * line.get("scale", 1)
    return rule(line["rule"])(facts)


def _matches(wanted: Mapping[str, Any], facts: Facts) -> bool:
    return all(_fits(column, condition, facts) for column, condition in wanted.items())


def _fits(column: str, condition: Any, facts: Facts) -> bool:
    if column == "year":
        year = facts["year"]
        return year is not None and condition[0] <= year <= condition[1]
    if column == "about":
        text = " ; ".join(facts[name] for name in ("family", "source", "notes", "model_name"))
    else:
        text = "" if facts[column] is None else str(facts[column])
    return re.search(condition, text, re.IGNORECASE) is not None
