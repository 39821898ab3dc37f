"""Which slice of which parameter lives where, on a model small enough to draw."""

from __future__ import annotations

from typing import Any

import pytest

from picotron.planner.layout import (
    Cut,
    Placement,
    counts_in_norm,
    cut_ranges,
    even_ranges,
    is_held,
    layout,
    local_numel,
    local_shape,
    stage_segments,
)
from picotron.planner.model import ModelSpec
from picotron.planner.topology import Coordinate, Topology, coordinate

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


def _layout(
    config: dict[str, Any], *, sequence_parallel: bool = False, **degrees: int
) -> dict[str, Placement]:
    model, topology = ModelSpec.from_hf(config), Topology(**degrees)
    layers = (model.num_layers,) if topology.pp == 1 else (1,) * topology.pp
    found = layout(model, topology, layers, sequence_parallel=sequence_parallel)
    return {p.name.removeprefix("model.layers.0.").removeprefix("transformer.h.0."): p for p in found}


def test_uneven_parts_differ_by_one_and_the_longer_come_first() -> None:
    """Ten in four parts: 3, 3, 2, 2."""
    assert even_ranges(10, 4) == ((0, 3), (3, 6), (6, 8), (8, 10))


def test_an_uneven_vocabulary() -> None:
    """Ten rows of the table on four ranks: 3, 3, 2, 2 of them; input and output tables alike."""
    places = _layout(LLAMA, tp=4)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        shapes = [local_shape(places[name], Coordinate(tp=index)) for index in range(4)]
        assert shapes == [(3, 8), (3, 8), (2, 8), (2, 8)]


def test_columns_and_rows_on_two_ranks() -> None:
    """tp 2 halves the outputs of q, k, v, gate and up, and the inputs of o and down; norms stay whole."""
    places = _layout(LLAMA, tp=2)
    second = Coordinate(tp=1)
    shapes = {name: local_shape(places[name], second) for name in places if name.startswith(("self_", "mlp"))}
    assert shapes == {
        "self_attn.q_proj.weight": (4, 8),
        "self_attn.k_proj.weight": (2, 8),
        "self_attn.v_proj.weight": (2, 8),
        "self_attn.o_proj.weight": (8, 4),
        "mlp.gate_proj.weight": (6, 8),
        "mlp.up_proj.weight": (6, 8),
        "mlp.down_proj.weight": (8, 6),
    }
    assert places["input_layernorm.weight"].cut is None
    assert places["input_layernorm.weight"].replicated == ("dp", "cp", "tp")


def test_key_value_heads_are_copied_to_neighbours() -> None:
    """Two key/value heads on four ranks: ranks 0 and 1 hold the first, 2 and 3 the second."""
    place = _layout(LLAMA, tp=4)["self_attn.k_proj.weight"]
    assert place.cut == Cut(axis="tp", dim=0, degree=4, parts=2)
    assert [cut_ranges(place.cut, 4, index) for index in range(4)] == [((0, 2),)] * 2 + [((2, 4),)] * 2
    assert place.partial == ("tp:2",)
    assert [counts_in_norm(place, Coordinate(tp=index)) for index in range(4)] == [True, False, True, False]


def test_fused_projection_is_cut_inside_each_block() -> None:
    """[8, 24] of q, k, v on two ranks: the second holds the second half of each, not of the whole."""
    place = _layout(GPT2, tp=2)["attn.c_attn.weight"]
    assert place.cut is not None
    assert cut_ranges(place.cut, 24, 1) == ((4, 8), (12, 16), (20, 24))
    assert local_shape(place, Coordinate(tp=1)) == (8, 12)
    bias = _layout(GPT2, tp=2)["attn.c_attn.bias"]
    assert bias.cut is not None
    assert cut_ranges(bias.cut, 24, 0) == ((0, 4), (8, 12), (16, 20))


def test_the_whole_is_held_where_nothing_is_cut() -> None:
    """On one rank every placement is whole, and its gradient too."""
    for place in _layout(LLAMA).values():
        assert (place.cut, place.partial) == (None, ())
        assert local_numel(place, Coordinate()) == place.numel


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_gradients_of_norms_are_partial_under_sequence_parallelism(sequence_parallel: bool) -> None:
    """A norm sees all tokens on each rank, or a part of them; a column's gradient is whole either way."""
    places = _layout(LLAMA, tp=2, dp=2, sequence_parallel=sequence_parallel)
    expected = ("tp", "dp_cp") if sequence_parallel else ("dp_cp",)
    assert places["input_layernorm.weight"].partial == expected
    assert places["model.norm.weight"].partial == expected
    for name in ("self_attn.q_proj.weight", "mlp.down_proj.weight", "model.embed_tokens.weight"):
        assert places[name].partial == ("dp_cp",)


