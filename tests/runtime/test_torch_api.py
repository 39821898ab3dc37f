"""Plain ``torch.distributed`` code on simulated ranks: the values of one process, and nothing left behind."""

from __future__ import annotations

import gc
import inspect
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import nn
from torch.distributed import batch_isend_irecv, destroy_process_group, init_process_group
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

from picotron.errors import ExecutionError
from picotron.runtime.backend import Backend
from picotron.runtime.simulated import simulate
from picotron.runtime.torch_api import KNOWN_TORCH, torch_world

SEMANTICS = ("buffered", "rendezvous", "batched")
Op = dist.ReduceOp


def run(function: Callable[[], Any], world_size: int, **world: Any) -> list[Any]:
    """What ``function`` returned on every rank."""

    def on_rank(backend: Backend) -> Any:
        with torch_world(backend):
            return function()

    return simulate(on_rank, world_size, timeout_seconds=60, **world)


def refused(function: Callable[[], Any], world_size: int, *words: str, **world: Any) -> None:
    with pytest.raises(ExecutionError) as caught:
        run(function, world_size, **world)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def me() -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()


def inputs(count: int, *shape: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """The tensor of every rank, the same on every rank; small whole numbers, so that sums are exact."""
    drawn = torch.randint(1, 5, (count, *shape), generator=torch.Generator().manual_seed(7))
    return list(drawn.to(dtype))


# ---------------------------------------------------------------------------------------------- collectives

FOLDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "SUM": lambda t: t.sum(0, dtype=t.dtype),
    "PRODUCT": lambda t: t.prod(0, dtype=t.dtype),
    "MIN": lambda t: t.amin(0),
    "MAX": lambda t: t.amax(0),
}
BITS = {"BAND": torch.bitwise_and, "BOR": torch.bitwise_or, "BXOR": torch.bitwise_xor}


def all_reduce_and_reduce_scatter_in_every_reduction() -> None:
    """Also what the world itself does not reduce: products, minima, bits, int16 and bool."""
    r, n = me()
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int16):
        given = inputs(n, n, 3, dtype=dtype)
        expected = {name: fold(torch.stack(given)) for name, fold in FOLDS.items()}
        if not dtype.is_floating_point:
            for name, fold in BITS.items():
                total = given[0]
                for tensor in given[1:]:
                    total = fold(total, tensor)
                expected[name] = total
        for name, value in expected.items():
            tensor = given[r].clone()
            dist.all_reduce(tensor, op=getattr(Op, name))
            assert torch.equal(tensor, value), (name, dtype)
            part = torch.empty(3, dtype=dtype)
            dist.reduce_scatter(part, [row.clone() for row in given[r]], op=getattr(Op, name))
            assert torch.equal(part, value[r]), (name, dtype)
            part = torch.empty(1, 3, dtype=dtype)
            dist.reduce_scatter_tensor(part, given[r].clone(), op=getattr(Op, name))
            assert torch.equal(part, value[r : r + 1]), (name, dtype)


def all_reduce_averages_and_multiplies_first() -> None:
    r, n = me()
    given = inputs(n, n, 2)
    mean, half = torch.stack(given).mean(0), torch.stack(given).sum(0) / 2
    for op, value in ((Op.AVG, mean), (Op.PREMUL_SUM(0.5), half)):
        tensor = given[r].clone()
        dist.all_reduce(tensor, op=op)
        assert torch.allclose(tensor, value)
        for scatter in (dist.reduce_scatter_tensor, dist.reduce_scatter_single):
            part, whole = torch.empty(1, 2), given[r].clone()
            scatter(part, whole, op=op)
            assert torch.allclose(part[0], value[r]) and torch.equal(whole, given[r])


def all_reduce_takes_numbers_bools_complex_and_nothing() -> None:
    r, n = me()
    number = torch.tensor(float(r))
    dist.all_reduce(number)
    assert number.item() == n * (n - 1) / 2
    some, every = torch.tensor([r == 0, False]), torch.tensor([True, r == 0])
    dist.all_reduce(some, op=Op.MAX)
    dist.all_reduce(every, op=Op.MIN)
    assert some.tolist() == [True, False] and every.tolist() == [True, n == 1]
    wave = torch.tensor([r + 1j])
    dist.all_reduce(wave)
    assert wave.item() == n * (n - 1) / 2 + n * 1j
    nothing = torch.empty(0)
    dist.all_reduce(nothing)


