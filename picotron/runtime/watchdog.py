"""Watches over the processes of a world: when one dies or fails, all others learn which one, and where.

Every rank keeps a connection to the first one, on which nothing passes but where it is (once a second, when
that has changed) and what went wrong. The kernel closes the connections of a process that ends, however it
ends, so that its death is known at once; of a host that is gone, once it has answered nothing for
LOST_SECONDS. The first rank tells the others; when it dies itself, each of them sees that for itself.

Who knows of a death ends by itself as soon as it needs the dead. Where it waits for others, what it waits on
is broken off after BREAK_SECONDS, so that an ExecutionError is raised; where even that does not end it, its
process is ended GRACE_SECONDS later, with a line on the standard error and exit code 3. So all ranks
end within BREAK_SECONDS + GRACE_SECONDS of a process's death, whether or not a launcher helps. A launcher
that helps sends SIGTERM: its victims tell what they know before they obey.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from attrs import define, field

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

BREAK_SECONDS = 1.0
GRACE_SECONDS = 5.0
LOST_SECONDS = 8
TELL_SECONDS = 1.0  # how often a rank says where it is, and how long SIGTERM waits for news of its cause
EXECUTION_ERROR = 3  # the exit code of an ended process, as of the command line

Place = tuple[int, int, str]  # step, row, action
_KEY = "watchdog"


def place_in_words(place: Place | None) -> str:
    """Where a rank was, for a report.

    >>> place_in_words((5, 12, "0B1 mlp"))
    'at step 5, row 12, 0B1 mlp'
    >>> place_in_words((-1, -1, "opening a session"))
    'opening a session'
    """
    if place is None:
        return "before its first row"
    step, row, action = place
    return action if row < 0 else f"at step {step}, row {row}, {action}"


@define(eq=False)
class _Line:
    """One connection; ``rank`` is who is at its other end, None until it has said so."""

    socket: socket.socket
    rank: int | None
    received: bytes = b""
    has_left: bool = False

    def send(self, message: dict[str, Any]) -> None:
        """One line of JSON; who does not read it is dying or dead, and that is told otherwise."""
        with suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def read(self) -> list[dict[str, Any]] | None:
        """What has come, or None where the connection has ended."""
        try:
            chunk = self.socket.recv(65536)
        except TimeoutError:
            return []
        except OSError:
            return None
        if not chunk:
            return None
        *lines, self.received = (self.received + chunk).split(b"\n")
        try:
            return [json.loads(line) for line in lines]
        except ValueError:  # a stranger
            return None


@define(eq=False)
class _State:
    """What a watchdog knows; written by its thread, read by the rank's own."""

    place: Place | None = None
    news: str | None = None
    since: float = 0.0
    known: threading.Event = field(factory=threading.Event)
    is_told: bool = False
    is_broken: bool = False
    terminated: float | None = None  # when SIGTERM came
    aborting: float | None = None  # when the rank began to close after a failure