def test_gradients_of_gpt2_biases_and_positions_under_sequence_parallelism() -> None:
    """Biases after the reduction and positions act on a part of the tokens; c_attn's bias on all of them."""
    places = _layout(GPT2, tp=2, sequence_parallel=True)
    for name in ("transformer.wpe.weight", "ln_1.bias", "attn.c_proj.bias", "mlp.c_proj.bias"):
        assert places[name].partial == ("tp",)
    for name in ("attn.c_attn.bias", "mlp.c_fc.bias", "transformer.wte.weight"):
        assert places[name].partial == ()


def test_head_norms_are_partial_over_tp_always() -> None:
    """qwen3's q_norm and k_norm are whole on each rank but meet only its heads."""
    places = _layout(LLAMA | {"model_type": "qwen3"}, tp=2)
    assert places["self_attn.q_norm.weight"].partial == ("tp",)
    assert places["self_attn.k_norm.weight"].partial == ("tp",)


def test_context_parallel_ranks_reduce_with_data_parallel_ones() -> None:
    """cp alone makes gradients partial over dp_cp."""
    assert _layout(LLAMA, cp=2)["mlp.up_proj.weight"].partial == ("dp_cp",)


def test_tied_embeddings_on_one_stage_are_one_table() -> None:
    """With one stage there is no second copy."""
    assert "lm_head.weight" not in _layout(GPT2)


def test_tied_embeddings_on_two_stages_are_two_copies() -> None:
    """The last stage holds a copy, cut alike; both sum over the embedding group, one counts in the norm."""
    places = _layout(GPT2, pp=2, tp=2, dp=2)
    table, copy = places["transformer.wte.weight"], places["lm_head.weight"]
    assert (copy.tied_to, copy.stage, copy.segment) == ("transformer.wte.weight", 1, 2)
    assert copy.partial == table.partial == ("dp_cp", "embedding")
    assert (copy.cut, copy.replicated, copy.init) == (table.cut, table.replicated, table.init)
    assert counts_in_norm(table, Coordinate()) and not counts_in_norm(copy, Coordinate(pp=1))


def test_stages_and_segments() -> None:
    """Stage 0 starts with the embedding, the last ends with the head; segments count from 0 in each."""
    segments = stage_segments(ModelSpec.from_hf(LLAMA), (1, 1))
    assert [[s.kind for s in own] for own in segments] == [
        ["embedding", "attention", "mlp"],
        ["attention", "mlp", "head"],
    ]
    places = _layout(LLAMA, pp=2)
    assert (places["mlp.up_proj.weight"].stage, places["mlp.up_proj.weight"].segment) == (0, 2)
    assert (places["lm_head.weight"].stage, places["lm_head.weight"].segment) == (1, 2)


def test_experts_live_on_one_expert_parallel_rank_in_each_copy() -> None:
    """Four experts, ep 2 on four ranks: experts 0, 1 on ranks 0 and 2, 2, 3 on ranks 1 and 3; each twice."""
    config = LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    places, topology = _layout(config, dp=4, ep=2), Topology(dp=4, ep=2)
    held = {
        expert: [
            rank
            for rank in range(4)
            if is_held(
                places[f"block_sparse_moe.experts.{expert}.w1.weight"], topology, coordinate(topology, rank)
            )
        ]
        for expert in range(4)
    }
    assert held == {0: [0, 2], 1: [0, 2], 2: [1, 3], 3: [1, 3]}
    expert = places["block_sparse_moe.experts.3.w2.weight"]
    assert (expert.expert, expert.partial, expert.replicated) == ((3, 4), ("edp",), ("edp",))
    assert places["block_sparse_moe.gate.weight"].partial == ("dp_cp",)


def test_experts_are_cut_by_etp_not_tp() -> None:
    """tp leaves an expert whole; etp halves its inner width."""
    config = LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    name = "block_sparse_moe.experts.0.w2.weight"
    assert local_shape(_layout(config, tp=2)[name], Coordinate(tp=1)) == (8, 12)
    assert local_shape(_layout(config, tp=2, etp=2)[name], Coordinate(etp=1)) == (8, 6)
