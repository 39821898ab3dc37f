"""What happens inside a stage: FLOPs, collectives, and tensors that are born and die."""

from __future__ import annotations

from collections import Counter
from typing import Any

import attrs
import numpy as np
import pytest

from picotron.errors import PlanError
from picotron.planner.body import (
    CATEGORIES,
    COLLECTIVES,
    Bodies,
    Body,
    Dims,
    Operation,
    SegmentBody,
    Tensor,
    collective_bytes,
    dims,
    segment_memory,
)
from picotron.planner.cluster import ClusterSpec
from picotron.planner.flops import matmuls
from picotron.planner.model import ModelSpec, segments
from picotron.planner.plan import plan
from picotron.planner.split_backward import split_backward
from picotron.planner.stage import Variant, backward_body, forward_body, stage_bodies
from picotron.planner.topology import Topology
from picotron.planner.workload import Workload

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 10,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 2,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 10,
    "n_embd": 8,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 12,
    "n_positions": 16,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
}
MIXTRAL = LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK = LLAMA | {
    "model_type": "deepseek_v3",
    "num_key_value_heads": 4,
    "q_lora_rank": 6,
    "kv_lora_rank": 5,
    "qk_nope_head_dim": 3,
    "qk_rope_head_dim": 2,
    "v_head_dim": 7,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
}
DEEPSEEK.pop("head_dim")
CUTS = [(1, False), (2, False), (4, False), (2, True), (4, True)]  # tp, sequence parallel
FAMILIES = {
    "llama": LLAMA,
    "qwen2": LLAMA | {"model_type": "qwen2"},
    "qwen3": LLAMA | {"model_type": "qwen3"},
    "gpt2": GPT2,
    "mixtral": MIXTRAL,
    "deepseek_v3": DEEPSEEK,
}


def _dims(model: ModelSpec, topology: Topology, **changes: Any) -> Dims:
    sizes = {"micro_batch": 2, "seq_len": 4, "sequence_parallel": False, "itemsize": 2} | changes
    return dims(model, topology, **sizes)


def _bodies(config: dict[str, Any], topology: Topology, **changes: Any) -> tuple[Body, Body]:
    """The whole model as one stage."""
    model = ModelSpec.from_hf(config)
    own, local = segments(model), _dims(model, topology, **changes)
    return (
        forward_body(model, topology, 0, own, local),
        backward_body(model, topology, 0, own, local),
    )


def _all_bodies(config: dict[str, Any], topology: Topology, **changes: Any) -> Bodies:
    """The whole model as one stage, in every phase."""
    model = ModelSpec.from_hf(config)
    return stage_bodies(model, topology, 0, segments(model), _dims(model, topology, **changes))


