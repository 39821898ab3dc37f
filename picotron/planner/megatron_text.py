"""Arguments of a program as they are written down: shell scripts, files of arguments, YAML.

A shell script is read, never run: assignments, arrays, expansions, whole-number arithmetic, and conditions
over variables; what any other command would print stays unread, as ``$(...)``. Of a script that starts a
Python program the arguments are those after the program's name, and those before belong to its launcher;
of a fragment without such a line, all words that follow a ``--flag``, bare or in a variable.
"""

from __future__ import annotations

import ast
import operator
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from attrs import Factory, define, frozen

from picotron.errors import PlanError
from picotron.planner.validators import shown

_YAML_LINE = re.compile(r"^(\s*)(?:- )?['\"]?(-{0,2}[A-Za-z][\w.-]*)['\"]?\s*:(?:\s+(.*))?$")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=")
_EXPANSION = re.compile(
    r"\$\(\((?P<sum>.*?)\)\)|\$\{(?P<name>#?\w+)(?P<all>\[[@*]\])?(?P<rest>[^}]*)\}|\$(?P<bare>\w+|[@#*?])"
)
_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.floordiv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_LONGEST = 10_000  # of a list, and of an expression's text
_WORDS_BEFORE = ("export", "local", "declare", "readonly")
_STOPS = ("\n", ";", "&&", "||", "&", "|")
_TESTS = {"==": "==", "=": "==", "!=": "!=", "-eq": "==", "-ne": "!=", "-gt": ">", "-lt": "<"}


@frozen(kw_only=True)
class WrittenArguments:
    """What a program is given: its own words and those of the launcher that starts it; what was not read."""

    words: tuple[str, ...]
    launcher: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def read_arguments(text: str, variables: Mapping[str, str] | None = None) -> WrittenArguments:
    """The arguments in a shell script, a fragment of one, a file of arguments, or YAML of ``--key: value``.

    ``variables`` stand for what the script takes from its caller. Raises PlanError if the quotes of a script
    do not close, or there is no argument.
    """
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    is_yaml = bool(lines) and all(map(_YAML_LINE.match, (line for line in lines if line.strip() != "---")))
    found = _read_yaml(lines) if is_yaml else _Shell(variables=dict(variables or {})).read(text)
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


def expression(text: str) -> int | list[int]:
    """The whole number or list that ``[0]*3+[1]*58`` or ``8 * (2 + 1)`` stands for, read and never run.

    Raises PlanError for anything but whole numbers, lists of them, brackets and + - * / %.
    """
    refused = PlanError(f"an expression must have whole numbers, lists and + - * / % only, got {shown(text)}")
    if len(text) > _LONGEST:
        raise refused
    try:
        value: int | list[int] = _computed(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError):
        raise refused from None
    return value


