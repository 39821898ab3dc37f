"""Theorems of runs that faults strike: they end, repeat to the bit, and only what strikes data changes it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from attrs import evolve, frozen
from hypothesis import example, given
from hypothesis import strategies as st

from picotron.errors import ExecutionError
from picotron.planner.faults import Corrupt, Drop, Fault, Kill, Pause, Slow
from picotron.runtime.backend import Backend, Handle, Transfer
from picotron.runtime.fuzz import digest
from picotron.runtime.messages import SEMANTICS, Semantics
from picotron.runtime.simulated import simulation
from picotron.runtime.world import Simulation, World
from picotron.testing import fault_scripts

WORLD_SIZE = 3
NUM_OPERATIONS = (16, 20, 14)  # by rank, where nothing strikes
LAST_OPERATION = max(NUM_OPERATIONS) - 1

harmless = st.lists(
    st.one_of(
        st.builds(
            Pause,
            rank=st.integers(0, WORLD_SIZE - 1),
            at=st.integers(0, LAST_OPERATION),
            seconds=st.sampled_from((0.1, 1.0, 8.0)),
        ),
        st.builds(Slow, rank=st.integers(0, WORLD_SIZE - 1), factor=st.sampled_from((1.0, 1.7, 4.0))),
        st.builds(
            Slow,
            link=st.sampled_from(((0, 1), (1, 2), (2, 0))),
            factor=st.sampled_from((1.0, 1.7, 4.0)),
        ),
    ),
    max_size=4,
)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Any way for messages to meet, and any interleaving."""
    return World(
        seed=draw(st.integers(0, 2**32)),
        preempt=draw(st.sampled_from((0.0, 0.5))),
        semantics=draw(st.sampled_from(SEMANTICS)),
        price=seconds,
    )


def seconds(kind: str, group: str, ranks: tuple[int, ...], payload_bytes: int) -> float:
    """Of a communication: so that every operation's shows."""
    return len(kind) / 64 + payload_bytes / 7


@frozen
class Result:
    """Of one operation: what it gave and when it ran, or that it failed."""

    tensor: torch.Tensor | None
    span: tuple[float, float] | None = None
    failed: bool = False


def errands(backend: Backend) -> list[Result]:
    """Two rounds of all that ranks can do together; what fails is noted, and the rank goes on.

    What a failed operation left in its tensors is nobody's business: fresh ones take their place.
    """
    n, r = backend.world_size, backend.rank
    results: list[Result] = []
    try:
        group = backend.new_group(range(n), "world")
        pair = backend.new_group([0, 1], "pair")
    except ExecutionError:
        return [Result(None, failed=True)]

    def got(post: Callable[[], Handle], tensor: torch.Tensor) -> torch.Tensor:
        """Post an operation (or take its handle) and wait; what it gave."""
        try:
            handle = post()
            handle.wait()
        except ExecutionError:
            results.append(Result(None, failed=True))
            return torch.ones_like(tensor)
        results.append(Result(tensor.clone(), handle.span))
        return tensor

    own = torch.sqrt(torch.arange(1.0, 4.0) + r)
    for number in range(2):
        backend.spend(0.5 + r / 8)
        own = got(partial(backend.all_reduce, own, group, "avg"), own)
        whole, sent, received = torch.zeros(3 * n), own.clone(), torch.zeros(3)
        whole = got(partial(backend.all_gather, whole, sent, group), whole)
        swap = Transfer("send", sent, (r + 1) % n, "ring"), Transfer("recv", received, (r - 1) % n, "ring")
        received = got(partial(backend.batch, swap), received)
        if r < 2:
            received = got(partial(backend.all_reduce, received, pair), received)
        # Both directions of one channel, in an order that needs no buffer; the last rank computes first.
        backend.spend(0.25 * (r == n - 1))
        above, below = torch.zeros(3), torch.zeros(3)
        if r > 0:
            above = got(partial(backend.recv, above, r - 1, "line"), above)
        if r < n - 1:
            down = received + above
            handles = backend.send(down, r + 1, "line"), backend.recv(below, r + 1, "line")
            got(partial(handles.__getitem__, 0), down)
            below = got(partial(handles.__getitem__, 1), below)
        if r > 0:
            up = above + below + number
            got(partial(backend.send, up, r - 1, "line"), up)
        parts = [r * j for j in range(n)]  # rows to each rank, as many as from it: to and from rank 0 none
        mixed, rows = torch.zeros(sum(parts)), own.repeat(2)[: sum(parts)].clone()
        got(partial(backend.all_to_all, mixed, rows, group, parts, parts), mixed)
        own = torch.sin(own + received + whole[:3])
    return results


