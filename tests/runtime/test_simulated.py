"""What only the simulated world promises: determinism, reports, clocks, semantics, misuse."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from picotron.errors import ExecutionError, PlanError
from picotron.planner.cluster import ClusterSpec
from picotron.planner.faults import Kill
from picotron.runtime.backend import Backend, Group, Transfer
from picotron.runtime.messages import SEMANTICS
from picotron.runtime.ranks import simulate_ranks
from picotron.runtime.simulated import simulate


def world(backend: Backend) -> Group:
    return backend.new_group(range(backend.world_size), "world")


def row(*values: float) -> torch.Tensor:
    return torch.tensor(values)


def neighbours(backend: Backend) -> tuple[int, int]:
    """The ranks before and after this one on a ring."""
    return (backend.rank - 1) % backend.world_size, (backend.rank + 1) % backend.world_size


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert [t.name for t in threading.enumerate() if t.name.startswith("picotron")] == []


def a_cycle_of_waits(backend: Backend) -> None:
    group = backend.new_group([0, 1], "tp0")
    if backend.rank == 0:
        backend.all_reduce(torch.ones(1), group).wait()
    if backend.rank == 1:
        backend.recv(torch.ones(1), 0, "forward").wait()


@pytest.mark.parametrize("seed", range(4))
def test_a_cycle_of_waits_is_told(seed: int) -> None:
    """Rank 0 reduces with rank 1, which wants a message of rank 0 first: one report, whatever the seed."""
    with pytest.raises(ExecutionError) as caught:
        simulate(a_cycle_of_waits, 3, seed=seed)
    here = f"test_simulated.py:{a_cycle_of_waits.__code__.co_firstlineno + 3}"
    there = f"test_simulated.py:{a_cycle_of_waits.__code__.co_firstlineno + 5}"
    assert str(caught.value).splitlines() == [
        f"rank 0, action all_reduce #0 in group tp0 [0, 1], position {here}: deadlock: no rank can go on",
        "wait-for cycle: 0 -> 1 -> 0",
        f"rank 0 waits for all_reduce #0 in group tp0 [0, 1] ({here}): rank 1 is not there",
        f"rank 1 waits for recv #0 from rank 0 on channel 'forward' ({there}): rank 0 is not there",
    ]


def test_a_finished_rank_is_told() -> None:
    """Rank 2 leaves without the barrier; there is no cycle."""

    def program(backend: Backend) -> None:
        if backend.rank != 2:
            backend.barrier()

    with pytest.raises(ExecutionError) as caught:
        simulate(program, 3)
    assert "waited for: rank 2, which has returned" in str(caught.value)
    assert "rank 0 waits for barrier #0 in group world [0, 1, 2]" in str(caught.value)


def test_the_absent_rank_is_told() -> None:
    """A report names those who are waited for, and why they do not come."""

    def program(backend: Backend) -> None:
        group = world(backend)
        if backend.rank == 0:
            backend.all_reduce(torch.ones(1), group).wait()

    with pytest.raises(ExecutionError, match="rank 6, which has returned; rank 7, which has returned"):
        simulate(program, 8)


def test_every_waiting_rank_gets_the_report() -> None:
    """Each can act on it: none is merely aborted."""

    def program(backend: Backend) -> str:
        with pytest.raises(ExecutionError) as caught:
            backend.recv(torch.ones(1), 1 - backend.rank).wait()
        return str(caught.value)

    reports = simulate(program, 2)
    assert [report.startswith(f"rank {rank}, ") for rank, report in enumerate(reports)] == [True, True]
    assert all("wait-for cycle: 0 -> 1 -> 0" in report for report in reports)


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
            backend.barrier()
        return told

    for kinds, ops, dtypes, shapes in simulate(program, 3, seed=seed):
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

    expected = (
        r"rank 0 posted send #0 .* 'forward' of torch.float32 \[2\] \(test_simulated.py:\d+\); "
        r"rank 1 posted recv #0 .* 'forward' of torch.float32 \[3\]"
    )
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
    assert caught.value.__notes__ == [
        "raised on simulated rank 1 of 4",
        f"simulated, world_size=4: seed={seed} repeats this",
    ]
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
            sent = backend.send(tensor.sin() * backend.rank, before_after[1])
            handle.wait(), sent.wait()
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

    for clock_seconds, cpu_seconds in simulate(program, 4, clock="cpu"):
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
        assert all(0.03 <= seconds < 0.05 for seconds in simulate(program, 3, seed=seed, clock="cpu"))


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
        sender, receiver, idle = simulate(program, 3, seed=seed, clock="cpu")
        assert 0.03 <= receiver < 0.05 and 0.03 <= sender < 0.05 and idle < 0.02


def test_the_simulators_arithmetic_is_free() -> None:
    """Reducing 64 MB takes no virtual time on the rank that happens to come last."""

    def program(backend: Backend) -> float:
        tensor, group = torch.ones(2**24), world(backend)
        started = backend.mark()
        backend.all_reduce(tensor, group).wait()
        return backend.mark() - started

    assert max(simulate(program, 2, clock="cpu")) < 0.005


def test_a_buffered_send_takes_the_content_when_posted() -> None:
    """Once it has been waited for, writing to the tensor does not change the message."""

    def program(backend: Backend) -> float:
        tensor = row(1)
        if backend.rank == 0:
            backend.send(tensor, 1).wait()
            tensor.fill_(2)
        backend.barrier()
        if backend.rank == 1:
            backend.recv(tensor.zero_(), 0).wait()
        return tensor.item()

    assert simulate(program, 2, semantics="buffered") == [2, 1]


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
            backend.send(torch.ones(1), 1, "spin").wait()
        backend.recv(torch.ones(1), 0, "never").wait()

    with pytest.raises(ExecutionError, match=r"within 0.05 seconds, but rank 0 is running"):
        simulate(program, 2, semantics="buffered", timeout_seconds=0.05)


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
            sent = backend.send(torch.ones(1), after, "ring")
            handle.wait(), sent.wait()
        return tensor.item()

    started = time.perf_counter()
    assert simulate(program, 64, timeout_seconds=30) == [1.0] * 64
    assert time.perf_counter() - started < 5


# How the ends of a message meet.


def send_first(backend: Backend) -> float:
    """Both ranks send before they receive."""
    got = torch.empty(1)
    backend.send(row(float(backend.rank)), 1 - backend.rank).wait()
    backend.recv(got, 1 - backend.rank).wait()
    return got.item()


def send_and_receive_together(backend: Backend) -> float:
    """Both ranks post a send, then a receive, and wait for both."""
    got = torch.empty(1)
    sent = backend.send(row(float(backend.rank)), 1 - backend.rank)
    received = backend.recv(got, 1 - backend.rank)
    sent.wait(), received.wait()
    return got.item()


def send_and_receive_as_a_batch(backend: Backend) -> float:
    """The same in one batch."""
    got, peer = torch.empty(1), 1 - backend.rank
    backend.batch([Transfer("send", row(float(backend.rank)), peer), Transfer("recv", got, peer)]).wait()
    return got.item()


@pytest.mark.parametrize(
    ("program", "passes_under"),
    [
        (send_first, {"buffered"}),
        (send_and_receive_together, {"buffered", "rendezvous"}),
        (send_and_receive_as_a_batch, {"buffered", "rendezvous", "batched"}),
    ],
)
def test_the_same_program_under_each_semantics(
    program: Callable[[Backend], float], passes_under: set[str]
) -> None:
    """Blocking sends need a buffer; posted ones a queue for each direction; one batch needs neither."""
    for semantics in SEMANTICS:
        for seed in range(3):
            if semantics in passes_under:
                assert simulate(program, 2, semantics=semantics, seed=seed) == [1, 0]
            else:
                with pytest.raises(ExecutionError, match=r"deadlock(.|\n)*wait-for cycle: 0 -> 1 -> 0"):
                    simulate(program, 2, semantics=semantics, seed=seed)


def test_batches_between_two_ranks_run_in_order() -> None:
    """Rank 0 sends a then b; rank 1 takes b's channel first: nothing to do with each other, so it works."""

    def program(backend: Backend, one: str, two: str) -> list[float]:
        a, b = row(1), row(2)
        if backend.rank == 0:
            handles = [backend.send(a, 1, one), backend.send(b, 1, two)]
        else:
            handles = [backend.recv(b.zero_(), 0, two), backend.recv(a.zero_(), 0, one)]
        for handle in handles:
            handle.wait()
        return [a.item(), b.item()]

    for semantics in SEMANTICS:
        assert simulate(lambda b: program(b, "x", "y"), 2, semantics=semantics) == [[1, 2]] * 2
        assert simulate(lambda b: program(b, "x", "x"), 2, semantics=semantics) == [[1, 2], [2, 1]]


