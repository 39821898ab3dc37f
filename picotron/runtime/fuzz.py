"""Looks for a seed under which a program behaves otherwise than under the first: a race, if there is one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import attrs
import numpy as np
import torch
from attrs import frozen

from picotron.errors import ExecutionError, PlanError
from picotron.runtime.backend import Backend
from picotron.runtime.simulated import simulation
from picotron.runtime.world import Simulation, World

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
    numbers = list(seeds)
    if not numbers:
        raise PlanError("fuzz needs at least one seed, got none")
    settings = {"preempt": PREEMPT, **world}
    first = simulation(function, world_size, World(seed=numbers[0], **settings))
    expected = _told(first)
    for count, seed in enumerate(numbers[1:], start=2):
        found = _told(simulation(function, world_size, World(seed=seed, **settings)))
        if found != expected:
            return FuzzReport(
                num_seeds=count,
                first_seed=numbers[0],
                seed=seed,
                difference=_difference(expected, found),
                error=first.failure,
            )
    return FuzzReport(
        num_seeds=len(numbers), first_seed=numbers[0], seed=None, difference="", error=first.failure
    )


def _told(run: Simulation[Any]) -> tuple[str, tuple[str, ...]]:
    """The error, or else each rank's result, in a form that is equal where they are."""
    if run.failure is not None:
        return f"{type(run.failure).__name__}: {run.failure}", ()
    return "", tuple(digest(outcome.result) for outcome in run.outcomes)


def _difference(expected: tuple[str, tuple[str, ...]], found: tuple[str, tuple[str, ...]]) -> str:
    if expected[0] != found[0]:
        return f"{found[0] or 'no error'}\nwhere the first seed had {expected[0] or 'no error'}"
    ranks = [r for r, (one, other) in enumerate(zip(expected[1], found[1], strict=True)) if one != other]
    return f"another result on rank {', '.join(map(str, ranks))}"


def digest(value: object) -> str:
    """A SHA-256 of ``value``: tensors, arrays, numbers and containers by their bits, the rest by its repr."""
    found = hashlib.sha256()
    _feed(found, value)
    return found.hexdigest()


def _feed(found: Any, value: object) -> None:
    if isinstance(value, torch.Tensor):
        found.update(f"tensor {value.dtype} {tuple(value.shape)}".encode())
        flat = value.detach().cpu().contiguous().view(-1)
        found.update(flat.view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray):
        found.update(f"array {value.dtype} {value.shape}".encode() + np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        found.update(f"mapping {len(value)}".encode())
        for key, item in value.items():
            _feed(found, key)
            _feed(found, item)
    elif isinstance(value, list | tuple):
        found.update(f"{type(value).__name__} {len(value)}".encode())
        for item in value:
            _feed(found, item)
    elif isinstance(value, float):
        found.update(value.hex().encode())
    elif attrs.has(type(value)):
        found.update(type(value).__name__.encode())
        _feed(found, {f.name: getattr(value, f.name) for f in attrs.fields(type(value))})  # type: ignore[arg-type]
    else:
        found.update(repr(value).encode())
