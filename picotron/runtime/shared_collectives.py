"""Collectives and messages over the memory that the processes of a host share.

Each posts by showing what it has, and ends by reading what the others show: nothing is left for the others
to do meanwhile, so no wait depends on another rank's wait. Reductions add in group order, as simulated ranks
do, to the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from picotron.runtime.arithmetic import as_elements, reduce_into
from picotron.runtime.backend import Group
from picotron.runtime.same_host import Note, SameHost, Topic

Finish = Callable[[], None]
BLOCK = 2**16  # elements reduced at a time, so that they stay in a core's cache


class SharedCollectives:
    """The operations of one rank; each posts at once and returns what is to be called to end it."""

    def __init__(self, host: SameHost) -> None:
        self.host = host
        self._numbers: dict[tuple[int, ...], int] = {}

    def reaches(self, ranks: Sequence[int]) -> bool:
        """Whether all of ``ranks`` share this host."""
        return self.host.ranks.issuperset(ranks)

    def all_reduce(self, tensor: torch.Tensor, group: Group, channel: int, op: str) -> Finish:
        """Replace ``tensor`` by the reduction over the group."""
        topic = self._topic(channel)
        own = self.host.put(tensor, group.ranks, topic, "all_reduce")

        def finish() -> None:
            notes = self._notes(group, topic, own)
            parts = [self.host.content(rank, note, tensor.dtype) for rank, note in notes.items()]
            _reduce_blocks(as_elements(tensor), parts, op)
            self._done(notes)

        return finish

    def reduce_scatter(
        self, output: torch.Tensor, input: torch.Tensor, group: Group, channel: int, op: str
    ) -> Finish:
        """Write to ``output`` this rank's part of the reduction."""
        topic = self._topic(channel)
        own = self.host.put(input, group.ranks, topic, "reduce_scatter")
        place, size = group.index(self.host.rank), output.numel()

        def finish() -> None:
            notes = self._notes(group, topic, own)
            wholes = (self.host.content(rank, note, input.dtype) for rank, note in notes.items())
            parts = [whole[place * size : (place + 1) * size] for whole in wholes]
            _reduce_blocks(as_elements(output), parts, op)
            self._done(notes)

        return finish

    def all_gather(self, output: torch.Tensor, input: torch.Tensor, group: Group, channel: int) -> Finish:
        """Write to ``output`` all members' inputs."""
        topic = self._topic(channel)
        others = [rank for rank in group.ranks if rank != self.host.rank]
        own = self.host.put(input, others, topic, "all_gather")
        pieces = dict(zip(group.ranks, as_elements(output).chunk(group.size), strict=True))
        if pieces[self.host.rank].data_ptr() != input.data_ptr():
            pieces[self.host.rank].copy_(as_elements(input))

        def finish() -> None:
            for rank in others:
                self._read(pieces[rank], rank, topic, "all_gather", own.bytes)

        return finish

    def all_to_all(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        group: Group,
        channel: int,
        received: Sequence[int],
        sent: Sequence[int],
    ) -> Finish:
        """Part i of ``input`` goes to member i; sizes are rows of each."""
        topic = self._topic(channel)
        outgoing = dict(zip(group.ranks, torch.split(input, list(sent)), strict=True))
        incoming = dict(zip(group.ranks, torch.split(output, list(received)), strict=True))
        for rank, part in outgoing.items():
            if rank != self.host.rank:
                self.host.put(part, [rank], topic, "all_to_all")
        incoming.pop(self.host.rank).copy_(outgoing[self.host.rank])

        def finish() -> None:
            for rank, part in incoming.items():
                self._read(as_elements(part), rank, topic, "all_to_all", part.numel() * part.element_size())

        return finish

    def exchange(self, output: torch.Tensor, input: torch.Tensor, group: Group, channel: int) -> Finish:
        """Send ``input`` to the next member, and receive ``output`` from the one before."""
        place, size = group.index(self.host.rank), input.numel() * input.element_size()
        if group.size == 1:
            output.copy_(input)
            return _nothing
        topic = self._topic(channel)
        self.host.put(input, [group.ranks[(place + 1) % group.size]], topic, "exchange")
        return lambda: self._read(as_elements(output), group.ranks[place - 1], topic, "exchange", size)

    def broadcast(self, tensor: torch.Tensor, group: Group, channel: int, source: int) -> Finish:
        """Replace ``tensor`` by that of world rank ``source``."""
        topic = self._topic(channel)
        if source == self.host.rank:
            self.host.put(tensor, [rank for rank in group.ranks if rank != source], topic, "broadcast")
            return _nothing
        size = tensor.numel() * tensor.element_size()
        return lambda: self._read(as_elements(tensor), source, topic, "broadcast", size)

    def send(self, tensor: torch.Tensor, peer: int, channel: int) -> Finish:
        """Send to ``peer``; it has ended at once."""
        self.host.put(tensor, [peer], self._topic(channel, self.host.rank, peer), "message")
        return _nothing

    def receive(self, tensor: torch.Tensor, peer: int, channel: int) -> Finish:
        """Receive the next message of ``peer`` on ``channel``."""
        topic = self._topic(channel, peer, self.host.rank)
        size = tensor.numel() * tensor.element_size()
        return lambda: self._read(as_elements(tensor), peer, topic, "message", size)

    def _topic(self, channel: int, *ends: int) -> Topic:
        """The next of a communicator, or of a channel in one direction."""
        line = (channel, *ends)
        number = self._numbers[line] = self._numbers.get(line, -1) + 1
        return Topic(channel, number)

    def _notes(self, group: Group, topic: Topic, own: Note) -> dict[int, Note]:
        """Of every member, in group order."""
        return {
            rank: own if rank == self.host.rank else self.host.find(rank, topic, own.kind, own.bytes)
            for rank in group.ranks
        }

    def _done(self, notes: dict[int, Note]) -> None:
        for rank, note in notes.items():
            self.host.done(rank, note)

    def _read(self, into: torch.Tensor, sender: int, topic: Topic, kind: str, size_bytes: int) -> None:
        note = self.host.find(sender, topic, kind, size_bytes)
        if size_bytes:
            into.copy_(self.host.content(sender, note, into.dtype))
        self.host.done(sender, note)


def _nothing() -> None:
    """What is left to do of a send."""


def _reduce_blocks(total: torch.Tensor, parts: Sequence[torch.Tensor], op: str) -> None:
    """Write to ``total`` what ``parts`` are together, in their order; each lies in memory of its own."""
    for first in range(0, total.numel(), BLOCK):
        reduce_into(total[first : first + BLOCK], [part[first : first + BLOCK] for part in parts], op)
