"""One published measurement, read, completed and turned into base units."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import field, frozen

MEMORY_KINDS = ("allocated", "reserved", "nvidia-smi")  # what a printed peak counts


@frozen(kw_only=True)
class PublishedRow:
    """A row of the table; ``skipped`` says why it cannot be scored (its columns are then empty).

    ``model``, ``work``, ``machine`` and ``layout`` hold the values of the columns of the same names in
    ``picotron.planner.cases``; ``profile`` names the software profile. ``imputed`` names, in the order they
    were applied, the lines of ``imputation.json`` that filled what the source does not state.
    """

    id: str
    family: str
    trust: str
    skipped: str | None = None
    model_name: str = ""
    gpu: str = ""
    precision: str = ""
    num_gpus: int = 0
    profile: str = ""
    architecture: str = ""
    model: Mapping[str, float] = field(factory=dict)
    work: Mapping[str, float] = field(factory=dict)
    machine: Mapping[str, float] = field(factory=dict)
    layout: Mapping[str, float] = field(factory=dict)
    measured_step_seconds: float | None = None
    time_from: str = ""  # which printed figure the seconds came from: "step", "tokens", "flops" or "mfu"
    measured_peak_bytes: float | None = None
    memory_kind: str = ""  # one of MEMORY_KINDS where a peak is printed
    imputed: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(factory=dict)  # every cell as read or filled

    @property
    def sparse(self) -> bool:
        """Whether some of the layers are experts."""
        return self.model.get("moe_layers", 0) > 0