@pytest.mark.parametrize(("micro_batch", "tp", "chunks"), [(2, 2, 4), (3, 2, 2), (4, 4, 4)])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt2"])
def test_of_an_input_in_chunks_two_stand(family: str, micro_batch: int, tp: int, chunks: int) -> None:
    """As many bytes are gathered and left, two chunks stand at a time, and backward is that of sums."""
    asked = {"micro_batch": micro_batch, "sequence_parallel": True}
    whole, cut = (
        _all_bodies(FAMILIES[family], Topology(tp=tp), **asked, tensor_overlap=way)
        for way in ("weight_gradient", "chunked")
    )
    assert (cut.backward, cut.backward_input) == (whole.backward, whole.backward_input)
    assert collective_bytes(cut.forward) == collective_bytes(whole.forward)
    full = 4 * micro_batch * 8 * 2  # tokens, columns and bytes of each
    for one, other in zip(whole.forward.segments[1:-1], cut.forward.segments[1:-1], strict=True):
        assert np.array_equal(segment_memory(one)[0], segment_memory(other)[0])
        assert sum(op.flops for op in one.operations) == sum(op.flops for op in other.operations)
        gathers = [op for op in other.collectives if op.kind == "all_gather"]
        assert [op.payload_bytes for op in gathers] == [full // chunks] * chunks
        assert [op.asynchronous for op in gathers] == [False] + [True] * (chunks - 1)
        live, most = set[str](), 0
        for op in other.operations:
            live |= {tensor.name for tensor in op.creates if "gather" in tensor.name}
            most = max(most, len(live))
            live -= {tensor.name for tensor in op.frees}
        assert most == 2


def test_experts_are_not_gathered_in_chunks() -> None:
    """Nor is what latent attention projects: refused before anything runs."""
    for config in (MIXTRAL, DEEPSEEK):
        cluster = ClusterSpec.preset("cpu", devices_per_node=2)
        work = Workload(global_batch=4, seq_len=4)
        with pytest.raises(PlanError, match=r"without experts or latent attention.*take weight_gradient"):
            plan(ModelSpec.from_hf(config), cluster, work, tp=2, tensor_overlap="chunked")


def test_local_sizes() -> None:
    """tp 4 leaves one head, a (copied) key/value head, 3 columns, 3, 3, 2, 2 words; cp 2 half the tokens."""
    model, topology = ModelSpec.from_hf(LLAMA), Topology(tp=4, cp=2)
    d = _dims(model, topology, sequence_parallel=True, tp_index=3)
    assert (d.heads, d.kv_heads, d.intermediate, d.vocab, d.seq_len) == (1, 1, 3, 2, 2)
    assert (d.tokens, d.local_tokens) == (4, 1)
    assert (d.full_bytes, d.local_bytes) == (4 * 8 * 2, 8 * 2)
    assert _dims(model, topology, sequence_parallel=True, tp_index=1).vocab == 3


def test_softmax_statistics_are_never_below_fp32() -> None:
    """bf16 keeps them in four bytes, fp64 in eight."""
    model = ModelSpec.from_hf(LLAMA)
    assert [_dims(model, Topology(), itemsize=size).statistics_itemsize for size in (2, 4, 8)] == [4, 4, 8]


def test_tokens_that_cannot_be_cut_are_refused() -> None:
    """cp cuts a sequence evenly, and sequence parallelism the tokens of a microbatch."""
    model = ModelSpec.from_hf(LLAMA)
    with pytest.raises(PlanError, match="cp must divide seq_len 5, got cp=2"):
        _dims(model, Topology(cp=2), seq_len=5)
    with pytest.raises(PlanError, match=r"tp to divide the 6 tokens .* got tp=4; change micro_batch"):
        _dims(model, Topology(tp=4), seq_len=3, sequence_parallel=True)


@pytest.mark.parametrize(("tp", "sequence_parallel"), CUTS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt2"])
def test_forward_flops_are_those_of_the_model(family: str, tp: int, sequence_parallel: bool) -> None:
    """Segment by segment, a rank's forward FLOPs are the model's products with causal attention."""
    model = ModelSpec.from_hf(FAMILIES[family])
    forward, _ = _bodies(FAMILIES[family], Topology(tp=tp), sequence_parallel=sequence_parallel)
    for segment, body in zip(segments(model), forward.segments, strict=True):
        expected = matmuls(model, segment, batch=2, seq_len=4, tp=tp, attention="causal")
        assert sum(op.flops for op in body.operations) == sum(m.flops for m in expected), body.name


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_forward_flops_of_sparse_models_are_those_of_the_model(family: str, tp: int) -> None:
    """Experts run on each rank's own tokens, so only the router (whole tokens in the count) differs by tp."""
    model = ModelSpec.from_hf(FAMILIES[family])
    forward, _ = _bodies(FAMILIES[family], Topology(tp=tp), sequence_parallel=tp > 1)
    for segment, body in zip(segments(model), forward.segments, strict=True):
        expected = {
            m.name: m.flops // (tp if m.name == "router" else 1)
            for m in matmuls(model, segment, batch=2, seq_len=4, tp=tp, attention="causal")
        }
        assert sum(op.flops for op in body.operations) == sum(expected.values()), body.name


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_backward_multiplies_twice_and_computes_scores_once_more(family: str) -> None:
    """B is twice F, and flash attention's backward one more product of the scores' size."""
    model = ModelSpec.from_hf(FAMILIES[family])
    forward, backward = _bodies(FAMILIES[family], Topology())
    scores = sum(
        m.flops
        for segment in segments(model)
        for m in matmuls(model, segment, batch=2, seq_len=4, attention="causal")
        if m.name == "scores"
    )
    assert backward.flops == 2 * forward.flops + scores


def test_causal_attention_of_one_rank_by_hand() -> None:
    """Two sequences of four tokens, four heads of two: 2 * 4 * 10 pairs, two products, 2 * 2 FLOPs each."""
    forward, backward = _bodies(LLAMA, Topology())
    (attention,) = [op for op in forward.segments[1].operations if op.kind == "attention"]
    assert attention.flops == 2 * 4 * 10 * 2 * (2 * 2)
    (again,) = [op for op in backward.segments[-2].operations if op.kind == "attention"]
    assert again.flops == 2 * 4 * 10 * 5 * (2 * 2)


def test_context_parallel_ranks_share_the_pairs() -> None:
    """Two ranks do half of the pairs each and pass on keys and values once forward, twice backward."""
    forward, backward = _bodies(LLAMA, Topology(cp=2))
    whole, _ = _bodies(LLAMA, Topology())
    assert 2 * forward.flops == whole.flops
    keys_and_values = 2 * (2 * 2) * (2 * 2) * 2  # both, of 2 x 2 tokens, 2 heads of 2, 2 bytes
    assert collective_bytes(forward) == {("exchange", "cp"): 2 * keys_and_values}
    assert collective_bytes(backward) == {("exchange", "cp"): 4 * keys_and_values}


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"deepseek_v3"}))
def test_no_collectives_on_one_rank(family: str) -> None:
    """A rank alone talks to nobody."""
    for body in _bodies(FAMILIES[family], Topology()):
        assert collective_bytes(body) == {}


