"""What saved activations on their way to the host and back take beyond the computing beside them.

A forward's are copied out beside it and copied in beside its backward (or I), the two directions at once,
stage by stage: each takes the longer of the copy and the computing (``passes.with_streams``). Ren et al.,
2021, arXiv:2101.06840; Rajbhandari et al. 2021, arXiv:2104.07857.
"""

from __future__ import annotations

import numpy as np

from picotron.planner.cases import Cases, Column
from picotron.planner.in_flight import splits_backward


def offload_waits(
    cases: Cases, layers: Column, forward: Column, backward: Column, weight: Column
) -> tuple[Column, Column]:
    """Seconds that one microbatch waits on a rank forward and backward, which has so many ``layers``.

    ``weight`` of the backward's seconds come later where schedules split it. A stage of few layers has one
    that is offloaded or none, so that more cannot hide under its neighbours. Where a copy outlasts both
    passes a program takes less than this: one direction's end runs beside the other's beginning.
    """
    layout = cases.layout
    if not np.any(layout.offload > 0):
        return np.zeros(()), np.zeros(())
    stages = layout.virtual_stages
    of_stage = layers / stages
    mean = layout.offload * of_stage
    chosen = np.maximum(mean, np.minimum(1.0, of_stage))  # layers, in a stage that has any to offload
    copy = chosen * layer_bytes(cases) / cases.machine.host_bytes_per_second
    copied = stages * (mean / chosen)  # stages that have
    after = np.where(splits_backward(layout), backward - weight, backward)
    out = copied * np.maximum(copy - forward / stages, 0.0)
    back: Column = copied * np.maximum(copy - after / stages, 0.0)
    return out, back


def layer_bytes(cases: Cases) -> Column:
    """What a layer saves of a microbatch: inputs of norms and products, queries, keys, values, the core's.

    Of every expert's row also what was dispatched and what came back.
    """
    model, layout = cases.model, cases.layout
    whole = layout.micro_batch * cases.work.seq_len / layout.cp
    residual = np.where(layout.sequence_parallel > 0, whole / layout.tp, whole) * 2.0 * model.hidden
    heads = model.heads * (model.head_dim + model.value_dim) + model.kv_heads * (
        model.head_dim + model.value_dim
    )
    both = 1.0 + model.gated
    row = both * model.expert_intermediate + 2.0 * model.hidden
    sparse = model.top_k * row + both * model.shared_intermediate
    part = model.moe_layers / model.layers
    inner = heads + (1.0 - part) * both * model.intermediate + part * sparse
    found: Column = (residual + whole / layout.tp * inner) * cases.work.compute_bytes
    return found
