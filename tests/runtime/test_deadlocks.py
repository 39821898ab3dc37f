"""Reports of programs that cannot end, family by family, word for word but for the lines of this file."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from picotron.errors import ExecutionError
from picotron.planner.faults import Drop
from picotron.runtime.backend import Backend, Group, Transfer
from picotron.runtime.fuzz import fuzz
from picotron.runtime.simulated import simulate

Program = Callable[[Backend], object]


def report(program: Program, world_size: int, **world: Any) -> list[str]:
    """What is raised, line by line, places left out; the same under every seed."""
    told = set()
    for seed in range(4):
        with pytest.raises(ExecutionError) as caught:
            simulate(program, world_size, seed=seed, preempt=seed / 4, timeout_seconds=60, **world)
        text = re.sub(r"(, position)? \(?test_deadlocks.py:\d+\)?", "", str(caught.value))
        told.add(text)
    (text,) = told
    return text.splitlines()


def everyone(backend: Backend, name: str = "all") -> Group:
    return backend.new_group(range(backend.world_size), name)


def row(size: int = 1) -> torch.Tensor:
    return torch.ones(size)


def test_sends_that_cross() -> None:
    """Both send before they receive: right only where sends are buffered."""

    def program(backend: Backend) -> None:
        other = 1 - backend.rank
        backend.send(row(), other).wait()
        backend.recv(row(), other).wait()

    assert report(program, 2) == [
        "rank 0, action send #0 to rank 1 on channel '': deadlock: no rank can go on",
        "wait-for cycle: 0 -> 1 -> 0",
        "rank 0 waits for send #0 to rank 1 on channel '': rank 1 is not there",
        "rank 1 waits for send #0 to rank 0 on channel '': rank 0 is not there",
    ]
    assert simulate(program, 2, semantics="buffered") == [None, None]


def test_of_two_cycles_the_shortest_is_told() -> None:
    """Five ranks send in a ring of three and in one of two; others are told of after those of the cycle."""

    def program(backend: Backend) -> None:
        ring = [0, 1, 2] if backend.rank < 3 else [3, 4]
        place = ring.index(backend.rank)
        backend.send(row(), ring[(place + 1) % len(ring)], "ring").wait()
        backend.recv(row(), ring[place - 1], "ring").wait()

    lines = report(program, 5)
    assert lines[1] == "wait-for cycle: 3 -> 4 -> 3"
    assert [line.split(" waits")[0] for line in lines[2:]] == [f"rank {r}" for r in (3, 4, 0, 1, 2)]


def test_collectives_in_another_order() -> None:
    """Two of one group, swapped on rank 1: it is told which, and by whom."""

    def program(backend: Backend) -> None:
        group, tensor = everyone(backend), row(2)
        calls = [lambda: backend.all_reduce(tensor, group), lambda: backend.broadcast(tensor, group, 0)]
        for call in reversed(calls) if backend.rank == 1 else calls:
            call().wait()

    with pytest.raises(ExecutionError) as caught:
        simulate(program, 2)
    text = str(caught.value)
    assert "#0 in group all [0, 1]" in text
    assert "rank 0 posted all_reduce sum torch.float32 [2] (test_deadlocks.py:" in text
    assert "rank 1 posted broadcast from rank 0 torch.float32 [2] (test_deadlocks.py:" in text


def test_groups_in_another_order() -> None:
    """The same collectives of two groups, swapped on rank 1."""

    def program(backend: Backend) -> None:
        tp, dp = backend.new_group([0, 1], "tp"), backend.new_group([0, 1], "dp")
        for group in (dp, tp) if backend.rank == 1 else (tp, dp):
            backend.all_reduce(row(), group).wait()

    assert report(program, 2) == [
        "rank 0, action all_reduce #0 in group tp [0, 1]: deadlock: no rank can go on",
        "wait-for cycle: 0 -> 1 -> 0",
        "rank 0 waits for all_reduce #0 in group tp [0, 1]: rank 1 is not there",
        "rank 1 waits for all_reduce #0 in group dp [0, 1]: rank 0 is not there",
    ]


def test_a_collective_left_out() -> None:
    """Rank 2 skips the second of three: the third is the first at which somebody misses it."""

    def program(backend: Backend) -> None:
        group = everyone(backend)
        for number in range(3):
            if not (backend.rank == 2 and number == 1):
                backend.all_reduce(row(), group).wait()

    assert report(program, 3) == [
        "rank 0, action all_reduce #2 in group all [0, 1, 2]: deadlock: no rank can go on",
        "waited for: rank 2, which has returned",
        "rank 0 waits for all_reduce #2 in group all [0, 1, 2]: rank 2 is not there",
        "rank 1 waits for all_reduce #2 in group all [0, 1, 2]: rank 2 is not there",
    ]


def test_a_collective_of_the_wrong_group() -> None:
    """Rank 2 reduces over its pair what the others reduce over all."""

    def program(backend: Backend) -> None:
        group, pair = everyone(backend), backend.new_group([1, 2], "pair")
        backend.all_reduce(row(), pair if backend.rank == 2 else group).wait()

    assert report(program, 3) == [
        "rank 0, action all_reduce #0 in group all [0, 1, 2]: deadlock: no rank can go on",
        "wait-for cycle: 1 -> 2 -> 1",
        "rank 1 waits for all_reduce #0 in group all [0, 1, 2]: rank 2 is not there",
        "rank 2 waits for all_reduce #0 in group pair [1, 2]: rank 1 is not there",
        "rank 0 waits for all_reduce #0 in group all [0, 1, 2]: rank 2 is not there",
    ]


def test_a_group_of_others() -> None:
    """A rank that is no member is told so at once."""

    def program(backend: Backend) -> None:
        pair = backend.new_group([0, 1], "pair")
        backend.all_reduce(row(), pair).wait()

    (told,) = report(program, 3)
    assert told == (
        "rank 2, action all_reduce: only members take part in a collective of group pair [0, 1]: "
        "open a group that includes the rank"
    )


def test_a_message_to_the_wrong_rank() -> None:
    """It is told among those that have one end only."""

    def program(backend: Backend) -> None:
        if backend.rank == 0:
            backend.send(row(), 2, "forward").wait()
        if backend.rank == 1:
            backend.recv(row(), 0, "forward").wait()

    assert report(program, 3, semantics="buffered") == [
        "rank 1, action recv #0 from rank 0 on channel 'forward': deadlock: no rank can go on",
        "waited for: rank 0, which has returned",
        "rank 1 waits for recv #0 from rank 0 on channel 'forward': rank 0 is not there",
        "unmatched: rank 0 posted send #0 to rank 2 on channel 'forward'",
    ]
    assert report(program, 3) == [
        "rank 0, action send #0 to rank 2 on channel 'forward': deadlock: no rank can go on",
        "waited for: rank 2, which has returned",
        "rank 0 waits for send #0 to rank 2 on channel 'forward': rank 2 is not there",
        "rank 1 waits for recv #0 from rank 0 on channel 'forward': rank 0 is not there",
    ]


def missing_receive(backend: Backend) -> None:
    """Three messages, two receives."""
    for number in range(3 if backend.rank == 0 else 2):
        post = backend.send if backend.rank == 0 else backend.recv
        post(torch.tensor([number]), 1 - backend.rank).wait()


def test_a_missing_receive() -> None:
    """Buffered, it is found once all have returned."""
    assert report(missing_receive, 2) == [
        "rank 0, action send #2 to rank 1 on channel '': deadlock: no rank can go on",
        "waited for: rank 1, which has returned",
        "rank 0 waits for send #2 to rank 1 on channel '': rank 1 is not there",
    ]
    assert report(missing_receive, 2, semantics="buffered") == [
        "every message must be received, but all ranks have returned",
        "unmatched: rank 0 posted send #2 to rank 1 on channel ''",
    ]


def test_a_missing_send_and_a_receive_too_many() -> None:
    """The last receive is the one that is told; a handle not waited for yet is told as unmatched."""

    def program(backend: Backend) -> None:
        if backend.rank == 0:
            backend.send(row(), 1).wait()
            backend.barrier()
        else:
            handles = [backend.recv(row(), 0) for _ in range(3)]
            for handle in handles:
                handle.wait()
            backend.barrier()

    assert report(program, 2) == [
        "rank 0, action barrier #0 in group world [0, 1]: deadlock: no rank can go on",
        "wait-for cycle: 0 -> 1 -> 0",
        "rank 0 waits for barrier #0 in group world [0, 1]: rank 1 is not there",
        "rank 1 waits for recv #1 from rank 0 on channel '': rank 0 is not there",
        "unmatched: rank 1 posted recv #2 from rank 0 on channel ''",
    ]


def test_a_lost_message() -> None:
    """What a fault has dropped is told as lost: its sender believes that it went."""

    def program(backend: Backend) -> None:
        post = backend.send if backend.rank == 0 else backend.recv
        for _ in range(2):
            post(row(), 1 - backend.rank, "forward").wait()

    assert report(program, 2, faults=[Drop(sender=0, receiver=1, at=1)]) == [
        "rank 1, action recv #1 from rank 0 on channel 'forward': deadlock: no rank can go on",
        "waited for: rank 0, which has returned",
        "rank 1 waits for recv #1 from rank 0 on channel 'forward': rank 0 is not there",
        "lost: rank 0 posted send #1 to rank 1 on channel 'forward', which a fault dropped",
    ]


def test_a_schedule_that_waits_in_a_circle() -> None:
    """Stage 1 wants two forwards before its first backward, stage 0 gives but one; places are rows."""
    orders = [["F0", "B0", "F1", "B1"], ["F0", "F1", "B0", "B1"]]

    def program(backend: Backend) -> None:
        stage, handles = backend.rank, []
        for index, action in enumerate(orders[stage]):
            backend.at(0, index, f"{stage}{action}")
            gets, gives = ("F", "B") if stage else ("B", "F")
            if action[0] == gets:
                backend.recv(row(), 1 - stage, gets).wait()
            if action[0] == gives:
                handles.append(backend.send(row(), 1 - stage, gives))
        for handle in handles:
            handle.wait()

    assert report(program, 2) == [
        "rank 0, action recv #0 from rank 1 on channel 'B', position step 0, row 1, 0B0: "
        "deadlock: no rank can go on",
        "wait-for cycle: 0 -> 1 -> 0",
        "rank 0 waits for recv #0 from rank 1 on channel 'B' (step 0, row 1, 0B0): rank 1 is not there",
        "rank 1 waits for recv #1 from rank 0 on channel 'F' (step 0, row 1, 1F1): rank 0 is not there",
    ]
    orders[0] = orders[1]
    assert simulate(program, 2) == [None, None]


def unlike_orders(backend: Backend) -> None:
    """Both begin a send, then a receive, and wait later."""
    other = 1 - backend.rank
    handles = [backend.send(row(), other), backend.recv(row(), other)]
    for handle in handles:
        handle.wait()


def test_messages_of_a_pair_in_unlike_orders() -> None:
    """Posted together and waited for later they meet, but not one after the other, as batches run."""
    assert simulate(unlike_orders, 2) == [None, None]
    with pytest.raises(ExecutionError) as caught:
        simulate(unlike_orders, 2, semantics="batched")
    lines = [re.sub(r" \(test_deadlocks.py:\d+\)", "", line) for line in str(caught.value).splitlines()]
    assert lines[1:4] == [
        "wait-for cycle: 0 -> 1 -> 0",
        "rank 0 waits for send #0 to rank 1 on channel '': rank 1 is not there",
        "rank 1 waits for send #0 to rank 0 on channel '': rank 0 is not there",
    ]
    assert sorted(lines[4:]) == [
        "unmatched: rank 0 posted recv #0 from rank 1 on channel ''",
        "unmatched: rank 1 posted recv #0 from rank 0 on channel ''",
    ]

    def together(backend: Backend) -> None:
        other = 1 - backend.rank
        backend.batch([Transfer("send", row(), other), Transfer("recv", row(), other)]).wait()

    assert simulate(together, 2, semantics="batched") == [None, None]


def test_of_many_ranks_eight_are_told() -> None:
    """The others are counted."""

    def program(backend: Backend) -> None:
        if backend.rank < 11:
            backend.barrier()

    lines = report(program, 12)
    assert lines[1] == "waited for: rank 11, which has returned"
    assert [line.split(" waits")[0] for line in lines[2:-1]] == [f"rank {rank}" for rank in range(8)]
    assert lines[-1] == "and 3 more ranks wait"


def test_many_absent_ranks_are_told_in_short() -> None:
    """Eight of them."""

    def program(backend: Backend) -> None:
        if backend.rank == 0:
            backend.barrier()

    assert report(program, 12)[2].endswith("ranks 1, 2, 3, 4, 5, 6, 7, 8, ... are not there")


def test_a_batch_held_up_waits_for_what_holds_it() -> None:
    """Rank 0's second receive stands behind a batch in which only rank 2's message is missing.

    Rank 1 has sent all that rank 0 asks of it: there is no cycle.
    """

    def program(backend: Backend) -> None:
        if backend.rank == 0:
            first = backend.batch([Transfer("recv", row(), 1), Transfer("recv", row(), 2)])
            second = backend.recv(row(), 1)
            second.wait()
            first.wait()
        if backend.rank == 1:
            backend.send(row(), 0).wait()
            backend.send(row(), 0).wait()

    lines = report(program, 3, semantics="batched")
    assert lines[1] == "waited for: rank 2, which has returned"


def test_an_end_held_up_waits_for_what_holds_it() -> None:
    """Rank 1 has posted all that rank 0 asks of it, behind a batch in which only rank 2's message is missing.

    Were it there both would go on: there is no cycle.
    """

    def program(backend: Backend) -> None:
        if backend.rank == 0:
            backend.send(row(), 1).wait()
            backend.send(row(), 1).wait()
            backend.send(row(), 1, "late").wait()
        if backend.rank == 1:
            early = [backend.batch([Transfer("recv", row(), 0), Transfer("recv", row(), 2)])]
            early.append(backend.recv(row(), 0))
            backend.recv(row(), 0, "late").wait()
            for handle in early:
                handle.wait()

    lines = report(program, 3, semantics="batched")
    assert lines[1] == "waited for: rank 2, which has returned"


@pytest.mark.parametrize("seed", range(4))
def test_what_stands_behind_a_disagreement_goes_on(seed: int) -> None:
    """The first message's ends are of unlike sizes: that is told, and no deadlock of the second one."""

    def program(backend: Backend) -> None:
        post = backend.send if backend.rank == 0 else backend.recv
        first = post(row(2 - backend.rank), 1 - backend.rank)
        second = post(row(), 1 - backend.rank)
        second.wait()
        first.wait()

    with pytest.raises(ExecutionError, match="a message and its receive must agree in dtype and shape"):
        simulate(program, 2, seed=seed, semantics="batched")


def test_a_deadlock_is_one_report_whatever_the_seed() -> None:
    """Else a program that always fails in the same way would pass for a race."""
    assert fuzz(unlike_orders, 2, seeds=range(20), semantics="batched").seed is None
