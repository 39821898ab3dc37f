"""How context-parallel ranks share a sequence: which tokens each has, and how attention reaches the others'.

*ring*: keys and values go round the ranks while each multiplies what it has (Liu et al. 2023, Ring Attention,
arXiv:2310.01889). Causal masks let late tokens see more, so a sequence is cut in 2 * cp chunks and rank r has
chunks r and 2 * cp - 1 - r (*zigzag*): every rank then multiplies as much as every other, in every step.
*all_to_all*: around the attention core the ranks change from a share of the tokens to a share of the heads,
each with whole sequences (Jacobs et al. 2023, DeepSpeed Ulysses, arXiv:2309.14509). Every rank has the same
work, so a sequence is cut in cp chunks.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from picotron.errors import PlanError
from picotron.planner.model import ModelSpec
from picotron.planner.topology import Topology
from picotron.planner.validators import shown

ContextParallel = Literal["ring", "all_to_all"]
CONTEXTS: tuple[ContextParallel, ...] = get_args(ContextParallel)


def token_positions(seq_len: int, cp: int, index: int, context: ContextParallel) -> np.ndarray:
    """Where the tokens of context-parallel rank ``index`` stand in their sequence, ascending.

    >>> token_positions(16, 2, 1, "ring")
    array([ 4,  5,  6,  7,  8,  9, 10, 11])
    """
    if cp == 1:
        return np.arange(seq_len)
    if context == "all_to_all":
        first = index * (seq_len // cp)
        return np.arange(first, first + seq_len // cp)
    chunks = np.arange(seq_len).reshape(2 * cp, -1)
    return np.concatenate([chunks[index], chunks[2 * cp - 1 - index]])


def head_copies(kv_heads: int, cp: int) -> int:
    """Of an all-to-all: the ranks that are sent the same key/value head (1: each has its own)."""
    return max(1, cp // kv_heads)


def check_context(context: object, model: ModelSpec, topology: Topology, seq_len: int) -> None:
    """Raise PlanError unless the ranks of ``topology`` can share sequences as ``context`` says."""
    if context not in CONTEXTS:
        raise PlanError(f"context must be one of {', '.join(CONTEXTS)}, got {shown(context)}")
    cp = topology.cp
    if context == "all_to_all":
        _check_heads(model, topology)
        if seq_len % cp:
            raise PlanError(f"cp must divide seq_len {seq_len}, got cp={cp}; change one of the two")
    elif cp > 1 and seq_len % (2 * cp):
        raise PlanError(
            f"2 * cp must divide seq_len {seq_len}, got cp={cp}: each rank of a ring has an early and a late "
            "chunk; change one of the two, or plan with context=all_to_all where cp divides both seq_len and "
            "the heads"
        )


def _check_heads(model: ModelSpec, topology: Topology) -> None:
    cp, tp = topology.cp, topology.tp
    if cp == 1:
        raise PlanError("context=all_to_all needs cp > 1, got cp=1; leave it out")
    heads, kv_heads = model.num_heads // tp, max(1, model.num_kv_heads // tp)
    if heads % cp:
        raise PlanError(
            f"context=all_to_all needs cp to divide the {heads} query heads of a tensor-parallel rank, "
            f"got cp={cp}; take context=ring, or another cp or tp"
        )
    if kv_heads % cp and cp % kv_heads:
        raise PlanError(
            f"context=all_to_all needs cp to divide the {kv_heads} key/value heads of a tensor-parallel rank "
            f"or be a multiple of them, got cp={cp}; take context=ring, or another cp or tp"
        )


def chosen_context(model: ModelSpec, topology: Topology, seq_len: int) -> ContextParallel:
    """Ring, unless its chunks do not divide a sequence and an all-to-all can cut the heads."""
    if topology.cp == 1 or seq_len % (2 * topology.cp) == 0:
        return "ring"
    try:
        check_context("all_to_all", model, topology, seq_len)
    except PlanError:
        return "ring"
    return "all_to_all"