def _kinds(body: Body, layer: int) -> Counter[str]:
    return Counter(
        op.kind
        for s in body.segments
        if s.name.endswith(f" {layer}")
        for op in s.collectives
        if op.group == "tp"
    )


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt2"])
def test_four_all_reduces_a_layer(family: str) -> None:
    """Without sequence parallelism: two in forward, two in backward (arXiv:1909.08053, section 3)."""
    forward, backward = _bodies(FAMILIES[family], Topology(tp=2))
    for layer in (0, 1):
        assert _kinds(forward, layer) == _kinds(backward, layer) == {"all_reduce": 2}
    payloads = [op.payload_bytes for s in forward.segments[1:3] for op in s.collectives]
    assert payloads == [2 * 4 * 8 * 2] * 2


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt2"])
def test_sequence_parallelism_gathers_and_scatters(family: str) -> None:
    """Two gathers and two scatters forward; backward gathers inputs and gradients (arXiv:2205.05198, 4.2)."""
    forward, backward = _bodies(FAMILIES[family], Topology(tp=2), sequence_parallel=True)
    assert _kinds(forward, 0) == {"all_gather": 2, "reduce_scatter": 2}
    assert _kinds(backward, 0) == {"all_gather": 4, "reduce_scatter": 2}


def test_the_ends_of_tensor_parallel_ranks() -> None:
    """The embedding sums lookups, the loss a maximum and two sums a token; backward of the ends one sum."""
    forward, backward = _bodies(LLAMA, Topology(tp=2))
    ends = {s.name: [(op.kind, op.payload_bytes) for op in s.collectives] for s in forward.segments}
    assert ends["embedding"] == [("all_reduce", 8 * 8 * 2)]
    assert ends["head"] == [("all_reduce", 8 * 4), ("all_reduce", 2 * 8 * 4)]
    ends = {s.name: [(op.kind, op.payload_bytes) for op in s.collectives] for s in backward.segments}
    assert ends["embedding"] == []
    assert ends["head"] == [("all_reduce", 8 * 8 * 2)]


def test_experts_exchange_tokens_twice_a_pass() -> None:
    """ep 2: dispatch and combine of 8 tokens to two experts each, 8 wide, forward and backward."""
    forward, backward = _bodies(MIXTRAL, Topology(dp=2, ep=2))
    for body in (forward, backward):
        found = [(op.kind, op.group, op.payload_bytes) for s in body.segments for op in s.collectives]
        assert found == [("all_to_all", "ep", 8 * 2 * 8 * 2)] * 4  # two layers


