"""Models read from configurations: what transformers would build, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import attrs
import pytest

from picotron.errors import PlanError
from picotron.planner.families import preset_names
from picotron.planner.model import (
    FAMILIES,
    ROLES,
    Experts,
    ModelSpec,
    Parameter,
    RopeScaling,
    Segment,
    parameters,
    segments,
    to_hf,
)

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 96,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 6,
    "n_positions": 64,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
}
MIXTRAL = LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
QWEN3_MOE = LLAMA | {
    "model_type": "qwen3_moe",
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
}
DEEPSEEK = LLAMA | {
    "model_type": "deepseek_v3",
    "num_key_value_heads": 6,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 5,
    "qk_rope_head_dim": 4,
    "v_head_dim": 7,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8,
    "low_freq_factor": 1,
    "high_freq_factor": 4,
    "original_max_position_embeddings": 32,
}


def _hf_config(config: dict[str, Any]) -> Any:
    transformers = pytest.importorskip("transformers")
    keys = {key: value for key, value in config.items() if key != "model_type"}
    return transformers.AutoConfig.for_model(config["model_type"], **keys)


def _built(hf_config: Any) -> Any:
    """The transformers model on the meta device: every shape, no memory."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(hf_config)


def _shapes(model: ModelSpec) -> dict[str, tuple[int, ...]]:
    return {parameter.name: parameter.shape for parameter in parameters(model)}


@pytest.mark.parametrize("preset", preset_names())
def test_presets_count_what_transformers_builds(preset: str) -> None:
    """Every preset has, to the last parameter, what transformers builds of it, tied tables counted once."""
    model = ModelSpec.from_hf(preset)
    hf_config = _hf_config(_preset(preset))
    built = _built(hf_config)
    assert model.num_parameters == sum(parameter.numel() for parameter in built.parameters())
    assert model.num_parameters == sum(segment.num_parameters for segment in segments(model))
    assert ModelSpec.from_hf(to_hf(model)) == model
    saved_by_transformers = ModelSpec.from_hf(hf_config.to_dict(), name=preset)
    assert saved_by_transformers == model
    if model.experts is None:
        assert _shapes(model) == {name: tuple(p.shape) for name, p in built.named_parameters()}


def _preset(name: str) -> dict[str, Any]:
    import picotron.planner.families as families

    folder = Path(families.__file__).parent / "presets" / "models"
    config: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return config


@pytest.mark.parametrize(
    ("preset", "count", "active"),
    [
        ("gpt2", 124_439_808, 124_439_808),
        ("llama-3.1-8b", 8_030_261_248, 8_030_261_248),
        ("llama-3.1-405b", 405_853_388_800, 405_853_388_800),
        ("mixtral-8x7b", 46_702_792_704, 12_879_925_248),
        ("qwen3-235b-a22b", 235_093_634_560, 22_190_763_520),
        ("deepseek-v3", 671_026_404_352, 37_552_282_624),
        ("llama-tiny", 2_460_096, 2_460_096),
    ],
)
def test_published_counts(preset: str, count: int, active: int) -> None:
    """The counts that the models are known by: all parameters, and those one token meets."""
    model = ModelSpec.from_hf(preset)
    assert (model.num_parameters, model.num_active_parameters) == (count, active)


def test_every_family_has_a_preset() -> None:
    """The presets cover every family."""
    assert {ModelSpec.from_hf(name).family for name in preset_names()} == set(FAMILIES)


@pytest.mark.parametrize("config", [MIXTRAL, QWEN3_MOE, DEEPSEEK], ids=lambda config: config["model_type"])
def test_expert_names_are_those_of_the_checkpoint(config: dict[str, Any], tmp_path: Path) -> None:
    """Experts are named and shaped as the checkpoint that transformers saves, selection bias aside."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    safetensors = pytest.importorskip("safetensors")
    transformers.utils.logging.disable_progress_bar()
    with torch.device("cpu"):
        transformers.AutoModelForCausalLM.from_config(_hf_config(config)).save_pretrained(tmp_path)
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    trained = {name: shape for name, shape in saved.items() if "e_score_correction_bias" not in name}
    assert _shapes(ModelSpec.from_hf(config)) == trained
    assert ModelSpec.from_hf(tmp_path, name="m") == ModelSpec.from_hf(config, name="m")


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE},
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 16}},
        {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 5e5}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ],
)
def test_rotary_frequencies_survive_to_hf(rope: dict[str, Any]) -> None:
    """Either spelling of rotary parameters is read, and ``to_hf`` gives transformers the same frequencies."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = LLAMA | rope
    written = to_hf(ModelSpec.from_hf(config))
    first, again = (
        transformers.AutoModelForCausalLM.from_config(_hf_config(keys)).model.rotary_emb
        for keys in (config, written)
    )
    assert first.inv_freq.tolist() == again.inv_freq.tolist()
    assert first.attention_scaling == again.attention_scaling