def all_gather_in_both_forms_and_both_names() -> None:
    r, n = me()
    given = inputs(n, 2, 3)
    listed = [torch.empty(2, 3) for _ in range(n)]
    dist.all_gather(listed, given[r])
    assert torch.equal(torch.stack(listed), torch.stack(given))
    for gather in (dist.all_gather_into_tensor, dist.all_gather_single):
        for shape, expected in (((2 * n, 3), torch.cat(given)), ((n, 2, 3), torch.stack(given))):
            whole = torch.empty(shape)
            gather(whole, given[r])
            assert torch.equal(whole, expected)
    uneven = [torch.empty(rank + 1) for rank in range(n)]
    dist.all_gather(uneven, torch.full((r + 1,), float(r)))
    assert [tensor.tolist() for tensor in uneven] == [[float(rank)] * (rank + 1) for rank in range(n)]


def reduce_scatter_of_uneven_lists() -> None:
    r, n = me()
    part = torch.empty(r + 1)
    dist.reduce_scatter(part, [torch.full((rank + 1,), float(r)) for rank in range(n)])
    assert part.tolist() == [n * (n - 1) / 2] * (r + 1)


def all_to_all_even_uneven_and_of_lists() -> None:
    r, n = me()
    output = torch.empty(2 * n)
    dist.all_to_all_single(output, torch.arange(2.0 * n) + 100 * r)
    assert output.tolist() == [100 * rank + 2 * r + i for rank in range(n) for i in range(2)]
    sent = torch.cat([torch.full((r + to + 1, 2), 10.0 * r + to) for to in range(n)])
    sizes = [r + rank + 1 for rank in range(n)]
    output = torch.empty(sum(sizes), 2)
    dist.all_to_all_single(output, sent, sizes, sizes)
    assert torch.equal(output, torch.cat([torch.full((s, 2), 10.0 * i + r) for i, s in enumerate(sizes)]))
    outputs = [torch.empty(size) for size in sizes]
    dist.all_to_all(outputs, [torch.full((size,), 10.0 * r + to) for to, size in enumerate(sizes)])
    assert [tensor.tolist() for tensor in outputs] == [[10.0 * i + r] * s for i, s in enumerate(sizes)]


def broadcast_reduce_gather_and_scatter_from_every_root() -> None:
    r, n = me()
    for root in range(n):
        tensor = torch.full((2, 2), float(r))
        dist.broadcast(tensor, root)
        assert tensor.tolist() == [[root] * 2] * 2
        tensor = torch.tensor([float(r)])
        dist.reduce(tensor, root)
        assert tensor.item() == (n * (n - 1) / 2 if r == root else r)
        listed = [torch.empty(2) for _ in range(n)] if r == root else None
        dist.gather(torch.tensor([r, root], dtype=torch.float32), listed, dst=root)
        assert listed is None or [t.tolist() for t in listed] == [[rank, root] for rank in range(n)]
        part = torch.empty(2)
        whole = [torch.tensor([rank, root], dtype=torch.float32) for rank in range(n)] if r == root else None
        dist.scatter(part, whole, src=root)
        assert part.tolist() == [r, root]


def objects_travel() -> None:
    r, n = me()
    everyone: list[Any] = [None] * n
    dist.all_gather_object(everyone, {"rank": r})
    assert everyone == [{"rank": rank} for rank in range(n)]
    shared = [r, "a"] if r == n - 1 else [None, None]
    dist.broadcast_object_list(shared, src=n - 1)
    assert shared == [n - 1, "a"]
    mine: list[Any] = [None]
    dist.scatter_object_list(mine, list(range(n)) if r == 0 else None, src=0)
    gathered: list[Any] | None = [None] * n if r == 0 else None
    dist.gather_object(mine[0] * 2, gathered, dst=0)
    assert mine == [r] and (gathered is None or gathered == [2 * rank for rank in range(n)])


def coalesced_calls() -> None:
    r, n = me()
    first, second = torch.full((2,), float(r)), torch.full((3,), float(r))
    dist.all_reduce_coalesced([first, second])
    outputs = [[torch.empty(2), torch.empty(3)] for _ in range(n)]
    dist.all_gather_coalesced(outputs, [first + r, second + r])
    total = n * (n - 1) / 2
    assert first.tolist() == [total] * 2 and second.tolist() == [total] * 3
    assert [[t.tolist() for t in row] for row in outputs] == [
        [[total + rank] * 2, [total + rank] * 3] for rank in range(n)
    ]
    with dist._coalescing_manager(async_ops=True) as manager:
        wholes = [torch.empty(n), torch.empty(2 * n)]
        dist.all_gather_into_tensor(wholes[0], torch.tensor([float(r)]))
        dist.all_gather_into_tensor(wholes[1], torch.tensor([float(r)] * 2))
    manager.wait()
    with dist._coalescing_manager(device=torch.device("cpu")):
        dist.broadcast(first, 0)
        parts = [torch.empty(1)]
        dist.reduce_scatter_tensor(parts[0], torch.ones(n))
    assert wholes[0].tolist() == list(range(n)) and parts[0].item() == n


