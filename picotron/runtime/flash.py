"""Flash attention of one block, whose softmax statistics are seen, forward and backward.

What lies in memory as [batch, s, heads, d] is given and returned as [batch, heads, s, d]; keys and values may
have fewer heads. ``backward`` takes the context and log-sum-exp of *all* keys that a query sees, of which
the block may have only some: the gradients of the block's part are then exact (Liu et al. 2023,
arXiv:2310.01889, appendix). The kernels are torch's own, on CPU and on CUDA.
"""

from __future__ import annotations

import torch

_aten = torch.ops.aten


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Context [batch, heads, s, d], and the log-sum-exp of scores [batch, heads, s] (fp32 at the least)."""
    if query.is_cuda:
        found = _aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, False)
    else:
        found = _aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal)
    return found[0], found[1]


def backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    log_sum_exp: torch.Tensor,
    *,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value, as they are shaped; each in memory of its own."""
    if not query.is_cuda:
        of_cpu = _aten._scaled_dot_product_flash_attention_for_cpu_backward
        dq, dk, dv = of_cpu(gradient, query, key, value, out, log_sum_exp, 0.0, causal)
        return dq, dk, dv
    no_dropout = query.new_zeros(2, dtype=torch.uint64), query.new_zeros((), dtype=torch.uint64)
    dq, dk, dv = _aten._scaled_dot_product_flash_attention_backward(
        gradient,
        query,
        key,
        value,
        out,
        log_sum_exp.contiguous(),
        None,
        None,
        query.shape[2],
        key.shape[2],
        0.0,
        causal,
        *no_dropout,
    )
    return dq, dk, dv


def merge(
    out: torch.Tensor, log_sum_exp: torch.Tensor, part: torch.Tensor, part_log_sum_exp: torch.Tensor
) -> None:
    """Add to a context and its log-sum-exp, in place, those of further keys, whose tensors are consumed.

    Each context weighs as much as its keys have of all exponentials (Dao et al. 2022, arXiv:2205.14135).
    """
    merged = torch.logaddexp(log_sum_exp, part_log_sum_exp)
    out.lerp_(part, part_log_sum_exp.sub_(merged).exp_().unsqueeze(-1))
    log_sum_exp.copy_(merged)
