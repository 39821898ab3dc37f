"""The communicator holds a rank to the plan: what it does next, with whom, and how much it carries."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from picotron.errors import ExecutionError
from picotron.planner.body import Operation
from picotron.runtime.backend import Backend
from picotron.runtime.communicator import Communicator
from picotron.runtime.simulated import simulate

REDUCE = Operation(name="reduce output", kind="all_reduce", group="tp", payload_bytes=16)
GATHER = Operation(name="gather input", kind="all_gather", group="tp", payload_bytes=32)
SCATTER = Operation(name="reduce gradient", kind="reduce_scatter", group="tp", payload_bytes=32)


def four() -> torch.Tensor:
    """16 bytes."""
    return torch.ones(4)


def on_two_ranks(act: Callable[[Communicator], object]) -> list[Communicator]:
    """What ``act`` makes of each rank's communicator with one group, tp, of both ranks."""

    def main(backend: Backend) -> Communicator:
        communicator = Communicator(backend, {"tp": backend.new_group([0, 1], "tp")})
        act(communicator)
        return communicator

    return simulate(main, 2)


def refused(act: Callable[[Communicator], object]) -> ExecutionError:
    """The error that ``act`` raises inside segment "1F0 mlp" of row 7, after one planned all_reduce."""

    def main(communicator: Communicator) -> None:
        communicator.open("1F0 mlp", 7, [REDUCE, GATHER])
        communicator.all_reduce(four(), "tp")
        act(communicator)

    with pytest.raises(ExecutionError) as caught:
        on_two_ranks(main)
    error = caught.value
    assert error.rank in (0, 1)
    assert (error.action, error.position) == ("1F0 mlp", "row 7, operation 1")
    assert f"rank {error.rank}, action 1F0 mlp, position row 7, operation 1: " in str(error)
    return error


def test_planned_collectives_do_their_work_and_are_counted() -> None:
    """A sum of ones over two ranks is two; 16 + 16 bytes reduced, 32 gathered, 32 scattered."""

    def act(communicator: Communicator) -> None:
        communicator.open("F", 0, [REDUCE, GATHER, SCATTER, REDUCE])
        reduced, gathered, scattered = four(), torch.empty(8), torch.empty(4)
        communicator.all_reduce(reduced, "tp")
        communicator.all_gather(gathered, reduced, "tp")
        communicator.reduce_scatter(scattered, gathered, "tp")
        communicator.all_reduce(reduced, "tp", "max")
        communicator.close()
        assert reduced.tolist() == [2.0] * 4
        assert gathered.tolist() == [2.0] * 8
        assert scattered.tolist() == [4.0] * 4

    for communicator in on_two_ranks(act):
        assert communicator.payload_bytes == {
            ("all_reduce", "tp"): 32,
            ("all_gather", "tp"): 32,
            ("reduce_scatter", "tp"): 32,
        }


def test_another_kind_than_planned_is_refused() -> None:
    """The message says what the plan has next and what came."""
    error = refused(lambda c: c.reduce_scatter(four(), torch.ones(8), "tp"))
    expected = "the plan's next collective is all_gather 'gather input' over tp, got reduce_scatter over tp"
    assert str(error).endswith(expected)


def test_another_group_than_planned_is_refused() -> None:
    """As another kind is."""
    error = refused(lambda c: c.all_gather(torch.empty(8), four(), "dp"))
    assert str(error).endswith("'gather input' over tp, got all_gather over dp")


def test_another_size_than_planned_is_refused() -> None:
    """Bytes are held against the planned payload."""
    error = refused(lambda c: c.all_gather(torch.empty(4), torch.ones(2), "tp"))
    assert str(error).endswith("all_gather over tp must carry the planned 32 bytes, got 16")


def test_another_type_of_the_same_length_is_refused() -> None:
    """Eight fp64 are not eight fp32."""
    wide = torch.float64
    error = refused(lambda c: c.all_gather(torch.empty(8, dtype=wide), torch.ones(4, dtype=wide), "tp"))
    assert str(error).endswith("must carry the planned 32 bytes, got 64")


def test_a_segment_that_ends_early_is_refused() -> None:
    """What is missing is named."""
    error = refused(lambda c: c.close())
    assert str(error).endswith("the segment ended before its planned all_gather 'gather input'")


def test_a_collective_too_many_is_refused() -> None:
    """After the last planned one nothing more may come."""

    def act(communicator: Communicator) -> None:
        communicator.open("0B3 head", 2, [REDUCE])
        for _ in range(2):
            communicator.all_reduce(four(), "tp")

    with pytest.raises(
        ExecutionError, match=r"no further collective is planned here, got all_reduce over tp"
    ):
        on_two_ranks(act)


def test_a_group_that_was_not_opened_is_refused() -> None:
    """The plan's rows name groups that this rank must have."""
    with pytest.raises(ExecutionError, match="the plan opened no group 'dp_cp' on this rank"):
        on_two_ranks(lambda communicator: communicator.start_all_reduce(four(), "dp_cp", 16))


@pytest.mark.parametrize("kind", ["start_all_reduce", "send", "receive"])
def test_rows_carry_their_planned_bytes(kind: str) -> None:
    """Row communication of another size is refused before it is posted."""

    def act(communicator: Communicator) -> None:
        peer = 1 - communicator.backend.rank
        if kind == "start_all_reduce":
            communicator.start_all_reduce(four(), "tp", 15)
        elif kind == "send":
            communicator.send(four(), peer, "forward", 15)
        else:
            communicator.receive(four(), peer, "forward", 15)

    with pytest.raises(ExecutionError, match="must carry the planned 15 bytes, got 16"):
        on_two_ranks(act)


def test_messages_and_started_sums_are_counted() -> None:
    """Send and receive count under the pipeline's group, a started sum under its own."""

    def act(communicator: Communicator) -> None:
        rank, tensor = communicator.backend.rank, four()
        if rank == 0:
            communicator.send(tensor, 1, "forward", 16).wait()
        else:
            communicator.receive(tensor, 0, "forward", 16).wait()
        communicator.start_all_reduce(tensor, "tp", 16).wait()

    first, second = on_two_ranks(act)
    assert first.payload_bytes == {("send", "pp"): 16, ("all_reduce", "tp"): 16}
    assert second.payload_bytes == {("recv", "pp"): 16, ("all_reduce", "tp"): 16}