def functional_collectives() -> None:
    """What compilers and DTensor are made of, gradients included."""
    r, n = me()
    group, total = dist.group.WORLD, n * (n - 1) / 2
    assert (funcol.all_reduce(torch.full((2,), float(r)), "sum", group) + 0).tolist() == [total] * 2
    gathered = funcol.all_gather_tensor(torch.tensor([float(r)]), 0, group)
    assert (gathered + 0).tolist() == list(range(n))
    assert (funcol.reduce_scatter_tensor(torch.arange(float(n)), "sum", 0, group) + 0).item() == n * r
    exchanged = funcol.all_to_all_single(torch.arange(float(n)) + 10 * r, None, None, group)
    assert (exchanged + 0).tolist() == [10 * rank + r for rank in range(n)]
    by_ranks = funcol.all_reduce(torch.tensor([float(r)]), "sum", list(range(n)))
    assert (by_ranks + 0).item() == total and dist.get_pg_count() == 1
    assert (funcol.broadcast(torch.tensor([float(r)]), n - 1, group) + 0).item() == n - 1
    pair = [torch.full((n,), float(r)), torch.full((2 * n,), float(r))]
    coalesced = (
        *funcol.all_reduce_coalesced(pair, "sum", group),
        *funcol.reduce_scatter_tensor_coalesced(pair, "sum", [0, 0], group),
    )
    assert [(t + 0).tolist() for t in coalesced] == [[total] * size for size in (n, 2 * n, 1, 2)]
    weight = torch.ones(2, requires_grad=True)
    (funcol.all_gather_tensor_autograd(weight * (r + 1), 0, group)).sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [n * (r + 1)] * 2


def works_and_futures() -> None:
    """A work asked, in any way, has waited; one that nobody asks is waited for at the end."""
    r, n = me()
    dropped = torch.tensor([float(r)])
    dist.all_reduce(dropped, async_op=True)
    asks: tuple[Callable[[Any], Any], ...] = (
        lambda work: work.wait(),
        lambda work: work.is_completed(),
        lambda work: work.result(),
        lambda work: work.get_future().wait(),
        lambda work: work.get_future().done(),
        lambda work: work.get_future().then(lambda future: future.value()).value(),
    )
    for ask in asks:
        tensor = torch.tensor([float(r)])
        work = dist.all_reduce(tensor, async_op=True)
        ask(work)
        assert tensor.item() == n * (n - 1) / 2
        assert work.wait() and work.get_future().value()[0] is tensor
    listed = [torch.empty(1) for _ in range(n)]
    work = dist.all_gather(listed, torch.tensor([float(r)]), async_op=True)
    work.wait()
    assert [t.item() for t in listed] == list(range(n))
    dist.barrier()
    dist.barrier(async_op=True).wait()


def subgroups() -> None:
    """Groups within the world: ranks within them, messages between global ranks, their end."""
    r, n = me()
    evens, odds = list(range(0, n, 2)), list(range(1, n, 2))
    groups = [dist.new_group(members, backend="gloo") for members in (evens, odds) if members]
    mine = evens if r in evens else odds
    group = groups[r % 2]
    assert dist.get_world_size(group) == len(mine) and dist.get_rank(group) == mine.index(r)
    assert dist.get_process_group_ranks(group) == mine
    tensor = torch.tensor([float(r)])
    dist.all_reduce(tensor, group=group)
    assert tensor.item() == sum(mine)
    outside = groups[1 - r % 2] if len(groups) > 1 else None
    assert outside is None or outside == dist.GroupMember.NON_GROUP_MEMBER
    tensor = torch.tensor([float(r)])
    dist.broadcast(tensor, src=mine[-1], group=group)
    assert tensor.item() == mine[-1]
    before, after = mine[mine.index(r) - 1], mine[(mine.index(r) + 1) % len(mine)]
    if len(mine) > 1:
        received = torch.empty(1)
        ops = [
            dist.P2POp(dist.isend, torch.tensor([float(r)]), after, group),
            dist.P2POp(dist.irecv, received, before, group),
        ]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        assert received.item() == before
    destroy_process_group(group)
    with pytest.raises(ValueError):
        dist.get_rank(group)
    dist.all_reduce(tensor)


