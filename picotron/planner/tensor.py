"""How tensor parallelism cuts each kind of parameter, and whose gradient is only a part of the whole.

Column-parallel matrices are cut along their output, row-parallel ones along their input, so that a block
needs one reduction in forward and one in backward (Shoeybi et al. 2019, arXiv:1909.08053, section 3).
Under sequence parallelism the tensors between blocks are cut along the tokens, so whatever is applied to
them there (norms, biases after the reduction) sees a part of the tokens on every rank and its gradient is
a part of the sum (Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2).
"""

from __future__ import annotations

from typing import Literal

from attrs import frozen

from picotron.errors import PlanError
from picotron.planner.model import ModelSpec

Partial = Literal["never", "sequence", "always"]


@frozen
class CutRule:
    """``dim`` that tp cuts (None: replicated), in ``blocks`` fused parts; what its gradient lacks.

    ``partial`` says when the gradient on one tensor-parallel rank is only a part of the sum over the
    group: never, only under sequence parallelism, or always.
    """

    dim: int | None = None
    blocks: int = 1
    partial: Partial = "never"
    heads: bool = False  # cut by key/value heads: copied where tp exceeds them


CUT_RULES: dict[str, CutRule] = {
    "embedding": CutRule(dim=0),
    "head": CutRule(dim=0),
    "position": CutRule(partial="sequence"),
    "norm": CutRule(partial="sequence"),
    "head_norm": CutRule(partial="always"),
    "column": CutRule(dim=0),
    "column_bias": CutRule(dim=0),
    "kv_column": CutRule(dim=0, heads=True),
    "kv_column_bias": CutRule(dim=0, heads=True),
    "row": CutRule(dim=1),
    "row_bias": CutRule(partial="sequence"),
    "fused_qkv": CutRule(dim=1, blocks=3),
    "fused_qkv_bias": CutRule(dim=0, blocks=3),
    "conv_column": CutRule(dim=1),
    "conv_row": CutRule(dim=0),
    "router": CutRule(partial="sequence"),
    "latent": CutRule(partial="always"),
    "latent_norm": CutRule(partial="always"),
    "expert_column": CutRule(dim=0),
    "expert_row": CutRule(dim=1),
}


def kv_copies(model: ModelSpec, tp: int) -> int:
    """Tensor-parallel ranks that hold the same key/value head (1: each has its own)."""
    return max(1, tp // model.num_kv_heads)


def check_tensor_parallel(model: ModelSpec, *, tp: int, etp: int = 1) -> None:
    """Raise PlanError unless every matrix of ``model`` can be cut ``tp`` ways (experts ``etp`` ways)."""
    heads, kv_heads = model.num_heads, model.num_kv_heads
    if heads % tp:
        raise PlanError(f"tp must divide the {heads} query heads, got tp={tp}; try {_divisors(heads)}")
    if model.latent_attention is None and kv_heads % tp and tp % kv_heads:
        raise PlanError(
            f"tp must divide the {kv_heads} key/value heads or be a multiple of them, got tp={tp}; "
            f"try {_divisors(heads, kv_heads)}"
        )
    if model.intermediate_size % tp:
        raise PlanError(f"tp must divide intermediate_size {model.intermediate_size}, got tp={tp}")
    if model.vocab_size < tp:
        raise PlanError(f"tp must be at most the vocabulary of {model.vocab_size}, got tp={tp}")
    if model.experts is not None and model.experts.intermediate_size % etp:
        raise PlanError(f"etp must divide the experts' size {model.experts.intermediate_size}, got etp={etp}")
    if model.experts is not None and model.experts.shared_intermediate_size % tp:
        raise PlanError(
            f"tp must divide the shared experts' size {model.experts.shared_intermediate_size}, got tp={tp}"
        )


def _divisors(heads: int, kv_heads: int | None = None) -> str:
    fits = [
        degree
        for degree in range(1, heads + 1)
        if heads % degree == 0 and (kv_heads is None or kv_heads % degree == 0 or degree % kv_heads == 0)
    ]
    return ", ".join(map(str, fits))
