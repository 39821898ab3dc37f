"""Planted races: what a rank does wrong so that its result, or the world's end, depends on who goes first.

Each takes the world's group, and a list that all ranks share and that is empty at first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from picotron.runtime.backend import Backend, Group

Race = Callable[[Backend, Group, list[Any]], object]


def result_read_before_wait(backend: Backend, group: Group, shared: list[Any]) -> object:
    """What a reduction has made of the tensor by now."""
    tensor = torch.tensor([backend.rank + 1.0])
    handle = backend.all_reduce(tensor, group)
    seen = tensor.clone()
    handle.wait()
    return seen


def message_read_before_wait(backend: Backend, group: Group, shared: list[Any]) -> object:
    """What has arrived in the buffer by now."""
    tensor = torch.tensor([backend.rank + 1.0])
    if backend.rank == 0:
        backend.send(tensor, 1, "race").wait()
    if backend.rank == 1:
        handle = backend.recv(tensor, 0, "race")
        seen = tensor.clone()
        handle.wait()
        return seen
    return None


def sum_in_order_of_arrival(backend: Backend, group: Group, shared: list[Any]) -> object:
    """A sum through memory, each adding to it as it comes, instead of a reduction: rounded on the way."""
    values = [2.0**60, 3.0, -(2.0**60), 5.0]
    shared.append(values[backend.rank % 4])
    backend.barrier()
    total = 0.0
    for value in shared:
        total = total / 3 + value
    return total


def two_operations_on_one_tensor(backend: Backend, group: Group, shared: list[Any]) -> object:
    """A sum and a maximum, both under way in one tensor."""
    tensor = torch.tensor([backend.rank + 1.0])
    handles = [backend.all_reduce(tensor, group), backend.all_reduce(tensor, group, "max")]
    for handle in handles:
        handle.wait()
    return tensor


def two_messages_into_one_tensor(backend: Backend, group: Group, shared: list[Any]) -> object:
    """Two receives into one buffer, the second of which is waited for first."""
    if backend.rank == 0:
        for number in (1.0, 2.0):
            backend.send(torch.tensor([number]), 1, f"race {number}").wait()
    if backend.rank == 1:
        tensor = torch.zeros(1)
        one, other = (backend.recv(tensor, 0, f"race {number}") for number in (1.0, 2.0))
        other.wait()
        one.wait()
        return tensor
    return None


def tensor_changed_before_wait(backend: Backend, group: Group, shared: list[Any]) -> object:
    """Written to while it is being sent, behind torch's back."""
    tensor = torch.zeros(1)
    if backend.rank == 0:
        handle = backend.send(tensor, 1, "race")
        tensor.numpy()[:] = 1.0
        handle.wait()
    if backend.rank == 1:
        backend.recv(tensor, 0, "race").wait()
        return tensor
    return None


def handle_dropped(backend: Backend, group: Group, shared: list[Any]) -> object:
    """Nobody ever waits for a reduction."""
    tensor = torch.tensor([backend.rank + 1.0])
    backend.all_reduce(tensor, group)
    return tensor


def flag_read_without_a_barrier(backend: Backend, group: Group, shared: list[Any]) -> object:
    """Rank 0 leaves word in memory, and rank 1 looks whether it has."""
    if backend.rank == 0:
        shared.append("done")
    return list(shared) if backend.rank == 1 else None


def work_taken_first_come(backend: Backend, group: Group, shared: list[Any]) -> object:
    """Each takes the next number from a queue."""
    shared.append(backend.rank)
    return shared.index(backend.rank)


def one_generator_for_all(backend: Backend, group: Group, shared: list[Any]) -> object:
    """Ranks draw in turn from one random generator."""
    if not shared:
        shared.append(np.random.default_rng(0))
    return float(shared[0].random())


def messages_that_may_not_come(backend: Backend, group: Group, shared: list[Any]) -> object:
    """Rank 1 receives unless it has been told in memory that nothing is sent: a deadlock, sometimes."""
    if backend.rank == 0:
        shared.append("nothing is sent")
    if backend.rank == 1 and not shared:
        backend.recv(torch.zeros(1), 0, "race").wait()
    return None


def update_seen_half_done(backend: Backend, group: Group, shared: list[Any]) -> object:
    """Rank 0 posts a message between two writes to memory, and rank 1 counts them."""
    if backend.rank == 0:
        shared.append("one half")
        handle = backend.send(torch.zeros(1), 1, "race")
        shared.append("the other")
        handle.wait()
    if backend.rank == 1:
        half = len(shared) == 1
        backend.recv(torch.zeros(1), 0, "race").wait()
        return half
    return None


RACES: tuple[Race, ...] = (
    result_read_before_wait,
    message_read_before_wait,
    sum_in_order_of_arrival,
    two_operations_on_one_tensor,
    two_messages_into_one_tensor,
    tensor_changed_before_wait,
    handle_dropped,
    flag_read_without_a_barrier,
    work_taken_first_come,
    one_generator_for_all,
    messages_that_may_not_come,
    update_seen_half_done,
)


def planted(race: Race) -> Callable[[Backend, Sequence[Group]], object]:
    """The race as a function of a backend and its groups, the first of which is the world's."""
    shared: list[Any] = []

    def program(backend: Backend, groups: Sequence[Group]) -> object:
        shared.clear()  # by all, before any of them goes on
        backend.barrier()
        return race(backend, groups[0], shared)

    return program
