"""Attention by heads between two all-to-alls: the runtime's side of ``planner.heads``.

Every rank sends each other one its tokens of that rank's heads, attends to whole sequences with the heads it
has then, and sends the context back (Jacobs et al. 2023, DeepSpeed Ulysses, arXiv:2309.14509). A key/value
head that several ranks need is sent to each of them, and the gradients that they return are added.
"""

from __future__ import annotations

import torch

from picotron.planner.context import head_copies
from picotron.runtime import flash
from picotron.runtime.communicator import Communicator


class HeadsAttention:
    """Causal attention of all tokens of a sequence with this rank's share of the heads."""

    def __init__(self, parts: dict[str, torch.Tensor], communicator: Communicator) -> None:
        """``parts``: q [batch, s, heads, d], k and v [batch, s, kv heads, d]; it is emptied."""
        self.communicator = communicator
        _, self.size = communicator.place("cp")
        self.batch, self.s, heads, self.d = parts["q"].shape
        self.copies = head_copies(parts["k"].shape[2], self.size)
        shared = parts["k"].shape[2] * self.copies // self.size
        self.widths = [heads // self.size, shared, shared]  # heads of a rank: of queries, keys and values
        self.heads = self._by_head(self._packed(parts))
        self.run()

    def run(self) -> None:
        """The context by head and by token, for the first time or after ``drop``."""
        self.out, self.log_sum_exp = flash.forward(*self._inputs(), causal=True)
        self.joined = self._by_token(self.out)

    def drop(self) -> None:
        """Let go of both; what was sent to this rank's heads stays."""
        del self.out, self.log_sum_exp, self.joined

    def context(self) -> torch.Tensor:
        """What was attended to, [T, heads * d]."""
        return self.joined

    def _packed(self, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        """[cp, batch, s, heads of a rank, d]: for each rank its heads, those it shares with others too."""
        packed = parts["q"].new_empty(self.size, self.batch, self.s, sum(self.widths), self.d)
        for name, places in zip(("q", "k", "v"), torch.split(packed, self.widths, dim=3), strict=True):
            part = parts.pop(name)
            copies = 1 if name == "q" else self.copies
            for rank, place in enumerate(places):
                first = rank // copies * place.shape[2]
                place.copy_(part[:, :, first : first + place.shape[2]])
        return packed

    def _by_head(self, sent: torch.Tensor) -> torch.Tensor:
        """From [cp, batch, s, heads, d], a part for each rank, to [batch, all tokens, heads, d]."""
        received = torch.empty_like(sent)
        self.communicator.all_to_all(received, sent, "cp")
        del sent
        if self.batch > 1:
            ordered = torch.empty_like(received).view(self.batch, self.size, *received.shape[2:])
            received = ordered.copy_(received.transpose(0, 1))
        return received.view(self.batch, self.size * self.s, *received.shape[3:])

    def _inputs(self) -> list[torch.Tensor]:
        """Queries, keys and values of whole sequences."""
        return [part.transpose(1, 2) for part in torch.split(self.heads, self.widths, dim=2)]

    def _by_token(self, out: torch.Tensor) -> torch.Tensor:
        """From a context by head, [batch, heads, all tokens, d], to [T, all heads * d] of own tokens."""
        sent = out.transpose(1, 2).view(self.batch, self.size, self.s, -1, self.d).transpose(0, 1)
        if self.batch > 1:
            sent = sent.contiguous()
        received = torch.empty_like(sent, memory_format=torch.contiguous_format)
        self.communicator.all_to_all(received, sent, "cp")
        del sent
        joined = received.new_empty(self.batch, self.s, self.size, *received.shape[3:])
        return joined.copy_(received.permute(1, 2, 0, 3, 4)).flatten(0, 1).flatten(1)

    def backward(self, grad: torch.Tensor) -> list[torch.Tensor]:
        """Gradients of q, k and v from ``grad``, each [T, heads * d]. Lets go of all that it has."""
        sent = self._packed_gradients(grad)
        received = torch.empty_like(sent)
        self.communicator.all_to_all(received, sent, "cp")
        del sent, self.joined
        query = received[..., : self.widths[0], :].permute(1, 2, 0, 3, 4)
        return [
            grad.new_empty(query.shape).copy_(query).flatten(0, 1).flatten(1),
            *(self._summed(part) for part in torch.split(received, self.widths, dim=3)[1:]),
        ]

    def _packed_gradients(self, grad: torch.Tensor) -> torch.Tensor:
        """[cp, batch, s, heads of a rank, d]: for each rank its tokens' gradients by this rank's heads."""
        upstream = self._by_head(self._parted(grad)).transpose(1, 2)
        query, key, value = self._inputs()
        parts = flash.backward(upstream, query, key, value, self.out, self.log_sum_exp, causal=True)
        del upstream, query, key, value, self.heads, self.out, self.log_sum_exp
        packed = grad.new_empty(self.size, self.batch, self.s, sum(self.widths), self.d)
        for place, part in zip(torch.split(packed, self.widths, dim=3), parts, strict=True):
            tokens = part.transpose(1, 2).view(self.batch, self.size, self.s, -1, self.d)
            place.copy_(tokens.transpose(0, 1))
        return packed

    def _parted(self, grad: torch.Tensor) -> torch.Tensor:
        """[cp, batch, s, heads of a rank, d]: for each rank the gradient of its heads' context."""
        parts = grad.view(self.batch, self.s, self.size, -1, self.d).permute(2, 0, 1, 3, 4)
        return grad.new_empty(parts.shape).copy_(parts)

    def _summed(self, part: torch.Tensor) -> torch.Tensor:
        """[T, kv heads * d] of [cp, batch, s, heads, d]: the copies of each head added."""
        groups = part.view(-1, self.copies, *part.shape[1:]).permute(2, 3, 0, 4, 1, 5)
        total = part.new_empty(*groups.shape[:4], self.d)
        torch.sum(groups, dim=4, out=total)
        return total.flatten(0, 1).flatten(1)
