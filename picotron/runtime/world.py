"""How a simulated world behaves, and what becomes of its ranks: data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, Literal, TypeVar

import torch
from attrs import field, fields, frozen

from picotron.errors import PlanError
from picotron.planner.faults import Fault, as_script
from picotron.planner.prices import Price
from picotron.planner.validators import FLAG, is_count, is_positive, must_be, one_of, shown
from picotron.runtime.device import indexed
from picotron.runtime.messages import Semantics
from picotron.runtime.scheduler import Event, Ran

T = TypeVar("T")

Clock = Literal["planned", "cpu"]


def _is_chance(value: Any) -> bool:
    return value == 0 or (is_positive(value) and value <= 1)


def _device(value: Any) -> torch.device:
    """The device that all ranks share. Raises PlanError for one that is not here."""
    try:
        device = torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise PlanError(f"device must be cpu or cuda, got {shown(value)}") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise PlanError(f"device must be cpu, or cuda where there is a GPU, got {value}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise PlanError(f"device must be one of this machine's {torch.cuda.device_count()} GPUs, got {value}")
    return indexed(device)


@frozen(kw_only=True)
class World:
    """How a simulated world behaves.

    ``seed`` draws who goes next, and whether (with chance ``preempt``) a rank that posts an operation lets
    another one go first. ``price`` gives seconds of communication (None: it is free). ``patience_seconds`` is
    how long, on the virtual clock, a rank waits for an operation before it gives up, like a time-out.
    ``memory_bytes`` is what each rank's device holds: a rank whose live tensors exceed it gets the error that
    a real device raises. ``device`` is where the tensors of all ranks live: the CPU, or one GPU that they
    share. ``keep_events`` writes down every post, wait and end.
    """

    seed: int = field(default=0, validator=must_be("an integer", lambda value: isinstance(value, int)))
    semantics: Semantics = field(default="rendezvous", validator=one_of(Semantics))
    clock: Clock = field(default="planned", validator=one_of(Clock))
    price: Price | None = field(
        default=None, validator=must_be("None or a function", lambda v: v is None or callable(v))
    )
    faults: tuple[Fault, ...] = field(default=(), converter=as_script)
    preempt: float = field(default=0.0, validator=must_be("a chance from 0 to 1", _is_chance))
    patience_seconds: float | None = field(
        default=None,
        validator=must_be("None or a positive finite number", lambda v: v is None or is_positive(v)),
    )
    memory_bytes: int | None = field(
        default=None,
        validator=must_be("None or an integer of at least 0", lambda v: v is None or is_count(v)),
    )
    device: torch.device = field(default=torch.device("cpu"), converter=_device)
    keep_events: bool = field(default=False, validator=FLAG)


def make_world(settings: Mapping[str, Any]) -> World:
    """The world of such ``settings``. Raises PlanError for a name or a value that means nothing."""
    known = [f.name for f in fields(World)]
    if unknown := [name for name in settings if name not in known]:
        raise PlanError(f"a world takes {', '.join(known)}, got {', '.join(unknown)}")
    return World(**settings)


@frozen
class Outcome(Generic[T]):
    """How one rank ended: with a result, or with the error it raised (None too where a fault killed it)."""

    rank: int
    result: T | None
    error: BaseException | None
    killed: bool = False


@frozen(kw_only=True)
class Simulation(Generic[T]):
    """What became of every rank: the outcomes in rank order, and the first failure of all.

    ``events`` and ``spans``, kept if the world was told to, are what ranks did in the order in which it
    happened, and what took virtual time; ``clock_seconds`` is each rank's own at its end.
    """

    outcomes: tuple[Outcome[T], ...]
    failure: BaseException | None
    events: tuple[Event, ...]
    spans: tuple[Ran, ...]
    num_hand_overs: int
    clock_seconds: tuple[float, ...]