def _computed(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.List | ast.Tuple):
        return [_computed(item) for item in node.elts]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_computed(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _computed(node.left), _computed(node.right)
        for one, other in ((left, right), (right, left)):
            if isinstance(one, list) and isinstance(other, int) and len(one) * other > _LONGEST:
                raise ValueError
        return _OPERATORS[type(node.op)](left, right)
    raise ValueError


def _read_yaml(lines: Iterable[str]) -> WrittenArguments:
    """``--key: value`` lines: true is a flag alone, false none; of a block MODEL_ARGS only its lines."""
    parsed = [match.groups() for match in map(_YAML_LINE.match, lines) if match]
    heads = [index for index, (_, key, value) in enumerate(parsed) if not value and key == "MODEL_ARGS"]
    if heads:
        depth = len(parsed[heads[0]][0])
        parsed = parsed[heads[0] + 1 :]
        ends = (index for index, (indent, _, _) in enumerate(parsed) if len(indent) <= depth)
        parsed = parsed[: next(ends, len(parsed))]
    words: list[str] = []
    for _, key, value in parsed:
        plain = (value or "").split(" #")[0].strip()
        if plain.lower() in ("false", "null", "~", "none") or (not plain and not key.startswith("--")):
            continue
        items = shlex.split(plain.strip("[]").replace(",", " ") if plain.startswith("[") else plain)
        words.append(f"--{key.lstrip('-')}")
        words += [] if plain.lower() == "true" else items if plain.startswith("[") else [" ".join(items)][:1]
    return WrittenArguments(words=tuple(word for word in words if word))


@frozen
class _Piece:
    """Part of a word, and the quote around it."""

    text: str
    quote: str = ""


_Word = tuple[_Piece, ...]


def _lexed(text: str, operators: str = "\n;&|()") -> Iterator[_Word | str]:
    """Words as pieces, and operators as text. Raises PlanError where a quote does not close."""
    stops = operators + " \t\r\n"
    text = re.sub(r"\\[ \t]*\r?\n", " ", text)
    pieces: list[_Piece] = []
    at = 0
    while at < len(text):
        char = text[at]
        stop = at + 1
        if char in stops:
            if pieces:
                yield tuple(pieces)
                pieces = []
            if char in operators:
                stop += text[at : at + 2] in ("&&", "||")
                yield text[at:stop]
        elif char == "#" and not pieces:
            end = text.find("\n", at)
            stop = len(text) if end < 0 else end
        elif char in "'\"`":
            stop = _closing(text, at)
            pieces.append(_Piece(text[at + 1 : stop - 1] if char != "`" else text[at:stop], char))
        elif char == "\\":
            stop = at + 2
            pieces.append(_Piece(text[at + 1 : stop], "'"))
        elif char == "$" and text[at + 1 : at + 2] in ("(", "{"):
            stop = _balanced(text, at + 1)
            pieces.append(_Piece(text[at:stop]))
        else:
            while stop < len(text) and text[stop] not in stops + "'\"`\\$":
                stop += 1
            pieces.append(_Piece(text[at:stop]))
        at = stop
    if pieces:
        yield tuple(pieces)


def _closing(text: str, at: int) -> int:
    """Behind the quote that closes the one at ``at``."""
    quote, end = text[at], at + 1
    while end < len(text) and text[end] != quote:
        end += 2 if text[end] == "\\" and quote == '"' else 1
    if end >= len(text):
        raise PlanError(f"a quote must close, got {shown(text[at : at + 60])}")
    return end + 1


def _balanced(text: str, at: int) -> int:
    """Behind the bracket that closes the one at ``at``."""
    opening, closing, depth = text[at], {"(": ")", "{": "}"}[text[at]], 0
    for end in range(at, len(text)):
        depth += (text[end] == opening) - (text[end] == closing)
        if depth == 0:
            return end + 1
    raise PlanError(f"a bracket must close, got {shown(text[at : at + 60])}")


@define
class _Shell:
    """What is known while a script is read: variables, arrays, and the arguments met so far."""

    variables: dict[str, str]
    arrays: dict[str, list[str]] = Factory(dict)
    assigned: list[str] = Factory(list)
    loose: list[str] = Factory(list)
    called: list[list[str]] = Factory(list)
    notes: list[str] = Factory(list)
    fixed: frozenset[str] = frozenset()

    def read(self, text: str) -> WrittenArguments:
        self.fixed = frozenset(self.variables)
        if re.match(r"(\s*(#.*)?\n)*\s*--", text):  # arguments and nothing else: no bar or bracket is shell
            words = [word for word in _lexed(text, operators="") if isinstance(word, tuple)]
            self.loose = [field for word in words for field in self._fields(word)]
            return self._written()
        taken = [True]  # whether each open branch runs
        for statement in _statements(_lexed(text)):
            self._statement(statement, taken)
        return self._written()

    def _statement(self, words: list[_Word | str], taken: list[bool]) -> None:
        first = "".join(piece.text for piece in words[0]) if isinstance(words[0], tuple) else ""
        if first == "if":
            taken.append(taken[-1] and self._holds(words[1:]))
        elif first in ("else", "elif") and len(taken) > 1:
            taken[-1] = not taken[-1] and taken[-2] and (first == "else" or self._holds(words[1:]))
        elif first == "fi" and len(taken) > 1:
            taken.pop()
        elif first in ("then", "do") and len(words) > 1:
            self._statement(words[1:], taken)
        elif taken[-1]:
            self._run(words)

    def _run(self, words: list[_Word | str]) -> None:
        """One simple command: assignments, a program, or loose arguments."""
        index = 0
        while index < len(words):
            word = words[index]
            text = word[0].text if isinstance(word, tuple) and not word[0].quote else ""
            match = _ASSIGNMENT.match(text)
            if match and isinstance(word, tuple):
                index = self._assign(match, word, words, index)
            elif text in _WORDS_BEFORE:
                index += 1
            else:
                break
        fields = [field for word in words[index:] if isinstance(word, tuple) for field in self._fields(word)]
        if any(field.endswith(".py") for field in fields):
            self.called.append(fields)
        elif fields and fields[0].startswith("--"):
            self.loose += fields

    def _assign(self, match: re.Match[str], word: _Word, words: list[_Word | str], index: int) -> int:
        """Take ``NAME=value`` or ``NAME+=( ... )``; where the next word is."""
        name, more = match[1], bool(match[2])
        rest = (_Piece(word[0].text[match.end() :], word[0].quote), *word[1:])
        if name not in self.assigned:
            self.assigned.append(name)
        if index + 1 < len(words) and words[index + 1] == "(" and not "".join(p.text for p in rest):
            end = words.index(")", index) if ")" in words[index:] else len(words)
            own = [field for w in words[index + 2 : end] if isinstance(w, tuple) for field in self._fields(w)]
            self.arrays[name] = [*(self.arrays.get(name, []) if more else []), *own]
            return end + 1
        value = "".join(self._expanded(piece) for piece in rest)
        if name not in self.fixed:
            self.variables[name] = self.variables.get(name, "") + value if more else value
        return index + 1

    def _fields(self, word: _Word) -> list[str]:
        """The words that one becomes: an array all its items, unquoted text its parts."""
        whole = _EXPANSION.fullmatch(word[0].text) if len(word) == 1 and word[0].quote != "'" else None
        if whole and whole["all"] and whole["name"] in self.arrays:
            items = self.arrays[whole["name"]]
            if word[0].quote:
                return list(items)
            return [part for item in items for part in (_parts(item) if "-" in item[:1] else item.split())]
        text = "".join(self._expanded(piece) for piece in word)
        if any(piece.quote for piece in word):
            return [text]
        return text.split()

    def _expanded(self, piece: _Piece) -> str:
        return piece.text if piece.quote in ("'", "`") else _EXPANSION.sub(self._value, piece.text)

    def _value(self, match: re.Match[str]) -> str:
        """What an expansion stands for; as it is written where that is not known."""
        if match["sum"] is not None:
            return self._sum(match["sum"], match[0])
        name = match["name"] or match["bare"]
        if match["all"] and name in self.arrays:
            return " ".join(self.arrays[name])
        value = self.variables.get(name)
        if value is None and name in self.arrays:
            return " ".join(self.arrays[name][:1])
        rest = match["rest"] or ""
        default = re.match(r":?[-=]", rest)
        if default and not value:
            return self._expanded(_Piece(rest[default.end() :].strip("'\"")))
        return match[0] if value is None else value

    def _sum(self, text: str, written: str) -> str:
        """Whole-number arithmetic over variables."""
        named = re.sub(r"\$?\{?([A-Za-z_]\w*)\}?", lambda name: self.variables.get(name[1], name[0]), text)
        try:
            value = expression(named)
        except PlanError:
            return written
        return str(value) if isinstance(value, int) else written

    def _holds(self, words: list[_Word | str]) -> bool:
        """Whether a condition over variables holds; one over anything else is noted and does not."""
        result, join = False, "||"
        for group in _split(words):
            if isinstance(group, str):
                join = group
                continue
            own = self._test(group)
            result = (result or own) if join == "||" else (result and own)
        return result

    def _test(self, words: list[_Word]) -> bool:
        fields = [" ".join(self._fields(word)) if word else "" for word in words]
        fields = ["" if field.startswith("$") and field[1:2] != "(" else field for field in fields]
        inner = [field for field in fields if field not in ("[", "]", "[[", "]]", "then", "test")]
        negated = inner[:1] == ["!"]
        inner = inner[negated:]
        if len(inner) == 2 and inner[0] in ("-n", "-z"):
            return ((inner[0] == "-n") == bool(inner[1])) != negated
        if len(inner) == 3 and inner[1] in _TESTS:
            return _compared(inner[0], _TESTS[inner[1]], inner[2]) != negated
        self.notes.append(f"the condition {' '.join(fields)} was not read: what depends on it is left out")
        return False

    def _written(self) -> WrittenArguments:
        """What the program is given: the last that starts a Python file, else all that look like flags."""
        with_flags = [call for call in self.called if any(field.startswith("--") for field in call)]
        if with_flags:
            fields = [part for field in with_flags[-1] for part in _parts(field)]
            return self._around(fields)
        known = [self.arrays.get(name, _parts(self.variables.get(name, ""))) for name in self.assigned]
        fields = [part for own in known for field in own for part in _parts(field)] if not self.loose else []
        return self._around([*fields, *(part for field in self.loose for part in _parts(field))])

    def _around(self, fields: list[str]) -> WrittenArguments:
        program = next((i for i, field in enumerate(fields) if field.endswith(".py")), -1)
        return WrittenArguments(
            words=tuple(fields[program + 1 :]),
            launcher=tuple(fields[: max(program, 0)]),
            notes=tuple(self.notes),
        )


def _statements(tokens: Iterable[_Word | str]) -> Iterator[list[_Word | str]]:
    """Commands, cut where one ends; brackets of an array and the words of a condition stay together."""
    own: list[_Word | str] = []
    depth = 0
    for token in tokens:
        if isinstance(token, str):
            depth = max(0, depth + (token == "(") - (token == ")"))
            asked = own and own[0] in ((_Piece("if"),), (_Piece("elif"),))
            if token in _STOPS and depth == 0 and not (asked and token in ("&&", "||")):
                if own:
                    yield own
                own = []
                continue
        own.append(token)
    if own:
        yield own


def _split(words: Iterable[_Word | str]) -> Iterator[list[_Word] | str]:
    """Groups of words, and the && and || between them."""
    own: list[_Word] = []
    for word in words:
        if isinstance(word, tuple):
            own.append(word)
        elif word in ("&&", "||"):
            yield own
            yield word
            own = []
    yield own


def _parts(text: str) -> list[str]:
    """The words of an item that holds several: a flag with its values, or any number of them."""
    if not text.lstrip().startswith("-") or not any(char.isspace() for char in text):
        return [text] if text.strip() else []
    try:
        return shlex.split(text)
    except ValueError:
        return text.split()


def _compared(left: str, relation: str, right: str) -> bool:
    if relation in ("==", "!="):
        return (left == right) == (relation == "==")
    try:
        return float(left) > float(right) if relation == ">" else float(left) < float(right)
    except ValueError:
        return False
