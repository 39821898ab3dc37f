"""A shell script read, never run, for the arguments of the program that it starts.

Read are assignments, arrays, expansions, whole-number arithmetic, and conditions over variables; what any
other command would print stays unread, as ``$(...)``. Of a script that starts a Python program the arguments
are those after the program's name, and those before belong to its launcher; of a fragment without such a
line, all words that follow a ``--flag``, bare or in a variable.
"""

from __future__ import annotations

import re

from attrs import Factory, define, frozen

from picotron.errors import PlanError
from picotron.planner.expressions import expression
from picotron.planner.shell_words import Piece, Word, lexed, parts, split_words, statements

_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=")
_EXPANSION = re.compile(
    r"\$\(\((?P<sum>.*?)\)\)|\$\{(?P<name>#?\w+)(?P<all>\[[@*]\])?(?P<rest>[^}]*)\}|\$(?P<bare>\w+|[@#*?])"
)
_WORDS_BEFORE = ("export", "local", "declare", "readonly")
_TESTS = {"==": "==", "=": "==", "!=": "!=", "-eq": "==", "-ne": "!=", "-gt": ">", "-lt": "<"}


@frozen(kw_only=True)
class WrittenArguments:
    """What a program is given: its own words and those of the launcher that starts it; what was not read."""

    words: tuple[str, ...]
    launcher: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@define
class Shell:
    """What is known while a script is read: variables, arrays, and the arguments met so far."""

    variables: dict[str, str]
    arrays: dict[str, list[str]] = Factory(dict)
    assigned: list[str] = Factory(list)
    loose: list[str] = Factory(list)
    called: list[list[str]] = Factory(list)
    notes: list[str] = Factory(list)
    fixed: frozenset[str] = frozenset()

    def read(self, text: str) -> WrittenArguments:
        """The arguments of the program that the script starts, or of the fragment that it is."""
        self.fixed = frozenset(self.variables)
        if re.match(r"(\s*(#.*)?\n)*\s*--", text):  # arguments and nothing else: no bar or bracket is shell
            words = [word for word in lexed(text, operators="") if isinstance(word, tuple)]
            self.loose = [field for word in words for field in self._fields(word)]
            return self._written()
        taken = [True]  # whether each open branch runs
        for statement in statements(lexed(text)):
            self._statement(statement, taken)
        return self._written()

    def _statement(self, words: list[Word | str], taken: list[bool]) -> None:
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

    def _run(self, words: list[Word | str]) -> None:
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

    def _assign(self, match: re.Match[str], word: Word, words: list[Word | str], index: int) -> int:
        """Take ``NAME=value`` or ``NAME+=( ... )``; where the next word is."""
        name, more = match[1], bool(match[2])
        rest = (Piece(word[0].text[match.end() :], word[0].quote), *word[1:])
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

    def _fields(self, word: Word) -> list[str]:
        """The words that one becomes: an array all its items, unquoted text its parts."""
        whole = _EXPANSION.fullmatch(word[0].text) if len(word) == 1 and word[0].quote != "'" else None
        if whole and whole["all"] and whole["name"] in self.arrays:
            items = self.arrays[whole["name"]]
            if word[0].quote:
                return list(items)
            return [part for item in items for part in (parts(item) if "-" in item[:1] else item.split())]
        text = "".join(self._expanded(piece) for piece in word)
        if any(piece.quote for piece in word):
            return [text]
        return text.split()

    def _expanded(self, piece: Piece) -> str:
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
            return self._expanded(Piece(rest[default.end() :].strip("'\"")))
        return match[0] if value is None else value

    def _sum(self, text: str, written: str) -> str:
        """Whole-number arithmetic over variables."""
        named = re.sub(r"\$?\{?([A-Za-z_]\w*)\}?", lambda name: self.variables.get(name[1], name[0]), text)
        try:
            value = expression(named)
        except PlanError:
            return written
        return str(value) if isinstance(value, int) else written

    def _holds(self, words: list[Word | str]) -> bool:
        """Whether a condition over variables holds; one over anything else is noted and does not."""
        result, join = False, "||"
        for group in split_words(words):
            if isinstance(group, str):
                join = group
                continue
            own = self._test(group)
            result = (result or own) if join == "||" else (result and own)
        return result

    def _test(self, words: list[Word]) -> bool:
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
            fields = [part for field in with_flags[-1] for part in parts(field)]
            return self._around(fields)
        known = [self.arrays.get(name, parts(self.variables.get(name, ""))) for name in self.assigned]
        fields = [part for own in known for field in own for part in parts(field)] if not self.loose else []
        return self._around([*fields, *(part for field in self.loose for part in parts(field))])

    def _around(self, fields: list[str]) -> WrittenArguments:
        program = next((i for i, field in enumerate(fields) if field.endswith(".py")), -1)
        return WrittenArguments(
            words=tuple(fields[program + 1 :]),
            launcher=tuple(fields[: max(program, 0)]),
            notes=tuple(self.notes),
        )


def _compared(left: str, relation: str, right: str) -> bool:
    if relation in ("==", "!="):
        return (left == right) == (relation == "==")
    try:
        return float(left) > float(right) if relation == ">" else float(left) < float(right)
    except ValueError:
        return False