def groups_in_an_order_of_their_own() -> None:
    """With sort_ranks=False group rank i is the i-th rank given, in every collective."""
    r, n = me()
    order = [*range(1, n), 0]
    group = dist.new_group(order, sort_ranks=False)
    own = order.index(r)
    assert dist.get_rank(group) == own
    listed = [torch.empty(1) for _ in range(n)]
    dist.all_gather(listed, torch.tensor([float(r)]), group=group)
    whole = torch.empty(n)
    dist.all_gather_into_tensor(whole, torch.tensor([float(r)]), group=group)
    assert [t.item() for t in listed] == whole.tolist() == order
    part = torch.empty(1)
    dist.reduce_scatter_tensor(part, torch.arange(float(n)), group=group)
    assert part.item() == n * own
    received = torch.empty(n)
    dist.all_to_all_single(received, torch.arange(float(n)) + 10 * r, group=group)
    assert received.tolist() == [10 * rank + own for rank in order]
    dist.scatter(part, [torch.tensor([float(i)]) for i in range(n)] if r == 0 else None, src=0, group=group)
    assert part.item() == own


COLLECTIVES = (
    all_reduce_and_reduce_scatter_in_every_reduction,
    all_reduce_averages_and_multiplies_first,
    all_reduce_takes_numbers_bools_complex_and_nothing,
    all_gather_in_both_forms_and_both_names,
    reduce_scatter_of_uneven_lists,
    all_to_all_even_uneven_and_of_lists,
    broadcast_reduce_gather_and_scatter_from_every_root,
    objects_travel,
    coalesced_calls,
    functional_collectives,
    works_and_futures,
    subgroups,
    groups_in_an_order_of_their_own,
)


@pytest.mark.filterwarnings("ignore:`torch.distributed.*:FutureWarning")  # older names are used still
@pytest.mark.filterwarnings("ignore:The combination of ranks:FutureWarning")
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("function", COLLECTIVES, ids=lambda function: function.__name__)
def test_collectives_give_the_values_of_one_process(function: Callable[[], None], world_size: int) -> None:
    run(function, world_size, seed=world_size)


# ------------------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_a_batch_goes_round_a_ring_under_every_semantics(semantics: str) -> None:
    """The function has batch_isend_irecv by name from before; both orders within a batch do."""

    def ring() -> None:
        r, n = me()
        received = torch.empty(2)
        ops = [
            dist.P2POp(dist.isend, torch.full((2,), float(r)), (r + 1) % n),
            dist.P2POp(dist.irecv, received, (r - 1) % n),
        ]
        for work in batch_isend_irecv(ops if r % 2 else ops[::-1]):
            work.wait()
        assert received.tolist() == [(r - 1) % n] * 2

    run(ring, 2, semantics=semantics)
    run(ring, 5, semantics=semantics)


def test_lone_messages_that_cross_need_a_batch_under_batched_semantics() -> None:
    def crossing() -> None:
        r, _ = me()
        works = [dist.isend(torch.ones(1), 1 - r), dist.irecv(torch.empty(1), 1 - r)]
        for work in works:
            work.wait()

    run(crossing, 2, semantics="rendezvous")
    refused(crossing, 2, "deadlock", semantics="batched")


def test_tags_are_channels_and_receives_match_in_order_of_posting() -> None:
    def talk() -> list[float]:
        if dist.get_rank() == 0:
            for value, tag in ((1.0, 5), (2.0, 6), (3.0, 5)):
                dist.isend(torch.tensor([value]), 1, tag=tag)
            return []
        tensors = [torch.empty(1) for _ in range(3)]
        works = [dist.irecv(t, 0, tag=tag) for t, tag in zip(tensors, (6, 5, 5), strict=True)]
        for work in reversed(works):
            work.wait()
        assert works[0]._source_rank() == 0
        return [tensor.item() for tensor in tensors]

    assert run(talk, 2)[1] == [2.0, 1.0, 3.0]


def test_send_and_recv_block() -> None:
    def relay() -> float:
        r, n = me()
        token = torch.zeros(1)
        if r > 0:
            assert dist.recv(token, r - 1) == r - 1
        token += r
        if r < n - 1:
            dist.send(token, r + 1)
        return token.item()

    assert run(relay, 4) == [0, 1, 3, 6]


