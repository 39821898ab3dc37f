"""Matrix products and FLOPs, against torch's own counter on the transformers models."""

from __future__ import annotations

from typing import Any

import pytest

from picotron.errors import PlanError
from picotron.planner.flops import Matmul, backward_flops, forward_flops, matmuls
from picotron.planner.model import ModelSpec, Segment, segments

BATCH, SEQ_LEN = 2, 11
ROPED = {
    "vocab_size": 97,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
}
SMALL: dict[str, dict[str, Any]] = {
    "llama": ROPED | {"model_type": "llama", "tie_word_embeddings": True},
    "qwen2": ROPED | {"model_type": "qwen2"},
    "qwen3": ROPED | {"model_type": "qwen3"},
    "qwen3_moe": ROPED
    | {
        "model_type": "qwen3_moe",
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "mlp_only_layers": [1],
    },
    "mixtral": ROPED | {"model_type": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 3},
    "deepseek_v3": {key: ROPED[key] for key in ROPED if key not in ("head_dim", "num_key_value_heads")}
    | {
        "model_type": "deepseek_v3",
        "num_key_value_heads": 4,
        "q_lora_rank": 12,
        "kv_lora_rank": 20,
        "qk_nope_head_dim": 10,
        "qk_rope_head_dim": 6,
        "v_head_dim": 14,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
    },
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 97,
        "n_embd": 40,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 32,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
    },
}
SMALL["deepseek_v3, full query"] = SMALL["deepseek_v3"] | {"q_lora_rank": None}


def _eager(config: dict[str, Any]) -> Any:
    """The transformers model with nothing fused, so that the counter sees every product."""
    from transformers import AutoConfig, AutoModelForCausalLM

    keys = {key: value for key, value in config.items() if key != "model_type"}
    hf_config = AutoConfig.for_model(config["model_type"], **keys)
    return AutoModelForCausalLM.from_config(
        hf_config, attn_implementation="eager", experts_implementation="eager"
    )


def _counted(counter: Any) -> int:
    """All FLOPs counted but the rotary embedding's, which are no product of the model.

    Some releases of transformers multiply positions by frequencies as a matrix product: 2 * tokens * rotary
    dimensions / 2. Release 5.23 multiplies elementwise, so there the amount is 0.
    """
    counts = {name: sum(by_operator.values()) for name, by_operator in counter.get_flop_counts().items()}
    return counts["Global"] - sum(count for name, count in counts.items() if name.endswith(".rotary_emb"))


@pytest.mark.parametrize("family", SMALL)
def test_flops_equal_torchs_counter(family: str) -> None:
    """Forward and backward FLOPs equal FlopCounterMode's on the transformers model, to the last one."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    hf_model = _eager(SMALL[family])
    tokens = torch.randint(97, (BATCH, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as forward:
        logits = hf_model(input_ids=tokens, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
    with FlopCounterMode(display=False) as backward:
        loss.backward()

    model = ModelSpec.from_hf(SMALL[family])
    assert forward_flops(model, batch=BATCH, seq_len=SEQ_LEN) == _counted(forward)
    assert backward_flops(model, batch=BATCH, seq_len=SEQ_LEN) == _counted(backward)


def test_gpt2_by_hand() -> None:
    """One sequence of 1024 through gpt2: 24 h^2 s a layer, 4 h s^2 of attention, and the head."""
    s, h, vocab, layers = 1024, 768, 50257, 12
    by_hand = layers * (24 * h * h * s + 4 * h * s * s) + 2 * h * vocab * s
    assert forward_flops(ModelSpec.from_hf("gpt2"), batch=1, seq_len=s) == by_hand


def test_a_matmul_is_two_flops_a_product() -> None:
    """An (m, k) by (k, n) product costs 2*m*n*k, times its batch."""
    assert Matmul(name="scores", m=2, n=3, k=5, batch=7).flops == 420
    with pytest.raises(PlanError, match=r"^k must be a positive integer, got 0$"):
        Matmul(name="scores", m=2, n=3, k=0)


def _segment(model: ModelSpec, kind: str) -> Segment:
    return next(segment for segment in segments(model) if segment.kind == kind)


def test_llama_attention_by_hand() -> None:
    """Names and shapes of llama-3.1-8b's attention on one of four tensor-parallel ranks."""
    model = ModelSpec.from_hf("llama-3.1-8b")
    found = matmuls(model, _segment(model, "attention"), batch=2, seq_len=512, tp=4)
    assert [(a.name, a.m, a.n, a.k, a.batch) for a in found] == [
        ("q_proj", 1024, 1024, 4096, 1),
        ("k_proj", 1024, 256, 4096, 1),
        ("v_proj", 1024, 256, 4096, 1),
        ("scores", 512, 512, 128, 16),
        ("context", 512, 128, 512, 16),
        ("o_proj", 1024, 4096, 1024, 1),
    ]


