"""What a rank's device asks of those who run on it, CPU or CUDA; other modules do not tell the two apart.

On CUDA a call returns before its work is done: work is ordered by the stream that it is put on. Whatever
stands here puts work on the current stream, and never waits for it.
"""

from __future__ import annotations

from typing import Any

import torch

RandomState = tuple[torch.Tensor, ...]


def indexed(device: torch.device) -> torch.device:
    """``device`` with the number that its tensors will have: "cuda" alone is the current one."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def make_current(device: torch.device) -> None:
    """Have this thread's CUDA work go to ``device``: a new thread begins on the first one."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def random_state(device: torch.device) -> RandomState:
    """The state of torch's global generators, the CPU's and the device's."""
    if device.type == "cuda":
        return torch.get_rng_state(), torch.cuda.get_rng_state(device)
    return (torch.get_rng_state(),)


def set_random_state(device: torch.device, state: RandomState) -> None:
    """Put back what ``random_state`` has told of the same device."""
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)


def on_default_stream(device: torch.device) -> bool:
    """Whether this thread's work goes to the one stream that all threads share; true where there is none."""
    if device.type != "cuda":
        return True
    current: Any = torch.cuda.current_stream(device)
    return bool(current == torch.cuda.default_stream(device))
