"""Theorems of the simulated world: an oracle's values, messages in order, the same bits under any seed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from attrs import frozen
from hypothesis import given, settings
from hypothesis import strategies as st

from picotron.runtime.backend import Backend, Handle
from picotron.runtime.simulated import simulate

Rows = list[np.ndarray]  # one array a member, in group order


@frozen
class Step:
    """One collective in every group of a partition of the world: ``colors[rank]`` names rank's group."""

    kind: str
    op: str
    colors: tuple[int, ...]
    rows: int
    salt: int
    wait_at_once: bool

    def groups(self) -> list[list[int]]:
        """The partition, ascending ranks in each."""
        return [[r for r, c in enumerate(self.colors) if c == color] for color in sorted(set(self.colors))]


@st.composite
def programs(draw: st.DrawFn, max_world: int = 5, max_steps: int = 6) -> tuple[int, list[Step]]:
    """A world size and steps for it."""
    world_size = draw(st.integers(1, max_world))
    step = st.builds(
        Step,
        kind=st.sampled_from(sorted(ORACLES)),
        op=st.sampled_from(("sum", "max", "avg")),
        colors=st.tuples(*[st.integers(0, 2)] * world_size),
        rows=st.integers(0, 3),
        salt=st.integers(0, 100),
        wait_at_once=st.booleans(),
    )
    return world_size, draw(st.lists(step, max_size=max_steps))


def content(step: Step, rank: int, rows: int) -> np.ndarray:
    """What a rank brings to a step: integers, so that every order of adding them is exact."""
    return np.random.default_rng((step.salt, rank)).integers(-8, 8, (rows, 2)).astype(np.float64)


def part_rows(step: Step, sender: int, receiver: int) -> int:
    """Rows of an all_to_all from one world rank to another."""
    return (step.rows * sender + receiver + step.salt) % 4


def reduced(step: Step, inputs: Rows) -> np.ndarray:
    stack = np.stack(inputs)
    values: dict[str, np.ndarray] = {
        "sum": stack.sum(0),
        "max": stack.max(0),
        "avg": stack.sum(0) / len(inputs),
    }
    return values[step.op]


def oracle_all_to_all(step: Step, group: list[int]) -> Rows:
    sent = {
        r: np.split(
            content(step, r, sum(part_rows(step, r, j) for j in group)),
            np.cumsum([part_rows(step, r, j) for j in group])[:-1],
        )
        for r in group
    }
    return [np.concatenate([sent[i][position] for i in group]) for position in range(len(group))]


def oracle_reduce_scatter(step: Step, group: list[int]) -> Rows:
    return np.split(reduced(step, [content(step, r, step.rows * len(group)) for r in group]), len(group))


ORACLES: dict[str, Callable[[Step, list[int]], Rows]] = {
    "all_reduce": lambda s, g: [reduced(s, [content(s, r, s.rows) for r in g])] * len(g),
    "all_gather": lambda s, g: [np.concatenate([content(s, r, s.rows) for r in g])] * len(g),
    "reduce_scatter": oracle_reduce_scatter,
    "all_to_all": oracle_all_to_all,
    "broadcast": lambda s, g: [content(s, g[s.salt % len(g)], s.rows)] * len(g),
}


def post(backend: Backend, step: Step) -> tuple[Handle, torch.Tensor]:
    """Open the step's groups, and post this rank's part of it."""
    opened = [backend.new_group(ranks) for ranks in step.groups()]
    (group,) = [g for g in opened if backend.rank in g.ranks]

    def tensor(rows: int) -> torch.Tensor:
        return torch.from_numpy(content(step, backend.rank, rows))

    def empty(rows: int) -> torch.Tensor:
        return torch.empty((rows, 2), dtype=torch.float64)

    match step.kind:
        case "all_reduce":
            output = tensor(step.rows)
            return backend.all_reduce(output, group, step.op), output
        case "broadcast":
            output = tensor(step.rows)
            return backend.broadcast(output, group, group.ranks[step.salt % group.size]), output
        case "all_gather":
            output = empty(step.rows * group.size)
            return backend.all_gather(output, tensor(step.rows), group), output
        case "reduce_scatter":
            output = empty(step.rows)
            return backend.reduce_scatter(output, tensor(step.rows * group.size), group, step.op), output
    sent = [part_rows(step, backend.rank, r) for r in group.ranks]
    received = [part_rows(step, r, backend.rank) for r in group.ranks]
    output = empty(sum(received))
    return backend.all_to_all(output, tensor(sum(sent)), group, received, sent), output


