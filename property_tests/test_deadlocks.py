"""Theorems of deadlock reports: none on programs that are right, one on every kind of bug, naming its place.

Every family of bugs is a right program with one mistake; an oracle that only counts says what must be told.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
from attrs import evolve, field, frozen
from hypothesis import given, settings
from hypothesis import strategies as st

from picotron.errors import ExecutionError, PlanError
from picotron.planner.actions import Action, Phase
from picotron.planner.faults import Drop
from picotron.planner.lower import Messages
from picotron.planner.pipeline import Schedule
from picotron.runtime.messages import SEMANTICS, Semantics
from picotron.runtime.simulated import simulation
from picotron.runtime.world import Simulation, World
from property_tests.oracle_programs import Verdict, verdict
from property_tests.strategies import interleavings, schedules, warmups
from property_tests.strategies_programs import (
    BLOCKING,
    CHANNELS,
    CONTROL,
    KINDS,
    Act,
    Collective,
    End,
    Joint,
    Outputs,
    Post,
    Program,
    Sketch,
    Wait,
    collective,
    collectives,
    exchanges,
    expected_outputs,
    lay_out,
    lowered,
    message,
    programs,
    run,
    sketches,
)

MEETING: tuple[Semantics, ...] = ("rendezvous", "batched")  # both ends end together
TIMEOUT_SECONDS = 60.0  # a guard: a run that needs it hangs
NUM_PROGRAMS = max(1000, settings().max_examples)
NUM_MUTANTS = max(200, settings().max_examples)  # of each family

seeds = st.integers(0, 2**32)
chances = st.sampled_from((0.0, 0.5))


def simulated(
    program: Program, semantics: Semantics, seed: int = 0, preempt: float = 0.0, **world: object
) -> Simulation[Outputs]:
    """The program's run, which must not hang."""
    settings = World(seed=seed, semantics=semantics, preempt=preempt, **world)
    found = simulation(
        lambda backend: run(backend, program), program.world_size, settings, timeout_seconds=TIMEOUT_SECONDS
    )
    assert "the simulation must end within" not in str(found.failure)
    return found


def differences(found: Simulation[Outputs], program: Program) -> list[str]:
    """Where results are others than the oracle's."""
    unlike = []
    for outcome, due in zip(found.outcomes, expected_outputs(program), strict=True):
        assert outcome.result is not None and outcome.result.keys() == due.keys()
        for key, arrays in due.items():
            for got, array in zip(outcome.result[key], arrays, strict=True):
                if got.dtype != array.dtype or not np.array_equal(got, array):
                    unlike.append(f"rank {outcome.rank}, operation {key}: {got}, not {array}")
    return unlike


@st.composite
def right_programs(draw: st.DrawFn) -> tuple[Program, Semantics]:
    """A program, and semantics under which it is right."""
    semantics = draw(st.sampled_from(SEMANTICS))
    return draw(programs(semantics)), semantics


@st.composite
def right_pipelines(draw: st.DrawFn) -> tuple[Program, Semantics]:
    """A step of a pipeline in one, or in two copies that reduce gradients, as the planner lowers it."""
    num_ranks, num_microbatches = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    schedule = draw(schedules(3, 4) | warmups(num_ranks, num_microbatches))
    made = lowered(schedule, dp=draw(st.integers(1, 2)), num_buckets=draw(st.integers(0, 2)))
    return made, draw(st.sampled_from(SEMANTICS))


@settings(deadline=None, max_examples=NUM_PROGRAMS)
@given(right_programs(), seeds, chances)
def test_right_programs_end_well(drawn: tuple[Program, Semantics], seed: int, preempt: float) -> None:
    """No report, and the oracle's values, whatever the semantics and whoever goes first."""
    program, semantics = drawn
    assert verdict(program, semantics).well
    found = simulated(program, semantics, seed, preempt)
    assert found.failure is None, found.failure
    assert differences(found, program) == []


@settings(deadline=None, max_examples=NUM_MUTANTS)
@given(right_pipelines(), seeds, chances)
def test_lowered_schedules_end_well(drawn: tuple[Program, Semantics], seed: int, preempt: float) -> None:
    """A step that the planner has lowered runs under any semantics, each microbatch in its place."""
    program, semantics = drawn
    assert verdict(program, semantics).well
    found = simulated(program, semantics, seed, preempt)
    assert found.failure is None, found.failure
    assert differences(found, program) == []


