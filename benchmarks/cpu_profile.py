"""Where one process's CPU time of a step goes: by segment, collective, kind of kernel, and in gloo's threads.

Three groups of steps are taken. In the first only threads' clocks are looked at. In the second (Picotron
alone) every segment, collective and update is timed by the main thread's own CPU clock, each without what is
nested in it; what is left is the walker's Python. In the third a dispatch mode times every operation, which
costs some microseconds each: take its figures as shares. Waiting costs no CPU time and is in none.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

from attrs import field, frozen
from counters import thread_seconds
from teams import aligned
from torch.utils._python_dispatch import TorchDispatchMode

from picotron.runtime.communicator import Communicator
from picotron.runtime.distributed import DistributedHandle, SharedHandle

if TYPE_CHECKING:
    from rank_sides import Server

KINDS = {  # of operations, by parts of their names; the first that fits
    "optimizer": ("adam",),
    "attention": ("attention",),
    "matrix products": ("mm", "bmm", "linear", "matmul", "mv", "dot"),
    "embedding and gather": ("embedding", "index", "gather", "scatter"),
    "views": (
        "view",
        "transpose",
        "::t.",
        "detach",
        "split",
        "chunk",
        "unsqueeze",
        "select",
        "slice",
        "alias",
    ),
    "copies and fills": ("copy", "clone", "cat", "zero", "fill", "contiguous", "empty", "_to_", "new_"),
    "reductions": ("sum", "norm", "amax", "mean", "logsumexp", "softmax"),
}


def kind_of(name: str) -> str:
    """The kind of an operation called ``name``; elementwise where no part of KINDS fits."""
    return next((kind for kind, parts in KINDS.items() if any(p in name for p in parts)), "elementwise")


class OperationClock(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Main-thread CPU seconds of every operation, by kind; of those inside an operation too."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seconds, self.times = Counter[str](), Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        started = time.thread_time_ns()
        out = func(*args, **(kwargs or {}))
        kind = kind_of(str(func))
        self.seconds[kind] += (time.thread_time_ns() - started) / 1e9
        self.times[kind] += 1
        return out


class Spans:
    """Main-thread CPU seconds by name, each without what is nested in it."""

    def __init__(self) -> None:
        self.seconds, self.times = Counter[str](), Counter[str]()
        self._nested: list[int] = [0]

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Count the body under ``name``."""
        started = time.thread_time_ns()
        self._nested.append(0)
        try:
            yield
        finally:
            whole = time.thread_time_ns() - started
            self.seconds[name] += (whole - self._nested.pop()) / 1e9
            self.times[name] += 1
            self._nested[-1] += whole

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, counted under ``name``."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.span(name):
                return function(*args, **kwargs)

        return call


@contextmanager
def watched(places: Sequence[tuple[object, str, str]], spans: Spans) -> Iterator[None]:
    """Inside, methods (object, its name, ours) are counted; afterwards they are as they were."""
    before = [(owner, method, vars(owner).get(method)) for owner, method, _ in places]
    for owner, method, name in places:
        setattr(owner, method, spans.timed(name, getattr(owner, method)))
    try:
        yield
    finally:
        for owner, method, own in before:
            if own is None:  # it was its class's
                delattr(owner, method)
            else:
                setattr(owner, method, own)


SEGMENT_METHODS = {"forward": "F", "backward": "B", "backward_input": "I", "backward_weight": "W"}
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "send", "recv", "all_to_all")
UPDATES = {"zero_gradients": "zero gradients", "square_norm": "gradient norm", "update": "optimizer step"}


def places_of(session: Any) -> list[tuple[object, str, str]]:
    """What is timed of a Picotron session: segments, the backend's operations, what belongs to no segment."""
    places: list[tuple[object, str, str]] = [
        (runner, method, f"{letter} {type(runner).__name__}")
        for runner in session.runners
        for method, letter in SEGMENT_METHODS.items()
    ]
    communicator: Communicator = session.communicator
    places += [
        (communicator.backend, kind, f"post {kind}")
        for kind in COLLECTIVES
        if hasattr(communicator.backend, kind)
    ]
    places += [(DistributedHandle, "wait", "wait on gloo"), (SharedHandle, "wait", "wait and read")]
    places += [
        (session.parameters, method, name)
        for method, name in UPDATES.items()
        if hasattr(session.parameters, method)
    ]
    return places


