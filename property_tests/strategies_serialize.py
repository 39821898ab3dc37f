"""Strategies for whole plans, built from valid parts, and for small changes to their JSON."""

from __future__ import annotations

from typing import Any

from attrs import evolve
from hypothesis import strategies as st

from picotron.errors import PlanError
from picotron.planner.catalogue import make_schedule
from picotron.planner.cluster import ClusterSpec
from picotron.planner.model import ModelSpec, segments
from picotron.planner.pipeline import Schedule
from picotron.planner.plan import TrainingPlan, plan
from picotron.planner.plan_rules import FOREIGN
from picotron.planner.recompute import flags_by_layer, modes_by_layer
from picotron.planner.sharding import PARAMETERS
from picotron.planner.stage import segment_name
from picotron.planner.tensor import check_tensor_parallel
from picotron.planner.topology import AXES
from picotron.planner.workload import FORMATS, Workload
from property_tests.strategies import plannable, savings
from property_tests.strategies_cluster import clusters, names
from property_tests.strategies_model import models

shares = st.sampled_from([0, 0.0, -0.0, 0.5, 1, 1.0])
decays = st.sampled_from([0, 0.0, -0.0, 0.5, 0.95])


def _divides(model: ModelSpec, tp: int) -> bool:
    try:
        check_tensor_parallel(model, tp=tp)
    except PlanError:
        return False
    return tp <= model.max_positions


def _able(cluster: ClusterSpec) -> ClusterSpec:
    """The cluster, with a device that can multiply in fp32 if it could in none of a plan's precisions."""
    peaks = cluster.device.peak_flops_per_second
    if any(getattr(peaks, form.product) for form in FORMATS.values()):
        return cluster
    return evolve(cluster, device=evolve(cluster.device, peak_flops_per_second=evolve(peaks, fp32=1e12)))


@st.composite
def plans(draw: st.DrawFn, max_degree: int = 3) -> TrainingPlan:
    """A small plan of any family on any cluster, with a named schedule or custom orders."""
    model = draw(models(max_layers=max_degree))
    pp = draw(st.integers(1, model.num_layers))
    rounds = draw(st.integers(1, 3))
    schedule, virtual_stages = draw(schedules(pp, rounds, model.num_layers))
    tp = draw(st.sampled_from([tp for tp in range(1, max_degree + 1) if _divides(model, tp)]))
    dp, micro_batch = draw(st.integers(1, max_degree)), draw(st.integers(1, 2))
    seq_len = tp * draw(st.integers(1, model.max_positions // tp))
    cluster = _able(evolve(draw(clusters(max_nodes=1)), devices_per_node=pp * dp * tp))
    peaks = cluster.device.peak_flops_per_second
    precisions = [name for name, form in FORMATS.items() if getattr(peaks, form.product)]
    saving = draw(savings(dp, model))
    return plan(
        model,
        cluster,
        evolve(
            draw(workloads(global_batch=dp * micro_batch * rounds, seq_len=seq_len)),
            precision=draw(st.sampled_from(precisions)),
        ),
        pp=pp,
        dp=draw(st.sampled_from([None, dp])),
        tp=tp,
        order=tuple(draw(st.permutations(AXES))),
        schedule=schedule,
        virtual_stages=virtual_stages,
        micro_batch=micro_batch,
        sequence_parallel=draw(st.sampled_from([None, False])),
        bucket_bytes=draw(st.integers(1, 2**30)),
        foreign=draw(foreign_segments(model, tp, saving)),
        **saving,
    )


def foreign_segments(model: ModelSpec, tp: int, saving: dict[str, Any]) -> st.SearchStrategy[list[str]]:
    """Names of segments that modules can stand for in a plan with such ``savings``."""
    modes = modes_by_layer(saving["recompute"], model.num_layers)
    offload = flags_by_layer(saving["offload"], model.num_layers)
    plain = [mode != "selective" and not copied for mode, copied in zip(modes, offload, strict=True)]
    layers = [segment for segment in segments(model) if segment.kind in FOREIGN]
    able = [segment_name(segment) for segment in layers if segment.layer is not None and plain[segment.layer]]
    fits = able and tp == 1 and saving.get("zero_stage", 0) < PARAMETERS
    return st.lists(st.sampled_from(able), unique=True, max_size=2) if fits else st.just([])


@st.composite
def schedules(
    draw: st.DrawFn, num_ranks: int, num_microbatches: int, num_layers: int
) -> tuple[str | Schedule, int]:
    """The name of a schedule, or its orders or others as those of a custom one; and its stages a rank."""
    schedule, virtual_stages = draw(plannable(num_ranks, num_microbatches, num_layers))
    if isinstance(schedule, str):
        if draw(st.booleans()):
            return schedule, virtual_stages
        schedule = make_schedule(schedule, num_ranks, num_microbatches, virtual_stages)
    return evolve(schedule, name=draw(names)), virtual_stages


def workloads(*, global_batch: int, seq_len: int) -> st.SearchStrategy[Workload]:
    """Any way of training on batches of one size."""
    return st.builds(
        Workload,
        global_batch=st.just(global_batch),
        seq_len=st.just(seq_len),
        precision=st.sampled_from(["bf16", "fp32", "fp64"]),
        optimizer=st.sampled_from(["adamw", "sgd"]),
        learning_rate=st.floats(0, 10),
        beta1=decays,
        beta2=decays,
        min_learning_rate_ratio=shares,
        seed=st.integers(0, 2**63 - 1),
    )


def json_values() -> st.SearchStrategy[Any]:
    """Any small JSON value; its numbers are too small to ask for a large schedule."""
    numbers = st.integers(-2, 64) | st.floats(
        allow_nan=False, allow_infinity=False, min_value=-2, max_value=64
    )
    leaves = st.none() | st.booleans() | numbers | st.text(max_size=4)
    return leaves | st.lists(leaves, max_size=3) | st.dictionaries(st.text(max_size=3), leaves, max_size=2)


@st.composite
def changed_values(draw: st.DrawFn, data: dict[str, Any]) -> dict[str, Any]:
    """``data`` with one value, at any depth, replaced, taken out or put in."""
    key = draw(st.sampled_from(sorted(data)))
    inner = data[key]
    if isinstance(inner, dict) and inner and draw(st.integers(0, 7)):
        return {**data, key: draw(changed_values(inner))}
    if isinstance(inner, list) and inner and draw(st.booleans()):
        index = draw(st.integers(0, len(inner) - 1))
        return {**data, key: [*inner[:index], draw(json_values()), *inner[index + 1 :]]}
    change = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
    if change == "remove":
        return {name: value for name, value in data.items() if name != key}
    return {**data, key if change == "replace" else draw(st.text(max_size=4)): draw(json_values())}
