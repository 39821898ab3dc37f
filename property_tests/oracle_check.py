"""A slow checker of schedules, from the definitions alone: it replays, and it explores every interleaving.

A case is a list of ranks, a rank a list of cells, a cell a tuple of one action or (overlapped) two, an action
a tuple (stage, phase, microbatch). Nothing here is shared with the checker under test but the words.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

Act = tuple[int, str, int]
Cell = tuple[Act, ...]
Case = list[list[Cell]]
MOST_STATES = 60_000


def rank_actions(case: Case, rank: int) -> list[Act]:
    """What a rank runs, pairs taken apart."""
    return list(chain.from_iterable(case[rank]))


def homes(case: Case) -> dict[tuple[int, int], set[int]]:
    """The ranks that run anything of a stage and microbatch."""
    found: dict[tuple[int, int], set[int]] = {}
    for rank in range(len(case)):
        for stage, _, microbatch in rank_actions(case, rank):
            found.setdefault((stage, microbatch), set()).add(rank)
    return found


def is_valid(case: Case) -> bool:
    """Whether these are the orders of a schedule: everything once, in order, at home, and nothing missing."""
    if not case or not all(case):
        return False
    where = homes(case)
    num_stages = len({stage for stage, _ in where})
    num_microbatches = len({microbatch for _, microbatch in where})
    everything = {
        (stage, microbatch) for stage in range(num_stages) for microbatch in range(num_microbatches)
    }
    if set(where) != everything or any(len(ranks) != 1 for ranks in where.values()):
        return False
    home = {key: min(ranks) for key, ranks in where.items()}
    one_way = all(home[stage, index] == home[stage, 0] for stage, index in everything)
    half = num_microbatches // 2
    both_ways = num_microbatches % 2 == 0 and all(
        home[stage, index] == home[stage if index < half else num_stages - 1 - stage, 0]
        for stage, index in everything
    )
    lives = {
        key: "".join(phase for s, phase, m in rank_actions(case, rank) if (s, m) == key)
        for key, rank in home.items()
    }
    return (
        (one_way or both_ways)
        and set(lives.values()) <= {"FB", "FIW"}
        and all(_is_pair(cell) for own in case for cell in own if len(cell) > 1)
    )


def _is_pair(cell: Cell) -> bool:
    first, second = cell
    return first[1] == "F" and second[1] in "BI" and (first[0], first[2]) != (second[0], second[2])


def first_wrong(case: Case, owner: dict[tuple[int, int], int]) -> tuple[int, int] | None:
    """(rank, position) of the first action that no schedule of this placement has there; None without one.

    Position -1 means that the rank lacks something, as the first rank that does.
    """
    for rank in range(len(case)):
        lives: dict[tuple[int, int], str] = {}
        position = 0
        for cell in case[rank]:
            for place, (stage, phase, microbatch) in enumerate(cell):
                key = (stage, microbatch)
                life = lives.get(key, "") + phase
                lives[key] = life
                bad_pair = len(cell) > 1 and place == 0 and not _is_pair(cell)
                if owner.get(key) != rank or life not in ("F", "FB", "FI", "FIW") or bad_pair:
                    return rank, position
                position += 1
    for rank in range(len(case)):
        own = set(rank_actions(case, rank))
        for stage, microbatch in (key for key, at in owner.items() if at == rank):
            missing_f = (stage, "F", microbatch) not in own
            phases = {phase for phase in "BIW" if (stage, phase, microbatch) in own}
            if missing_f or phases not in ({"B"}, {"I", "W"}):
                return rank, -1
    return None


def peaks(case: Case, activation: list[int], weight: list[int], boundary: int) -> list[tuple[int, int]]:
    """For each rank, the most A at once, and the most bytes of levels and of what the last cell sends."""
    where = homes(case)
    last = max(stage for stage, _ in where)
    found = []
    for rank in range(len(case)):
        level: dict[tuple[int, int], str] = {}
        most_a = most = 0
        for cell in case[rank]:
            for place, (stage, phase, microbatch) in enumerate(cell):
                level[stage, microbatch] = {"F": "A", "I": "A_W", "B": "", "W": ""}[phase]
                size = sum(
                    {"A": activation[s], "A_W": weight[s], "": 0}[now] for (s, _), now in level.items()
                )
                if place == len(cell) - 1:
                    size += boundary * sum(
                        bool(to is not None and where[to] != {rank})
                        for to in (_to(act, last) for act in cell)
                    )
                most_a = max(most_a, sum(now == "A" for now in level.values()))
                most = max(most, size)
        found.append((most_a, most))
    return found


def _to(act: Act, last: int) -> tuple[int, int] | None:
    """The stage and microbatch to which an action hands what it makes."""
    stage, phase, microbatch = act
    if phase == "F":
        return (stage + 1, microbatch) if stage < last else None
    return (stage - 1, microbatch) if phase in "BI" and stage > 0 else None


@dataclass(frozen=True)
class Block:
    """What a rank does before it can go on: run a cell, or see messages through that it posts together."""

    kind: (
        str  # run, put (sends that hold nobody up), take (receives of those), meet (both ends must be posted)
    )
    messages: frozenset[tuple[int, str, int]] = frozenset()  # each named by the action that makes it, B as I
    makes: frozenset[tuple[int, str, int]] = frozenset()
    needs: frozenset[tuple[int, str, int]] = frozenset()  # of its own rank, for the cell run now or next


def programs(case: Case, semantics: str) -> list[list[Block]]:
    """What each rank does under a semantics, block after block."""
    where, last = homes(case), max(stage for own in case for cell in own for stage, _, _ in cell)
    out = []
    for rank, own in enumerate(case):
        blocks: list[Block] = []
        sends_before: frozenset[Act] = frozenset()
        for cell in own:
            takes: set[Act] = set()
            needs: set[Act] = set()
            sends: set[Act] = set()
            makes: set[Act] = set()
            for stage, phase, microbatch in cell:
                made = (stage, "F" if phase == "F" else "I", microbatch)
                source = _from(stage, phase, microbatch, last)
                if phase != "W":
                    makes.add(made)
                if source is not None:
                    at_home = where[source[0], source[2]] == {rank}
                    (needs if at_home else takes).add(source)
                to = _to((stage, phase, microbatch), last)
                if to is not None and where[to] != {rank}:
                    sends.add(made)
            own_needs = frozenset(needs)
            run = Block("run", makes=frozenset(makes), needs=own_needs)
            if semantics == "buffered":
                blocks += [
                    Block("take", frozenset(takes), needs=own_needs),
                    run,
                    Block("put", frozenset(sends)),
                ]
            elif semantics == "rendezvous":
                blocks += [
                    Block("meet", frozenset(takes), needs=own_needs),
                    run,
                    Block("meet", frozenset(sends)),
                ]
            else:
                blocks += [Block("meet", sends_before | takes, needs=own_needs), run]
                sends_before = frozenset(sends)
        blocks.append(Block("meet", sends_before))
        out.append([block for block in blocks if block.kind == "run" or block.messages])
    return out


def _from(stage: int, phase: str, microbatch: int, last: int) -> Act | None:
    """What an action needs of another stage."""
    if phase == "F":
        return (stage - 1, "F", microbatch) if stage > 0 else None
    return (stage + 1, "I", microbatch) if phase in "BI" and stage < last else None


State = tuple[tuple[int, ...], frozenset[Act]]
"""The block at which each rank is, and the messages that are over (or, buffered, sent)."""


def successors(program: list[list[Block]], state: State) -> Iterator[State]:
    """Every state that one step of one rank, or the meeting of one message, leads to."""
    at, over = state
    current = [own[index] if index < len(own) else None for own, index in zip(program, at, strict=True)]
    posted: dict[Act, int] = {}
    for rank, block in enumerate(current):
        if block is None:
            continue
        on = (*at[:rank], at[rank] + 1, *at[rank + 1 :])
        if block.kind == "put":
            yield on, over | block.messages
        elif block.kind == "run":
            if not block.needs or not _lacks(program[rank], at[rank]):
                yield on, over
        elif block.messages <= over:
            yield on, over
        if block.kind == "meet":
            for message in block.messages - over:
                posted[message] = posted.get(message, 0) + 1
    for message, ends in posted.items():
        if ends == 2:
            yield at, over | {message}


def _lacks(own: list[Block], index: int) -> frozenset[Act]:
    """What the cell to run now or next needs of its own rank and has not got."""
    return own[index].needs - {thing for done in own[:index] for thing in done.makes}


def explored(program: list[list[Block]]) -> tuple[set[State], int]:
    """The states from which nothing leads on, and how many can be reached: over all interleavings."""
    first: State = (tuple(0 for _ in program), frozenset())
    seen, frontier, ends = {first}, [first], set()
    while frontier:
        state = frontier.pop()
        following = list(successors(program, state))
        if not following:
            ends.add(state)
        for other in following:
            if other not in seen:
                seen.add(other)
                frontier.append(other)
        assert len(seen) <= MOST_STATES, "a case too large to explore"
    return ends, len(seen)


def waits_at_end(case: Case, semantics: str) -> dict[int, set[int]]:
    """For whom each rank waits when no rank can go on; {} if every rank has come to its end.

    All interleavings of a valid case end in one state. Who needs what it runs later itself waits for itself.
    """
    program = programs(case, semantics)
    ends, _ = explored(program)
    assert len(ends) == 1, "where a case ends depends on who is quicker"
    ((at, over),) = ends
    found: dict[int, set[int]] = {}
    for rank, own in enumerate(program):
        if at[rank] < len(own):
            block = own[at[rank]]
            found[rank] = {
                other
                for message in block.messages - over
                for other in range(len(program))
                if other != rank and any(message in one.messages for one in program[other])
            }
            found[rank] |= {rank} if _lacks(own, at[rank]) else set()
    return found


def most_held(own: list[Cell]) -> tuple[int, int]:
    """How many are at A and at A_W when a rank holds most of both together; of several, with most at A."""
    held, most = [0, 0], (0, 0)
    for act in chain.from_iterable(own):
        change = {"F": (1, 0), "B": (-1, 0), "I": (-1, 1), "W": (0, -1)}[act[1]]
        held = [held[0] + change[0], held[1] + change[1]]
        most = max(most, (sum(held), held[0]))
    return most[1], most[0] - most[1]
