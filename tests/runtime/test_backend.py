"""One conformance suite over the simulated and the gloo backend, then what only the simulator promises."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from picotron.errors import ExecutionError
from picotron.runtime.backend import Backend, Group
from picotron.runtime.distributed import DistributedBackend, connect
from picotron.runtime.simulated import simulate
from tests.runtime.gloo import launch

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64)
GLOO_WORLDS = (4, 3, 2, 1)
SIMULATED_WORLDS = (1, 2, 3, 4, 8)


def world(backend: Backend) -> Group:
    return backend.new_group(range(backend.world_size), "world")


def row(*values: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def neighbours(backend: Backend) -> tuple[int, int]:
    """The ranks before and after this one on a ring."""
    return (backend.rank - 1) % backend.world_size, (backend.rank + 1) % backend.world_size


def refused(call: Callable[[], object], *words: str) -> None:
    """The call raises an ExecutionError whose message has every word."""
    with pytest.raises(ExecutionError) as caught:
        call()
    for word in words:
        assert word in str(caught.value), str(caught.value)


def all_reduce_adds_takes_the_maximum_and_averages(backend: Backend) -> None:
    """On ranks holding (r, 1): sum n(n-1)/2 and n, max n-1 and 1, avg (n-1)/2 and 1."""
    n, group = backend.world_size, world(backend)
    expected = {"sum": (n * (n - 1) / 2, n), "max": (n - 1, 1), "avg": ((n - 1) / 2, 1)}
    for dtype in DTYPES:
        for op, values in expected.items():
            if op == "avg" and dtype == torch.int64:
                continue
            tensor = row(backend.rank, 1, dtype=dtype)
            backend.all_reduce(tensor, group, op).wait()
            assert tensor.tolist() == list(values), (op, dtype)


def all_gather_concatenates_in_group_order(backend: Backend) -> None:
    """Two rows a rank, along dim 0, from an input apart and from this rank's own part of the output."""
    n, group = backend.world_size, world(backend)
    for dtype in DTYPES:
        expected = torch.tensor([[r] * 3 for r in range(n) for _ in range(2)], dtype=dtype)
        output = torch.full((2 * n, 3), -1, dtype=dtype)
        backend.all_gather(output, torch.full((2, 3), backend.rank, dtype=dtype), group).wait()
        assert torch.equal(output, expected)
        whole = torch.full((2 * n, 3), -1, dtype=dtype)
        own = whole[2 * backend.rank : 2 * backend.rank + 2].fill_(backend.rank)
        backend.all_gather(whole, own, group).wait()
        assert torch.equal(whole, expected)


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
        for op, value in expected.items():
            if op == "avg" and dtype == torch.int64:
                continue
            whole = (torch.arange(n)[:, None] + backend.rank).to(dtype)
            output = torch.empty((1, 1), dtype=dtype)
            backend.reduce_scatter(output, whole, group, op).wait()
            assert output.item() == value(backend.rank), (op, dtype)
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
        assert output.tolist() == [10 * i + backend.rank for i in range(n)]


def all_to_all_takes_uneven_parts(backend: Backend) -> None:
    """Rank r sends (r + i) mod n rows of value r to rank i: some of them none."""
    n, r, group = backend.world_size, backend.rank, world(backend)
    sizes = [(r + i) % n for i in range(n)]
    output = torch.full((sum(sizes), 2), -1.0)
    backend.all_to_all(output, torch.full((sum(sizes), 2), float(r)), group, sizes, sizes).wait()
    assert output[:, 0].tolist() == [float(i) for i in range(n) for _ in range(sizes[i])]


def broadcast_copies_the_source(backend: Backend) -> None:
    """Every rank has the last rank's tensor; the source is a world rank."""
    group = world(backend)
    for dtype in DTYPES:
        tensor = row(backend.rank, 7, dtype=dtype)
        backend.broadcast(tensor, group, backend.world_size - 1).wait()
        assert tensor.tolist() == [backend.world_size - 1, 7]


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
    for dtype in DTYPES:
        for receive_first in (True, False):
            received, sent = row(-1, -1, dtype=dtype), row(backend.rank, 5, dtype=dtype)
            posts = [
                partial(backend.recv, received, before, "ring"),
                partial(backend.send, sent, after, "ring"),
            ]
            if before == backend.rank:
                continue
            for handle in [post() for post in (posts if receive_first else posts[::-1])]:
                handle.wait()
            assert received.tolist() == [before, 5]


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
    group = world(backend)
    backend.all_reduce(torch.empty(0), group).wait()
    scalar = torch.tensor(2.0)
    backend.all_reduce(scalar, group).wait()
    assert scalar.item() == 2 * backend.world_size


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
            handle = backend.recv(own, before_after[0])
            backend.send(whole[:1], before_after[1]).wait()
            handle.wait()
        backend.barrier()
    allowed = ("aten.slice.Tensor", "aten.detach.default")
    assert [name for name in recorder.seen if name not in allowed] == []