def test_a_receive_is_matched_when_posted() -> None:
    """Two receives on one channel, the second waited for first: the first still has the first message."""

    def program(backend: Backend) -> list[float]:
        first, second = torch.empty(1), torch.empty(1)
        if backend.rank == 0:
            for value in (1.0, 2.0):
                backend.send(row(value), 1).wait()
        else:
            handles = [backend.recv(first, 0), backend.recv(second, 0)]
            for handle in handles[::-1]:
                handle.wait()
        return [first.item(), second.item()]

    for semantics in SEMANTICS:
        assert simulate(program, 2, semantics=semantics)[1] == [1, 2]


# What programs do wrong.


def misused(program: Callable[[Backend], Any], *words: str, world_size: int = 2, **settings: Any) -> None:
    """Every seed refuses the program, with every word."""
    for seed in range(4):
        with pytest.raises(ExecutionError) as caught:
            simulate(program, world_size, seed=seed, **settings)
        for word in words:
            assert word in str(caught.value), str(caught.value)


def test_a_tensor_belongs_to_its_operation() -> None:
    """Changed between post and wait, by either end, before or after the others have come."""

    def change_a_sum(backend: Backend) -> None:
        tensor, group = torch.ones(4), world(backend)
        handle = backend.all_reduce(tensor, group)
        if backend.rank == 1:
            tensor.add_(1)
        handle.wait()

    def change_what_is_sent(backend: Backend) -> None:
        tensor = torch.ones(4)
        handle = backend.send(tensor, 1) if backend.rank == 0 else backend.recv(tensor, 0)
        if backend.rank == 0:
            tensor.add_(1)
        handle.wait()

    misused(
        change_a_sum, "a tensor belongs to its operation until wait has returned", "rank 1", "all_reduce #0"
    )
    for semantics in SEMANTICS:
        misused(change_what_is_sent, "belongs to its operation", "rank 0", "send #0", semantics=semantics)


