"""Memory that processes of one host share: who may use what, and when."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator

import pytest
import torch

from picotron.errors import ExecutionError
from picotron.runtime.arena import Arena, Window, make_file
from picotron.runtime.backend import Group
from picotron.runtime.distributed import SHARED_BYTES, DistributedBackend, SharedHandle, connect
from picotron.runtime.same_host import SameHost, host_name
from picotron.runtime.shared_collectives import SharedCollectives
from tests.runtime.gloo import launch

pytestmark = pytest.mark.skipif(not host_name(), reason="this platform has no shared memory without a name")


@pytest.fixture
def pair() -> Iterator[tuple[SharedCollectives, SharedCollectives]]:
    """Two ranks in one process."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    files = make_file(), make_file()
    found = [
        SameHost(rank, Arena(files[rank]), {1 - rank: (ends[rank], Window(files[1 - rank]))})
        for rank in range(2)
    ]
    for descriptor in files:
        os.close(descriptor)
    yield SharedCollectives(found[0]), SharedCollectives(found[1])
    for host in found:
        host.close()


def test_a_region_is_lent_again_once_all_its_readers_have_done() -> None:
    """Two readers: after one of them the next tensor lies elsewhere, after both in the same place."""
    arena = Arena(descriptor := make_file())
    os.close(descriptor)
    first = arena.lend(100, [0, 3])
    arena.done(first.offset, 0)
    assert arena.lend(100, [0]).offset != first.offset
    arena.done(first.offset, 3)
    assert arena.lend(100, [0]).offset == first.offset


def test_messages_may_run_far_ahead(pair: tuple[SharedCollectives, SharedCollectives]) -> None:
    """No send waits: two ranks send each other 2000 messages before either receives, in order by channel."""
    number = 2000
    for rank, own in enumerate(pair):
        for value in range(number):
            own.send(torch.tensor([float(value)]), 1 - rank, channel=value % 2)()
    for rank, own in enumerate(pair):
        for channel in (1, 0):
            got = torch.empty(1)
            for value in range(channel, number, 2):
                own.receive(got, 1 - rank, channel)()
                assert float(got) == value


def test_memory_does_not_grow_with_the_number_of_operations(
    pair: tuple[SharedCollectives, SharedCollectives],
) -> None:
    """What has been read is used again: after the first, a hundred all-reduces take no new memory."""
    group, used = Group((0, 1)), []
    for _ in range(100):
        tensors = torch.ones(5000), torch.full((5000,), 2.0)
        ends = [own.all_reduce(tensor, group, 1, "sum") for own, tensor in zip(pair, tensors, strict=True)]
        for end in ends:
            end()
        assert all(torch.equal(tensor, torch.full((5000,), 3.0)) for tensor in tensors)
        used.append(pair[0].host._arena._used_bytes)
    assert used[-1] == used[0]


def test_a_tensor_is_free_once_it_is_posted(pair: tuple[SharedCollectives, SharedCollectives]) -> None:
    """What others read is a copy: the sender's own sum does not change what they are still to add."""
    group, one, two = Group((0, 1)), torch.ones(3), torch.full((3,), 10.0)
    first, second = (own.all_reduce(t, group, 1, "sum") for own, t in zip(pair, (one, two), strict=True))
    first()
    one.fill_(-1)
    second()
    assert two.tolist() == [11.0] * 3


def test_unlike_operations_are_refused(pair: tuple[SharedCollectives, SharedCollectives]) -> None:
    """A collective of another kind or size than the others' is told by both, where sockets would hang."""
    group, tensor = Group((0, 1)), torch.ones(4)
    first = pair[0].all_reduce(tensor, group, 1, "sum")
    pair[1].all_gather(torch.empty(8), tensor, group, 1)
    with pytest.raises(ExecutionError, match="rank 1 takes part in all_gather of 16 bytes"):
        first()


def test_whoever_waits_for_a_closed_end_is_told(
    pair: tuple[SharedCollectives, SharedCollectives],
) -> None:
    """What had been sent before still arrives; then the end of the other is an error."""
    got = torch.empty(1)
    pair[1].send(torch.ones(1), 0, 0)()
    pair[1].host.close()
    pair[0].receive(got, 1, 0)()
    assert float(got) == 1.0
    with pytest.raises(ExecutionError, match="rank 1 has ended"):
        pair[0].receive(got, 1, 0)()
    with pytest.raises(ExecutionError, match="rank 1 has ended"):
        pair[0].send(got, 1, 0)


def killed_neighbour() -> str:
    """What rank 0 is told when rank 1 is killed while rank 0 waits for it; 2 is alive and waits for 0."""
    backend = DistributedBackend(processes := connect(60), device="cpu", timeout_seconds=60)
    group = backend.new_group([0, 1, 2], "dp")
    processes.store.set(f"here {backend.rank}", "yes")
    processes.store.wait([f"here {rank}" for rank in range(3)])
    if backend.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        backend.all_reduce(torch.ones(2), group).wait()
    except ExecutionError as error:
        backend.abort(error)
        return str(error)
    return "nothing"


def test_the_death_of_a_process_is_told_at_once() -> None:
    """The kernel closes a killed process's sockets: whoever waits for it names it, long before a time-out."""
    told = launch(killed_neighbour, 3, timeout_seconds=30, killed=[1])
    assert all("all_reduce in group dp [0, 1, 2]" in told[rank] for rank in (0, 2))
    assert any("rank 1 has ended" in told[rank] for rank in (0, 2))


def ways() -> list[bool]:
    """Whether each goes through shared memory: small, large, and both without it."""
    found, processes = [], connect(60)
    for shared_memory in (True, False):
        with DistributedBackend(
            processes, device="cpu", timeout_seconds=60, shared_memory=shared_memory
        ) as backend:
            group = backend.new_group([0, 1])
            for size in (SHARED_BYTES, SHARED_BYTES + 4):
                tensor = torch.ones(size // 4)
                handle = backend.all_reduce(tensor, group)
                handle.wait()
                assert float(tensor[-1]) == 2.0
                found.append(isinstance(handle, SharedHandle))
    return found


def test_large_tensors_go_through_sockets() -> None:
    """What is shown to others is held twice; above a size it goes the other way."""
    assert launch(ways, 2) == [[True, False, False, False]] * 2
