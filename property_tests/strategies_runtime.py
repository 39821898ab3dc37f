"""Strategies for the runtime wing: trainings tiny enough to run on every simulated rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any, TypeVar, get_args

from attrs import frozen
from hypothesis import strategies as st

from picotron.planner.body import TensorOverlap
from picotron.planner.data import DEFAULT_BUCKET_BYTES
from picotron.planner.model import ModelSpec
from picotron.planner.plan import TrainingPlan
from picotron.planner.recompute import MODES
from picotron.planner.topology import AXES
from picotron.planner.workload import Workload
from property_tests.strategies import contexts, plannable, shardings
from tests.runtime.models import FAMILIES, tiny_model, tiny_plan, tiny_workload

MAX_RANKS = 16
T = TypeVar("T")

LARGEST_BATCH = 16  # sequences of a step
LARGEST_STEP = 32  # microbatches of a step, counted on every rank
MAX_CUTS = 8  # of a sequence, and of a layer
MAX_STAGES = 6  # where a rank holds several
ORDERS = (AXES, ("dp", "pp", "cp", "tp"), ("tp", "cp", "dp", "pp"))


def degree_triples(max_ranks: int = 8) -> list[tuple[int, int, int]]:
    """Every (dp, pp, tp) of at most ``max_ranks`` ranks, the fewest first."""
    return [(dp, pp, tp) for dp, pp, cp, tp in all_degrees(max_ranks) if cp == 1]


def all_degrees(max_ranks: int = MAX_RANKS) -> list[tuple[int, int, int, int]]:
    """Every (dp, pp, cp, tp) of at most ``max_ranks`` ranks, the fewest first; cp and tp are at most 8."""
    sizes, few = range(1, max_ranks + 1), range(1, min(max_ranks, MAX_CUTS) + 1)
    found = [each for each in product(sizes, sizes, few, few) if math.prod(each) <= max_ranks]
    return sorted(found, key=math.prod)


@frozen(kw_only=True)
class Training:
    """A plan, whether its samples are of unequal length, and which interleaving of the ranks runs it."""

    plan: TrainingPlan
    ragged: bool
    seed: int


@st.composite
def decoders(draw: st.DrawFn, *, layers: int = 2, tp: int = 1, heads: int = 1) -> ModelSpec:
    """A runnable model with ``layers`` that ``tp`` can cut; key/value heads may be fewer than ``tp``.

    Each of the tensor-parallel ranks has a multiple of ``heads``.
    """
    family = draw(st.sampled_from(FAMILIES))
    heads = tp * heads * draw(st.integers(1, max(1, 6 // (tp * heads))))
    shared = [kv for kv in range(1, heads + 1) if heads % kv == 0 and (kv % tp == 0 or tp % kv == 0)]
    config: dict[str, Any] = {
        "heads": heads,
        "kv_heads": draw(st.sampled_from(shared)),
        "layers": layers,
        "vocab": draw(st.integers(61, 97)),
        "tied": draw(st.booleans()),
    }
    if family in ("llama", "qwen3"):
        config["attention_bias"] = draw(st.booleans())
    if family == "llama":
        config |= {"mlp_bias": draw(st.booleans()), "rope_scaling": draw(_rope_scalings)}
    return tiny_model(family, **config)


_rope_scalings = st.sampled_from(
    [
        None,
        {"rope_type": "linear", "factor": 2.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ]
)


def by_layer(values: st.SearchStrategy[T], num_layers: int) -> st.SearchStrategy[tuple[T, ...]]:
    """One of ``values`` for each layer."""
    return st.tuples(*[values] * num_layers)


def overlaps(tp: int, sequence_parallel: bool, tokens: int) -> Sequence[str]:
    """What tensor-parallel ranks that share ``tokens`` can compute while they communicate."""
    chunks = sequence_parallel and tokens // tp % 2 == 0
    return [way for way in get_args(TensorOverlap) if chunks or way != "chunked"] if tp > 1 else ["none"]


@st.composite
def trainings(
    draw: st.DrawFn,
    *,
    optimizers: tuple[str, ...] = ("sgd",),
    precisions: tuple[str, ...] = ("fp64", "fp32"),
    max_ranks: int = MAX_RANKS,
    least_batch: int = 1,
    gathers: bool = True,
) -> Training:
    """A training of any decoder on any topology of at most ``max_ranks`` ranks, by any schedule.

    ``gathers``: whether ranks may share parameters, and gather them.
    """
    dp, pp, cp, tp = draw(st.sampled_from(all_degrees(max_ranks)))
    micro_batch = draw(st.integers(1, 2))
    least = -(-least_batch // (dp * micro_batch))
    most = min(5, LARGEST_BATCH // (dp * micro_batch), LARGEST_STEP // (dp * pp * cp * tp))
    num_microbatches = draw(st.integers(least, max(least, most)))
    schedule, chunks = draw(plannable(pp, num_microbatches, max(pp, MAX_STAGES)))
    num_stages = pp * chunks
    stage_layers = tuple(draw(st.integers(1, 2 if num_stages < 3 else 1)) for _ in range(num_stages))
    model = draw(decoders(layers=sum(stage_layers), tp=tp, heads=draw(st.sampled_from((1, cp)))))
    context = draw(st.sampled_from(contexts(model, cp, tp)))
    sequence_parallel = tp > 1 and draw(st.booleans())
    unit = tp // math.gcd(tp, micro_batch) if sequence_parallel else 1  # tp divides the tokens
    if cp > 1:
        unit = math.lcm(2 * cp if context == "ring" else cp, cp * unit)
    work = draw(
        workloads(
            global_batch=dp * micro_batch * num_microbatches,
            seq_len=unit * draw(st.integers(-(-8 // unit), max(-(-8 // unit), 16 // unit))),
            optimizers=optimizers,
            precisions=precisions,
        )
    )
    modes, flags = st.sampled_from(MODES), st.booleans()
    made = tiny_plan(
        model,
        work,
        recompute=draw(st.just("none") | modes | by_layer(modes, model.num_layers)),
        offload=draw(st.just(False) | by_layer(flags, model.num_layers)),
        **draw(shardings(dp * cp, gathers=gathers)),
        dp=dp,
        pp=pp,
        cp=cp,
        tp=tp,
        context=context,
        micro_batch=micro_batch,
        sequence_parallel=sequence_parallel,
        stage_layers=stage_layers,
        schedule=schedule,
        virtual_stages=chunks,
        bucket_bytes=draw(st.sampled_from([DEFAULT_BUCKET_BYTES, 10_000, 1])),
        order=draw(st.sampled_from(ORDERS)),
        loss_chunks=min(draw(st.sampled_from([1, 1, 2, 3])), micro_batch * work.seq_len // cp),
        tensor_overlap=draw(
            st.sampled_from(overlaps(tp, sequence_parallel, micro_batch * work.seq_len // cp))
        ),
    )
    ragged = work.global_batch >= 4 and draw(st.booleans())  # fewer might all be without a label
    return Training(plan=made, ragged=ragged, seed=draw(st.integers(0, 2)))


@st.composite
def workloads(
    draw: st.DrawFn,
    *,
    global_batch: int,
    seq_len: int,
    optimizers: tuple[str, ...] = ("sgd",),
    precisions: tuple[str, ...] = ("fp64", "fp32"),
) -> Workload:
    """In any of the precisions, with and without clipping and decay; bf16 with gradients of every format."""
    precision = draw(st.sampled_from(precisions))
    formats = st.sampled_from([None, "bf16", "fp32"]) if precision == "bf16" else st.none()
    return tiny_workload(
        global_batch=global_batch,
        seq_len=seq_len,
        precision=precision,
        gradient_dtype=draw(formats),
        reduce_dtype=draw(formats),
        optimizer=draw(st.sampled_from(optimizers)),
        max_grad_norm=draw(st.sampled_from([0.0, 1.0])),
        weight_decay=draw(st.sampled_from([0.0, 0.1])),
    )
