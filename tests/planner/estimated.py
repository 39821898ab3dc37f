"""Cases for tests of the estimates: one model on H100s, with what a test changes."""

from __future__ import annotations

from typing import Any

import numpy as np
from attrs import evolve

from picotron.planner.cases import (
    ATTENTIONS,
    PRODUCT_FORMATS,
    RECOMPUTES,
    SCHEDULE_NAMES,
    Cases,
    LayoutColumns,
    columns,
    model_columns,
)
from picotron.planner.cluster import ClusterSpec
from picotron.planner.columns_of import machine_columns, work_columns
from picotron.planner.constants import constant_table, default_constants, keys_of, replaced
from picotron.planner.families import read
from picotron.planner.software import software_columns, software_profile
from picotron.planner.workload import Workload

_PERFECT = {
    **dict.fromkeys(("matmul_share", "narrow_share", "memory_share", "attention_share", "inter_share"), 1.0),
    **dict.fromkeys(("intra_share", "attention_backward_rate", "elementwise_factor", "grouped_share"), 1.0),
    "switch_share": 1.0,
    **dict.fromkeys(("tile_ramp", "attention_ramp", "head_dim_exponent", "wave_weight", "spill_share"), 0.0),
    **dict.fromkeys(("launch_seconds", "gap_seconds", "step_seconds", "collective_seconds"), 0.0),
    **dict.fromkeys(("interference", "straggler_share", "wait_seconds"), 0.0),
    "hidden_share": 1.0,
}
_TABLE = constant_table()
IDEAL = replaced(
    default_constants(), {key: value for name, value in _PERFECT.items() for key in keys_of(_TABLE[name])}
)
LAYOUT = {
    **dict.fromkeys(("dp", "pp", "cp", "tp", "ep", "etp", "virtual_stages", "micro_batch", "shard"), 1),
    **dict.fromkeys(("zero_stage", "sequence_parallel", "recompute_layers", "offload", "ends", "order"), 0),
    "schedule": "1f1b",
    "recompute": "none",
}
_NAMES = {"schedule": SCHEDULE_NAMES, "recompute": RECOMPUTES}


def layout(**changes: Any) -> LayoutColumns:
    """One layout (a number or a list for each column), on one device where nothing is said."""
    values = LAYOUT | changes
    for name, names in _NAMES.items():
        if isinstance(values[name], str):
            values[name] = names.index(values[name])
    return columns(LayoutColumns, values)


def case(
    *,
    model: str = "llama-3.2-1b",
    cluster: str = "h100:64x8",
    profile: str = "plain",
    attention: str = "flash-2",
    product: str = "bf16",
    seq_len: int = 4096,
    global_batch: int = 64,
    **changes: Any,
) -> Cases:
    """A case whose layout has ``changes``."""
    machine = ClusterSpec.parse(cluster)
    wide = "fp16" if machine.device.architecture == "volta" else "bf16"
    work = work_columns(Workload(global_batch=global_batch, seq_len=seq_len, precision=wide))
    found = machine_columns(machine, wide if product == "bf16" else "fp8")
    software = software_columns(software_profile(profile), machine.device.architecture)
    return Cases(
        model=model_columns(read(model)),
        work=evolve(work, product_format=np.asarray(float(PRODUCT_FORMATS.index(product)))),
        machine=found,
        software=evolve(software, attention=np.asarray(float(ATTENTIONS.index(attention)))),
        layout=layout(**changes),
    )
