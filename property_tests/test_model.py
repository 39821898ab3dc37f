"""Theorems about models of every family: their parameters, their FLOPs and their configurations."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import cattrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from picotron.errors import PlanError
from picotron.planner.flops import backward_flops, forward_flops, matmuls
from picotron.planner.model import ModelSpec, parameters, segments, to_hf
from property_tests.strategies_model import configs, models

DENSE = ("llama", "qwen2", "qwen3", "gpt2")
JUNK = st.sampled_from([None, 0, -1, 1.5, True, "4", float("nan"), float("inf"), [], {}, [{}], {"a": {}}])


def _built(config: dict[str, Any]) -> Any:
    """The transformers model of a configuration, on the meta device."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    keys = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(config["model_type"], **keys)
        )


@settings(max_examples=60, deadline=None)
@given(configs())
def test_every_parameter_is_counted(config: dict[str, Any]) -> None:
    """Listed parameters, the closed count and what transformers builds agree for every family."""
    model = ModelSpec.from_hf(config)
    listed = sum(parameter.num_elements for parameter in parameters(model))
    built = sum(parameter.numel() for parameter in _built(config).parameters())
    assert model.num_parameters == listed == built


@settings(max_examples=40, deadline=None)
@given(configs(DENSE))
def test_dense_names_and_shapes_are_those_of_transformers(config: dict[str, Any]) -> None:
    """A dense model's parameters are named and shaped as its transformers ``named_parameters``."""
    model = ModelSpec.from_hf(config)
    built = {name: tuple(parameter.shape) for name, parameter in _built(config).named_parameters()}
    assert {parameter.name: parameter.shape for parameter in parameters(model)} == built


@settings(max_examples=40, deadline=None)
@given(configs())
def test_the_written_configuration_is_the_same_architecture(config: dict[str, Any]) -> None:
    """``to_hf`` is read back as an equal model, and transformers builds the same tensors from it."""
    model = ModelSpec.from_hf(config)
    written = json.loads(json.dumps(to_hf(model)))
    assert ModelSpec.from_hf(written) == model
    again, first = _built(written), _built(config)
    assert [(name, p.shape) for name, p in again.named_parameters()] == [
        (name, p.shape) for name, p in first.named_parameters()
    ]
    rope, kept = (getattr(built.config, "rope_parameters", None) or {} for built in (first, again))
    assert rope.items() <= kept.items()


@given(models())
def test_a_model_survives_json(model: ModelSpec) -> None:
    """A model is plain data: a plain cattrs converter saves and loads it, hash and all."""
    converter = cattrs.Converter()
    saved = json.dumps(converter.unstructure(model))
    again = converter.structure(json.loads(saved), ModelSpec)
    assert again == model
    assert hash(again) == hash(model)
    assert json.dumps(converter.unstructure(again)) == saved


@given(models())
def test_segments_partition_the_parameters(model: ModelSpec) -> None:
    """Every parameter is in one segment; each layer has one attention and one MLP or expert segment."""
    found = segments(model)
    names = [parameter.name for segment in found for parameter in segment.parameters]
    assert len(set(names)) == len(names)
    assert [(segment.kind == "attention", segment.layer) for segment in found[1:-1]] == [
        (first, layer) for layer in range(model.num_layers) for first in (True, False)
    ]
    counts = Counter(segment.kind for segment in found)
    assert (counts["embedding"], counts["head"], counts["moe"]) == (1, 1, model.num_moe_layers)


@given(models())
def test_active_parameters_leave_out_only_idle_experts(model: ModelSpec) -> None:
    """Active parameters are all of them but, a layer, the experts that a token is not sent to."""
    top_k = model.experts.top_k if model.experts else 0
    active = 0
    for parameter in parameters(model):
        _, _, after = parameter.name.partition(".experts.")
        active += parameter.num_elements if not after or int(after.split(".")[0]) < top_k else 0
    assert model.num_active_parameters == active


