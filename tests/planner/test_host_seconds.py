"""CPU seconds of ranks: what they compute as predicted, and a price for each call that they make."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from attrs import evolve

from picotron.planner.cluster import ClusterSpec
from picotron.planner.host_seconds import calls, cpu_seconds_by_rank
from picotron.planner.measured import CallCost
from picotron.planner.plan import TrainingPlan
from picotron.planner.predict import planned_payloads, predict
from picotron.planner.topology import coordinate
from tests.planner.test_cost import TINY, _measured_cluster, _plan

LAYOUTS: tuple[dict[str, Any], ...] = (
    {"dp": 2, "pp": 2, "tp": 2, "sequence_parallel": True},
    {"pp": 2, "virtual_stages": 2, "schedule": "interleaved"},
    {"dp": 4, "tp": 2, "sequence_parallel": False},
    {"pp": 2, "schedule": "zb-h1", "dp": 4},
)


def _made(layout: dict[str, Any], cluster: ClusterSpec) -> TrainingPlan:
    return _plan(cluster, TINY | {"num_hidden_layers": 4, "vocab_size": 9}, batch=8, micro_batch=1, **layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_calls_carry_the_planned_payloads(layout: dict[str, Any]) -> None:
    """Calls of a rank times their bytes, by kind, are the payload that the prediction counts for it."""
    made = _made(layout, _measured_cluster(8))
    for rank, planned in enumerate(planned_payloads(made)):
        where, expected, found = coordinate(made.topology, rank), Counter[str](), Counter[str]()
        for kind, _, size in planned:
            expected[kind] += size
        for (kind, size), count in calls(made, where.pp, where.tp).items():
            found[kind] += size * count
        assert found == expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_computes_as_predicted_and_pays_for_its_calls(layout: dict[str, Any]) -> None:
    """Without prices of calls it is the predicted computing; 1000 s a call and 2 s a byte come on top."""
    cluster = _measured_cluster(8, communication_scale=3)
    made = _made(layout, cluster)
    predicted = predict(made).compute_seconds_by_rank
    assert cpu_seconds_by_rank(made) == pytest.approx(predicted)
    kinds = ("all_reduce", "all_gather", "reduce_scatter", "send", "recv")
    costs = [CallCost(kind=kind, call_seconds=1000, byte_seconds=2) for kind in kinds]
    assert cluster.efficiency.measured is not None
    priced = evolve(cluster.efficiency.measured, communication=costs)
    more = _made(layout, evolve(cluster, efficiency=evolve(cluster.efficiency, measured=priced)))
    for rank, seconds in enumerate(cpu_seconds_by_rank(more)):
        where = coordinate(made.topology, rank)
        own = sum((1000 + 2 * size) * count for (_, size), count in calls(made, where.pp, where.tp).items())
        assert seconds == pytest.approx(predicted[rank] + 3 * own)
