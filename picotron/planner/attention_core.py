"""What bodies of the attention core share: what it takes and leaves, and its products.

Causal attention is counted as flash kernels run it: half of the score matrix, and the scores once more in
backward (Dao et al. 2022, arXiv:2205.14135). Under context parallelism the core is a ``ring`` or stands
between all-to-alls (``heads``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from attrs import evolve, frozen

from picotron.planner.body import Operation, Tensor
from picotron.planner.operations import Operations


@frozen(kw_only=True)
class Core:
    """What the attention core takes and leaves.

    ``inputs``: queries, keys and values, in one tensor or several; ``gradients``: those of each of the three.
    ``v_dim``: elements of a value.
    """

    inputs: Sequence[Tensor]
    context: Tensor
    gradients: Sequence[Tensor] = ()
    v_dim: int


def log_sum_exp(ops: Operations) -> Tensor:
    """What flash attention keeps of each row of scores."""
    d = ops.d
    return ops.saved("log_sum_exp", d.tokens * d.heads, itemsize=d.statistics_itemsize)


def product(
    ops: Operations,
    core: Core,
    *,
    side: int = 0,
    causal: bool = True,
    heads: int = 0,
    backward: bool = False,
    creates: Iterable[Tensor] = (),
    frees: Iterable[Tensor] = (),
) -> None:
    """Flash attention of ``side`` queries with as many keys of each sequence.

    Left out, ``side`` is the rank's tokens and ``heads`` are all of its heads.
    """
    d = ops.d
    side, heads = side or d.seq_len, heads or d.heads
    pairs = side * (side + 1) if causal else 2 * side * side  # twice those that are not masked
    widths = (3 * d.head_dim + 2 * core.v_dim) if backward else (d.head_dim + core.v_dim)
    ops.operations.append(
        Operation(
            name="attention backward" if backward else "attention",
            kind="attention",
            flops=d.batch * heads * pairs * widths,
            moved_bytes=(8 if backward else 4) * d.batch * side * heads * d.head_dim * d.itemsize,
            creates=tuple(creates),
            frees=tuple(frees),
            shape=(side, side, d.head_dim, d.batch * heads),
        )
    )


def mark_core(ops: Operations, first: int) -> None:
    """Mark what was collected from ``first`` on as what selective recompute runs again."""
    ops.operations[first:] = [evolve(step, core=True) for step in ops.operations[first:]]