class Watchdog:
    """One rank's part of the watch; open one on every rank, in any order, over the same ``store``."""

    def __init__(self, rank: int, world_size: int, store: Store, break_off: Callable[[], None]) -> None:
        """``break_off`` ends, from another thread, whatever the rank waits on."""
        self.rank, self._break_off, self._state = rank, break_off, _State()
        self._lock = threading.Lock()
        self._lines: list[_Line] = []
        self._places: dict[int, Place] = {}
        self._token = ""
        self._listener: socket.socket | None = None
        self._old_wakeup: int | None = None
        self._wake, self._woken = socket.socketpair()
        self._closing = False
        if rank == 0:
            self._listen(world_size, store)
        else:
            self._call(store)
        self._catch_sigterm()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    @property
    def news(self) -> str | None:
        """The first death or failure of another rank, in words."""
        return self._state.news

    def at(self, place: Place) -> None:
        """Say where the rank is."""
        self._state.place = place

    def wait(self, seconds: float) -> str | None:
        """The news, waited for."""
        self._state.known.wait(seconds)
        return self._state.news

    def told(self) -> None:
        """The rank's own thread raises the news: there is no need to end it."""
        self._state.is_told = True

    def failed(self, words: str) -> None:
        """Tell the others that this rank has failed, and is closing: within GRACE_SECONDS, or it is ended."""
        self._state.aborting = time.monotonic()
        with self._lock:
            self._send({"failed": words})

    def leave(self) -> None:
        """Tell the others that this rank ends in good order."""
        with self._lock:
            self._send({"bye": True})

    def close(self) -> None:
        """Stop watching; a second call does nothing."""
        if self._closing:
            return
        self._closing = True
        self._release_sigterm()
        with suppress(OSError):
            self._wake.send(b"\0")
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _listen(self, world_size: int, store: Store) -> None:
        host = _own_address()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=world_size)
        self._token = secrets.token_hex(16)
        store.set(_KEY, json.dumps([host, self._listener.getsockname()[1], self._token]))

    def _call(self, store: Store) -> None:
        host, port, token = json.loads(store.get(_KEY))
        line = _Line(_alert(socket.create_connection((host, port), timeout=30.0)), 0)
        line.send({"rank": self.rank, "token": token})
        self._lines = [line]

    def _catch_sigterm(self) -> None:
        """Have SIGTERM wake the watch, which obeys it; only where nobody else has a use for it."""
        if threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            return
        self._wake.setblocking(False)
        self._old_wakeup = signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, _nothing)

    def _release_sigterm(self) -> None:
        if self._old_wakeup is None or threading.current_thread() is not threading.main_thread():
            return
        signal.set_wakeup_fd(self._old_wakeup)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._old_wakeup = None

    def _send(self, message: dict[str, Any]) -> None:
        for line in self._lines:
            if line.rank is not None:
                line.send(message)

    def _watch(self) -> None:
        """Until the rank leaves: hear the others, tell them, and end what does not end by itself."""
        said: Place | None = None
        last = 0.0
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            for end in (self._listener, *(line.socket for line in self._lines)):
                if end is not None:
                    selector.register(end, selectors.EVENT_READ)
            while not self._closing:
                for key, _ in selector.select(self._pause()):
                    self._hear(key.fileobj, selector)
                now = time.monotonic()
                if self._state.place != said and now >= last + TELL_SECONDS:
                    said, last = self._state.place, now
                    with self._lock:
                        self._send({"at": said})
                self._act(now)
        for line in self._lines:
            line.socket.close()
        for end in (self._listener, self._wake, self._woken):
            if end is not None:
                end.close()

    def _pause(self) -> float:
        """Until there may be something to do without being woken."""
        state = self._state
        waits = (state.news, state.terminated, state.aborting) != (None, None, None)
        return 0.05 if waits else TELL_SECONDS

    def _hear(self, end: Any, selector: selectors.BaseSelector) -> None:
        if end is self._woken:
            if signal.SIGTERM in self._woken.recv(4096):
                self._state.terminated = time.monotonic()
        elif end is self._listener:
            found, _ = self._listener.accept()
            line = _Line(_alert(found), None)
            with self._lock:
                self._lines.append(line)
            selector.register(found, selectors.EVENT_READ)
        else:
            line = next(line for line in self._lines if line.socket is end)
            messages = line.read()
            if messages is None:
                self._ended(line, selector)
            for message in messages or ():
                self._heard(line, message)

    def _ended(self, line: _Line, selector: selectors.BaseSelector) -> None:
        selector.unregister(line.socket)
        line.socket.close()
        with self._lock:
            self._lines.remove(line)
        if line.rank is not None and not line.has_left:
            where = place_in_words(self._places.get(line.rank))
            self._learn(f"rank {line.rank} is gone: its process ended without a word, last seen {where}")

    def _heard(self, line: _Line, message: dict[str, Any]) -> None:
        if line.rank is None:
            if message.get("token") == self._token:
                line.rank = int(message["rank"])
            return
        if "at" in message:
            step, row, action = message["at"]
            self._places[line.rank] = (step, row, action)
        elif "news" in message:
            self._learn(message["news"])
        elif "failed" in message:
            self._learn(message["failed"])
        elif "bye" in message:
            line.has_left = True

    def _learn(self, news: str) -> None:
        """The first news counts; the first rank passes it on."""
        state = self._state
        if state.news is not None:
            return
        if self.rank == 0:
            with self._lock:
                self._send({"news": news})
        state.since, state.news = time.monotonic(), news
        state.known.set()

    def _act(self, now: float) -> None:
        """Break off what the rank waits on, and end the process where that is not enough."""
        state = self._state
        if state.news is not None and not state.is_told:
            if not state.is_broken and now >= state.since + BREAK_SECONDS:
                state.is_broken = True
                self._break_off()
            if now >= state.since + BREAK_SECONDS + GRACE_SECONDS:
                self._end(state.news, EXECUTION_ERROR)
        if state.aborting is not None and now >= state.aborting + GRACE_SECONDS:
            self._end("it has failed and cannot close its groups", EXECUTION_ERROR)
        if state.terminated is None:
            return
        wait = GRACE_SECONDS if state.is_told else TELL_SECONDS
        if state.news is not None and not state.is_told:
            self._end(f"{state.news}; SIGTERM", 128 + signal.SIGTERM)
        elif now >= state.terminated + wait:
            self._end(f"rank {self.rank} was told to end by SIGTERM", 128 + signal.SIGTERM)

    def _end(self, why: str, code: int) -> None:
        """End the process, having said why to whoever reads its errors and to the other ranks."""
        where = place_in_words(self._state.place)
        with suppress(OSError):
            os.write(2, f"picotron: rank {self.rank}, {where}: {why}\n".encode())
        with self._lock:
            self._send({"news": why})
        os._exit(code)


def _alert(connection: socket.socket) -> socket.socket:
    """A connection whose loss the kernel notices within LOST_SECONDS, whatever the process does meanwhile."""
    connection.settimeout(2.0)
    options = {"TCP_NODELAY": 1, "TCP_KEEPIDLE": 2, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": LOST_SECONDS - 2}
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (options | {"TCP_USER_TIMEOUT": 1000 * LOST_SECONDS}).items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection


def _own_address() -> str:
    """The host's address on its way to the launch's master, which is where the others reach it."""
    target = socket.getaddrinfo(os.environ.get("MASTER_ADDR", "127.0.0.1"), 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(target[0], socket.SOCK_DGRAM) as probe:
        probe.connect(target[4])
        return str(probe.getsockname()[0])


def _nothing(number: int, frame: object) -> None:
    """The watch has been woken, and obeys."""
