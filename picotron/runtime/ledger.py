"""What simulated ranks have posted and not yet matched: messages, receives and collectives."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from attrs import define, evolve, field, frozen

from picotron.runtime.backend import Group
from picotron.runtime.scheduler import Operation


@define(eq=False, kw_only=True)
class Receive(Operation):
    """A receive that was posted and has no message yet."""

    sender: int
    channel: str
    tensor: torch.Tensor

    def describe(self) -> str:
        """As reports name it."""
        return f"recv #{self.number} from rank {self.sender} on channel {self.channel!r}"

    def absent(self) -> tuple[int, ...]:
        """The sender."""
        return (self.sender,)


@frozen
class Message:
    """A send that was posted and has no receive yet."""

    content: torch.Tensor
    posted_seconds: float


@frozen
class Part:
    """What one member brings to a collective: ``agreed`` is equal among them, ``arguments`` are its own."""

    agreed: tuple[object, ...]
    arguments: tuple[Any, ...]
    posted_seconds: float


@define(eq=False, kw_only=True)
class Collective(Operation):
    """The n-th collective of a group."""

    group: Group
    parts: dict[int, Part] = field(factory=dict)

    def describe(self) -> str:
        """As reports name it."""
        kind = next(iter(self.parts.values())).agreed[0]
        return f"{kind} #{self.number} in group {self.group}"

    def absent(self) -> tuple[int, ...]:
        """The members that have not posted it."""
        return tuple(rank for rank in self.group.ranks if rank not in self.parts)

    def in_group_order(self) -> list[tuple[Any, ...]]:
        """Every member's arguments."""
        return [self.parts[rank].arguments for rank in self.group.ranks]

    def let_go(self) -> None:
        """Drop the members' tensors: a late waiter must not keep another rank's memory alive."""
        self.parts = {rank: evolve(part, arguments=()) for rank, part in self.parts.items()}


@define(eq=False)
class Ledger:
    """What has been posted and not yet matched."""

    collectives: dict[tuple[int, int], Collective] = field(factory=dict)  # by communicator and number
    messages: dict[tuple[int, int, str], deque[Message]] = field(factory=dict)  # by sender, receiver, channel
    receives: dict[tuple[int, int, str], deque[Receive]] = field(factory=dict)


def disagreement(group: Group, first_rank: int, first: Part, rank: int, part: Part) -> str:
    """Words for two members that posted different collectives."""
    theirs, ours = (" ".join(map(str, p.agreed)) for p in (first, part))
    return (
        f"members of group {group} must post the same collective: "
        f"rank {first_rank} posted {theirs}, rank {rank} posted {ours}"
    )
