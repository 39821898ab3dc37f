"""Which part of optimizer state, gradients and parameters a data-parallel rank keeps, and what it exchanges.

ZeRO stage 1 shards the optimizer's state, 2 the gradients too, 3 the parameters too (Rajbhandari et al. 2019,
arXiv:1910.02054). ``shard`` ranks, neighbours in their data-parallel group, share one sharded copy; where
they are fewer than the group, what they hold is copied over the other runs (hybrid sharding: Zhao et al.
2023, PyTorch FSDP, arXiv:2304.11277). Experts are copied over other ranks: their groups are cut into as many
runs, or as near to it as divides.

Each tensor by itself is flattened, padded to equal parts and cut, so that a rank keeps ceil(elements / ranks)
of it whatever else is in its bucket. What a step does with the gradients of a bucket:

- stage 0: they are summed over every group where they are partial.
- stage 1: after the last microbatch they are reduce-scattered over the ranks that share a copy, and this
  rank's part is summed over the other groups; the optimizer updates the part, and the bucket's parameters are
  gathered again after it.
- stage 2: they are reduce-scattered in every microbatch, and added to the part that is kept. A stage has two
  full buffers of its largest bucket for that (or all its buckets, where they are smaller): one fills while
  the other travels. They are there from its B or W until the last of its buckets is waited for.
- stage 3: so too, and a stage's parameters are gathered beside each F, B and I, embedding, layer and head
  each by itself: the next while one computes, so that two stand at once. One row a group stands for all of
  them, and the next cell waits for its end. None are gathered after the update.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from attrs import frozen

from picotron.planner.layout import Placement, local_numel
from picotron.planner.program import Kind
from picotron.planner.topology import Coordinate, Topology

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

    def numel(self, placement: Placement, where: Coordinate, what: int) -> int:
        """Elements at ``where`` of ``what`` (OPTIMIZER, GRADIENTS or PARAMETERS)."""
        whole = local_numel(placement, where)
        return -(-whole // self.size(data_group(placement))) if self.zero_stage >= what else whole

    def padded_numel(self, placement: Placement, where: Coordinate) -> int:
        """Elements of the whole slice at ``where``, padded to equal parts."""
        size = self.size(data_group(placement))
        return -(-local_numel(placement, where) // size) * size


def data_group(placement: Placement) -> str:
    """Over which ranks a parameter is copied."""
    return "dp_cp" if placement.expert is None else "edp"


def gradient_sums(sharding: Sharding, partial: Iterable[str], payload_bytes: int) -> tuple[Exchange, ...]:
    """What is done with a bucket whose gradients are ``partial``, in order; ``payload_bytes``: all of it.

    The reduce-scatter comes first, so that what else must be summed is only a part.
    """
    groups = list(partial)
    data = next((group for group in groups if group in DATA_GROUPS), "")
    size = sharding.size(data) if data else 1
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