def run(backend: Backend, steps: list[Step]) -> list[np.ndarray]:
    """Every step's result on this rank; what is not waited for at once is, in reverse, at the end."""
    handles, outputs = [], []
    for step in steps:
        handle, output = post(backend, step)
        outputs.append(output)
        handles.append(handle)
        if step.wait_at_once:
            handle.wait()
    for handle in reversed(handles):
        handle.wait()
    return [output.numpy() for output in outputs]


@settings(deadline=None, max_examples=60)
@given(programs(), st.integers(0, 2**32))
def test_collectives_equal_a_numpy_oracle(program: tuple[int, list[Step]], seed: int) -> None:
    """Any program of collectives over any partitions has the oracle's values, whoever goes first."""
    world_size, steps = program
    results = simulate(lambda backend: run(backend, steps), world_size, seed=seed)
    for position, step in enumerate(steps):
        for group in step.groups():
            for rank, expected in zip(group, ORACLES[step.kind](step, group), strict=True):
                np.testing.assert_array_equal(results[rank][position], expected)


Route = tuple[int, int, str]  # sender, receiver, channel


@st.composite
def exchanges(draw: st.DrawFn, max_world: int = 4) -> tuple[int, list[Route], list[bool]]:
    """A world size, messages in the order their senders post them, and who receives before sending."""
    world_size = draw(st.integers(2, max_world))
    rank = st.integers(0, world_size - 1)
    routes = st.tuples(rank, rank, st.sampled_from(("", "forward", "backward")))
    messages = draw(st.lists(routes.filter(lambda route: route[0] != route[1]), max_size=12))
    return world_size, messages, draw(st.lists(st.booleans(), min_size=world_size, max_size=world_size))


def exchange(
    backend: Backend, messages: list[Route], receive_first: bool, log: list[int]
) -> dict[Route, list[int]]:
    """What this rank received by route, in the order it posted the receives."""
    received: list[tuple[Route, torch.Tensor, Handle]] = []

    def receive() -> None:
        for route in messages:
            if route[1] == backend.rank:
                tensor = torch.full((), -1)
                received.append((route, tensor, backend.recv(tensor, route[0], route[2])))

    if receive_first:
        receive()
    for number, route in enumerate(messages):
        log.append(backend.rank)
        if route[0] == backend.rank:
            backend.send(torch.tensor(number), route[1], route[2]).wait()
    if not receive_first:
        receive()
    for _, _, handle in reversed(received):
        handle.wait()
    by_route: dict[Route, list[int]] = {}
    for route, tensor, _ in received:
        by_route.setdefault(route, []).append(int(tensor))
    return by_route


@settings(deadline=None, max_examples=60)
@given(exchanges(), st.integers(0, 2**32))
def test_messages_keep_their_order(drawn: tuple[int, list[Route], list[bool]], seed: int) -> None:
    """On every (sender, receiver, channel) the i-th receive has the i-th send, and a seed is one run."""
    world_size, messages, receive_first = drawn
    logs: list[list[int]] = [[], []]
    for log in logs:

        def program(backend: Backend, log: list[int] = log) -> dict[Route, list[int]]:
            return exchange(backend, messages, receive_first[backend.rank], log)

        results = simulate(program, world_size, seed=seed, semantics="buffered")
        for sender, receiver, channel in set(messages):
            route = (sender, receiver, channel)
            expected = [number for number, other in enumerate(messages) if other == route]
            assert results[receiver][route] == expected
    assert logs[0] == logs[1]


def blend(backend: Backend, rounds: int) -> list[float]:
    """Rounding everywhere: sums, averages and messages of irrational numbers, mixed for some rounds."""
    group = backend.new_group(range(backend.world_size))
    tensor = torch.sqrt(torch.arange(1.0, 8.0) + backend.rank)
    for _ in range(rounds):
        backend.all_reduce(tensor, group, "avg").wait()
        part, whole = torch.empty(7), tensor.repeat(backend.world_size)
        backend.reduce_scatter(part, whole * (backend.rank + 1) ** 0.5, group).wait()
        tensor = torch.sin(part)
    return tensor.tolist()


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 2**32), st.integers(0, 2**32))
def test_every_seed_gives_the_same_bits(world_size: int, rounds: int, one: int, other: int) -> None:
    """Interleaving changes nothing, not even rounding."""
    results = [
        simulate(lambda backend: blend(backend, rounds), world_size, seed=seed) for seed in (one, other)
    ]
    assert results[0] == results[1]