def test_a_part_of_a_tensor_belongs_alone() -> None:
    """Other parts of the same memory may be written meanwhile; the part may not."""

    def program(backend: Backend, touched: slice) -> list[float]:
        whole, group = torch.ones(4), world(backend)
        handle = backend.all_reduce(whole[:2], group)
        whole[touched] += 1
        handle.wait()
        return whole.tolist()

    assert simulate(lambda backend: program(backend, slice(2, 4)), 2) == [[2, 2, 2, 2]] * 2
    misused(lambda backend: program(backend, slice(1, 3)), "belongs to its operation")


def test_every_handle_is_waited_for() -> None:
    """The first one that never was is told, with the line that posted it."""

    def program(backend: Backend) -> None:
        backend.all_reduce(torch.ones(1), world(backend))

    line = program.__code__.co_firstlineno + 1
    misused(program, "every handle must be waited for", "all_reduce #0", f"test_simulated.py:{line}")


def test_every_message_is_received() -> None:
    """A buffered send that nobody asks for is told when all have returned."""

    def program(backend: Backend) -> None:
        if backend.rank == 0:
            backend.send(torch.ones(1), 1, "x").wait()

    misused(
        program, "every message must be received", "rank 0 posted send #0 to rank 1", semantics="buffered"
    )
    misused(program, "deadlock", "rank 0 waits for send #0 to rank 1", "rank 1, which has returned")


def test_a_report_tells_what_was_posted_and_never_met() -> None:
    """Rank 0 sends to rank 2 what rank 1 waits for: the stray message is named."""

    def program(backend: Backend) -> None:
        if backend.rank == 0:
            backend.send(torch.ones(1), 2, "x").wait()
        if backend.rank == 1:
            backend.recv(torch.ones(1), 0, "x").wait()

    misused(
        program,
        "rank 1 waits for recv #0 from rank 0",
        "rank 0 posted send #0 to rank 2",
        world_size=3,
        semantics="buffered",
    )


def test_worlds_that_make_no_sense_are_refused() -> None:
    """Rule and value, before a thread is started."""
    for words, settings in {
        "semantics must be one of": {"semantics": "eager"},
        "clock must be one of": {"clock": "sundial"},
        "preempt must be a chance": {"preempt": 1.5},
        "patience_seconds must be": {"patience_seconds": -1.0},
        "memory_bytes must be": {"memory_bytes": -1},
        "seed must be": {"seed": "x"},
        "device must be": {"device": "abacus"},
        r"rank of a fault must be in \[0, 2\)": {"faults": [Kill(rank=2, at=0)]},
    }.items():
        with pytest.raises(PlanError, match=words):
            simulate(lambda backend: None, 2, **settings)


# The clock.


def test_the_planned_clock_by_hand() -> None:
    """Rank 0 computes 1 s, rank 1 3 s; a sum of 2 s starts when both have come; 1.5 s go on meanwhile."""

    def program(backend: Backend) -> tuple[float, tuple[float, float] | None]:
        backend.spend(1.0 if backend.rank == 0 else 3.0)
        handle = backend.all_reduce(torch.ones(1), world(backend))
        backend.spend(1.5)
        handle.wait()
        return backend.mark(), handle.span

    def price(kind: str, group: str, ranks: tuple[int, ...], payload_bytes: int) -> float:
        assert (kind, group, ranks, payload_bytes) == ("all_reduce", "world", (0, 1), 4)
        return 2.0

    for seed in range(4):
        assert simulate(program, 2, seed=seed, price=price) == [(5.0, (3.0, 5.0)), (5.0, (3.0, 5.0))]


