"""Theorems of the vectorised memory model: exact counts, monotone choices, a plan's own timeline."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from picotron.planner.cases import (
    ATTENTIONS,
    KERNEL_SETS,
    RECOMPUTES,
    SCHEDULE_NAMES,
    Cases,
    LayoutColumns,
    ModelColumns,
    SoftwareColumns,
    WorkColumns,
    columns,
)
from picotron.planner.catalogue import SCHEDULES, make_schedule
from picotron.planner.cluster import ClusterSpec
from picotron.planner.columns_of import cases_of_plan, machine_columns
from picotron.planner.estimate_memory import APART, CLASSES, bytes_at, estimate_bytes
from picotron.planner.in_flight import WHOLE_BACKWARD, in_flight
from picotron.planner.layout import even_ranges
from picotron.planner.memory import memory_timeline, static_bytes
from picotron.planner.model import ModelSpec
from picotron.planner.pipeline import peak_microbatches
from picotron.planner.plan import TrainingPlan, plan
from picotron.planner.software import software_columns, software_profile
from picotron.planner.stage_columns import rank_layers
from picotron.planner.topology import Coordinate, rank_of
from picotron.planner.workload import Workload
from property_tests.strategies import stages_a_rank

AT_MOST = ("v-half", "v-min")  # of which the formulas are those of the fullest rank
STEP = 1 + 1e-12  # what rounding may make of equal sums


@st.composite
def layouts(draw: st.DrawFn) -> dict[str, float]:
    """Any layout of up to 512 ranks."""
    name = draw(st.sampled_from(SCHEDULE_NAMES))
    dp, cp, tp = (2 ** draw(st.integers(0, most)) for most in (4, 1, 3))
    ep = draw(st.sampled_from([k for k in (1, 2, 4, 8) if dp * cp * tp % k == 0]))
    return {
        "dp": dp,
        "pp": 2 ** draw(st.integers(0, 3)),
        "cp": cp,
        "tp": tp,
        "ep": ep,
        "etp": draw(st.sampled_from([k for k in (1, 2) if dp * cp * tp // ep % k == 0])),
        "virtual_stages": draw(st.sampled_from(stages_a_rank(name, 3))),
        "schedule": SCHEDULE_NAMES.index(name),
        "micro_batch": draw(st.sampled_from([1, 2, 4])),
        "zero_stage": draw(st.integers(0, 3)),
        "shard": draw(st.sampled_from([k for k in (1, 2, 4, 8, 16, 32) if dp * cp % k == 0])),
        "sequence_parallel": draw(st.integers(0, 1)),
        "recompute": draw(st.integers(0, len(RECOMPUTES) - 1)),
        "recompute_layers": draw(st.integers(0, 8)) / 8,
        "offload": draw(st.integers(0, 4)) / 4,
        "ends": draw(st.integers(0, 1)),
        "order": 0,
    }


@st.composite
def decoders(draw: st.DrawFn) -> dict[str, float]:
    """A decoder of published proportions, with experts, latent attention, biases and tied tables or not."""
    heads, experts, latent = 2 ** draw(st.integers(3, 5)), draw(st.sampled_from([0, 8])), draw(st.booleans())
    hidden, layers = heads * 64, draw(st.integers(48, 96))
    dense_in_front = draw(st.integers(0, 3)) if experts else 0
    return {
        "hidden": hidden,
        "layers": layers,
        "heads": heads,
        "kv_heads": heads if latent else draw(st.sampled_from([1, 4, heads])),
        "head_dim": 96 if latent else 64,
        "value_dim": 64,
        "intermediate": 4 * hidden,
        "gated": draw(st.integers(0, 1)),
        "vocab": draw(st.integers(1000, 4000)),
        "tied": draw(st.integers(0, 1)),
        "learned_positions": draw(st.sampled_from([0, 1024])),
        "layer_norm": draw(st.integers(0, 1)),
        "biases": draw(st.integers(0, 1)),
        "head_norms": draw(st.integers(0, 1)),
        "query_rank": 128 * latent * draw(st.integers(0, 1)),
        "kv_rank": 64 * latent,
        "rope_dim": 32 * latent,
        "moe_layers": layers - dense_in_front if experts else 0,
        "experts": experts,
        "top_k": 2 if experts else 0,
        "expert_intermediate": hidden if experts else 0,
        "shared_intermediate": hidden * draw(st.integers(0, 1)) if experts else 0,
        "expert_latent": draw(st.sampled_from([1, 2])) if experts else 1,
        "windowed_layers": 0,
        "window": 0,
    }


@st.composite
def settings(draw: st.DrawFn) -> tuple[dict[str, float], Cases]:
    """A layout, and the case of it."""
    layout = draw(layouts())
    work = {
        "global_batch": layout["dp"] * layout["micro_batch"] * draw(st.integers(1, 40)),
        "seq_len": draw(st.sampled_from([512, 1024])),
        "compute_bytes": 2,
        "product_format": draw(st.sampled_from([3, 5])),
        "gradient_bytes": draw(st.sampled_from([2, 4])),
        "wire_bytes": 2,
        "main_bytes": 4,
        "moment_bytes": 8,
        "trained_head": 1,
    }
    software = software_columns(software_profile("plain"), "hopper")
    chosen = {
        "attention": draw(st.integers(0, len(ATTENTIONS) - 1)),
        "kernels": draw(st.integers(0, len(KERNEL_SETS) - 1)),
        "bucket_bytes": 1e6,
    }
    return layout, Cases(
        model=columns(ModelColumns, draw(decoders())),
        work=columns(WorkColumns, work),
        machine=machine_columns(ClusterSpec.preset("h100", nodes=1), "bf16"),
        software=attrs.evolve(software, **{name: np.asarray(float(v)) for name, v in chosen.items()}),
        layout=columns(LayoutColumns, layout),
    )


def laid_out(case: Cases, layout: dict[str, float], **changes: Any) -> Cases:
    """The same case with another layout; a change may be a sequence."""
    return attrs.evolve(case, layout=columns(LayoutColumns, layout | changes))


def falls(values: np.ndarray) -> bool:
    """Whether no value is more than the one before."""
    return bool(np.all(values[1:] <= values[:-1] * STEP))


@given(st.sampled_from(SCHEDULE_NAMES), st.integers(1, 7), st.integers(1, 24), st.data())
def test_in_flight_is_the_schedules_own_peak(name: str, p: int, m: int, data: st.DataObject) -> None:
    """On every rank of every schedule, but for V-Half and V-Min, where it is that of the fullest rank."""
    v = data.draw(st.sampled_from(stages_a_rank(name, 4)))
    schedule = make_schedule(name, p, m, v if SCHEDULES[name].virtual_stages == "any" else None)
    work = columns(WorkColumns, dict.fromkeys((f.name for f in attrs.fields(WorkColumns)), m))
    layout = dict.fromkeys((f.name for f in attrs.fields(LayoutColumns)), 1)
    made = laid_out(_ANY, layout, pp=p, virtual_stages=v, schedule=SCHEDULE_NAMES.index(name))
    held = in_flight(attrs.evolve(made, work=work), np.arange(p, dtype=np.float64))
    expected = [peak_microbatches(schedule, rank) for rank in range(p)]
    if name in AT_MOST:
        expected = [max(expected)] * p
    assert list(np.broadcast_to(held.whole + held.split, p)) == expected


_NOTHING = {
    part: columns(part, dict.fromkeys((f.name for f in attrs.fields(part)), 1))
    for part in (ModelColumns, WorkColumns, SoftwareColumns, LayoutColumns)
}
_ANY = Cases(
    model=_NOTHING[ModelColumns],
    work=_NOTHING[WorkColumns],
    machine=machine_columns(ClusterSpec.preset("h100", nodes=1), "bf16"),
    software=_NOTHING[SoftwareColumns],
    layout=_NOTHING[LayoutColumns],
)


@given(settings())
def test_classes_are_bytes_of_the_fullest_rank(drawn: tuple[dict[str, float], Cases]) -> None:
    """None is negative; they sum; no rank of the pipeline holds more than the one that is named."""
    layout, case = drawn
    found = estimate_bytes(case)
    assert set(found.classes) == set(CLASSES)
    assert all(np.isfinite(column).all() and (column >= 0).all() for column in found.classes.values())
    assert np.isclose(found.reserved_bytes, sum(found.classes.values()))
    assert found.reserved_bytes >= found.pool_bytes >= found.allocated_bytes

    def reserved(rank: float) -> float:
        return float(sum(bytes_at(case, np.float64(rank)).values()))

    every = [reserved(rank) for rank in range(int(layout["pp"]))]
    assert np.isclose(every[int(found.rank[0])], found.reserved_bytes[0])
    assert max(every) <= found.reserved_bytes[0] * STEP


@given(settings())
def test_every_layer_is_on_one_rank(drawn: tuple[dict[str, float], Cases]) -> None:
    """Dense and sparse ones, and one embedding and one head."""
    layout, case = drawn
    held = rank_layers(case.model, case.layout, np.arange(layout["pp"]))
    sparse = case.model.moe_layers
    assert (np.sum(held.dense + 0), np.sum(held.sparse + 0)) == (case.model.layers - sparse, sparse)
    assert np.sum(held.first + 0) == np.sum(held.last + 0) == 1


def most_allocated(made: Cases, layout: dict[str, float]) -> np.ndarray:
    """Of all pipeline ranks, for each case."""
    ranks = [bytes_at(made, np.full(len(made), float(rank))) for rank in range(int(layout["pp"]))]
    each = [sum(v for name, v in classes.items() if name not in APART) for classes in ranks]
    found: np.ndarray = np.max(np.broadcast_arrays(*each), axis=0)
    return found


@given(settings())
def test_more_sharding_is_never_more_bytes(drawn: tuple[dict[str, float], Cases]) -> None:
    """From ZeRO-0 to 3, where a rank has layers enough that a share is more than one in transfer."""
    layout, case = drawn
    assume(layout["shard"] > 1)
    layers = case.model.layers / layout["pp"]
    assume(layers >= 12 * np.maximum(1, layout["ep"] * layout["etp"] / layout["shard"]))
    assert falls(most_allocated(laid_out(case, layout, zero_stage=[0, 1, 2, 3]), layout))
    assume(layout["zero_stage"] != 3 or layout["dp"] * layout["cp"] == layout["shard"])
    wider = [k for k in (1, 2, 4, 8, 16, 32) if layout["dp"] * layout["cp"] % k == 0]
    assert falls(most_allocated(laid_out(case, layout, zero_stage=1, shard=wider), layout))


@given(settings())
def test_more_recompute_is_never_more_bytes(drawn: tuple[dict[str, float], Cases]) -> None:
    """In share of layers, fully or of the attention core; and what is offloaded is not more either."""
    layout, case = drawn
    shares = [eighth / 8 for eighth in range(9)]
    for mode in (1, 2):
        made = laid_out(case, layout, recompute=mode, recompute_layers=shares, offload=0)
        assert falls(most_allocated(made, layout))
    assert falls(most_allocated(laid_out(case, layout, offload=shares), layout))


@given(settings(), st.sampled_from(["tp", "cp"]))
def test_more_ranks_are_never_more_activations(drawn: tuple[dict[str, float], Cases], axis: str) -> None:
    """On one rank, as tp or cp cut a microbatch; and the parameters of it are not more."""
    layout, case = drawn
    assume(axis == "cp" or layout["etp"] == 1)
    degrees = [1, 2, 4, 8]
    made = laid_out(case, layout, **{axis: degrees, "recompute": 0, "offload": 0})
    classes = bytes_at(made, np.zeros(4))
    updates = classes["activations"] == 0  # the update is fuller there
    assert falls(classes["activations"][~updates])
    assert falls(classes["parameters"]) or axis == "cp" or layout["zero_stage"] == 3


@st.composite
def planned(draw: st.DrawFn) -> TrainingPlan:
    """A plan whose tensors are large beside its smallest ones, its layers cut as the columns say."""
    family = draw(st.sampled_from(["llama", "gpt2"]))
    pp, schedule = draw(st.integers(1, 4)), draw(st.sampled_from(SCHEDULE_NAMES))
    v = draw(st.sampled_from(stages_a_rank(schedule, 2)))
    layers = pp * v * draw(st.integers(1, 2))
    tp, micro_batch = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 4]))
    tied, vocab = draw(st.booleans()), draw(st.integers(100, 900))
    config: dict[str, Any] = {
        "model_type": family,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
    }
    if family == "gpt2":
        config |= {"n_embd": 128, "n_layer": layers, "n_head": 4, "n_inner": 512, "n_positions": 64}
        config |= {"layer_norm_epsilon": 1e-5, "activation_function": "gelu_new"}
    else:
        config |= {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": layers}
        config |= {"num_attention_heads": 8, "num_key_value_heads": draw(st.sampled_from([2, 8]))}
        config |= {"max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu"}
    made = plan(
        ModelSpec.from_hf(config),
        ClusterSpec.preset("cpu", nodes=1, devices_per_node=pp * tp),
        Workload(
            global_batch=micro_batch * draw(st.integers(1, 6)),
            seq_len=64,
            precision=draw(st.sampled_from(["bf16", "fp32"])),
            optimizer=draw(st.sampled_from(["adamw", "sgd"])),
        ),
        pp=pp,
        tp=tp,
        schedule=schedule,
        virtual_stages=v,
        micro_batch=micro_batch,
        sequence_parallel=tp > 1 and draw(st.booleans()),
    )
    even = tuple(stop - start for start, stop in even_ranges(layers, pp * v))
    return attrs.evolve(made, stage_layers=even, chosen=())


@given(planned())
def test_the_timeline_of_the_same_plan(made: TrainingPlan) -> None:
    """Weights and their state exactly; the fullest moment within what the pipeline has on its way.

    That is three tensors between stages where a backward is whole; where it is split, a fifth of all.
    The timeline is a GPU's, which adds 16-bit products to gradients in one kernel.
    """
    software = software_columns(software_profile("picotron"), "hopper")
    case = cases_of_plan(made, software)
    found = estimate_bytes(case)
    ranks = [Coordinate(pp=position) for position in range(made.topology.pp)]
    gpu = attrs.evolve(made.cluster, device=attrs.evolve(made.cluster.device, kind="cuda"))
    on_gpu = attrs.evolve(made, cluster=gpu)
    timelines = [memory_timeline(on_gpu, rank_of(made.topology, where)) for where in ranks]
    most = max(timeline.max_bytes for timeline in timelines)
    whole = made.schedule_name in WHOLE_BACKWARD
    apart = 3 * made.dims().local_bytes + 4000 if whole else most / 5
    assert abs(found.allocated_bytes[0] - most) <= apart
    for where in ranks:
        classes, standing = bytes_at(case, np.float64(where.pp)), static_bytes(made, where)
        assert classes["parameters"] == standing["parameters"]
        assert classes["gradients"] == standing["gradients"]
        counters = 4 * (made.workload.optimizer == "adamw")
        assert classes["main"] + classes["moments"] == standing["optimizer"] - counters