def broken_rules_are_refused_at_the_door(backend: Backend) -> None:
    """An ExecutionError that names rank, operation, rule and value, before anything is posted."""
    n, group, rank = backend.world_size, world(backend), f"rank {backend.rank}"
    ones, other = torch.ones(n), (backend.rank + 1) % n
    refused(lambda: backend.all_reduce(ones, group, "prod"), rank, "all_reduce", "op must be", "'prod'")
    refused(lambda: backend.all_reduce(ones.long(), group, "avg"), "dtype must be", "torch.int64")
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
    refused(lambda: backend.broadcast(ones, group, n), rank, "broadcast", "source", str(n))
    refused(lambda: backend.send(ones, n), rank, "send", "peer", str(n))
    refused(lambda: backend.recv(ones, backend.rank), rank, "recv", "another rank")
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
    all_gather_concatenates_in_group_order,
    reduce_scatter_gives_each_rank_its_part,
    reduce_scatter_may_write_into_its_input,
    all_to_all_transposes,
    all_to_all_takes_uneven_parts,
    broadcast_copies_the_source,
    groups_of_some_ranks_are_worlds_of_their_own,
    groups_of_equal_ranks_are_separate,
    messages_go_round_a_ring,
    receives_match_in_the_order_they_were_posted,
    channels_are_independent,
    two_in_flight_are_waited_for_in_reverse,
    empty_tensors_and_scalars_pass,
    objects_are_gathered_in_rank_order,
    clocks_go_forward,
    random_scopes_repeat,
    parameters_are_reduced_without_autograd,
    dispatch_modes_do_not_see_collectives,
    broken_rules_are_refused_at_the_door,
)

Outcomes = dict[tuple[int, str], str]


def run_cases() -> Outcomes:
    """In each process: how every case ended on every world this one is in; a failure ends its world."""
    processes, outcomes = connect(60), {}
    for world_size in GLOO_WORLDS:
        if processes.rank >= world_size:
            continue
        backend = DistributedBackend(processes, device="cpu", timeout_seconds=60, ranks=range(world_size))
        for case in CASES:
            try:
                case(backend)
                backend.barrier()
                outcomes[world_size, case.__name__] = "passed"
            except BaseException as error:
                outcomes[world_size, case.__name__] = traceback.format_exc()
                backend.abort(error)
                break
        backend.close()
    return outcomes


@pytest.fixture(scope="module")
def gloo_outcomes() -> list[Outcomes]:
    return launch(run_cases, max(GLOO_WORLDS))


