"""Bodies of the attention core, from queries, keys and values to the context, and back to their gradients.

They mirror the runtime's kernels step by step. Causal attention is counted as flash kernels run it: half
of the score matrix, and the scores once more in backward (Dao et al. 2022, arXiv:2205.14135). Under context
parallelism (``context``) the core is a ring or stands between all-to-alls.

A ring multiplies own tokens first, causally: the two chunks are in order. A block from an earlier rank then
gives its early chunk to both chunks of queries, one from a later rank both of its chunks to the late queries:
two products of half-blocks in every step on every rank, and what the mask would hide is never multiplied.
Partial outputs are merged by their log-sum-exp. In backward each product is exact by itself, given the
context and log-sum-exp of all. Keys and values go round again; behind them goes the sum of their gradients,
to which every rank adds its part, and which comes home in one hop more.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from attrs import evolve, frozen

from picotron.planner.body import Operation, Tensor
from picotron.planner.context import head_copies
from picotron.planner.operations import Operations


@frozen(kw_only=True)
class Core:
    """What the attention core takes and leaves.

    ``inputs``: queries, keys and values, in one tensor or several; ``gradients``: theirs, as ``inputs`` but
    always three. ``v_dim``: elements of a value, where they are not those of a key.
    """

    inputs: Sequence[Tensor]
    context: Tensor
    gradients: Sequence[Tensor] = ()
    v_dim: int = 0


def attend(ops: Operations, core: Core) -> None:
    """The core, forward."""
    if ops.d.context == 1:
        _product(ops, core, creates=[core.context, log_sum_exp(ops)])
    elif ops.d.context_parallel == "ring":
        _ring_forward(ops, core)
    else:
        _all_to_all_forward(ops, core)


def attend_backward(ops: Operations, core: Core, dcontext: Tensor) -> None:
    """The core, backward; frees all that forward has left, and ``dcontext``."""
    lse = log_sum_exp(ops)
    if ops.d.context == 1:
        frees = [*core.inputs, core.context, lse, dcontext]
        _product(ops, core, backward=True, creates=core.gradients, frees=frees)
    elif ops.d.context_parallel == "ring":
        _ring_backward(ops, core, [*core.inputs, core.context, lse, dcontext])
    else:
        _all_to_all_backward(ops, core, dcontext)


def log_sum_exp(ops: Operations) -> Tensor:
    """What flash attention keeps of each row of scores."""
    d = ops.d
    return ops.saved("log_sum_exp", d.tokens * d.heads, itemsize=d.statistics_itemsize)


def _product(
    ops: Operations,
    core: Core,
    *,
    rows: int = 0,
    keys: int = 0,
    heads: int = 0,
    backward: bool = False,
    creates: Iterable[Tensor] = (),
    frees: Iterable[Tensor] = (),
) -> None:
    """Flash attention of the rank's tokens, causal; or of ``rows`` by ``keys`` of them, all of which count."""
    d, width = ops.d, core.v_dim or ops.d.head_dim
    own = d.seq_len if not rows else rows
    pairs = own * (own + 1) if not keys else 2 * own * keys  # multiply-adds for a unit of head_dim, twice
    heads = heads or d.heads
    widths = (3 * d.head_dim + 2 * width) if backward else (d.head_dim + width)
    ops.operations.append(
        Operation(
            name="attention backward" if backward else "attention",
            kind="attention",
            flops=d.batch * heads * pairs * widths,
            moved_bytes=(8 if backward else 4) * d.batch * own * heads * d.head_dim * d.itemsize,
            creates=tuple(creates),
            frees=tuple(frees),
            shape=(own, keys or own, d.head_dim, d.batch * heads),
            core=True,
        )
    )


def _as_core(ops: Operations, first: int) -> None:
    """Mark what was collected from ``first`` on as part of the core."""
    ops.operations[first:] = [evolve(step, core=True) for step in ops.operations[first:]]


def _block_elements(ops: Operations, core: Core) -> tuple[int, int]:
    """Elements of a rank's keys, and of its values."""
    d = ops.d
    return d.tokens * d.kv_heads * d.head_dim, d.tokens * d.kv_heads * (core.v_dim or d.head_dim)


_EXCHANGE = "keys and values"


