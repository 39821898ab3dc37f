"""Prices of a measured machine, checkable by hand."""

from __future__ import annotations

import pytest

from picotron.errors import PlanError
from picotron.planner.measured import CallCost, KernelCost, MeasuredCosts, ProductCost

PLAIN = ProductCost(flops_per_second=10.0)


def costs(**changed: object) -> MeasuredCosts:
    """Everything at 10 a second."""
    products = dict.fromkeys(("output", "input", "weight", "attention", "attention_backward"), PLAIN)
    kernel = KernelCost(cached_bytes_per_second=10, memory_bytes_per_second=10)
    return MeasuredCosts(**{"precision": "fp32", "kernel": kernel, **products, **changed})  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "at"), [("half_m", 0), ("half_n", 1), ("half_k", 2)])
def test_a_size_of_its_half_rate_alone_halves_the_rate(name: str, at: int) -> None:
    """100 FLOPs at 10 a second take 10 s; with one size at its half-rate 20 s, with a tenth of it 110 s."""
    cost = ProductCost(flops_per_second=10, fixed_seconds=1, **{name: 30})
    for size, seconds in ((30, 20), (3, 110)):
        shape = [1, 1, 1, 1]
        shape[at] = size
        assert cost.seconds(100, tuple(shape)) == pytest.approx(seconds + 1)
    assert cost.seconds(100, ()) == pytest.approx(10 + 1)


def test_bytes_beyond_the_cache_go_at_the_memorys_rate() -> None:
    """Of 30 bytes 20 at 10 a second and 10 at 2 a second."""
    cost = KernelCost(cached_bytes_per_second=10, memory_bytes_per_second=2, cache_bytes=20)
    assert [cost.seconds(size) for size in (0, 10, 20, 30)] == pytest.approx([0, 1, 2, 7])


def test_a_call_costs_by_call_and_by_byte_of_its_kind() -> None:
    """A kind that was not measured costs nothing; one that is named twice is refused."""
    call = CallCost(kind="send", call_seconds=2, byte_seconds=0.5)
    assert costs(communication=[call]).call_seconds("send", 10) == 7
    assert costs(communication=[call]).call_seconds("recv", 10) == 0
    with pytest.raises(PlanError, match=r"each kind once, got \('send', 'send'\)"):
        costs(communication=[call, call])


@pytest.mark.parametrize("bad", [{"flops_per_second": 0}, {"flops_per_second": 1, "half_m": -1}])
def test_a_rate_is_positive_and_a_cost_not_negative(bad: dict[str, float]) -> None:
    """Else seconds would not be finite numbers of at least 0."""
    with pytest.raises(PlanError):
        ProductCost(**bad)