def _live_after(bodies: tuple[Body, ...], live: set[Tensor]) -> set[Tensor]:
    """What is live after ``bodies``; fails where one is made twice or freed when it is not there."""
    live = set(live)
    for body in bodies:
        for segment in body.segments:
            for operation in segment.operations:
                for tensor in operation.creates:
                    assert tensor.name not in {t.name for t in live}, f"{tensor} made twice by {operation}"
                    live.add(tensor)
                for tensor in operation.frees:
                    assert tensor in live, f"{tensor} freed by {operation}, not live"
                    live.remove(tensor)
    return live


@pytest.mark.parametrize(("tp", "sequence_parallel"), CUTS)
@pytest.mark.parametrize("itemsize", [2, 8])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_tensor_is_freed_once(family: str, tp: int, itemsize: int, sequence_parallel: bool) -> None:
    """From first to last segment, F and B leave nothing behind and free nothing twice."""
    bodies = _bodies(
        FAMILIES[family], Topology(tp=tp), sequence_parallel=sequence_parallel, itemsize=itemsize
    )
    assert _live_after(bodies, set()) == set()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_middle_stage_leaves_only_its_borders(family: str) -> None:
    """It is given its input and the output's gradient, and leaves its output and the input's gradient."""
    model, topology = ModelSpec.from_hf(FAMILIES[family]), Topology()
    own, d = segments(model)[1:3], _dims(model, topology)
    x, y = Tensor("0.x", d.local_bytes), Tensor("2.x", d.local_bytes)
    g, dy = Tensor("0.g", d.local_bytes, "workspace"), Tensor("2.g", d.local_bytes, "workspace")
    forward = forward_body(model, topology, 1, own, d)
    backward = backward_body(model, topology, 1, own, d)
    after_forward = _live_after((forward,), {x})
    assert {x, y} < after_forward
    assert _live_after((backward,), (after_forward - {y}) | {dy}) == {g}


def test_what_forward_keeps_of_a_gated_mlp() -> None:
    """Its output, gate, up and the norm's inverse: no product and no normed input."""
    forward, _ = _bodies(LLAMA, Topology())
    live, _ = segment_memory(forward.segments[2])
    kept = (8 * 8 + 2 * 8 * 12) * 2 + 8 * 4
    assert dict(zip(CATEGORIES, live.tolist(), strict=True)) == dict.fromkeys(CATEGORIES, 0) | {
        "activations": kept
    }


def test_the_highest_moment_of_a_segment() -> None:
    """What an operation makes stands beside what it frees."""
    a, b = Tensor("a", 10), Tensor("b", 5, "workspace")
    segment = SegmentBody(
        name="s",
        operations=(
            Operation(name="one", kind="kernel", creates=(a,)),
            Operation(name="two", kind="kernel", creates=(b,), frees=(a,)),
        ),
    )
    live, peak = segment_memory(segment)
    at = CATEGORIES.index
    assert (live.sum(), live[at("workspace")]) == (5, 5)
    assert (peak.sum(), peak[at("activations")], peak[at("workspace")]) == (15, 10, 5)
    assert np.all(peak >= 0)


def test_segments_run_backward_in_reverse() -> None:
    """The embedding first forward, last backward."""
    forward, backward = _bodies(GPT2, Topology())
    names = [s.name for s in forward.segments]
    assert names == ["embedding", "attention 0", "mlp 0", "attention 1", "mlp 1", "head"]
    assert [s.name for s in backward.segments] == names[::-1]
    assert {op.kind for s in forward.segments for op in s.operations} <= {
        "matmul",
        "attention",
        "kernel",
        *COLLECTIVES,
    }


def _done(*bodies: Body) -> Counter[Any]:
    """Every operation of ``bodies`` but what it frees; a step that does nothing but free is left out."""
    return Counter(
        (s.name, op.name, op.kind, op.flops, op.moved_bytes, op.kernels, op.payload_bytes, op.creates)
        for body in bodies
        for s in body.segments
        for op in s.operations
        if op.name != "free"
    )


