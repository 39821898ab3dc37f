"""Strategies shared by the rooms of the planner: one a type, named by its plural, built from valid parts."""

from __future__ import annotations

from typing import Any

from attrs import evolve
from hypothesis import strategies as st

from picotron.planner.actions import Action, Phase
from picotron.planner.catalogue import DEFAULT_VIRTUAL_STAGES, SCHEDULES, make_schedule
from picotron.planner.cluster import ClusterSpec
from picotron.planner.context import ContextParallel
from picotron.planner.cost import CollectiveCost, SegmentCost, StageCost
from picotron.planner.layout import even_ranges
from picotron.planner.model import ModelSpec
from picotron.planner.pipeline import Schedule, loop_ranks, v_ranks
from picotron.planner.plan import TrainingPlan, plan
from picotron.planner.recompute import MODES
from picotron.planner.sharding import ACCUMULATES, GRADIENTS, PARAMETERS, RESHARDS
from picotron.planner.topology import AXES, Topology
from picotron.planner.workload import Workload

DENSE = ("llama", "qwen2", "qwen3", "gpt2")
SPARSE = ("mixtral", "qwen3_moe", "deepseek_v3")


def divisors(number: int, limit: int | None = None) -> list[int]:
    """What divides ``number``, ascending, up to ``limit``."""
    return [k for k in range(1, min(number, limit or number) + 1) if number % k == 0]


