"""Ring attention over tokens cut in zigzag: the runtime's side of ``planner.ring``.

While a rank multiplies one block of keys and values, the next is on its way. In backward the gradients of a
block follow it around the ring; what a rank holds of both is sent on as one message.
"""

from __future__ import annotations

import torch

from picotron.runtime import flash
from picotron.runtime.backend import Handle
from picotron.runtime.communicator import Communicator

Span = slice  # of tokens


def halves(seq_len: int) -> tuple[Span, Span]:
    """A rank's early and late chunk."""
    return slice(0, seq_len // 2), slice(seq_len // 2, seq_len)


def products(seq_len: int, index: int, size: int, step: int) -> tuple[tuple[Span, Span], ...]:
    """The (queries, keys) that rank ``index`` of ``size`` multiplies in ``step`` of a ring, from 1 on.

    Then it has the block of the rank ``step`` before it. The late chunk of an earlier rank is hidden from
    all of its queries; of a later rank's block its early queries see nothing, its late ones everything.
    """
    early, late = halves(seq_len)
    if step <= index:
        return (early, early), (late, early)
    return (late, early), (late, late)


class RingAttention:
    """Causal attention of this rank's queries over the keys and values of all ranks of a ring."""

    def __init__(self, parts: dict[str, torch.Tensor], communicator: Communicator) -> None:
        """``parts``: q [batch, s, heads, d], k and v [batch, s, kv heads, d]."""
        self.communicator = communicator
        self.index, self.size = communicator.place("cp")
        self.query, self.key, self.value = (parts[name].transpose(1, 2) for name in ("q", "k", "v"))
        self.run()

    def run(self) -> None:
        """The context and its statistics, for the first time or after ``drop``."""
        self.out, self.log_sum_exp = self._forward()

    def drop(self) -> None:
        """Let go of both; q, k and v stay."""
        del self.out, self.log_sum_exp

    def context(self) -> torch.Tensor:
        """What was attended to, [T, heads * d]."""
        return self.out.transpose(1, 2).flatten(0, 1).flatten(1)

    def _packed(self) -> torch.Tensor:
        """Keys and values in one message, [2, batch, s, kv heads, d]."""
        key, value = self.key.transpose(1, 2), self.value.transpose(1, 2)
        packed = key.new_empty(2, *key.shape)
        packed[0].copy_(key)
        packed[1].copy_(value)
        return packed

    def _products(self, step: int) -> tuple[tuple[Span, Span], ...]:
        return products(self.query.shape[2], self.index, self.size, step)

    def _forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        block = self._packed()
        incoming = torch.empty_like(block)
        handle = self.communicator.start_exchange(incoming, block, "cp")
        out, log_sum_exp = flash.forward(self.query, self.key, self.value, causal=True)
        out = out.to(log_sum_exp.dtype)  # partial contexts are summed as precisely as their statistics
        self.communicator.wait(handle, "cp")
        for step in range(1, self.size):
            block = incoming
            if step < self.size - 1:
                incoming = torch.empty_like(block)
                handle = self.communicator.start_exchange(incoming, block, "cp")
            for queries, keys in self._products(step):
                self._merge_product(out, log_sum_exp, block, queries, keys)
            if step < self.size - 1:
                self.communicator.wait(handle, "cp")
        del block, incoming
        return out.to(self.query.dtype), log_sum_exp

    def _merge_product(
        self, out: torch.Tensor, log_sum_exp: torch.Tensor, block: torch.Tensor, queries: Span, keys: Span
    ) -> None:
        key, value = (part[:, keys].transpose(1, 2) for part in block)
        part, part_sums = flash.forward(self.query[:, :, queries], key, value, causal=False)
        part = part.to(out.dtype)
        flash.merge(out[:, :, queries], log_sum_exp[:, :, queries], part, part_sums)

    def backward(self, grad: torch.Tensor) -> list[torch.Tensor]:
        """Gradients of q, k and v from ``grad``, each [T, heads * d]. Lets go of all that it has."""
        batch, heads, s, d = self.query.shape
        upstream = grad.view(batch, s, heads, d).transpose(1, 2)
        held = self._packed()
        incoming = torch.empty_like(held)
        handle = self.communicator.start_exchange(incoming, held, "cp")
        gradients = flash.backward(
            upstream, self.query, self.key, self.value, self.out, self.log_sum_exp, causal=True
        )
        self.communicator.wait(handle, "cp")
        held = incoming
        for step in range(1, self.size):  # held: keys and values, then the gradients of those of a step ago
            incoming = self._next_held(held, step)
            sent = self._post_backward(incoming, held, step)
            parts = [self._half_product(span, held, upstream, gradients[0]) for span in self._products(step)]
            if sent is not None:
                self.communicator.wait(sent, "cp")
            held = incoming
            if step == 1:
                held[-2:].zero_()
            _add_parts(held[-2:], parts)
            del parts
        home = torch.empty_like(held)
        self.communicator.exchange(home, held, "cp")
        del held, incoming
        for gradient, further in zip(gradients[1:], home, strict=True):
            gradient.transpose(1, 2).add_(further)
        del self.query, self.key, self.value, self.out, self.log_sum_exp
        return [part.transpose(1, 2).flatten(0, 1).flatten(1) for part in gradients]

    def _next_held(self, held: torch.Tensor, step: int) -> torch.Tensor:
        """Room for what the next step has: no keys and values after the last."""
        return held.new_empty(2 if step == self.size - 1 else 4, *held.shape[1:])

    def _post_backward(self, incoming: torch.Tensor, held: torch.Tensor, step: int) -> Handle | None:
        """Send on what is held: in the first step no gradients, in the last no keys and values."""
        if self.size == 2:
            return None
        if step == self.size - 1:
            return self.communicator.start_exchange(incoming, held[-2:], "cp")
        return self.communicator.start_exchange(incoming[: len(held)], held, "cp")

    def _half_product(
        self, span: tuple[Span, Span], held: torch.Tensor, upstream: torch.Tensor, dq: torch.Tensor
    ) -> tuple[Span, torch.Tensor, torch.Tensor]:
        """Add to the queries' gradient; the keys, and their gradients and their values'."""
        queries, keys = span
        key, value = (part[:, keys].transpose(1, 2) for part in held[:2])
        part, dk, dv = flash.backward(
            upstream[:, :, queries],
            self.query[:, :, queries],
            key,
            value,
            self.out[:, :, queries],
            self.log_sum_exp[:, :, queries],
            causal=False,
        )
        dq[:, :, queries].add_(part)
        return keys, dk, dv


def _add_parts(sums: torch.Tensor, parts: list[tuple[Span, torch.Tensor, torch.Tensor]]) -> None:
    """Add gradients of keys and values to their place in [2, batch, s, kv heads, d]."""
    for keys, *found in parts:
        for total, part in zip(sums, found, strict=True):
            total[:, keys].add_(part.transpose(1, 2))
