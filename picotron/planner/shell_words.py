"""The words of a shell script: pieces with their quotes, operators between them, commands cut where one ends.

Nothing is expanded or run here; a quote or bracket that does not close is a PlanError.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator

from attrs import frozen

from picotron.errors import PlanError
from picotron.planner.validators import shown

_STOPS = ("\n", ";", "&&", "||", "&", "|")


@frozen
class Piece:
    """Part of a word, and the quote around it."""

    text: str
    quote: str = ""


Word = tuple[Piece, ...]


def lexed(text: str, operators: str = "\n;&|()") -> Iterator[Word | str]:
    """Words as pieces, and operators as text. Raises PlanError where a quote does not close."""
    stops = operators + " \t\r\n"
    text = re.sub(r"\\[ \t]*\r?\n", " ", text)
    pieces: list[Piece] = []
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
            pieces.append(Piece(text[at + 1 : stop - 1] if char != "`" else text[at:stop], char))
        elif char == "\\":
            stop = at + 2
            pieces.append(Piece(text[at + 1 : stop], "'"))
        elif char == "$" and text[at + 1 : at + 2] in ("(", "{"):
            stop = _balanced(text, at + 1)
            pieces.append(Piece(text[at:stop]))
        else:
            while stop < len(text) and text[stop] not in stops + "'\"`\\$":
                stop += 1
            pieces.append(Piece(text[at:stop]))
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


def statements(tokens: Iterable[Word | str]) -> Iterator[list[Word | str]]:
    """Commands, cut where one ends; brackets of an array and the words of a condition stay together."""
    own: list[Word | str] = []
    depth = 0
    for token in tokens:
        if isinstance(token, str):
            depth = max(0, depth + (token == "(") - (token == ")"))
            asked = own and own[0] in ((Piece("if"),), (Piece("elif"),))
            if token in _STOPS and depth == 0 and not (asked and token in ("&&", "||")):
                if own:
                    yield own
                own = []
                continue
        own.append(token)
    if own:
        yield own


def split_words(words: Iterable[Word | str]) -> Iterator[list[Word] | str]:
    """Groups of words, and the && and || between them."""
    own: list[Word] = []
    for word in words:
        if isinstance(word, tuple):
            own.append(word)
        elif word in ("&&", "||"):
            yield own
            yield word
            own = []
    yield own


def parts(text: str) -> list[str]:
    """The words of an item that holds several: a flag with its values, or any number of them."""
    if not text.lstrip().startswith("-") or not any(char.isspace() for char in text):
        return [text] if text.strip() else []
    try:
        return shlex.split(text)
    except ValueError:
        return text.split()
