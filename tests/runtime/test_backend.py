"""One conformance suite over the simulated and the gloo backend, and what only processes promise.

Values are whole numbers so small that every dtype and every order of adding has them exactly.
"""

from __future__ import annotations

import math
import os
import re
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from picotron.errors import ExecutionError
from picotron.runtime.backend import Backend, Group, Handle, Transfer
from picotron.runtime.distributed import DistributedBackend, connect
from picotron.runtime.messages import SEMANTICS, Semantics
from picotron.runtime.simulated import simulate
from tests.runtime.gloo import launch

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.uint8)
DTYPES = (*FLOATS, *INTEGERS, torch.bool)  # all of them move
GLOO_WORLDS = ((4, True), (3, True), (3, False), (2, True), (2, False), (1, True))  # size, shared memory
SIMULATED_WORLDS = (1, 2, 3, 5)


def world(backend: Backend) -> Group:
    return backend.new_group(range(backend.world_size), "world")


def row(*values: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def ops_of(dtype: torch.dtype) -> tuple[str, ...]:
    """The reductions that ``dtype`` has."""
    if dtype == torch.bool:
        return ("max",)
    return ("sum", "max", "avg") if dtype.is_floating_point else ("sum", "max")


def filled(shape: Sequence[int], value: float, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(tuple(shape), value, dtype=dtype)


def neighbours(backend: Backend) -> tuple[int, int]:
    """The ranks before and after this one on a ring."""
    return (backend.rank - 1) % backend.world_size, (backend.rank + 1) % backend.world_size


def others(backend: Backend) -> list[int]:
    return [rank for rank in range(backend.world_size) if rank != backend.rank]


def refused(call: Callable[[], object], *words: str) -> None:
    """The call raises an ExecutionError whose message has every word."""
    with pytest.raises(ExecutionError) as caught:
        call()
    for word in words:
        assert word in str(caught.value), str(caught.value)


def all_reduce_adds_takes_the_maximum_and_averages(backend: Backend) -> None:
    """On ranks holding (r, 1, 0): sum n(n-1)/2, n, 0; max n-1, 1, 0; avg (n-1)/2, 1, 0."""
    n, group = backend.world_size, world(backend)
    expected = {"sum": (n * (n - 1) / 2, n, 0), "max": (n - 1, 1, 0), "avg": ((n - 1) / 2, 1, 0)}
    for dtype in DTYPES:
        for op in ops_of(dtype):
            tensor = row(backend.rank, 1, 0, dtype=dtype)
            backend.all_reduce(tensor, group, op).wait()
            assert torch.equal(tensor, row(*expected[op], dtype=dtype)), (op, dtype)


def reductions_have_signs_and_wrap(backend: Backend) -> None:
    """The maximum of -1 - r is -1; a uint8 sum is modulo 256, a float16 sum past 65504 infinite."""
    n, group = backend.world_size, world(backend)
    for dtype in (*FLOATS, torch.int64, torch.int32):
        tensor = row(-1 - backend.rank, dtype=dtype)
        backend.all_reduce(tensor, group, "max").wait()
        assert tensor.item() == -1, dtype
    byte, half = row(200, dtype=torch.uint8), row(60000, dtype=torch.float16)
    backend.all_reduce(byte, group).wait()
    backend.all_reduce(half, group).wait()
    assert byte.item() == 200 * n % 256
    assert half.item() == (60000 if n == 1 else math.inf)


def all_gather_concatenates_in_group_order(backend: Backend) -> None:
    """Two rows a rank, along dim 0, from an input apart and from this rank's own part of the output."""
    n, group = backend.world_size, world(backend)
    for dtype in DTYPES:
        expected = torch.tensor([[r] * 3 for r in range(n) for _ in range(2)], dtype=dtype)
        output = filled((2 * n, 3), 1, dtype)
        backend.all_gather(output, filled((2, 3), backend.rank, dtype), group).wait()
        assert torch.equal(output, expected), dtype
        whole = filled((2 * n, 3), 1, dtype)
        own = whole[2 * backend.rank : 2 * backend.rank + 2].fill_(backend.rank)
        backend.all_gather(whole, own, group).wait()
        assert torch.equal(whole, expected), dtype


def reduce_scatter_gives_each_rank_its_part(backend: Backend) -> None:
    """Rank r gets row r of the reduced matrix; the input is left alone."""
    n, group = backend.world_size, world(backend)
    total = n * (n - 1) / 2
    expected: dict[str, Callable[[int], float]] = {
        "sum": lambda r: n * r + total,
        "max": lambda r: r + n - 1,
        "avg": lambda r: r + total / n,
    }
    for dtype in DTYPES:
        for op in ops_of(dtype):
            whole = (torch.arange(n)[:, None] + backend.rank).to(dtype)
            output = torch.empty((1, 1), dtype=dtype)
            backend.reduce_scatter(output, whole, group, op).wait()
            assert torch.equal(output, filled((1, 1), expected[op](backend.rank), dtype)), (op, dtype)
            assert torch.equal(whole, (torch.arange(n)[:, None] + backend.rank).to(dtype))


def reduce_scatter_may_write_into_its_input(backend: Backend) -> None:
    """The output may be this rank's own part of the input."""
    n, group = backend.world_size, world(backend)
    whole = torch.arange(2.0 * n) + backend.rank
    own = whole[2 * backend.rank : 2 * backend.rank + 2]
    backend.reduce_scatter(own, whole, group).wait()
    first = 2 * backend.rank * n + n * (n - 1) / 2
    assert own.tolist() == [first, first + n]


def all_to_all_transposes(backend: Backend) -> None:
    """Even parts: row i of rank j becomes row j of rank i."""
    n, group = backend.world_size, world(backend)
    for dtype in DTYPES:
        sent = (10 * backend.rank + torch.arange(n)).to(dtype)
        output = torch.empty_like(sent)
        backend.all_to_all(output, sent, group).wait()
        assert torch.equal(output, (10 * torch.arange(n) + backend.rank).to(dtype)), dtype


def all_to_all_takes_uneven_parts(backend: Backend) -> None:
    """Rank r sends (r + i) mod n rows of value r to rank i: some of them none."""
    n, r, group = backend.world_size, backend.rank, world(backend)
    sizes = [(r + i) % n for i in range(n)]
    for dtype in DTYPES:
        output = filled((sum(sizes), 2), 1, dtype)
        backend.all_to_all(output, filled((sum(sizes), 2), r, dtype), group, sizes, sizes).wait()
        assert torch.equal(
            output,
            torch.tensor([[i, i] for i in range(n) for _ in range(sizes[i])], dtype=dtype).reshape(-1, 2),
        ), dtype


def all_to_all_may_leave_ranks_out(backend: Backend) -> None:
    """All rows go to the last rank: the others receive none. Then the last rank alone sends, two to each."""
    n, r, group = backend.world_size, backend.rank, world(backend)
    last = n - 1
    to_last = [0] * last + [r + 1]
    from_all = [i + 1 for i in range(n)] if r == last else [0] * n
    output = filled((sum(from_all),), -1, torch.float32)
    backend.all_to_all(output, filled((r + 1,), r, torch.float32), group, from_all, to_last).wait()
    assert output.tolist() == ([i for i in range(n) for _ in range(i + 1)] if r == last else [])
    sent = torch.arange(2.0 * n) if r == last else torch.empty(0)
    output = torch.full((2,), -1.0)
    backend.all_to_all(output, sent, group, [0] * last + [2], [2 if r == last else 0] * n).wait()
    assert output.tolist() == [2 * r, 2 * r + 1]


def an_exchange_goes_round(backend: Backend) -> None:
    """Each rank has what the one before sent; two at once end in their order; one alone sends to itself."""
    n, r, group = backend.world_size, backend.rank, world(backend)
    for dtype in DTYPES:
        sent = [filled((2, 3), r + offset, dtype) for offset in (0, 1)]
        received = [filled((2, 3), 0, dtype) for _ in sent]
        handles = [backend.exchange(output, own, group) for output, own in zip(received, sent, strict=True)]
        for offset, (handle, output) in enumerate(zip(handles, received, strict=True)):
            handle.wait()
            assert torch.equal(output, filled((2, 3), (r - 1) % n + offset, dtype)), dtype


def broadcast_copies_the_source(backend: Backend) -> None:
    """Every rank has the source's tensor, whichever world rank that is."""
    group = world(backend)
    for dtype in DTYPES:
        for source in range(backend.world_size):
            tensor = row(backend.rank, 1, dtype=dtype)
            backend.broadcast(tensor, group, source).wait()
            assert torch.equal(tensor, row(source, 1, dtype=dtype)), (source, dtype)


def groups_of_some_ranks_are_worlds_of_their_own(backend: Backend) -> None:
    """Even and odd ranks reduce apart; a source inside a group is still a world rank."""
    halves = [list(range(first, backend.world_size, 2)) for first in (0, 1)]
    groups = [backend.new_group(half, "half") for half in halves if half]
    mine = groups[backend.rank % 2]
    tensor = row(backend.rank)
    backend.all_reduce(tensor, mine).wait()
    assert tensor.item() == sum(mine.ranks)
    assert mine.index(backend.rank) == backend.rank // 2
    gathered = torch.empty(mine.size)
    backend.all_gather(gathered, row(backend.rank), mine).wait()
    assert gathered.tolist() == list(mine.ranks)
    tensor = row(backend.rank)
    backend.broadcast(tensor, mine, mine.ranks[-1]).wait()
    assert tensor.item() == mine.ranks[-1]


def groups_have_any_size(backend: Backend) -> None:
    """The last k ranks, for each k, do every collective among themselves; the others do nothing."""
    n, r = backend.world_size, backend.rank
    for first in range(n):
        group = backend.new_group(range(first, n), f"from{first}")
        k, total = group.size, sum(group.ranks)
        if r < first:
            continue
        own, whole = row(r), torch.empty(k)
        backend.all_reduce(own, group).wait()
        assert own.item() == total
        backend.all_gather(whole, row(r), group).wait()
        assert whole.tolist() == list(group.ranks)
        backend.reduce_scatter(own, torch.arange(float(k)) * r, group).wait()
        assert own.item() == total * group.index(r)
        backend.all_to_all(whole, torch.arange(float(k)) + 10 * r, group).wait()
        assert whole.tolist() == [10 * i + group.index(r) for i in group.ranks]
        backend.broadcast(own, group, first).wait()
        assert own.item() == 0  # what the group's first member, of index 0, had


def a_group_of_one_rank_is_a_group(backend: Backend) -> None:
    """Alone, a sum, a maximum, an average and every movement give back what was there."""
    alone = [backend.new_group([rank], "alone") for rank in range(backend.world_size)][backend.rank]
    for dtype in DTYPES:
        own, output = row(backend.rank, 1, dtype=dtype), filled((2,), 0, dtype)
        for op in ops_of(dtype):
            backend.all_reduce(own, alone, op).wait()
            backend.reduce_scatter(output.zero_(), own, alone, op).wait()
            assert torch.equal(output, own)
        backend.broadcast(own, alone, backend.rank).wait()
        backend.all_gather(output.zero_(), own, alone).wait()
        assert torch.equal(output, own)
        backend.all_to_all(output.zero_(), own, alone).wait()
        assert torch.equal(output, own) and torch.equal(own, row(backend.rank, 1, dtype=dtype))


def groups_may_overlap(backend: Backend) -> None:
    """Each rank reduces with the one before and the one after it at once, and all of them with all."""
    n, r = backend.world_size, backend.rank
    pairs = [backend.new_group([first, first + 1], f"pair{first}") for first in range(n - 1)]
    group = world(backend)
    mine = [pair for pair in pairs if r in pair.ranks]
    tensors = [row(10.0**r) for _ in mine] + [row(10.0**r)]
    for handle in [backend.all_reduce(t, g) for t, g in zip(tensors, [*mine, group], strict=True)]:
        handle.wait()
    assert [t.item() for t in tensors] == [sum(10.0**i for i in g.ranks) for g in [*mine, group]]


def groups_of_equal_ranks_are_separate(backend: Backend) -> None:
    """Two communicators over the same ranks are posted in opposite orders by odd and even ranks."""
    groups = [world(backend), world(backend)]
    tensors = [row(1), row(10)]
    order = (0, 1) if backend.rank % 2 else (1, 0)
    handles = [backend.all_reduce(tensors[i], groups[i]) for i in order]
    for handle in handles:
        handle.wait()
    assert [t.item() for t in tensors] == [backend.world_size, 10 * backend.world_size]


def messages_go_round_a_ring(backend: Backend) -> None:
    """Every dtype; receives posted before the sends, then after."""
    before, after = neighbours(backend)
    if before == backend.rank:
        return
    for dtype in DTYPES:
        for receive_first in (True, False):
            received, sent = row(1, 0, dtype=dtype), row(backend.rank, 1, dtype=dtype)
            posts = [
                partial(backend.recv, received, before, "ring"),
                partial(backend.send, sent, after, "ring"),
            ]
            for handle in [post() for post in (posts if receive_first else posts[::-1])]:
                handle.wait()
            assert torch.equal(received, row(before, 1, dtype=dtype)), dtype


def messages_go_down_a_line(backend: Backend) -> None:
    """Each rank waits for its receive, then for its send, and so on back: no world needs a buffer for it."""
    n, r = backend.world_size, backend.rank
    value = row(0)
    for first, last, channel in ((0, n - 1, "forward"), (n - 1, 0, "backward")):
        step = 1 if channel == "forward" else -1
        if r != first:
            backend.recv(value, r - step, channel).wait()
        value += 1
        if r != last:
            backend.send(value, r + step, channel).wait()
    assert value.item() == 2 * n - r


def receives_match_in_the_order_they_were_posted(backend: Backend) -> None:
    """Three in flight on one channel, waited for in reverse."""
    before, after = neighbours(backend)
    if before == backend.rank:
        return
    received = [row(-1) for _ in range(3)]
    handles = [backend.recv(tensor, before, "x") for tensor in received]
    sent = [backend.send(row(i), after, "x") for i in range(3)]
    for handle in handles[::-1] + sent[::-1]:
        handle.wait()
    assert [tensor.item() for tensor in received] == [0, 1, 2]


def channels_are_independent(backend: Backend) -> None:
    """Sent as backward, forward; received as forward, backward."""
    before, after = neighbours(backend)
    if before == backend.rank:
        return
    forward, backward = row(-1), row(-1)
    handles = [backend.recv(forward, before, "forward"), backend.recv(backward, before, "backward")]
    handles += [backend.send(row(2), after, "backward"), backend.send(row(1), after, "forward")]
    for handle in handles:
        handle.wait()
    assert (forward.item(), backward.item()) == (1, 2)


def a_batch_exchanges_with_every_peer(backend: Backend) -> None:
    """Every dtype, a message each way with each other rank, posted together: sends first, then last."""
    peers = others(backend)
    for dtype in DTYPES:
        for sends_first in (True, False):
            received = {peer: row(0, 0, dtype=dtype) for peer in peers}
            sends = [Transfer("send", row(backend.rank, 1, dtype=dtype), peer, "swap") for peer in peers]
            receives = [Transfer("recv", received[peer], peer, "swap") for peer in peers]
            transfers = sends + receives if sends_first else receives + sends
            backend.batch(transfers).wait()
            for peer in peers:
                assert torch.equal(received[peer], row(peer, 1, dtype=dtype)), (peer, dtype)


def a_batch_keeps_the_order_of_a_channel(backend: Backend) -> None:
    """Two batches in flight, of two messages each way per peer and one on a channel of its own."""
    peers = others(backend)
    received = {peer: [row(-1) for _ in range(6)] for peer in peers}
    handles = []
    for number in range(2):
        transfers = []
        for peer in peers:
            three = received[peer][3 * number : 3 * number + 3]
            for i, (tensor, channel) in enumerate(zip(three, ("x", "y", "x"), strict=True)):
                transfers.append(Transfer("recv", tensor, peer, channel))
                transfers.append(Transfer("send", row(100 * backend.rank + 3 * number + i), peer, channel))
        handles.append(backend.batch(transfers))
    for handle in handles[::-1]:
        handle.wait()
    for peer in peers:
        assert [tensor.item() for tensor in received[peer]] == [100 * peer + i for i in range(6)]


def a_batch_is_complete_when_all_of_it_is(backend: Backend) -> None:
    """Rank 0 has both messages, though rank 2 sends only when rank 1 has."""
    if backend.world_size < 3:
        return
    first, second = row(-1), row(-1)
    if backend.rank == 0:
        transfers = [Transfer("recv", first, 1), Transfer("recv", second, 2)]
        backend.batch(transfers).wait()
        assert (first.item(), second.item()) == (1, 2)
    elif backend.rank == 1:
        backend.batch([Transfer("send", row(1), 0)]).wait()
        backend.send(row(0), 2, "go").wait()
    elif backend.rank == 2:
        backend.recv(first, 1, "go").wait()
        backend.send(row(2), 0).wait()


def two_in_flight_are_waited_for_in_reverse(backend: Backend) -> None:
    """Handles are complete in any order of waiting, and waiting again changes nothing."""
    group = world(backend)
    first, second = row(1), row(2, 2)
    handles = [backend.all_reduce(first, group), backend.all_reduce(second, group, "avg")]
    for handle in handles[::-1] + handles:
        handle.wait()
    assert (first.item(), second.tolist()) == (backend.world_size, [2, 2])


def empty_tensors_and_scalars_pass(backend: Backend) -> None:
    """No elements, or no dims, is no special case."""
    n, group = backend.world_size, world(backend)
    before, after = neighbours(backend)
    for dtype in DTYPES:
        none = torch.empty((0, 2), dtype=dtype)
        backend.all_reduce(none, group, "max").wait()
        backend.all_gather(torch.empty_like(none), none, group).wait()
        backend.reduce_scatter(torch.empty_like(none), none, group, "max").wait()
        backend.all_to_all(torch.empty_like(none), none, group).wait()
        backend.all_to_all(torch.empty_like(none), none, group, [0] * n, [0] * n).wait()
        backend.broadcast(none, group, n - 1).wait()
        scalar = torch.tensor(backend.rank, dtype=dtype)
        backend.all_reduce(scalar, group, "max").wait()
        assert torch.equal(scalar, torch.tensor(n - 1, dtype=dtype))
        if n > 1:
            received = torch.zeros((), dtype=dtype)
            transfers = [Transfer("send", none, after), Transfer("recv", torch.empty_like(none), before)]
            transfers += [Transfer("send", scalar, after), Transfer("recv", received, before)]
            backend.batch(transfers).wait()
            assert torch.equal(received, scalar)


def handles_know_when_they_ran(backend: Backend) -> None:
    """On a virtual clock, once complete: a start and an end between posting and now. Elsewhere: unknown."""
    n, group = backend.world_size, world(backend)
    before, after = neighbours(backend)
    own, whole = row(1), torch.ones(n)
    posts: list[Callable[[], Handle]] = [
        lambda: backend.all_reduce(own, group),
        lambda: backend.all_gather(torch.empty(n), own, group),
        lambda: backend.reduce_scatter(torch.empty(1), whole, group),
        lambda: backend.all_to_all(torch.empty(n), whole, group),
        lambda: backend.broadcast(own, group, 0),
    ]
    if n > 1:
        posts.append(
            lambda: backend.batch([Transfer("send", row(1), after), Transfer("recv", row(1), before)])
        )
    for post in posts:
        backend.spend(0.25)
        posted, handle = backend.mark(), post()
        handle.wait()
        if backend.capabilities.clock != "virtual":
            assert handle.span is None
            continue
        assert handle.span is not None
        start, end = handle.span
        assert type(start) is type(end) is float
        assert posted <= start <= end <= backend.mark()


def computing_takes_what_is_spent(backend: Backend) -> None:
    """A virtual clock goes forward by just so much; real time goes its own way."""
    backend.barrier()
    started = backend.mark()
    backend.spend(1024.0)
    backend.spend(0.5)
    spent = backend.mark() - started
    assert spent == 1024.5 if backend.capabilities.clock == "virtual" else 0 <= spent < 60


def saying_where_one_is_changes_nothing(backend: Backend) -> None:
    """Neither the clock nor what is communicated."""
    group, started = world(backend), backend.mark()
    for index in range(3):
        backend.at(0, index, f"F{index}")
        if backend.capabilities.clock == "virtual":
            assert backend.mark() == started
        tensor = row(index)
        backend.all_reduce(tensor, group).wait()
        assert tensor.item() == index * backend.world_size


def nobody_leaves_a_barrier_before_all_have_come(backend: Backend) -> None:
    """Each comes later than the one before, and none leaves before the last has come (the host's clock)."""
    time.sleep(0.005 * backend.rank)
    came = time.monotonic()
    backend.barrier()
    left = time.monotonic()
    times: Any = backend.gather_objects((came, left))
    assert max(came for came, _ in times) <= min(left for _, left in times)


def objects_are_gathered_in_rank_order(backend: Backend) -> None:
    """Each rank gets copies of its own."""
    mine = {"rank": backend.rank}
    gathered = backend.gather_objects(mine)
    assert gathered == [{"rank": r} for r in range(backend.world_size)]
    assert gathered[backend.rank] is not mine
    backend.barrier()


def clocks_go_forward(backend: Backend) -> None:
    """Neither the clock nor the CPU time goes back."""
    started, cpu_started = backend.mark(), backend.cpu_seconds()
    sum(range(100_000))
    backend.spend(1e-3)
    backend.barrier()
    assert backend.mark() > started
    assert backend.cpu_seconds() > cpu_started >= 0


def random_scopes_repeat(backend: Backend) -> None:
    """The same seed draws the same numbers on every rank and every time."""
    draws = []
    for _ in range(2):
        with backend.random_scope(3) as generator:
            draws.append(torch.rand(4, generator=generator).tolist())
            backend.barrier()
    assert backend.gather_objects(draws[0]) == [draws[1]] * backend.world_size


def parameters_are_reduced_without_autograd(backend: Backend) -> None:
    """A leaf that requires grad is written in place and still is a leaf."""
    parameter = row(1).requires_grad_()
    backend.all_reduce(parameter, world(backend)).wait()
    assert parameter.is_leaf and parameter.item() == backend.world_size


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every operation that is dispatched."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **kwargs or {})


def dispatch_modes_do_not_see_collectives(backend: Backend) -> None:
    """A mode that counts memory is shown none of the backend's own tensors."""
    group, before_after = world(backend), neighbours(backend)
    whole, own = torch.ones(backend.world_size), torch.ones(1)
    with Recorder() as recorder:
        backend.all_reduce(whole, group, "avg").wait()
        backend.reduce_scatter(own, whole, group).wait()
        backend.all_gather(whole, own, group).wait()
        if backend.world_size > 1:
            handle, sent = backend.recv(own, before_after[0]), backend.send(whole[:1], before_after[1])
            handle.wait(), sent.wait()
        backend.barrier()
    allowed = ("aten.slice.Tensor", "aten.detach.default")
    assert [name for name in recorder.seen if name not in allowed] == []


def broken_rules_are_refused_at_the_door(backend: Backend) -> None:
    """An ExecutionError that names rank, operation, rule and value, before anything is posted."""
    n, group, rank = backend.world_size, world(backend), f"rank {backend.rank}"
    ones, other = torch.ones(n), (backend.rank + 1) % n
    refused(lambda: backend.all_reduce(ones, group, "prod"), rank, "all_reduce", "op must be", "'prod'")
    for dtype in (*INTEGERS, torch.bool):
        words = (rank, "dtype must be one that avg is defined for", str(dtype))
        refused(lambda d=dtype: backend.all_reduce(ones.to(d), group, "avg"), "all_reduce", *words)  # type: ignore[misc]
        refused(lambda d=dtype: backend.reduce_scatter(ones[:1].to(d), ones.to(d), group, "avg"), *words)  # type: ignore[misc]
    refused(lambda: backend.all_reduce(ones.bool(), group), "one that sum is defined for", "torch.bool")
    refused(lambda: backend.reduce_scatter(ones[:1].bool(), ones.bool(), group), "sum", "torch.bool")
    refused(lambda: backend.all_reduce(torch.ones(1, dtype=torch.complex64), group), "complex64")
    refused(lambda: backend.all_reduce(torch.ones(2, 3).t(), group), "contiguous", "(1, 3)")
    refused(
        lambda: backend.all_gather(torch.ones(n + 1), torch.ones(1), group), rank, "all_gather", f"{n} times"
    )
    refused(lambda: backend.all_gather(ones, torch.ones(1).long(), group), "one dtype", "torch.int64")
    refused(lambda: backend.reduce_scatter(torch.ones(2), ones, group), rank, "reduce_scatter", f"{n} times")
    refused(
        lambda: backend.all_to_all(torch.ones(n), ones, group, [1] * (n + 1)), "output sizes", f"{n} counts"
    )
    refused(lambda: backend.all_to_all(torch.ones(n), ones, group, None, [2] * n), "input sizes", f"{n} rows")
    refused(lambda: backend.all_to_all(ones, ones, group), "different memory")
    refused(lambda: backend.all_to_all(torch.ones(n, 2), ones, group), "every dim but 0")
    refused(lambda: backend.exchange(ones, ones, group), rank, "exchange", "different memory")
    refused(lambda: backend.exchange(torch.ones(n + 1), ones, group), "exchange", "one shape")
    refused(lambda: backend.broadcast(ones, group, n), rank, "broadcast", "source", str(n))
    refused(lambda: backend.send(ones, n), rank, "send", "peer", str(n))
    refused(lambda: backend.recv(ones, backend.rank), rank, "recv", "another rank")
    if n > 1:  # nothing of a batch is posted unless all of it is in order
        good, bad = Transfer("send", ones, other), Transfer("recv", ones, n)
        refused(lambda: backend.batch([good, bad]), rank, "recv", "peer", str(n))
    refused(lambda: backend.new_group([0, 0]), "new_group", "distinct, ascending", "[0, 0]")
    refused(lambda: backend.new_group([n]), f"[0, {n})", f"[{n}]")
    refused(lambda: backend.all_reduce(ones, Group(tuple(range(n)))), "new_group")
    if n > 1:
        single = [backend.new_group([r]) for r in range(n)][other]
        refused(lambda: backend.all_reduce(ones, single), rank, "members", f"[{other}]")
        refused(lambda: single.index(backend.rank), "member", str(backend.rank))
    backend.all_reduce(ones, group).wait()
    assert ones.tolist() == [n] * n


CASES = (
    all_reduce_adds_takes_the_maximum_and_averages,
    reductions_have_signs_and_wrap,
    all_gather_concatenates_in_group_order,
    reduce_scatter_gives_each_rank_its_part,
    reduce_scatter_may_write_into_its_input,
    an_exchange_goes_round,
    all_to_all_transposes,
    all_to_all_takes_uneven_parts,
    all_to_all_may_leave_ranks_out,
    broadcast_copies_the_source,
    groups_of_some_ranks_are_worlds_of_their_own,
    groups_have_any_size,
    a_group_of_one_rank_is_a_group,
    groups_may_overlap,
    groups_of_equal_ranks_are_separate,
    messages_go_round_a_ring,
    messages_go_down_a_line,
    receives_match_in_the_order_they_were_posted,
    channels_are_independent,
    a_batch_exchanges_with_every_peer,
    a_batch_keeps_the_order_of_a_channel,
    a_batch_is_complete_when_all_of_it_is,
    two_in_flight_are_waited_for_in_reverse,
    empty_tensors_and_scalars_pass,
    handles_know_when_they_ran,
    computing_takes_what_is_spent,
    saying_where_one_is_changes_nothing,
    nobody_leaves_a_barrier_before_all_have_come,
    objects_are_gathered_in_rank_order,
    clocks_go_forward,
    random_scopes_repeat,
    parameters_are_reduced_without_autograd,
    dispatch_modes_do_not_see_collectives,
    broken_rules_are_refused_at_the_door,
)

Outcomes = dict[tuple[int, bool, str], str]


def run_cases() -> Outcomes:
    """In each process: how every case ended on every world this one is in; a failure ends its world."""
    processes, outcomes = connect(60), {}
    for world_size, shared_memory in GLOO_WORLDS:
        if processes.rank >= world_size:
            continue
        backend = DistributedBackend(
            processes,
            device="cpu",
            timeout_seconds=60,
            ranks=range(world_size),
            shared_memory=shared_memory,
        )
        for case in CASES:
            try:
                case(backend)
                backend.barrier()
                outcomes[world_size, shared_memory, case.__name__] = "passed"
            except BaseException as error:
                outcomes[world_size, shared_memory, case.__name__] = traceback.format_exc()
                backend.abort(error)
                break
        backend.close()
    return outcomes


@pytest.fixture(scope="module")
def gloo_outcomes() -> list[Outcomes]:
    return launch(run_cases, max(world_size for world_size, _ in GLOO_WORLDS))


@pytest.mark.parametrize(("world_size", "shared_memory"), GLOO_WORLDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_gloo_conforms(
    case: Callable[[Backend], None], world_size: int, shared_memory: bool, gloo_outcomes: list[Outcomes]
) -> None:
    """Every case holds on processes."""
    for outcomes in gloo_outcomes[:world_size]:
        outcome = outcomes.get((world_size, shared_memory, case.__name__), "not reached")
        assert outcome == "passed", outcome


# Between two ranks these post both directions of one channel one by one, and wait for them afterwards: each
# rank's first must be complete before its second begins, and it meets the other's second. In larger rings the
# two directions are with different ranks.
STUCK_IN_BATCHES_OF_TWO = (
    messages_go_round_a_ring,
    receives_match_in_the_order_they_were_posted,
    channels_are_independent,
    dispatch_modes_do_not_see_collectives,
)
INTERLEAVINGS = ((0, 0.0), (1, 0.5), (2, 0.5))  # seed, preempt


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("world_size", SIMULATED_WORLDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_simulated_conforms(case: Callable[[Backend], None], world_size: int, semantics: Semantics) -> None:
    """Every case holds on threads, whoever goes first and however messages meet.

    "buffered" and "rendezvous" allow every case: none waits for a send before it has posted the receive that
    the other needs. "batched" allows all but those that are stuck between two ranks, which deadlock there
    under every interleaving, as they would on NCCL.
    """
    stuck = semantics == "batched" and world_size == 2 and case in STUCK_IN_BATCHES_OF_TWO
    for seed, preempt in INTERLEAVINGS:
        settings: dict[str, Any] = {"seed": seed, "preempt": preempt, "semantics": semantics}
        if stuck:
            with pytest.raises(ExecutionError, match=r"(?s)deadlock.*cycle: 0 -> 1 -> 0"):
                simulate(case, world_size, **settings)
        else:
            simulate(case, world_size, **settings)


def test_an_empty_batch_is_complete() -> None:
    """As ``a_batch_exchanges_with_every_peer`` in a world of one; it ran at no time."""

    def program(backend: Backend) -> Any:
        handle = backend.batch([])
        handle.wait()
        return handle.span

    assert simulate(program, 2) == [None, None]


def both_ways(backend: Backend) -> list[tuple[float, float] | None]:
    """A message each way on one channel, the second posted before the first is waited for."""
    there, back = row(1), row(2)
    posts = [partial(backend.send, there, 1, "x"), partial(backend.recv, back, 1, "x")]
    if backend.rank == 1:
        posts = [partial(backend.recv, there, 0, "x"), partial(backend.send, back, 0, "x")]
    handles = [post() for post in posts]
    for handle in handles:
        handle.wait()
    return [handle.span for handle in handles]


@pytest.mark.parametrize(
    ("semantics", "second"),
    [
        ("buffered", (0.0, 10.0)),
        ("rendezvous", (0.0, 10.0)),
        ("batched", (10.0, 20.0)),
    ],
)
def test_two_ways_of_a_channel_take_their_time(semantics: Semantics, second: tuple[float, float]) -> None:
    """Ten seconds each: at once, or in batches one after the other, whoever goes first."""
    for seed in range(8):
        settings: dict[str, Any] = {"seed": seed, "preempt": 0.5, "semantics": semantics}
        spans = simulate(both_ways, 2, price=lambda *_: 10.0, **settings)
        receives = [spans[1][0], spans[0][1]]
        assert receives == [(0.0, 10.0), second]


def uneven(backend: Backend) -> tuple[float, float] | None:
    """Rank r gets from rank i as many rows of four bytes as i + 1, and sends each other r + 1."""
    n, r = backend.world_size, backend.rank
    group, received = world(backend), [i + 1 for i in range(n)]
    handle = backend.all_to_all(
        torch.empty(sum(received)), torch.ones(n * (r + 1)), group, received, [r + 1] * n
    )
    handle.wait()
    return handle.span


@pytest.mark.parametrize("preempt", [0.0, 0.5])
def test_an_uneven_all_to_all_has_one_price(preempt: float) -> None:
    """That of the most bytes that a member sends or receives, whoever comes last: 9 rows from rank 2."""
    for seed in range(6):
        spans = simulate(uneven, 3, seed=seed, preempt=preempt, price=lambda *args: float(args[3]))
        assert spans == [(0.0, 36.0)] * 3


def failing_child() -> None:
    """Rank 0 returns, though it was to be killed; rank 1 raises; rank 2 is killed, though nobody said so."""
    processes = connect(60)
    processes.store.set(f"here {processes.rank}", "yes")
    processes.store.wait([f"here {rank}" for rank in range(3)])
    if processes.rank == 1:
        raise ValueError("my fault")
    if processes.rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)


def hanging_child() -> None:
    time.sleep(600)


def broken_pair() -> str:
    """What rank 0 is told when rank 1 fails while it waits."""
    with (
        pytest.raises(ExecutionError) as caught,
        DistributedBackend.open("cpu", timeout_seconds=60) as backend,
    ):
        group = world(backend)
        if backend.rank == 1:
            raise ExecutionError("the loss must be finite, got nan", rank=1)
        backend.all_reduce(torch.ones(2), group).wait()
    return str(caught.value)


def late_pair() -> str:
    """What rank 0 is told when rank 1 does not come in time."""
    with DistributedBackend(processes := connect(60), device="cpu", timeout_seconds=8.0) as backend:
        if backend.rank == 0:
            with pytest.raises(ExecutionError) as caught:
                backend.recv(torch.ones(2), 1, "forward").wait()
            processes.store.set("done", "yes")
            raise SystemExit(str(caught.value))
        processes.store.wait(["done"])
        raise SystemExit("rank 1 came late")


def test_gloo_names_the_rank_that_failed() -> None:
    """A waiting rank is told at once which rank failed and why, and what it was itself doing."""
    told, _ = launch(broken_pair, 2, timeout_seconds=60)
    assert told.startswith("rank 0, action all_reduce in group world [0, 1]: rank 1 failed: ExecutionError")
    assert "the loss must be finite, got nan" in told


def test_gloo_names_what_timed_out() -> None:
    """A timeout names rank, operation, peer and channel."""
    with pytest.raises(RuntimeError, match="rank 0, action recv from rank 1 on channel 'forward'"):
        launch(late_pair, 2, timeout_seconds=60)


def test_launch_tells_failures_and_ends_stragglers() -> None:
    """What went wrong in each rank is raised; past the time, the ranks still running are named and killed."""
    with pytest.raises(RuntimeError) as caught:
        launch(failing_child, 3, killed=[0])
    assert "rank 0 failed:\nit was to be killed and returned None" in str(caught.value)
    assert re.search(r"(?s)rank 1 failed:.*ValueError: my fault", str(caught.value))
    assert "rank 2 failed:\nit ended without a result, exit code -9" in str(caught.value)
    with pytest.raises(RuntimeError, match=r"time is up.*\[0\]"):
        launch(hanging_child, 1, timeout_seconds=0.1)


def test_open_wants_torchruns_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing is named, with the remedy."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ExecutionError, match=r"missing RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: .*torchrun"
    ):
        DistributedBackend.open("cpu")
