"""Seconds by roofline and by link, on a machine of round numbers."""

from __future__ import annotations

from typing import Any

import pytest
from attrs import evolve

from picotron.errors import PlanError
from picotron.planner.body import COLLECTIVES, Operation, Tensor
from picotron.planner.cluster import ClusterSpec, DeviceSpec, Efficiency, LinkSpec, Peaks
from picotron.planner.cost import (
    CollectiveCost,
    SegmentCost,
    StageCost,
    compute_seconds,
    group_seconds,
    of_kind,
    product_role,
    send_seconds,
    stage_cost,
    stage_costs,
    update_seconds,
)
from picotron.planner.measured import KernelCost, MeasuredCosts, ProductCost
from picotron.planner.model import ModelSpec
from picotron.planner.plan import TrainingPlan, plan
from picotron.planner.program import COMPUTE, Kind
from picotron.planner.workload import Workload

TINY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 8,
    "hidden_size": 4,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 2,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 8,
    "n_embd": 4,
    "n_layer": 2,
    "n_head": 2,
    "n_inner": 6,
    "n_positions": 16,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
    "tie_word_embeddings": True,
}
MIXTRAL = TINY | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}


def _cluster(nodes: int = 1, per_node: int = 1) -> ClusterSpec:
    """100 FLOP/s in fp32, 10 bytes/s, links of 8 and 2 bytes/s, half of each reached; a launch of 1 s."""
    return ClusterSpec(
        name="round",
        device=DeviceSpec(
            name="round",
            peak_flops_per_second=Peaks(fp32=100, bf16=200),
            memory_bytes=10**6,
            memory_bytes_per_second=10,
            kind="cpu",
            source="invented",
        ),
        devices_per_node=per_node,
        nodes=nodes,
        intra_node=LinkSpec(name="near", bytes_per_second=8, latency_seconds=1, source="invented"),
        inter_node=LinkSpec(name="far", bytes_per_second=2, latency_seconds=3, source="invented"),
        efficiency=Efficiency(matmul=0.5, memory=0.5, link=0.5, kernel_seconds=1, source="invented"),
    )


def _plan(
    cluster: ClusterSpec, config: dict[str, Any] = TINY, *, batch: int = 4, **asked: Any
) -> TrainingPlan:
    work = Workload(global_batch=batch, seq_len=4, precision="fp32")
    return plan(ModelSpec.from_hf(config), cluster, work, **asked)


def test_a_matmul_bound_by_memory() -> None:
    """[2, 3] @ [3, 4] in fp32: 48 FLOPs take 0.96 s, its 104 bytes 20.8 s, the launch 1 s."""
    operation = Operation(name="m", kind="matmul", flops=48, moved_bytes=104)
    assert compute_seconds(_plan(_cluster()), operation) == pytest.approx(104 / 5 + 1)


def test_a_matmul_bound_by_flops() -> None:
    """5000 FLOPs at 50 a second outlast 104 bytes at 5 a second; in bf16 they take half."""
    operation = Operation(name="m", kind="matmul", flops=5000, moved_bytes=104)
    made = _plan(_cluster())
    assert compute_seconds(made, operation) == pytest.approx(100 + 1)
    half = evolve(made, workload=evolve(made.workload, precision="bf16"))
    assert compute_seconds(half, operation) == pytest.approx(50 + 1)


def test_a_kernel_takes_its_bytes_and_its_launches() -> None:
    """50 bytes at 5 a second and three launches."""
    operation = Operation(name="k", kind="kernel", moved_bytes=50, kernels=3)
    assert compute_seconds(_plan(_cluster()), operation) == pytest.approx(10 + 3)


def test_a_collective_computes_nothing() -> None:
    """Its seconds are communication."""
    operation = Operation(name="c", kind="all_reduce", group="tp", payload_bytes=8, kernels=0)
    assert compute_seconds(_plan(_cluster()), operation) == 0.0


def test_an_all_reduce_inside_a_node() -> None:
    """Two ranks, 16 bytes, 4 bytes a second reached: two steps of 1 s and 16 bytes sent."""
    made = _plan(_cluster(per_node=2), tp=2)
    assert group_seconds(made, "all_reduce", "tp", 16) == pytest.approx(2 * 1 + 16 / 4)


def test_a_group_over_nodes_is_priced_by_the_network() -> None:
    """dp of two nodes of one: latency 3 s, one byte a second reached."""
    made = _plan(_cluster(nodes=2), dp=2)
    assert group_seconds(made, "all_reduce", "dp_cp", 16) == pytest.approx(2 * 3 + 16 / 1)


def test_the_slowest_group_counts() -> None:
    """pp 1, dp 3, tp 2 on nodes of three: the tensor pair (2, 3) crosses the nodes, the others do not."""
    made = _plan(_cluster(nodes=2, per_node=3), batch=3, dp=3, tp=2)
    assert group_seconds(made, "all_gather", "tp", 16) == pytest.approx(3 + 8 / 1)


