"""Megatron-LM's arguments: what they can say comes back as it was, and what they cannot is said."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from picotron.errors import PlanError
from picotron.planner.cluster import ClusterSpec
from picotron.planner.megatron import ORDERS, block_modes, same_order, stage_layout, to_megatron
from picotron.planner.megatron_import import from_megatron
from picotron.planner.megatron_text import read_arguments
from picotron.planner.parts import RopeScaling
from picotron.planner.plan import TrainingPlan, plan
from picotron.planner.serialize import diff
from picotron.planner.software import profile_names, software_profile
from picotron.planner.workload import Workload
from property_tests.strategies import DENSE, SPARSE, divisors, models, plans

SCALINGS = (
    None,
    RopeScaling(kind="linear", factor=2),
    RopeScaling(kind="llama3", factor=8, original_max_positions=8192),
    RopeScaling(kind="yarn", factor=40, original_max_positions=4096, mscale=1, mscale_all_dim=1),
)
MODES = ("none", "selective", "full")


@st.composite
def expressible(draw: st.DrawFn) -> TrainingPlan:
    """A plan that Megatron-LM runs: its schedules and orders, as many experts a rank, blocks recomputed."""
    model = draw(models((*DENSE, *SPARSE)))
    tp = draw(st.sampled_from(divisors(model.num_heads, 2)))
    pp = draw(st.integers(1, min(3, model.num_layers)))
    dp, cp = draw(st.integers(1, 4)), draw(st.integers(1, 2))
    number = model.experts.num_experts if model.experts else 1
    virtual = draw(st.integers(1, min(3, model.num_layers // pp))) if pp > 1 else 1
    micro_batch, rounds = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    layers = draw(stage_layers(model.num_layers, pp * virtual))
    zero_stage = draw(st.integers(0, 3))
    plain = model.rope_theta is not None and model.latent_attention is None
    return plan(
        evolve(
            model,
            vocab_size=model.vocab_size * 2,
            rope_scaling=draw(st.sampled_from(SCALINGS)) if plain else None,
        ),
        ClusterSpec.preset("h100", nodes=pp * dp, devices_per_node=cp * tp),
        draw(workloads(dp * micro_batch * pp * rounds, 4 * draw(st.integers(1, 3)) * cp)),
        tp=tp,
        pp=pp,
        dp=dp,
        cp=cp,
        ep=draw(st.sampled_from([k for k in divisors(dp * cp) if number % k == 0])),
        order=draw(st.sampled_from([order for order, _ in ORDERS])),
        schedule="interleaved" if virtual > 1 else "1f1b",
        virtual_stages=virtual,
        micro_batch=micro_batch,
        sequence_parallel=tp > 1 and (model.experts is not None or draw(st.booleans())),
        stage_layers=layers,
        bucket_bytes=4 * draw(st.integers(1, 10**6)),
        zero_stage=zero_stage,
        shard=draw(st.sampled_from(divisors(dp * cp)[:-1] or [None])) if zero_stage else None,
        recompute=draw(recomputation(layers)),
    )


def stage_layers(num_layers: int, num_stages: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Any split with a layer at least in each stage."""
    cuts = st.just([])
    if num_stages > 1:
        cuts = st.sets(st.integers(1, num_layers - 1), min_size=num_stages - 1, max_size=num_stages - 1)
    return cuts.map(lambda found: tuple(b - a for a, b in pairwise((0, *sorted(found), num_layers))))


def recomputation(layers: tuple[int, ...]) -> st.SearchStrategy[Any]:
    """One mode for all layers, or the first few of each stage in full."""
    blocks = st.integers(1, max(layers)).map(
        lambda count: tuple(mode for own in layers for mode in block_modes(own, count))
    )
    return st.sampled_from(MODES) | blocks


def workloads(global_batch: int, seq_len: int) -> st.SearchStrategy[Workload]:
    """Anything that is trained in the formats that Megatron-LM has."""
    return st.builds(
        Workload,
        global_batch=st.just(global_batch),
        seq_len=st.just(seq_len),
        precision=st.sampled_from(["bf16", "fp16", "fp32", "fp8", "mxfp8"]),
        optimizer=st.sampled_from(["adamw", "sgd"]),
        learning_rate=st.sampled_from([1e-4, 3e-4, 7.7e-5]),
        weight_decay=st.sampled_from([0.0, 0.1]),
        warmup_steps=st.integers(0, 9),
        decay_steps=st.integers(0, 99),
        min_learning_rate_ratio=st.sampled_from([0.0, 0.1, 1.0]),
        max_grad_norm=st.sampled_from([0.0, 1.0]),
        seed=st.integers(0, 3),
    )


PROFILES = tuple(name for name in profile_names() if name.startswith("megatron"))


@given(expressible(), st.sampled_from(PROFILES))
def test_what_can_be_said_comes_back(one: TrainingPlan, profile: str) -> None:
    """Nothing is left unsaid, and the script's text reads back as the same plan, its flags as the profile."""
    exported = to_megatron(one, profile=profile)
    read = from_megatron(exported.words, one.cluster, profile=profile).plan
    assert read.cluster.profile == software_profile(profile)
    assert exported.unexpressed == ()
    found = from_megatron(str(exported), one.cluster, name=one.model.name)
    order = found.plan.topology.order
    assert same_order(one.topology, order)
    assert diff(found.plan, evolve(one, topology=evolve(one.topology, order=order), chosen=())) == ()
    assert found.unknown == ()


@given(plans(families=(*DENSE, *SPARSE)), st.sampled_from(MODES), st.integers(0, 3))
def test_what_does_not_come_back_was_said(drawn: TrainingPlan, mode: str, zero_stage: int) -> None:
    """Any plan: it is exported, and what comes back otherwise, or is refused, has its sentence."""
    one = evolve(drawn, recompute=mode, zero_stage=zero_stage, chosen=())
    exported = to_megatron(one)
    try:
        found = from_megatron(exported, one.cluster, name=one.model.name).plan
    except PlanError:
        assert exported.unexpressed
        return
    assert found.topology == evolve(one.topology, order=found.topology.order)
    if diff(found, evolve(one, topology=found.topology)) or not same_order(
        one.topology, found.topology.order
    ):
        assert exported.unexpressed


@given(st.lists(st.integers(1, 9), min_size=2, max_size=12).map(tuple))
def test_stages_come_back_from_their_layout(layers: tuple[int, ...]) -> None:
    """A layout unrolled has the layers of each stage."""
    from picotron.planner.megatron_read_layout import stages_of_layout

    assert stages_of_layout(stage_layout(layers), sum(layers), 1) == (len(layers), layers)


@given(st.text(alphabet="-a b'\"$({})[]@|;&#=\\\n0*+:", max_size=60) | st.text(max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    """A list of words, or a PlanError: nothing else."""
    for written in (f"--x {text}", f"--x: {text}", f"MODEL_ARGS:\n  --x: 1\n  - {text}"):
        try:
            found = read_arguments(written)
        except PlanError:
            continue
        assert all(isinstance(word, str) for word in found.words)