@given(models(), st.integers(1, 3), st.integers(1, 9), st.sampled_from(["full", "causal"]))
def test_flops_are_the_sum_over_segments(model: ModelSpec, batch: int, seq_len: int, attention: Any) -> None:
    """Forward FLOPs are those of all segments' products; backward doubles them; causal is never more."""
    total = sum(
        matmul.flops
        for segment in segments(model)
        for matmul in matmuls(model, segment, batch=batch, seq_len=seq_len, attention=attention)
    )
    assert forward_flops(model, batch=batch, seq_len=seq_len, attention=attention) == total
    assert backward_flops(model, batch=batch, seq_len=seq_len, attention=attention) == 2 * total
    assert total <= forward_flops(model, batch=batch, seq_len=seq_len)


@given(models(), st.integers(1, 3), st.integers(1, 9))
def test_a_matrix_costs_two_flops_a_token_and_parameter(model: ModelSpec, batch: int, seq_len: int) -> None:
    """But for attention's own products, a token costs 2 FLOPs for each active matrix entry it meets."""
    projections = sum(
        matmul.flops
        for segment in segments(model)
        for matmul in matmuls(model, segment, batch=batch, seq_len=seq_len)
        if matmul.name not in ("scores", "context")
    )
    met = model.vocab_size * model.hidden_size if model.tied_embeddings else 0
    top_k = model.experts.top_k if model.experts else 0
    for parameter in parameters(model):
        _, _, expert = parameter.name.partition(".experts.")
        chosen = not expert or int(expert.split(".")[0]) < top_k
        is_matrix = len(parameter.shape) == 2 and parameter.role not in ("embedding", "position")
        met += parameter.num_elements if chosen and is_matrix else 0
    assert projections == 2 * batch * seq_len * met


@given(models(), st.data())
def test_tensor_parallel_ranks_share_the_work(model: ModelSpec, data: st.DataObject) -> None:
    """A rank computes 1/tp of attention and one cut, rounded up, of other matrices; the rest is whole."""
    common = math.gcd(model.num_heads, model.num_kv_heads)
    tp = data.draw(st.sampled_from([d for d in range(common, 0, -1) if common % d == 0]))
    segment = data.draw(st.sampled_from(segments(model)))
    one = matmuls(model, segment, batch=1, seq_len=4)
    cut = matmuls(model, segment, batch=1, seq_len=4, tp=tp)
    for a, b in zip(one, cut, strict=True):
        assert (a.name, a.m) == (b.name, b.m)
        if a.name in ("router", "q_a_proj", "kv_a_proj_with_mqa"):
            assert b == a
        elif segment.kind == "attention":
            assert tp * b.flops == a.flops
        else:
            assert (b.n, b.k) in {(math.ceil(a.n / tp), a.k), (a.n, math.ceil(a.k / tp))}


SIZES = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("max_position_embeddings", "n_embd", "n_layer", "n_head", "n_positions", "kv_lora_rank", "v_head_dim"),
    *("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size"),
}


@given(configs(), st.data())
def test_a_spoilt_size_is_refused_by_name(config: dict[str, Any], data: st.DataObject) -> None:
    """A size that is missing or not a positive integer is a PlanError that names its key."""
    key = data.draw(st.sampled_from(sorted(SIZES & set(config))))
    rest = {name: value for name, value in config.items() if name != key}
    with pytest.raises(PlanError, match=f"^{key} must be in the {config['model_type']} config"):
        ModelSpec.from_hf(rest)
    with pytest.raises(PlanError, match=f"^{key} must be an integer of at least 1, got "):
        ModelSpec.from_hf(rest | {key: data.draw(JUNK)})


@given(configs(), st.data())
def test_nothing_but_a_plan_error_comes_of_a_configuration(
    config: dict[str, Any], data: st.DataObject
) -> None:
    """A configuration with any key spoilt is a model that round-trips, or a PlanError with a rule."""
    key = data.draw(st.sampled_from(sorted(config)))
    try:
        model = ModelSpec.from_hf(config | {key: data.draw(JUNK)})
    except PlanError as error:
        assert "must be" in str(error)
    else:
        assert ModelSpec.from_hf(to_hf(model)) == model
