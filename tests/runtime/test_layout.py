"""Slices of parameters and first values, by hand."""

from __future__ import annotations

import pytest
import torch

from picotron.errors import ExecutionError
from picotron.planner.layout import Placement
from picotron.planner.plan import TrainingPlan
from picotron.planner.topology import Coordinate, coordinate
from picotron.runtime.layout import assemble, given_weights, initial_weights, place_slice, slice_of
from tests.runtime.models import random_weights, tiny_model, tiny_plan, tiny_workload


def placement(made: TrainingPlan, ending: str) -> Placement:
    return next(p for p in made.layout if p.name.endswith(ending))


def rows_numbered(made: TrainingPlan, ending: str, dim: int = 0) -> list[list[int]]:
    """For each tensor-parallel rank, the indices along ``dim`` that it holds of a parameter."""
    own = placement(made, ending)
    shape = [1] * len(own.shape)
    shape[dim] = -1
    whole = torch.arange(own.shape[dim]).view(shape).expand(own.shape).contiguous()
    found = []
    for tp in range(made.topology.tp):
        part = slice_of(whole, own, Coordinate(tp=tp))
        found.append(part.movedim(dim, 0).reshape(part.shape[dim], -1)[:, 0].tolist())
    return found


def test_columns_and_rows_are_cut_along_their_own_dimension() -> None:
    """Two ranks: the 16 outputs of gate_proj and the 16 inputs of down_proj are halved."""
    made = tiny_plan(tiny_model("llama"), tp=2)
    halves = [list(range(8)), list(range(8, 16))]
    assert rows_numbered(made, "layers.0.mlp.gate_proj.weight") == halves
    assert rows_numbered(made, "layers.0.mlp.down_proj.weight", dim=1) == halves


def test_an_uneven_vocabulary_gives_the_first_ranks_more() -> None:
    """67 ids on four ranks: 17, 17, 17 and 16."""
    made = tiny_plan(tiny_model("llama", vocab=67), tp=4)
    assert list(map(len, rows_numbered(made, "embed_tokens.weight"))) == [17, 17, 17, 16]


def test_a_fused_projection_is_cut_in_each_of_its_three_parts() -> None:
    """Of 3 · 4 columns, the second of two ranks holds the second half of q, of k and of v."""
    made = tiny_plan(tiny_model("gpt2", heads=2, head_dim=2), tp=2)
    expected = [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]]
    assert rows_numbered(made, "h.0.attn.c_attn.weight", dim=1) == expected
    assert rows_numbered(made, "h.0.attn.c_attn.bias") == expected


def test_neighbours_hold_copies_of_a_key_head() -> None:
    """Two key heads of 2 on four ranks: ranks 0 and 1 hold the first, 2 and 3 the second."""
    made = tiny_plan(tiny_model("llama", heads=4, kv_heads=2, head_dim=2), tp=4)
    assert rows_numbered(made, "layers.0.self_attn.k_proj.weight") == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert rows_numbered(made, "layers.0.self_attn.q_proj.weight") == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_a_slice_has_memory_of_its_own() -> None:
    """Neither a cut nor a replicated slice is a view of the whole."""
    made = tiny_plan(tiny_model("llama"), tp=2)
    for ending in ("layers.0.mlp.gate_proj.weight", "layers.0.input_layernorm.weight"):
        own = placement(made, ending)
        whole = torch.zeros(own.shape)
        part = slice_of(whole, own, Coordinate())
        part.add_(1)
        assert part.is_contiguous()
        assert not whole.any()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("parallel", [{"tp": 4}, {"pp": 2, "tp": 2}, {"dp": 2, "pp": 2, "tp": 2}], ids=str)
def test_slices_put_together_are_the_whole(family: str, parallel: dict[str, int]) -> None:
    """Every parameter comes back from the ranks' slices, a tied table once."""
    made = tiny_plan(tiny_model(family, tied=True), **parallel)
    parts = []
    for rank in range(made.topology.world_size):
        where = coordinate(made.topology, rank)
        parts.append({p.name: slice_of(random_weights(p), p, where) for p in made.held(where)})
    whole = assemble(made, parts)
    untied = [p for p in made.layout if p.tied_to is None]
    assert whole.keys() == {p.name for p in untied}
    for p in untied:
        assert whole[p.name].equal(random_weights(p))


def test_placing_a_slice_leaves_the_others_alone() -> None:
    """Only this rank's columns of each fused part are written."""
    own = placement(tiny_plan(tiny_model("gpt2", heads=2, head_dim=2), tp=2), "h.0.attn.c_attn.bias")
    whole = torch.zeros(12)
    place_slice(whole, torch.ones(6), own, Coordinate(tp=1))
    assert whole.tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1]


def test_first_values_do_not_depend_on_the_topology() -> None:
    """A parameter's name and the seed decide; its stage and slice do not."""
    model = tiny_model("qwen2", tied=True)
    alone, spread = tiny_plan(model), tiny_plan(model, dp=2, pp=2, tp=2)
    first = {p.name: initial_weights(alone)(p) for p in alone.layout}
    for p in spread.layout:
        assert initial_weights(spread)(p).equal(first[p.tied_to or p.name])


def test_another_seed_draws_other_values() -> None:
    """So does another name; the same seed draws the same."""
    model = tiny_model("llama")
    own = placement(tiny_plan(model), "layers.0.self_attn.q_proj.weight")
    other = placement(tiny_plan(model), "layers.1.self_attn.q_proj.weight")
    draw = [initial_weights(tiny_plan(model, tiny_workload(seed=seed))) for seed in (0, 0, 1)]
    assert draw[0](own).equal(draw[1](own))
    assert not draw[0](own).equal(draw[2](own))
    assert not draw[0](own).equal(draw[0](other))


def test_first_values_have_the_models_deviation() -> None:
    """Norms are one, biases zero, matrices normal with deviation 0.2 (to 5 % over 24 · 67 draws)."""
    made = tiny_plan(tiny_model("qwen2"))
    draw = initial_weights(made)
    assert draw(placement(made, "model.norm.weight")).eq(1).all()
    assert draw(placement(made, "layers.0.self_attn.q_proj.bias")).eq(0).all()
    assert float(draw(placement(made, "embed_tokens.weight")).std()) == pytest.approx(0.2, rel=0.05)


def test_drawing_leaves_torchs_own_generator_alone() -> None:
    """Weights come from generators of their own."""
    made = tiny_plan(tiny_model("llama"))
    before = torch.get_rng_state()
    initial_weights(made)(placement(made, "embed_tokens.weight"))
    assert torch.get_rng_state().equal(before)


def test_given_weights_must_be_whole_and_complete() -> None:
    """A missing tensor and one of another shape are named."""
    made = tiny_plan(tiny_model("llama"))
    own = placement(made, "model.norm.weight")
    with pytest.raises(ExecutionError, match=r"must hold model\.norm\.weight, got 0 other tensors"):
        given_weights({})(own)
    with pytest.raises(ExecutionError, match=r"model\.norm\.weight must have shape \(24,\), got \(23,\)"):
        given_weights({own.name: torch.zeros(23)})(own)
    assert given_weights({own.name: torch.arange(24)})(own).tolist() == list(range(24))


def test_a_tied_copy_is_given_the_table() -> None:
    """The last stage's head reads the embedding's name."""
    made = tiny_plan(tiny_model("gpt2", tied=True), pp=2)
    table = torch.ones(67, 24)
    assert given_weights({"transformer.wte.weight": table})(placement(made, "lm_head.weight")) is table