def test_a_group_of_one_is_free() -> None:
    """Nothing is sent."""
    assert group_seconds(_plan(_cluster()), "all_reduce", "world", 24) == 0.0


def test_a_transfer_between_stages() -> None:
    """One message: in a node 1 s + 16 / 4; over the network 3 s + 16 / 1; without a neighbour nothing."""
    assert send_seconds(_plan(_cluster(per_node=2), pp=2), 16) == pytest.approx(1 + 4)
    assert send_seconds(_plan(_cluster(nodes=2), pp=2), 16) == pytest.approx(3 + 16)
    assert send_seconds(_plan(_cluster()), 16) == 0.0


def test_a_ring_of_keys_and_values_is_sends() -> None:
    """An exchange over cp is priced as what one rank sends."""
    made = _plan(_cluster(per_node=2), cp=2)
    assert group_seconds(made, "exchange", "cp", 16) == pytest.approx(1 + 16 / 4)


def test_an_all_to_all_leaves_by_each_devices_own_adapter() -> None:
    """Two nodes of two: each byte takes its own device's link, at the network's rate of 1 byte a second."""
    made = _plan(_cluster(nodes=2, per_node=2), MIXTRAL, dp=4, ep=4)
    assert group_seconds(made, "all_to_all", "ep", 16) == pytest.approx(3 * 3 + 12 / 1)


def test_an_update_by_hand() -> None:
    """fp32 AdamW, 356 elements in 21 tensors: 5 * 4 + 2 * (4 + 8) bytes each at 5/s, 2 launches a tensor."""
    made = _plan(_cluster())
    assert made.model.num_parameters == 356
    assert update_seconds(made, 0) == pytest.approx(356 * (20 + 24) / 5 + 2 * 21)
    plain = evolve(made, workload=evolve(made.workload, optimizer="sgd"))
    assert update_seconds(plain, 0) == pytest.approx(356 * (20 + 8) / 5 + 2 * 21)


def test_a_stage_sums_its_segments() -> None:
    """Computing and blocking communication, one after the other; the embedding comes last in backward."""
    made = _plan(_cluster(per_node=2), tp=2)
    cost = stage_cost(made, 0)
    for kind in COMPUTE:
        costs, body = of_kind(cost, kind), of_kind(made.bodies(0), kind)
        assert [c.compute_seconds for c in costs] == pytest.approx(
            [sum(compute_seconds(made, op) for op in segment.operations) for segment in body.segments]
        )
        assert [c.communication_seconds for c in costs] == pytest.approx(
            [
                sum(group_seconds(made, op.kind, op.group, op.payload_bytes) for op in segment.collectives)
                for segment in body.segments
            ]
        )
    assert cost.update_seconds == update_seconds(made, 0)


def test_a_segment_keeps_its_order() -> None:
    """Stretches of computing between collectives, each the sum of its operations, one after the other."""
    made = _plan(_cluster(per_node=2), tp=2)
    for kind in COMPUTE:
        costs, body = of_kind(stage_cost(made, 0), kind), of_kind(made.bodies(0), kind)
        for cost, segment in zip(costs, body.segments, strict=True):
            stretches = [0.0]
            for operation in segment.operations:
                if operation.kind in COLLECTIVES:
                    stretches.append(0.0)
                else:
                    stretches[-1] += compute_seconds(made, operation)
            assert cost.compute == tuple(stretches)
            assert [(c.kind, c.group, c.payload_bytes) for c in cost.collectives] == [
                (op.kind, op.group, op.payload_bytes) for op in segment.collectives
            ]
            assert all(
                c.seconds == group_seconds(made, c.kind, c.group, c.payload_bytes) for c in cost.collectives
            )
    assert any(cost.collectives for cost in stage_cost(made, 0).forward)


def test_every_stage_is_priced_as_by_itself() -> None:
    """Together they only share the price list."""
    made = _plan(_cluster(per_node=4), TINY | {"vocab_size": 9}, pp=2, tp=2)
    for index in range(2):
        assert stage_costs(made, index) == tuple(stage_cost(made, stage, index) for stage in range(2))


def test_a_larger_slice_of_the_vocabulary_costs_more() -> None:
    """Nine words on two ranks: 5 and 4 rows of the head and of both tables' update."""
    made = _plan(_cluster(per_node=2), TINY | {"vocab_size": 9}, tp=2)
    more, less = stage_cost(made, 0, 0), stage_cost(made, 0, 1)
    assert more.forward[-1].compute_seconds > less.forward[-1].compute_seconds
    assert more.forward[1] == less.forward[1]
    rows = 2 * 4  # a row of four elements in both tables
    assert more.update_seconds - less.update_seconds == pytest.approx(rows * (20 + 24) / 5)