def test_llama_segments_by_hand() -> None:
    """A one-layer llama: four segments, with the checkpoint's names, shapes and roles."""
    model = ModelSpec.from_hf(LLAMA | {"num_hidden_layers": 1}, name="one")
    at = "model.layers.0"
    assert [
        (s.kind, s.layer, [(p.name, p.shape, p.role) for p in s.parameters]) for s in segments(model)
    ] == [
        ("embedding", None, [("model.embed_tokens.weight", (96, 24), "embedding")]),
        (
            "attention",
            0,
            [
                (f"{at}.input_layernorm.weight", (24,), "norm"),
                (f"{at}.self_attn.q_proj.weight", (24, 24), "column"),
                (f"{at}.self_attn.k_proj.weight", (8, 24), "kv_column"),
                (f"{at}.self_attn.v_proj.weight", (8, 24), "kv_column"),
                (f"{at}.self_attn.o_proj.weight", (24, 24), "row"),
            ],
        ),
        (
            "mlp",
            0,
            [
                (f"{at}.post_attention_layernorm.weight", (24,), "norm"),
                (f"{at}.mlp.gate_proj.weight", (40, 24), "column"),
                (f"{at}.mlp.up_proj.weight", (40, 24), "column"),
                (f"{at}.mlp.down_proj.weight", (24, 40), "row"),
            ],
        ),
        ("head", None, [("model.norm.weight", (24,), "norm"), ("lm_head.weight", (96, 24), "head")]),
    ]


def test_a_tied_head_lists_only_its_norm() -> None:
    """A tied table belongs to the embedding; the head lists the final norm alone."""
    tied = ModelSpec.from_hf(LLAMA | {"tie_word_embeddings": True})
    assert [parameter.name for parameter in segments(tied)[-1].parameters] == ["model.norm.weight"]
    assert ModelSpec.from_hf(LLAMA).num_parameters - tied.num_parameters == 96 * 24


def test_every_role_is_used() -> None:
    """The families together use every role, and no other."""
    shown = [LLAMA | {"attention_bias": True}, GPT2, MIXTRAL, QWEN3_MOE, DEEPSEEK]
    used = {p.role for config in shown for p in parameters(ModelSpec.from_hf(config))}
    assert used == set(ROLES)


def test_initial_values() -> None:
    """Norm weights start at one, biases at zero, every matrix is drawn."""
    for parameter in parameters(ModelSpec.from_hf(GPT2)):
        is_norm = ".ln_" in parameter.name
        expected = "zeros" if parameter.name.endswith("bias") else "ones" if is_norm else "normal"
        assert parameter.init == expected, parameter.name


def test_layers_without_experts() -> None:
    """Dense layers are those listed, those a sparse step skips, or the first k of DeepSeek-V3."""
    experts = ModelSpec.from_hf(QWEN3_MOE | {"num_hidden_layers": 6, "decoder_sparse_step": 2}).experts
    assert experts is not None
    assert experts.dense_layers == (0, 2, 4)
    listed = ModelSpec.from_hf(QWEN3_MOE | {"mlp_only_layers": [1]})
    assert [segment.kind for segment in segments(listed)] == [
        "embedding", "attention", "moe", "attention", "mlp", "head",
    ]  # fmt: skip
    assert ModelSpec.from_hf("deepseek-v3").num_moe_layers == 58


def test_defaults_that_published_configurations_rely_on() -> None:
    """Absent keys take transformers' default: heads for key/value heads, 4h for gpt2's MLP, tied gpt2."""
    llama = ModelSpec.from_hf({key: LLAMA[key] for key in LLAMA if key != "num_key_value_heads"})
    assert (llama.num_kv_heads, llama.head_dim, llama.rope_theta, llama.qkv_bias) == (6, 4, 10000.0, False)
    gpt2 = ModelSpec.from_hf(GPT2)
    assert (gpt2.intermediate_size, gpt2.tied_embeddings, gpt2.rope_theta) == (96, True, None)
    assert (llama.activation, gpt2.activation) == ("silu", "gelu_tanh")
    qwen3 = LLAMA | {"model_type": "qwen3"}
    assert ModelSpec.from_hf(qwen3).head_dim == _hf_config(qwen3).head_dim == 128


