"""Bodies of ring attention, step by step as the runtime's ``ring`` runs it.

Source: Liu et al. 2023, Ring Attention with Blockwise Transformers, arXiv:2310.01889.

A rank multiplies its own tokens first, causally: its two chunks are in order. A block from an earlier rank
then gives its early chunk to both chunks of queries; one from a later rank gives both of its chunks to the
late queries. So every rank makes two products of half-blocks in every step, and nothing that the mask hides
is multiplied. Partial contexts are merged by their log-sum-exp, in the precision of statistics. While a rank
multiplies, the next block is on its way.

In backward each product is exact by itself, given the context and the log-sum-exp of all keys. Keys and
values go round again, and behind them the sum of their gradients, to which every rank adds its part and which
comes home in one hop more: forward sends keys and values cp - 1 times, backward twice as often. Kept from
forward they would have to be sent but once in backward, and each rank would hold those of all.
"""

from __future__ import annotations

from picotron.planner.attention_core import Core, log_sum_exp, mark_core, product
from picotron.planner.body import Tensor
from picotron.planner.operations import Operations

_BLOCK, _GRADIENTS = "keys and values", "gradients of keys and values"


def _block_elements(ops: Operations, core: Core) -> tuple[int, int]:
    """Elements of a rank's keys, and of its values."""
    d = ops.d
    return d.tokens * d.kv_heads * d.head_dim, d.tokens * d.kv_heads * core.v_dim


def ring_forward(ops: Operations, core: Core) -> None:
    """The core, forward."""
    d, first, size = ops.d, len(ops.operations), sum(_block_elements(ops, core))
    blocks = [ops.tensor(f"block {step}", size) for step in range(d.context)]
    ops.kernel("pack keys and values", size, kernels=2, creates=[blocks[0]])
    ops.exchange(_BLOCK, blocks[0].bytes, creates=[blocks[1]])
    elements = d.tokens * d.heads * core.v_dim
    merged, own = core.context, core.context
    if is_wide(ops):
        own = ops.tensor("own context", elements)
        merged = ops.tensor("wide context", elements, itemsize=d.statistics_itemsize)
    product(ops, core, creates=[own, log_sum_exp(ops)])
    if is_wide(ops):
        ops.kernel("widen", elements, passes=3, creates=[merged], frees=[own])
    ops.wait(_BLOCK, frees=[blocks[0]])
    for step in range(1, d.context):
        more = step + 1 < d.context
        if more:
            ops.exchange(_BLOCK, blocks[step].bytes, creates=[blocks[step + 1]])
        for _ in range(2):
            _merged_product(ops, core)
        if more:
            ops.wait(_BLOCK, frees=[blocks[step]])
    ops.kernel("free", 0, kernels=0, frees=[blocks[-1]])
    if is_wide(ops):
        ops.kernel("narrow", elements, passes=3, creates=[core.context], frees=[merged])
    mark_core(ops, first)


def is_wide(ops: Operations) -> bool:
    """Whether contexts are merged in another precision than they are kept in."""
    return ops.d.statistics_itemsize != ops.d.itemsize


def _merged_product(ops: Operations, core: Core) -> None:
    """Half of the queries with half of a block, merged into what they have so far."""
    d = ops.d
    rows = d.tokens // 2 * d.heads
    part = ops.tensor("partial context", rows * core.v_dim)
    sums, merged = (
        ops.tensor(name, rows, itemsize=d.statistics_itemsize) for name in ("partial log_sum_exp", "merged")
    )
    product(ops, core, side=d.seq_len // 2, causal=False, creates=[part, sums])
    if is_wide(ops):
        narrow, part = (
            part,
            ops.tensor("wide partial context", rows * core.v_dim, itemsize=sums.bytes // rows),
        )
        ops.kernel("widen", rows * core.v_dim, passes=3, creates=[part], frees=[narrow])
    ops.kernel("merge", rows * core.v_dim, passes=3, kernels=5, creates=[merged], frees=[part, sums, merged])


def ring_backward(ops: Operations, core: Core, dcontext: Tensor) -> None:
    """The core, backward. Held in step s: its keys and values, and gradients of those of step s - 1."""
    d, size = ops.d, sum(_block_elements(ops, core))
    last = d.context - 1
    held = [ops.tensor("held 0", size), ops.tensor("held 1", size)]
    held += [
        ops.tensor(f"held {step + 1}", size if step == last else 2 * size) for step in range(1, last + 1)
    ]
    ops.kernel("pack keys and values", size, kernels=2, creates=[held[0]])
    ops.exchange(_BLOCK, held[0].bytes, creates=[held[1]])
    product(ops, core, backward=True, creates=core.gradients)
    ops.wait(_BLOCK, frees=[held[0]])
    for step in range(1, last + 1):
        sent = held[step].bytes if step < last else size * d.itemsize  # after the last nobody needs the block
        name = _BLOCK if step < last else _GRADIENTS
        if last > 1:
            ops.exchange(name, sent, creates=[held[step + 1]])
        else:
            ops.kernel("room for gradients", 0, kernels=0, creates=[held[2]])
        halves = _half_products_backward(ops, core)
        if last > 1:
            ops.wait(name, frees=[held[step]])
        else:
            ops.kernel("free", 0, kernels=0, frees=[held[1]])
        if step == 1:
            ops.kernel("no gradients yet", size, passes=1)
        ops.kernel("add block gradients", size, passes=3, kernels=4, frees=halves)
    home = ops.tensor("gradients come home", size)
    ops.exchange(_GRADIENTS, home.bytes, creates=[home], frees=[held[-1]])
    frees = [home, *core.inputs, core.context, log_sum_exp(ops), dcontext]
    ops.kernel("add own gradients", size, passes=3, kernels=2, frees=frees)


def _half_products_backward(ops: Operations, core: Core) -> list[Tensor]:
    """Both products of a step; the gradients of keys and values that they leave."""
    d = ops.d
    keys, values = (elements // 2 for elements in _block_elements(ops, core))
    rows, left = d.tokens // 2 * d.heads * d.head_dim, list[Tensor]()
    for half in range(2):
        query = ops.tensor("partial dq", rows)
        gradients = [ops.tensor(f"{half} partial dk", keys), ops.tensor(f"{half} partial dv", values)]
        creates = [query, *gradients]
        product(ops, core, side=d.seq_len // 2, causal=False, backward=True, creates=creates)
        ops.kernel("add query gradient", rows, passes=3, frees=[query])
        left += gradients
    return left
