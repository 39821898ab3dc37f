"""Examples of the vectorised memory model to be checked by hand, and the published runs it must meet."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
import pytest

from picotron.planner.body import Body, segment_memory
from picotron.planner.cases import (
    ATTENTIONS,
    KERNEL_SETS,
    LOSSES,
    PRODUCT_FORMATS,
    RECOMPUTES,
    SCHEDULE_NAMES,
    Cases,
    LayoutColumns,
    ModelColumns,
    WorkColumns,
    columns,
)
from picotron.planner.cluster import ClusterSpec
from picotron.planner.columns_of import cases_of_plan, machine_columns
from picotron.planner.estimate_memory import APART, CLASSES, bytes_at, estimate_bytes
from picotron.planner.held_weights import layer_weights, widths
from picotron.planner.in_flight import in_flight
from picotron.planner.model import ModelSpec
from picotron.planner.moving_bytes import blocks_of
from picotron.planner.plan import plan
from picotron.planner.rank_bytes import bytes_by_rank
from picotron.planner.saved_tensors import saved_tensors, tokens, total
from picotron.planner.software import software_columns, software_profile
from picotron.planner.stage_columns import rank_layers
from picotron.planner.workload import Workload

NO_MODEL = dict.fromkeys((f.name for f in attrs.fields(ModelColumns)), 0)
LLAMA_12 = NO_MODEL | {  # Llama-3-70B with 12 of its layers
    "hidden": 8192,
    "layers": 12,
    "heads": 64,
    "kv_heads": 8,
    "head_dim": 128,
    "value_dim": 128,
    "intermediate": 28672,
    "gated": 1,
    "vocab": 128256,
}
DEEPSEEK_4 = NO_MODEL | {  # DeepSeek-V2 with 4 of its layers, the first of them dense
    "hidden": 5120,
    "layers": 4,
    "heads": 128,
    "kv_heads": 128,
    "head_dim": 192,
    "value_dim": 128,
    "intermediate": 12288,
    "gated": 1,
    "vocab": 102400,
    "query_rank": 1536,
    "kv_rank": 512,
    "rope_dim": 64,
    "moe_layers": 3,
    "experts": 160,
    "top_k": 6,
    "expert_intermediate": 1536,
    "shared_intermediate": 3072,
}
WORK = {
    "global_batch": 64,
    "seq_len": 4096,
    "compute_bytes": 2,
    "product_format": PRODUCT_FORMATS.index("bf16"),
    "gradient_bytes": 4,
    "wire_bytes": 4,
    "main_bytes": 4,
    "moment_bytes": 8,
    "trained_head": 1,
}
LAYOUT = dict.fromkeys((f.name for f in attrs.fields(LayoutColumns)), 1) | {
    "schedule": SCHEDULE_NAMES.index("1f1b"),
    "recompute": 0,
    "recompute_layers": 0,
    "offload": 0,
    "ends": 0,
    "order": 0,
}


def cases(model: dict[str, Any], work: dict[str, Any] | None = None, **layout: Any) -> Cases:
    """Cases on B200 under the profile of Megatron without overlap, sharded over all data-parallel ranks."""
    whole = LAYOUT | {"shard": layout.get("dp", 1)} | layout
    return Cases(
        model=columns(ModelColumns, model),
        work=columns(WorkColumns, WORK | (work or {})),
        machine=machine_columns(ClusterSpec.preset("b200", nodes=1), "bf16"),
        software=software_columns(software_profile("plain"), "blackwell"),
        layout=columns(LayoutColumns, whole),
    )


def software(made: Cases, **changes: Any) -> Cases:
    """The cases with other software."""
    changed = {name: np.asarray(float(value)) for name, value in changes.items()}
    return attrs.evolve(made, software=attrs.evolve(made.software, **changed))


@pytest.mark.parametrize(
    ("model", "layout", "gib"),
    [
        (LLAMA_12, {"pp": 2, "dp": 4}, 66.55),
        (LLAMA_12, {"tp": 2, "dp": 4}, 60.68),
        (LLAMA_12, {"tp": 4, "dp": 2}, 39.07),
        (LLAMA_12, {"tp": 8}, 28.29),
        (DEEPSEEK_4, {"dp": 8, "ep": 8}, 45.63),
        (DEEPSEEK_4, {"dp": 4, "ep": 4, "pp": 2}, 44.70),
    ],
)
def test_published_runs(model: dict[str, Any], layout: dict[str, int], gib: float) -> None:
    """Max allocated of Megatron-LM on B200 (SimuMax's validation), within 1 %, no constant fitted."""
    found = estimate_bytes(cases(model, **layout)).allocated_bytes / 2**30
    assert found == pytest.approx(gib, rel=0.01)


def test_weights_of_a_llama_layer() -> None:
    """Query and output h^2 each, keys and values h^2 / 8 each, three MLP matrices, two norms."""
    made = cases(LLAMA_12)
    layer = layer_weights(made.model, made.layout, widths(made.model, made.layout))
    h = 8192
    assert layer.attention == 2 * h * h + 2 * h * 1024 + h
    assert layer.dense == 3 * h * 28672 + h
    cut = cases(LLAMA_12, tp=16)  # each of 8 key-value heads is on two ranks
    layer = layer_weights(cut.model, cut.layout, widths(cut.model, cut.layout))
    assert layer.attention == 2 * h * h / 16 + 2 * h * 128 + h


def test_standing_bytes_under_zero() -> None:
    """18 bytes a parameter; sharded over 4 ranks 9, 6 and 4.5 from stage 1, 2 and 3 on."""
    made = cases(LLAMA_12, dp=4, zero_stage=[0, 1, 2, 3])
    classes = estimate_bytes(made).classes
    numel = classes["parameters"][0] / 2
    standing = sum(classes[name] for name in ("parameters", "gradients", "main", "moments"))
    assert standing / numel == pytest.approx([18, 9, 6, 4.5])


def test_experts_are_sharded_over_their_copies() -> None:
    """With ep 4 of 8 ranks an expert has two copies, so that its state is halved; all else is cut in 8."""
    made = cases(DEEPSEEK_4, dp=8, ep=4)
    classes = estimate_bytes(made).classes
    layer = layer_weights(made.model, made.layout, widths(made.model, made.layout))
    experts = 3 * layer.experts
    common = classes["parameters"] / 2 - experts
    assert classes["main"] == pytest.approx(4 * (experts / 2 + common / 8))
    cut = estimate_bytes(cases(DEEPSEEK_4, tp=2, dp=4, ep=4)).classes  # two copies on four times two ranks
    assert cut["main"] == pytest.approx(4 * (experts / 2 + (cut["parameters"] / 2 - experts) / 4))


def test_half_a_shard_group_is_hybrid() -> None:
    """HSDP over 4 of 8 ranks keeps a quarter, not an eighth."""
    whole, half = (estimate_bytes(cases(LLAMA_12, dp=8, shard=shard)).classes["main"] for shard in (8, 4))
    assert half == 2 * whole


def test_saved_tensors_of_attention() -> None:
    """Unfused with dropout 5 a s^2 b bytes (Korthikanti et al. 2022, eq. 1); flash 4 a row and head."""
    gpt = LLAMA_12 | {"kv_heads": 64, "gated": 0, "layer_norm": 1, "biases": 1, "learned_positions": 4096}
    made = software(cases(gpt), attention=ATTENTIONS.index("fused-softmax"))
    rows, width = 64 * 4096, 4096 * 8192
    saved = saved_tensors(made, tokens(made), widths(made.model, made.layout))
    assert total(saved.core) == 5 * rows * 4096
    assert total(saved.attention) == 11 * width + 2 * width + 8 * 4096
    flash = cases(gpt)
    saved = saved_tensors(flash, tokens(flash), widths(flash.model, flash.layout))
    assert total(saved.core) == 4 * rows


def test_narrow_products_save_narrow_inputs() -> None:
    """Under fp8 the normed input and the MLP's product take a byte an element; what is wider stays so."""
    wide, narrow = (
        cases(LLAMA_12, {"product_format": PRODUCT_FORMATS.index(form)}) for form in ("bf16", "fp8")
    )
    one, other = (saved_tensors(c, tokens(c), widths(c.model, c.layout)).dense for c in (wide, narrow))
    assert {name for name in one if one[name] != other[name]} == {"normed input", "product"}
    assert one["product"] == 2 * other["product"]


def test_layers_of_ranks() -> None:
    """Longer stages first; with ends the embedding and the head count as layers; a V holds both ends."""
    made = cases(LLAMA_12 | {"layers": 126}, pp=16, ends=[0, 1])
    held = [rank_layers(made.model, made.layout, np.float64(rank)).all for rank in range(16)]
    assert [tuple(column) for column in held] == [(8, 7), *[(8, 8)] * 13, (7, 8), (7, 7)]
    turned = cases(LLAMA_12 | {"layers": 9}, pp=2, virtual_stages=2, schedule=SCHEDULE_NAMES.index("zb-v"))
    first, second = (rank_layers(turned.model, turned.layout, np.float64(rank)) for rank in (0, 1))
    assert (first.all, first.first, first.last) == (5, 1, 1)
    assert (second.all, second.first, second.last) == (4, 0, 0)


def test_dense_layers_are_in_front() -> None:
    """Of 61 layers in 31 stages, one each in 30 of them; three dense ones fill one and a half."""
    model = DEEPSEEK_4 | {"layers": 61, "moe_layers": 58}
    made = cases(model, pp=31)
    held = [rank_layers(made.model, made.layout, np.float64(rank)) for rank in range(31)]
    assert [int(h.dense) for h in held] == [2, 1, *[0] * 29]
    assert sum(int(h.sparse) for h in held) == 58
    assert estimate_bytes(made).rank == 2  # the first with experts alone
    many = cases(DEEPSEEK_4 | {"layers": 9, "moe_layers": 3}, pp=4)
    assert [float(rank_layers(many.model, many.layout, np.float64(r)).dense) for r in range(4)] == [
        3,
        2,
        1,
        0,
    ]


def test_tied_tables() -> None:
    """One table where both ends share a rank; a copy on the last rank where they do not."""
    together, apart = (
        [bytes_at(cases(LLAMA_12 | {"tied": tied}, pp=pp), np.float64(pp - 1)) for tied in (0, 1)]
        for pp in (1, 2)
    )
    assert together[0]["parameters"] - together[1]["parameters"] == 2 * 8192 * 128256
    assert apart[0]["parameters"] == apart[1]["parameters"]


def test_in_flight_of_1f1b_with_few_microbatches() -> None:
    """min(m, p - s)."""
    made = cases(LLAMA_12, {"global_batch": 3}, pp=4)
    assert [float(in_flight(made, np.float64(rank)).whole) for rank in range(4)] == [3, 3, 2, 1]


def test_in_flight_of_blocks_of_several_axes() -> None:
    """Schedules, stages and ranks, each along an axis of its own, are counted one by one."""
    made = cases(LLAMA_12, {"global_batch": 16}, pp=4)
    schedules = np.array([SCHEDULE_NAMES.index(name) for name in ("interleaved", "zb-h1", "zb-v")])
    stages, ranks = np.array([1.0, 2.0, 3.0]), np.arange(4.0)

    def held(schedule: Any, stage: Any, rank: Any) -> list[Any]:
        layout = attrs.evolve(made.layout, schedule=schedule, virtual_stages=stage)
        found = in_flight(attrs.evolve(made, layout=layout), rank)
        return [found.whole, found.split, found.head]

    block = held(schedules[:, None, None], stages[None, :, None], ranks[None, None])
    for index in np.ndindex(3, 3, 4):
        one = held(*(values[[at]] for values, at in zip((schedules, stages, ranks), index, strict=True)))
        assert [np.broadcast_to(column, (3, 3, 4))[index] for column in block] == one


def test_worst_case_of_experts() -> None:
    """A rank whose experts see twice the mean holds twice the copies; no more than all ranks' copies."""
    made = cases(DEEPSEEK_4, dp=8, ep=8)
    once, twice, most = (tokens(made, imbalance=share).rows for share in (1, 2, 100))
    assert (twice, most) == (2 * once, 8 * once)
    assert estimate_bytes(made, imbalance=2).allocated_bytes > estimate_bytes(made).allocated_bytes


def test_the_update_can_be_the_fullest_moment() -> None:
    """Narrow gradients are copied at the width of the main weights: 4 bytes a parameter, no activations."""
    made = cases(LLAMA_12, {"gradient_bytes": 2, "seq_len": 128})
    classes = estimate_bytes(made).classes
    assert classes["activations"] == 0
    assert classes["workspace"] > 2 * classes["parameters"]


def test_an_optimizer_on_the_host_leaves_the_device() -> None:
    """Neither its state nor, from ZeRO-2 on, the gradients stay."""
    made = software(cases(LLAMA_12, dp=8, zero_stage=3), optimizer_on_host=1)
    classes = estimate_bytes(made).classes
    assert classes["main"] == classes["moments"] == classes["gradients"] == 0


def test_full_recompute_keeps_inputs_alone() -> None:
    """2 s b h bytes a layer, with one layer's tensors at work."""
    made = cases(LLAMA_12, recompute=RECOMPUTES.index("full"), recompute_layers=1)
    classes = estimate_bytes(made).classes
    assert classes["activations"] == 12 * 2 * 4096 * 8192 + 8 * 4096


def test_a_search_is_as_many_estimates() -> None:
    """Columns of any length give what each case gives alone."""
    several = estimate_bytes(cases(LLAMA_12, pp=[1, 2, 4], tp=[8, 2, 1]))
    for index, (pp, tp) in enumerate([(1, 8), (2, 2), (4, 1)]):
        alone = estimate_bytes(cases(LLAMA_12, pp=pp, tp=tp))
        assert several.rank[index] == alone.rank[0]
        for name in CLASSES:
            assert several.classes[name][index] == alone.classes[name][0]


def test_fully_sharded_parameters_are_the_main_weights() -> None:
    """FSDP2 keeps 4 + 4 + 8 bytes a parameter of its share, and gathers layers in the narrow format."""
    made = software(cases(LLAMA_12, dp=8, zero_stage=3), kernels=KERNEL_SETS.index("compiled"))
    classes = estimate_bytes(made).classes
    assert classes["parameters"] == 0
    assert classes["main"] == classes["gradients"] == classes["moments"] / 2
    assert classes["communication"] > 2 * 2 * 855_000_000


def test_sequence_parallelism_cuts_what_tensor_parallelism_does_not() -> None:
    """Input, normed input and row statistics are an eighth on each of 8 ranks too; without it whole."""
    tokens_of, wide = 4096, 2 * 4096 * (8192 + 2 * 1024 + 8192) / 8
    for cut, share in ((1, 8), (0, 1)):
        made = cases(LLAMA_12, tp=8, sequence_parallel=cut)
        saved = saved_tensors(made, tokens(made), widths(made.model, made.layout))
        assert total(saved.attention) == wide + tokens_of * (2 * 2 * 8192 + 4) / share


def test_more_cases_than_fit_a_block() -> None:
    """A search of 20,000 is cut into blocks, and gives what its cases give."""
    few, many = cases(LLAMA_12, pp=[1, 2, 4, 3]), cases(LLAMA_12, pp=[1, 2, 4, 3] * 5000)
    expected = np.tile(estimate_bytes(few).allocated_bytes, 5000)
    assert np.array_equal(estimate_bytes(many).allocated_bytes, expected)


def test_a_loss_by_chunks_keeps_no_logits() -> None:
    """Chunks save 4096 tokens by an eighth of 128,256 words in 16 bits; a copy in fp32 adds to them."""

    def of(loss: str) -> float:
        made = software(cases(LLAMA_12, tp=8), loss=LOSSES.index(loss))
        return float(estimate_bytes(made).classes["logits"].max())

    assert of("in place") - of("chunked") == 4096 * 128256 // 8 * 2
    assert of("copy") > of("in place")


@pytest.mark.parametrize(
    ("model", "choices"),
    [
        ("llama-3.1-8b", {"schedule": "zb-v", "offload": True}),  # I keeps for W what no offload moves
        ("llama-3.1-8b", {"schedule": "interleaved-zb", "virtual_stages": 2, "offload": True}),
        ("llama-3.1-8b", {"schedule": "zb-v", "recompute": "full"}),  # fullest with most between I and W
        ("llama-3.1-8b", {"schedule": "v-half", "recompute": "full"}),
        ("llama-3.1-8b", {"schedule": "afab", "offload": True}),  # logits of all microbatches
        ("llama-3.1-8b", {"zero_stage": 2}),  # two buckets of the table's size
        ("llama-3.1-8b", {"recompute": (*["none", "full"] * 4,), "offload": (*[False, True] * 4,)}),
        ("mixtral-8x7b", {"schedule": "zb-h1", "offload": True}),
        ("mixtral-8x7b", {"zero_stage": 3}),  # experts' gradients in buckets smaller than a layer
    ],
)
def test_a_plan_and_its_columns_hold_the_same(model: str, choices: dict[str, Any]) -> None:
    """Eight layers on four stages of two ranks: within 3 % of the exact timelines, framework aside."""
    spec = attrs.evolve(ModelSpec.from_hf(model), num_layers=8)
    work = Workload(global_batch=16, seq_len=4096)
    made = plan(spec, ClusterSpec.parse("h100:1x8"), work, pp=4, **choices)
    made = attrs.evolve(made, stage_layers=(8 // made.num_stages,) * made.num_stages, chosen=())
    held = max(bytes_by_rank(made), key=lambda own: own.reserved_bytes)
    found = float(np.max(estimate_bytes(cases_of_plan(made)).reserved_bytes))
    assert found - held.framework_bytes == pytest.approx(held.reserved_bytes - held.framework_bytes, rel=0.03)


@pytest.mark.parametrize("model", ["llama-3.1-8b", "gpt2", "mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3"])
@pytest.mark.parametrize(("tp", "cut"), [(1, False), (2, False), (2, True)])
def test_what_a_layer_leaves(model: str, tp: int, cut: bool) -> None:
    """After F, and between I and W, the bytes of a plan's own bodies, in every kind of layer."""
    spec, work = ModelSpec.from_hf(model), Workload(global_batch=2, seq_len=1024)
    machine = ClusterSpec.parse(f"h100:1x{3 * tp}")
    made = plan(spec, machine, work, pp=3, tp=tp, sequence_parallel=cut, schedule="zb-h1")
    bodies, blocks = made.bodies(1), blocks_of(cases_of_plan(made), imbalance=1.0)

    def left(body: Body) -> float:
        return float(sum(segment_memory(segment)[0].sum() for segment in body.segments))

    layer, layers = blocks.sparse if spec.experts else blocks.dense, made.stage_layers[1]
    forward = left(bodies.forward)
    assert float(layer.whole) * layers == forward
    assert float(layer.for_weights) * layers == forward + left(bodies.backward_input)


def test_the_fullest_rank_is_the_one_that_reserves_most() -> None:
    """Where the first of four ranks has most tensors, and the last more that comes and goes."""
    made = plan(
        ModelSpec.from_hf("llama-3.1-8b"),
        ClusterSpec.parse("h100:1x8"),
        Workload(global_batch=64, seq_len=512),
        pp=4,
        dp=2,
        schedule="zb-h1",
        micro_batch=4,
    )
    case = cases_of_plan(made)
    ranks = [bytes_at(case, np.float64(rank)) for rank in range(4)]
    reserved = [float(np.ravel(sum(each.values()))[0]) for each in ranks]
    tensors = [float(np.ravel(sum(each[name] for name in CLASSES if name not in APART))[0]) for each in ranks]
    assert tensors.index(max(tensors)) == 0
    assert int(np.ravel(estimate_bytes(case).rank)[0]) == reserved.index(max(reserved)) == 3