@settings(deadline=None, max_examples=NUM_MUTANTS)
@given(interleavings(), seeds, chances)
def test_the_planner_refuses_what_cannot_end(schedule: Schedule, seed: int, preempt: float) -> None:
    """A schedule's rows deadlock if and only if ``lower`` says so."""
    try:
        program, refusal = lowered(schedule), ""
    except PlanError as error:
        refusal = str(error)
        with unchecked():
            program = lowered(schedule)
    found = simulated(program, "rendezvous", seed, preempt)
    if not refusal:
        assert found.failure is None and differences(found, program) == []
        return
    assert "wait for each other" in refusal
    assert_told(found, verdict(program, "rendezvous"))
    assert "deadlock" in str(found.failure)


def unchecked() -> AbstractContextManager[object]:
    """A context in which ``lower`` refuses nothing: each channel holds one message."""
    return mock.patch("picotron.planner.transfers.send_depths", _one_each)


def _one_each(_: Schedule, sent: Messages) -> np.ndarray:
    return np.ones(len(sent.starts) - 1, dtype=np.int64)


@frozen
class Mutant:
    """A program with one mistake. ``suspect`` made it; its report names one of ``named`` (patterns).

    ``cycle``: the ranks of the circle that the mistake closes, in its order.
    """

    program: Program
    semantics: Semantics
    suspect: int
    named: tuple[str, ...]
    cycle: tuple[int, ...] = ()
    lost: frozenset[tuple[int, int, int]] = frozenset()
    faults: tuple[Drop, ...] = field(default=(), repr=False)


def swapped(acts: tuple[Act, ...], one: int, other: int) -> list[Act]:
    """The acts with operations ``one`` and ``other`` in each other's place."""
    whats = {act.key: act.what for act in acts if isinstance(act, Post)}
    names = {one: other, other: one}
    found: list[Act] = []
    for act in acts:
        key = names.get(act.key, act.key)
        found.append(Post(key, whats[key]) if isinstance(act, Post) else Wait(key))
    return found


def without(acts: tuple[Act, ...], key: int) -> list[Act]:
    """The acts less operation ``key``."""
    return [act for act in acts if act.key != key]


def replaced(acts: tuple[Act, ...], key: int, what: Collective | tuple[End, ...]) -> list[Act]:
    """The acts with ``what`` as operation ``key``."""
    return [Post(key, what) if isinstance(act, Post) and act.key == key else act for act in acts]


@st.composite
def inserted(draw: st.DrawFn, sketch: Sketch) -> int:
    """A place for further operations."""
    return draw(st.integers(0, len(sketch.joints)))


@st.composite
def subgroups(
    draw: st.DrawFn, world_size: int, *, least: int = 2, holding: int | None = None
) -> tuple[int, ...]:
    """Ascending ranks, ``least`` of them or more."""
    first = st.just(holding) if holding is not None else st.integers(0, world_size - 1)
    order = [draw(first), *draw(st.permutations(range(world_size)))]
    size = draw(st.integers(least, world_size))
    return tuple(sorted(list(dict.fromkeys(order))[:size]))


@st.composite
def with_message(draw: st.DrawFn, min_world: int = 2) -> tuple[Sketch, Semantics, int, int, int, str]:
    """A sketch with a message in it: its key, sender, receiver and channel."""
    sketch = draw(sketches(min_world=min_world))
    sender = draw(st.integers(0, sketch.world_size - 1))
    receiver = (sender + draw(st.integers(1, sketch.world_size - 1))) % sketch.world_size
    at, channel = draw(inserted(sketch)), draw(st.sampled_from(CHANNELS))
    delays = draw(st.tuples(*[st.integers(0, 3)] * sketch.world_size))
    joint = evolve(message(sender, receiver, channel=channel), delays=delays)
    semantics = draw(st.sampled_from(SEMANTICS))
    return sketch.with_joints(at, joint), semantics, at, sender, receiver, channel