def test_where_a_model_comes_from(tmp_path: Path) -> None:
    """A preset's name, a config.json, its folder and its dict are one model; each suggests a name."""
    folder = tmp_path / "my-llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "other.json").write_text(json.dumps(LLAMA))
    by_folder, by_file = ModelSpec.from_hf(folder), ModelSpec.from_hf(str(folder / "config.json"))
    assert by_folder == by_file
    assert by_folder.name == "my-llama"
    assert ModelSpec.from_hf(tmp_path / "other.json").name == "other"
    assert ModelSpec.from_hf(LLAMA).name == "llama"
    assert ModelSpec.from_hf(LLAMA, name="my-llama") == by_folder
    assert ModelSpec.from_hf("gpt2").name == "gpt2"


def test_a_model_prints_its_size() -> None:
    """A model's text is one line with its count, depth and widths."""
    assert str(ModelSpec.from_hf("llama-3.1-8b")) == (
        "llama-3.1-8b: 8.03 B parameters, 32 layers, hidden 4096, 32 heads (8 key/value)"
    )
    assert "46.70 B parameters (12.88 B active)" in str(ModelSpec.from_hf("mixtral-8x7b"))
    assert str(ModelSpec.from_hf(LLAMA, name="x")).startswith("x: 13.56 K parameters")
    one = {"vocab_size": 1, "hidden_size": 2, "intermediate_size": 1, "num_attention_heads": 1}
    assert "58 parameters" in str(ModelSpec.from_hf(LLAMA | one | {"num_key_value_heads": 1}))


