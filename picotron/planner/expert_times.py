"""Seconds of a layer's experts: routing, dispatch, grouped products, combine and shared experts; even loads.

Sources: Lepikhin et al. 2020, GShard, arXiv:2006.16668 (dispatch and combine); Gale et al. 2022, MegaBlocks,
arXiv:2211.15841 (grouped products without padding).
"""

from __future__ import annotations

import numpy as np

from picotron.planner.block_times import (
    Block,
    Here,
    casts_seconds,
    dense_mlp,
    layer_kernels,
    products_seconds,
    weighted,
)
from picotron.planner.cases import Cases, Column
from picotron.planner.network import Group, all_to_all_seconds, group, ring_seconds


def expert_block(here: Here) -> Block:
    """Norm, router, dispatch, grouped experts, combine, shared experts and residual sum; balanced loads."""
    cases, model, layout = here.cases, here.cases.model, here.cases.layout
    if not np.any(model.moe_layers):
        return Block()
    tokens = layout.micro_batch * cases.work.seq_len / layout.cp / layout.tp
    rows = tokens * model.top_k * layout.etp
    local = np.maximum(model.experts / layout.ep, 1.0)
    inner = model.expert_intermediate / layout.etp
    each = rows / local
    products = [(each, 2.0 * inner, model.hidden, True), (each, model.hidden, inner, True)]
    slower = 1.0 / here.constants["grouped_share"]
    forward, backward = (slower * seconds for seconds in products_seconds(here, products, local))
    router, router_backward = products_seconds(here, [(tokens, model.experts, model.hidden, False)])
    cast, cast_backward = casts_seconds(here, products, local)
    kept = tokens * model.hidden
    moved = (
        here.passes("norm", kept) + here.passes("residual", kept) + here.passes("activation", rows * inner)
    )
    moved = moved + here.passes("permute", rows * model.hidden)
    shared = dense_mlp(here, model.shared_intermediate / layout.tp)
    exchange = _exchange(here, rows)
    each_expert = here.constants["kernels_each_expert"] * (1.0 + 1.5 * here.rates.is_narrow)
    kernels = 0.5 * layer_kernels(here) + here.constants["expert_kernels"] + local * each_expert
    here_only = Block(
        forward={"matmul": forward + router, "elementwise": 0.4 * moved + cast, "expert": exchange},
        backward={
            "matmul": backward + router_backward,
            "elementwise": 0.6 * moved + cast_backward,
            "expert": exchange,
        },
        forward_kernels=kernels,
        waits=here.constants["expert_waits"],
    )
    return weighted([(here_only, 1.0), (shared, np.where(model.shared_intermediate > 0, 1.0, 0.0))])


def _exchange(here: Here, rows: Column) -> Column:
    """Dispatch and combine of one pass."""
    cases, layout = here.cases, here.cases.layout
    where = group(cases, layout.ep, layout.etp)
    payload = rows * cases.model.hidden * cases.work.compute_bytes
    copies = _copies_leaving(cases, where)
    seconds = 2.0 * all_to_all_seconds(here.link, payload / layout.etp, where, copies)
    slices = group(cases, layout.etp, np.ones(()))
    seconds = seconds + 2.0 * ring_seconds(here.link, payload, slices)
    return seconds * (1.0 - cases.software.expert_overlap)


def _copies_leaving(cases: Cases, where: Group) -> Column:
    """Share of a token's copies that cross the network: fewer where each node gets a token once.

    Of ``top_k`` experts chosen evenly over N nodes, N (1 - (1 - 1/N)^top_k) nodes are expected.
    """
    nodes = where.size / where.inside
    chosen = nodes * (1.0 - (1.0 - 1.0 / nodes) ** np.maximum(cases.model.top_k, 1.0))
    return np.where(cases.software.expert_dedup > 0, chosen / np.maximum(cases.model.top_k, 1.0), 1.0)