def test_a_rank_keeps_one_key_value_head() -> None:
    """With more ranks than key/value heads, each computes a whole one."""
    model = ModelSpec.from_hf("llama-3.1-8b")
    by_name = {a.name: a for a in matmuls(model, _segment(model, "attention"), batch=1, seq_len=8, tp=16)}
    assert by_name["k_proj"].n == 128


def test_uneven_shares_are_rounded_up() -> None:
    """A vocabulary or an MLP that tp does not divide costs what its largest part does."""
    model = ModelSpec.from_hf("gpt2")
    (head,) = matmuls(model, _segment(model, "head"), batch=1, seq_len=8, tp=2)
    assert head.n == 25129
    fc, proj = matmuls(model, _segment(model, "mlp"), batch=1, seq_len=8, tp=2)
    assert (fc.name, fc.n, proj.name, proj.k) == ("fc", 1536, "proj", 1536)


def test_moe_by_hand() -> None:
    """DeepSeek-V3's expert layer: a whole router, top-8 rows for the routed, all rows for the shared."""
    model = ModelSpec.from_hf("deepseek-v3")
    found = matmuls(model, _segment(model, "moe"), batch=1, seq_len=16, tp=2)
    assert [(a.name, a.m, a.n, a.k) for a in found] == [
        ("router", 16, 256, 7168),
        ("experts_gate", 128, 1024, 7168),
        ("experts_up", 128, 1024, 7168),
        ("experts_down", 128, 7168, 1024),
        ("shared_gate", 16, 1024, 7168),
        ("shared_up", 16, 1024, 7168),
        ("shared_down", 16, 7168, 1024),
    ]


@pytest.mark.parametrize("seq_len", [1, 2, 7, 8])
def test_causal_counts_the_pairs_the_mask_leaves(seq_len: int) -> None:
    """Causal attention costs s*(s+1)/2 pairs a head instead of s*s, exactly; the rest is unchanged."""
    model = ModelSpec.from_hf(SMALL["llama"])
    attention = _segment(model, "attention")
    full = matmuls(model, attention, batch=3, seq_len=seq_len)
    causal = matmuls(model, attention, batch=3, seq_len=seq_len, attention="causal")
    for a, b in zip(full, causal, strict=True):
        if a.name in ("scores", "context"):
            assert b.flops * 2 * seq_len == a.flops * (seq_len + 1)
        else:
            assert a == b
    pairs = seq_len * (seq_len - 1) // 2
    saved = model.num_layers * 2 * (2 * 3 * model.num_heads * pairs * model.head_dim)
    assert forward_flops(model, batch=3, seq_len=seq_len) - saved == forward_flops(
        model, batch=3, seq_len=seq_len, attention="causal"
    )


def test_the_embedding_multiplies_nothing() -> None:
    """Looking up a table is no matrix product."""
    model = ModelSpec.from_hf("gpt2")
    assert matmuls(model, segments(model)[0], batch=1, seq_len=8) == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 0}, "batch must be a positive integer, got 0"),
        ({"seq_len": 8.0}, "seq_len must be a positive integer, got 8.0"),
        ({"tp": True}, "tp must be a positive integer, got True"),
        ({"tp": 5}, "tp must divide num_heads = 32, got 5"),
        ({"attention": "half"}, "attention must be one of ('full', 'causal'), got 'half'"),
    ],
)
def test_impossible_requests_are_named(arguments: dict[str, Any], message: str) -> None:
    """A size, degree or way of counting that cannot be is refused with its rule and value."""
    model = ModelSpec.from_hf("llama-3.1-8b")
    request: dict[str, Any] = {"batch": 1, "seq_len": 8} | arguments
    with pytest.raises(PlanError) as caught:
        matmuls(model, _segment(model, "attention"), **request)
    assert str(caught.value) == message


def test_key_value_heads_must_be_cut_or_copied_whole() -> None:
    """A tensor-parallel degree that neither divides the key/value heads nor is their multiple is refused."""
    model = ModelSpec.from_hf(
        ROPED | {"model_type": "llama", "num_attention_heads": 12, "num_key_value_heads": 4}
    )
    with pytest.raises(PlanError, match="tp must divide num_kv_heads = 4, or be its multiple, got 6"):
        matmuls(model, _segment(model, "attention"), batch=1, seq_len=8, tp=6)
