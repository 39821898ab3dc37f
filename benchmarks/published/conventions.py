"""What a printed TFLOP/s or utilisation counts, and the step time it therefore means.

Per token, with N weights in products (the output head is one, the embedding's table is none), L layers, width
h of all heads and a sequence of s. Attention is counted in full or under the causal mask (half). A recomputed
forward is counted where the source reports hardware FLOPs; Narayanan et al. 2021 (eq. 3) do not recompute the
head.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from .machines import known_machine, machine_values
from .models import hyphened, matmul_weights, score_flops
from .text import RowError

PRINTED_PEAKS = (  # what sources divide by to print a utilisation, dense FLOP/s by GPU and format
    ("gb300", 2.5e15, 5e15), ("gb200", 2.45e15, 4.9e15), ("b300", 2.25e15, 4.5e15), ("b200", 2.25e15, 4.5e15),
    ("h20(?!0)", 148e12, 296e12), ("h100.*pcie", 756e12, 1513e12),
    ("h100(?!.*nvl(?!ink|72))|h[28]00", 989e12, 1979e12), ("a[18]00", 312e12, 312e12),
    ("v100", 125e12, 125e12), ("mi3[02]", 1307.4e12, 2614.9e12),
)  # fmt: skip


def flops_per_token(
    model: Mapping[str, float],
    seq_len: float,
    convention: str,
    *,
    recompute: str,
    params: float | None = None,
) -> float:
    """The FLOPs that a source of this convention counts for one token, forward and backward.

    ``convention`` is a cell of ``flops_convention``: words it may hold are causal or full (attention), hfu
    (hardware: the forward that ``recompute`` repeats counts) and 6N (``params``, all weights, as N).
    """
    text = convention.lower()
    scores = score_flops(model, seq_len) * (0.5 if "causal" in text and "non" not in text else 1.0)
    layers = 2 * matmul_weights(model, head=False) + scores
    head = 2 * model["hidden"] * model["vocab"]
    if "6n" in text and params:
        return 6 * params + 3 * scores
    counted_again = "hfu" in text and recompute == "full"
    return (4 if counted_again else 3) * layers + 3 * head


def printed_peak(gpu: str, product: str) -> float:
    """The peak that a utilisation of this GPU was divided by. Raises RowError where none is known."""
    for pattern, wide, narrow in PRINTED_PEAKS:
        if re.search(pattern, hyphened(gpu)):
            return narrow if "fp8" in product or product == "nvfp4" else wide
    if machine := known_machine(gpu):
        return machine_values(machine, product)["peak_flops"]
    raise RowError(f"no peak is known by which to read a utilisation of {gpu!r}")