@pytest.mark.parametrize("world_size", GLOO_WORLDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_gloo_conforms(
    case: Callable[[Backend], None], world_size: int, gloo_outcomes: list[Outcomes]
) -> None:
    """Every case holds on processes."""
    for outcomes in gloo_outcomes[:world_size]:
        outcome = outcomes.get((world_size, case.__name__), "not reached")
        assert outcome == "passed", outcome


@pytest.mark.parametrize("world_size", SIMULATED_WORLDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_simulated_conforms(case: Callable[[Backend], None], world_size: int) -> None:
    """Every case holds on threads, whoever goes first."""
    for seed in range(3):
        simulate(case, world_size, seed=seed)


def failing_child() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("my fault")


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
    """The failing rank's traceback is raised; past the time, the ranks still running are named and killed."""
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 failed:.*ValueError: my fault"):
        launch(failing_child, 2)
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


# What only the simulator promises.


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert [t.name for t in threading.enumerate() if t.name.startswith("picotron")] == []


def test_a_cycle_of_waits_is_told() -> None:
    """Rank 0 reduces with rank 1, which wants a message of rank 0 first."""

    def program(backend: Backend) -> None:
        group = backend.new_group([0, 1], "tp0")
        if backend.rank == 0:
            backend.all_reduce(torch.ones(1), group).wait()
        if backend.rank == 1:
            backend.recv(torch.ones(1), 0, "forward").wait()

    with pytest.raises(ExecutionError) as caught:
        simulate(program, 3)
    assert str(caught.value).split(": ", 1)[1].splitlines() == [
        "deadlock: no rank can go on",
        "rank 0 waits for all_reduce #0 in group tp0 [0, 1]: absent rank 1, "
        "which waits for recv #0 from rank 0 on channel 'forward'",
        "rank 1 waits for recv #0 from rank 0 on channel 'forward': absent rank 0, "
        "which waits for all_reduce #0 in group tp0 [0, 1]",
        "wait-for cycle: 0 -> 1 -> 0",
    ]


def test_a_finished_rank_is_told() -> None:
    """Rank 2 leaves without the barrier; there is no cycle."""

    def program(backend: Backend) -> None:
        if backend.rank != 2:
            backend.barrier()

    with pytest.raises(ExecutionError) as caught:
        simulate(program, 3)
    assert "waits for barrier #0 in group world [0, 1, 2]: absent rank 2, which has finished" in str(
        caught.value
    )
    assert str(caught.value).endswith("waited for, but finished: rank 2")


def test_the_absent_rank_is_told() -> None:
    """A report for many ranks names three absent ones and counts the others."""

    def program(backend: Backend) -> None:
        group = world(backend)
        if backend.rank == 0:
            backend.all_reduce(torch.ones(1), group).wait()

    with pytest.raises(ExecutionError, match="absent rank 3, which has finished; and 4 more absent"):
        simulate(program, 8)


def test_every_waiting_rank_gets_the_report() -> None:
    """Each can act on it: none is merely aborted."""

    def program(backend: Backend) -> str:
        with pytest.raises(ExecutionError) as caught:
            backend.recv(torch.ones(1), 1 - backend.rank).wait()
        return str(caught.value)

    reports = simulate(program, 2)
    assert [report.startswith(f"rank {rank}, ") for rank, report in enumerate(reports)] == [True, True]
    assert all(report.endswith("wait-for cycle: 0 -> 1 -> 0") for report in reports)


@pytest.mark.parametrize("seed", range(4))
def test_collectives_must_agree(seed: int) -> None:
    """Kind, op, dtype and shape: every member is told both ranks and both operations."""

    def program(backend: Backend) -> list[str]:
        told = []
        posts: list[list[Callable[[Group], Any]]] = [
            [
                lambda g: backend.all_reduce(torch.ones(2), g),
                lambda g: backend.broadcast(torch.ones(2), g, 0),
            ],
            [
                lambda g: backend.all_reduce(torch.ones(2), g, "max"),
                lambda g: backend.all_reduce(torch.ones(2), g, "sum"),
            ],
            [
                lambda g: backend.all_reduce(torch.ones(2), g),
                lambda g: backend.all_reduce(torch.ones(2).long(), g),
            ],
            [lambda g: backend.all_reduce(torch.ones(2), g), lambda g: backend.all_reduce(torch.ones(3), g)],
        ]
        for pair in posts:
            group = world(backend)
            with pytest.raises(ExecutionError) as caught:
                pair[backend.rank == 1](group).wait()
            told.append(str(caught.value))
        return told

    for rank, (kinds, ops, dtypes, shapes) in enumerate(simulate(program, 3, seed=seed)):
        assert f"rank {rank}, action" in kinds
        assert "rank 1 posted broadcast from rank 0 torch.float32 [2]" in kinds
        assert "posted all_reduce sum torch.float32 [2]" in kinds
        assert "posted all_reduce max torch.float32 [2]" in ops
        assert "rank 1 posted all_reduce sum torch.int64 [2]" in dtypes
        assert "rank 1 posted all_reduce sum torch.float32 [3]" in shapes


@pytest.mark.parametrize("seed", range(4))
def test_all_to_all_sizes_must_agree(seed: int) -> None:
    """What a member sends another the other must expect."""

    def program(backend: Backend) -> None:
        sizes = [1, 1] if backend.rank == 0 else [0, 2]
        backend.all_to_all(torch.ones(2), torch.ones(2), world(backend), [1, 1], sizes).wait()

    with pytest.raises(ExecutionError, match="member 1 sends 0 rows to member 0, which expects 1"):
        simulate(program, 2, seed=seed)


@pytest.mark.parametrize("seed", range(4))
def test_messages_must_fit_their_receive(seed: int) -> None:
    """Shape and dtype, whichever side is posted first."""

    def program(backend: Backend) -> None:
        if backend.rank == 0:
            backend.send(torch.ones(2), 1, "forward").wait()
        else:
            backend.recv(torch.ones(3), 0, "forward").wait()

    expected = r"recv #0 .* 'forward' expects torch.float32 \[3\], rank 0 sent torch.float32 \[2\]"
    with pytest.raises(ExecutionError, match=expected):
        simulate(program, 2, seed=seed)


def test_groups_must_agree() -> None:
    """Every rank opens every group in the same order."""

    def program(backend: Backend) -> None:
        backend.new_group([0, 1] if backend.rank else [1])

    with pytest.raises(ExecutionError, match=r"rank . posted new_group \[.*rank . posted new_group \["):
        simulate(program, 2)


@pytest.mark.parametrize("seed", range(4))
def test_the_first_exception_is_raised_as_it_is(seed: int) -> None:
    """The original one with its rank in a note; ranks that wait, and ranks yet to communicate, end."""
    told = []

    def program(backend: Backend) -> None:
        if backend.rank == 1:
            raise KeyError("lost")
        try:
            while True:
                backend.barrier()
        except Exception as error:
            told.append(error)
        finally:
            raise RuntimeError("a second failure, while cleaning up")

    with pytest.raises(KeyError, match="lost") as caught:
        simulate(program, 4, seed=seed)
    assert caught.value.__notes__ == ["raised on simulated rank 1 of 4"]
    assert told == []


def test_abort_ends_the_others() -> None:
    """A rank may announce its failure before it raises."""

    def program(backend: Backend) -> None:
        if backend.rank == 0:
            backend.abort(ValueError("announced"))
        backend.barrier()

    with pytest.raises(ValueError, match="announced"):
        simulate(program, 2)


def trace(seed: int) -> tuple[list[int], list[list[float]]]:
    """Who ran in which order, and what every rank computed."""
    order: list[int] = []

    def program(backend: Backend) -> list[float]:
        group, before_after = world(backend), neighbours(backend)
        generator = torch.Generator().manual_seed(backend.rank)
        tensor = torch.randn(5, generator=generator)
        for _ in range(4):
            order.append(backend.rank)
            backend.all_reduce(tensor, group, "avg").wait()
            received = torch.empty(5)
            handle = backend.recv(received, before_after[0])
            backend.send(tensor.sin() * backend.rank, before_after[1])
            handle.wait()
            tensor = received
        return tensor.tolist()

    return order, simulate(program, 5, seed=seed)


def test_a_seed_is_an_interleaving() -> None:
    """The same seed gives the same order and bits; other seeds another order and still the same bits."""
    orders, results = zip(*(trace(seed) for seed in (0, 0, 1, 2, 3)), strict=True)
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) > 1
    assert all(result == results[0] for result in results)


def test_sums_are_in_group_order() -> None:
    """((t0 + t1) + t2) + t3 to the bit, in the tensors' own dtype."""
    tensors = [torch.randn(64, generator=torch.Generator().manual_seed(r)).bfloat16() for r in range(4)]

    def program(backend: Backend) -> tuple[torch.Tensor, torch.Tensor]:
        group = world(backend)
        reduced, part = tensors[backend.rank].clone(), torch.empty(16, dtype=torch.bfloat16)
        backend.all_reduce(reduced, group).wait()
        backend.reduce_scatter(part, tensors[backend.rank], group).wait()
        return reduced, part

    expected = ((tensors[0] + tensors[1]) + tensors[2]) + tensors[3]
    for seed in range(3):
        results = simulate(program, 4, seed=seed)
        assert all(torch.equal(reduced, expected) for reduced, _ in results)
        assert torch.equal(torch.cat([part for _, part in results]), expected)


def test_exactly_one_rank_runs() -> None:
    """No two ranks are ever between two communications at once, nor is a rank on the main thread."""
    running: list[int] = []
    sys.setswitchinterval(1e-5)

    def program(backend: Backend) -> None:
        assert threading.current_thread() is not threading.main_thread()
        for _ in range(20):
            running.append(backend.rank)
            sum(range(2000))
            assert running == [backend.rank]
            running.clear()
            backend.barrier()

    try:
        simulate(program, 6)
    finally:
        sys.setswitchinterval(0.005)


def test_ranks_have_one_intra_op_thread_and_the_caller_keeps_its_own() -> None:
    """Nor do threads started later inherit the ranks' setting."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert simulate(lambda backend: torch.get_num_threads(), 2) == [1, 1]
        later: list[int] = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert (torch.get_num_threads(), later) == (2, [2])
    finally:
        torch.set_num_threads(before)


def test_global_random_state_is_rank_local() -> None:
    """Ranks draw from torch's global generator as if each were alone, and the caller's state is kept."""

    def draws(generator: torch.Generator, wait: Callable[[], None]) -> list[float]:
        generator.manual_seed(11)
        drawn = []
        for _ in range(3):
            drawn.append(torch.rand((), generator=generator).item())
            wait()
        return drawn

    expected = draws(torch.Generator(), lambda: None)
    state = torch.get_rng_state()
    for seed in range(3):
        results = simulate(lambda backend: draws(torch.default_generator, backend.barrier), 3, seed=seed)
        assert results == [expected] * 3
    assert torch.equal(torch.get_rng_state(), state)


def burn(seconds: float) -> None:
    """Spend CPU time of this thread."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def test_virtual_clocks_run_in_parallel() -> None:
    """Four ranks of 30 ms each take 30 ms of virtual time, not 120; sleeping takes none."""

    def program(backend: Backend) -> tuple[float, float]:
        burn(0.03)
        time.sleep(0.02)
        backend.barrier()
        return backend.mark(), backend.cpu_seconds()

    for clock_seconds, cpu_seconds in simulate(program, 4):
        assert 0.03 <= clock_seconds < 0.05
        assert 0.03 <= cpu_seconds < 0.05


def test_a_collective_ends_when_its_last_member_comes() -> None:
    """One rank is 30 ms late, and all have its time afterwards."""

    def program(backend: Backend) -> float:
        if backend.rank == 1:
            burn(0.03)
        backend.all_reduce(torch.ones(1), world(backend)).wait()
        return backend.mark()

    for seed in range(3):
        assert all(0.03 <= seconds < 0.05 for seconds in simulate(program, 3, seed=seed))


def test_a_receive_ends_no_earlier_than_its_send() -> None:
    """Rank 1, idle, has rank 0's posting time after the receive; rank 0 does not wait for anyone."""

    def program(backend: Backend) -> float:
        tensor = torch.ones(1)
        if backend.rank == 0:
            burn(0.03)
            backend.send(tensor, 1).wait()
            return backend.mark()
        if backend.rank == 1:
            backend.recv(tensor, 0).wait()
        return backend.mark()

    for seed in range(3):
        sender, receiver, idle = simulate(program, 3, seed=seed)
        assert 0.03 <= receiver < 0.05 and 0.03 <= sender < 0.05 and idle < 0.02


def test_the_simulators_arithmetic_is_free() -> None:
    """Reducing 64 MB takes no virtual time on the rank that happens to come last."""

    def program(backend: Backend) -> float:
        tensor, group = torch.ones(2**24), world(backend)
        started = backend.mark()
        backend.all_reduce(tensor, group).wait()
        return backend.mark() - started

    assert max(simulate(program, 2)) < 0.005


def test_a_send_takes_the_content_when_posted() -> None:
    """Writing to the tensor afterwards does not change the message."""

    def program(backend: Backend) -> float:
        tensor = row(1)
        if backend.rank == 0:
            backend.send(tensor, 1).wait()
            tensor.fill_(2)
        backend.barrier()
        if backend.rank == 1:
            backend.recv(tensor.zero_(), 0).wait()
        return tensor.item()

    assert simulate(program, 2) == [2, 1]


def test_keyboard_interrupt_ends_every_rank() -> None:
    """Ctrl-C in the main thread ends ranks that run and ranks that wait, and is raised."""

    def program(backend: Backend) -> None:
        if backend.rank == 0:
            os.kill(os.getpid(), signal.SIGINT)
        while True:
            backend.barrier()

    with pytest.raises(KeyboardInterrupt):
        simulate(program, 4)


def test_a_timeout_says_what_every_rank_does() -> None:
    """Past the host time allowed, ranks end at their next communication."""

    def program(backend: Backend) -> None:
        while backend.rank == 0:
            time.sleep(0.01)
            backend.send(torch.ones(1), 1, "spin")
        backend.recv(torch.ones(1), 0, "never").wait()

    with pytest.raises(ExecutionError, match=r"within 0.05 seconds, but rank 0 is running"):
        simulate(program, 2, timeout_seconds=0.05)


def test_a_world_has_a_rank() -> None:
    """A world of none is refused."""
    with pytest.raises(ExecutionError, match="at least 1, got 0"):
        simulate(lambda backend: None, 0)


def test_sixty_four_ranks_are_quick() -> None:
    """Eight rounds of a world reduction and a ring of messages, in seconds of host time."""

    def program(backend: Backend) -> float:
        group, (before, after) = world(backend), neighbours(backend)
        tensor = torch.ones(1)
        for _ in range(8):
            backend.all_reduce(tensor, group, "avg").wait()
            handle = backend.recv(tensor, before, "ring")
            backend.send(torch.ones(1), after, "ring")
            handle.wait()
        return tensor.item()

    started = time.perf_counter()
    assert simulate(program, 64, timeout_seconds=30) == [1.0] * 64
    assert time.perf_counter() - started < 5