@pytest.mark.parametrize(("tp", "sequence_parallel"), CUTS)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_halves_of_a_backward_do_what_the_whole_does(
    family: str, tp: int, sequence_parallel: bool
) -> None:
    """Each operation is in I or in W, and both free all that F and they made, once."""
    bodies = _all_bodies(FAMILIES[family], Topology(tp=tp), sequence_parallel=sequence_parallel)
    halves = bodies.backward_input, bodies.backward_weight
    assert [body.phase for body in (bodies.forward, bodies.backward, *halves)] == ["F", "B", "I", "W"]
    assert _done(*halves) == _done(bodies.backward)
    assert [[s.name for s in body.segments] for body in halves] == [
        [s.name for s in bodies.backward.segments]
    ] * 2
    assert _live_after((bodies.forward, *halves), set()) == set()
    assert not any(op.for_weights for s in bodies.forward.segments for op in s.operations)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_weight_gradients_multiply_as_much_as_forward(family: str) -> None:
    """W has the FLOPs of forward's products with weights, I as many and those of attention's backward."""
    bodies = _all_bodies(FAMILIES[family], Topology())

    def flops(body: Body, kind: str) -> int:
        return sum(op.flops for s in body.segments for op in s.operations if op.kind == kind)

    products = flops(bodies.forward, "matmul")
    assert bodies.backward_weight.flops == flops(bodies.backward_weight, "matmul") == products
    assert flops(bodies.backward_input, "matmul") == products
    assert flops(bodies.backward_input, "attention") == flops(bodies.backward, "attention")


def _by_segment(body: Body, name: str, kind: str) -> int:
    """FLOPs of one kind of operation in one segment."""
    return sum(op.flops for s in body.segments if s.name == name for op in s.operations if op.kind == kind)


