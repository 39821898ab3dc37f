"""Parallel programs as data: drawn right by construction, run on any Backend, and judged by counting.

A program is drawn as a sequence of *joint* operations (a collective, some messages), each of which every rank
that takes part in it posts. So the ranks post in one global order, and whoever stands at the wait for an
operation has posted all before it: the first operation that is not complete lacks nobody, and nothing can
wait for ever. Waiting later and posting earlier, past operations of other streams, keep that true.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from attrs import evolve, field, frozen
from hypothesis import strategies as st

from picotron.planner.data import Bucket
from picotron.planner.lower import lower
from picotron.planner.pipeline import Schedule
from picotron.planner.program import RECEIVES, SENDS, Kind, Row, rows
from picotron.runtime.backend import Backend, Group, Handle, Transfer
from picotron.runtime.messages import Semantics
from picotron.runtime.pipeline import channel_name

CONTROL = -1  # the index of the world's own communicator
BLOCKING = ("barrier", "gather_objects", "new_group")
KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast")
CHANNELS = ("", "forward")

Outputs = dict[int, list[np.ndarray]]  # by key of the operation


@frozen
class Collective:
    """One member's part; ``group`` is an index into the program's, ``rows`` what one member has."""

    kind: str
    group: int
    op: str = "sum"
    dtype: str = "float64"
    rows: int = 1
    source: int = 0


@frozen
class End:
    """One end of a message; the two ends of one have its ``number`` in common."""

    kind: Literal["send", "recv"]
    peer: int
    channel: str = ""
    rows: int = 1
    dtype: str = "float64"
    number: int = 0


What = Collective | tuple[End, ...]


@frozen
class Post:
    """Begin operation ``key``. One of BLOCKING is waited for at once."""

    key: int
    what: What

    @property
    def blocks(self) -> bool:
        """Whether the rank gets past it only once it is complete."""
        return isinstance(self.what, Collective) and self.what.kind in BLOCKING


@frozen
class Wait:
    """Wait for operation ``key`` of the same rank."""

    key: int


@frozen
class Call:
    """Call ``function(backend, groups)``, whose value is a result of the rank."""

    key: int
    function: Callable[[Backend, Sequence[Group]], Any] = field(eq=False, repr=False)


Act = Post | Wait | Call


@frozen
class Program:
    """What each rank of a world does, act by act, once all have opened ``groups``."""

    world_size: int
    groups: tuple[tuple[int, ...], ...]
    acts: tuple[tuple[Act, ...], ...]

    def members(self, group: int) -> tuple[int, ...]:
        """The ranks of a group."""
        return tuple(range(self.world_size)) if group == CONTROL else self.groups[group]

    def changed(self, rank: int, acts: Sequence[Act]) -> Program:
        """The program in which ``rank`` does ``acts`` instead."""
        return evolve(self, acts=(*self.acts[:rank], tuple(acts), *self.acts[rank + 1 :]))

    def index(self, rank: int, key: int) -> int:
        """Where a rank posts operation ``key``."""
        return next(i for i, a in enumerate(self.acts[rank]) if isinstance(a, Post) and a.key == key)

    def posts_of(self, rank: int, key: int) -> tuple[End, ...]:
        """The ends of messages that a rank posts as operation ``key``."""
        post = self.acts[rank][self.index(rank, key)]
        assert isinstance(post, Post) and isinstance(post.what, tuple)
        return post.what

    def posts(self, rank: int) -> list[Post]:
        """What a rank posts."""
        return [act for act in self.acts[rank] if isinstance(act, Post)]


def content(number: int, rank: int, num_rows: int, dtype: str) -> np.ndarray:
    """What ``rank`` brings: small integers, exact however they are added, other ones for every number."""
    return np.arange(num_rows).astype(dtype) + np.dtype(dtype).type(31 * number + 7 * rank)


def _part_rows(sender: int, receiver: int) -> int:
    """Rows of an all_to_all from one rank to another."""
    return (sender + 2 * receiver) % 3


def expected(program: Program, rank: int, post: Post) -> list[np.ndarray]:
    """What ``rank`` gets by ``post``, each of its arrays computed by numpy."""
    what, key = post.what, post.key
    if not isinstance(what, Collective):
        return [content(e.number, e.peer, e.rows, e.dtype) for e in what if e.kind == "recv"]
    if what.kind in BLOCKING:
        gathered = [(key, r) for r in range(program.world_size)]
        return [np.array(gathered)] if what.kind == "gather_objects" else []
    members, size = program.members(what.group), len(program.members(what.group))
    own = members.index(rank)
    if what.kind == "broadcast":
        return [content(8 * key, what.source, what.rows, what.dtype)]
    if what.kind == "all_gather":
        return [np.concatenate([content(8 * key, r, what.rows, what.dtype) for r in members])]
    if what.kind == "all_to_all":
        pieces = []
        for sender in members:
            sent = [_part_rows(sender, r) for r in members]
            whole = content(8 * key, sender, sum(sent), what.dtype)
            pieces.append(np.split(whole, np.cumsum(sent)[:-1])[own])
        return [np.concatenate(pieces)]
    scattered = what.kind == "reduce_scatter"
    num_rows = what.rows * (size if scattered else 1)
    stack = np.stack([content(8 * key, r, num_rows, what.dtype) for r in members])
    total = stack.max(0) if what.op == "max" else stack.sum(0)
    if what.op == "avg":
        total = total / np.dtype(what.dtype).type(size)
    return [np.split(total, size)[own] if scattered else total]


def expected_outputs(program: Program) -> list[Outputs]:
    """What every rank gets by every operation it posts."""
    return [
        {post.key: expected(program, rank, post) for post in program.posts(rank)}
        for rank in range(program.world_size)
    ]


def run(backend: Backend, program: Program) -> Outputs:
    """Do one rank's acts; what it got by each operation.

    What it has brought to one it overwrites as soon as it has waited for it.
    """
    groups = [backend.new_group(ranks, f"g{i}") for i, ranks in enumerate(program.groups)]
    handles: dict[int, Handle] = {}
    brought: dict[int, list[torch.Tensor]] = {}
    outputs: dict[int, list[torch.Tensor]] = {}
    for row, act in enumerate(program.acts[backend.rank]):
        backend.at(0, row)
        if isinstance(act, Wait):
            handles[act.key].wait()
            for tensor in brought[act.key]:
                tensor.fill_(-2)
        elif isinstance(act, Call):
            outputs[act.key] = [act.function(backend, groups)]
        elif isinstance(act.what, Collective):
            handle, brought[act.key], outputs[act.key] = _collective(backend, groups, act.key, act.what)
            if handle is not None:
                handles[act.key] = handle
        else:
            handles[act.key], brought[act.key], outputs[act.key] = _messages(backend, act.what)
    return {key: [np.asarray(tensor) for tensor in got] for key, got in outputs.items()}


Posted = tuple[Handle | None, list[torch.Tensor], list[torch.Tensor]]  # with what is brought, and got


def _messages(
    backend: Backend, ends: tuple[End, ...]
) -> tuple[Handle, list[torch.Tensor], list[torch.Tensor]]:
    tensors = [
        torch.from_numpy(content(end.number, backend.rank, end.rows, end.dtype))
        if end.kind == "send"
        else torch.full((end.rows,), -1, dtype=getattr(torch, end.dtype))
        for end in ends
    ]
    received = [tensor for end, tensor in zip(ends, tensors, strict=True) if end.kind == "recv"]
    sent = [tensor for end, tensor in zip(ends, tensors, strict=True) if end.kind == "send"]
    if len(ends) == 1:
        (end,), (tensor,) = ends, tensors
        post = backend.send if end.kind == "send" else backend.recv
        return post(tensor, end.peer, end.channel), sent, received
    transfers = [Transfer(e.kind, t, e.peer, e.channel) for e, t in zip(ends, tensors, strict=True)]
    return backend.batch(transfers), sent, received


def _collective(backend: Backend, groups: Sequence[Group], key: int, what: Collective) -> Posted:
    def tensor(num_rows: int) -> torch.Tensor:
        return torch.from_numpy(content(8 * key, backend.rank, num_rows, what.dtype))

    def empty(num_rows: int) -> torch.Tensor:
        return torch.empty(num_rows, dtype=getattr(torch, what.dtype))

    match what.kind:
        case "barrier":
            return backend.barrier(), [], []
        case "gather_objects":
            return None, [], [torch.tensor(backend.gather_objects((key, backend.rank)))]
        case "new_group":
            backend.new_group(range(backend.world_size), "late")
            return None, [], []
    group = groups[what.group]
    match what.kind:
        case "all_reduce":
            output = tensor(what.rows)
            return backend.all_reduce(output, group, what.op), [], [output]
        case "broadcast":
            output = tensor(what.rows)
            return backend.broadcast(output, group, what.source), [], [output]
        case "all_gather":
            output, part = empty(what.rows * group.size), tensor(what.rows)
            return backend.all_gather(output, part, group), [part], [output]
        case "reduce_scatter":
            output, whole = empty(what.rows), tensor(what.rows * group.size)
            return backend.reduce_scatter(output, whole, group, what.op), [whole], [output]
    sent = [_part_rows(backend.rank, r) for r in group.ranks]
    received = [_part_rows(r, backend.rank) for r in group.ranks]
    output, whole = empty(sum(received)), tensor(sum(sent))
    return backend.all_to_all(output, whole, group, received, sent), [whole], [output]


@frozen
class Joint:
    """An operation of several ranks: what each of them posts, and after how many more posts it waits.

    A ``pinned`` one is waited for at once, and not posted earlier than its turn.
    """

    parts: dict[int, What]
    delays: tuple[int, ...] = ()
    pinned: bool = False


@frozen
class Sketch:
    """A program before it is laid out for each rank."""

    world_size: int
    groups: tuple[tuple[int, ...], ...]
    joints: tuple[Joint, ...]
    hoists: tuple[tuple[int, int, int], ...] = ()  # rank, which of its posts, over how many acts

    def with_joints(self, at: int, *joints: Joint) -> Sketch:
        """The sketch with more operations before that one."""
        return evolve(self, joints=(*self.joints[:at], *joints, *self.joints[at:]))


def collective(program: Sketch, what: Collective, *, pinned: bool = False) -> Joint:
    """A collective of all members of its group."""
    everyone = tuple(range(program.world_size))
    members = everyone if what.group == CONTROL else program.groups[what.group]
    return Joint(dict.fromkeys(members, what), pinned=pinned)


def message(sender: int, receiver: int, *, pinned: bool = False, **how: Any) -> Joint:
    """One message."""
    parts: dict[int, What] = {
        sender: (End("send", receiver, **how),),
        receiver: (End("recv", sender, **how),),
    }
    return Joint(parts, pinned=pinned)


@st.composite
def collectives(
    draw: st.DrawFn, groups: Sequence[tuple[int, ...]], kinds: Sequence[str] = (*KINDS, *BLOCKING)
) -> Collective:
    """Any collective of one of ``groups``."""
    kind = draw(st.sampled_from(kinds))
    if kind in BLOCKING:
        return Collective(kind, CONTROL)
    group = draw(st.integers(0, len(groups) - 1))
    dtype = draw(st.sampled_from(("float64", "float32", "int64")))
    op = draw(st.sampled_from(("sum", "max") if dtype == "int64" else ("sum", "max", "avg")))
    source = draw(st.sampled_from(groups[group])) if kind == "broadcast" else 0
    return Collective(kind, group, op, dtype, draw(st.integers(0, 2)), source)


@st.composite
def exchanges(
    draw: st.DrawFn, world_size: int, max_messages: int = 3, channels: Sequence[str] = CHANNELS
) -> dict[int, What]:
    """Messages among any ranks; what one rank has of them is one batch."""
    parts: dict[int, list[End]] = {}
    for _ in range(draw(st.integers(1, max_messages))):
        sender = draw(st.integers(0, world_size - 1))
        receiver = (sender + draw(st.integers(1, world_size - 1))) % world_size
        channel, dtype = draw(st.sampled_from(channels)), draw(st.sampled_from(("float64", "int64")))
        num_rows = draw(st.integers(1, 2))
        number = sum(map(len, parts.values())) // 2
        parts.setdefault(sender, []).append(End("send", receiver, channel, num_rows, dtype, number))
        parts.setdefault(receiver, []).append(End("recv", sender, channel, num_rows, dtype, number))
    return {rank: tuple(ends) for rank, ends in parts.items()}


@st.composite
def sketches(
    draw: st.DrawFn, *, min_world: int = 2, max_world: int = 5, max_joints: int = 8, hoist: bool = True
) -> Sketch:
    """Joint operations of a world with up to two more groups."""
    world_size = draw(st.integers(min_world, max_world))
    everyone = tuple(range(world_size))
    subsets = st.sets(st.sampled_from(everyone), min_size=1).map(lambda found: tuple(sorted(found)))
    groups = (everyone, *draw(st.lists(subsets, max_size=2)))
    bare = Sketch(world_size, groups, ())
    joints = []
    for _ in range(draw(st.integers(0, max_joints))):
        if draw(st.booleans()):
            joint = collective(bare, draw(collectives(groups)))
        else:
            joint = Joint(draw(exchanges(world_size)))
        joints.append(evolve(joint, delays=draw(st.tuples(*[st.integers(0, 3)] * world_size))))
    moves = st.tuples(st.sampled_from(everyone), st.integers(0, max_joints - 1), st.integers(1, 4))
    return Sketch(world_size, groups, tuple(joints), tuple(draw(st.lists(moves, max_size=3 * hoist))))


def lay_out(sketch: Sketch, semantics: Semantics = "rendezvous") -> Program:
    """Every rank's acts; joint operation i has key i."""
    acts: list[list[Act]] = [[] for _ in range(sketch.world_size)]
    due: list[dict[int, int]] = [{} for _ in range(sketch.world_size)]  # by key: posts until its wait
    for key, joint in enumerate(sketch.joints):
        for rank, what in joint.parts.items():
            post = Post(key, what if isinstance(what, Collective) else _numbered(key, what))
            acts[rank].append(post)
            due[rank] = {other: left - 1 for other, left in due[rank].items()}
            if not post.blocks:
                delay = joint.delays[rank] if joint.delays and not joint.pinned else 0
                due[rank][key] = delay
            for other in [other for other, left in due[rank].items() if left <= 0]:
                acts[rank].append(Wait(other))
                del due[rank][other]
    for rank, waiting in enumerate(due):
        acts[rank] += [Wait(key) for key in reversed(waiting)]
    pinned = {key for key, joint in enumerate(sketch.joints) if joint.pinned}
    for rank, number, distance in sketch.hoists:
        _hoist(acts[rank], number, distance, pinned, semantics)
    return Program(sketch.world_size, sketch.groups, tuple(map(tuple, acts)))


