"""Races are found, and what is no race is left in peace; one seed is one run, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from attrs import frozen

from picotron.errors import ExecutionError, PlanError
from picotron.planner.plan import TrainingPlan
from picotron.planner.prices import plan_price
from picotron.planner.timeline import make_timeline
from picotron.runtime.backend import Backend
from picotron.runtime.data import step_batches
from picotron.runtime.fuzz import PREEMPT, digest, fuzz
from picotron.runtime.pipeline import Session
from picotron.runtime.simulated import simulate, simulation
from picotron.runtime.world import Simulation, World
from tests.runtime import races
from tests.runtime.models import random_samples, random_weights, tiny_model, tiny_plan, tiny_workload


def alone(race: races.Race) -> Callable[[Backend], object]:
    """A program that is nothing but a race."""
    program = races.planted(race)
    return lambda backend: program(backend, [backend.new_group(range(backend.world_size), "world")])


OWNED = r"a tensor belongs to its operation until wait has returned"
DIFFERS = r"the result depends on who goes first: seed \d+ differs from 0: "
REPORTS: dict[races.Race, str] = {
    races.result_read_before_wait: DIFFERS + r"another result on rank [0-3]",
    races.message_read_before_wait: DIFFERS + r"another result on rank 1\n",
    races.sum_in_order_of_arrival: DIFFERS + r"another result on rank 0, 1, 2, 3\n",
    races.two_operations_on_one_tensor: OWNED,
    races.two_messages_into_one_tensor: rf"rank 1, action recv #0 from rank 0 .*: {OWNED}",
    races.tensor_changed_before_wait: DIFFERS + r"another result on rank 1\n",
    races.handle_dropped: r"action all_reduce #0 in group world .*every handle must be waited for",
    races.flag_read_without_a_barrier: DIFFERS + r"another result on rank 1\n",
    races.work_taken_first_come: DIFFERS + r"another result on rank [0-3](, [0-3])+\n",
    races.one_generator_for_all: DIFFERS + r"another result on rank [0-3](, [0-3])+\n",
    races.messages_that_may_not_come: r"rank 1 waits for recv #0 from rank 0 on channel 'race'",
    races.update_seen_half_done: DIFFERS + r"another result on rank 1\n",
}


@pytest.mark.parametrize("race", races.RACES, ids=lambda race: race.__name__)
def test_a_planted_race_is_found(race: races.Race) -> None:
    """Within 100 seeds; the report says what differs, and the seed that it names shows it again."""
    report = fuzz(alone(race), 4)
    assert not report.ok
    with pytest.raises(ExecutionError, match=REPORTS[race]):
        report.check()
    if report.seed is None:
        return  # found under every seed, as misuse
    assert f"repeat it with seed={report.seed}, preempt={PREEMPT}" in str(report)

    def told(seed: int) -> tuple[str, str]:
        found = simulation(alone(race), 4, World(seed=seed, preempt=PREEMPT))
        return str(found.failure), digest([outcome.result for outcome in found.outcomes])

    assert told(report.seed) == told(report.seed) != told(report.first_seed)


def ring(backend: Backend) -> torch.Tensor:
    """Sums and averages over the world, and messages round a ring, half of them begun early."""
    group, size = backend.new_group(range(backend.world_size)), backend.world_size
    tensor = torch.randn(5, generator=torch.Generator().manual_seed(backend.rank))
    for _ in range(3):
        received = torch.empty(5)
        handles = [
            backend.recv(received, (backend.rank - 1) % size, "ring"),
            backend.send(tensor.clone(), (backend.rank + 1) % size, "ring"),
            backend.all_reduce(tensor, group, "avg"),
        ]
        for handle in handles:
            handle.wait()
        tensor = tensor.sin() + received
    return tensor


@pytest.mark.parametrize("semantics", ["buffered", "rendezvous", "batched"])
def test_what_is_no_race_is_not_found(semantics: str) -> None:
    """The same bits under a hundred seeds."""
    report = fuzz(ring, 4, semantics=semantics)
    report.check()
    assert report.ok
    assert str(report) == "100 seeds, the same result"


def test_an_error_that_all_seeds_share_is_no_race() -> None:
    """It is told as it is."""

    def program(backend: Backend) -> None:
        backend.recv(torch.ones(1), 1 - backend.rank).wait()

    report = fuzz(program, 2, seeds=range(5))
    assert (report.ok, report.seed, report.num_seeds) == (False, None, 5)
    assert str(report).startswith("5 seeds, the same error: rank 0, action recv #0")
    with pytest.raises(ExecutionError, match="wait-for cycle: 0 -> 1 -> 0"):
        report.check()


def test_seeds_are_run_until_one_differs() -> None:
    """No more of them; and the first one is what all others are held against."""
    used: list[int] = []

    def program(backend: Backend) -> int:
        if backend.rank == 0:
            used.append(len(used))
        return max(0, len(used) - 3)

    report = fuzz(program, 1, seeds=(7, 5, 3, 1, 0))
    assert (report.num_seeds, report.first_seed, report.seed) == (4, 7, 1)
    assert used == [0, 1, 2, 3]


def test_without_seeds_there_is_nothing_to_run() -> None:
    """An empty range is refused rather than passed."""
    with pytest.raises(PlanError, match="at least one seed"):
        fuzz(ring, 2, seeds=())


def test_without_preemption_some_races_hide() -> None:
    """Why ``fuzz`` lets others go first where a rank posts, and not only where it waits."""
    program = alone(races.update_seen_half_done)
    assert fuzz(program, 2, preempt=0.0).ok
    assert not fuzz(program, 2).ok


@dataclass
class Plain:
    """Anything."""

    value: Any


@frozen
class Both:
    """Two of anything."""

    one: Any
    other: Any


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (0.0, -0.0),
        (0.1 + 0.2, 0.3),
        (1.0, 1),
        (1, True),
        ([1, 2], (1, 2)),
        ([[1], [2, 3]], [[1, 2], [3]]),
        ({"a": 1}, {"b": 1}),
        (torch.tensor([0.0]), torch.tensor([-0.0])),
        (torch.zeros(2), torch.zeros(2, 1)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
        (torch.zeros(2), np.zeros(2, dtype=np.float32)),
        (torch.zeros(2).bfloat16(), torch.zeros(2).half()),
        (np.float32(1), np.float64(1)),
        (Both(1, torch.ones(1)), Both(1, torch.ones(1) + 1e-7)),
        (Both(1, 2), (1, 2)),
        ("1", 1),
        (None, "None"),
    ],
    ids=str,
)
def test_digests_tell_bits_apart(one: object, other: object) -> None:
    """Values that == or a rounded text may take for equal."""
    assert digest(one) != digest(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.arange(6).view(2, 3), torch.arange(6).view(3, 2).t().contiguous().t().reshape(2, 3)),
        (torch.arange(6)[::2], torch.tensor([0, 2, 4])),
        (torch.ones(2, requires_grad=True), torch.ones(2)),
        (torch.tensor(float("nan")), torch.tensor(float("nan"))),
        (np.arange(6).reshape(2, 3).T, np.array([[0, 3], [1, 4], [2, 5]])),
        (torch.empty(0, 3), torch.empty(0, 3)),
        (Both({"a": [1.5]}, None), Both({"a": [1.5]}, None)),
    ],
    ids=str,
)
def test_digests_see_nothing_but_bits(one: object, other: object) -> None:
    """Neither strides nor gradients, nor which object it is."""
    assert digest(one) == digest(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [([1, 23], [12, 3]), ([2.0, 12], [2.0**11, 2])],
    ids=str,
)
def test_digests_keep_neighbours_apart(one: object, other: object) -> None:
    """Where one item ends and the next begins is part of a value."""
    assert digest(one) != digest(other)


@pytest.mark.parametrize("size", [0, 1])
def test_digests_take_any_tensor(size: int) -> None:
    """One of a single element, or of none, is contiguous whatever its strides."""
    assert digest(torch.zeros(()).expand(size)) == digest(torch.zeros(size))


def test_a_part_of_a_tensor_is_guarded_whatever_its_strides() -> None:
    """One element of three, expanded to a row of one: contiguous, so any operation may own it."""

    def program(backend: Backend) -> float:
        tensor = torch.ones(3)
        backend.all_reduce(tensor[0].expand(1), backend.new_group(range(2))).wait()
        return float(tensor[0])

    assert simulate(program, 2) == [2.0, 2.0]


def test_digests_read_dataclasses() -> None:
    """Field by field, as attrs classes."""
    one, other = Plain(torch.tensor([0.1])), Plain(torch.tensor([0.1 + 9e-9]))
    assert not torch.equal(one.value, other.value)
    assert digest(one) != digest(other)


def test_digests_of_sets_are_of_their_members() -> None:
    """Whoever came in first."""
    assert digest({8, 0}) == digest({0, 8})


def tiny_training() -> TrainingPlan:
    """Eight ranks, each with one layer's half, two microbatches a step."""
    model = tiny_model("gpt2", heads=2, head_dim=4, vocab=32)
    return tiny_plan(model, tiny_workload(global_batch=4, seq_len=4), dp=2, pp=2, tp=2)