@st.composite
def topologies(draw: st.DrawFn, max_degree: int = 4) -> Topology:
    """Degrees up to ``max_degree`` in any order of the axes, with any experts' cut of a stage."""
    sizes = {axis: draw(st.integers(1, max_degree)) for axis in AXES}
    stage = sizes["dp"] * sizes["cp"] * sizes["tp"]
    ep = draw(st.sampled_from(divisors(stage)))
    etp = draw(st.sampled_from(divisors(stage // ep)))
    return Topology(**sizes, ep=ep, etp=etp, order=tuple(draw(st.permutations(AXES))))


SINGLE = tuple(name for name, row in SCHEDULES.items() if not row.bidirectional)  # one copy of a stage


def stages_a_rank(name: str, limit: int) -> list[int]:
    """How many stages a rank the schedule of that name may have, up to ``limit``."""
    taken = SCHEDULES[name].virtual_stages
    return [count for count in range(1, limit + 1) if taken in ("any", count)]


@st.composite
def schedules(draw: st.DrawFn, max_ranks: int = 4, max_microbatches: int = 8) -> Schedule:
    """One of the schedules that have a name, each stage on one rank; two or three stages a rank at most."""
    name = draw(st.sampled_from(SINGLE))
    ranks, microbatches = draw(st.integers(1, max_ranks)), draw(st.integers(1, max_microbatches))
    return make_schedule(name, ranks, microbatches, draw(st.sampled_from(stages_a_rank(name, 3))))


@st.composite
def interleavings(
    draw: st.DrawFn,
    max_ranks: int = 3,
    max_chunks: int = 2,
    max_microbatches: int = 4,
    *,
    num_ranks: int | None = None,
    num_microbatches: int | None = None,
) -> Schedule:
    """Any valid schedule, in some order that one worker could run; its ranks may still wait in a circle.

    Stages, ``max_chunks`` a rank at most, go round the ranks or, two a rank, up them and back. Backward is
    full, split or now this and now that. In half of the schedules microbatches keep their order in each stage
    and direction.
    """
    p = num_ranks or draw(st.integers(1, max_ranks))
    m = num_microbatches or draw(st.integers(1, max_microbatches))
    chunks = draw(st.integers(1, max_chunks))
    stage_ranks = v_ranks(p) if chunks == 2 and draw(st.booleans()) else loop_ranks(p, chunks)
    backwards = draw(st.sampled_from([[Phase.BACKWARD], [Phase.INPUT], [Phase.BACKWARD, Phase.INPUT]]))
    orders: list[list[Action]] = [[] for _ in range(p)]
    ready = [Action(0, Phase.FORWARD, index) for index in range(m)]
    in_order = draw(st.booleans())
    while ready:
        firsts = {(action.stage, _direction(action)): action for action in sorted(ready, key=_latest_first)}
        action = draw(st.sampled_from(sorted(firsts.values()) if in_order else ready))
        ready.remove(action)
        orders[stage_ranks[action.stage]].append(action)
        ready += _next(action, len(stage_ranks), draw(st.sampled_from(backwards)))
    return Schedule(name="drawn", num_microbatches=m, stage_ranks=stage_ranks, orders=orders)


def _direction(action: Action) -> Phase:
    return Phase.BACKWARD if action.phase is Phase.INPUT else action.phase


def _latest_first(action: Action) -> int:
    return -action.microbatch


def _next(action: Action, num_stages: int, backward: Phase) -> list[Action]:
    """What one microbatch does after ``action``: up through the stages, then down; a W whenever it likes."""
    stage, phase, microbatch = action.stage, action.phase, action.microbatch
    if phase is Phase.FORWARD and stage + 1 < num_stages:
        return [Action(stage + 1, Phase.FORWARD, microbatch)]
    if phase is Phase.FORWARD:
        return [Action(stage, backward, microbatch)]
    down = [Action(stage - 1, backward, microbatch)] if stage and phase is not Phase.WEIGHT else []
    return [*down, Action(stage, Phase.WEIGHT, microbatch)] if phase is Phase.INPUT else down


@st.composite
def warmups(draw: st.DrawFn, num_ranks: int, num_microbatches: int) -> Schedule:
    """A schedule between 1F1B and AFAB: a rank holds one to three microbatches more than the next, or all."""
    orders: list[tuple[Action, ...]] = []
    held = 1
    for rank in reversed(range(num_ranks)):
        held = min(num_microbatches, held + draw(st.integers(0, 2)))
        orders.insert(0, _one_stage_order(rank, held, num_microbatches))
        held += 1
    return Schedule(
        name="drawn",
        num_microbatches=num_microbatches,
        stage_ranks=tuple(range(num_ranks)),
        orders=tuple(orders),
    )


def _one_stage_order(rank: int, held: int, num_microbatches: int) -> tuple[Action, ...]:
    forwards = [Action(rank, Phase.FORWARD, index) for index in range(num_microbatches)]
    backwards = [Action(rank, Phase.BACKWARD, index) for index in range(num_microbatches)]
    steady = [
        action for pair in zip(backwards, forwards[held:], strict=False) for action in pair
    ]  # one B, one F
    return (*forwards[:held], *steady, *backwards[num_microbatches - held :])


@st.composite
def configs(draw: st.DrawFn, families: tuple[str, ...] = DENSE, max_layers: int = 4) -> dict[str, Any]:
    """A small configuration whose heads and widths can be cut in two and in four where heads allow it."""
    family = draw(st.sampled_from(families))
    heads, head_dim = draw(st.sampled_from([1, 2, 4])), 2 * draw(st.integers(1, 3))
    vocab_size, num_layers = draw(st.integers(8, 21)), draw(st.integers(1, max_layers))
    intermediate, tied = 4 * draw(st.integers(1, 4)), draw(st.booleans())
    if family == "gpt2":
        return {
            "model_type": "gpt2",
            "vocab_size": vocab_size,
            "n_embd": heads * head_dim,
            "n_layer": num_layers,
            "n_head": heads,
            "n_inner": intermediate,
            "n_positions": 64,
            "layer_norm_epsilon": 1e-5,
            "activation_function": "gelu_new",
            "tie_word_embeddings": tied,
        }
    config: dict[str, Any] = {
        "model_type": family,
        "vocab_size": vocab_size,
        "hidden_size": heads * draw(st.integers(1, 4)),
        "intermediate_size": intermediate,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads if family == "deepseek_v3" else draw(st.sampled_from(divisors(heads))),
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
    }
    return config | ({} if family == "deepseek_v3" else {"head_dim": head_dim}) | _experts(draw, family)


def _experts(draw: st.DrawFn, family: str) -> dict[str, Any]:
    """The keys of a family with experts: four of them or five, two a token."""
    number = draw(st.integers(4, 5)) if family in ("mixtral", "qwen3_moe") else 4
    if family == "mixtral":
        return {"num_local_experts": number, "num_experts_per_tok": 2}
    width = 4 * draw(st.integers(1, 2)) if family in SPARSE else 0
    common = {"num_experts_per_tok": 2, "moe_intermediate_size": width}
    if family == "qwen3_moe":
        return common | {"num_experts": number}
    if family == "deepseek_v3":
        return common | {
            "n_routed_experts": number,
            "n_shared_experts": 1,
            "first_k_dense_replace": draw(st.integers(0, 1)),
            "n_group": 2,
            "topk_group": 1,
            "routed_scaling_factor": 2.5,
            "q_lora_rank": draw(st.none() | st.just(5)),
            "kv_lora_rank": 3,
            "qk_nope_head_dim": 3,
            "qk_rope_head_dim": 2,
            "v_head_dim": 5,
        }
    return {}


def models(families: tuple[str, ...] = DENSE, max_layers: int = 4) -> st.SearchStrategy[ModelSpec]:
    """A small model of one of ``families``, by default of those that the runtime has layers for."""
    return configs(families, max_layers).map(ModelSpec.from_hf)


@st.composite
def requests(
    draw: st.DrawFn, max_ranks: int = 8, families: tuple[str, ...] = DENSE
) -> tuple[tuple[ModelSpec, ClusterSpec, Workload], dict[str, Any]]:
    """What ``plan`` can be asked for: its arguments, for a small model on up to ``max_ranks`` ranks."""
    model, few = draw(models(families)), st.integers(1, 3)
    tp = draw(st.sampled_from(divisors(model.num_heads, max_ranks)))
    pp = draw(st.integers(1, min(model.num_layers, max_ranks // tp)))
    dp = draw(st.integers(1, min(3, max_ranks // (tp * pp))))
    cp = draw(st.integers(1, min(3, max_ranks // (tp * pp * dp))))
    micro_batch, num_microbatches = draw(st.integers(1, 2)), draw(st.integers(1, 5))
    context = draw(st.sampled_from([None, *contexts(model, cp, tp)]))
    seq_len = cp * draw(st.integers(1, 6)) if context == "all_to_all" or cp == 1 else 2 * cp * draw(few)
    can_cut = tp > 1 and micro_batch * seq_len // cp % tp == 0
    ep, etp = draw(_expert_degrees(model, dp * cp * tp))
    schedule, virtual_stages = draw(plannable(pp, num_microbatches, model.num_layers))
    work = Workload(
        global_batch=dp * micro_batch * num_microbatches,
        seq_len=seq_len,
        precision=draw(st.sampled_from(["bf16", "fp32", "fp64"])),
        optimizer=draw(st.sampled_from(["adamw", "sgd"])),
    )
    asked = {
        "dp": draw(st.sampled_from([dp, None])),
        "pp": pp,
        "cp": cp,
        "tp": tp,
        "ep": ep,
        "etp": etp,
        "order": tuple(draw(st.permutations(AXES))),
        "schedule": schedule,
        "virtual_stages": draw(st.sampled_from([virtual_stages, *_left_out(schedule, virtual_stages)])),
        "micro_batch": micro_batch,
        "sequence_parallel": draw(st.sampled_from([None, False, True] if can_cut else [None, False])),
        "context": context,
        "bucket_bytes": draw(st.sampled_from([1, 300, 2000, 2**30])),
    }
    return (model, draw(_clusters(pp * dp * cp * tp)), work), asked


def contexts(model: ModelSpec, cp: int, tp: int) -> list[ContextParallel]:
    """How ``cp`` ranks of ``tp`` each can share sequences of ``model``; a ring first."""
    heads, kv_heads = model.num_heads // tp, max(1, model.num_kv_heads // tp)
    by_head = cp > 1 and heads % cp == 0 and (kv_heads % cp == 0 or cp % kv_heads == 0)
    return ["ring", "all_to_all"] if by_head else ["ring"]


@st.composite
def shardings(
    draw: st.DrawFn, data_ranks: int, *, gathers: bool = True, experts: bool = False
) -> dict[str, Any]:
    """What so many data-parallel ranks share rather than copy, and the choices that come with it.

    ``gathers``: whether they may share parameters too. ``experts``: whether the model has any.
    """
    stage = draw(st.integers(0, 3 if gathers else 2))
    if not stage:
        return {}
    found: dict[str, Any] = {
        "zero_stage": stage,
        "shard": draw(st.sampled_from([None, *divisors(data_ranks)])),
    }
    if stage >= GRADIENTS:
        found["accumulate"] = draw(st.sampled_from([None, *ACCUMULATES]))
    if stage >= PARAMETERS:
        found["reshard"] = draw(st.sampled_from([None, *RESHARDS[: 1 if experts else None]]))
    return found


@st.composite
def savings(draw: st.DrawFn, data_ranks: int, model: ModelSpec) -> dict[str, Any]:
    """What saves memory in a plan of so many data-parallel ranks: ZeRO, recompute, offload."""
    num_layers = model.num_layers
    modes, flags = st.sampled_from(MODES), st.booleans()
    layers = {"min_size": num_layers, "max_size": num_layers}
    return {
        **draw(shardings(data_ranks, experts=model.experts is not None)),
        "recompute": draw(modes | st.lists(modes, **layers).map(tuple)),
        "offload": draw(flags | st.lists(flags, **layers).map(tuple)),
    }


@st.composite
def saving_plans(draw: st.DrawFn, max_ranks: int = 8, families: tuple[str, ...] = DENSE) -> TrainingPlan:
    """A plan of ``plans`` with any of ``savings``."""
    request, asked = draw(requests(max_ranks, families))
    data_ranks = request[1].num_devices // (asked["pp"] * asked["tp"])
    return plan(*request, **asked | draw(savings(data_ranks, request[0])))


@st.composite
def plannable(draw: st.DrawFn, pp: int, num_microbatches: int, num_layers: int) -> tuple[str | Schedule, int]:
    """What a plan's schedule may be, and its stages a rank: a name, or orders of one's own."""
    most = num_layers // pp
    names = [(name, count) for name in SINGLE for count in stages_a_rank(name, min(most, 3))]
    own = warmups(pp, num_microbatches) | interleavings(
        max_chunks=min(most, 2), num_ranks=pp, num_microbatches=num_microbatches
    )
    return draw(st.sampled_from(names) | own.map(lambda made: (made, made.num_stages // made.num_ranks)))


def _left_out(schedule: str | Schedule, virtual_stages: int) -> list[None]:
    """[None] where stages a rank may be left out: they are those of the schedule itself."""
    taken = SCHEDULES[schedule].virtual_stages if isinstance(schedule, str) else virtual_stages
    return [None] if virtual_stages == (DEFAULT_VIRTUAL_STAGES if taken == "any" else taken) else []


def one_stage_a_rank(made: TrainingPlan, name: str) -> TrainingPlan:
    """The plan with a schedule that has one stage a rank, whatever it had."""
    layers = [stop - start for start, stop in even_ranges(made.model.num_layers, made.topology.pp)]
    return evolve(
        made, schedule_name=name, schedule_csv=None, virtual_stages=1, stage_layers=tuple(layers), chosen=()
    )


def plans(max_ranks: int = 8, families: tuple[str, ...] = DENSE) -> st.SearchStrategy[TrainingPlan]:
    """A valid plan of a small model on up to ``max_ranks`` ranks; the simplest is one rank."""
    return requests(max_ranks, families).map(lambda request: plan(*request[0], **request[1]))


@st.composite
def _expert_degrees(draw: st.DrawFn, model: ModelSpec, stage_size: int) -> tuple[int, int]:
    """(ep, etp) that cut the ``stage_size`` ranks of a stage; (1, 1) without experts."""
    if model.experts is None:
        return 1, 1
    ep = draw(st.sampled_from(divisors(stage_size, model.experts.num_experts)))
    widths = divisors(stage_size // ep)
    return ep, draw(st.sampled_from([k for k in widths if model.experts.intermediate_size % k == 0]))


def _clusters(world: int) -> st.SearchStrategy[ClusterSpec]:
    """CPU devices for ``world`` ranks, in one node or more."""
    return st.sampled_from(divisors(world)).map(
        lambda nodes: ClusterSpec.preset("cpu", nodes=nodes, devices_per_node=world // nodes)
    )


def quarters(maximum: int = 40) -> st.SearchStrategy[float]:
    """Seconds in quarters, which floats add up without rounding."""
    return st.integers(0, maximum).map(lambda count: count / 4)


@st.composite
def stage_costs(draw: st.DrawFn, num_segments: int, update_seconds: float) -> StageCost:
    """Any seconds for each of ``num_segments`` segments, up to two collectives in each; an F takes some."""
    collective = st.builds(
        CollectiveCost,
        kind=st.just("all_reduce"),
        group=st.just("tp"),
        payload_bytes=st.just(8),
        seconds=quarters(),
    )
    segment = st.lists(collective, max_size=2).flatmap(
        lambda collectives: st.builds(
            SegmentCost,
            compute=st.lists(quarters(), min_size=len(collectives) + 1, max_size=len(collectives) + 1),
            collectives=st.just(collectives),
        )
    )
    several = st.lists(segment, min_size=num_segments, max_size=num_segments).map(tuple)
    forward, backward_input, backward_weight = draw(several), draw(several), draw(several)
    return StageCost(
        forward=(joined_costs(SegmentCost(compute=(0.25,)), forward[0]), *forward[1:]),
        backward=tuple(map(joined_costs, backward_input, backward_weight)),
        backward_input=backward_input,
        backward_weight=backward_weight,
        update_seconds=update_seconds,
    )


def joined_costs(first: SegmentCost, then: SegmentCost) -> SegmentCost:
    """One segment that does what two do, one after the other."""
    return SegmentCost(
        compute=(*first.compute[:-1], first.compute[-1] + then.compute[0], *then.compute[1:]),
        collectives=first.collectives + then.collectives,
    )