@st.composite
def with_collective(
    draw: st.DrawFn, kinds: tuple[str, ...] = (*KINDS, *BLOCKING)
) -> tuple[Sketch, Semantics, int]:
    """A sketch with a collective of at least two ranks in it, by key."""
    sketch = draw(sketches())
    shared = [index for index, group in enumerate(sketch.groups) if len(group) > 1]
    what = draw(collectives(sketch.groups, kinds))
    if what.group != CONTROL:
        group = draw(st.sampled_from(shared))
        what = evolve(what, group=group, source=draw(st.sampled_from(sketch.groups[group])))
    at = draw(inserted(sketch))
    delays = draw(st.tuples(*[st.integers(0, 3)] * sketch.world_size))
    joint = evolve(collective(sketch, what), delays=delays)
    return sketch.with_joints(at, joint), draw(st.sampled_from(SEMANTICS)), at


def on_channel(sender: int, receiver: int, channel: str) -> tuple[str, ...]:
    """Patterns of the ends of a channel's messages."""
    return (
        rf"rank {sender} (posted|waits for) send #\d+ to rank {receiver} on channel '{channel}'",
        rf"rank {receiver} (posted|waits for) recv #\d+ from rank {sender} on channel '{channel}'",
    )


@st.composite
def crossed_sends(draw: st.DrawFn) -> Mutant:
    """Ranks send round a ring; the one that received first now sends first as all others."""
    sketch = draw(sketches())
    ring = draw(st.permutations(range(sketch.world_size)))[: draw(st.integers(2, sketch.world_size))]
    size, at, semantics = len(ring), draw(inserted(sketch)), draw(st.sampled_from(MEETING))
    channel = draw(st.sampled_from(CHANNELS))
    hops = [(ring[i], ring[(i + 1) % size]) for i in (0, *range(size - 1, 0, -1))]
    joints = [message(sender, receiver, channel=channel, pinned=True) for sender, receiver in hops]
    program = lay_out(sketch.with_joints(at, *joints), semantics)
    suspect = ring[1]
    assert verdict(program, semantics).well
    acts, received = program.acts[suspect], program.index(suspect, at)
    sent = [act for act in acts if act.key == at + size - 1]
    rest = [act for act in acts[received:] if act not in sent]
    mutant = program.changed(suspect, [*acts[:received], *sent, *rest])
    assert verdict(mutant, "buffered").well
    first = ring.index(min(ring))
    named = (rf"rank {suspect} waits for send #\d+ to rank {ring[2 % size]} on channel '{channel}'",)
    return Mutant(mutant, semantics, suspect, named, cycle=(*ring[first:], *ring[:first]))


@st.composite
def swapped_collectives(draw: st.DrawFn) -> Mutant:
    """Two unlike collectives of one group are posted in the other order by one rank."""
    sketch, semantics, later = draw(with_collective(KINDS))
    second = next(iter(sketch.joints[later].parts.values()))
    assert isinstance(second, Collective)
    first = evolve(second, dtype="int64" if second.dtype == "float64" else "float64", op="sum")
    if draw(st.booleans()) and second.kind != "all_reduce":
        first = Collective("all_reduce", second.group)
    at = draw(st.integers(0, later))
    program = lay_out(sketch.with_joints(at, collective(sketch, first)), semantics)
    suspect = draw(st.sampled_from(program.groups[second.group]))
    mutant = program.changed(suspect, swapped(program.acts[suspect], at, later + 1))
    return Mutant(mutant, semantics, suspect, (rf"rank {suspect} posted {second.kind} ",))


@st.composite
def crossed_groups(draw: st.DrawFn) -> Mutant:
    """One rank enters the collectives of two groups, blocking, in the other order."""
    sketch, semantics = draw(sketches(hoist=False)), draw(st.sampled_from(SEMANTICS))
    shared = draw(subgroups(sketch.world_size))
    pair = draw(st.permutations((0, len(sketch.groups))))
    sketch = evolve(sketch, groups=(*sketch.groups, shared))
    at, kinds = draw(inserted(sketch)), draw(st.tuples(*[st.sampled_from(("all_reduce", "all_to_all"))] * 2))
    joints = [
        collective(sketch, Collective(kind, group), pinned=True)
        for kind, group in zip(kinds, pair, strict=True)
    ]
    program = lay_out(sketch.with_joints(at, *joints), semantics)
    suspect = draw(st.sampled_from(shared))
    mutant = program.changed(suspect, swapped(program.acts[suspect], at, at + 1))
    least = min(rank for rank in shared if rank != suspect)
    named = (rf"rank {suspect} waits for {kinds[1]} #\d+ in group g{pair[1]} ",)
    return Mutant(mutant, semantics, suspect, named, cycle=tuple(sorted((least, suspect))))