def test_a_segment_needs_a_stretch_more_than_collectives() -> None:
    """Else nothing says where its computing lies."""
    one = CollectiveCost(kind="all_reduce", group="tp", payload_bytes=4, seconds=1.0)
    with pytest.raises(PlanError, match="1 of them need 2 stretches, got 1"):
        SegmentCost(compute=(1.0,), collectives=(one,))
    with pytest.raises(PlanError, match="0 of them need 1 stretches, got 2"):
        SegmentCost(compute=(1.0, 2.0))


def test_totals_of_a_stage() -> None:
    """F, B and what each computes; where nothing is said of them, I takes what B takes and W nothing."""

    def costs(compute: list[float], *seconds: float) -> SegmentCost:
        return SegmentCost(
            compute=compute,
            collectives=[
                CollectiveCost(kind="all_reduce", group="tp", payload_bytes=4, seconds=each)
                for each in seconds
            ],
        )

    stage = StageCost(
        forward=(costs([0.25, 0.75], 2),), backward=(costs([1, 1, 1], 3, 1), costs([5])), update_seconds=9
    )
    assert (stage.forward_seconds, stage.backward_seconds) == (3, 12)
    assert (stage.compute_seconds(Kind.FORWARD), stage.compute_seconds(Kind.BACKWARD)) == (1, 8)
    assert [segment.communication_seconds for segment in stage.backward] == [4, 0]
    assert (stage.backward_input_seconds, stage.backward_weight_seconds) == (12, 0)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("config", [TINY, GPT2], ids=["llama", "gpt2"])
def test_the_halves_of_a_backward_take_what_it_takes(config: dict[str, Any], tp: int) -> None:
    """I and W, by segments: computing and communication of both together are those of B."""
    made = _plan(_cluster(per_node=tp), config, tp=tp)
    cost = stage_cost(made, 0)
    for whole, half, rest in zip(cost.backward, cost.backward_input, cost.backward_weight, strict=True):
        assert half.compute_seconds + rest.compute_seconds == pytest.approx(whole.compute_seconds)
        assert half.communication_seconds + rest.communication_seconds == pytest.approx(
            whole.communication_seconds
        )
    assert 0 < cost.backward_weight_seconds < cost.backward_seconds


def test_a_rank_of_several_stages_updates_all_of_them() -> None:
    """What the update of each stage takes adds up to that of the model, on one rank or on two."""
    config = TINY | {"num_hidden_layers": 4}
    whole = update_seconds(_plan(_cluster(), config), 0)
    alone = _plan(_cluster(), config, schedule="interleaved", virtual_stages=4)
    assert sum(update_seconds(alone, stage) for stage in range(4)) == pytest.approx(whole)
    pair = _plan(_cluster(per_node=2), config, pp=2, schedule="zb-v")
    assert sum(update_seconds(pair, stage) for stage in range(4)) == pytest.approx(whole)


def test_transfers_run_between_the_ranks_that_hold_neighbouring_stages() -> None:
    """Three ranks on nodes of two: going round, the last one sends to the first across the network."""
    chain = _plan(_cluster(nodes=2, per_node=2), TINY | {"num_hidden_layers": 8}, pp=4)
    loop = evolve(chain, schedule_name="interleaved", virtual_stages=2, stage_layers=(1,) * 8)
    assert send_seconds(loop, 16) == send_seconds(chain, 16) == pytest.approx(3 + 16)
    near = _plan(_cluster(per_node=2), TINY | {"num_hidden_layers": 4}, pp=2, schedule="zb-v")
    assert send_seconds(near, 16) == pytest.approx(1 + 4)


def _measured_cluster(per_node: int = 1, **changed: Any) -> ClusterSpec:
    """Measured costs of round numbers: each kind of work has a rate of its own."""
    measured = MeasuredCosts(
        precision="fp32",
        output=ProductCost(flops_per_second=2, half_m=3),
        input=ProductCost(flops_per_second=4, half_n=3),
        weight=ProductCost(flops_per_second=8, half_k=3),
        attention=ProductCost(flops_per_second=16, fixed_seconds=5),
        attention_backward=ProductCost(flops_per_second=32, fixed_seconds=7),
        kernel=KernelCost(cached_bytes_per_second=10, memory_bytes_per_second=5, cache_bytes=20),
        segment_seconds=0.25,
        update_element_seconds=2,
        update_tensor_seconds=3,
    )
    cluster = _cluster(per_node=per_node)
    return evolve(cluster, efficiency=evolve(cluster.efficiency, measured=measured, **changed))