def _numbered(key: int, ends: tuple[End, ...]) -> tuple[End, ...]:
    return tuple(evolve(end, number=8 * key + end.number) for end in ends)


def _hoist(acts: list[Act], number: int, distance: int, pinned: set[int], semantics: Semantics) -> None:
    """Post the ``number``-th operation earlier, past up to ``distance`` acts of other streams."""
    found = [i for i, act in enumerate(acts) if isinstance(act, Post)]
    if number >= len(found):
        return
    at = found[number]
    post = acts[at]
    assert isinstance(post, Post)
    if post.blocks or post.key in pinned:
        return
    own = streams(post.what, semantics)
    for _ in range(distance):
        before = acts[at - 1] if at else None
        if before is None or (isinstance(before, Post) and own & streams(before.what, semantics)):
            return
        acts[at - 1], acts[at] = post, before
        at -= 1


def streams(what: What, semantics: Semantics) -> set[object]:
    """Those in which a rank posts in the order in which all do: a group; a direction or, batched, a pair."""
    if isinstance(what, Collective):
        return {what.group}
    if semantics == "batched":
        return {(end.peer, end.channel) for end in what}
    return {(end.kind, end.peer, end.channel) for end in what}


@st.composite
def programs(draw: st.DrawFn, semantics: Semantics = "rendezvous", **size: int) -> Program:
    """A program that is right under ``semantics``."""
    return lay_out(draw(sketches(**size)), semantics)


