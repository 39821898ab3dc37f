"""Arguments of a program as they are written down: shell scripts, files of arguments, YAML.

``shell`` reads scripts; of YAML a block ``MODEL_ARGS`` alone counts, where there is one.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence

from picotron.errors import PlanError
from picotron.planner.expressions import expression
from picotron.planner.shell import Shell, WrittenArguments
from picotron.planner.validators import shown

__all__ = ["WrittenArguments", "expression", "flags", "read_arguments"]

_YAML_LINE = re.compile(r"^(\s*)(?:- )?['\"]?(-{0,2}[A-Za-z][\w.-]*)['\"]?\s*:(?:\s+(.*))?$")


def read_arguments(text: str, variables: Mapping[str, str] | None = None) -> WrittenArguments:
    """The arguments in a shell script, a fragment of one, a file of arguments, or YAML of ``--key: value``.

    ``variables`` stand for what the script takes from its caller. Raises PlanError if the quotes of a script
    do not close, or there is no argument.
    """
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    lines = [line for line in lines if line.strip() != "---"]
    block = _model_block(lines)
    is_yaml = bool(block) or (bool(lines) and all(map(_YAML_LINE.match, lines)))
    found = _read_yaml(block or lines) if is_yaml else Shell(variables=dict(variables or {})).read(text)
    if not any(word.startswith("--") for word in found.words):
        raise PlanError(
            f"arguments must have a --flag among them, got {shown(text)}; give a script or a text of them"
        )
    return found


def flags(words: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    """Each flag, without its dashes, and the values behind it; ``--a=b`` is a flag with a value.

    >>> flags(["--lr", "1e-4", "--bf16", "--split=9,1"])
    [('lr', ('1e-4',)), ('bf16', ()), ('split', ('9,1',))]
    """
    found: list[tuple[str, tuple[str, ...]]] = []
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            found.append((name, (value,) if equals else ()))
        elif found:
            found[-1] = (found[-1][0], (*found[-1][1], word))
    return found


def _model_block(lines: Sequence[str]) -> list[str]:
    """The lines below ``MODEL_ARGS:``, if it stands there."""
    heads = [index for index, line in enumerate(lines) if line.strip() == "MODEL_ARGS:"]
    if not heads:
        return []
    depth, rest = _indent(lines[heads[0]]), lines[heads[0] + 1 :]
    ends = (index for index, line in enumerate(rest) if _indent(line) <= depth)
    return list(rest[: next(ends, len(rest))])


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _read_yaml(lines: Iterable[str]) -> WrittenArguments:
    """``--key: value`` lines: true is a flag alone, false none; items of a list are its values."""
    words: list[str] = []
    for line in lines:
        match = _YAML_LINE.match(line)
        if match is None:
            words += _items(line.strip()[2:]) if words and line.strip().startswith("- ") else []
            continue
        key, plain = match[2], (match[3] or "").split(" #")[0].strip()
        if plain.lower() in ("false", "null", "~", "none") or (not plain and not key.startswith("--")):
            continue
        words.append(f"--{key.lstrip('-')}")
        words += [] if plain.lower() == "true" else _items(plain)
    return WrittenArguments(words=tuple(word for word in words if word))


def _items(plain: str) -> list[str]:
    """The values of a line: a text, quoted or not, or the items of a list in brackets."""
    try:
        text = " ".join(shlex.split(plain))
        return shlex.split(text[1:-1].replace(",", " ")) if text.startswith("[") else [text]
    except ValueError:
        raise PlanError(f"a quote must close, got {shown(plain)}") from None