@pytest.mark.parametrize(
    ("operation", "seconds"),
    [
        (Operation(name="q_proj", kind="matmul", flops=48, moved_bytes=9, shape=(3, 1, 1, 1)), 48 / 2 * 2),
        (Operation(name="q_proj input", kind="matmul", flops=48, shape=(1, 3, 1, 1)), 48 / 4 * 2),
        (
            Operation(
                name="q_proj weight", kind="matmul", flops=48, shape=(1, 1, 3, 1), reads=(Tensor("x", 4),)
            ),
            48 / 8 * 2,
        ),
        (Operation(name="attention", kind="attention", flops=48), 48 / 16 + 5),
        (Operation(name="attention backward", kind="attention", flops=64), 64 / 32 + 7),
        (Operation(name="k", kind="kernel", moved_bytes=30), 2 + 2),
    ],
)
def test_a_measured_machine_prices_by_kind_and_shape(operation: Operation, seconds: float) -> None:
    """Each by its own rate at its shape, and the kernel's fixed second; the scale of computing multiplies."""
    made = _plan(_measured_cluster())
    assert compute_seconds(made, operation) == pytest.approx(seconds + 1)
    slower = _plan(_measured_cluster(compute_scale=3))
    assert compute_seconds(slower, operation) == pytest.approx(3 * (seconds + 1))


def test_a_measured_segment_and_update() -> None:
    """A segment has its own quarter second beside its operations; 356 elements in 21 tensors are updated."""
    made = _plan(_measured_cluster())
    segment, cost = made.bodies(0).forward.segments[1], stage_cost(made, 0).forward[1]
    assert cost.compute_seconds == pytest.approx(
        0.25 + sum(compute_seconds(made, operation) for operation in segment.operations)
    )
    assert update_seconds(made, 0) == pytest.approx(2 * 356 + 3 * 21)


def test_scales_multiply_what_they_name() -> None:
    """Computing twice as slow, communication three times, whether measured or by the roofline."""
    for cluster in (_cluster(per_node=2), _measured_cluster(2)):
        plain = _plan(cluster, tp=2)
        scaled = evolve(cluster.efficiency, compute_scale=2, communication_scale=3)
        slow = _plan(evolve(cluster, efficiency=scaled), tp=2)
        before, after = stage_cost(plain, 0), stage_cost(slow, 0)
        assert [s.compute_seconds for s in after.backward] == pytest.approx(
            [2 * s.compute_seconds for s in before.backward]
        )
        assert [s.communication_seconds for s in after.backward] == pytest.approx(
            [3 * s.communication_seconds for s in before.backward]
        )
        assert after.update_seconds == pytest.approx(2 * before.update_seconds)
        pair = _plan(evolve(cluster, efficiency=scaled), pp=2)
        assert send_seconds(pair, 16) == pytest.approx(3 * send_seconds(_plan(cluster, pp=2), 16))


def test_what_is_spent_once_a_step_is_shared_by_a_ranks_stages() -> None:
    """Of two ranks with two stages each, all stages add half of it to their update."""
    cluster = _cluster(per_node=2)
    more = evolve(cluster, efficiency=evolve(cluster.efficiency, step_seconds=10))
    four = TINY | {"num_hidden_layers": 4}
    asked: dict[str, Any] = {"pp": 2, "virtual_stages": 2, "schedule": "interleaved"}
    before, after = _plan(cluster, four, **asked), _plan(more, four, **asked)
    for stage in range(4):
        assert update_seconds(after, stage) == pytest.approx(update_seconds(before, stage) + 5)


@pytest.mark.parametrize("config", [TINY, GPT2, MIXTRAL], ids=["llama", "gpt2", "mixtral"])
def test_every_product_has_its_role_and_its_shape(config: dict[str, Any]) -> None:
    """Forward makes outputs, backward gradients of inputs and weights; the shape accounts for the FLOPs."""
    made = _plan(_cluster(), config)
    for kind in (Kind.FORWARD, Kind.BACKWARD):
        roles = set()
        for segment in of_kind(made.bodies(0), kind).segments:
            for operation in segment.operations:
                if operation.kind == "matmul" and operation.name != "router":
                    m, n, k, batch = operation.shape
                    assert operation.flops == 2 * m * n * k * batch
                    roles.add(product_role(operation))
        assert roles == ({"output"} if kind is Kind.FORWARD else {"input", "weight"})


def test_a_small_all_reduce_over_many_nodes_climbs_trees() -> None:
    """Over 16 nodes of one rank each, 1 byte/s: four levels of 3 s up and down, where a ring has 30 steps."""
    made = _plan(_cluster(nodes=16), batch=16, dp=16)
    assert group_seconds(made, "all_reduce", "dp", 1) == pytest.approx(2 * (1 + 4 * 3))
    assert group_seconds(made, "all_reduce", "dp", 1600) == pytest.approx(30 * 3 + 2 * 15 / 16 * 1600)
