"""Bodies of attention by heads between all-to-alls, step by step as the runtime's ``heads`` runs it.

Queries, keys and values go to the rank that has their heads, in one message to each, and the context comes
back; in backward the context's gradient goes and those of the three come back (Jacobs et al. 2023,
arXiv:2309.14509). A key/value head that several ranks need is sent to each, and its gradients are summed.
"""

from __future__ import annotations

from attrs import evolve

from picotron.planner.attention_core import Core, log_sum_exp, mark_core, product
from picotron.planner.body import Tensor
from picotron.planner.context import head_copies
from picotron.planner.operations import Operations


def _elements(ops: Operations, core: Core) -> tuple[int, int, int]:
    """Of a rank's queries, keys and values as they are sent: shared heads count each time."""
    d = ops.d
    shared = d.tokens * d.kv_heads * head_copies(d.kv_heads, d.context)
    return d.tokens * d.heads * d.head_dim, shared * d.head_dim, shared * core.v_dim


def _all_to_all(ops: Operations, name: str, sent: Tensor, received: Tensor, *, frees: bool = True) -> None:
    died = [sent] if frees else []
    ops.collective("all_to_all", name, sent.bytes, group="cp", creates=[received], frees=died)


def _to_heads(ops: Operations, name: str, sent: Tensor, received: Tensor) -> None:
    """From tokens to heads; the ranks' parts of several sequences are put in order."""
    if ops.d.batch == 1:
        _all_to_all(ops, name, sent, received)
        return
    parts = evolve(received, name=f"{received.name} in parts")
    _all_to_all(ops, name, sent, parts)
    ops.kernel("order tokens", received.bytes // ops.d.itemsize, creates=[received], frees=[parts])


def heads_forward(ops: Operations, core: Core) -> None:
    """The core, forward; what it takes is let go of."""
    d, size = ops.d, sum(_elements(ops, core))
    sent, heads = ops.tensor("heads sent", size), ops.saved("heads", size)
    ops.kernel("pack heads", size, kernels=3 * d.context, creates=[sent], frees=core.inputs)
    _to_heads(ops, "tokens to heads", sent, heads)
    first, width = len(ops.operations), d.tokens * d.heads * core.v_dim
    whole = ops.saved("context by head", width)
    creates = [whole, log_sum_exp(ops)]
    product(ops, core, side=d.seq_len * d.context, heads=d.heads // d.context, creates=creates)
    returned = ops.tensor("context in parts", width)
    ordered = whole
    if d.batch > 1:
        ordered = ops.tensor("context sent", width)
        ops.kernel("order ranks", width, creates=[ordered])
    _all_to_all(ops, "heads to tokens", ordered, returned, frees=ordered is not whole)
    ops.kernel("join heads", width, creates=[core.context], frees=[returned])
    mark_core(ops, first)


def heads_backward(ops: Operations, core: Core, dcontext: Tensor) -> None:
    """The core, backward."""
    d, sizes = ops.d, _elements(ops, core)
    width, size = d.tokens * d.heads * core.v_dim, sum(sizes)
    sent, gradient = ops.tensor("gradient sent", width), ops.tensor("gradient by head", width)
    ops.kernel("part heads", width, creates=[sent])
    _to_heads(ops, "gradient to heads", sent, gradient)
    parts = [ops.tensor(f"d{name} by head", part) for name, part in zip("qkv", sizes, strict=True)]
    product(
        ops,
        core,
        side=d.seq_len * d.context,
        heads=d.heads // d.context,
        backward=True,
        creates=parts,
        frees=[ops.saved("heads", size), ops.saved("context by head", width), log_sum_exp(ops), gradient],
    )
    packed, received = ops.tensor("gradients sent", size), ops.tensor("gradients in parts", size)
    ops.kernel("pack gradients", size, kernels=3, creates=[packed], frees=parts)
    _all_to_all(ops, "gradients to tokens", packed, received)
    frees = [received, core.context, dcontext]
    ops.kernel("join gradients", size, kernels=3, creates=core.gradients, frees=frees)
