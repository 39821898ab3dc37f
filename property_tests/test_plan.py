"""Theorems about whole plans: determined by the request, consistent in all that follows from them."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from picotron.errors import PlanError
from picotron.planner.catalogue import SCHEDULES
from picotron.planner.cluster import ClusterSpec
from picotron.planner.memory import memory_timeline
from picotron.planner.model import ModelSpec
from picotron.planner.plan import TrainingPlan, plan
from picotron.planner.predict import planned_payloads, predict
from picotron.planner.topology import groups
from picotron.planner.workload import Workload
from property_tests.strategies import DENSE, SPARSE, models, one_stage_a_rank, plans, requests

EVERY = DENSE + SPARSE
Request = tuple[tuple[ModelSpec, ClusterSpec, Workload], dict[str, Any]]


@given(requests(families=EVERY))
def test_planning_twice_gives_equal_plans(request: Request) -> None:
    """A plan, its program and its memory are functions of the request."""
    first, second = (plan(*request[0], **request[1]) for _ in range(2))
    assert first == second
    assert first.program() == second.program()
    assert first.layout == second.layout
    assert first.bodies(0) == second.bodies(0)
    last = first.topology.world_size - 1
    assert memory_timeline(first, last) == memory_timeline(second, last)


@given(requests())
def test_a_prediction_is_a_function_of_the_plan(request: Request) -> None:
    """Predicting twice gives equal values."""
    first, second = (predict(plan(*request[0], **request[1])) for _ in range(2))
    assert first == second


@given(requests(families=EVERY))
def test_what_was_chosen_can_be_asked_for(request: Request) -> None:
    """A plan made again with every choice spelled out is the same but for what it says was chosen."""
    made = plan(*request[0], **request[1])
    spelled = request[1] | {
        "dp": made.topology.dp,
        "virtual_stages": made.virtual_stages,
        "sequence_parallel": made.sequence_parallel,
        "context": made.context,
        "stage_layers": made.stage_layers,
    }
    again = plan(*request[0], **spelled)
    assert again.chosen == ()
    assert attrs.evolve(made, chosen=()) == again


@given(plans(families=EVERY))
def test_a_step_takes_the_global_batch(made: TrainingPlan) -> None:
    """Microbatches of all data-parallel ranks make up the batch; stages share out the layers."""
    sequences = made.num_microbatches * made.micro_batch * made.topology.dp
    assert sequences == made.workload.global_batch
    assert sum(made.stage_layers) == made.model.num_layers
    assert made.schedule.num_microbatches == made.num_microbatches
    assert made.topology.world_size == made.cluster.num_devices


@given(plans(families=EVERY))
def test_members_of_a_group_hand_over_the_same_bytes(made: TrainingPlan) -> None:
    """Every rank of a tensor-, context-, data-parallel or world group plans the same collectives' bytes."""
    found = planned_payloads(made)
    for axis in ("tp", "cp", "dp_cp", "world"):
        for group in groups(made.topology, axis):
            handed = [{(k, size) for k, name, size in found[rank] if name == axis} for rank in group]
            assert all(own == handed[0] for own in handed)
    sent: dict[str, int] = defaultdict(int)
    for own in found:
        for kind, _, size in own:
            sent[kind] += size
    assert sent["send"] == sent["recv"]


@given(plans())
def test_predictions_are_consistent(made: TrainingPlan) -> None:
    """Nothing is negative, causal MFU is at most full MFU, and no rank computes longer than the step."""
    found = predict(made)
    assert found.step_seconds > 0
    assert 0 < found.mfu_causal <= found.mfu <= 1
    assert min(found.bubble_seconds) >= -1e-9 * found.step_seconds
    assert -1e-12 <= found.bubble_fraction < 1
    assert -1e-9 * found.step_seconds <= found.exposed_communication_seconds <= found.step_seconds
    assert max(found.compute_seconds_by_rank) <= found.step_seconds * (1 + 1e-9)
    assert len(found.memory_by_rank) == len(found.payload_bytes_by_rank) == made.topology.world_size


@given(models(EVERY), st.data())
def test_any_request_is_planned_or_refused(model: ModelSpec, data: st.DataObject) -> None:
    """Whatever the degrees, there is a plan with its program, or a PlanError that says what was given."""
    small = st.integers(0, 4)
    asked = {name: data.draw(small) for name in ("pp", "dp", "cp", "tp", "ep", "etp")}
    asked["sequence_parallel"] = data.draw(st.sampled_from([None, True, False]))
    asked["stage_layers"] = data.draw(st.none() | st.lists(small, max_size=4).map(tuple))
    asked["schedule"] = data.draw(st.sampled_from([*SCHEDULES, "", "zb"]))
    asked["virtual_stages"] = data.draw(st.sampled_from([None, None, 1, 2, 3, 0]))
    world = max(
        1, asked["pp"] * asked["dp"] * asked["cp"] * asked["tp"] + data.draw(st.sampled_from([0, 0, 1]))
    )
    cluster = ClusterSpec.preset("cpu", devices_per_node=world)
    work = Workload(global_batch=data.draw(st.integers(1, 12)), seq_len=data.draw(st.integers(1, 80)))
    try:
        made = plan(model, cluster, work, micro_batch=data.draw(st.integers(1, 3)), **asked)
    except PlanError as error:
        assert "got" in str(error)
    else:
        made.program()
        assert predict(made).step_seconds > 0


@pytest.mark.parametrize("name", ["afab", "1f1b"])
@given(made=plans())
def test_schedules_named_in_a_plan_are_made_again(name: str, made: TrainingPlan) -> None:
    """A plan with another schedule is a plan, with an F and a B of each microbatch on each stage."""
    other = one_stage_a_rank(made, name)
    assert other.schedule.orders.num_actions == 2 * made.topology.pp * made.num_microbatches
