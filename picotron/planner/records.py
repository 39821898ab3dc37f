"""How values are read from JSON and written to files: strictly, and never by halves.

A strict converter takes no unknown key, no number that is really text or a truth value, and no text in place
of a list. What it refuses becomes one PlanError with a "path: words" for each bad field, the words being the
validator's own. A file is written aside, in its own folder, and renamed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, cast, get_args, get_origin

from attrs import fields, has
from cattrs import ClassValidationError, Converter, IterableValidationError
from cattrs.errors import ForbiddenExtraKeysError
from cattrs.gen import make_dict_structure_fn

from picotron.errors import PlanError
from picotron.planner.validators import shown

T = TypeVar("T")


def strict_converter() -> Converter:
    """A converter of attrs classes to JSON values and back, for one room to keep under its own name."""
    converter = Converter(forbid_extra_keys=True)
    converter.register_structure_hook(float, lambda value, _: _number(value))
    converter.register_structure_hook(int, lambda value, _: _checked(value, (int,), "an integer"))
    converter.register_structure_hook(str, lambda value, _: _checked(value, (str,), "text"))
    converter.register_structure_hook(bool, lambda value, _: _flag(value))
    converter.register_structure_hook_func(_is_choice, _choice)
    converter.register_structure_hook_factory(
        has, lambda cls: _of_object(make_dict_structure_fn(cls, converter))
    )
    converter.register_structure_hook_func(
        _is_sequence,
        lambda value, kind: _items(converter, value, get_args(kind)[0]),
    )
    return converter


def structured(converter: Converter, data: object, cls: type[T], path: str = "$") -> T:
    """``data``, as JSON gives it, as a ``cls``. Raises PlanError with the path of each bad field."""
    try:
        return converter.structure(data, cls)
    except Exception as error:  # cattrs passes on whatever a validator raises
        raise PlanError("; ".join(_complaints(error, path))) from error


def read_json(text: str, what: str) -> object:
    """The JSON value in ``text``. Raises PlanError for anything else: NaN, a repeated key, a cut text."""
    try:
        return json.loads(text, parse_constant=_not_a_number, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{what} must be JSON, got {error}") from error


def read_text(path: str | os.PathLike[str], what: str) -> str:
    """The text of a file. Raises PlanError if it cannot be read, or is not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise PlanError(
            f"{what} must be a readable file, got {error.strerror} at {os.fspath(path)!r}"
        ) from error
    except ValueError as error:
        words = f"{what} must be a file of UTF-8 text, got {error} in {os.fspath(path)!r}"
        raise PlanError(words) from error


def write_text(path: str | os.PathLike[str], text: str, what: str) -> None:
    """Write a whole file or leave what was there: the text goes aside, in the same folder, and is renamed.

    A link stays one, and what is no regular file (a pipe, ``/dev/null``) is written to.
    Raises PlanError if that fails.
    """
    target = Path(os.path.realpath(path))
    try:
        if target.exists() and not target.is_file():
            target.write_text(text, encoding="utf-8")
        else:
            _replace(target, text.encode())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        words = f"{what} must go to a file that can be written, got {reason} at {os.fspath(path)!r}"
        raise PlanError(words) from error


def hint(word: object, known: Sequence[str]) -> str:
    """What the writer of ``word`` may have meant, as the end of a message; empty where nothing is near."""
    if not isinstance(word, str):
        return ""
    begun = [name for name in known if word and name.startswith(word.lower())]
    close = begun or get_close_matches(word.lower(), known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def preset_table(name: str) -> Any:
    """What the package's own ``presets/NAME.json`` holds."""
    return json.loads((files("picotron.planner") / "presets" / f"{name}.json").read_text(encoding="utf-8"))


def preset(table: Mapping[str, T], name: object, what: str) -> T:
    """The preset of that name. Raises PlanError for an unknown one, with the closest known ones."""
    known = tuple(table)
    if not isinstance(name, str) or name not in table:
        raise PlanError(f"{what} must be one of {known}, got {shown(name)}{hint(name, known)}")
    return table[name]


def _replace(target: Path, content: bytes) -> None:
    aside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with aside.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(target)
    except FileExistsError:
        raise
    except BaseException:
        with suppress(OSError):
            aside.unlink()
        raise


def _not_a_number(name: str) -> NoReturn:
    raise ValueError(f"{name}, which is not a JSON number")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} twice in one object")
    return found


def _of_object(structure: Callable[[Any, Any], Any]) -> Callable[[object, Any], Any]:
    return lambda value, cls: structure(_checked(value, (dict,), "an object"), cls)


def _items(converter: Converter, value: object, item: Any) -> tuple[Any, ...]:
    found: list[Any] = converter.structure(_checked(value, (list, tuple), "a list"), list[item])
    return tuple(found)


def _checked(value: object, types: tuple[type, ...], what: str) -> Any:
    if not isinstance(value, types) or isinstance(value, bool):
        raise PlanError(f"must be {what}, got {value!r}")
    return value


def _number(value: object) -> float:
    try:
        return float(_checked(value, (int, float), "a number"))
    except OverflowError:
        raise PlanError(
            f"must be a number that a float can hold, got one of {len(str(value))} digits"
        ) from None


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise PlanError(f"must be true or false, got {value!r}")
    return value


def _is_choice(kind: object) -> bool:
    origin: object = get_origin(kind)
    return origin is Literal


def _is_sequence(kind: object) -> bool:
    origin: object = get_origin(kind)
    return origin is tuple and get_args(kind)[1:] == (...,)


def _choice(value: object, kind: Any) -> object:
    if value not in get_args(kind):
        raise PlanError(f"must be one of {', '.join(map(str, get_args(kind)))}, got {value!r}")
    return value


def _complaints(error: BaseException, path: str) -> list[str]:
    """One "path: words" for each leaf of cattrs' tree of errors."""
    if isinstance(error, ClassValidationError):
        noted, whole = error.group_exceptions()
        below = [line for leaf, note in noted for line in _complaints(leaf, f"{path}.{note.name}")]
        at_fault = [(leaf, path + _field_at_fault(error.cl, leaf)) for leaf in whole]
        return below + [line for leaf, place in at_fault for line in _complaints(leaf, place)]
    if isinstance(error, IterableValidationError):
        items, others = error.group_exceptions()
        below = [line for leaf, note in items for line in _complaints(leaf, f"{path}[{note.index}]")]
        return below + [line for leaf in others for line in _complaints(leaf, path)]
    if isinstance(error, ForbiddenExtraKeysError):
        known = [attribute.name for attribute in fields(cast(Any, error.cl))]
        return [f"{path}.{key}: no such field{hint(key, known)}" for key in sorted(error.extra_fields)]
    if isinstance(error, KeyError):
        return [f"{path}: required field is missing"]
    return [f"{path}: {error}"]


def _field_at_fault(cls: type, error: BaseException) -> str:
    """What a validator's message adds to the path: its first word, where that is a field."""
    word = re.match(r"\w+", str(error)) if isinstance(error, PlanError) else None
    return f".{word[0]}" if word and has(cls) and word[0] in {field.name for field in fields(cls)} else ""
