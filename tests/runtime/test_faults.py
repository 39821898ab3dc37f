"""What each fault does to simulated ranks, by examples worked by hand, and what it does to real processes.

In the examples communication has prices that binary fractions hold, so that clocks are equal, not near.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from attrs import evolve

import picotron as pt
from picotron.errors import ExecutionError
from picotron.planner.faults import Corrupt, Drop, Fault, Kill, OutOfMemory, Pause, Slow
from picotron.planner.plan import TrainingPlan
from picotron.planner.prices import plan_price
from picotron.planner.program import rows
from picotron.runtime import watchdog
from picotron.runtime.backend import Backend, Group, Handle, Transfer
from picotron.runtime.distributed import DistributedBackend, connect
from picotron.runtime.fuzz import digest
from picotron.runtime.memory import OutOfMemoryError
from picotron.runtime.messages import SEMANTICS, Semantics
from picotron.runtime.pipeline import LossError, Session
from picotron.runtime.run import run_rank
from picotron.runtime.simulated import simulate, simulation
from picotron.runtime.world import Simulation, World
from tests.runtime.gloo import STOPPED_SECONDS, StruckBackend, launch
from tests.runtime.models import random_samples, random_weights, tiny_model, tiny_plan, tiny_workload

SECONDS = {"send": 2.0, "all_reduce": 5.0}


def price(kind: str, group: str, ranks: tuple[int, ...], payload_bytes: int) -> float:
    return SECONDS[kind]


def world(backend: Backend) -> Group:
    return backend.new_group(range(backend.world_size), "world")


def row(*values: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def struck(
    function: Callable[[Backend], Any], world_size: int, *faults: Fault, **settings: Any
) -> Simulation[Any]:
    """What becomes of ``function`` on ranks that ``faults`` strike."""
    return simulation(function, world_size, World(faults=faults, **settings), timeout_seconds=60)


def relay(backend: Backend) -> tuple[float, float]:
    """All compute 1 s, a number goes 0 -> 1 -> 2 and grows, and all sum: the sum, and the clock then.

    1..3 s to rank 1, 3..5 s to rank 2, 5..10 s the sum: 1 + 2 + 3.
    """
    group = world(backend)  # operation 0
    backend.spend(1.0)
    value = row(0)
    if backend.rank > 0:
        backend.recv(value, backend.rank - 1, "relay").wait()  # operation 1 on ranks 1 and 2
    value += 1
    if backend.rank < 2:
        backend.send(value, backend.rank + 1, "relay").wait()  # operation 1 on rank 0, 2 on rank 1
    backend.all_reduce(value, group).wait()  # operation 2 on ranks 0 and 2, 3 on rank 1
    return value.item(), backend.mark()


def told(backend: Backend) -> str:
    """What the relay tells a rank: its error, or its result."""
    try:
        return str(relay(backend))
    except ExecutionError as error:
        return str(error)


# Kill: a rank is gone.


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("seed", range(3))
def test_who_needs_a_killed_rank_is_told_at_once(seed: int, semantics: Semantics) -> None:
    """Rank 1 dies before it passes the number on: rank 2 waits for that, rank 0 already for the sum."""
    run = struck(told, 3, Kill(rank=1, at=2), seed=seed, preempt=seed / 4, semantics=semantics, price=price)
    assert [outcome.killed for outcome in run.outcomes] == [False, True, False]
    assert run.outcomes[1].result is None and run.outcomes[1].error is None
    first, _, last = (outcome.result for outcome in run.outcomes)
    assert first.startswith("rank 0, action all_reduce #0 in group world [0, 1, 2], position test_faults.py:")
    assert last.startswith("rank 2, action recv #0 from rank 1 on channel 'relay', position test_faults.py:")
    assert first.endswith("rank 1 was killed by a fault at operation 2")
    assert last.endswith("rank 1 was killed by a fault at operation 2")


@pytest.mark.parametrize("at", range(4))
def test_a_kill_anywhere_is_raised_to_the_caller(at: int) -> None:
    """Before the group is open, before each message and before the sum: never a hang, always its name."""
    for seed in range(3):
        with pytest.raises(ExecutionError, match=f"rank 1 was killed by a fault at operation {at}\n"):
            simulate(relay, 3, faults=[Kill(rank=1, at=at)], seed=seed, timeout_seconds=60)


def test_a_kill_that_nobody_notices_is_an_error_still() -> None:
    """Rank 1 dies after all its operations, in a row of its plan; the others have their results."""

    def program(backend: Backend) -> int:
        if backend.rank == 1:
            backend.send(row(1), 0).wait()
            backend.at(0, 7, "2B5")
        elif backend.rank == 0:
            backend.recv(row(0), 1).wait()
        return backend.rank

    run = struck(program, 3, Kill(rank=1, at=7))
    assert [outcome.result for outcome in run.outcomes] == [0, None, 2]
    assert isinstance(run.failure, ExecutionError)
    assert str(run.failure) == "rank 1: the rank was killed by a fault at step 0, row 7, 2B5"


def test_what_was_complete_before_a_kill_stays_so() -> None:
    """Rank 0 waited for its send, which rank 1 therefore has: both waits of rank 1 come later."""

    def program(backend: Backend) -> list[float | str]:
        got: list[float | str] = []
        if backend.rank == 0:
            backend.send(row(7), 1).wait()
            backend.send(row(8), 1).wait()
        else:
            tensors = [row(0), row(0)]
            for tensor, handle in [(tensor, backend.recv(tensor, 0)) for tensor in tensors]:
                try:
                    handle.wait()
                    got.append(tensor.item())
                except ExecutionError as error:
                    got.append(error.message)
        return got

    for semantics in SEMANTICS:
        run = struck(program, 2, Kill(rank=0, at=1), semantics=semantics)
        assert run.outcomes[1].result == [7, "rank 0 was killed by a fault at operation 1"], semantics


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_what_a_killed_rank_has_sent_arrives(semantics: Semantics) -> None:
    """Whether it is asked for before the kill or after it."""

    def program(backend: Backend) -> float:
        value = row(7 * (backend.rank == 0))
        if backend.rank == 0:
            backend.send(value, 1).wait()
            backend.barrier()
        else:
            backend.recv(value, 0).wait()
        return value.item()

    for seed in range(4):
        run = struck(program, 2, Kill(rank=0, at=1), seed=seed, semantics=semantics)
        assert run.outcomes[1].result == 7


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_sending_to_a_killed_rank_fails_unless_it_is_buffered(semantics: Semantics) -> None:
    """A buffered send is complete when posted, whether it is posted before the kill or after it."""

    def program(backend: Backend) -> str:
        if backend.rank == 0:
            backend.barrier()
        try:
            backend.send(row(7), 0).wait()
        except ExecutionError as error:
            return error.message
        return "sent"

    expected = "sent" if semantics == "buffered" else "rank 0 was killed by a fault at operation 0"
    for seed in range(4):
        run = struck(program, 2, Kill(rank=0, at=0), seed=seed, semantics=semantics)
        assert run.outcomes[1].result == expected


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_what_is_queued_for_a_killed_rank_fails_too(semantics: Semantics) -> None:
    """Rank 0's second receive, behind the first: it gets both errors and then serves rank 2."""

    def program(backend: Backend) -> list[str]:
        told = []
        if backend.rank == 0:
            handles = [backend.recv(row(0), 1, "x") for _ in range(2)]
            backend.send(row(0), 1, "go").wait()
            for handle in handles:
                with pytest.raises(ExecutionError) as caught:
                    handle.wait()
                told.append(caught.value.message)
            backend.send(row(0), 2).wait()
        elif backend.rank == 1:
            backend.recv(row(0), 0, "go").wait()
            backend.barrier()
        else:
            backend.recv(row(1), 0).wait()
        return told

    run = struck(program, 3, Kill(rank=1, at=1), semantics=semantics)
    assert run.outcomes[0].result == ["rank 1 was killed by a fault at operation 1"] * 2
    assert run.outcomes[2].result == []


