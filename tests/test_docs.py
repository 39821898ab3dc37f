"""Every fenced block of the documentation runs, and prints what the page says it prints.

A page is one namespace and one fresh working directory, and its blocks run in order: ``python`` blocks and
``pycon`` sessions in this process, ``bash`` blocks in a shell that has this interpreter's folder first on its
path. A ``text`` block right after a ``python`` or ``bash`` block must match what that printed, and a ``json``
block must be JSON. ``<!-- not run: REASON -->`` before a block leaves it out; REASONS are the only ones.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import ipaddress
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import traceback
import types
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve, frozen

pytestmark = pytest.mark.no_cover  # other tests count the lines
ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
INDEX = ROOT / "docs" / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))
ROOMS = tuple(page for page in PAGES if page not in (README, INDEX))
LANGUAGES = ("text", "json", "python", "pycon", "bash")
REASONS = (
    "needs a GPU",
    "needs a cluster",
    "is the test command itself",
    "runs over 60 s",
)
FEWER_STEPS = "--steps 2"  # what a command that runs over 60 s is tried with
QUESTIONS_AT_LEAST = 5
TIMEOUT_SECONDS = 120
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

_FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,}|~{3,})(?P<language>[^`]*)$")
_NOT_RUN = re.compile(r"<!-- not run: (?P<reason>.+?) -->")
_QUESTION = re.compile(r"^(\*\*\d+\. |### )")
_TRACEBACK = "Traceback (most recent call last):"
_LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")


@frozen(kw_only=True)
class Block:
    """One fenced block: its first line of text counts from 1, and ``reason`` says why it is not run."""

    page: Path
    line: int
    language: str
    text: str
    reason: str | None
    printed: str | None = None  # the text block right after it

    @property
    def place(self) -> str:
        """Page and line, as an editor reads them."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


class DocsError(Exception):
    """A page breaks a rule; the message names page and line."""


def blocks_of(page: Path) -> tuple[Block, ...]:
    """The fenced blocks of a page, in order, each with the output that is shown right after it."""
    found: list[Block] = []
    outputs: set[int] = set()
    body: list[str] = []
    follows, reason, opened = False, None, None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        fence = _FENCE.match(line)
        if opened is None:
            if fence:
                opened, start, body = fence, number, []
            elif line.strip():
                comment = _NOT_RUN.fullmatch(line.strip())
                follows, reason = False, comment["reason"] if comment else None
        elif fence and fence["ticks"].startswith(opened["ticks"]) and not fence["language"].strip():
            language, text = opened["language"].strip(), "".join(f"{one}\n" for one in body)
            if follows and language == "text":
                outputs.add(len(found))
            found.append(Block(page=page, line=start + 1, language=language, text=text, reason=reason))
            follows, reason, opened = language in ("python", "bash"), None, None
        else:
            body.append(line.removeprefix(opened["indent"]))
    if opened is not None:
        raise DocsError(f"{page.relative_to(ROOT)}:{start}: this fence is never closed")
    return _with_outputs(found, outputs)


def _with_outputs(found: list[Block], outputs: set[int]) -> tuple[Block, ...]:
    joined = [
        evolve(block, printed=found[index + 1].text) if index + 1 in outputs else block
        for index, block in enumerate(found)
    ]
    return tuple(block for index, block in enumerate(joined) if index not in outputs)


def page_id(page: Path) -> str:
    """The page's path in the repository."""
    return str(page.relative_to(ROOT))


def text_of(page: Path) -> str:
    """The page's text; skips the test while it is empty."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    if not text.strip():
        pytest.skip(f"{page_id(page)} is empty")
    return text


def check_output(block: Block, got: str) -> None:
    """Raise DocsError unless ``got`` is what the page shows, by doctest's rules."""
    if block.printed is None:
        return
    checker = doctest.OutputChecker()
    if not checker.check_output(block.printed, got, OPTIONS):
        shown = checker.output_difference(doctest.Example("", block.printed), got, OPTIONS)
        raise DocsError(f"{block.place}: the {block.language} block printed something else\n{shown}")


def run_python(block: Block, namespace: dict[str, Any]) -> None:
    """Execute a block; tracebacks show the page's own lines."""
    source = "\n" * (block.line - 1) + block.text
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source, str(block.page), "exec", dont_inherit=True), namespace)
    check_output(block, printed.getvalue())


def run_session(block: Block, namespace: dict[str, Any]) -> None:
    """Run a session with prompts as a doctest."""
    examples = doctest.DocTestParser().get_examples(block.text, page_id(block.page))
    if not examples:
        raise DocsError(f"{block.place}: a pycon block needs prompts (>>>), got none")
    test = doctest.DocTest(examples, {}, page_id(block.page), str(block.page), block.line - 1, block.text)
    test.globs = namespace
    runner = doctest.DebugRunner(optionflags=OPTIONS, verbose=False)
    try:
        runner.run(test, clear_globs=False)
    except doctest.DocTestFailure as failure:
        at = f"{page_id(block.page)}:{block.line + failure.example.lineno}"
        got = failure.got[max(0, failure.got.rfind(_TRACEBACK)) :]  # the last of a chain
        difference = doctest.OutputChecker().output_difference(failure.example, got, OPTIONS)
        raise DocsError(f"{at}: {failure.example.source.strip()}\n{difference}") from None
    except doctest.UnexpectedException as failure:
        at = f"{page_id(block.page)}:{block.line + failure.example.lineno}"
        shown = "".join(traceback.format_exception(*failure.exc_info))
        raise DocsError(f"{at}: {failure.example.source.strip()}\n{shown}") from None


