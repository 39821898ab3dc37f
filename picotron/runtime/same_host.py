"""Tensors between the processes of one host, through memory that they share rather than through sockets.

Who sends copies a tensor into a region of its own arena and tells each reader where it is, by a note of a few
bytes on the socket of the pair; who receives waits for the note, reads the region and flags that it has. A
send never waits: what a socket does not take at once is passed on by a thread. Every note bears what it is
for (a communicator or channel, and its number there), so that they may be looked for in any order. A socket
that ends tells that its process has ended.
"""

from __future__ import annotations

import os
import platform
import secrets
import socket
import struct
import threading
from collections import deque
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

import torch
from attrs import define, field

from picotron.errors import ExecutionError
from picotron.runtime.arena import MAX_READERS, Arena, Window, make_file

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

WAITING = "wait"  # the action of an error that another rank is to blame for
_NOTE = struct.Struct("<QQ16sQQ")  # channel, number, kind, place, bytes
_HELLO = struct.Struct("<q")
_TIMEVAL = struct.Struct("ll")


class Topic(NamedTuple):
    """What a note is for: the ``number``-th operation of a communicator or channel."""

    channel: int
    number: int


class Note(NamedTuple):
    """Where the sender has put what it sends."""

    kind: str
    place: int
    bytes: int


def host_name() -> str:
    """A name that processes share which can share memory; empty where this one cannot."""
    if platform.machine() not in ("x86_64", "AMD64") or not hasattr(os, "memfd_create"):
        return ""
    try:
        os.close(os.memfd_create("picotron"))
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as boot:
            return f"{boot.read().strip()} {os.readlink('/proc/self/ns/net')} {os.getuid()}"
    except OSError:
        return ""


@define
class _Line:
    """One pair's socket; ``waiting`` are notes that it has not taken yet."""

    socket: socket.socket
    waiting: deque[bytes] = field(factory=deque)
    lock: threading.Lock = field(factory=threading.Lock)

    def send(self, note: bytes) -> None:
        """Without waiting."""
        with self.lock:
            if self.waiting:
                self.waiting.append(note)
                return
            try:
                self.socket.send(note, socket.MSG_DONTWAIT)
            except BlockingIOError:
                self.waiting.append(note)
                threading.Thread(target=self._pass_on, daemon=True).start()

    def _pass_on(self) -> None:
        while True:
            try:
                self.socket.send(self.waiting[0])
            except BlockingIOError:  # the time-out of the socket: whoever should read is late
                continue
            except OSError:  # the reader is gone; whoever waits for it will say so
                return
            with self.lock:
                self.waiting.popleft()
                if not self.waiting:
                    return


