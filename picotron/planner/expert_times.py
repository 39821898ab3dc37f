"""Seconds of a layer's experts: routing, dispatch, grouped products, combine and shared experts; even loads.

Sources: Lepikhin et al. 2020, GShard, arXiv:2006.16668 (dispatch and combine); Gale et al. 2022, MegaBlocks,
arXiv:2211.15841 (grouped products without padding).
"""

from __future__ import annotations

import numpy as np
from attrs import frozen

from picotron.planner.block_times import (
    Block,
    Here,
    Product,
    casts_seconds,
    dense_mlp,
    layer_kernels,
    products_seconds,
    weighted,
)
from picotron.planner.cases import EXPERT_KERNELS, Cases, Column
from picotron.planner.kernels import matmul_seconds
from picotron.planner.network import Group, all_to_all_seconds, expert_group, ring_seconds

_LOOPED, _FUSED = EXPERT_KERNELS.index("looped"), EXPERT_KERNELS.index("fused")


@frozen(kw_only=True, eq=False)
class _Share:
    """One rank's part of a layer's experts and of a microbatch, under even loads."""

    tokens: Column  # that the rank dispatches
    chosen: Column  # experts of a token
    experts: Column  # of the layer
    local: Column  # of them, the rank's own
    rows: Column  # of all its experts together
    width: Column  # of a row
    inner: Column  # of an expert, as tensor parallelism cuts it

    @classmethod
    def of(cls, cases: Cases) -> _Share:
        """The part of every case; of experts narrower than the model there are, and are chosen, more."""
        model, layout = cases.model, cases.layout
        latent = np.maximum(model.expert_latent, 1.0)
        tokens = layout.micro_batch * cases.work.seq_len / layout.cp / layout.tp
        chosen, experts = model.top_k * latent, model.experts * latent
        return cls(
            tokens=tokens,
            chosen=chosen,
            experts=experts,
            local=np.maximum(experts / layout.ep, 1.0),
            rows=tokens * chosen * layout.etp,
            width=model.hidden / latent,
            inner=model.expert_intermediate / layout.etp,
        )


def expert_block(here: Here) -> Block:
    """Norm, router, dispatch, grouped experts, combine, shared experts and residual sum; balanced loads."""
    cases, model, layout = here.cases, here.cases.model, here.cases.layout
    if not np.any(model.moe_layers):
        return Block()
    own = _Share.of(cases)
    wide = np.where(model.gated > 0, 2.0, 1.0)
    each = own.rows / own.local
    products: list[Product] = [
        (each, wide * own.inner, own.width, True),
        (each, own.width, own.inner, True),
    ]
    slower = 1.0 / here.constants["grouped_share"]
    loops = cases.software.expert_kernels == _LOOPED
    launches = np.where(loops, own.local, 1.0)
    forward, backward = (slower * s for s in products_seconds(here, products, own.local, launches))
    router, router_backward = products_seconds(here, [(own.tokens, own.experts, model.hidden, False)])
    apart = np.where(cases.software.expert_kernels == _FUSED, 0.0, 1.0)  # activation and its casts
    casts: list[Product] = [
        (each, apart * wide * own.inner, own.width, True),
        (each, own.width, apart * own.inner, True),
    ]
    cast, cast_backward = casts_seconds(here, casts, own.local)
    kept = own.tokens * model.hidden
    moved = here.passes("norm", kept) + here.passes("residual", kept)
    moved = moved + apart * here.passes("activation", own.rows * own.inner * (1.0 + wide) / 3.0)
    sorts = np.where(cases.software.expert_dedup > 0, 1.0, 2.0)  # arrivals are sorted by expert, and back
    moved = moved + here.passes("permute", sorts * own.rows * own.width)
    moved = moved + here.rates.is_narrow * here.passes("expert_pad", own.rows * own.width)
    moved = moved + model.biases * here.passes("expert_bias", own.rows * own.width)
    shared = dense_mlp(here, model.shared_intermediate / layout.tp)
    exchange = _exchange(here, own)
    around = 0.5 * layer_kernels(here)
    kernels = here.constants["kernels_each_expert"] * (1.0 + 1.5 * here.rates.is_narrow)
    kernels = here.constants["expert_kernels"] + own.local * kernels * loops
    alone = np.where(cases.software.expert_graphs > 0, 0.0, 1.0)
    here_only = Block(
        forward={"matmul": forward + router, "elementwise": 0.4 * moved + cast, "expert": exchange},
        backward={
            "matmul": backward + router_backward,
            "elementwise": 0.6 * moved + cast_backward,
            "expert": exchange,
        },
        forward_kernels=around + kernels,
        launches=around * here.ungraphed + kernels * alone,
        waits=here.constants["expert_waits"] * here.constants["wait_seconds"] * alone,
    )
    return weighted([(here_only, 1.0), (shared, np.where(model.shared_intermediate > 0, 1.0, 0.0))])


def down_seconds(here: Here) -> Column:
    """The experts' down projections alone, forward."""
    if not np.any(here.cases.model.moe_layers):
        return np.zeros(())
    own = _Share.of(here.cases)
    each = own.rows / own.local
    whole = matmul_seconds(here.rates, each, own.width, own.inner, narrow=True, groups=own.local)
    seconds: Column = whole / here.constants["grouped_share"]
    return seconds


def _exchange(here: Here, own: _Share) -> Column:
    """Dispatch and combine of one pass."""
    cases, layout = here.cases, here.cases.layout
    where = expert_group(cases, layout.ep, layout.etp)
    payload = own.rows * own.width * cases.work.compute_bytes
    seconds = 2.0 * all_to_all_seconds(here.link, payload / layout.etp, where, *_copies(cases, own, where))
    slices = expert_group(cases, layout.etp, np.ones(()))
    seconds = seconds + 2.0 * ring_seconds(here.link, payload, slices)
    return seconds * (1.0 - cases.software.expert_overlap)


def _copies(cases: Cases, own: _Share, where: Group) -> tuple[Column, Column]:
    """Shares of a token's copies that cross the network, and the node's own links.

    All that are not at home, unless a token is sent once to each node and from its adapter there once to each
    rank. Of N nodes or ranks, N (1 - (1 - 1/N)^k) are expected to hold some of k experts chosen evenly;
    neighbours are on as few as hold so many.
    """
    nodes, software = where.size / where.inside, cases.software
    leaving, staying = 1.0 - 1.0 / nodes, (where.inside - 1.0) / where.size
    if not np.any(software.expert_dedup):
        return leaving, staying
    chosen, close = np.maximum(own.chosen, 1.0), software.expert_neighbours > 0
    near = np.clip(chosen / own.local, 1.0, where.size)
    ranks = np.where(close, near, _occupied(where.size, chosen))
    held = np.where(close, np.maximum(near / where.inside, 1.0), _occupied(nodes, chosen))
    once = software.expert_dedup > 0
    sent = np.where(once, held / chosen, 1.0) * leaving
    return sent, np.where(once, ranks / chosen * (1.0 - 1.0 / where.inside), staying)


def _occupied(places: Column, chosen: Column) -> Column:
    """How many of the places are expected to hold some of so many even choices."""
    expected: Column = places * (1.0 - (1.0 - 1.0 / places) ** chosen)
    return expected
