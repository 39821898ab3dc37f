"""What simulated ranks have posted and not yet matched: messages and collectives."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from attrs import define, field, frozen

from picotron.runtime.backend import Group
from picotron.runtime.guards import Guard
from picotron.runtime.scheduler import Operation

UNLIKE = "must post the same collective"

Channel = tuple[int, int, str]  # sender, receiver, name


@define(eq=False, kw_only=True)
class Post(Operation):
    """One end of a message. ``rank`` posted it; ``ready_seconds`` is when it may begin."""

    kind: str  # "send" | "recv"
    rank: int
    peer: int
    channel: str
    tensor: torch.Tensor
    ready_seconds: float
    place: str
    guards: tuple[Guard, ...]
    corrupt: tuple[int, int] | None = None  # element and bit of what is received
    batch: Batch | None = None

    @property
    def key(self) -> Channel:
        """The channel of its message."""
        ends = (self.rank, self.peer) if self.kind == "send" else (self.peer, self.rank)
        return (*ends, self.channel)

    def describe(self) -> str:
        """As reports name it."""
        way = "to" if self.kind == "send" else "from"
        return f"{self.kind} #{self.number} {way} rank {self.peer} on channel {self.channel!r}"

    @property
    def stream(self) -> str:
        """Its channel, one direction of it."""
        way = "to" if self.kind == "send" else "from"
        return f"channel {self.channel!r} {way} rank {self.peer}"

    def absent(self) -> tuple[int, ...]:
        """The other end; where either end stands behind others in a line of batches, who those wait for."""
        if self.batch is None:
            return (self.peer,)
        found: dict[int, None] = {}
        seen, waiting = {self}, [self]
        while waiting:
            post = waiting.pop()
            assert post.batch is not None
            if not post.batch.begun:
                held_up_by = [other for other in post.batch.held_up_by() if other not in seen]
                seen.update(held_up_by)
                waiting += held_up_by
                continue
            behind = {other.peer for batch in post._other_ends() for other in batch.held_up_by()}
            found |= dict.fromkeys(sorted(behind) if behind and post.rank not in behind else (post.peer,))
        return tuple(found) or (self.peer,)

    def _other_ends(self) -> list[Batch]:
        """Batches of the peer that have not begun and hold the other end of a message like this one."""
        assert self.batch is not None
        return [
            batch
            for batch in self.batch.every_line.get((self.peer, self.rank, self.channel), ())
            if not batch.begun
            and any(post.key == self.key and post.kind != self.kind for post in batch.posts)
        ]

    def __str__(self) -> str:
        """Who posted what, and where."""
        return f"rank {self.rank} posted {self.describe()} ({self.place})"


@define(eq=False)
class Batch:
    """Messages that one rank posts together; ``num_open`` of them are not complete."""

    posts: tuple[Post, ...]
    num_open: int
    begun: bool = False
    lines: list[deque[Batch]] = field(factory=list)  # by queue, the batches that have not ended
    every_line: Mapping[Channel, deque[Batch]] = field(factory=dict)  # those of all ranks

    @property
    def queues(self) -> tuple[Channel, ...]:
        """The (rank, peer, channel) whose batches come one after the other."""
        return tuple(dict.fromkeys((post.rank, post.peer, post.channel) for post in self.posts))

    def held_up_by(self) -> list[Post]:
        """What has to end before it may begin."""
        return [
            post
            for line in self.lines
            if line[0] is not self
            for post in line[0].posts
            if post.end_seconds is None and post.problem is None
        ]


@define(eq=False, kw_only=True)
class Copy(Operation):
    """A copy between a rank's device and its host, which nobody else takes part in."""

    kind: str  # "offload" | "reload"
    rank: int

    def describe(self) -> str:
        """As reports name it."""
        return f"{self.kind} #{self.number}"

    @property
    def stream(self) -> str:
        """One direction."""
        return self.kind

    def absent(self) -> tuple[int, ...]:
        """Nobody."""
        return ()


@frozen
class Part:
    """What one member brings to a collective: ``agreed`` is equal among them, ``arguments`` are its own."""

    agreed: tuple[object, ...]
    arguments: tuple[Any, ...]
    posted_seconds: float
    place: str
    guards: tuple[Guard, ...] = ()
    corrupt: tuple[int, int] | None = None


@define(eq=False, kw_only=True)
class Collective(Operation):
    """The n-th collective of a group."""

    kind: str
    group: Group
    payload_bytes: int = 0
    parts: dict[int, Part] = field(factory=dict)

    def describe(self) -> str:
        """As reports name it."""
        return f"{self.kind} #{self.number} in group {self.group}"

    @property
    def stream(self) -> str:
        """Its communicator."""
        return f"group {self.group}"

    def absent(self) -> tuple[int, ...]:
        """The members that have not posted it."""
        return tuple(rank for rank in self.group.ranks if rank not in self.parts)

    def in_group_order(self) -> list[tuple[Any, ...]]:
        """Every member's arguments."""
        return [self.parts[rank].arguments for rank in self.group.ranks]

    def disagreement(self, rank: int, part: Part) -> str | None:
        """Words for ``part`` and the first one posted, where they are no parts of one collective."""
        first_rank, first = next(iter(self.parts.items()), (rank, part))
        if part.agreed == first.agreed:
            return None
        told = "; ".join(
            f"rank {who} posted {' '.join(map(str, p.agreed))} ({p.place})"
            for who, p in ((first_rank, first), (rank, part))
        )
        return f"members of group {self.group} {UNLIKE}: {told}"


@define(eq=False)
class Ledger:
    """What has been posted and not yet matched."""

    collectives: dict[tuple[object, int], Collective] = field(factory=dict)  # by communicator, number
    sends: dict[Channel, deque[Post]] = field(factory=dict)
    receives: dict[Channel, deque[Post]] = field(factory=dict)
    batches: dict[Channel, deque[Batch]] = field(factory=dict)  # by rank, peer and channel
    batch_ends: dict[Channel, float] = field(factory=dict)  # when the last of them ended
    num_sent: dict[tuple[int, int], int] = field(factory=dict)  # messages by sender and receiver
    dropped: list[str] = field(factory=list)
    vanished: dict[int, str] = field(factory=dict)  # ranks that a fault has killed, in words

    def unmatched(self) -> list[str]:
        """Messages that have one end only and nobody waits for, as reports name them."""
        waiting = [
            post for queue in (self.sends, self.receives) for posts in queue.values() for post in posts
        ]
        behind = [
            post
            for batches in self.batches.values()
            for batch in batches
            if not batch.begun
            for post in batch.posts
        ]
        found = sorted(
            f"unmatched: {post}"
            for post in dict.fromkeys([*waiting, *behind])
            if not post.waiting  # who waits is told of anyway
        )
        return found + [f"lost: {words}" for words in sorted(self.dropped)]

    def unreceived(self) -> list[str]:
        """Messages that were sent, and that nobody has asked for."""
        sent = [post for posts in self.sends.values() for post in posts if post.end_seconds is not None]
        return sorted(f"unmatched: {post}" for post in sent)