class SameHost:
    """What one process shares with the others of its host; ranks are world ranks."""

    def __init__(self, rank: int, arena: Arena, others: Mapping[int, tuple[socket.socket, Window]]) -> None:
        self.rank = rank
        self.ranks = frozenset({rank, *others})
        self._slot = {member: slot for slot, member in enumerate(sorted(self.ranks))}
        self._arena = arena
        self._lines = {peer: _Line(end) for peer, (end, _) in others.items()}
        self._windows: dict[int, Window] = {
            rank: arena,
            **{peer: window for peer, (_, window) in others.items()},
        }
        self._notes: dict[int, dict[Topic, Note]] = {peer: {} for peer in others}
        self._is_broken = False

    def put(self, tensor: torch.Tensor, readers: Collection[int], topic: Topic, kind: str) -> Note:
        """Show ``tensor``, contiguous, to ``readers``, this rank among them or not."""
        size = tensor.numel() * tensor.element_size()
        region = self._arena.lend(size, [self._slot[reader] for reader in readers])
        if size:
            region.content.copy_(_bytes_of(tensor))
        note = Note(kind, region.offset, size)
        packed = _NOTE.pack(*topic, kind.encode(), region.offset, size)
        for reader in readers:
            if reader != self.rank:
                self._send(reader, packed)
        return note

    def _send(self, reader: int, packed: bytes) -> None:
        try:
            self._lines[reader].send(packed)
        except OSError as error:
            raise self._gone(reader) from error

    def find(self, sender: int, topic: Topic, kind: str, size_bytes: int) -> Note:
        """The note of ``sender`` for ``topic``, waited for. ExecutionError where it is of another thing."""
        notes = self._notes[sender]
        while topic not in notes:
            found = self._next_note(sender)
            notes[found[0]] = found[1]
        note = notes.pop(topic)
        if (note.kind, note.bytes) != (kind, size_bytes):
            raise ExecutionError(
                f"rank {sender} takes part in {note.kind} of {note.bytes} bytes, "
                f"this rank in {kind} of {size_bytes}: all must post the same",
                rank=self.rank,
                action=kind,
            )
        return note

    def _next_note(self, sender: int) -> tuple[Topic, Note]:
        try:
            packed = self._lines[sender].socket.recv(_NOTE.size)
        except BlockingIOError:
            raise ExecutionError(
                f"nothing came from rank {sender} in time", rank=self.rank, action=WAITING
            ) from None
        except OSError as error:
            raise self._gone(sender) from error
        if not packed:
            raise self._gone(sender)
        channel, number, kind, place, size = _NOTE.unpack(packed)
        return Topic(channel, number), Note(kind.rstrip(b"\0").decode(), place, size)

    def _gone(self, peer: int) -> ExecutionError:
        words = f"the wait for rank {peer} was broken off" if self._is_broken else f"rank {peer} has ended"
        return ExecutionError(words, rank=self.rank, action=WAITING)

    def content(self, sender: int, note: Note, dtype: torch.dtype) -> torch.Tensor:
        """What ``sender`` shows, flat; to be read until ``done``."""
        if not note.bytes:
            return torch.empty(0, dtype=dtype)
        return self._windows[sender].content(note.place, note.bytes).view(dtype)

    def done(self, sender: int, note: Note) -> None:
        """Tell ``sender`` that this rank has read what it shows."""
        self._windows[sender].done(note.place, self._slot[self.rank])

    def break_off(self) -> None:
        """End, from another thread, whatever is waited for here."""
        self._is_broken = True
        for line in list(self._lines.values()):
            with suppress(OSError):
                line.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End every line; what others wait for from this rank fails at once."""
        for line in self._lines.values():
            line.socket.close()
        self._lines.clear()


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def share_host(store: Store, rank: int, world_size: int, timeout_seconds: float) -> SameHost | None:
    """The rank's connection with the others of its host, if there are any. Collective over the world.

    Every rank says in ``store`` which host it is on and where it listens; of a pair the later one calls.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with listener:
        listener.bind(address := f"\0picotron-{secrets.token_hex(16)}")
        listener.listen(world_size)
        listener.settimeout(timeout_seconds)
        store.set(f"host/{rank}", f"{host_name()}\n{address}")
        found = [store.get(f"host/{other}").decode().split("\n") for other in range(world_size)]
        host = found[rank][0]
        peers = [other for other in range(world_size) if host and found[other][0] == host and other != rank]
        if not peers or len(peers) >= MAX_READERS:
            return None
        descriptor = make_file()
        try:
            others = dict(
                _called(rank, found[peer][1], descriptor, timeout_seconds) for peer in peers if peer < rank
            )
            while len(others) < len(peers):
                others |= [_answered(rank, listener, descriptor, timeout_seconds)]
            return SameHost(rank, Arena(descriptor), others)
        finally:
            os.close(descriptor)


_Met = tuple[int, tuple[socket.socket, Window]]


def _called(rank: int, address: str, descriptor: int, timeout_seconds: float) -> _Met:
    end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    end.connect(address)
    return _introduced(rank, end, descriptor, timeout_seconds)


def _answered(rank: int, listener: socket.socket, descriptor: int, timeout_seconds: float) -> _Met:
    while True:
        end, _ = listener.accept()
        end.settimeout(None)
        _, user, _ = struct.unpack("3i", end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if user == os.getuid():
            return _introduced(rank, end, descriptor, timeout_seconds)
        end.close()


def _introduced(rank: int, end: socket.socket, descriptor: int, timeout_seconds: float) -> _Met:
    """Both tell their rank and hand over their memory."""
    seconds = int(timeout_seconds)
    limit = _TIMEVAL.pack(seconds, int((timeout_seconds - seconds) * 1e6))
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        end.setsockopt(socket.SOL_SOCKET, option, limit)
    socket.send_fds(end, [_HELLO.pack(rank)], [descriptor])
    hello, descriptors, _, _ = socket.recv_fds(end, _HELLO.size, 1)
    try:
        window = Window(descriptors[0])
    finally:
        for received in descriptors:
            os.close(received)
    return _HELLO.unpack(hello)[0], (end, window)
