"""What becomes of a program of ``strategies_programs``, found slowly and by counting.

An operation is complete when everyone has posted enough: the n-th of a stream has met its n-th counterpart.
Who waits for what is not complete stands still. Walking every rank as far as it gets, again and again until
nobody moves, finds the one state in which every interleaving ends.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from attrs import field, frozen

from picotron.runtime.messages import Semantics
from property_tests.strategies_programs import CONTROL, Collective, End, Post, Program, Wait

Part = tuple[int, int, int]  # rank, key, which end of a batch (0 for a collective)


@frozen
class Stuck:
    """A rank that never gets on: in what, and the ranks that would have to come.

    ``held_up``: it takes more than the operation's own ends to tell, since one is posted but has not begun.
    """

    operation: str
    place: str
    absent: tuple[int, ...]
    held_up: bool = False

    def __str__(self) -> str:
        named = ", ".join(map(str, self.absent))
        there = f"rank {named} is not there" if len(self.absent) == 1 else f"ranks {named} are not there"
        return f"{self.operation} ({self.place}): {there}"


@frozen(kw_only=True)
class Verdict:
    """The end of a program. ``complaints``: each, by itself, may be what the run fails with.

    Without complaints, and with somebody ``stuck``, it is a deadlock; without either it ends well. What is
    ``possible`` is told, instead, to a rank that waits late for a send that was complete when posted.
    """

    stuck: dict[int, Stuck]
    complaints: tuple[str, ...]
    possible: tuple[str, ...]
    unmatched: tuple[str, ...]
    lost: tuple[str, ...]
    finished: tuple[int, ...]

    @property
    def well(self) -> bool:
        """Whether every rank returns and nothing is left over."""
        return not self.stuck and not self.complaints

    @property
    def edges(self) -> dict[int, tuple[int, ...]]:
        """From each stuck rank to those it needs."""
        return {rank: stuck.absent for rank, stuck in self.stuck.items()}

    @property
    def girth(self) -> int:
        """The length of a shortest cycle, by powers of the adjacency matrix; 0 without one."""
        size = 1 + max([0, *self.edges, *(rank for absent in self.edges.values() for rank in absent)])
        adjacency = np.zeros((size, size), dtype=np.int64)
        for rank, absent in self.edges.items():
            adjacency[rank, list(absent)] = 1
        power = adjacency
        for length in range(1, size + 1):
            if power.trace():
                return length
            power = np.minimum(power @ adjacency, 1)
        return 0


@frozen
class _State:
    """What has been posted once each rank has done ``done[rank]`` acts."""

    program: Program
    semantics: Semantics
    lost: frozenset[tuple[int, int, int]]  # sender, receiver, number among all messages of the two
    done: tuple[int, ...]
    posts: tuple[tuple[Post, ...], ...]
    numbers: dict[Part, int] = field(factory=dict)  # in its group, or among a rank's own of a channel
    groups: dict[tuple[int, int], dict[int, Post]] = field(factory=dict)  # by group and number, by rank
    met: dict[Part, Part | None] = field(factory=dict)  # complete ends, and their counterparts
    failed: dict[Part, str] = field(factory=dict)


def verdict(
    program: Program,
    semantics: Semantics,
    lost: frozenset[tuple[int, int, int]] = frozenset(),
) -> Verdict:
    """What becomes of ``program``."""
    done = (0,) * program.world_size
    while True:
        state = _look(program, semantics, lost, done)
        moved = tuple(_go(state, rank) for rank in range(program.world_size))
        if moved == done:
            return _judge(state)
        done = moved


def _look(
    program: Program,
    semantics: Semantics,
    lost: frozenset[tuple[int, int, int]],
    done: tuple[int, ...],
) -> _State:
    """Everything that follows from how far the ranks are."""
    posts = []
    for acts, reached in zip(program.acts, done, strict=True):
        own = [act for act in acts[:reached] if isinstance(act, Post)]
        at = acts[reached] if reached < len(acts) else None
        posts.append((*own, at) if isinstance(at, Post) and at.blocks else tuple(own))
    state = _State(program, semantics, lost, done, tuple(posts))
    _count(state)
    _meet_collectives(state)
    while _meet_messages(state):
        pass
    return state


def _count(state: _State) -> None:
    for rank, own in enumerate(state.posts):
        counts: dict[object, int] = {CONTROL: len(state.program.groups)}
        for post in own:
            for index, stream in enumerate(_streams(post)):
                state.numbers[rank, post.key, index] = number = counts.get(stream, 0)
                counts[stream] = number + 1
                if isinstance(post.what, Collective):
                    state.groups.setdefault((post.what.group, number), {})[rank] = post


def _streams(post: Post) -> list[object]:
    if isinstance(post.what, Collective):
        return [post.what.group]
    return [(end.kind, end.peer, end.channel) for end in post.what]


def _meet_collectives(state: _State) -> None:
    for (group, _), posted in state.groups.items():
        words = {rank: _words(post, state.program) for rank, post in posted.items()}
        for rank, post in posted.items():
            part = rank, post.key, 0
            unlike = [other for other in posted if words[other] != words[rank]]
            if unlike:
                state.failed[part] = ""  # in words: see _disagreements
            elif len(posted) == len(state.program.members(group)):
                state.met[part] = None


def _words(post: Post, program: Program) -> str:
    """What members of a collective must agree in, as reports say it."""
    what = post.what
    assert isinstance(what, Collective)
    dtype, size = f"torch.{what.dtype}", len(program.members(what.group))
    match what.kind:
        case "new_group":
            return f"new_group {list(range(program.world_size))} late"
        case "barrier" | "gather_objects":
            return what.kind
        case "all_reduce":
            return f"all_reduce {what.op} {dtype} [{what.rows}]"
        case "reduce_scatter":
            return f"reduce_scatter {what.op} {dtype} [{what.rows * size}]"
        case "all_gather":
            return f"all_gather {dtype} [{what.rows}]"
        case "broadcast":
            return f"broadcast from rank {what.source} {dtype} [{what.rows}]"
    return f"all_to_all {dtype} []"


def _ends(state: _State) -> list[tuple[Part, Post, End]]:
    """Every posted end of a message that is not lost, in order on each rank."""
    sent: dict[tuple[int, int], int] = {}
    found = []
    for rank, own in enumerate(state.posts):
        for post in own:
            for index, end in enumerate(() if isinstance(post.what, Collective) else post.what):
                if end.kind == "send":
                    number = sent.get((rank, end.peer), 0)
                    sent[rank, end.peer] = number + 1
                    if (rank, end.peer, number) in state.lost:
                        state.met[rank, post.key, index] = None
                        continue
                found.append(((rank, post.key, index), post, end))
    return found


def _channel(rank: int, end: End) -> tuple[int, int, str]:
    return (rank, end.peer, end.channel) if end.kind == "send" else (end.peer, rank, end.channel)


def _meet_messages(state: _State) -> bool:
    """Match the n-th send and receive of each channel that are on offer; whether that is news."""
    ends = _ends(state)
    held_up = set(_behind(state, ends))
    offered: dict[tuple[str, tuple[int, int, str]], list[tuple[Part, End]]] = {}
    for part, _, end in ends:
        if part not in held_up:
            offered.setdefault((end.kind, _channel(part[0], end)), []).append((part, end))
    before = len(state.met), len(state.failed)
    for (kind, channel), sends in offered.items():
        if kind == "recv":
            continue
        for (one, send), (other, receive) in zip(sends, offered.get(("recv", channel), []), strict=False):
            if (send.rows, send.dtype) == (receive.rows, receive.dtype):
                state.met[one], state.met[other] = other, one
            else:
                state.failed[one] = state.failed[other] = (
                    "a message and its receive must agree in dtype and shape: "
                    f"{_told(state, one, send)} of torch.{send.dtype} [{send.rows}] ({_place(state, one)}); "
                    f"{_told(state, other, receive)} of torch.{receive.dtype} [{receive.rows}]"
                    f" ({_place(state, other)})"
                )
    return (len(state.met), len(state.failed)) != before


def _behind(state: _State, ends: Sequence[tuple[Part, Post, End]]) -> dict[Part, set[Part]]:
    """Batched: ends whose batch has not begun, and the open ends of the batches it is behind."""
    found: dict[Part, set[Part]] = {}
    if state.semantics != "batched":
        return found
    for (rank, key, index), post, _ in ends:
        assert not isinstance(post.what, Collective)
        queues = {(end.peer, end.channel) for end in post.what}
        ahead = set()
        for part, other, _ in ends:
            if part[0] == rank and other.key == key:
                break
            assert not isinstance(other.what, Collective)
            shared = queues & {(end.peer, end.channel) for end in other.what}
            if part[0] == rank and shared and part not in state.met and part not in state.failed:
                ahead.add(part)
        if ahead:
            found[rank, key, index] = ahead
    return found


def _open(state: _State, rank: int, key: int) -> Part | None:
    """The first part of an operation that is not complete."""
    post = next(post for post in state.posts[rank] if post.key == key)
    for index in range(len(_streams(post))):
        if not _complete(state, (rank, key, index)):
            return rank, key, index
    return None


def _complete(state: _State, part: Part) -> bool:
    if part in state.met:
        return True
    buffered = state.semantics == "buffered" and not _is_collective(state, part)
    return buffered and _end(state, part).kind == "send"


def _go(state: _State, rank: int) -> int:
    """How many acts a rank has done once it goes on as far as it can."""
    acts, at = state.program.acts[rank], state.done[rank]
    while at < len(acts):
        act = acts[at]
        if isinstance(act, Post) and act.blocks and (at > state.done[rank] or _open(state, rank, act.key)):
            break
        if isinstance(act, Wait) and (
            act.key not in {post.key for post in state.posts[rank]} or _open(state, rank, act.key)
        ):
            break
        at += 1
    return at


def _judge(state: _State) -> Verdict:
    stuck, complaints, finished, waited = {}, [], [], set()
    for rank, acts in enumerate(state.program.acts):
        at = state.done[rank]
        if at == len(acts):
            finished.append(rank)
            complaints += _never_waited(state, rank)
            continue
        act = acts[at]
        assert isinstance(act, Post | Wait)
        part = _open(state, rank, act.key)
        assert part is not None
        waited.add(part)
        if part in state.failed:
            complaints += [state.failed[part]] if state.failed[part] else []
        else:
            absent, held_up = _needed(state, part)
            stuck[rank] = Stuck(describe(state, part), _place(state, part), tuple(sorted(absent)), held_up)
    for (group, number), posted in state.groups.items():
        complaints += _disagreements(state, group, number, posted)
    unmatched = [
        _told(state, part, end) + f" ({_place(state, part)})"
        for part, _, end in _ends(state)
        if part not in state.met and part not in state.failed and part not in waited
    ]
    if not stuck and not complaints and unmatched:
        complaints.append("every message must be received, but all ranks have returned")
    return Verdict(
        stuck=stuck,
        complaints=tuple(dict.fromkeys(complaints)),
        possible=tuple(filter(None, dict.fromkeys(state.failed.values()))) * (state.semantics == "buffered"),
        unmatched=tuple(unmatched),
        lost=tuple(_lost(state)),
        finished=tuple(finished),
    )


def _never_waited(state: _State, rank: int) -> list[str]:
    done = {act.key for act in state.program.acts[rank] if isinstance(act, Wait)}
    left = [post.key for post in state.posts[rank] if not post.blocks and post.key not in done]
    if not left:
        return []
    first = rank, left[0], 0
    return [
        f"rank {rank}, action {describe(state, first)}, position {_place(state, first)}: "
        f"every handle must be waited for; {len(left)} of this rank's never were"
    ]


def _disagreements(state: _State, group: int, number: int, posted: dict[int, Post]) -> list[str]:
    """What may be said of the n-th collective of a group, by who comes first and who then differs."""
    told = {
        rank: f"rank {rank} posted {_words(post, state.program)} ({_place(state, (rank, post.key, 0))})"
        for rank, post in posted.items()
    }
    return [
        f"#{number} in group {_name(state, group)}, position {_place(state, (other, posted[other].key, 0))}: "
        f"members of group {_name(state, group)} must post the same collective: {told[one]}; {told[other]}"
        for one in posted
        for other in posted
        if _words(posted[one], state.program) != _words(posted[other], state.program)
    ]


def _needed(state: _State, part: Part) -> tuple[set[int], bool]:
    """The other ranks that must post something before ``part`` can be complete; whether an end is held up.

    Where none is to, since two ranks have posted in unlike orders, it is the other one of them.
    """
    post = _post(state, part)
    if isinstance(post.what, Collective):
        posted = state.groups[post.what.group, state.numbers[part]]
        return set(state.program.members(post.what.group)) - set(posted), False
    ends = _ends(state)
    behind, others = _behind(state, ends), _counterparts(ends)
    found, seen, following, held_up = set(), {part}, [part], False
    while following:
        one = following.pop()
        ahead = behind.get(one, set())
        if one not in behind and one not in others:
            found.add(_end(state, one).peer)
        elif one not in behind and others[one] in behind:
            ahead, held_up = {others[one]}, True
        following += sorted(ahead - seen)
        seen |= ahead
    return found - {part[0]} or {post.what[part[2]].peer}, held_up


def _counterparts(ends: Sequence[tuple[Part, Post, End]]) -> dict[Part, Part]:
    """For each end of a message its other one, if that is posted, be it on offer yet or not."""
    channels: dict[tuple[int, int, str], tuple[list[Part], list[Part]]] = {}
    for part, _, end in ends:
        channels.setdefault(_channel(part[0], end), ([], []))[end.kind == "recv"].append(part)
    pairs = [pair for sent, received in channels.values() for pair in zip(sent, received, strict=False)]
    return dict([*pairs, *((other, one) for one, other in pairs)])


def _post(state: _State, part: Part) -> Post:
    return next(post for post in state.posts[part[0]] if post.key == part[1])


def _is_collective(state: _State, part: Part) -> bool:
    return isinstance(_post(state, part).what, Collective)


def _end(state: _State, part: Part) -> End:
    """The end of a message that a part is."""
    what = _post(state, part).what
    assert not isinstance(what, Collective)
    return what[part[2]]


def describe(state: _State, part: Part) -> str:
    """An operation as reports name it."""
    post = _post(state, part)
    number = state.numbers[part]
    if isinstance(post.what, Collective):
        return f"{post.what.kind} #{number} in group {_name(state, post.what.group)}"
    end = post.what[part[2]]
    way = "to" if end.kind == "send" else "from"
    return f"{end.kind} #{number} {way} rank {end.peer} on channel {end.channel!r}"


def _name(state: _State, group: int) -> str:
    name = "world" if group == CONTROL else f"g{group}"
    return f"{name} {list(state.program.members(group))}"


def _told(state: _State, part: Part, end: End) -> str:
    return f"rank {part[0]} posted {describe(state, part)}"


def _place(state: _State, part: Part) -> str:
    return f"step 0, row {state.program.index(part[0], part[1])}"


def _lost(state: _State) -> list[str]:
    found = []
    sent: dict[tuple[int, int], int] = {}
    for rank, own in enumerate(state.posts):
        for post in own:
            for index, end in enumerate(() if isinstance(post.what, Collective) else post.what):
                if end.kind == "send":
                    number = sent.get((rank, end.peer), 0)
                    sent[rank, end.peer] = number + 1
                    if (rank, end.peer, number) in state.lost:
                        found.append(_told(state, (rank, post.key, index), end) + ", which a fault dropped")
    return found
