"""Bytes that stand all the time: parameters, gradients and optimizer state, under any sharding.

ZeRO keeps of these, from its stage 1, 2 and 3 on, only a rank's share of the optimizer state, of the
gradients and of the parameters (Rajbhandari et al. 2020, arXiv:1910.02054). ``shard`` ranks share one copy:
all of dp * cp, or fewer (HSDP: Zhao et al. 2023, arXiv:2304.11277). An expert has dp * cp * tp / (ep * etp)
copies, and is shared by the same part of these.
"""

from __future__ import annotations

import numpy as np
from attrs import frozen

from picotron.planner.cases import Cases, Column
from picotron.planner.held_weights import HeldWeights
from picotron.planner.saved_tensors import COMPILED


@frozen(kw_only=True, eq=False)
class StandingBytes:
    """By class, and what follows from the shares."""

    parameters: Column
    gradients: Column
    main: Column
    moments: Column
    gathered: Column  # bytes of parameters that are on other ranks
    whole: Column  # bytes of the tensors that are gathered
    experts_shared: Column  # whether experts are among them
    reduced: Column  # bytes of whole gradients where a rank keeps a share, as they travel
    update: Column  # what the optimizer's step makes for a moment


def standing_bytes(cases: Cases, held: HeldWeights) -> StandingBytes:
    """Of a rank with the weights ``held``.

    An update wants gradients at the width of the main weights, and copies them where they are narrower. An
    optimizer on the host keeps its state there, and under ZeRO-2 and 3 a rank's gradients too. *compiled*
    under ZeRO-3 is PyTorch's fully_shard: what it keeps of parameters are the main weights, which it narrows
    as it gathers them.
    """
    layout, work = cases.layout, cases.work
    peers = layout.dp * layout.cp
    ranks = np.clip(layout.shard, 1, peers)
    expert_ranks = np.maximum(1.0, layout.tp * ranks / (layout.ep * layout.etp))
    every = held.common + held.experts
    share = held.common / ranks + held.experts / expert_ranks
    on_device = 1 - cases.software.optimizer_on_host
    own = np.where(layout.zero_stage >= 1, share, every) * on_device
    gradients = np.where(layout.zero_stage >= 2, share * on_device, every)
    parameters = np.where(layout.zero_stage >= 3, share, every)
    sharded = (layout.zero_stage >= 3) & (ranks > 1)
    shared_main = (cases.software.kernels == COMPILED) & (layout.zero_stage >= 3) & (work.main_bytes > 0)
    return StandingBytes(
        parameters=work.compute_bytes * parameters * ~(shared_main & (on_device > 0)),
        gradients=work.gradient_bytes * gradients,
        main=work.main_bytes * own,
        moments=work.moment_bytes * own,
        gathered=work.compute_bytes * (every - parameters),
        whole=sharded * work.compute_bytes * (held.common + (expert_ranks > 1) * held.experts),
        experts_shared=expert_ranks > 1,
        reduced=(layout.zero_stage >= 2) * (ranks > 1) * work.wire_bytes * every,
        update=(work.gradient_bytes < work.main_bytes) * work.main_bytes * own,
    )