@st.composite
def skipped_collectives(draw: st.DrawFn) -> Mutant:
    """One rank leaves a collective out."""
    sketch, semantics, key = draw(with_collective())
    program = lay_out(sketch, semantics)
    what = next(iter(sketch.joints[key].parts.values()))
    assert isinstance(what, Collective)
    suspect = draw(st.sampled_from(program.members(what.group)))
    mutant = program.changed(suspect, without(program.acts[suspect], key))
    return Mutant(mutant, semantics, suspect, (rf"in group {group_name(program, what.group)}",))


def group_name(program: Program, group: int) -> str:
    """A pattern of a group's name in reports."""
    return re.escape(f"{'world' if group == CONTROL else f'g{group}'} {list(program.members(group))}")


@st.composite
def early_returns(draw: st.DrawFn) -> Mutant:
    """One rank returns somewhere before a collective; what it has begun it waits for."""
    sketch, semantics, key = draw(with_collective())
    program = lay_out(sketch, semantics)
    what = next(iter(sketch.joints[key].parts.values()))
    assert isinstance(what, Collective)
    suspect = draw(st.sampled_from(program.members(what.group)))
    stop = draw(st.integers(0, program.index(suspect, key)))
    done, later = program.acts[suspect][:stop], program.acts[suspect][stop:]
    begun = {act.key for act in done if isinstance(act, Post)}
    kept = [act for act in later if isinstance(act, Wait) and act.key in begun]
    mutant = program.changed(suspect, [*done, *kept])
    return Mutant(mutant, semantics, suspect, (rf"\b{suspect}\b.* (is|are) not there",))


@st.composite
def wrong_groups(draw: st.DrawFn) -> Mutant:
    """One rank enters a collective of the world in another group of its own."""
    sketch = draw(sketches())
    suspect = draw(st.integers(0, sketch.world_size - 1))
    other = len(sketch.groups)
    own = draw(subgroups(sketch.world_size, least=1, holding=suspect))
    sketch = evolve(sketch, groups=(*sketch.groups, own))
    at, semantics = draw(inserted(sketch)), draw(st.sampled_from(SEMANTICS))
    what = evolve(draw(collectives(sketch.groups, KINDS)), group=0, source=suspect)
    program = lay_out(sketch.with_joints(at, collective(sketch, what)), semantics)
    mutant = program.changed(suspect, replaced(program.acts[suspect], at, evolve(what, group=other)))
    named = tuple(group_name(program, group) for group in (0, other))
    return Mutant(mutant, semantics, suspect, named)


@st.composite
def wrong_peers(draw: st.DrawFn) -> Mutant:
    """One end of a message names a third rank."""
    sketch, semantics, key, sender, receiver, channel = draw(with_message(min_world=3))
    program = lay_out(sketch, semantics)
    suspect = draw(st.sampled_from((sender, receiver)))
    third = draw(st.sampled_from([r for r in range(program.world_size) if r not in (sender, receiver)]))
    (end,) = program.posts_of(suspect, key)
    mutant = program.changed(suspect, replaced(program.acts[suspect], key, (evolve(end, peer=third),)))
    wrong = (sender, third) if suspect == sender else (third, receiver)
    named = (*on_channel(sender, receiver, channel), *on_channel(*wrong, channel))
    return Mutant(mutant, semantics, suspect, named)


@st.composite
def missing_ends(draw: st.DrawFn, kind: str) -> Mutant:
    """One end of a message is left out."""
    sketch, semantics, key, sender, receiver, channel = draw(with_message())
    program = lay_out(sketch, semantics)
    suspect = sender if kind == "send" else receiver
    mutant = program.changed(suspect, without(program.acts[suspect], key))
    return Mutant(mutant, semantics, suspect, on_channel(sender, receiver, channel))


@st.composite
def doubled_ends(draw: st.DrawFn, kind: str) -> Mutant:
    """One end of a message is posted twice, the second time after the first or at the end."""
    sketch, semantics, key, sender, receiver, channel = draw(with_message())
    program = lay_out(sketch, semantics)
    suspect = sender if kind == "send" else receiver
    acts, again = program.acts[suspect], len(sketch.joints)
    at = draw(st.integers(program.index(suspect, key) + 1, len(acts)))
    posted = Post(again, program.posts_of(suspect, key))
    until = draw(st.integers(at, len(acts)))
    mutant = program.changed(suspect, [*acts[:at], posted, *acts[at:until], Wait(again), *acts[until:]])
    return Mutant(mutant, semantics, suspect, on_channel(sender, receiver, channel))