def trained(made: TrainingPlan, seed: int) -> Simulation[Any]:
    """Two steps of every rank: its weights, losses and timeline; and all events."""
    data = random_samples(made.model.vocab_size, made.workload.seq_len)

    def program(backend: Backend) -> object:
        session = Session(made, backend, random_weights)
        results = [
            session.step(
                step_batches(
                    made, data, consumed=step * made.workload.global_batch, dp_index=session.where.dp
                )
            )
            for step in range(2)
        ]
        timelines = [make_timeline("virtual", result.entries) for result in results]
        return session.weights, [(result.loss, result.grad_norm) for result in results], timelines

    world = World(seed=seed, preempt=PREEMPT, price=plan_price(made), keep_events=True)
    found = simulation(program, made.topology.world_size, world, timeout_seconds=60)
    assert found.failure is None, found.failure
    return found


@pytest.mark.no_cover
def test_a_hundred_runs_of_a_seed_are_one_run() -> None:
    """Weights, losses, timelines, clocks and the log of all events, in their order, to the bit."""
    made = tiny_training()

    def whole(seed: int) -> str:
        found = trained(made, seed)
        results = [outcome.result for outcome in found.outcomes]
        return digest([results, found.clock_seconds, found.num_hand_overs, repr(found.events)])

    assert len({whole(3) for _ in range(100)}) == 1


