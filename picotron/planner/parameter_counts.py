"""How many parameters a device holds, for whole columns: a layer, its experts, and both ends.

The counts are those of ``model.ModelSpec`` for even cuts by tensor and expert parallelism; norms and
biases, a thousandth of the whole, are left out.
"""

from __future__ import annotations

import numpy as np
from attrs import frozen

from picotron.planner.cases import Cases, Column


@frozen(kw_only=True, eq=False)
class ParameterCounts:
    """Parameters of one device: of a mean layer, without and with its experts apart, and of both ends."""

    layer: Column
    layer_experts: Column
    embedding: Column
    head: Column  # what the last stage holds: the head, or its copy of a tied table


def parameter_counts(cases: Cases) -> ParameterCounts:
    """Counts of every case."""
    model, layout = cases.model, cases.layout
    share = model.moe_layers / model.layers
    wide = 2.0 + model.gated
    dense = wide * model.hidden * (model.intermediate * (1.0 - share) + model.shared_intermediate * share)
    experts = 3.0 * model.hidden * model.expert_intermediate * model.experts * share
    cut = np.maximum(layout.ep * layout.etp, 1.0)
    table = model.vocab * model.hidden / layout.tp
    positions = model.learned_positions * model.hidden
    return ParameterCounts(
        layer=(_attention_parameters(cases) + dense) / layout.tp + share * model.experts * model.hidden,
        layer_experts=experts / cut,
        embedding=table + positions,
        head=np.where((model.tied > 0) & (layout.pp == 1), 0.0, table),
    )


def _attention_parameters(cases: Cases) -> Column:
    model = cases.model
    query, value = model.heads * model.head_dim, model.heads * model.value_dim
    plain = model.hidden * (query + 2.0 * model.kv_heads * model.head_dim + value)
    down = np.where(model.query_rank > 0, model.query_rank * (model.hidden + query), model.hidden * query)
    nope = model.heads * (model.head_dim - model.rope_dim + model.value_dim)
    latent = (
        down + model.hidden * (model.kv_rank + model.rope_dim) + model.kv_rank * nope + model.hidden * value
    )
    count: Column = np.where(model.kv_rank > 0, latent, plain)
    return count