# ------------------------------------------------------------------------------------------------ meshes


def test_a_mesh_of_two_dims_has_a_group_for_every_row_and_column() -> None:
    def on_mesh() -> None:
        r, _ = me()
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("row", "column"))
        tensors = torch.tensor([float(r)]), torch.tensor([float(r)])
        dist.all_reduce(tensors[0], group=mesh.get_group("column"))
        dist.all_reduce(tensors[1], group=mesh.get_group("row"))
        assert [t.item() for t in tensors] == [(r // 2) * 4 + 1, (r % 2) * 2 + 2]
        assert mesh["row"].get_local_rank() == r // 2 and mesh["column"].get_local_rank() == r % 2
        torch.manual_seed(0)
        matrix = torch.randn(7, 5)
        spread = distribute_tensor(matrix, mesh, [Shard(0), Shard(1)])
        assert torch.equal(spread.full_tensor(), matrix)
        product = (spread @ spread.t()).full_tensor()
        assert torch.allclose(product, matrix @ matrix.t(), atol=1e-6)
        moved = spread.redistribute(mesh, [Replicate(), Shard(0)])
        assert torch.equal(moved.full_tensor(), matrix)

    run(on_mesh, 4)


def test_equal_meshes_of_two_ranks_are_unlike() -> None:
    """Torch keeps results by mesh in caches that all threads share."""
    meshes: list[DeviceMesh] = run(lambda: init_device_mesh("cpu", (2,)), 2)
    assert meshes[0] != meshes[1]


# ------------------------------------------------------------------------------------------------- training

STEPS = 3


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(16, 16, generator=generator), torch.randn(16, 16, generator=generator)


def network(depth: int = 2) -> nn.Sequential:
    torch.manual_seed(1)
    layers = [layer for _ in range(depth) for layer in (nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))]
    return nn.Sequential(*layers)


def train(model: Any, x: torch.Tensor, y: torch.Tensor, mean: bool = False) -> list[float]:
    """Losses of some steps, averaged over the ranks if ``mean``."""
    optimizer = torch.optim.SGD(model.parameters(), 0.2, foreach=False)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        shown = loss.detach().clone()
        if mean:
            dist.all_reduce(shown, op=Op.AVG)
        losses.append(shown.item())
    return losses


def share(tensor: torch.Tensor) -> torch.Tensor:
    r, n = me()
    return tensor.chunk(n)[r]


def gradients(model: nn.Module) -> list[torch.Tensor]:
    grads = [parameter.grad for parameter in model.parameters()]
    return [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in grads if grad is not None]


def close(one: list[Any], other: list[Any]) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def alone(data: tuple[torch.Tensor, torch.Tensor]) -> tuple[list[float], list[torch.Tensor]]:
    """Losses of a single process, and the gradients of its last step."""
    model = network()
    return train(model, *data), gradients(model)


def test_ddp_trains_as_one_process(data: Any, alone: Any) -> None:
    """Small buckets, so that several are under way; with and without a view of them, and a static graph."""

    def on_rank(**options: Any) -> tuple[list[float], list[torch.Tensor]]:
        model = DistributedDataParallel(network(), bucket_cap_mb=0.002, **options)
        return train(model, *map(share, data), mean=True), gradients(model.module)

    for options in ({}, {"static_graph": True, "gradient_as_bucket_view": True}):
        for losses, grads in run(lambda options=options: on_rank(**options), 4):
            close(losses, alone[0])
            close(grads, alone[1])


def test_hooks_of_ddp_may_chain_and_wait_for_futures() -> None:
    """Those of torch, and one that waits for what it has chained in the midst of backward."""

    def impatient(_, bucket):  # type: ignore[no-untyped-def]  # torch reads annotations as they stand
        future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        halved = future.then(lambda done: done.value()[0] / dist.get_world_size())
        assert torch.is_tensor(halved.wait()) and halved.done()
        return halved

    def on_rank(hook: Any, state: Any) -> list[torch.Tensor]:
        model = DistributedDataParallel(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), bucket_cap_mb=1e-4)
        model.register_comm_hook(state() if state else None, hook)
        for step in range(4):
            model.zero_grad()
            model(torch.full((2, 8), float(dist.get_rank() + step))).sum().backward()
        return gradients(model.module)

    plain = run(lambda: on_rank(default_hooks.allreduce_hook, None), 2)[0]
    for hook in (impatient, default_hooks.fp16_compress_hook):
        found = run(lambda hook=hook: on_rank(hook, None), 2)
        for grad, other, expected in zip(*found, plain, strict=True):
            assert torch.equal(grad, other)
            torch.testing.assert_close(grad, expected, rtol=1e-2, atol=1e-2)

    def state() -> powerSGD_hook.PowerSGDState:
        return powerSGD_hook.PowerSGDState(None, 1, start_powerSGD_iter=2)

    one, other = run(lambda: on_rank(powerSGD_hook.powerSGD_hook, state), 2)
    assert all(map(torch.equal, one, other))