def _ring_forward(ops: Operations, core: Core) -> None:
    d, first = ops.d, len(ops.operations)
    size, rows = sum(_block_elements(ops, core)), d.tokens * d.heads
    block, incoming = ops.tensor("own keys and values", size), ops.tensor("block 1", size)
    ops.kernel("pack keys and values", size, kernels=2, creates=[block])
    ops.exchange(_EXCHANGE, block.bytes, creates=[incoming])
    wide = d.statistics_itemsize != d.itemsize
    merged = core.context
    if wide:
        narrow = ops.tensor("own context", rows * (core.v_dim or d.head_dim))
        merged = ops.tensor("wide context", rows * (core.v_dim or d.head_dim), itemsize=d.statistics_itemsize)
        _product(ops, core, creates=[narrow, log_sum_exp(ops)])
        ops.kernel("widen", rows * d.head_dim, passes=3, creates=[merged], frees=[narrow])
    else:
        _product(ops, core, creates=[merged, log_sum_exp(ops)])
    for step in range(1, d.context):
        if step == 1:
            ops.wait(_EXCHANGE, frees=[block])
        block = incoming
        if step < d.context - 1:
            incoming = ops.tensor(f"block {step + 1}", size)
            ops.exchange(_EXCHANGE, block.bytes, creates=[incoming])
        for _ in range(2):
            _merged_product(ops, core, wide=wide)
        if step < d.context - 1:
            ops.wait(_EXCHANGE, frees=[block])
    ops.kernel("free", 0, kernels=0, frees=[block])
    if wide:
        ops.kernel("narrow", rows * d.head_dim, passes=3, creates=[core.context], frees=[merged])
    _as_core(ops, first)


def _merged_product(ops: Operations, core: Core, *, wide: bool) -> None:
    """Half of the queries with half of a block, merged into what they have so far."""
    d = ops.d
    rows, width = d.tokens // 2 * d.heads, core.v_dim or d.head_dim
    part = ops.tensor("partial context", rows * width)
    statistics = [
        ops.tensor(name, rows, itemsize=d.statistics_itemsize) for name in ("partial log_sum_exp", "merged")
    ]
    _product(
        ops, core, rows=d.seq_len // 2, keys=d.seq_len // 2, creates=[part, statistics[0]]
    )
    if wide:
        narrow = part
        part = ops.tensor("wide partial context", rows * width, itemsize=d.statistics_itemsize)
        ops.kernel("widen", rows * width, passes=3, creates=[part], frees=[narrow])
    ops.kernel(
        "merge", rows * width, passes=3, kernels=5, creates=[statistics[1]], frees=[part, *statistics]
    )


def _ring_backward(ops: Operations, core: Core, frees: Iterable[Tensor]) -> None:
    """``held`` has keys and values and, from the second step on, gradients of those of the step before."""
    d = ops.d
    size = sum(_block_elements(ops, core))
    held, incoming = ops.tensor("own keys and values", size), ops.tensor("held 1", size)
    ops.kernel("pack keys and values", size, kernels=2, creates=[held])
    ops.exchange(_EXCHANGE, held.bytes, creates=[incoming])
    _product(ops, core, backward=True, creates=core.gradients)
    ops.wait(_EXCHANGE, frees=[held])
    last = d.context - 1
    for step in range(1, d.context):
        held = incoming
        incoming = ops.tensor(f"held {step + 1}", size if step == last else 2 * size)
        if step == last == 1:
            ops.kernel("no gradients yet", size, passes=1, creates=[incoming])
        else:
            whole = 1 < step < last
            sent = (2 if whole else 1) * size * d.itemsize
            ops.exchange(_EXCHANGE if step < last else "their gradients", sent, creates=[incoming])
        halves = _half_products_backward(ops, core)
        if not step == last == 1:
            ops.wait(_EXCHANGE if step < last else "their gradients", frees=[held])
            if step == 1:
                ops.kernel("no gradients yet", size, passes=1)
            held_on: list[Tensor] = []
        else:
            held_on = [held]
        ops.kernel("add block gradients", size, passes=3, kernels=4, frees=[*halves, *held_on])
    home = ops.tensor("own gradients", size)
    ops.exchange("gradients come home", home.bytes, creates=[home], frees=[incoming])
    ops.kernel("add own gradients", size, passes=3, kernels=2, frees=[home, *frees])


