"""Looks for a seed under which a program behaves otherwise than under the first: a race, if there is one."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import attrs
import numpy as np
import torch
from attrs import evolve, frozen

from picotron.errors import ExecutionError, PlanError
from picotron.planner.validators import shown
from picotron.runtime.arithmetic import as_bytes
from picotron.runtime.backend import Backend
from picotron.runtime.ledger import UNLIKE
from picotron.runtime.simulated import simulation
from picotron.runtime.world import Simulation, make_world

PREEMPT = 0.5  # how often a rank that posts an operation lets others go first, while a race is looked for


@frozen(kw_only=True)
class FuzzReport:
    """What was found: the first seed that differs, if one does, and how.

    ``error`` is what the first seed raised, if it did: a program that always fails in the same way is told of
    there.
    """

    num_seeds: int
    first_seed: int
    seed: int | None
    difference: str
    error: BaseException | None

    @property
    def ok(self) -> bool:
        """Whether every seed had the first one's result, and that is no error."""
        return self.seed is None and self.error is None

    def check(self) -> None:
        """Raise what is wrong, if something is: the difference, or the error that all seeds share."""
        if self.seed is not None:
            raise ExecutionError(str(self))
        if self.error is not None:
            raise self.error

    def __str__(self) -> str:
        if self.seed is not None:
            return (
                f"the result depends on who goes first: seed {self.seed} differs from {self.first_seed}: "
                f"{self.difference}\nrepeat it with seed={self.seed}, preempt={PREEMPT}"
            )
        what = "the same result" if self.error is None else f"the same error: {self.error}"
        return f"{self.num_seeds} seeds, {what}"


def fuzz(
    function: Callable[[Backend], Any], world_size: int, *, seeds: Iterable[int] = range(100), **world: Any
) -> FuzzReport:
    """Run ``function(backend)`` under each seed until one differs from the first in result or error.

    Results are compared to the bit, rank by rank; ``world`` as World's fields. Without seeds: PlanError.
    """
    try:
        numbers = list(seeds)
    except TypeError:
        raise PlanError(f"seeds must be whole numbers, one after the other, got {shown(seeds)}") from None
    if not numbers:
        raise PlanError("fuzz needs at least one seed, got none")
    settings = make_world({"preempt": PREEMPT, "seed": numbers[0], **world})
    first = simulation(function, world_size, settings)
    expected = _told(first)
    for count, seed in enumerate(numbers[1:], start=2):
        found = simulation(function, world_size, evolve(settings, seed=seed))
        if _told(found) != expected:
            return FuzzReport(
                num_seeds=count,
                first_seed=numbers[0],
                seed=seed,
                difference=_difference(first, found),
                error=first.failure,
            )
    return FuzzReport(
        num_seeds=len(numbers), first_seed=numbers[0], seed=None, difference="", error=first.failure
    )


def _told(run: Simulation[Any]) -> tuple[str, tuple[str, ...]]:
    """The error, or else each rank's result, in a form that is equal where they are.

    Who of several ranks tells an error first, or which of those that disagree are named, is no difference.
    """
    error = run.failure
    if error is not None:
        words = error.message if isinstance(error, ExecutionError) else str(error)
        unlike = words.find(UNLIKE)
        return f"{type(error).__name__}: {words[:unlike] if unlike >= 0 else words}", ()
    return "", tuple(digest(outcome.result) for outcome in run.outcomes)


def _difference(first: Simulation[Any], found: Simulation[Any]) -> str:
    errors = [run.failure and f"{type(run.failure).__name__}: {run.failure}" for run in (found, first)]
    if any(errors):
        return f"{errors[0] or 'no error'}\nwhere the first seed had {errors[1] or 'no error'}"
    pairs = zip(_told(first)[1], _told(found)[1], strict=True)
    return (
        f"another result on rank {', '.join(str(r) for r, (one, other) in enumerate(pairs) if one != other)}"
    )


def digest(value: object) -> str:
    """A SHA-256 of ``value``: numbers, tensors and what holds them by their bits, the rest by its repr."""
    return _hashed(value).hex()


def _hashed(value: object) -> bytes:
    """Type and content, each value within another hashed by itself."""
    if isinstance(value, torch.nn.Module):
        return _sha256("module", type(value).__name__, _hashed(value.state_dict()))
    if isinstance(value, torch.Tensor):
        dense = value.detach().cpu()
        flat = as_bytes((dense if dense.layout == torch.strided else dense.to_dense()).contiguous())
        return _sha256("tensor", str(value.dtype), str(tuple(value.shape)), flat.numpy().tobytes())
    if isinstance(value, np.ndarray) and value.dtype == object:
        return _hashed(value.tolist())
    if isinstance(value, np.ndarray):
        return _sha256("array", str(value.dtype), str(value.shape), np.ascontiguousarray(value).tobytes())
    if isinstance(value, Mapping):
        return _sha256("mapping", *(_hashed(item) for pair in value.items() for item in pair))
    if isinstance(value, list | tuple):
        return _sha256(type(value).__name__, *map(_hashed, value))
    if isinstance(value, set | frozenset):
        return _sha256("set", *sorted(map(_hashed, value)))
    if isinstance(value, float):
        return _sha256("float", value.hex())
    names = _field_names(value)
    if names is not None:
        return _sha256(type(value).__name__, *(_hashed(getattr(value, name)) for name in names))
    if type(value).__repr__ is object.__repr__:  # it tells an address, which is no value
        return _sha256(type(value).__name__, _hashed(getattr(value, "__dict__", {})))
    return _sha256(type(value).__name__, repr(value))


def _field_names(value: object) -> list[str] | None:
    """Of an attrs object or a dataclass; None for anything else."""
    if attrs.has(type(value)):
        return [f.name for f in attrs.fields(cast(Any, type(value)))]
    if dataclasses.is_dataclass(value):
        return [f.name for f in dataclasses.fields(value)]
    return None


def _sha256(*parts: str | bytes) -> bytes:
    """A hash that keeps its parts apart."""
    found = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        found.update(len(content).to_bytes(8, "big") + content)
    return found.digest()