def test_ddp_overlaps_on_the_virtual_clock() -> None:
    """Eight layers, a second backward and a second's reduction each: nine seconds, not sixteen."""

    def on_rank(backend: Backend) -> float:
        with torch_world(backend):
            layers = [nn.Linear(4, 4, bias=False) for _ in range(8)]
            model = DistributedDataParallel(nn.Sequential(*layers), bucket_cap_mb=1e-6)
            for layer in layers:
                layer.weight.register_hook(lambda grad: backend.spend(1.0))
            for _ in range(2):  # the first pass makes the buckets
                output, before = model(torch.ones(1, 4)), backend.mark()
                output.sum().backward()
            return backend.mark() - before

    def price(kind: str, name: str, ranks: tuple[int, ...], size: int) -> float:
        return 1.0 if kind == "all_reduce" else 0.0

    assert simulate(on_rank, 2, price=price) == [9.0, 9.0]


def test_fully_shard_trains_as_one_process(data: Any, alone: Any) -> None:
    """Flat over four ranks, and over two that are replicated."""

    def on_rank(shape: tuple[int, ...]) -> tuple[list[float], list[torch.Tensor]]:
        model, mesh = (
            network(),
            init_device_mesh("cpu", shape, mesh_dim_names=("rows", "columns")[: len(shape)]),
        )
        for layer in (*[layer for layer in model if isinstance(layer, nn.Linear)], model):
            fully_shard(layer, mesh=mesh)
        return train(model, *map(share, data), mean=True), gradients(model)

    for shape in ((4,), (2, 2)):
        for losses, grads in run(lambda shape=shape: on_rank(shape), 4):
            close(losses, alone[0])
            close(grads, alone[1])


def test_tensor_parallel_modules_train_as_one_process(data: Any, alone: Any) -> None:
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel(), "3": ColwiseParallel(), "5": RowwiseParallel()}

    def on_rank() -> tuple[list[float], list[torch.Tensor]]:
        model = parallelize_module(network(), init_device_mesh("cpu", (4,)), plan)
        return train(model, *data), gradients(model)

    for losses, grads in run(on_rank, 4):
        close(losses, alone[0])
        close(grads, alone[1])


def blocks(count: int) -> list[nn.Module]:
    torch.manual_seed(2)
    return [nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)) for _ in range(count)]


def pipeline(
    schedule: Any,
    mine: list[int],
    total: int,
    data: tuple[torch.Tensor, torch.Tensor],
    *,
    group: Any = None,
    prepare: Callable[[nn.Module], Any] = lambda block: block,
) -> list[float]:
    """Losses of some steps of torch's own pipeline, on the rank that has the last stage."""
    parts = {i: prepare(block) for i, block in enumerate(blocks(total)) if i in mine}
    stages = [PipelineStage(parts[i], i, total, torch.device("cpu"), group=group) for i in mine]
    optimizer = torch.optim.SGD([p for part in parts.values() for p in part.parameters()], 0.2, foreach=False)
    runner = schedule(stages if len(stages) > 1 else stages[0], n_microbatches=4, loss_fn=mse_loss)
    told = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        losses: list[torch.Tensor] = []
        arguments = (data[0],) if 0 in mine else ()
        runner.step(*arguments, **({"target": data[1], "losses": losses} if total - 1 in mine else {}))
        optimizer.step()
        told += [torch.stack(losses).mean().item()] if losses else []
    return told