def test_a_foreign_segment_walks_its_graph_twice() -> None:
    """An MLP has products of 2 * 8 * 8 * 12 FLOPs: 6 in B, 3 in I and 6 in W; attention's core is in all.

    Other segments, F, B and I are as they were; the residual is added to the input's gradient once.
    """
    model = ModelSpec.from_hf(LLAMA)
    request = model, Topology(), 0, segments(model), _dims(model, Topology())
    own, foreign = stage_bodies(*request), stage_bodies(*request, Variant(foreign=("attention 0", "mlp 1")))
    halves = foreign.backward_input, foreign.backward_weight
    assert (foreign.forward, foreign.backward, halves[0]) == (own.forward, own.backward, own.backward_input)
    product = 2 * 8 * 8 * 12
    counts = [_by_segment(body, "mlp 1", "matmul") // product for body in (foreign.backward, *halves)]
    assert counts == [6, 3, 6]
    core = [_by_segment(body, "attention 0", "attention") for body in (foreign.backward, *halves)]
    assert core == [2 * 4 * 10 * 5 * 2 * 2] * 3  # sequences, heads, pairs of tokens, products, FLOPs
    twice = {s.name: len(s.operations) for s in halves[1].segments}
    once = {s.name: len(s.operations) for s in own.backward_weight.segments}
    assert [name for name in once if twice[name] > once[name]] == ["mlp 1", "attention 0"]
    done = [op.name for s in halves[1].segments for op in s.operations]
    assert "second norm backward" in done and "second residual gradient" not in done
    assert _live_after((foreign.forward, *halves), set()) == set()


def _kept(bodies: Bodies, number: int) -> dict[str, int]:
    """Bytes by name of what segment ``number`` holds between I and W, its borders' tensors among it."""
    x, dy = (Tensor(name, 8 * 8 * 2) for name in (f"{number}.x", f"{number + 1}.g"))
    live = {x.name: x, dy.name: dy} if number else {dy.name: dy}
    for segment in (bodies.forward.segments[number], bodies.backward_input.segments[-1 - number]):
        for op in segment.operations:
            live |= {tensor.name: tensor for tensor in op.creates}
            for tensor in op.frees:
                assert live.pop(tensor.name)
    own = {"g", f"{number + 1}.x"}  # what it hands on
    names = {name: "dy" if name == dy.name else name.removeprefix(f"{number}.") for name in live}
    return {short: live[name].bytes for name, short in names.items() if not {short, name} & own}


def test_what_stays_between_the_halves() -> None:
    """Llama's products hold their inputs and output gradients; the norm's output is computed again.

    Gradients of gate and up have taken their place.
    8 tokens, 8 wide, of 2 bytes; 12 columns of the MLP, 10 words; key/value heads are half of the heads.
    """
    bodies = _all_bodies(LLAMA, Topology())
    hidden, inner = 8 * 8 * 2, 8 * 12 * 2
    norm = {"x": hidden, "inverse": 8 * 4}
    heads = {"context": hidden, "dq": hidden, "dk": hidden // 2, "dv": hidden // 2}
    assert _kept(bodies, 0) == {"token_ids": 8 * 8, "dy": hidden}
    assert _kept(bodies, 1) == norm | heads | {"dy": hidden}
    columns = {"product": inner, "gate": inner, "up": inner}
    assert _kept(bodies, 2) == norm | columns | {"dy": hidden}
    logits = {"logits": 8 * 10 * 2}  # by then their gradient; nothing comes back into the head
    assert _kept(bodies, 5) == norm | logits | {"dy": hidden}


@pytest.mark.parametrize(("tp", "sequence_parallel"), CUTS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt2"])
def test_weight_products_read_their_operands(family: str, tp: int, sequence_parallel: bool) -> None:
    """What each product over the 8 tokens reads is, with the weight's gradient, all that it moves."""
    halves = _all_bodies(FAMILIES[family], Topology(tp=tp), sequence_parallel=sequence_parallel)
    for segment in halves.backward_weight.segments:
        for op in segment.operations:
            if op.kind == "matmul":
                operands = sum(tensor.bytes for tensor in op.reads)
                assert op.moved_bytes == operands + op.flops // (2 * 8) * 2, op.name


def test_what_experts_leave_for_their_weights() -> None:
    """Mixtral's expert products and the router's, by hand: 8 tokens to two of four experts each."""
    live = _kept(_all_bodies(MIXTRAL, Topology()), 2)
    hidden, rows = 8 * 8 * 2, 8 * 2
    columns = dict.fromkeys(("product", "dgate", "dproduct"), rows * 12 * 2)
    ends = dict.fromkeys(("dispatched", "expert doutput"), rows * 8 * 2)
    experts = {f"expert {name}": size for name, size in columns.items()} | ends
    assert live == {"x": hidden, "inverse": 8 * 4, "scores": 8 * 4 * 4} | experts


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt2"])
def test_weight_gradients_gather_inputs_only(family: str) -> None:
    """Under sequence parallelism W gathers each norm's output again, I gradients; else W is silent."""
    halves = _all_bodies(FAMILIES[family], Topology(tp=2), sequence_parallel=True)
    assert _kinds(halves.backward_input, 0) == {"all_gather": 2, "reduce_scatter": 2}
    assert _kinds(halves.backward_weight, 0) == {"all_gather": 2}
    halves = _all_bodies(FAMILIES[family], Topology(tp=2))
    assert _kinds(halves.backward_input, 0) == {"all_reduce": 2}
    assert collective_bytes(halves.backward_weight) == {}


def test_a_weight_step_frees_what_it_used_last() -> None:
    """A step of W frees what it made for itself and what no later one reads; I keeps what W reads."""
    a, b, c, again = (Tensor(name, 1) for name in ("a", "b", "c", "again"))

    def body(*operations: Operation) -> Body:
        return Body(stage=3, phase="B", segments=(SegmentBody(name="s", operations=operations),))

    make = Operation(name="make", kind="kernel", creates=(c,))
    recompute = Operation(name="recompute", kind="kernel", reads=(a,), creates=(again,))
    first = Operation(name="first", kind="matmul", reads=(again, b))
    second = Operation(name="second", kind="matmul", reads=(again, a), frees=(again,))
    end = Operation(name="end", kind="kernel", frees=(a, b, c))
    inputs, weights = split_backward(body(make, recompute, first, second, end))
    assert inputs == attrs.evolve(body(make, attrs.evolve(end, frees=(c,))), phase="I")
    ends = attrs.evolve(first, frees=(b,)), attrs.evolve(second, frees=(again, a))
    assert weights == attrs.evolve(body(recompute, *ends), phase="W")
