"""Generations of devices, and what those of a generation have in common."""

from __future__ import annotations

ARCHITECTURES = ("cpu", "volta", "ampere", "hopper", "blackwell", "cdna3")

# Streaming multiprocessors or compute units that are enabled; data sheets of V100, A100, H100, B200, MI300X.
PROCESSORS = {"cpu": 1, "volta": 80, "ampere": 108, "hopper": 132, "blackwell": 148, "cdna3": 304}

# PCIe x16 of generation 3, 4, 5, 5 and 5 less a fifth for its protocol; a CPU's host memory is its own.
HOST_RATES = {
    "cpu": 10e9,
    "volta": 12.8e9,
    "ampere": 25.6e9,
    "hopper": 51.2e9,
    "blackwell": 51.2e9,
    "cdna3": 51.2e9,
}
_NAMED = {"v100": "volta", "a100": "ampere", "a800": "ampere", "b200": "blackwell", "b300": "blackwell"}


def architecture_of(kind: str, name: str) -> str:
    """Of a device whose description does not say: the newest that is widely used, unless the name tells."""
    if kind != "cuda":
        return "cdna3" if kind == "rocm" else "cpu"
    found = (architecture for part, architecture in _NAMED.items() if part in str(name).lower())
    return next(found, "hopper")