PIPELINES: dict[str, tuple[Any, int, Callable[[int], list[int]]]] = {
    "GPipe": (ScheduleGPipe, 4, lambda r: [r]),
    "1F1B": (Schedule1F1B, 4, lambda r: [r]),
    "interleaved": (ScheduleInterleaved1F1B, 2, lambda r: [r, r + 2]),
    "ZBV": (ScheduleZBVZeroBubble, 2, lambda r: [r, 3 - r]),
}


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_of_torch_train_as_one_process(name: str, semantics: str, data: Any) -> None:
    schedule, world_size, mine = PIPELINES[name]
    results = run(lambda: pipeline(schedule, mine(dist.get_rank()), 4, data), world_size, semantics=semantics)
    (losses,) = [result for result in results if result]
    close(losses, train(nn.Sequential(*blocks(4)), *data))


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")  # of a view that nobody writes to
def test_sharded_data_pipeline_and_tensor_parallel_together(data: Any) -> None:
    """fully_shard over 2, 1F1B over 2, DTensor over 2: eight ranks, the losses of one process."""

    def on_rank() -> list[float]:
        mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("dp", "pp", "tp"))
        rows = tuple(tensor.chunk(2)[mesh["dp"].get_local_rank()] for tensor in data)

        def prepare(block: nn.Module) -> Any:
            parallelize_module(block, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
            return fully_shard(block, mesh=mesh["dp"])

        stage = mesh["pp"].get_local_rank()
        losses = pipeline(Schedule1F1B, [stage], 2, rows, group=mesh["pp"].get_group(), prepare=prepare)
        if losses:
            shown = torch.tensor(losses)
            dist.all_reduce(shown, op=Op.AVG, group=mesh["dp"].get_group())
            losses = shown.tolist()
        return losses

    found = [losses for losses in run(on_rank, 8) if losses]
    assert len(found) == 4
    for losses in found:
        close(losses, train(nn.Sequential(*blocks(2)), *data))


# ------------------------------------------------------------------------------- determinism and randomness


def test_every_seed_gives_the_same_bits(data: Any) -> None:
    def on_rank() -> list[float]:
        return train(DistributedDataParallel(network(), bucket_cap_mb=0.002), *map(share, data), mean=True)

    first = run(on_rank, 3, seed=0)
    assert first == run(on_rank, 3, seed=0) == run(on_rank, 3, seed=1, preempt=0.5)


def test_every_rank_draws_its_own_numbers() -> None:
    """Communication in between does not mix them: they are those of a process alone."""

    def on_rank() -> list[float]:
        torch.manual_seed(dist.get_rank())
        drawn = []
        for _ in range(4):
            drawn.append(torch.rand(()).item())
            dist.barrier()
        return drawn

    def by_itself(rank: int) -> list[float]:
        generator = torch.Generator().manual_seed(rank)
        return [torch.rand((), generator=generator).item() for _ in range(4)]

    assert run(on_rank, 3) == [by_itself(rank) for rank in range(3)]


# ------------------------------------------------------------------------------------------ what goes wrong


def at_rank_one(call: Callable[[], object], otherwise: Callable[[], object]) -> Callable[[], None]:
    def on_rank() -> None:
        _ = call() if dist.get_rank() == 1 else otherwise()

    return on_rank


def test_a_deadlock_is_told_at_once() -> None:
    """Who waits for whom, at which line, also out of C++ in the midst of backward."""
    started = time.monotonic()
    here = "test_torch_api.py"
    refused(at_rank_one(lambda: None, dist.barrier), 2, "deadlock", "rank 1", "returned", "all_reduce", here)
    refused(
        at_rank_one(lambda: dist.recv(torch.empty(1), 0, tag=3), lambda: None), 2, "deadlock", "tag 3", here
    )

    def half_backward() -> None:
        model = DistributedDataParallel(nn.Linear(2, 2))
        loss = model(torch.ones(1, 2)).sum()
        if dist.get_rank() == 0:
            loss.backward()

    refused(half_backward, 2, "deadlock", "all_reduce", here)
    assert time.monotonic() - started < 10


def test_collectives_that_differ_are_refused() -> None:
    sum_of = lambda size: lambda: dist.all_reduce(torch.ones(size))  # noqa: E731
    refused(at_rank_one(sum_of(3), sum_of(4)), 2, "same collective", "[3]", "[4]")
    gather = lambda: dist.all_gather([torch.empty(3)] * 2, torch.ones(3))  # noqa: E731
    refused(at_rank_one(sum_of(3), gather), 2, "all_reduce", "all_gather")


def test_what_is_not_simulated_says_so() -> None:
    refused(lambda: dist.new_group([0, 1], use_local_synchronization=True), 2, "every rank")
    refused(lambda: dist.recv(torch.empty(1)), 2, "name src")
    refused(lambda: dist.all_reduce(torch.ones(2, dtype=torch.int64), op=Op.AVG), 2, "SUM and divide")
    refused(lambda: dist.all_reduce(torch.ones(2, 3).t()), 2, "contiguous")


def test_the_error_of_a_rank_comes_out() -> None:
    def fail() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run(at_rank_one(fail, dist.barrier), 3)


# -------------------------------------------------------------------------------------- beginning and end


def test_a_function_may_initialise_and_destroy() -> None:
    """By names imported before; for whatever backend; and once more after an end."""

    def on_rank() -> list[float]:
        assert dist.is_initialized()
        init_process_group("nccl", world_size=2)
        with pytest.raises(ValueError, match="once"):
            dist.init_process_group()
        sums = []
        for _ in range(2):
            tensor = torch.tensor([1.0 + dist.get_rank()])
            dist.all_reduce(tensor)
            sums.append(tensor.item())
            destroy_process_group()
            assert not dist.is_initialized()
            init_process_group(backend="gloo", rank=-1)
        destroy_process_group()
        return sums

    assert run(on_rank, 2) == [[3.0, 3.0]] * 2
    refused(lambda: init_process_group("gloo", world_size=3), 2, "world_size", "2", "3")


@pytest.fixture
def quiet_ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # init_process_group wraps it
    torch._C._distributed_c10d._set_thread_isolation_mode(False)  # as in a new process
    yield
    if dist.is_initialized():
        destroy_process_group()


def initialise_gloo() -> None:
    init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    tensor = torch.ones(2)
    dist.all_reduce(tensor)
    assert tensor.tolist() == [1.0, 1.0] and dist.get_backend() == "gloo"


@pytest.mark.usefixtures("quiet_ends")
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_the_world_is_left(fails: bool) -> None:
    """After a run, or an error in its midst, torch.distributed is as it was."""
    functions = [inspect.unwrap(f) for f in (init_process_group, batch_isend_irecv)]
    before = [(f.__code__, f.__defaults__) for f in functions]
    state = dist.distributed_c10d._world

    def on_rank() -> None:
        dist.new_group([0])
        dist.all_reduce(torch.ones(1), async_op=True)
        if fails and dist.get_rank() == 1:
            raise KeyError
        dist.barrier()

    with pytest.raises(KeyError) if fails else nullcontext():
        run(on_rank, 3)
    assert not dist.is_initialized() and dist.distributed_c10d._world is state
    assert [(f.__code__, f.__defaults__) for f in functions] == before
    initialise_gloo()


@pytest.mark.parametrize("fails", [False, True])
def test_groups_and_work_that_nobody_waited_for_are_freed(fails: bool) -> None:
    """Torch keeps both in registries of C++, which know nothing of a thread's end."""
    groups: weakref.WeakSet[Any] = weakref.WeakSet()

    def on_rank() -> None:
        groups.update([dist.group.WORLD, dist.new_group([0, 1])])
        funcol.all_reduce(torch.ones(1), "sum", dist.group.WORLD)
        if fails and dist.get_rank() == 1:
            raise KeyError
        dist.barrier()

    with pytest.raises(KeyError) if fails else nullcontext():
        run(on_rank, 2)
    for _ in range(3):
        gc.collect()
    assert not groups


@pytest.mark.usefixtures("quiet_ends")
def test_groups_that_the_process_had_stay() -> None:
    """Ranks do not see them, other threads do, and they go on afterwards."""
    initialise_gloo()
    seen = []

    def elsewhere() -> None:
        with pytest.raises(ValueError, match="twice"):
            init_process_group("gloo")
        seen.append(dist.get_world_size())

    def on_rank() -> int:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        return dist.get_world_size()

    assert run(on_rank, 2) == [2, 2] and seen == [1, 1]
    tensor = funcol.all_reduce(torch.ones(1), "sum", dist.group.WORLD)
    assert dist.get_backend() == "gloo" and (tensor + 0).item() == 1.0


def test_a_world_is_entered_once_at_a_time() -> None:
    def on_rank(backend: Backend) -> None:
        with torch_world(backend), torch_world(backend):
            pass

    with pytest.raises(ExecutionError, match="twice"):
        simulate(on_rank, 2)
    run(dist.barrier, 2)


def test_a_torch_that_lacks_a_part_is_refused_by_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch.__version__.split("+")[0] in KNOWN_TORCH
    monkeypatch.delattr(dist.distributed_c10d, "_register_pg_in_world")
    refused(lambda: None, 1, *KNOWN_TORCH, "_register_pg_in_world")
