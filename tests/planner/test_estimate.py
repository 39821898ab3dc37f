"""Seconds of a step and their causes, on cases small enough to check by hand."""

from itertools import pairwise, product

import numpy as np
import pytest
from attrs import evolve

from picotron.errors import PlanError
from picotron.planner.bubbles import bubble_seconds
from picotron.planner.cases import SCHEDULE_NAMES, Cases
from picotron.planner.catalogue import SCHEDULES, make_schedule
from picotron.planner.constants import default_constants
from picotron.planner.estimate import CAUSES, estimate_seconds
from picotron.planner.families import read
from picotron.planner.flops import backward_flops, forward_flops
from picotron.planner.parameter_counts import parameter_counts
from picotron.planner.pipeline_times import bubble_share, stage_layers
from picotron.planner.schedule_times import PipelineCosts, schedule_times
from tests.planner.estimated import IDEAL, case

F, B, W = (np.asarray(value) for value in (1.0, 2.0, 1.0))


def causes(**changes: object) -> dict[str, float]:
    estimate = estimate_seconds(case(**changes), IDEAL)  # type: ignore[arg-type]
    return {cause: float(value[0]) for cause, value in estimate.causes.items()}


def test_causes_sum_to_the_step() -> None:
    """Exactly, in the order of CAUSES."""
    estimate = estimate_seconds(case(profile="megatron-2025", dp=8, tp=4, pp=2, cp=2, zero_stage=1, shard=16))
    assert tuple(estimate.causes) == CAUSES
    assert estimate.step_seconds == sum(estimate.causes.values())


def test_one_perfect_device_takes_its_flops() -> None:
    """With every share 1, products take what ``flops`` counts less the attention core, over the peak."""
    model = read("llama-3.1-8b")
    sizes = {"batch": 64, "seq_len": 4096}
    core = 3 * 4 * 64 * 4096**2 * model.num_layers * model.num_heads * model.head_dim
    expected = (forward_flops(model, **sizes) + backward_flops(model, **sizes) - core) / 989e12
    assert causes(model="llama-3.1-8b")["matmul"] == pytest.approx(expected, rel=0.03)


def test_full_recompute_adds_a_forward() -> None:
    """The compute of every layer's forward once more, and nothing else on one device."""
    without, with_it = causes(), causes(recompute="full", recompute_layers=1)
    layer = estimate_seconds(case(), IDEAL).layers.layer.forward
    again = 64 * 16 * sum(float(layer[cause]) for cause in ("matmul", "attention", "elementwise"))
    assert with_it.pop("recompute") == pytest.approx(again)
    assert without.pop("recompute") == 0
    assert with_it == pytest.approx(without)


def test_selective_recompute_repeats_the_attention_core() -> None:
    """On half of the layers, half of its forward seconds."""
    half = causes(recompute="selective", recompute_layers=0.5)["recompute"]
    layer = estimate_seconds(case(), IDEAL).layers.layer.forward
    assert half == pytest.approx(64 * 16 * 0.5 * float(layer["attention"]))


def test_recompute_gathers_the_tensor_parallel_parts_again() -> None:
    """Two collectives forward and two backward become six."""
    without, with_it = (causes(tp=8, **extra) for extra in ({}, {"recompute": "full", "recompute_layers": 1}))
    ends = estimate_seconds(case(tp=8), IDEAL).layers
    outside = 64 * sum(
        float(part["tensor"]) for end in (ends.embedding, ends.head) for part in (end.forward, end.backward)
    )
    assert with_it["tensor"] - outside == pytest.approx(1.5 * (without["tensor"] - outside))


