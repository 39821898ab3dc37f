"""Products of a gathered input, of which never more than two chunks of tokens stand.

A chunk is the same share of every rank's tokens. While its products are multiplied the next chunk is
gathered; they are written to the rows of each rank's tokens, so that outputs have the order of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from picotron.planner.body import Dims
from picotron.runtime.communicator import Communicator


def products(
    communicator: Communicator,
    d: Dims,
    local: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
) -> list[torch.Tensor]:
    """Of all tokens of ``local`` [T / tp, in], [T, out] with each of ``weights`` [out, in]."""
    parts = local.chunk(d.gather_chunks)
    chunk = local.new_empty(d.tp * len(parts[0]), d.hidden)
    communicator.all_gather(chunk, parts[0], "tp")
    outputs = list[torch.Tensor]()
    for index, following in enumerate((*parts[1:], None)):
        coming = None if following is None else torch.empty_like(chunk)
        handle = None
        if coming is not None and following is not None:
            handle = communicator.post_all_gather(coming, following, "tp")
        outputs = outputs or [local.new_empty(d.tokens, len(weight)) for weight in weights]
        for output, weight, bias in zip(outputs, weights, biases, strict=True):
            rows = output.view(d.tp, len(parts), -1, len(weight))[:, index]
            write_product(rows, chunk.view(d.tp, -1, d.hidden), weight, bias)
        if handle is not None and coming is not None:
            communicator.wait(handle, "tp")
            chunk = coming
    return outputs


def write_product(
    rows: torch.Tensor, source: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """Fill ``rows`` [ranks, n, out], which need not lie side by side, from ``source`` [ranks, n, in]."""
    spread = weight.t().expand(len(source), -1, -1)
    if bias is None:
        torch.bmm(source, spread, out=rows)
    else:
        torch.baddbmm(bias, source, spread, out=rows)