@st.composite
def unlike_collectives(draw: st.DrawFn) -> Mutant:
    """One rank's part of a collective has another kind, op, dtype, source or size."""
    sketch, semantics, key = draw(with_collective())
    program = lay_out(sketch, semantics)
    what = next(iter(sketch.joints[key].parts.values()))
    assert isinstance(what, Collective)
    members = program.members(what.group)
    suspect = draw(st.sampled_from(members))
    if what.kind in BLOCKING:
        changed = evolve(what, kind=draw(st.sampled_from([kind for kind in BLOCKING if kind != what.kind])))
    else:
        changes: list[dict[str, object]] = [{"dtype": "float32" if what.dtype != "float32" else "float64"}]
        changes += [{"kind": "all_gather" if what.kind != "all_gather" else "all_to_all"}]
        if what.kind != "all_to_all":
            changes += [{"rows": what.rows + 1}]
        if what.kind in ("all_reduce", "reduce_scatter"):
            changes += [{"op": "max" if what.op != "max" else "sum"}]
        if what.kind == "broadcast":
            changes += [{"source": next(rank for rank in members if rank != what.source)}]
        changed = evolve(what, **draw(st.sampled_from(changes)))
    mutant = program.changed(suspect, replaced(program.acts[suspect], key, changed))
    return Mutant(mutant, semantics, suspect, (rf"rank {suspect} posted {changed.kind}\b",))


@st.composite
def unlike_messages(draw: st.DrawFn) -> Mutant:
    """One end of a message has another dtype or size."""
    sketch, semantics, key, sender, receiver, _ = draw(with_message())
    program = lay_out(sketch, semantics)
    suspect = draw(st.sampled_from((sender, receiver)))
    (end,) = program.posts_of(suspect, key)
    changed = evolve(end, **draw(st.sampled_from(({"rows": 2}, {"dtype": "int64"}))))
    mutant = program.changed(suspect, replaced(program.acts[suspect], key, (changed,)))
    named = rf"rank {suspect} posted .* of torch.{changed.dtype} \[{changed.rows}\]"
    return Mutant(mutant, semantics, suspect, (named,))


@st.composite
def dropped_messages(draw: st.DrawFn) -> Mutant:
    """A fault loses a message."""
    sketch, semantics, _, sender, receiver, _ = draw(with_message())
    program = lay_out(sketch, semantics)
    sent = [
        end
        for post in program.posts(sender)
        if not isinstance(post.what, Collective)
        for end in post.what
        if end.kind == "send" and end.peer == receiver
    ]
    number = draw(st.integers(0, len(sent) - 1))
    send = rf"rank {sender} posted send #\d+ to rank {receiver} on channel '{sent[number].channel}'"
    named = f"lost: {send}", rf"must agree in dtype and shape: {send}"  # the next one came in its stead
    return Mutant(
        program,
        semantics,
        sender,
        named,
        lost=frozenset({(sender, receiver, number)}),
        faults=(Drop(sender=sender, receiver=receiver, at=number),),
    )


@st.composite
def missing_waits(draw: st.DrawFn) -> Mutant:
    """One handle is never waited for."""
    sketch, semantics, key, sender, receiver, channel = draw(with_message())
    program = lay_out(sketch, semantics)
    suspect = draw(st.sampled_from((sender, receiver)))
    acts = [act for act in program.acts[suspect] if not (isinstance(act, Wait) and act.key == key)]
    kind = "send" if suspect == sender else "recv"
    named = rf"rank {suspect}, action {kind} #\d+ .* on channel '{channel}', position .*: every handle"
    return Mutant(program.changed(suspect, acts), semantics, suspect, (named,))