@frozen(kw_only=True)
class Profile:
    """One process, a step: seconds and how often, by name. ``spans`` is empty for a peer."""

    main_seconds: float
    other_seconds: float
    threads: dict[str, tuple[float, float]] = field(factory=dict)
    spans: dict[str, tuple[float, float]] = field(factory=dict)
    operations: dict[str, tuple[float, float]] = field(factory=dict)

    @property
    def cpu_seconds(self) -> float:
        """Of all threads."""
        return self.main_seconds + self.other_seconds


def profiled(server: Server, steps: int) -> Profile:
    """``steps`` of each group of steps; figures are a step's."""
    main, other = thread_seconds()
    server.take(steps)
    main_then, other_then = thread_seconds()
    spans, clock = Spans(), OperationClock()
    session = getattr(server.trainer, "session", None)
    if session is not None:
        with watched(places_of(session), spans), spans.span("walker"):
            server.take(steps)
    with clock:
        server.take(steps)
    return Profile(
        main_seconds=(main_then - main) / steps,
        other_seconds=(sum(other_then.values()) - sum(other.values())) / steps,
        threads={
            f"{name} threads": ((seconds - other.get(name, 0.0)) / steps, 1.0)
            for name, seconds in other_then.items()
        },
        spans=_each(spans, steps),
        operations=_each(clock, steps),
    )


def _each(counted: Spans | OperationClock, steps: int) -> dict[str, tuple[float, float]]:
    return {name: (counted.seconds[name] / steps, counted.times[name] / steps) for name in counted.seconds}


def summed(profiles: Sequence[Profile]) -> Profile:
    """Over the ranks of a side."""

    def total(name: str) -> dict[str, tuple[float, float]]:
        found: dict[str, tuple[float, float]] = {}
        for profile in profiles:
            for key, (seconds, times) in getattr(profile, name).items():
                before = found.get(key, (0.0, 0.0))
                found[key] = before[0] + seconds, before[1] + times
        return found

    return Profile(
        main_seconds=sum(profile.main_seconds for profile in profiles),
        other_seconds=sum(profile.other_seconds for profile in profiles),
        threads=total("threads"),
        spans=total("spans"),
        operations=total("operations"),
    )


HEADINGS = {"other threads": "threads", "operations by kind": "operations", "segments and rows": "spans"}


def table(profiles: dict[str, Profile], single: Profile) -> str:
    """Milliseconds a step over all ranks, side by side; ``single`` is the one process's."""
    every = {**profiles, "single": single}
    lines = [["CPU ms a step, all ranks", *every]]
    lines += [
        ["all", *(_ms(p.cpu_seconds) for p in every.values())],
        ["main threads", *(_ms(p.main_seconds) for p in every.values())],
        ["other threads", *(_ms(p.other_seconds) for p in every.values())],
    ]
    for heading, name in HEADINGS.items():
        keys = {key: None for p in every.values() for key in getattr(p, name)}
        if not keys:
            continue
        lines.append([f"-- {heading}", *("" for _ in every)])
        ordered = sorted(keys, key=partial(_most, every, name), reverse=True)
        for key in ordered:
            lines.append([key, *(_cell(getattr(p, name).get(key)) for p in every.values())])
    return aligned(lines)


def _most(every: dict[str, Profile], name: str, key: str) -> float:
    return max(getattr(profile, name).get(key, (0.0, 0.0))[0] for profile in every.values())


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}"


def _cell(found: tuple[float, float] | None) -> str:
    return "-" if found is None else f"{found[0] * 1e3:.1f} ({found[1]:.0f}x)"