def struck(world: World, faults: tuple[Fault, ...]) -> Simulation[list[Result]]:
    """The errands under ``faults``; they end before anyone loses patience."""
    run = simulation(errands, WORLD_SIZE, evolve(world, faults=faults), timeout_seconds=60)
    assert run.failure is None or "the simulation must end within" not in str(run.failure), run.failure
    return run


def ended(run: Simulation[list[Result]]) -> list[Any]:
    """Which ranks were killed, what the others had, to the bit, and what could not be had."""
    return [
        (outcome.killed, type(outcome.error), str(outcome.error), digest(outcome.result))
        for outcome in run.outcomes
    ]


def values(run: Simulation[list[Result]]) -> list[str]:
    """What every rank was given, to the bit."""
    assert run.failure is None
    return [digest([result.tensor for result in outcome.result or []]) for outcome in run.outcomes]


@given(worlds(), fault_scripts(WORLD_SIZE, max_at=LAST_OPERATION, max_faults=4))
def test_a_struck_run_ends_and_repeats_to_the_bit(world: World, faults: tuple[Fault, ...]) -> None:
    """Whatever strikes: results, errors, clocks and who was killed are the same again."""
    one, other = struck(world, faults), struck(world, faults)
    assert ended(one) == ended(other)
    assert one.clock_seconds == other.clock_seconds
    assert str(one.failure) == str(other.failure)
    killed = {outcome.rank for outcome in one.outcomes if outcome.killed}
    assert killed <= {fault.rank for fault in faults if isinstance(fault, Kill)}
    assert not killed or isinstance(one.failure, ExecutionError)


def example_world(seed: int, semantics: Semantics) -> World:
    return World(seed=seed, semantics=semantics, price=seconds)


@example(example_world(0, "buffered"), example_world(1, "buffered"), (Kill(rank=1, at=6),))
@example(example_world(0, "batched"), example_world(2, "batched"), (Drop(sender=2, receiver=0, at=0),))
@given(worlds(), worlds(), fault_scripts(WORLD_SIZE, max_at=LAST_OPERATION, max_faults=4))
def test_who_goes_first_does_not_matter(world: World, other: World, faults: tuple[Fault, ...]) -> None:
    """Under other seeds the same ranks are killed and the same operations fail; bits and times are equal."""
    one = struck(world, faults)
    two = struck(evolve(world, seed=other.seed, preempt=other.preempt), faults)
    for left, right in zip(one.outcomes, two.outcomes, strict=True):
        assert (left.killed, left.error is None) == (right.killed, right.error is None)
        assert digest(left.result) == digest(right.result)
    assert one.clock_seconds == two.clock_seconds


@given(worlds(), harmless)
def test_delays_keep_the_bits_and_shorten_no_clock(world: World, faults: list[Fault]) -> None:
    """A script of pauses and slowness: the results of a run without, no operation and no rank any earlier."""
    plain, late = struck(world, ()), struck(world, tuple(faults))
    assert values(plain) == values(late)
    for before, after in zip(plain.clock_seconds, late.clock_seconds, strict=True):
        assert after >= before
    for one, other in zip(plain.outcomes, late.outcomes, strict=True):
        for left, right in zip(one.result or [], other.result or [], strict=True):
            assert left.span is not None and right.span is not None
            assert right.span[0] >= left.span[0] and right.span[1] >= left.span[1]


@given(worlds(), fault_scripts(WORLD_SIZE, max_at=LAST_OPERATION, max_faults=1))
def test_one_fault_does_only_what_it_says(world: World, faults: tuple[Fault, ...]) -> None:
    """A wrong bit and a delay fail nothing; a lost message kills nobody."""
    run = struck(world, faults)
    failed = [result.failed for outcome in run.outcomes for result in outcome.result or []]
    for fault in faults:
        if isinstance(fault, Pause | Slow | Corrupt):
            assert run.failure is None and not any(failed)
        elif isinstance(fault, Drop):
            assert not any(outcome.killed for outcome in run.outcomes)
        elif isinstance(fault, Kill):
            assert run.outcomes[fault.rank].killed == (fault.at < NUM_OPERATIONS[fault.rank])
    if not faults:
        assert run.failure is None and not any(failed)
