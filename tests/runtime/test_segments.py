"""Each segment's forward and backward are autograd's over plain torch, in fp64, on one rank and on many."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

from picotron.planner.plan import TrainingPlan
from picotron.planner.stage import stage_bodies
from picotron.runtime.backend import Backend
from picotron.runtime.data import DeviceTokens
from picotron.runtime.pipeline import Session
from picotron.runtime.segments import Embedding, FusedAttention, GatedMlp, Head, PlainMlp, SplitAttention
from picotron.runtime.simulated import simulate
from tests.runtime.models import FAMILIES, random_weights, tiny_model, tiny_plan, tiny_workload
from tests.runtime.phases import tokens, walk

Weights = dict[str, torch.Tensor]
BATCH, SEQ_LEN = 2, 8
BIASED = [("llama", {"attention_bias": True, "mlp_bias": True}), ("qwen3", {"attention_bias": True})]
DECODERS = [*((family, {}) for family in FAMILIES), *BIASED]
SPLIT_ORDERS = [
    "F0 I0 W0",
    "F0 F1 I0 F2 W0 I1 W1 I2 W2",
    "F0 F1 F2 I0 I1 I2 W2 W0 W1",
    "F0 I0 F1 B1 F2 I2 W2 W0",
]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


def planned(
    family: str, *, tp: int = 1, sequence_parallel: bool = False, tensor_overlap: str = "none", **config: Any
) -> TrainingPlan:
    work = tiny_workload(global_batch=BATCH, seq_len=SEQ_LEN)
    parallel = {"tp": tp, "sequence_parallel": sequence_parallel, "micro_batch": BATCH}
    parallel["tensor_overlap"] = tensor_overlap
    return tiny_plan(tiny_model(family, **config), work, **parallel)


def segment_of(made: TrainingPlan, number: int, x: torch.Tensor, dy: torch.Tensor) -> dict[str, Any]:
    """One segment alone on every rank of ``made``, put together: y, dx, loss sum and whole weight gradients.

    ``x`` and ``dy`` hold all tokens.
    """
    sharded = made.sequence_parallel

    def part(tensor: torch.Tensor, rank: int) -> torch.Tensor:
        return tensor.chunk(made.topology.tp)[rank].clone() if sharded else tensor.clone()

    def main(backend: Backend) -> tuple[torch.Tensor, torch.Tensor, float, Weights]:
        session, runner = (s := Session(made, backend, random_weights)), s.runners[number]
        bodies = stage_bodies(made.model, made.topology, 0, made.stage_segments[0], made.dims(backend.rank))
        session.statistics[2] = tokens(BATCH, SEQ_LEN).num_valid
        with torch.no_grad():
            session.communicator.open("F", 0, bodies.forward.segments[number].collectives)
            batch = DeviceTokens(tokens(BATCH, SEQ_LEN), backend.device)
            y, saved = runner.forward(part(x, backend.rank), batch)
            session.communicator.close()
            session.communicator.open("B", 0, bodies.backward.segments[-1 - number].collectives)
            dx = runner.backward(saved, part(dy, backend.rank))
            session.communicator.close()
        gradients = {name: gradient.clone() for name, gradient in session.gradients.items()}
        return y, dx, float(session.statistics[1]), gradients

    found = simulate(main, made.topology.world_size)
    whole = (lambda parts: torch.cat(parts)) if sharded else (lambda parts: parts[0])
    return {
        "y": whole([rank[0] for rank in found]),
        "dx": whole([rank[1] for rank in found]),
        "loss_sum": found[0][2],
        "gradients": found[0][3],
    }


def weights_of(made: TrainingPlan) -> Weights:
    return {placement.name: random_weights(placement) for placement in made.layout}


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight


def turned(x: torch.Tensor) -> torch.Tensor:
    """X [batch, s, heads, 6] rotated by its positions, theta 10000, the angles in fp32."""
    exponent = torch.tensor([0.0, 2.0, 4.0]) / 6
    angles = (torch.arange(SEQ_LEN).float()[:, None] * (1.0 / 10000.0**exponent))[:, None]
    first, second = x.chunk(2, dim=-1)
    cosine, sine = angles.cos().double(), angles.sin().double()
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of [batch, s, heads, d]; key/value heads are repeated for their group."""
    k, v = (part.repeat_interleave(q.shape[2] // part.shape[2], dim=2) for part in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    future = torch.ones(SEQ_LEN, SEQ_LEN, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -math.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2).flatten(0, 1)


def split_attention(x: torch.Tensor, w: Weights) -> torch.Tensor:
    """A layer's attention with separate projections; biases and head norms where there are any."""
    at = "model.layers.0."
    normed = rms(x, w[f"{at}input_layernorm.weight"])

    def project(name: str, source: torch.Tensor) -> torch.Tensor:
        return functional.linear(
            source, w[f"{at}self_attn.{name}.weight"], w.get(f"{at}self_attn.{name}.bias")
        )

    q, k, v = (project(f"{name}_proj", normed).view(BATCH, SEQ_LEN, -1, 6) for name in "qkv")
    if f"{at}self_attn.q_norm.weight" in w:
        q, k = rms(q, w[f"{at}self_attn.q_norm.weight"]), rms(k, w[f"{at}self_attn.k_norm.weight"])
    return x + project("o_proj", attend(turned(q), turned(k), v))


def gated_mlp(x: torch.Tensor, w: Weights) -> torch.Tensor:
    """A layer's gated MLP."""
    at = "model.layers.0."
    normed = rms(x, w[f"{at}post_attention_layernorm.weight"])

    def project(name: str, source: torch.Tensor) -> torch.Tensor:
        return functional.linear(source, w[f"{at}mlp.{name}.weight"], w.get(f"{at}mlp.{name}.bias"))

    gate = project("gate_proj", normed)
    return x + project("down_proj", gate * torch.sigmoid(gate) * project("up_proj", normed))


def layer_norm(x: torch.Tensor, w: Weights, name: str) -> torch.Tensor:
    return functional.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)


def conv(x: torch.Tensor, w: Weights, name: str) -> torch.Tensor:
    return x @ w[f"{name}.weight"] + w[f"{name}.bias"]


def fused_attention(x: torch.Tensor, w: Weights) -> torch.Tensor:
    """A gpt2 layer's attention."""
    at = "transformer.h.0."
    fused = conv(layer_norm(x, w, f"{at}ln_1"), w, f"{at}attn.c_attn")
    parts = [part.view(BATCH, SEQ_LEN, -1, 6) for part in fused.chunk(3, dim=-1)]
    return x + conv(attend(*parts), w, f"{at}attn.c_proj")


def plain_mlp(x: torch.Tensor, w: Weights) -> torch.Tensor:
    """A gpt2 layer's MLP."""
    at = "transformer.h.0."
    fc = conv(layer_norm(x, w, f"{at}ln_2"), w, f"{at}mlp.c_fc")
    active = 0.5 * fc * (1 + torch.tanh(math.sqrt(2 / math.pi) * (fc + 0.044715 * fc**3)))
    return x + conv(active, w, f"{at}mlp.c_proj")


BLOCKS: dict[str, tuple[str, int, Callable[[torch.Tensor, Weights], torch.Tensor], dict[str, Any]]] = {
    "llama attention": ("llama", 1, split_attention, {}),
    "llama attention with biases": ("llama", 1, split_attention, {"attention_bias": True}),
    "qwen2 attention": ("qwen2", 1, split_attention, {}),
    "qwen3 attention": ("qwen3", 1, split_attention, {}),
    "gpt2 attention": ("gpt2", 1, fused_attention, {}),
    "llama mlp": ("llama", 2, gated_mlp, {}),
    "llama mlp with biases": ("llama", 2, gated_mlp, {"mlp_bias": True}),
    "gpt2 mlp": ("gpt2", 2, plain_mlp, {}),
}
TENSOR_PARALLEL = [(1, False), (2, False), (2, True), (4, True)]
tensor_parallel = pytest.mark.parametrize(
    ("tp", "sequence_parallel"), TENSOR_PARALLEL, ids=["one", "tp2", "tp2-sp", "tp4-sp"]
)


@tensor_parallel
@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_is_autograds(block: str, tp: int, sequence_parallel: bool) -> None:
    """Output and input gradient of attention and MLP, whole or put together from tensor-parallel ranks."""
    family, number, formula, config = BLOCKS[block]
    made = planned(family, tp=tp, sequence_parallel=sequence_parallel, **config)
    x, dy = random(BATCH * SEQ_LEN, 24), random(BATCH * SEQ_LEN, 24, seed=1)
    leaves = {name: tensor.requires_grad_() for name, tensor in weights_of(made).items()}
    y = formula(leaf := x.clone().requires_grad_(), leaves)
    y.backward(dy)
    found = segment_of(made, number, x, dy)
    close(found["y"], y.detach())
    close(found["dx"], leaf.grad)
    if tp == 1:
        for name, tensor in leaves.items():
            expected = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            close(found["gradients"][name], expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@tensor_parallel
def test_the_embedding_looks_up_and_adds_up(family: str, tp: int, sequence_parallel: bool) -> None:
    """Each token's row of the table, with its position's where they are learned; a row's gradients add up."""
    made = planned(family, tp=tp, sequence_parallel=sequence_parallel)
    w = weights_of(made)
    ids = torch.from_numpy(tokens(BATCH, SEQ_LEN).ids).flatten()
    name = "model.embed_tokens.weight" if family == "llama" else "transformer.wte.weight"
    expected = w[name][ids]
    if family == "gpt2":
        expected = expected + w["transformer.wpe.weight"][torch.arange(SEQ_LEN).repeat(BATCH)]
    dy = random(BATCH * SEQ_LEN, 24)
    found = segment_of(made, 0, torch.empty(0, dtype=torch.float64), dy)
    close(found["y"], expected)
    if tp == 1:
        close(found["gradients"][name], torch.zeros_like(w[name]).index_add(0, ids, dy))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@tensor_parallel
def test_the_head_is_autograds_cross_entropy(tied: bool, tp: int, sequence_parallel: bool) -> None:
    """Loss summed over labelled tokens; the gradient is that of the mean over the step's labelled tokens."""
    made = planned("llama", tied=tied, tp=tp, sequence_parallel=sequence_parallel)
    w, last = weights_of(made), len(made.stage_segments[0]) - 1
    x = random(BATCH * SEQ_LEN, 24)
    table = w["model.embed_tokens.weight" if tied else "lm_head.weight"].requires_grad_()
    logits = rms(leaf := x.clone().requires_grad_(), w["model.norm.weight"]) @ table.T
    labels = torch.from_numpy(tokens(BATCH, SEQ_LEN).targets).flatten()
    loss_sum = functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    (loss_sum / tokens(BATCH, SEQ_LEN).num_valid).backward()
    found = segment_of(made, last, x, torch.empty(0, dtype=torch.float64))
    assert found["loss_sum"] == pytest.approx(float(loss_sum.detach()), rel=1e-12)
    close(found["dx"], leaf.grad)
    if tp == 1:
        close(found["gradients"]["model.embed_tokens.weight" if tied else "lm_head.weight"], table.grad)


def test_equal_logits_lose_the_logarithm_of_the_vocabulary() -> None:
    """A head of zeros guesses: every labelled token loses ln 67."""
    made = planned("llama")

    def main(backend: Backend) -> float:
        session = Session(
            made, backend, lambda p: torch.zeros(p.shape) if "lm_head" in p.name else random_weights(p)
        )
        return session.step([tokens(BATCH, SEQ_LEN)]).loss

    assert simulate(main, 1)[0] == pytest.approx(math.log(67), rel=1e-12)


def test_large_logits_do_not_overflow() -> None:
    """Logits in the thousands give the finite loss that fp64 log-sum-exp gives."""
    made = planned("llama")

    def main(backend: Backend) -> tuple[float, float]:
        session = Session(made, backend, lambda p: random_weights(p) * (1e4 if "lm_head" in p.name else 1))
        head, saved = session.runners[-1], {}
        assert isinstance(head, Head)
        x, labels = random(BATCH * SEQ_LEN, 24), torch.from_numpy(tokens(BATCH, SEQ_LEN).targets).flatten()
        with torch.no_grad():
            logits = head.logits(x, saved)
            session.statistics[2] = tokens(BATCH, SEQ_LEN).num_valid
            head.forward(x, DeviceTokens(tokens(BATCH, SEQ_LEN), backend.device))
        expected = functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        return float(session.statistics[1]), float(expected)

    found, expected = simulate(main, 1)[0]
    assert found == pytest.approx(expected, rel=1e-12)
    assert math.isfinite(found)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_plan_segment_has_its_runner(family: str) -> None:
    """Embedding, then attention and MLP of the family for each layer, then the head."""
    made = planned(family)
    kinds = simulate(lambda backend: [type(r) for r in Session(made, backend).runners], 1)[0]
    block = [SplitAttention, GatedMlp] if family == "llama" else [FusedAttention, PlainMlp]
    assert kinds == [Embedding, *block, *block, Head]


every_decoder = pytest.mark.parametrize(
    ("family", "config"), DECODERS, ids=[*FAMILIES, "llama with biases", "qwen3 with biases"]
)
every_cut = pytest.mark.parametrize(
    ("tp", "sequence_parallel"), [(1, False), (2, False), (2, True)], ids=["one", "tp2", "tp2-sp"]
)


@every_decoder
@every_cut
def test_the_halves_of_a_backward_add_up_to_the_whole(
    family: str, config: dict[str, Any], tp: int, sequence_parallel: bool
) -> None:
    """To the last bit where W follows in the order of I, with a tied table too."""
    made = planned(family, tp=tp, sequence_parallel=sequence_parallel, tied=True, **config)
    whole = walk(made, "F0 B0 F1 B1")
    halves = walk(made, "F0 F1 I0 I1 W0 W1")
    for rank in range(tp):
        assert whole[rank].gradients.keys() == halves[rank].gradients.keys()
        for name, gradient in whole[rank].gradients.items():
            assert torch.equal(gradient, halves[rank].gradients[name]), name


@every_decoder
@every_cut
@pytest.mark.parametrize("order", SPLIT_ORDERS)
def test_weight_gradients_may_wait_and_take_what_is_planned(
    order: str, family: str, config: dict[str, Any], tp: int, sequence_parallel: bool
) -> None:
    """Gradients are those of full backwards; each segment leaves the planned bytes and peaks at them."""
    made = planned(family, tp=tp, sequence_parallel=sequence_parallel, **config)
    numbers = sorted({action[1:] for action in order.split()})
    whole = walk(made, " ".join(f"F{number} B{number}" for number in numbers))
    for reference, found in zip(whole, walk(made, order), strict=True):
        assert found.measured == found.planned
        for name, gradient in found.gradients.items():
            torch.testing.assert_close(gradient, reference.gradients[name], rtol=1e-12, atol=1e-14)


@every_decoder
def test_chunks_of_an_input_take_what_is_planned(family: str, config: dict[str, Any]) -> None:
    """Gradients are those of an input gathered whole; each segment leaves and peaks at the planned bytes."""
    whole, cut = (
        planned(family, tp=2, sequence_parallel=True, tensor_overlap=way, **config)
        for way in ("none", "chunked")
    )
    for order in ("F0 B0", "F0 I0 W0"):
        for reference, found in zip(walk(whole, order), walk(cut, order), strict=True):
            assert found.measured == found.planned
            for name, gradient in found.gradients.items():
                torch.testing.assert_close(gradient, reference.gradients[name], rtol=1e-10, atol=1e-12)


def test_what_a_gated_mlp_leaves_for_its_weights() -> None:
    """Three products: the saved one with dy, and two with the norm, whose input and statistics stay."""
    made = planned("llama")
    x, dy = random(BATCH * SEQ_LEN, 24), random(BATCH * SEQ_LEN, 24, seed=1)

    def main(backend: Backend) -> tuple[set[str], list[tuple[str, tuple[int, ...], bool]], bool, Any]:
        runner = Session(made, backend, random_weights).runners[2]
        with torch.no_grad():
            _, saved = runner.forward(x, DeviceTokens(tokens(BATCH, SEQ_LEN), backend.device))
            runner.backward_input(saved, dy)
            found = [(name, tuple(left.shape), right is None) for name, left, right in saved["products"]]
            keys, same = set(saved), saved["products"][0][1] is dy
            runner.backward_weight(saved)
        return keys, found, same, saved

    assert simulate(main, 1)[0] == (
        {"x", "statistics", "products"},
        [
            ("down_proj.weight", (16, 24), False),
            ("gate_proj.weight", (16, 16), True),
            ("up_proj.weight", (16, 16), True),
        ],
        True,
        {},
    )


def test_weight_gradients_touch_weights_alone() -> None:
    """I adds every norm's and bias's gradient and no other; W those of the matrices and tables."""
    made = planned("gpt2")
    before, after = (walk(made, order, finish=False)[0].gradients for order in ("F0 I0", "F0 I0 W0"))
    small = {name for name, gradient in after.items() if gradient.dim() == 1}
    assert small < set(after)
    for name, gradient in before.items():
        expected = after[name] if name in small else torch.zeros_like(gradient)
        assert torch.equal(gradient, expected), name
