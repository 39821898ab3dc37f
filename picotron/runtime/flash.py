"""Flash attention of one block, whose softmax statistics are seen, forward and backward.

What lies in memory as [batch, s, heads, d] is given and returned as [batch, heads, s, d]; keys and values may
have fewer heads. ``backward`` takes the context and log-sum-exp of *all* keys that a query sees, of which
the block may have only some: the gradients of the block's part are then exact (Liu et al. 2023,
arXiv:2310.01889, appendix). The kernels are torch's own, on CPU and on CUDA, and read shared keys and values
where they lie. What CUDA's do not take, wider numbers above all, has its scores in memory.
"""

from __future__ import annotations

import torch

_aten = torch.ops.aten


def takes(query: torch.Tensor) -> bool:
    """Whether torch has a flash kernel for heads like those of ``query``."""
    if not query.is_cuda:
        return True
    return query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] in range(8, 257, 8)


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Context [batch, heads, s, d], and the log-sum-exp of scores [batch, heads, s] (fp32 at the least)."""
    if not takes(query):
        return plain_forward(query, key, value, causal=causal)
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
    if not takes(query):
        return plain_backward(gradient, query, key, value, out, log_sum_exp, causal=causal)
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


def plain_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """``forward`` with the scores in memory."""
    scores = _scores(query, key, causal)
    log_sum_exp = torch.logsumexp(scores, -1)
    out = torch.matmul(scores.sub_(log_sum_exp.unsqueeze(-1)).exp_(), _shared(value, query))
    return _by_token(out), log_sum_exp


def plain_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    log_sum_exp: torch.Tensor,
    *,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``backward`` with the scores in memory."""
    share = _scores(query, key, causal).sub_(log_sum_exp.unsqueeze(-1)).exp_()
    dvalue = _summed(torch.matmul(share.transpose(2, 3), gradient), value)
    dscores = torch.matmul(gradient, _shared(value, query).transpose(2, 3))
    dscores.sub_((gradient * out).sum(-1, keepdim=True)).mul_(share).mul_(query.shape[-1] ** -0.5)
    dkey = _summed(torch.matmul(dscores.transpose(2, 3), query), key)
    return _by_token(torch.matmul(dscores, _shared(key, query))), dkey, dvalue


def _scores(query: torch.Tensor, key: torch.Tensor, causal: bool) -> torch.Tensor:
    """[batch, heads, s, keys], minus infinity where the mask hides."""
    scores = torch.matmul(query, _shared(key, query).transpose(2, 3)).mul_(query.shape[-1] ** -0.5)
    if causal:
        seen = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril_()
        scores.masked_fill_(seen.logical_not_(), -torch.inf)
    return scores


def _shared(part: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Keys or values with a head for each of the query's."""
    return part.repeat_interleave(query.shape[1] // part.shape[1], dim=1)


def _summed(gradient: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """The gradient of ``part`` from that of ``_shared(part)``."""
    batch, heads, s, d = part.shape
    return _by_token(gradient.reshape(batch, heads, -1, s, d).sum(2))


def _by_token(x: torch.Tensor) -> torch.Tensor:
    """The same values, in memory as [batch, s, heads, d]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def merge(
    out: torch.Tensor, log_sum_exp: torch.Tensor, part: torch.Tensor, part_log_sum_exp: torch.Tensor
) -> None:
    """Add to a context and its log-sum-exp, in place, those of further keys, whose tensors are consumed.

    Each context weighs as much as its keys have of all exponentials (Dao et al. 2022, arXiv:2205.14135).
    """
    merged = torch.logaddexp(log_sum_exp, part_log_sum_exp)
    out.lerp_(part, part_log_sum_exp.sub_(merged).exp_().unsqueeze(-1))
    log_sum_exp.copy_(merged)