@pytest.mark.parametrize(
    ("schedule", "chunks", "idle"),
    [
        ("afab", 1, 3.0),  # F + I + W for each other stage, as unit times
        ("1f1b", 1, 3.0),
        ("interleaved", 2, 1.5),
        ("bfs", 4, 0.75),
        ("zb-h1", 1, 1.0),  # F + I - W
        ("zb-h2", 1, 1.0),  # the skew of one forward
        ("zb-v", 2, 0.5),  # of half a rank's forward
        ("interleaved-zb", 2, 0.5),
        ("dualpipe-v", 2, 1.0),
        ("v-half", 2, 2.5 / 3),  # 3p - 7 slots of half a rank's forward
        ("v-min", 2, 5.5 / 3),  # 4p - 5
    ],
)
def test_bubbles_of_equal_stages(schedule: str, chunks: int, idle: float) -> None:
    """Slots that a rank idles for each other rank, where F = I = W = 1 and there are microbatches enough."""
    cases = case(pp=4, schedule=SCHEDULE_NAMES.index(schedule), virtual_stages=chunks)
    assert bubble_share(cases, F, B, W, np.array(64.0)) * 3.0 == pytest.approx(idle)


@pytest.mark.parametrize("schedule", SCHEDULE_NAMES)
def test_bubbles_are_those_of_the_schedules_themselves(schedule: str) -> None:
    """Exactly, with few microbatches and with many, where F, I and W differ and I is the longest."""
    for p, v in product((2, 3, 4, 5, 6, 7, 9), (2, 3)):
        chunks = v if SCHEDULES[schedule].virtual_stages == "any" else SCHEDULES[schedule].virtual_stages
        for m in {1, 2, p // 2 + 1, p // 2 + 2, p, p + 1, 2 * p, 3 * p + 1}:
            made = make_schedule(schedule, p, m, chunks)
            for forward, inputs, weight in ((1.0, 1.0, 1.0), (1.0, 1.1, 0.7), (1.0, 2.1, 0.8)):
                costs = PipelineCosts(
                    forward_seconds=(forward / chunks,) * made.num_stages,
                    input_seconds=(inputs / chunks,) * made.num_stages,
                    weight_seconds=(weight / chunks,) * made.num_stages,
                )
                makespan = schedule_times(made, costs).makespan_seconds
                sizes = (np.asarray(float(x)) for x in (p, chunks, m, forward, inputs, weight))
                idle = float(bubble_seconds(schedule, *sizes))
                assert m * (forward + inputs + weight) + idle == pytest.approx(makespan), (p, chunks, m)


@pytest.mark.parametrize("schedule", SCHEDULE_NAMES)
def test_a_longer_backward_shortens_no_bubble(schedule: str) -> None:
    """Which the bounds of a search rest on: recomputing lengthens I, or leaves it."""
    p, m, w = np.arange(2.0, 70)[:, None, None], np.arange(1.0, 200)[:, None], np.array([0.2, 1.0])
    v = np.asarray(3.0 if SCHEDULES[schedule].virtual_stages == "any" else 2.0)
    idle = [bubble_seconds(schedule, p, v, m, F, np.asarray(i), w) for i in (0.6, 1.0, 1.5, 2.5)]
    assert (idle[0] >= 0).all()
    for shorter, longer in pairwise(idle):
        assert (shorter <= longer + 1e-9).all()


def test_the_slowest_stage_sets_the_pace() -> None:
    """Of two stages, the one with the head works m times; the bubble is the other one's F + B."""
    split, whole = causes(pp=2, schedule="1f1b"), causes()
    busy = ("matmul", "attention", "elementwise")
    work = sum(whole[cause] for cause in busy)
    slowest = sum(split[cause] for cause in busy)
    assert slowest > work / 2
    assert split["pipeline_bubble"] == pytest.approx((work - slowest) / 64)


def test_ends_may_count_as_layers() -> None:
    """126 layers and two ends over 8 stages of 8 chunks: 16 for most, 15 for the first and the last."""
    held = stage_layers(case(model="llama-3.1-405b", pp=8, virtual_stages=8, ends=1))
    assert (held.first, held.middle, held.last) == (15, 16, 15)
    assert stage_layers(case(model="llama-3.1-405b", pp=9, virtual_stages=7)).middle == 14


def test_unoverlapped_gradients_take_a_ring() -> None:
    """Two halves of an all-reduce over 8 devices of a node, of 4 bytes for every parameter."""
    counts = parameter_counts(case())
    numel = 16 * float(counts.layer) + float(counts.embedding)
    data = causes(dp=8, global_batch=64)["data"]
    assert data == pytest.approx(2 * 7 / 8 * 4 * numel / 450e9 + 2 * 7 * 1.9e-6, rel=1e-6)


def test_overlapped_gradients_hide_under_a_backward() -> None:
    """An H100 multiplies longer than NVLink reduces: nothing is left but what cannot be hidden."""
    assert causes(dp=8, profile="torchtitan", global_batch=64)["data"] < 1e-3 * causes(dp=8)["data"]


def test_sharded_parameters_are_gathered_in_every_pass() -> None:
    """Without overlap, each of 4 microbatches gathers twice (2 bytes) and reduces once (4 bytes)."""
    counts = parameter_counts(case())
    numel = 16 * float(counts.layer) + float(counts.embedding)
    wire = 7 / 8 * numel * (4 * (2 + 2 + 4) + 2 / 16) / 450e9
    found = causes(dp=8, zero_stage=3, shard=8, global_batch=32, virtual_stages=1)["data"]
    assert found == pytest.approx(wire, rel=0.05)  # and a latency for every bucket


def test_counts_of_parameters_are_the_models_own() -> None:
    """Within a thousandth (norms, biases): dense, gated or not, tied or not, latent attention and experts."""
    for name in ("gpt3-175b", "llama-3.1-70b", "qwen3-30b-a3b", "deepseek-v3", "smollm-1.7b"):
        counts, model = parameter_counts(case(model=name)), read(name)
        numel = model.num_layers * (counts.layer + counts.layer_experts) + counts.embedding + counts.head
        assert float(numel) == pytest.approx(model.num_parameters, rel=2e-3), name


def test_narrow_products_gain_less_than_their_peak() -> None:
    """FP8 doubles the layers' products; attention, head and casts stay."""
    wide, narrow = (causes(model="llama-3.1-8b", product=name, cluster="h100") for name in ("bf16", "fp8"))
    assert wide["matmul"] / 2 < narrow["matmul"] < 0.6 * wide["matmul"]
    assert narrow["attention"] == wide["attention"] and narrow["elementwise"] > wide["elementwise"]


def test_experts_that_leave_the_node_cost_the_network() -> None:
    """16 ranks of experts over two nodes exchange slower than 8 in one; dedup halves it, or better."""
    sizes = {"model": "qwen3-30b-a3b", "dp": 16}
    inside, outside = (causes(ep=ep, **sizes)["expert"] for ep in (8, 16))
    fewer = causes(ep=16, profile="megatron-2025", **sizes)["expert"]
    assert 0 < inside < outside / 3 and fewer < outside / 2
    assert causes(dp=16)["expert"] == 0


def test_a_token_is_sent_to_few_ranks_where_its_experts_are_neighbours() -> None:
    """Of 16 experts a rank, 8 neighbours are on one of 8 ranks; even choices on 8 (1 - (7/8)^8) = 5.25."""
    sizes = case(model="qwen3-30b-a3b", dp=8, ep=8)

    def exchange(**flags: float) -> float:
        software = evolve(sizes.software, **{name: np.asarray(value) for name, value in flags.items()})
        return float(estimate_seconds(evolve(sizes, software=software), IDEAL).causes["expert"][0])

    every, once = exchange(), exchange(expert_dedup=1.0)
    assert once / every == pytest.approx((1 - (7 / 8) ** 8), rel=0.02)  # all but latencies: 5.25 of 8
    assert exchange(expert_dedup=1.0, expert_neighbours=1.0) / every == pytest.approx(1 / 8, rel=0.1)
    assert exchange(expert_neighbours=1.0) == every


def test_experts_without_a_gate_multiply_two_thirds() -> None:
    """Two matrices instead of three; what is not experts stays."""
    gated = case(model="qwen3-30b-a3b", dp=8, ep=8)
    models = [evolve(gated.model, gated=np.asarray(flag)) for flag in (1.0, 0.0)]
    three, two = (estimate_seconds(evolve(gated, model=model), IDEAL).layers.experts for model in models)
    router = 2 * 4096 * 2048 * 128 / 989e12
    assert (two.forward["matmul"] - router) / (three.forward["matmul"] - router) == pytest.approx(
        2 / 3, rel=0.02
    )


def test_experts_of_a_latent_width_multiply_as_many_weights_of_narrower_rows() -> None:
    """Four times as many, a quarter as wide: the same products and bytes sent, a longer activation."""
    wide = case(model="qwen3-30b-a3b", dp=8, ep=8)
    thin = evolve(wide, model=evolve(wide.model, expert_latent=np.asarray(4.0)))
    before, after = (estimate_seconds(each, IDEAL).layers.experts.forward for each in (wide, thin))
    assert after["matmul"] == pytest.approx(float(before["matmul"]), rel=0.15)
    assert after["expert"] == pytest.approx(float(before["expert"]), rel=1e-6)
    assert after["elementwise"] > before["elementwise"]


@pytest.mark.parametrize(
    ("part", "name"), [("machine", "inter_bytes_per_second"), ("layout", "tp"), ("work", "seq_len")]
)
def test_impossible_numbers_are_refused_by_name(part: str, name: str) -> None:
    """Zero bandwidth, no ranks and no tokens are errors, not infinities."""
    cases = case()
    for value in (0.0, -1.0, np.nan, np.inf):
        bad = evolve(cases, **{part: evolve(getattr(cases, part), **{name: np.asarray(value)})})
        with pytest.raises(PlanError, match=f"{name} must be positive and finite"):
            estimate_seconds(bad)


def test_graphs_take_launches_away() -> None:
    """A tiny microbatch waits for the host, except under graphs."""
    slow, fast = (
        estimate_seconds(case(profile=name, tp=8, seq_len=256)).causes["launch"][0]
        for name in ("plain", "oneflow-2021")
    )
    assert slow > 5 * fast > 0


def test_bookkeeping_of_checkpoints_is_waited_for() -> None:
    """Each recomputed layer of 64 microbatches waits as long, however much it computes."""
    for seq_len, share in ((512, 1.0), (4096, 1.0), (4096, 0.5)):
        cases = case(seq_len=seq_len, recompute="full", recompute_layers=share)
        waited, none = (float(estimate_seconds(_with(cases, flag)).step_seconds[0]) for flag in (1.0, 0.0))
        each = float(default_constants()["checkpoint_seconds"])
        assert waited - none == pytest.approx(64 * 16 * share * each)


def _with(cases: Cases, waits: float) -> Cases:
    return evolve(cases, software=evolve(cases.software, checkpoint_waits=np.asarray(waits)))


def test_rings_of_ranks_that_are_not_neighbours_reach_less_of_far_adapters() -> None:
    """Of 8 ranks a node all or one make a ring as ever; every second does not, where nothing is handed on."""

    def lost(tp: int) -> float:
        cases = case(dp=64 // tp, tp=tp, global_batch=64)
        far = evolve(cases, software=evolve(cases.software, far_adapters=np.ones(())))
        near, slow = (estimate_seconds(each).causes["data"][0] for each in (cases, far))
        return float(slow / near)

    assert lost(1) == lost(8) == 1
    assert lost(2) > 1.5 and lost(4) > 1.5


def test_graphs_of_attention_leave_the_experts_launches() -> None:
    """Graphs take the launches outside of experts; the experts' go with graphs of their own."""
    sizes = case(model="qwen3-30b-a3b", dp=8, ep=8, seq_len=256)

    def launches(**flags: float) -> float:
        software = evolve(sizes.software, **{name: np.asarray(value) for name, value in flags.items()})
        return float(estimate_seconds(evolve(sizes, software=software)).causes["launch"][0])

    none, partly, wholly = launches(), launches(graphs=1.0), launches(graphs=1.0, expert_graphs=1.0)
    assert none > partly > 5 * wholly > 0
    assert launches(expert_kernels=1.0) < none  # one launch for all experts
