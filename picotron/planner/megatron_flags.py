"""Flags as they were given: each read once by name, with its default, and the rest sorted into what is left.

The names that Megatron-LM knows are in ``presets/megatron_flags.json``: those of its current release, from
its source, and those of earlier ones that scripts still carry.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from functools import cache

from attrs import Factory, define

from picotron.errors import PlanError
from picotron.planner.records import preset_table
from picotron.planner.validators import LARGEST, shown

_LIKELY_TYPO = 0.8  # how alike an unknown flag must be to one that changes a plan, to be refused
_LIKE_ANY = 0.75


@define
class Given:
    """The flags of one run; ``used`` are those that were asked for, whether they were given or not."""

    values: dict[str, tuple[str, ...]]
    used: set[str] = Factory(set)
    notes: list[str] = Factory(list)

    def has(self, *names: str) -> bool:
        """Whether one of the flags was given."""
        self.used |= set(names)
        return any(name in self.values for name in names)

    def text(self, *names: str, default: str = "") -> str:
        """The value of the first of the flags that was given. Raises PlanError where it has not one."""
        self.used |= set(names)
        name = next((name for name in names if name in self.values), None)
        if name is None:
            return default
        if len(self.values[name]) != 1:
            raise PlanError(f"--{name} must have one value, got {shown(' '.join(self.values[name]))}")
        value = self.values[name][0]
        if "$" in value or "`" in value:
            raise PlanError(
                f"--{name} must have a value that can be read, got {shown(value)}; "
                "say what the variable stands for (--var NAME=VALUE)"
            )
        return value

    def words(self, name: str) -> tuple[str, ...]:
        """All values of a flag, commas between them or not."""
        self.used.add(name)
        return tuple(part for value in self.values.get(name, ()) for part in value.replace(",", " ").split())

    def integer(self, *names: str, default: int | None = None, least: int = 1) -> int:
        """A whole number of at least ``least``. Raises PlanError where it is missing without a default."""
        text = self.text(*names)
        if not text:
            if default is None:
                raise PlanError(f"--{names[0]} must be given: a plan needs it")
            return default
        try:
            value = int(text.replace("_", ""))
        except ValueError:
            value = least - 1
        if not least <= value <= LARGEST:
            raise PlanError(f"--{names[0]} must be a whole number of at least {least}, got {shown(text)}")
        return value

    def number(self, *names: str, default: float) -> float:
        """A finite number of at least 0."""
        text = self.text(*names)
        if not text:
            return default
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value < float("inf"):
            raise PlanError(f"--{names[0]} must be a number of at least 0, got {shown(text)}")
        return value

    def choice(self, name: str, choices: Iterable[str], default: str) -> str:
        """One of some words."""
        value, known = self.text(name, default=default), tuple(choices)
        if value not in known:
            raise PlanError(f"--{name} must be one of {', '.join(known)}, got {shown(value)}")
        return value

    def at_most_one(self, *names: str) -> None:
        """Raise PlanError if two of the flags were given: they contradict each other."""
        there = [name for name in names if name in self.values]
        if len(there) > 1:
            raise PlanError(f"--{there[0]} and --{there[1]} contradict each other: give one of them")

    def note(self, sentence: str) -> None:
        """Keep a sentence on what was read otherwise than it was written."""
        self.notes.append(sentence)


def given(pairs: Iterable[tuple[str, tuple[str, ...]]]) -> Given:
    """The flags, spelt with hyphens; of one given twice the last counts, as argparse has it, and is noted."""
    found = Given(values={})
    for written, values in pairs:
        name = written.replace("_", "-")
        if name in found.values and found.values[name] != values:
            found.note(f"--{name} is given twice: {' '.join(values) or 'the last'} counts")
        found.values[name] = values
    return found


def left_over(flags: Given) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What nobody asked for: flags that do not matter to a plan, and flags that Megatron-LM does not know.

    Raises PlanError for an unknown flag that is spelt almost as one that changes the plan.
    """
    rest = [name for name in flags.values if name not in flags.used]
    known = known_flags()
    for name in rest:
        near = get_close_matches(name, flags.used, n=1, cutoff=_LIKELY_TYPO) if name not in known else []
        if near:
            raise PlanError(
                f"--{name} must be a flag of Megatron-LM, got {name!r}; did you mean --{near[0]}?"
            )
    unknown = []
    for name in (name for name in rest if name not in known):
        near = get_close_matches(name, known, n=2, cutoff=_LIKE_ANY)
        hint = f"; did you mean {' or '.join(f'--{one}' for one in near)}?" if near else ""
        unknown.append(f"--{name} is no flag of Megatron-LM{hint}")
    return tuple(f"--{name}" for name in rest if name in known), tuple(unknown)


@cache
def known_flags() -> frozenset[str]:
    """Every flag that some release knows, without its dashes."""
    table = preset_table("megatron_flags")
    return frozenset(name.replace("_", "-") for key in ("flags", "older") for name in table[key])
