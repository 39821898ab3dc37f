"""Which part of optimizer state, gradients and parameters a data-parallel rank keeps, and what it exchanges.

ZeRO stage 1 shards the optimizer's state, 2 the gradients too, 3 the parameters too (Rajbhandari et al. 2019,
arXiv:1910.02054). ``shard`` ranks, neighbours in their data-parallel group, share one sharded copy; where
they are fewer than the group, what they hold is copied over the other runs (hybrid sharding: Zhao et al.
2023, PyTorch FSDP, arXiv:2304.11277). Experts are copied over other ranks: their groups are cut into as many
runs, or as near to it as divides.

A bucket is one flat buffer, padded once, at its end, to equal parts; a rank keeps the part of its place, so
that gradients, weights and what a rank keeps are views of one memory and nothing is copied to be sent.
Vectors (norms and biases) are shared at no stage: they have buckets of their own, summed whole and updated on
every rank. They are little (0.003 % of Llama 3.1 8B), W reads norms, and I adds to their gradients: they
stand wherever they are used. What a step does with the gradients of a bucket:

- stage 0: they are summed over every group where they are partial.
- stage 1: after the last microbatch they are reduce-scattered over the ranks that share a copy, and this
  rank's part is summed over the other groups; the optimizer updates the part, and the bucket's parameters are
  gathered again after it.
- stage 2: they are reduce-scattered in every microbatch, and added to the part that is kept. A bucket's full
  gradients stand from the first segment that adds to them until their reduction is waited for: before the
  next one starts, so that one bucket fills while another travels, and the last ones after the B or W.
- stage 3: so too, and a stage's parameters are gathered beside each F, B and I, embedding, layer and head
  each by itself: the next while one computes, so that two stand at once. One row a group stands for all of
  them, and the next cell waits for its end; so do the rows of reductions, whose stream is the same, while the
  runtime waits for them where stage 2 does. None are gathered after the update.

Two choices change that. ``accumulate="full"`` keeps full gradients at stages 2 and 3 and reduces them once,
after the last microbatch, as stage 1 does: less is sent, more stands. ``reshard="stage"`` gathers a whole
stage ahead of the cells that use it, and frees it when the next cell does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, get_args

from attrs import frozen

from picotron.planner.layout import Placement
from picotron.planner.program import Kind
from picotron.planner.topology import Topology

Accumulate = Literal["full", "sharded"]
Reshard = Literal["unit", "stage"]
ACCUMULATES: tuple[Accumulate, ...] = get_args(Accumulate)
RESHARDS: tuple[Reshard, ...] = get_args(Reshard)

OPTIMIZER, GRADIENTS, PARAMETERS = 1, 2, 3  # the ZeRO stage from which on each is sharded
DATA_GROUPS = ("dp_cp", "edp")  # over which parameters are copied: of experts the second


@frozen(kw_only=True)
class Exchange:
    """One collective outside bodies: ``bytes`` is the payload of one rank."""

    kind: Kind
    group: str
    bytes: int


@frozen(kw_only=True)
class Sharding:
    """How a plan shards: its ZeRO stage, and the data-parallel ranks that share one sharded copy."""

    topology: Topology
    zero_stage: int
    shard: int

    def degree(self, group: str) -> int:
        """Ranks over which parameters of a data group would be copied."""
        return self.topology.edp if group == "edp" else self.topology.dp * self.topology.cp

    def size(self, group: str) -> int:
        """Ranks of a data group that share one copy."""
        if not self.zero_stage:
            return 1
        copies = self.topology.dp * self.topology.cp // self.shard
        return self.degree(group) // math.gcd(self.degree(group), copies)

    def within(self, group: str) -> str:
        """The name of the groups that share one copy."""
        return group if self.size(group) == self.degree(group) else f"{group}:{self.size(group)}"

    def across(self, group: str) -> tuple[str, ...]:
        """The name of the groups that hold copies of the same part, if there are several."""
        return () if self.size(group) == self.degree(group) else (f"{group}/{self.size(group)}",)

    def sharing(self, placement: Placement) -> int:
        """Ranks of which each keeps a part of ``placement``; 1 for a vector, which all keep whole."""
        return self.size(data_group(placement)) if len(placement.shape) > 1 else 1


def data_group(placement: Placement) -> str:
    """Over which ranks a parameter is copied."""
    return "dp_cp" if placement.expert is None else "edp"


def gradient_sums(
    sharding: Sharding, partial: Iterable[str], payload_bytes: int, *, shared: bool = True
) -> tuple[Exchange, ...]:
    """What is done with a bucket whose gradients are ``partial``, in order; ``payload_bytes``: all of it.

    The reduce-scatter comes first, so that what else must be summed is only a part. ``shared``: whether ranks
    have parts of it at all.
    """
    groups = list(partial)
    data = next((group for group in groups if group in DATA_GROUPS), "")
    size = sharding.size(data) if data and shared else 1
    if size == 1:
        return tuple(Exchange(kind=Kind.REDUCE, group=group, bytes=payload_bytes) for group in groups)
    groups.remove(data)
    return (
        Exchange(kind=Kind.REDUCE_SCATTER, group=sharding.within(data), bytes=payload_bytes),
        *(
            Exchange(kind=Kind.REDUCE, group=group, bytes=payload_bytes // size)
            for group in (*sharding.across(data), *groups)
        ),
    )