def from_rows(own: Sequence[Sequence[Row]], *, dp: int, matched: bool) -> Program:
    """A step of a pipeline whose rank p runs ``own[p]``, ``dp`` times; rank p * dp + d is its d-th copy.

    What is sent differs by direction, stage and microbatch; nothing is computed. ``matched``: every message
    has a channel of its own, so that a receive gets its microbatch even if it is posted out of order.
    """
    world_size = len(own) * dp
    members = [tuple(range(p * dp, p * dp + dp)) for p in range(len(own))]
    everyone = tuple(range(world_size))

    def act(rank: int, row: Row) -> list[Act]:
        p, d = divmod(rank, dp)
        if row.kind is Kind.WAIT:
            return [Wait(_row_key(own[p][row.target]))]
        if row.kind in SENDS or row.kind in RECEIVES:
            forward = row.kind in (Kind.SEND_F, Kind.RECV_F)
            sender_stage = row.stage if row.kind in SENDS else row.stage + (-1 if forward else 1)
            number = 2 * (100 * sender_stage + row.microbatch) + forward
            kind: Literal["send", "recv"] = "send" if row.kind in SENDS else "recv"
            channel = channel_name(row, p) + (f" {number}" if matched else "")
            return [Post(_row_key(row), (End(kind, row.peer * dp + d, channel, number=number),))]
        if row.kind in (Kind.COUNT, Kind.NORM):
            group = len(own) if row.kind is Kind.NORM else p
            return [Post(_row_key(row), Collective("all_reduce", group)), Wait(_row_key(row))]
        if row.kind is Kind.REDUCE:
            return [Post(_row_key(row), Collective("all_reduce", p, rows=1 + row.part))]
        return []

    acts = [[done for row in own[rank // dp] for done in act(rank, row)] for rank in everyone]
    return Program(world_size, (*members, everyone), tuple(map(tuple, acts)))


def _row_key(row: Row) -> int:
    """A number for what the row posts, the same on all ranks that take part in it."""
    return int(row.kind) + 16 * (row.stage + 1) + 1024 * (row.microbatch + 1) + 65536 * (row.part + 1)


def lowered(schedule: Schedule, *, dp: int = 1, num_buckets: int = 1, matched: bool = False) -> Program:
    """One step of a schedule as the planner lowers it; raises its PlanError."""
    buckets = [
        [
            Bucket(stage=stage, index=index, names=(), partial=("dp_cp",) if dp > 1 else (), ready_segment=0)
            for index in range(num_buckets)
        ]
        for stage in range(schedule.num_stages)
    ]
    made = lower(
        schedule,
        boundary_bytes=8,
        buckets=buckets,
        bucket_bytes=[[8] * num_buckets] * schedule.num_stages,
        data_parallel=dp > 1,
        world_size=schedule.num_ranks * dp,
    )
    return from_rows([rows(made, rank) for rank in range(made.num_ranks)], dp=dp, matched=matched)