def test_other_seeds_are_other_runs_with_the_same_result() -> None:
    """Weights, losses and timelines are the plan's; who went first is the seed's."""
    made = tiny_training()
    found = [trained(made, seed) for seed in range(4)]
    assert len({digest([outcome.result for outcome in run.outcomes]) for run in found}) == 1
    assert len({run.clock_seconds for run in found}) == 1
    assert len({repr(run.events) for run in found}) == 4
    assert len({repr(sorted(map(repr, run.events))) for run in found}) == 1


def test_virtual_time_does_not_depend_on_who_goes_first() -> None:
    """Ranks compute for unlike times between collectives and messages that take time themselves."""

    def program(backend: Backend) -> list[float]:
        group, times, size = backend.new_group(range(4)), [], backend.world_size
        for number in range(4):
            backend.spend((backend.rank * 5 + number * 3) % 7)
            handle = backend.recv(torch.zeros(1), (backend.rank - 1) % size)
            sent = backend.send(torch.zeros(1), (backend.rank + 1) % size)
            backend.spend((backend.rank * 3 + number) % 5)
            reduced = backend.all_reduce(torch.zeros(1), group)
            for one in (handle, sent, reduced):
                one.wait()
                times.append(backend.mark())
        return times

    for semantics in ("buffered", "rendezvous", "batched"):
        fuzz(program, 4, semantics=semantics, price=lambda kind, group, ranks, size: 0.7).check()


def test_events_are_what_ranks_did() -> None:
    """Each rank's own in program order: it posts, waits and ends, and that is all."""

    def program(backend: Backend) -> None:
        group = backend.new_group(range(2), "pair")
        backend.all_reduce(torch.ones(1), group).wait()

    found = simulation(program, 2, World(keep_events=True))
    for rank in range(2):
        assert [(e.what, e.operation) for e in found.events if e.rank == rank] == [
            ("post", "new_group #0 in group world [0, 1]"),
            ("wait", "new_group #0 in group world [0, 1]"),
            ("post", "all_reduce #0 in group pair [0, 1]"),
            ("wait", "all_reduce #0 in group pair [0, 1]"),
            ("end", "has returned"),
        ]


def test_simulate_takes_the_seed_that_fuzz_names() -> None:
    """A deadlock of one seed comes back under simulate."""
    program = alone(races.messages_that_may_not_come)
    found: list[int] = []
    for seed in range(20):
        try:
            simulate(program, 2, seed=seed, preempt=PREEMPT)
        except ExecutionError as error:
            assert "waited for: rank 0, which has returned" in str(error)
            assert f"seed={seed} repeats" in error.__notes__[-1]
            found.append(seed)
    assert 0 < len(found) < 20