@st.composite
def pipeline_circles(draw: st.DrawFn) -> Mutant:
    """Some rank wants more forwards of the one before it than that one runs before its first backward."""
    num_ranks, num_microbatches = draw(st.integers(2, 4)), draw(st.integers(2, 4))
    held = [draw(st.integers(1, num_microbatches)) for _ in range(num_ranks)]
    suspect = draw(st.integers(0, num_ranks - 2))
    held[suspect] = draw(st.integers(1, num_microbatches - 1))
    held[suspect + 1] = draw(st.integers(held[suspect] + 1, num_microbatches))
    schedule = Schedule(
        name="circle",
        num_microbatches=num_microbatches,
        stage_ranks=tuple(range(num_ranks)),
        orders=tuple(holding(rank, held[rank], num_microbatches) for rank in range(num_ranks)),
    )
    dp = draw(st.integers(1, 2)) if num_ranks == 2 else 1
    with pytest.raises(PlanError, match="wait for each other"):
        lowered(schedule, dp=dp)
    with unchecked():
        program = lowered(schedule, dp=dp)
    semantics = draw(st.sampled_from(SEMANTICS))
    named = rf"rank {suspect * dp} waits for recv #\d+ from rank \d+ on channel"
    return Mutant(program, semantics, suspect * dp, (named,))


def holding(rank: int, num_held: int, num_microbatches: int) -> tuple[Action, ...]:
    """``num_held`` forwards, then one backward and one forward in turn, then the backwards left."""
    forwards = [Action(rank, Phase.FORWARD, index) for index in range(num_microbatches)]
    backwards = [Action(rank, Phase.BACKWARD, index) for index in range(num_microbatches)]
    order = forwards[:num_held]
    for forward, backward in zip(forwards[num_held:], backwards, strict=False):
        order += [backward, forward]
    return (*order, *backwards[num_microbatches - num_held :])


@st.composite
def crossed_streams(draw: st.DrawFn) -> Mutant:
    """Two messages of a pair, posted together and waited for later, run in another order on one of them."""
    sketch = draw(sketches())
    pair = draw(st.permutations(range(sketch.world_size)))[:2]
    at, channel = draw(inserted(sketch)), draw(st.sampled_from(CHANNELS))
    waits = [Wait(key) for key in draw(st.permutations((at, at + 1)))]
    hops = [(pair[0], pair[1]), (pair[1], pair[0])]
    joints = [message(sender, receiver, channel=channel, pinned=True) for sender, receiver in hops]
    program = lay_out(sketch.with_joints(at, *joints), "batched")
    for rank in pair:
        acts = program.acts[rank]
        index, later = program.index(rank, at), program.index(rank, at + 1)
        rest = [act for act in acts[index:] if act.key not in (at, at + 1)]
        program = program.changed(rank, [*acts[:index], acts[index], acts[later], *waits, *rest])
    assert verdict(program, "batched").well
    suspect = draw(st.sampled_from(pair))
    mutant = program.changed(suspect, swapped(program.acts[suspect], at, at + 1))
    assert verdict(mutant, "rendezvous").well
    named = on_channel(*pair, channel)
    return Mutant(mutant, "batched", suspect, named, cycle=tuple(sorted(pair)))


@st.composite
def missing_ends_of_batches(draw: st.DrawFn) -> Mutant:
    """One rank leaves one message out of what it posts together, among batches that stand behind others."""
    world_size = draw(st.integers(3, 5))
    joints = []
    for _ in range(draw(st.integers(2, 6))):
        delays = draw(st.tuples(*[st.integers(0, 4)] * world_size))
        joints.append(Joint(draw(exchanges(world_size, channels=("",))), delays))
    sketch = Sketch(world_size, (tuple(range(world_size)),), tuple(joints))
    program = lay_out(sketch, "batched")
    key = draw(st.integers(0, len(joints) - 1))
    suspect = draw(st.sampled_from(sorted(joints[key].parts)))
    ends, acts = program.posts_of(suspect, key), program.acts[suspect]
    index = draw(st.integers(0, len(ends) - 1))
    left = (*ends[:index], *ends[index + 1 :])
    mutant = program.changed(suspect, replaced(acts, key, left) if left else without(acts, key))
    pair = suspect, ends[index].peer
    return Mutant(
        mutant, "batched", suspect, on_channel(*(pair if ends[index].kind == "send" else pair[::-1]), "")
    )