def test_those_who_do_not_need_a_killed_rank_go_on() -> None:
    """Two pairs that sum among themselves.

    When rank 3 dies, rank 0 of the other pair is waiting too: rank 1 comes only once rank 2 has been told.
    """

    def program(backend: Backend) -> float | str:
        pairs = [backend.new_group([0, 1], "pair"), backend.new_group([2, 3], "pair")]
        value, told = row(backend.rank), ""
        try:
            if backend.rank == 1:
                backend.recv(row(0), 2).wait()
            for _ in range(2):
                backend.all_reduce(value, pairs[backend.rank // 2]).wait()
        except ExecutionError as error:
            told = error.message
        if backend.rank == 2:
            backend.send(row(0), 1).wait()
        return told or value.item()

    for seed in range(3):
        run = struck(program, 4, Kill(rank=3, at=3), seed=seed)
        results = [outcome.result for outcome in run.outcomes]
        assert results == [2, 2, "rank 3 was killed by a fault at operation 3", None]


def test_a_place_that_is_not_reached_kills_nobody() -> None:
    """There is no fourth operation on rank 0."""
    assert struck(relay, 3, Kill(rank=0, at=3), price=price).failure is None


@pytest.mark.parametrize("operation", range(6))
def test_every_operation_fails_with_the_rank_it_needs(operation: int) -> None:
    """Whether it is posted before the kill or after it."""

    def program(backend: Backend) -> str:
        group, tensor = world(backend), torch.ones(2)
        if backend.rank == 1:
            backend.barrier()
        try:
            posts: list[Callable[[], Handle]] = [
                lambda: backend.all_reduce(tensor, group),
                lambda: backend.all_gather(torch.ones(4), tensor, group),
                lambda: backend.reduce_scatter(torch.ones(1), tensor, group),
                lambda: backend.all_to_all(torch.ones(2), tensor, group),
                lambda: backend.broadcast(tensor, group, 0),
                lambda: backend.batch([Transfer("send", tensor, 1), Transfer("recv", torch.ones(2), 1)]),
            ]
            posts[operation]().wait()
        except ExecutionError as error:
            return error.message
        return "nothing"

    for seed in range(3):
        run = struck(program, 2, Kill(rank=1, at=1), seed=seed)
        assert run.outcomes[0].result == "rank 1 was killed by a fault at operation 1"


def test_a_rank_whose_operation_failed_may_leave_others_unfinished() -> None:
    """It could not come to wait for them: its own result stands, and the others are not ended for it."""

    def program(backend: Backend) -> str:
        group = world(backend)
        if backend.rank == 0:
            try:
                handle = backend.recv(row(0), 2)
                backend.all_reduce(row(0), group).wait()
                handle.wait()
            except ExecutionError as error:
                return error.message
        elif backend.rank == 1:
            backend.barrier()
        return "nothing"

    for seed in range(3):
        run = struck(program, 3, Kill(rank=1, at=1), seed=seed)
        assert [outcome.error for outcome in run.outcomes] == [None] * 3
        assert run.outcomes[0].result == "rank 1 was killed by a fault at operation 1"
        assert run.outcomes[2].result == "nothing"


# Pause: a rank does nothing for a while.


def clocks(run: Simulation[Any]) -> list[float]:
    """Of a relay that went well."""
    assert run.failure is None
    assert [outcome.result[0] for outcome in run.outcomes] == [6, 6, 6]
    return [outcome.result[1] for outcome in run.outcomes]


def test_the_relay_takes_ten_seconds() -> None:
    assert clocks(struck(relay, 3, price=price)) == [10, 10, 10]


@pytest.mark.parametrize(
    ("fault", "seconds"),
    [
        (Pause(rank=0, at=1, seconds=0.5), 10.5),  # its send is posted at 1.5
        (Pause(rank=1, at=1, seconds=0.5), 10.5),  # so is its receive
        (Pause(rank=2, at=1, seconds=1.75), 10.0),  # at 2.75, and the number comes at 3
        (Pause(rank=2, at=1, seconds=2.5), 10.5),  # at 3.5
        (Pause(rank=1, at=2, seconds=0.5), 10.5),  # it sends at 3.5
        (Pause(rank=0, at=2, seconds=2.0), 10.0),  # it is back at 5, when the sum begins
        (Pause(rank=0, at=2, seconds=2.25), 10.25),
        (Pause(rank=1, at=0, seconds=0.5), 10.5),  # nobody computes before the group is open
        (Pause(rank=0, at=3, seconds=9.0), 10.0),  # it has no such operation
    ],
    ids=str,
)
def test_a_pause_delays_what_waits_for_it_and_no_more(fault: Pause, seconds: float) -> None:
    """The same sum; all clocks are later by the pause, less what the rank would have waited anyway."""
    for seed in range(3):
        assert clocks(struck(relay, 3, fault, price=price, seed=seed, preempt=seed / 4)) == [seconds] * 3


def test_pauses_add_up() -> None:
    """Two at one place, one at another, none of them made longer by slow computing."""
    script = [Pause(rank=1, at=1, seconds=s) for s in (0.5, 0.25)] + [Pause(rank=1, at=2, seconds=1.0)]
    assert clocks(struck(relay, 3, *script, price=price)) == [11.75] * 3
    assert clocks(struck(relay, 3, *script, Slow(rank=1, factor=2.0), price=price)) == [12.75] * 3


@pytest.mark.parametrize("seed", range(3))
def test_patience_ends_with_an_error_that_names_the_operation(seed: int) -> None:
    """Rank 0 waits from 3 to 10 s for the sum: 7 s are just borne, 7.5 are not."""
    settings: dict[str, Any] = {"price": price, "patience_seconds": 7.0, "seed": seed}
    assert clocks(struck(relay, 3, **settings)) == [10, 10, 10]
    run = struck(told, 3, Pause(rank=1, at=3, seconds=0.5), **settings)
    first, second, last = (outcome.result for outcome in run.outcomes)
    assert (second, last) == ("(6.0, 10.5)", "(6.0, 10.5)")
    assert first.startswith("rank 0, action all_reduce #0 in group world [0, 1, 2], position test_faults.py:")
    assert "must be complete within 7 virtual seconds" in first


# Slow: computing or a link takes longer.


@pytest.mark.parametrize(
    ("script", "seconds"),
    [
        ([Slow(rank=0, factor=3.0)], 12.0),  # 3..5, 5..7, 7..12
        ([Slow(rank=2, factor=3.0)], 10.0),  # the number comes at 3 anyway
        ([Slow(rank=0, factor=0.5)], 10.0),  # rank 1 is not ready before 1
        ([Slow(rank=0, factor=2.0), Slow(rank=0, factor=1.5)], 12.0),
        ([Slow(link=(0, 1), factor=2.0)], 17.0),  # 1..5, 5..7, and the sum takes 10
        ([Slow(link=(1, 0), factor=2.0)], 17.0),  # a link has no direction
        ([Slow(link=(2, 0), factor=2.0)], 15.0),  # of the messages none goes there
        ([Slow(link=(0, 1), factor=2.0), Slow(link=(1, 2), factor=2.0)], 29.0),  # 1..5..9, and 20
        ([Slow(rank=0, factor=3.0), Slow(link=(0, 1), factor=2.0)], 19.0),  # 3..7..9..19
    ],
    ids=str,
)
def test_slow_ranks_and_links_take_their_factor(script: list[Slow], seconds: float) -> None:
    """The same sum; the clocks are as by hand."""
    for seed in range(3):
        assert clocks(struck(relay, 3, *script, price=price, seed=seed, preempt=seed / 4)) == [seconds] * 3


# Corrupt: one bit of what a rank gets is wrong.


def everything_that_is_got(backend: Backend) -> list[torch.Tensor]:
    """What each operation after the opening of the group gave this rank; none depends on another."""
    group, n, r = world(backend), backend.world_size, backend.rank
    own = torch.arange(1.0, 5.0) + r
    whole, part, swapped, received = torch.zeros(n, 4), torch.zeros(2), torch.zeros(4), torch.zeros(4)
    summed, copied = own.clone(), own.clone()
    backend.all_reduce(summed, group).wait()  # operation 1
    backend.all_gather(whole, own[None].clone(), group).wait()
    backend.reduce_scatter(part, own.clone(), group).wait()
    backend.all_to_all(swapped, own.clone(), group).wait()
    backend.broadcast(copied, group, 0).wait()
    backend.batch([Transfer("send", own, 1 - r), Transfer("recv", received, 1 - r)]).wait()  # operation 6
    backend.barrier()
    return [summed, whole, part, swapped, copied, received]


def bits(tensor: torch.Tensor) -> list[int]:
    return [int(byte) for byte in tensor.reshape(-1).view(torch.uint8)]


@pytest.mark.parametrize("at", range(1, 7))
@pytest.mark.parametrize("rank", range(2))
def test_one_bit_of_one_tensor_of_one_rank_is_wrong(rank: int, at: int) -> None:
    """Of all that both ranks get: bit 22 of element 3 (modulo its size) of the operation it strikes."""
    clean = simulate(everything_that_is_got, 2)
    wrong = simulate(everything_that_is_got, 2, faults=[Corrupt(rank=rank, at=at, element=3, bit=22)])
    for each in range(2):
        for number, (good, bad) in enumerate(zip(clean[each], wrong[each], strict=True), start=1):
            flipped = [one ^ other for one, other in zip(bits(good), bits(bad), strict=True)]
            expected = [0] * len(flipped)
            if (each, number) == (rank, at):
                expected[4 * (3 % good.numel()) + 22 // 8] = 1 << 22 % 8
            assert flipped == expected


@pytest.mark.parametrize(
    ("dtype", "element", "bit", "expected"),
    [
        (torch.float32, 0, 31, [-3.0, 6.0]),  # the sign
        (torch.float32, 1, 30, [3.0, 6.0 * 2.0**-128]),  # the highest bit of the exponent
        (torch.float32, 7, 32 + 31, [3.0, -6.0]),  # both modulo what there is
        (torch.float64, 0, 63, [-3.0, 6.0]),
        (torch.bfloat16, 0, 15, [-3.0, 6.0]),
        (torch.int64, 1, 40, [3, 6 + 2**40]),
        (torch.uint8, 0, 2, [7, 6]),
    ],
    ids=str,
)
def test_the_bit_is_counted_from_the_lowest(
    dtype: torch.dtype, element: int, bit: int, expected: list[float]
) -> None:
    """Rank 1 gets the sums 3 and 6 wrong; rank 0 gets them right."""

    def program(backend: Backend) -> list[float]:
        group, tensor = world(backend), row(1 + backend.rank, 2 + 2 * backend.rank, dtype=dtype)
        backend.all_reduce(tensor, group).wait()
        found: list[float] = tensor.tolist()
        return found

    fault = Corrupt(rank=1, at=1, element=element, bit=bit)
    assert simulate(program, 2, faults=[fault]) == [[3, 6], expected]


def test_a_send_gets_nothing_and_the_next_receive_does() -> None:
    """Two faults stand at rank 0's send: the next two operations that give it something are struck."""

    def program(backend: Backend) -> list[float]:
        got = [row(5) for _ in range(4)]
        if backend.rank == 0:
            backend.send(got[0], 1).wait()  # operation 0
            backend.barrier()
            for tensor in got[1:]:
                backend.recv(tensor, 1).wait()
        else:
            backend.recv(got[0], 0).wait()
            backend.barrier()
            for tensor in got[1:]:
                backend.send(tensor, 0).wait()
        return [tensor.item() for tensor in got]

    sign = Corrupt(rank=0, at=0, bit=31)
    assert simulate(program, 2, faults=[sign, sign]) == [[5, -5, -5, 5], [5, 5, 5, 5]]


# Drop: a message never arrives.


def numbers(backend: Backend) -> list[float | str]:
    """Rank 0 sends 0, 1, 2 to rank 1, and 3 on another channel; what rank 1 gets, or is told."""
    got: list[float | str] = []
    tensors = [row(-1) for _ in range(4)]
    channels = ("a", "a", "a", "b")
    if backend.rank == 0:
        handles = [backend.send(row(i), 1, channel) for i, channel in enumerate(channels)]
    else:
        handles = [backend.recv(t, 0, channel) for t, channel in zip(tensors, channels, strict=True)]
    for tensor, handle in zip(tensors, handles, strict=True):
        try:
            handle.wait()
            got.append(tensor.item())
        except ExecutionError as error:
            got.append(str(error))
    return got


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("seed", range(2))
def test_a_dropped_message_is_told_to_who_waits_for_it(seed: int, semantics: Semantics) -> None:
    """The message after it takes its place, and the last receive of its channel is left waiting."""
    run = struck(numbers, 2, Drop(sender=0, receiver=1, at=1), seed=seed, semantics=semantics)
    first, second, third, other = run.outcomes[1].result
    assert (first, second, other) == (0, 2, 3)
    assert third.startswith("rank 1, action recv #2 from rank 0 on channel 'a', position test_faults.py:")
    assert "deadlock: no rank can go on" in third
    assert "waited for: rank 0, which has returned" in third
    assert "rank 0 posted send #1 to rank 1 on channel 'a', which a fault dropped" in third
    assert run.outcomes[0].error is None  # the sender takes it for sent


def test_messages_of_a_pair_are_counted_over_all_channels() -> None:
    """The fourth is the one on channel b; another pair's, and the other direction's, are not counted."""
    run = struck(numbers, 2, Drop(sender=0, receiver=1, at=3), Drop(sender=1, receiver=0, at=0))
    *others, last = run.outcomes[1].result
    assert others == [0, 1, 2]
    assert "send #0 to rank 1 on channel 'b', which a fault dropped" in last
    assert struck(numbers, 2, Drop(sender=0, receiver=1, at=4)).outcomes[1].result == [0, 1, 2, 3]


# OutOfMemory: a device is full.


def test_a_device_holds_its_bytes_and_not_one_more() -> None:
    """250 fp32 are 1000 bytes; 251 are 1004, which torch's own handlers and ours both see."""

    def program(backend: Backend, numel: int) -> int:
        first = torch.zeros(200)
        del first
        return torch.zeros(numel).numel()

    assert simulate(lambda b: program(b, 250), 2, memory_bytes=1000) == [250, 250]
    for kind in (torch.OutOfMemoryError, ExecutionError):
        with pytest.raises(kind) as caught:
            simulate(lambda b: program(b, 250 + b.rank), 2, memory_bytes=1000)
        assert isinstance(caught.value, OutOfMemoryError)
        assert caught.value.rank == 1
        assert str(caught.value) == (
            "rank 1: out of memory: an operation needs 1,004 bytes more, 0 are live "
            "and the device holds 1,000"
        )


def test_one_device_may_be_smaller() -> None:
    """The least of all limits of a rank counts, and the others are not concerned."""

    def program(backend: Backend) -> str:
        kept = torch.zeros(100)
        try:
            return str((kept, torch.zeros(100))[1].numel())
        except torch.OutOfMemoryError as error:
            return str(error)

    for faults, limit in (([], None), ([OutOfMemory(rank=0, at_bytes=900)], 10_000)):
        script = [OutOfMemory(rank=1, at_bytes=799), *faults]
        found = simulate(program, 3, faults=script, memory_bytes=limit)
        words = (
            "rank 1: out of memory: an operation needs 400 bytes more, 400 are live and the device holds 799"
        )
        assert found == ["100", words, "100"]


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_the_simulators_own_copies_take_no_room(semantics: Semantics) -> None:
    """Each rank holds 400 bytes to send and 400 to receive into, and the sum is made in place."""

    def program(backend: Backend) -> None:
        group, sent, received = world(backend), torch.ones(100), torch.empty(100)
        other = 1 - backend.rank
        backend.batch([Transfer("send", sent, other), Transfer("recv", received, other)]).wait()
        backend.all_reduce(sent, group).wait()
        backend.gather_objects("x" * 10_000)

    simulate(program, 2, semantics=semantics, memory_bytes=800)
    with pytest.raises(torch.OutOfMemoryError):
        simulate(program, 2, semantics=semantics, memory_bytes=799)


# Plans.

STEPS = 2


@lru_cache
def made(**parallel: int) -> TrainingPlan:
    return tiny_plan(tiny_model("gpt2"), tiny_workload(global_batch=4), **parallel)


@lru_cache
def square() -> TrainingPlan:
    """Two stages of two ranks: 0 and 1 hold the first, 2 and 3 the last."""
    return made(dp=2, pp=2)


def train(plan: TrainingPlan, *faults: Fault, **settings: Any) -> pt.Measurement:
    data = random_samples(plan.model.vocab_size, plan.workload.seq_len)
    return pt.run(plan, data, steps=STEPS, weights=random_weights, faults=faults, **settings)


@lru_cache
def clean() -> pt.Measurement:
    return train(square())


def final(plan: TrainingPlan, backend: Backend) -> tuple[tuple[float, ...], str]:
    """A rank's training: its losses, and a digest of its weights at the end."""
    data = random_samples(plan.model.vocab_size, plan.workload.seq_len)
    session = Session(plan, backend, random_weights)
    losses = run_rank(plan, backend, data, steps=STEPS, session=session).losses
    return losses, digest(session.weights)


def trained(plan: TrainingPlan, *faults: Fault, **settings: Any) -> Simulation[Any]:
    """Every rank's training."""
    return struck(
        lambda b: final(plan, b), plan.topology.world_size, *faults, price=plan_price(plan), **settings
    )


def test_a_plan_with_a_killed_rank_ends_and_names_it() -> None:
    """In whatever row of the second step: some survivor is told, by rank and row, and none hangs."""
    names = [str(row) for row in rows(square().program(0), 1)]
    assert {"1COUNT", "1RECV_F0", "1F0", "1B0", "1SEND_B0", "1REDUCE0", "NORM", "UPDATE"} <= set(names)
    for at, name in enumerate(names):
        run = trained(square(), Kill(rank=3, at=at, step=1))
        assert [outcome.killed for outcome in run.outcomes] == [False, False, False, True]
        assert f"killed by a fault at step 1, row {at}, {name}" in str(run.failure)
        errors = [outcome.error for outcome in run.outcomes if outcome.error is not None]
        assert errors and all(isinstance(error, ExecutionError) for error in errors)


def test_the_first_rows_of_the_first_step_are_a_place() -> None:
    """What is posted while the plan is opened is none."""
    for at, name in ((0, "1COUNT"), (1, "1RECV_F0")):
        with pytest.raises(ExecutionError, match=f"rank 3 was killed by a fault at step 0, row {at}, {name}"):
            train(square(), Kill(rank=3, at=at), timeout_seconds=60)


def test_a_paused_plan_has_the_same_bits_later() -> None:
    """All else waits for the first forward of a step: where that is 1024 s late, all clocks are."""
    run, paused = trained(square()), trained(square(), Pause(rank=0, at=0, step=1, seconds=1024.0))
    assert [o.result for o in paused.outcomes] == [o.result for o in run.outcomes]
    for before, after in zip(run.clock_seconds, paused.clock_seconds, strict=True):
        assert after - before == pytest.approx(1024.0, rel=1e-12)
    with pytest.raises(ExecutionError, match=r"action .*within 512 virtual seconds"):
        train(square(), Pause(rank=0, at=0, step=1, seconds=1024.0), patience_seconds=512.0)


@pytest.mark.parametrize("axis", ["dp", "pp", "tp"])
def test_a_plan_on_a_world_half_as_fast_takes_twice_as_long_to_the_bit(axis: str) -> None:
    """Both ranks and their link: doubling commutes with every rounding. One of them alone takes less."""
    plan = made(**{axis: 2})
    slow_ranks = [Slow(rank=rank, factor=2.0) for rank in range(2)]
    run, half = trained(plan), trained(plan, *slow_ranks, Slow(link=(0, 1), factor=2.0))
    assert half.clock_seconds == tuple(2 * seconds for seconds in run.clock_seconds)
    for script in (slow_ranks[:1], [Slow(link=(0, 1), factor=2.0)]):
        slower = trained(plan, *script)
        assert run.clock_seconds < slower.clock_seconds < half.clock_seconds
        assert [o.result for o in slower.outcomes] == [o.result for o in run.outcomes]


def test_a_corrupt_plan_loses_otherwise_or_skips_the_step() -> None:
    """The last stage's first receive of step 1: a high bit of a mantissa, and the highest of an exponent.

    Where no step may be skipped, the run is stopped by name.
    """
    losses = clean().losses
    found = train(square(), Corrupt(rank=2, at=1, step=1, bit=51)).losses
    assert found[0] == losses[0] and found[1] != losses[1]
    assert found == train(square(), Corrupt(rank=2, at=1, step=1, bit=51), seed=5).losses
    high = Corrupt(rank=2, at=1, step=1, bit=62)
    passed_over = train(square(), high)
    assert passed_over.skipped == (1,)
    assert [math.isfinite(loss) for loss in passed_over.losses] == [True, False, *[True] * (STEPS - 2)]
    strict = evolve(square(), workload=evolve(square().workload, max_skipped_steps=0))
    with pytest.raises(LossError, match="loss and gradient norm must be finite, got .* in step 1"):
        train(strict, high)


def test_a_dropped_activation_is_told() -> None:
    """The message of microbatch 1: the last stage has one too few, and says which was lost."""
    with pytest.raises(ExecutionError) as caught:
        train(square(), Drop(sender=0, receiver=2, at=1))
    assert "deadlock" in str(caught.value)
    assert "rank 0 posted send #1 to rank 2 on channel 'forward', which a fault dropped" in str(caught.value)


def test_a_plan_out_of_memory_names_rank_row_and_bytes() -> None:
    """A thousand bytes less than the measured peak of rank 2 alone."""
    limit = clean().memory[2].max_bytes - 1000
    with pytest.raises(torch.OutOfMemoryError) as caught:
        train(square(), OutOfMemory(rank=2, at_bytes=limit))
    assert isinstance(caught.value, ExecutionError)
    assert caught.value.rank == 2
    words = r"rank 2, action 1\w+, position row \d+: out of memory: an operation needs [\d,]+ bytes more"
    assert re.match(words, str(caught.value))
    assert f"the device holds {limit:,}" in str(caught.value)


# As on real processes.


def line(backend: Backend) -> list[torch.Tensor]:
    """Three rounds: a number goes 0 -> 1 -> 2, and ranks 3 and 4 sum among themselves."""
    pair = backend.new_group([3, 4], "pair")  # operation 0
    got, value = [], row(backend.rank)
    for _ in range(3):
        if backend.rank in (1, 2):
            backend.recv(value, backend.rank - 1, "line").wait()
        if backend.rank in (0, 1):
            backend.send(value, backend.rank + 1, "line").wait()
        if backend.rank > 2:
            backend.all_reduce(value, pair).wait()
        got.append(value.clone())
    return got


def sums(backend: Backend) -> list[torch.Tensor]:
    """Three sums of all ranks."""
    group, got = world(backend), []
    for _ in range(3):
        value = row(backend.rank, 1)
        backend.all_reduce(value, group).wait()
        got.append(value)
    return got


def swaps(backend: Backend) -> list[torch.Tensor]:
    """Three swaps with the other rank, each a batch."""
    got = []
    for number in range(3):
        received = row(-1)
        transfers = [Transfer("send", row(number), 1 - backend.rank)]
        backend.batch([*transfers, Transfer("recv", received, 1 - backend.rank)]).wait()
        got.append(received)
    return got


def everything(backend: Backend) -> list[torch.Tensor]:
    """Every operation with values that round: over all ranks what moves, over pairs what adds."""
    group, n, r = world(backend), backend.world_size, backend.rank
    opened = [backend.new_group([first, first + 1]) for first in range(0, n - 1, 2)]
    (pair,) = [g for g in [*opened, backend.new_group([n - 1])] if r in g.ranks][:1]
    own, got = torch.sqrt(torch.arange(1.0, 1.0 + n) + r), []
    for _ in range(2):
        backend.spend(0.005)
        backend.all_reduce(own, pair, "avg").wait()
        whole, swapped, received = torch.empty(n * n), torch.empty(n), torch.empty(n)
        part, copied = torch.empty(1), own.clone()
        backend.all_gather(whole, own, group).wait()
        backend.all_to_all(swapped, own, group).wait()
        backend.reduce_scatter(part, own[: pair.size].clone(), pair).wait()
        backend.broadcast(copied, group, n - 1).wait()
        transfers = [Transfer("send", own, (r + 1) % n), Transfer("recv", received, (r - 1) % n)]
        backend.batch(transfers).wait()
        backend.barrier()
        own = torch.sin(received * copied) + swapped / part
        got += [own.clone(), whole]
    return got


def training(backend: Backend) -> list[torch.Tensor]:
    """Losses and weights of a plan of three stages."""
    plan = tiny_plan(tiny_model("gpt2", layers=3), tiny_workload(global_batch=4), pp=3)
    losses: list[float] = []
    session = Session(plan, backend, random_weights)
    run_rank(
        plan,
        backend,
        random_samples(plan.model.vocab_size, plan.workload.seq_len),
        steps=STEPS,
        session=session,
        on_step=lambda _, result: losses.append(result.loss),
    )
    return [torch.tensor(losses, dtype=torch.float64), *session.weights.values()]


Ending = tuple[bool, str, str]  # whether a rank had an ExecutionError, which, and a digest of its result


def ending(function: Callable[[Backend], list[torch.Tensor]], backend: Backend) -> Ending:
    """How a rank ended."""
    try:
        return False, "", digest(function(backend))
    except ExecutionError as error:
        return True, str(error), ""


# Function, its ranks (of the processes that are left), and what strikes it. Rows 2 and 4 of the training's
# second step are in the midst of the first microbatches.
REAL: dict[str, tuple[Callable[[Backend], list[torch.Tensor]], tuple[int, ...], tuple[Fault, ...]]] = {
    "stopped and slow": (
        everything,
        (0, 1, 2, 3, 4),
        (Pause(rank=1, at=8, seconds=1.0), Slow(rank=2, factor=30.0)),
    ),
    "a plan, stopped and slow": (
        training,
        (0, 1, 2),
        (Pause(rank=0, at=2, step=1, seconds=1.0), Slow(rank=2, factor=2.0)),
    ),
    "messages": (line, (0, 1, 2, 3, 4), (Kill(rank=1, at=3),)),
    "sums": (sums, (0, 2, 3, 4), (Kill(rank=3, at=2),)),
    "a plan": (training, (0, 2, 3), (Kill(rank=2, at=4, step=1),)),
    "swaps": (swaps, (0, 2), (Kill(rank=1, at=1),)),
}


# Its first rank does nothing but send. Through shared memory a send ends at once, and whoever sent before the
# kill never learns of it; through sockets a send ends with its receive.
SENDS_ALONE = "messages"


def key(name: str, process: int) -> str:
    return f"{name}/{process}"


def killed_process(name: str) -> int | None:
    """Which process a case kills."""
    _, members, faults = REAL[name]
    return next((members[fault.rank] for fault in faults if isinstance(fault, Kill)), None)


def strike_really() -> dict[str, list[Ending | None]]:
    """In each process: every case that it lives to see. The first one collects how they all ended.

    No watchdog ends who does not need the dead: that is what is looked at.
    """
    watchdog.BREAK_SECONDS = 600.0
    processes = connect(60)
    for name, (function, members, faults) in REAL.items():
        if processes.rank not in members:
            continue
        backend = DistributedBackend(
            processes, device="cpu", timeout_seconds=60, ranks=members, shared_memory=name != SENDS_ALONE
        )
        real: Any = StruckBackend(backend, faults)
        ended = ending(function, real)
        backend.close()  # as a process that ends does: whoever waits for this one learns of it
        paused = any(isinstance(fault, Pause) and fault.rank == backend.rank for fault in faults)
        assert not paused or real.stopped_seconds > 0.8 * STOPPED_SECONDS
        processes.store.set(key(name, processes.rank), pickle.dumps(ended))
    if processes.rank > 0:
        return {}
    found: dict[str, list[Ending | None]] = {}
    for name, (_, members, _) in REAL.items():
        lived = [process for process in members if process != killed_process(name)]
        processes.store.wait([key(name, process) for process in lived])
        found[name] = [
            pickle.loads(processes.store.get(key(name, process))) if process in lived else None
            for process in members
        ]
    return found


@pytest.fixture(scope="module")
def really() -> dict[str, list[Ending | None]]:
    """How every rank of every case ended on processes; None for one that was killed."""
    killed = [process for name in REAL if (process := killed_process(name)) is not None]
    found: dict[str, list[Ending | None]] = launch(strike_really, 5, killed=killed, timeout_seconds=300)[0]
    return found


@pytest.mark.parametrize("name", REAL)
def test_processes_fare_as_simulated_ranks_do(name: str, really: dict[str, list[Ending | None]]) -> None:
    """The same ranks get an ExecutionError, and those that finish have the same bits.

    On gloo a killed process is noticed by who talks with it: its peer in a message, its two neighbours in
    the ring of a collective. They are told within milliseconds ("Connection closed by peer"). A member
    that is no neighbour ("sums": rank 1) or only needs one that has failed ("a plan": rank 0) goes on waiting
    until that one closes its connections, as a process that ends does, or else until its time-out. What a
    killed process has sent and nobody has yet asked for is lost. Simulated ranks are told all at once, by
    name and place, which gloo does not know; and the simulator lets a part that was posted before the kill
    count, where on processes it depends on who is faster. So no case has one.
    """
    function, members, faults = REAL[name]
    run = struck(lambda backend: ending(function, backend), len(members), *faults)
    plain = struck(lambda backend: ending(function, backend), len(members))
    assert plain.failure is None
    for rank, (ended, outcome, unharmed) in enumerate(
        zip(really[name], run.outcomes, plain.outcomes, strict=True)
    ):
        assert outcome.killed == (ended is None)
        if ended is None:
            continue
        has_failed, error, result = ended
        if has_failed:
            # A simulated rank may be ended by another one's error before it meets its own.
            assert outcome.result is None or outcome.result[0]
            assert error.startswith(f"rank {rank}, action ")
        else:
            assert outcome.result == ended == unharmed.result == (False, "", result)
    told = [outcome.result[1] for outcome in run.outcomes if outcome.result is not None]
    for fault in faults:
        if isinstance(fault, Kill):
            assert any(f"rank {fault.rank} was killed by a fault at" in words for words in told)
