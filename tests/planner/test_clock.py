"""The one rule of time."""

from __future__ import annotations

import pytest

from picotron.planner.clock import Operation, Span, advance


@pytest.mark.parametrize(
    ("free", "ready", "span"),
    [
        ({}, 0.0, (0.0, 0.5)),
        ({"a": 2.0}, 1.0, (2.0, 2.5)),
        ({"a": 2.0}, 3.0, (3.0, 3.5)),
        ({"a": 2.0, "b": 4.0}, 3.0, (2.0 + 1.0, 3.5)),
    ],
)
def test_an_operation_starts_when_it_is_ready_and_its_stream_is_free(
    free: dict[str, float], ready: float, span: tuple[float, float]
) -> None:
    """The later of both; streams that it does not take do not matter, unknown ones are free at 0."""
    assert advance(free, Operation(("a",), ready, 0.5)) == Span(*span)


def test_an_operation_takes_all_its_streams() -> None:
    """It starts when the last of them is free, and changes nothing itself."""
    free = {"a": 2.0, "b": 4.0}
    assert advance(free, Operation(("a", "b", "c"), 3.0, 1.0)) == Span(4.0, 5.0)
    assert free == {"a": 2.0, "b": 4.0}


def test_an_operation_without_streams_runs_when_it_is_ready() -> None:
    """Nothing holds it."""
    assert advance({"a": 9.0}, Operation((), 3.0, 1.0)) == Span(3.0, 4.0)


def test_waiting_takes_no_time() -> None:
    """For what has ended it is over at once; else it ends with what is waited for."""
    assert advance({"rank": 2.0}, Operation(("rank",), 1.0, 0.0)) == Span(2.0, 2.0)
    assert advance({"rank": 2.0}, Operation(("rank",), 5.0, 0.0)) == Span(5.0, 5.0)