def _half_products_backward(ops: Operations, core: Core) -> list[Tensor]:
    """Both products of a step; the gradients of keys and values that they leave."""
    d = ops.d
    keys, values = (size // 2 for size in _block_elements(ops, core))
    rows, left = d.tokens // 2 * d.heads * d.head_dim, list[Tensor]()
    for half in range(2):
        query = ops.tensor("partial dq", rows)
        gradients = [ops.tensor(f"{half} partial dk", keys), ops.tensor(f"{half} partial dv", values)]
        side = d.seq_len // 2
        _product(ops, core, rows=side, keys=side, backward=True, creates=[query, *gradients])
        ops.kernel("add query gradient", rows, passes=3, frees=[query])
        left += gradients
    return left


def _exchanged_heads(ops: Operations, core: Core) -> tuple[int, int]:
    """Elements that a rank sends of queries, keys and values, shared heads as often as they are sent; and of
    its context."""
    d, width = ops.d, core.v_dim or ops.d.head_dim
    sent = d.kv_heads * head_copies(d.kv_heads, d.context) * (d.head_dim + width)
    return d.tokens * (d.heads * d.head_dim + sent), d.tokens * d.heads * width


def _by_head(ops: Operations, name: str, sent: Tensor, received: Tensor) -> None:
    """From tokens to heads; with several sequences the ranks' parts are put in order."""
    arrived = received if ops.d.batch == 1 else evolve(received, name=f"{received.name} in parts")
    ops.collective("all_to_all", name, sent.bytes, group="cp", creates=[arrived], frees=[sent])
    if arrived is not received:
        ops.kernel(
            "order tokens", received.bytes // ops.d.itemsize, creates=[received], frees=[arrived]
        )


def _all_to_all_forward(ops: Operations, core: Core) -> None:
    d = ops.d
    size, width = _exchanged_heads(ops, core)
    sent, heads = ops.tensor("heads sent", size), ops.saved("heads", size)
    ops.kernel("pack heads", size, kernels=3 * d.context, creates=[sent], frees=core.inputs)
    _by_head(ops, "tokens to heads", sent, heads)
    first = len(ops.operations)
    whole = ops.saved("context by head", width)
    keys = d.seq_len * d.context
    _product(ops, core, rows=keys, heads=d.heads // d.context, creates=[whole, log_sum_exp(ops)])
    ordered: list[Tensor] = []
    if d.batch > 1:
        ordered = [ops.tensor("context sent", width)]
        ops.kernel("order ranks", width, creates=ordered)
    returned = ops.tensor("context in parts", width)
    ops.collective("all_to_all", "heads to tokens", returned.bytes, group="cp", creates=[returned], frees=ordered)
    ops.kernel("join heads", width, creates=[core.context], frees=[returned])
    _as_core(ops, first)


def _all_to_all_backward(ops: Operations, core: Core, dcontext: Tensor) -> None:
    d = ops.d
    size, width = _exchanged_heads(ops, core)
    value = core.v_dim or d.head_dim
    sent, gradient = ops.tensor("gradient sent", width), ops.tensor("gradient by head", width)
    ops.kernel("part heads", width, creates=[sent])
    _by_head(ops, "gradient to heads", sent, gradient)
    shared = d.tokens * d.kv_heads * head_copies(d.kv_heads, d.context)
    parts = [
        ops.tensor(f"{name} by head", elements)
        for name, elements in (
            ("dq", d.tokens * d.heads * d.head_dim),
            ("dk", shared * d.head_dim),
            ("dv", shared * value),
        )
    ]
    _product(
        ops,
        core,
        rows=d.seq_len * d.context,
        heads=d.heads // d.context,
        backward=True,
        creates=parts,
        frees=[ops.saved("heads", size), ops.saved("context by head", width), log_sum_exp(ops), gradient],
    )
    packed, received = ops.tensor("gradients sent", size), ops.tensor("gradients in parts", size)
    ops.kernel("pack gradients", size, kernels=3, creates=[packed], frees=parts)
    ops.collective(
        "all_to_all", "gradients to tokens", packed.bytes, group="cp", creates=[received], frees=[packed]
    )
    ops.kernel(
        "join gradients",
        size,
        kernels=3,
        creates=core.gradients,
        frees=[received, core.context, dcontext],
    )
