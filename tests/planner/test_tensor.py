"""How each kind of parameter is cut, and which tensor-parallel degrees a model allows."""

from __future__ import annotations

from typing import Any

import pytest

from picotron.errors import PlanError
from picotron.planner.model import ROLES, ModelSpec
from picotron.planner.tensor import CUT_RULES, check_tensor_parallel, kv_copies


def _model(**changes: Any) -> ModelSpec:
    config = {
        "model_type": "llama",
        "vocab_size": 16,
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
    }
    return ModelSpec.from_hf(config | changes)


def test_every_role_has_a_rule() -> None:
    """No kind of parameter is without a rule, and no rule without a kind."""
    assert set(CUT_RULES) == set(ROLES)


def test_columns_by_output_and_rows_by_input() -> None:
    """[out, in] matrices: column-parallel along 0, row-parallel along 1; Conv1D's [in, out] the other way."""
    cut = {role: CUT_RULES[role].dim for role in ("column", "row", "conv_column", "conv_row", "fused_qkv")}
    assert cut == {"column": 0, "row": 1, "conv_column": 1, "conv_row": 0, "fused_qkv": 1}
    assert CUT_RULES["fused_qkv"].blocks == CUT_RULES["fused_qkv_bias"].blocks == 3


def test_whatever_sees_a_part_of_the_tokens_is_partial_under_sequence_parallelism() -> None:
    """Norms, biases after the reduction, positions and routers stand where tokens are cut."""
    partial = {role for role, rule in CUT_RULES.items() if rule.partial == "sequence"}
    assert partial == {"position", "norm", "row_bias", "router"}


def test_whatever_sees_a_part_of_the_heads_is_always_partial() -> None:
    """Norms of a head and the latent projections are whole on each rank but serve only its heads."""
    partial = {role for role, rule in CUT_RULES.items() if rule.partial == "always"}
    assert partial == {"head_norm", "latent", "latent_norm"}


@pytest.mark.parametrize(("tp", "copies"), [(1, 1), (2, 1), (4, 1), (12, 3)])
def test_key_value_heads_are_copied_beyond_their_number(tp: int, copies: int) -> None:
    """Four key/value heads on twelve ranks: three ranks to a head."""
    assert kv_copies(_model(), tp) == copies
    check_tensor_parallel(_model(), tp=tp)


@pytest.mark.parametrize(
    ("changes", "degrees", "message"),
    [
        ({}, {"tp": 5}, "tp must divide the 12 query heads, got tp=5; try 1, 2, 3, 4, 6, 12"),
        (
            {},
            {"tp": 6},
            "tp must divide the 4 key/value heads or be a multiple of them, got tp=6; try 1, 2, 4, 12",
        ),
        ({"intermediate_size": 50}, {"tp": 4}, "tp must divide intermediate_size 50, got tp=4"),
        ({"vocab_size": 3}, {"tp": 4}, "tp must be at most the vocabulary of 3, got tp=4"),
        (
            {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
            {"tp": 1, "etp": 5},
            "etp must divide the experts' size 48, got etp=5",
        ),
    ],
)
def test_degrees_that_cannot_cut_are_refused(
    changes: dict[str, Any], degrees: dict[str, int], message: str
) -> None:
    """The message names what does not divide and, for heads, the degrees that do."""
    with pytest.raises(PlanError) as caught:
        check_tensor_parallel(_model(**changes), **degrees)
    assert str(caught.value) == message


def test_shared_experts_are_cut_by_tp() -> None:
    """deepseek-v3 is cut 128 ways, a head a rank and its shared expert of 2048 too; not 256 ways."""
    model = ModelSpec.from_hf("deepseek-v3")
    check_tensor_parallel(model, tp=128, etp=2048)
    with pytest.raises(PlanError, match="tp must divide the 128 query heads, got tp=256"):
        check_tensor_parallel(model, tp=256)
