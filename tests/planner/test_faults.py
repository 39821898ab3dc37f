"""Faults as data: what is one, what is none, and what they do to seconds."""

from __future__ import annotations

from typing import Any

import pytest
from attrs.exceptions import FrozenInstanceError

from picotron.errors import PlanError
from picotron.planner.faults import (
    Corrupt,
    Drop,
    Fault,
    Kill,
    OutOfMemory,
    Pause,
    Slow,
    check_faults,
    compute_factor,
    fault_from_text,
    link_factor,
    ranks_of,
)

FAULTS: list[tuple[Fault, tuple[int, ...]]] = [
    (Kill(rank=3, at=17), (3,)),
    (Pause(rank=1, at=0, seconds=0.5, step=2), (1,)),
    (Slow(rank=0, factor=2.0), (0,)),
    (Slow(link=(4, 2), factor=2.0), (4, 2)),
    (Corrupt(rank=5, at=1, element=7, bit=3), (5,)),
    (Drop(sender=1, receiver=0, at=2), (1, 0)),
    (OutOfMemory(rank=2, at_bytes=2**30), (2,)),
]


@pytest.mark.parametrize(("fault", "ranks"), FAULTS)
def test_a_fault_names_its_ranks(fault: Fault, ranks: tuple[int, ...]) -> None:
    """All of them, in its own order."""
    assert ranks_of(fault) == ranks


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        (Kill, {"rank": -1, "at": 0}, "rank must be an integer of at least 0, got -1"),
        (Kill, {"rank": True, "at": 0}, "rank must be an integer of at least 0, got True"),
        (Kill, {"rank": 0, "at": 1.5}, "at must be an integer of at least 0, got 1.5"),
        (Kill, {"rank": 0, "at": 0, "step": -1}, "step must be an integer of at least 0, got -1"),
        (Pause, {"rank": 0, "at": 0, "seconds": 0}, "seconds must be a positive finite number, got 0"),
        (Pause, {"rank": 0, "at": 0, "seconds": float("inf")}, "seconds must be a positive finite number"),
        (Slow, {"rank": 0, "factor": float("nan")}, "factor must be a positive finite number, got nan"),
        (Slow, {"rank": 0, "factor": -2.0}, "factor must be a positive finite number, got -2.0"),
        (Slow, {"factor": 2.0}, "Slow takes a rank or a link, got rank=None and link=None"),
        (Slow, {"rank": 0, "link": (0, 1), "factor": 2.0}, "Slow takes a rank or a link"),
        (Slow, {"link": (1, 1), "factor": 2.0}, "link must be None or two different ranks"),
        (Slow, {"link": (0, 1, 2), "factor": 2.0}, "link must be None or two different ranks"),
        (Slow, {"link": [0, 1], "factor": 2.0}, "link must be None or two different ranks"),
        (Slow, {"link": (0, -1), "factor": 2.0}, "link must be None or two different ranks"),
        (Slow, {"rank": "0", "factor": 2.0}, "rank must be None or a rank, got '0'"),
        (Corrupt, {"rank": 0, "at": 0, "bit": -1}, "bit must be an integer of at least 0, got -1"),
        (Corrupt, {"rank": 0, "at": 0, "element": 0.0}, "element must be an integer of at least 0"),
        (Drop, {"sender": 1, "receiver": 1, "at": 0}, "must be different ranks, got 1 twice"),
        (Drop, {"sender": 1, "receiver": 0, "at": -1}, "at must be an integer of at least 0, got -1"),
        (OutOfMemory, {"rank": 0, "at_bytes": -1}, "at_bytes must be an integer of at least 0, got -1"),
    ],
)
def test_what_is_no_fault_is_refused(kind: type, fields: dict[str, Any], words: str) -> None:
    """With the rule and the value."""
    with pytest.raises(PlanError, match=words.replace("(", r"\(")):
        kind(**fields)


def test_faults_cannot_be_changed() -> None:
    """They are values, so a script means the same wherever it is kept."""
    fault = Kill(rank=0, at=0)
    with pytest.raises(FrozenInstanceError):
        fault.rank = 1  # type: ignore[misc]
    assert {fault, Kill(rank=0, at=0)} == {fault}


def test_a_script_is_checked_against_its_world() -> None:
    """Any iterable of faults becomes a tuple; the first rank that is outside is named."""
    script = [fault for fault, _ in FAULTS]
    assert check_faults(iter(script), 6) == tuple(script)
    assert check_faults((), 1) == ()
    with pytest.raises(PlanError, match=r"the rank of a fault must be in \[0, 5\), got 5 in Corrupt"):
        check_faults(script, 5)
    with pytest.raises(PlanError, match=r"must be in \[0, 4\), got 4 in Slow"):
        check_faults([Slow(link=(0, 4), factor=2.0)], 4)
    with pytest.raises(PlanError, match="a fault must be a Kill, Pause, Slow, .* got 'kill'"):
        check_faults(["kill"], 4)  # type: ignore[list-item]


def test_a_slow_rank_computes_longer() -> None:
    """Factors of one rank multiply; links and other ranks do not count."""
    script = [
        Slow(rank=1, factor=2.0),
        Slow(rank=1, factor=1.5),
        Slow(link=(1, 2), factor=9.0),
        Kill(rank=1, at=0),
    ]
    assert [compute_factor(script, rank) for rank in range(3)] == [1.0, 3.0, 1.0]


def test_a_slow_link_counts_where_both_ranks_take_part() -> None:
    """In either order, and each link by itself."""
    script = [
        Slow(link=(2, 0), factor=3.0),
        Slow(link=(0, 1), factor=5.0),
        Slow(rank=0, factor=9.0),
    ]
    assert link_factor(script, (0, 2)) == 3.0
    assert link_factor(script, (1, 2)) == 1.0
    assert link_factor(script, range(4)) == 15.0
    assert link_factor(script, (0,)) == link_factor((), range(4)) == 1.0


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("kill:rank=3,at=17", Kill(rank=3, at=17)),
        ("kill:rank=3,at=17,step=1", Kill(rank=3, at=17, step=1)),
        ("pause:rank=1,at=0,seconds=0.5", Pause(rank=1, at=0, seconds=0.5)),
        ("slow:rank=0,factor=2", Slow(rank=0, factor=2.0)),
        ("slow:link=0-12,factor=1.5", Slow(link=(0, 12), factor=1.5)),
        ("drop:sender=1,receiver=0,at=2", Drop(sender=1, receiver=0, at=2)),
        ("outofmemory:rank=2,at_bytes=1024", OutOfMemory(rank=2, at_bytes=1024)),
    ],
)
def test_a_fault_can_be_written(text: str, fault: Fault) -> None:
    """As a command line takes it."""
    assert fault_from_text(text) == fault


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "a fault must be KIND:NAME=VALUE"),
        ("explode:rank=1", "of a kind of kill, pause"),
        ("kill:rank", "kill takes rank, at, step, got 'rank'"),
        ("kill:rank=1,at=2,seconds=3", "kill takes rank, at, step, got 'seconds=3'"),
        ("kill:rank=1", "the fault kill needs at"),
        ("kill:rank=x,at=1", "rank of a fault must be a number"),
        ("slow:link=0-1-2,factor=2", "link must be None or two different ranks"),
        ("slow:link=a,factor=2", "link of a fault must be a number"),
        ("pause:rank=0,at=0,seconds=-1", "seconds must be a positive finite number"),
    ],
)
def test_a_text_that_says_no_fault_is_refused(text: str, words: str) -> None:
    """With the shape that it should have, or what is wrong in it."""
    with pytest.raises(PlanError, match=words):
        fault_from_text(text)