FAMILIES: dict[str, Callable[[], st.SearchStrategy[Mutant]]] = {
    "crossed sends": crossed_sends,
    "swapped collectives": swapped_collectives,
    "crossed groups": crossed_groups,
    "crossed streams": crossed_streams,
    "skipped collective": skipped_collectives,
    "early return": early_returns,
    "wrong group": wrong_groups,
    "wrong peer": wrong_peers,
    "missing receive": lambda: missing_ends("recv"),
    "missing send": lambda: missing_ends("send"),
    "missing end of a batch": missing_ends_of_batches,
    "double receive": lambda: doubled_ends("recv"),
    "double send": lambda: doubled_ends("send"),
    "unlike collective": unlike_collectives,
    "unlike message": unlike_messages,
    "dropped message": dropped_messages,
    "missing wait": missing_waits,
    "pipeline circle": pipeline_circles,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_mutant_is_told(family: str) -> None:
    """A report, never a hang nor a pass; it names who made the mistake, and in which operation."""

    @settings(deadline=None, max_examples=NUM_MUTANTS)
    @given(FAMILIES[family](), seeds, chances)
    def told(mutant: Mutant, seed: int, preempt: float) -> None:
        due = verdict(mutant.program, mutant.semantics, mutant.lost)
        assert not due.well, "the mutation is no mistake"
        found = simulated(mutant.program, mutant.semantics, seed, preempt, faults=mutant.faults)
        assert_told(found, due)
        text = str(found.failure)
        everyone = {*due.edges, *(rank for absent in due.edges.values() for rank in absent)}
        assert mutant.suspect in everyone or re.search(rf"\brank {mutant.suspect}\b", text), text
        assert any(re.search(pattern, text) for pattern in mutant.named), (mutant.named, text)
        if mutant.cycle:
            assert cycle_of(text) == (*mutant.cycle, mutant.cycle[0])

    told()


def cycle_of(text: str) -> tuple[int, ...]:
    """The cycle that a report names, or ()."""
    found = re.search(r"^wait-for cycle: (.*)$", text, re.MULTILINE)
    return tuple(map(int, found[1].split(" -> "))) if found else ()


def assert_told(found: Simulation[Outputs], due: Verdict) -> None:
    """The run failed with what the oracle says, word for word but for which shortest cycle is shown."""
    assert isinstance(found.failure, ExecutionError), found.failure
    text = str(found.failure)
    if due.complaints or any(complaint in text for complaint in due.possible):
        assert any(complaint in text for complaint in (*due.complaints, *due.possible)), (text, due)
        if text.startswith("every message"):
            assert set(text.splitlines()[1:]) == {f"unmatched: {line}" for line in due.unmatched}
        return
    first = min(due.stuck)
    head = f"rank {first}, action {due.stuck[first].operation}, position {due.stuck[first].place}"
    lines = text.splitlines()
    assert lines[0] == f"{head}: deadlock: no rank can go on", (text, due)
    told = [line for line in lines[2:] if " waits for " not in line]
    assert sorted(told) == sorted(
        [
            *(f"unmatched: {line}" for line in due.unmatched),
            *(f"lost: {line}" for line in due.lost),
        ]
    ), (text, due)
    waits = sorted(ascending(line) for line in lines[2:] if " waits for " in line)
    cycle, held_up = cycle_of(text), any(stuck.held_up for stuck in due.stuck.values())
    assert bool(cycle) == bool(due.girth), (text, due)
    if not held_up:  # else who waits for whom has more than one answer
        assert waits == sorted(f"rank {rank} waits for {stuck}" for rank, stuck in due.stuck.items())
    if cycle and not held_up:
        assert len(cycle) == due.girth + 1 and cycle[0] == cycle[-1] == min(cycle), text
        assert all(after in due.edges[one] for one, after in pairwise(cycle)), text
    if not cycle:
        missing = sorted({rank for absent in due.edges.values() for rank in absent} - set(due.stuck))
        assert lines[1] == "waited for: " + "; ".join(f"rank {r}, which has returned" for r in missing)
    for outcome in found.outcomes:
        if outcome.rank in due.finished:
            assert outcome.error is None
        else:
            assert str(outcome.error).startswith(f"rank {outcome.rank}, action ")
            assert str(outcome.error).splitlines()[1:] == lines[1:]


def ascending(line: str) -> str:
    """A line of a report, the ranks that are not there in order."""
    return re.sub(
        r"(?<=: ranks )[\d, ]+(?= are not there)",
        lambda found: ", ".join(map(str, sorted(map(int, found[0].split(", "))))),
        line,
    )