def run_shell(block: Block, folder: Path) -> None:
    """Run a block in bash; a command that takes too long ends with everything that it started."""
    process = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", block.text],
        cwd=folder,
        env=_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=TIMEOUT_SECONDS)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise TimeoutError(f"took more than {TIMEOUT_SECONDS} s") from None
        raise
    if process.returncode:
        raise DocsError(f"{block.place}: the command ended with {process.returncode}\n{out}{err}")
    check_output(block, out)


def _environment() -> dict[str, str]:
    """The interpreter's own commands first, a plain terminal, and proxies that lead nowhere."""
    nowhere = "http://127.0.0.1:9"
    bin_folder = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "PATH": os.pathsep.join([bin_folder, os.environ.get("PATH", os.defpath)]),
        "PYTHONIOENCODING": "utf-8",
        "COLUMNS": "80",
        "HF_HUB_OFFLINE": "1",
        **dict.fromkeys(("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY"), nowhere),
    }


def run_block(block: Block, namespace: dict[str, Any], folder: Path) -> None:
    """Run one block by its language; text and JSON are only read."""
    if block.reason is not None:
        fewer = re.sub(r"--steps \d+", FEWER_STEPS, block.text)
        if block.reason.startswith("runs over 60 s") and block.language == "bash" and fewer != block.text:
            run_shell(
                Block(page=block.page, line=block.line, language="bash", text=fewer, reason=None), folder
            )
    elif block.language == "python":
        run_python(block, namespace)
    elif block.language == "pycon":
        run_session(block, namespace)
    elif block.language == "bash":
        run_shell(block, folder)
    elif block.language == "json":
        json.loads(block.text)