def test_importing_the_room_loads_no_torch() -> None:
    """The model room is plain data: importing it and reading a preset load neither torch nor transformers."""
    code = (
        "import sys; from picotron.planner import flops, model; model.ModelSpec.from_hf('gpt2'); "
        "sys.exit(int('torch' in sys.modules or 'transformers' in sys.modules))"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


NAN = float("nan")
SIZE_ERRORS = [
    ("hidden_size", value, f"hidden_size must be an integer of at least 1, got {value!r}")
    for value in (0, -4, 24.0, True, "24", None)
]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        *SIZE_ERRORS,
        (
            "hidden_size",
            25,
            "hidden_size must be a multiple of num_attention_heads, got 25 and 6; or give head_dim",
        ),
        ("num_key_value_heads", 4, "num_attention_heads must be a multiple of num_key_value_heads"),
        ("head_dim", 3, "head_dim must be even to be rotated, got 3"),
        ("rms_norm_eps", NAN, "rms_norm_eps must be a positive finite number, got nan"),
        ("rms_norm_eps", 10**400, "rms_norm_eps must be a positive finite number, got 1000"),
        ("hidden_act", "relu", "hidden_act must be one of ('silu', 'swish', 'gelu_new'"),
        ("tie_word_embeddings", "yes", "tie_word_embeddings must be true or false, got 'yes'"),
        ("rope_theta", -1, "rope_theta must be a positive finite number, got -1"),
        ("rope_scaling", {"type": "dynamic", "factor": 2}, "rope_scaling.rope_type must be one of"),
        ("rope_scaling", {"rope_type": "llama3", "factor": 2}, "low_freq_factor must be in the rope_scaling"),
        (
            "rope_scaling",
            LLAMA3_ROPE | {"high_freq_factor": 1},
            "low_freq_factor must be below high_freq_factor",
        ),
        ("rope_scaling", [1], "rope_scaling must be one flat object for all layers, got [1]"),
        ("rope_parameters", {"full_attention": {}}, "rope_parameters must be one flat object for all layers"),
        ("partial_rotary_factor", 0.5, "partial_rotary_factor must be 1.0, got 0.5"),
        ("layer_types", ["sliding_attention"], "layer_types must all be 'full_attention'"),
        ("layer_types", 3, "layer_types must be a list of names, got 3"),
        ("model_type", "qwen4", "model_type must be one of ('llama', 'qwen2', "),
        ("model_type", None, "model_type must be one of"),
    ],
)
def test_impossible_llamas_are_refused_by_key(key: str, value: object, message: str) -> None:
    """A value that no model can have is a PlanError with the key, the rule and the value."""
    with pytest.raises(PlanError) as caught:
        ModelSpec.from_hf(LLAMA | {key: value})
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (
            MIXTRAL,
            {"num_experts_per_tok": 5},
            "num_experts_per_tok must be at most num_local_experts = 4, got 5",
        ),
        (
            MIXTRAL,
            {"sliding_window": 4096},
            "sliding_window must be null, got 4096; sliding-window attention is not",
        ),
        (
            LLAMA,
            {"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True},
            "use_sliding_window must be",
        ),
        (QWEN3_MOE, {"num_experts_per_tok": 5}, "num_experts_per_tok must be at most num_experts = 4, got 5"),
        (QWEN3_MOE, {"mlp_only_layers": "all"}, "mlp_only_layers must be a list of layer indices, got 'all'"),
        (DEEPSEEK, {"scoring_func": "softmax"}, "scoring_func must be 'sigmoid', got 'softmax'"),
        (DEEPSEEK, {"attention_bias": True}, "attention_bias must be False, got True"),
        (DEEPSEEK, {"n_group": 3}, "n_routed_experts must be a multiple of n_group, got 8 and 3"),
        (DEEPSEEK, {"n_group": 8, "topk_group": 8}, "num_groups must leave at least 2 experts a group"),
        (DEEPSEEK, {"topk_group": 3}, "top_k_groups must be at most num_groups = 2, got 3"),
        (DEEPSEEK, {"num_experts_per_tok": 5}, "top_k must be at most the 4 experts to choose from, got 5"),
        (DEEPSEEK, {"num_key_value_heads": 2}, "num_kv_heads must be num_heads = 6 in deepseek_v3, got 2"),
        (DEEPSEEK, {"qk_rope_head_dim": 3}, "qk_rope_head_dim must be even to be rotated, got 3"),
        (GPT2, {"n_head": 5}, "n_embd must be a multiple of n_head, got 24 and 5"),
        (GPT2, {"add_cross_attention": True}, "add_cross_attention must be False, got True; nothing else is"),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx must be False"),
        (GPT2, {"layer_norm_epsilon": 0}, "layer_norm_epsilon must be a positive finite number, got 0"),
    ],
)
def test_impossible_models_are_refused_by_key(
    config: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    """What a family cannot have, or this planner cannot say, is refused by name."""
    with pytest.raises(PlanError) as caught:
        ModelSpec.from_hf(config | changes)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("switch", [{"use_sliding_window": False}, {"sliding_window": None}])
def test_a_window_that_is_switched_off_is_accepted(switch: dict[str, Any]) -> None:
    """Published Qwen configurations name a window that they do not use."""
    qwen2 = LLAMA | {"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True}
    assert ModelSpec.from_hf(qwen2 | switch).family == "qwen2"


def test_a_missing_key_is_named() -> None:
    """An incomplete configuration is refused with the key that is missing and what to do."""
    with pytest.raises(PlanError) as caught:
        ModelSpec.from_hf({"model_type": "llama", "vocab_size": 9})
    assert str(caught.value) == (
        "hidden_size must be in the llama config, got only ['model_type', 'vocab_size']; "
        "take the model's whole config.json"
    )


def test_an_unknown_preset_names_the_near_ones() -> None:
    """A misspelt name is answered with close matches and the list of presets."""
    with pytest.raises(PlanError) as caught:
        ModelSpec.from_hf("Llama-3-8b")
    message = str(caught.value)
    assert "preset or a path to config.json, got 'Llama-3-8b'; did you mean llama-3.1-8b" in message
    assert message.endswith(f"; presets: {', '.join(preset_names())}")
    for nonsense in ("", "\0", "x" * 5000):
        with pytest.raises(PlanError, match="a model must be the name of a preset"):
            ModelSpec.from_hf(nonsense)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    """A file that is absent, not JSON, not text or not an object is a PlanError with its path."""
    with pytest.raises(
        PlanError, match=r"readable, got No such file or directory at '.*absent/config\.json'"
    ):
        ModelSpec.from_hf(tmp_path / "absent" / "config.json")
    with pytest.raises(PlanError, match="readable, got No such file"):
        ModelSpec.from_hf(str(tmp_path))
    for content, message in ((b"{", "must be JSON"), (b"\xff\xfe", "must be JSON"), (b"[1]", "got list in")):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(PlanError, match=message):
            ModelSpec.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("[" * 200_000)
    with pytest.raises(PlanError, match="must be JSON"):
        ModelSpec.from_hf(tmp_path)
    with pytest.raises(PlanError, match=r"a preset's name, a path to config\.json or its dict, got int"):
        ModelSpec.from_hf(7)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (LLAMA, {"num_layers": 0}, "num_layers must be a positive integer, got 0"),
        (LLAMA, {"family": "bert"}, "family must be one of"),
        (LLAMA, {"name": ""}, "name must be a name that is not empty, got ''"),
        (LLAMA, {"experts": {}}, "experts must be None or of Experts, got {}"),
        (LLAMA, {"norm": "layer"}, "norm must be 'rms' in llama, got 'layer'"),
        (LLAMA, {"rope_theta": None}, "rope_theta must be given in llama, got None"),
        (LLAMA, {"num_kv_heads": 5}, "num_heads must be a multiple of num_kv_heads, got 6 and 5"),
        (LLAMA, {"qkv_bias": True}, "output_bias must equal qkv_bias in llama, got False and True"),
        (LLAMA, {"tied_embeddings": 1}, "tied_embeddings must be True or False, got 1"),
        (
            LLAMA,
            {"experts": Experts(num_experts=4, top_k=1, intermediate_size=8)},
            "experts must be None in llama",
        ),
        (GPT2, {"head_dim": 8}, "hidden_size must be num_heads * head_dim = 48 in gpt2, got 24"),
        (
            GPT2,
            {"rope_scaling": RopeScaling(kind="linear", factor=2)},
            "rope_scaling must be None where positions",
        ),
        (DEEPSEEK, {"head_dim": 8}, "head_dim must be qk_nope_head_dim + qk_rope_head_dim = 9, got 8"),
    ],
)
def test_a_model_that_exists_is_valid(config: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    """A field cannot be changed to what the family does not have."""
    with pytest.raises(PlanError) as caught:
        attrs.evolve(ModelSpec.from_hf(config), **changes)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (
            MIXTRAL,
            {"score_function": "sigmoid"},
            "score_function must be 'softmax' in mixtral, got 'sigmoid'",
        ),
        (MIXTRAL, {"dense_layers": (0,)}, "dense_layers must be () in mixtral, got (0,)"),
        (MIXTRAL, {"normalize_scores": False}, "normalize_scores must be True in mixtral, got False"),
        (QWEN3_MOE, {"dense_layers": (2,)}, "dense_layers must be in [0, 2), got (2,)"),
        (QWEN3_MOE, {"dense_layers": (1, 0)}, "dense_layers must be a tuple of ascending layer indices"),
        (QWEN3_MOE, {"routed_scale": 2}, "routed_scale must be 1.0 in qwen3_moe, got 2.0"),
        (DEEPSEEK, {"dense_layers": (1,)}, "dense_layers must be the first ones in deepseek_v3, got (1,)"),
        (DEEPSEEK, {"shared_intermediate_size": 13}, "shared_intermediate_size must be a multiple of"),
        (DEEPSEEK, {"num_groups": 3}, "num_experts must be a multiple of num_groups, got 8 and 3"),
    ],
)
def test_experts_that_exist_are_valid(config: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    """Experts cannot be changed to what the family's router does not do."""
    model = ModelSpec.from_hf(config)
    assert model.experts is not None
    with pytest.raises(PlanError) as caught:
        attrs.evolve(model, experts=attrs.evolve(model.experts, **changes))
    assert str(caught.value).startswith(message)


def test_parts_that_exist_are_valid() -> None:
    """Parameters, segments and scalings check themselves."""
    with pytest.raises(PlanError, match="shape must be a tuple of positive integers"):
        Parameter(name="w", shape=(3, 0), role="column")
    with pytest.raises(PlanError, match="role must be one of"):
        Parameter(name="w", shape=(3,), role="colum")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="layer must be an integer of at least 0, got -1"):
        Segment(kind="mlp", layer=-1)
    with pytest.raises(PlanError, match="original_max_positions must be positive for 'yarn' scaling, got 0"):
        RopeScaling(kind="yarn", factor=4)
