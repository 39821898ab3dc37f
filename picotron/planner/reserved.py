"""What a device holds beside the tensors of a step: the framework's own memory, and fragmentation.

The framework's are the process's context, the buffers of its communicators and the scratch of its matrix
libraries. Fragmentation is a share of the bytes that come and go, less where layers are recomputed. Both are
those of ``side_bytes``, so that a plan is judged as ``search`` judges it; a CPU's ranks have neither.
"""

from __future__ import annotations

import math

import numpy as np
from attrs import evolve, frozen

from picotron.planner.cases import RECOMPUTES
from picotron.planner.columns_of import cases_of_plan
from picotron.planner.plan import TrainingPlan
from picotron.planner.side_bytes import fragmentation_share, framework, library_workspace


@frozen(kw_only=True)
class Beside:
    """Bytes of the framework, and the share of bytes that come and go which fragmentation wastes."""

    framework_bytes: int
    fragmentation_share: float

    def fragmentation_bytes(self, moving_bytes: int) -> int:
        """Of ``moving_bytes`` at the highest moment that do not stand all the time."""
        return math.ceil(self.fragmentation_share * moving_bytes)


def beside_tensors(plan: TrainingPlan) -> Beside:
    """What the devices of ``plan`` hold beside its tensors."""
    cases = cases_of_plan(plan)
    full = plan.recompute.count("full") / len(plan.recompute)
    layout = evolve(
        cases.layout,
        recompute=np.asarray(float(RECOMPUTES.index("full"))),
        recompute_layers=np.asarray(full),
    )
    return Beside(
        framework_bytes=math.ceil(float(framework(cases) + library_workspace(cases))),
        fragmentation_share=float(fragmentation_share(evolve(cases, layout=layout))),
    )