def test_messages_of_one_channel_follow_each_other() -> None:
    """Two sends of 1 s posted at 0: the second arrives at 2 s; another channel is free."""

    def program(backend: Backend) -> list[tuple[float, float] | None]:
        post = backend.send if backend.rank == 0 else backend.recv
        handles = [post(torch.ones(1), 1 - backend.rank, channel) for channel in ("x", "x", "y")]
        for handle in handles:
            handle.wait()
        return [handle.span for handle in handles]

    for semantics in ("rendezvous", "batched"):
        found = simulate(program, 2, semantics=semantics, price=lambda *_: 1.0)
        assert found == [[(0, 1), (1, 2), (0, 1)]] * 2


def test_a_buffered_message_leaves_when_it_is_sent() -> None:
    """Sent at 0, 1 s long, it is there when the receiver comes at 3 s; under rendezvous it starts then."""

    def program(backend: Backend) -> float:
        if backend.rank == 0:
            backend.send(torch.ones(1), 1).wait()
        else:
            backend.spend(3.0)
            backend.recv(torch.ones(1), 0).wait()
        return backend.mark()

    assert simulate(program, 2, semantics="buffered", price=lambda *_: 1.0) == [0, 3]
    assert simulate(program, 2, semantics="rendezvous", price=lambda *_: 1.0) == [4, 4]


def test_patience_is_a_time_out_on_the_virtual_clock() -> None:
    """Rank 1 comes 10 s late: rank 0 has patience for 11 s and none for 9 s."""

    def program(backend: Backend) -> None:
        backend.spend(10.0 * backend.rank)
        backend.barrier()

    simulate(program, 2, patience_seconds=11.0)
    misused(program, "rank 0, action barrier #0", "within 9 virtual seconds", patience_seconds=9.0)


def test_a_debugger_in_a_rank_stops_the_world(tmp_path: Path) -> None:
    """pdb in rank 1: the others stand still, its state is there, and the run goes on to the end."""
    script = tmp_path / "debugged.py"
    script.write_text(
        "import pdb, torch\n"
        "from picotron import simulate_ranks\n"
        "def main(backend):\n"
        "    group, tensor = backend.new_group(range(3)), torch.ones(1) * backend.rank\n"
        "    if backend.rank == 1:\n"
        "        pdb.set_trace()\n"
        "    backend.all_reduce(tensor, group).wait()\n"
        "    return tensor.item()\n"
        "print(simulate_ranks(main, 3))\n"
    )
    found = subprocess.run(
        [sys.executable, str(script)],
        input="p 'rank', backend.rank, tensor\nc\n",
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "('rank', 1, tensor([1.]))" in found.stdout
    assert found.stdout.splitlines()[-1].endswith("[3.0, 3.0, 3.0]")


def test_a_trace_is_a_picture_of_virtual_time(tmp_path: Path) -> None:
    """Compute 1 s, a sum of 2 s under 1.5 s of computing, 0.5 s of waiting: in microseconds, by stream."""

    def program(backend: Backend) -> None:
        group = backend.new_group([0, 1], "dp")
        backend.spend(1.0)
        handle = backend.all_reduce(torch.ones(2**18), group)
        backend.spend(1.5e-4)
        handle.wait()

    cluster = ClusterSpec.preset("cpu", devices_per_node=2)
    simulate_ranks(program, 2, cluster=cluster, trace=tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    seen = [
        (names[e["pid"], e["tid"]], e["name"], round(e["ts"]), round(e["ts"] + e["dur"]))
        for e in events
        if e["ph"] == "X" and e["pid"] == 0
    ]
    assert seen == [
        ("rank", "compute", 0, 1_000_000),
        ("rank", "compute", 1_000_000, 1_000_150),
        ("rank", "wait for all_reduce #0 in group dp [0, 1]", 1_000_150, 1_000_302),
        ("group dp [0, 1]", "all_reduce #0 in group dp [0, 1]", 1_000_000, 1_000_302),
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_several_ranks_share_one_gpu() -> None:
    """Each rank's backward stays in its own thread, so a collective inside it does not block the others."""

    def program(backend: Backend) -> float:
        group = world(backend)

        class Sum(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
                return x.clone()

            @staticmethod
            def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
                total = gradient.clone()
                backend.all_reduce(total, group).wait()
                return total

        x = torch.ones(4, device=backend.device, requires_grad=True)
        Sum.apply(x * (backend.rank + 1)).sum().backward()
        assert x.grad is not None
        return x.grad.sum().item()

    assert simulate(program, 4, device="cuda", timeout_seconds=60) == [16, 32, 48, 64]
