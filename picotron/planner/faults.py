"""What may go wrong in a world, as data: a script of faults is given to a simulated run, and repeats exactly.

A rank's *place* is (step, index): in a plan's run the training step and the row of the rank's program; in a
function of one's own, step 0 and how many operations the rank has posted before. A fault at a place strikes
when the rank first reaches it, before it does what stands there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, cast

from attrs import NOTHING, Attribute, field, fields, frozen

from picotron.errors import PlanError
from picotron.planner.validators import COUNT, POSITIVE, is_count, must_be, shown


def _is_link(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and value[0] != value[1] and all(map(is_count, value))


@frozen(kw_only=True)
class Kill:
    """``rank`` is gone at (``step``, ``at``), without a word: the others learn of it when they need it."""

    rank: int = field(validator=COUNT)
    at: int = field(validator=COUNT)
    step: int = field(default=0, validator=COUNT)


@frozen(kw_only=True)
class Pause:
    """``rank`` does nothing for ``seconds`` of virtual time at (``step``, ``at``)."""

    rank: int = field(validator=COUNT)
    at: int = field(validator=COUNT)
    seconds: float = field(validator=POSITIVE)
    step: int = field(default=0, validator=COUNT)


@frozen(kw_only=True)
class Slow:
    """Something takes ``factor`` times as long, from the beginning to the end.

    It is the computing of ``rank``, or all communication in which both ranks of ``link`` take part.
    """

    rank: int | None = field(
        default=None, validator=must_be("None or a rank", lambda value: value is None or is_count(value))
    )
    link: tuple[int, int] | None = field(
        default=None,
        validator=must_be("None or two different ranks", lambda value: value is None or _is_link(value)),
    )
    factor: float = field(validator=POSITIVE)

    @factor.validator
    def _rank_or_link(self, _: Attribute[float], value: float) -> None:
        if (self.rank is None) == (self.link is None):
            raise PlanError(f"Slow takes a rank or a link, got rank={self.rank!r} and link={self.link!r}")


@frozen(kw_only=True)
class Corrupt:
    """One bit is wrong in what ``rank`` gets by the first operation it posts at (``step``, ``at``) or later.

    ``element`` counts in the flattened tensor (modulo its size), ``bit`` from the lowest of that element
    (modulo its width).
    """

    rank: int = field(validator=COUNT)
    at: int = field(validator=COUNT)
    element: int = field(default=0, validator=COUNT)
    bit: int = field(default=0, validator=COUNT)
    step: int = field(default=0, validator=COUNT)


@frozen(kw_only=True)
class Drop:
    """The ``at``-th message (from 0) that ``sender`` sends to ``receiver`` never arrives."""

    sender: int = field(validator=COUNT)
    receiver: int = field(validator=COUNT)
    at: int = field(validator=COUNT)

    @at.validator
    def _two_ranks(self, _: Attribute[int], value: int) -> None:
        if self.sender == self.receiver:
            raise PlanError(f"sender and receiver must be different ranks, got {self.sender} twice")


@frozen(kw_only=True)
class OutOfMemory:
    """The device of ``rank`` holds no more than ``at_bytes`` of live tensors."""

    rank: int = field(validator=COUNT)
    at_bytes: int = field(validator=COUNT)


Fault = Kill | Pause | Slow | Corrupt | Drop | OutOfMemory


def ranks_of(fault: Fault) -> tuple[int, ...]:
    """The ranks that a fault names."""
    if isinstance(fault, Drop):
        return fault.sender, fault.receiver
    if isinstance(fault, Slow) and fault.link is not None:
        return fault.link
    assert fault.rank is not None
    return (fault.rank,)


def as_script(faults: object) -> tuple[Fault, ...]:
    """Faults, or a single one, as a tuple. Raises PlanError for anything else."""
    script = (faults,) if isinstance(faults, Fault) or not isinstance(faults, Iterable) else tuple(faults)
    for fault in script:
        if not isinstance(fault, Fault):
            raise PlanError(
                f"a fault must be a Kill, Pause, Slow, Corrupt, Drop or OutOfMemory, got {shown(fault)}"
            )
    return script


def check_faults(faults: object, world_size: int) -> tuple[Fault, ...]:
    """The script as a tuple. Raises PlanError for what is no fault, or names a rank outside the world."""
    script = as_script(faults)
    for fault in script:
        if outside := [rank for rank in ranks_of(fault) if rank >= world_size]:
            raise PlanError(f"the rank of a fault must be in [0, {world_size}), got {outside[0]} in {fault}")
    return script


def compute_factor(faults: Iterable[Fault], rank: int) -> float:
    """How many times longer the computing of ``rank`` takes.

    >>> compute_factor([Slow(rank=3, factor=2.0), Slow(link=(3, 4), factor=9.0)], 3)
    2.0
    """
    return math.prod(f.factor for f in faults if isinstance(f, Slow) and f.rank == rank)


def link_factor(faults: Iterable[Fault], ranks: Iterable[int]) -> float:
    """How many times longer communication among ``ranks`` takes.

    >>> link_factor([Slow(link=(3, 4), factor=9.0)], [2, 3, 4])
    9.0
    """
    members = set(ranks)
    return math.prod(
        f.factor for f in faults if isinstance(f, Slow) and f.link is not None and members >= set(f.link)
    )


_KINDS = {kind.__name__.lower(): kind for kind in (Kill, Pause, Slow, Corrupt, Drop, OutOfMemory)}
_SHAPE = "KIND:NAME=VALUE,..., such as kill:rank=3,at=17,step=1 or slow:link=0-1,factor=2"


def fault_from_text(text: str) -> Fault:
    """The fault that ``text`` says, as on a command line. Raises PlanError for what says none.

    >>> fault_from_text("pause:rank=3,at=17,seconds=0.5")
    Pause(rank=3, at=17, seconds=0.5, step=0)
    >>> fault_from_text("slow:link=0-1,factor=2")
    Slow(rank=None, link=(0, 1), factor=2.0)
    """
    name, _, rest = text.partition(":")
    if name not in _KINDS:
        raise PlanError(f"a fault must be {_SHAPE}, of a kind of {', '.join(_KINDS)}; got {shown(text)}")
    kind = _KINDS[name]
    known = [f.name for f in fields(kind)]
    values: dict[str, object] = {}
    for part in rest.split(","):
        key, equals, value = part.partition("=")
        if not equals or key not in known:
            raise PlanError(f"a fault must be {_SHAPE}; {name} takes {', '.join(known)}, got {shown(part)}")
        values[key] = _value(key, value, text)
    needed = [f.name for f in fields(kind) if f.default is NOTHING and f.name not in values]
    if needed:
        raise PlanError(f"the fault {name} needs {', '.join(needed)}, got {shown(text)}")
    return cast(Fault, cast(Any, kind)(**values))


def _value(key: str, text: str, whole: str) -> object:
    try:
        if key == "link":
            return tuple(map(int, text.split("-")))
        return float(text) if key in ("seconds", "factor") else int(text)
    except ValueError:
        raise PlanError(f"{key} of a fault must be a number (of link: A-B), got {shown(whole)}") from None