def failure_of(block: Block, error: BaseException) -> str:
    """What to tell whoever broke a page: where, what, and the frames from the page inwards."""
    if isinstance(error, DocsError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    own = [index for index, frame in enumerate(frames) if frame.filename == str(block.page)]
    line = frames[own[-1]].lineno if own else block.line
    shown = "".join(traceback.format_list(frames[own[0] :])) if own else ""
    what = "".join(traceback.format_exception_only(error)).strip()
    return f"{page_id(block.page)}:{line}: the {block.language} block raised {what}\n{shown}"


def first_failure(page: Path, namespace: dict[str, Any], folder: Path) -> str | None:
    """Run a page's blocks in order; what to tell about the first that fails."""
    for block in blocks_of(page):
        try:
            with time_limit(), nothing_left_open(block):
                run_block(block, namespace, folder)
        except Exception as error:
            return failure_of(block, error)
    return None


@contextlib.contextmanager
def nothing_left_open(block: Block) -> Iterator[None]:
    """Raise DocsError if the body drops a file that it never closed: its warning has no line of its own."""
    dropped: list[str] = []

    def note(what: sys.UnraisableHookArgs) -> None:
        dropped.append(str(what.exc_value))

    before, sys.unraisablehook = sys.unraisablehook, note
    try:
        yield
    finally:
        sys.unraisablehook = before
    if dropped:
        raise DocsError(f"{block.place}: the {block.language} block leaves something open: {dropped[0]}")


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """Raise TimeoutError in the body after TIMEOUT_SECONDS, where signals can reach it."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"took more than {TIMEOUT_SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, TIMEOUT_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _is_local(address: object) -> bool:
    if not isinstance(address, tuple):
        return True  # a Unix socket
    try:
        return address[0] in ("", "localhost") or ipaddress.ip_address(address[0]).is_loopback
    except ValueError:
        return False


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sockets of this process reach no other machine."""

    def connect(self: socket.socket, address: Any) -> None:
        if not _is_local(address):
            raise PermissionError(f"documentation reaches no network, got {address!r}")
        super(socket.socket, self).connect(address)

    monkeypatch.setattr(socket.socket, "connect", connect)


@pytest.fixture
def namespace(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The globals of a page: those of a module, so that classes made in it find their home."""
    module = types.ModuleType("picotron_docs_page")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.__dict__


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_block_runs(
    page: Path, namespace: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a page shows is what happens, from a fresh folder."""
    text_of(page)
    monkeypatch.chdir(tmp_path)
    failure = first_failure(page, namespace, tmp_path)
    if failure is not None:
        pytest.fail(failure, pytrace=False)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_block_says_what_it_is(page: Path) -> None:
    """A fence without a known language would be passed over in silence; so would one left out at whim."""
    text_of(page)
    for block in blocks_of(page):
        assert block.language in LANGUAGES, (
            f"{block.place}: must be one of {LANGUAGES}, got {block.language!r}"
        )
        assert block.reason is None or block.reason.startswith(REASONS), f"{block.place}: {block.reason}"


@pytest.mark.parametrize("page", ROOMS, ids=page_id)
def test_every_page_asks_questions(page: Path) -> None:
    """At least five interview questions, each with a block that checks its answer."""
    text = text_of(page)
    assert "\n## Interview questions\n" in text, f"{page_id(page)} has no section 'Interview questions'"
    before, section = text.split("\n## Interview questions\n")
    answers = section.split("\n## ")[0].splitlines()
    starts = [index for index, line in enumerate(answers) if _QUESTION.match(line)]
    assert len(starts) >= QUESTIONS_AT_LEAST, f"{page_id(page)} has {len(starts)} interview questions"
    for start, stop in pairwise([*starts, len(answers)]):
        at = f"{page_id(page)}:{before.count(chr(10)) + start + 3}"
        assert any(line.startswith("```") for line in answers[start:stop]), (
            f"{at}: no block checks this answer"
        )


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    """Links to other pages, pictures and files exist in the repository."""
    for number, line in enumerate(text_of(page).splitlines(), start=1):
        for target in (match["target"] for match in _LINK.finditer(line)):
            path = target.partition("#")[0]
            if path and not re.match(r"[a-z]+:", path):
                assert (page.parent / path).exists(), f"{page_id(page)}:{number}: nothing at {target}"


def test_the_index_lists_every_page_once() -> None:
    """docs/README.md has one line for each page beside it."""
    listed = [match["target"] for match in _LINK.finditer(text_of(INDEX)) if match["target"].endswith(".md")]
    pages = [page.name for page in ROOMS]
    assert sorted(target for target in listed if "/" not in target) == pages


# The harness itself: pages that lie are found out.


def _page(lines: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A page of its own, in a folder of its own; ``|`` ends a line."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(lines.replace("|", "\n") + "\n", encoding="utf-8")
    return page


def _failure(lines: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str | None:
    monkeypatch.chdir(tmp_path)
    return first_failure(_page(lines, tmp_path, monkeypatch), {}, tmp_path)


LIES = {
    "A|```python|x = 1|assert x == 2|```": "page.md:4: the python block raised AssertionError",
    "||```python|def f():|    g()|f()|```": "page.md:5: the python block raised NameError",
    "```python|x = 1|```|```pycon|>>> 0|0|>>> x|2|```": "page.md:7: x\nExpected:",
    "```pycon|>>> y|```": "page.md:2: y\nTraceback",
    "```pycon|x = 1|```": "page.md:2: a pycon block needs prompts",
    "```bash|false && true|```": "page.md:2: the command ended with 1",
    "```bash|echo a|```||```text|b|```": "page.md:2: the bash block printed something else",
    "```python|print(1)|```|```text|2|```": "page.md:2: the python block printed something else",
    "```json|{|```": "page.md:2: the json block raised json.decoder.JSONDecodeError",
    "```pycon|>>> len(open('page.md').read())|48|```": "page.md:2: the pycon block leaves something open",
}
TRUTHS = (
    "```bash|echo a  b|```||```text|a b|```",
    "```bash|echo a b c|```|```text|a ... c|```",
    "```bash|echo a|```|Prose between.|```text|b|```",
    "<!-- not run: needs a GPU -->|```bash|false|```|```text|b|```",
    "<!-- not run: runs over 60 s -->|```bash|test '--steps 900' = '--steps 2'|```",
    "```python|x = 1|```|```pycon|>>> x += 1|>>> x|2|```|```python|assert x == 2|```",
    "````text|```|inside|```|````",
    "- item|  ```python|  if True:|      pass|  ```",
)


@pytest.mark.parametrize(("lines", "message"), LIES.items())
def test_a_page_that_lies_is_named_with_its_line(
    lines: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever breaks a page is told where."""
    failure = _failure(lines, tmp_path, monkeypatch)
    assert failure is not None
    assert failure.startswith(message), failure


@pytest.mark.parametrize("lines", TRUTHS)
def test_a_page_that_tells_the_truth_passes(
    lines: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output may be shortened and spaced otherwise, and a block may be left out for a reason."""
    assert _failure(lines, tmp_path, monkeypatch) is None


@pytest.mark.parametrize(
    "lines",
    ["```python|while True: pass|```", "```bash|sleep 60; true|```"],
    ids=["python", "bash"],
)
def test_a_block_that_never_ends_is_ended(
    lines: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block has a time limit."""
    monkeypatch.setattr(sys.modules[__name__], "TIMEOUT_SECONDS", 0.2)
    assert "took more than 0.2 s" in (_failure(lines, tmp_path, monkeypatch) or "")


def test_a_fence_that_is_never_closed_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the rest of the page would be one block."""
    with pytest.raises(DocsError, match=r"page\.md:1: this fence is never closed"):
        blocks_of(_page("```python|x = 1", tmp_path, monkeypatch))


@pytest.mark.usefixtures("no_network")
def test_the_network_is_out_of_reach() -> None:
    """A page that would fetch something fails, wherever it runs."""
    with pytest.raises(PermissionError, match="reaches no network"), socket.socket() as sock:
        sock.connect(("192.0.2.1", 80))
