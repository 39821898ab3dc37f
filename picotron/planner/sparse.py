"""Bodies of latent attention and of mixture-of-experts segments, with balanced expert loads.

They are priced; the runtime has no kernels for them, so the tensors are those of the algorithms as
published rather than of a checked kernel set. Sources: DeepSeek-AI 2024, DeepSeek-V2, arXiv:2405.04434
(section 2.1, latent attention); Lepikhin et al. 2020, GShard, arXiv:2006.16668 (dispatch and combine).
"""

from __future__ import annotations

from picotron.planner.attention import attend, attend_backward
from picotron.planner.attention_core import Core
from picotron.planner.body import Tensor
from picotron.planner.model import Experts, LatentAttention, ModelSpec
from picotron.planner.operations import Operations
from picotron.planner.products import output_backward, output_projection
from picotron.planner.topology import Topology


def _latent(model: ModelSpec) -> LatentAttention:
    assert model.latent_attention is not None
    return model.latent_attention


def _experts(model: ModelSpec) -> Experts:
    assert model.experts is not None
    return model.experts


def _latent_projections(ops: Operations, model: ModelSpec) -> list[tuple[str, int, int, bool]]:
    """(name, input width, output width, whether its output is kept) of each projection before attention."""
    latent, d = _latent(model), ops.d
    query = d.heads * model.head_dim
    key_value = d.heads * (latent.qk_nope_head_dim + latent.v_head_dim)
    down = latent.kv_lora_rank + latent.qk_rope_head_dim
    if latent.q_lora_rank is None:
        queries = [("q_proj", d.hidden, query, False)]
    else:
        queries = [
            ("q_a_proj", d.hidden, latent.q_lora_rank, True),
            ("q_b_proj", latent.q_lora_rank, query, False),
        ]
    return [
        *queries,
        ("kv_a_proj_with_mqa", d.hidden, down, True),
        ("kv_b_proj", latent.kv_lora_rank, key_value, False),
    ]


def _latent_kept(ops: Operations, model: ModelSpec) -> list[Tensor]:
    """Query, key and value by head, as attention keeps them."""
    d, latent = ops.d, _latent(model)
    sizes = {"q": model.head_dim, "k": model.head_dim, "v": latent.v_head_dim}
    return [ops.saved(name, d.tokens * d.heads * size) for name, size in sizes.items()]


def latent_attention_forward(ops: Operations, model: ModelSpec, topology: Topology) -> None:
    """Multi-head latent attention, forward."""
    d, latent = ops.d, _latent(model)
    source = ops.gathered("gather attention input", ops.norm(model))
    scratch = []
    for name, width, out, kept in _latent_projections(ops, model):
        made = ops.saved(name, d.tokens * out) if kept else ops.tensor(name, d.tokens * out)
        scratch += [] if kept else [made]
        ops.matmul(name, d.tokens, width, out, creates=[made])
    kept_by_head = _latent_kept(ops, model)
    elements = d.tokens * d.heads * (2 * model.head_dim + latent.v_head_dim)
    ops.kernel(
        "rotate and split heads",
        elements,
        passes=3,
        kernels=8,
        creates=kept_by_head,
        frees=[source, *scratch],
    )
    context = ops.saved("context", d.tokens * d.heads * latent.v_head_dim)
    attend(ops, Core(inputs=kept_by_head, context=context, v_dim=latent.v_head_dim))
    output_projection(ops, d.heads * latent.v_head_dim)


def latent_attention_backward(ops: Operations, model: ModelSpec, topology: Topology) -> None:
    """Multi-head latent attention, backward."""
    d, latent = ops.d, _latent(model)
    width = d.heads * latent.v_head_dim
    context, dcontext = ops.saved("context", d.tokens * width), ops.tensor("dcontext", d.tokens * width)
    output_backward(ops, context, width, into="dcontext")
    kept = _latent_kept(ops, model)
    gradients = [Tensor(f"{t.name} gradient", t.bytes, "workspace") for t in kept]
    core = Core(inputs=kept, context=context, gradients=gradients, v_dim=latent.v_head_dim)
    attend_backward(ops, core, dcontext)
    source = ops.gathered("gather attention input", ops.norm_again(model), for_weights=True)
    full = ops.dnormed()
    projections = _latent_projections(ops, model)
    low_rank = {name: ops.saved(name, d.tokens * out) for name, _, out, kept in projections if kept}
    reads = _latent_products(source, low_rank, gradients)
    for index, (name, inner, out, _) in enumerate(reversed(projections)):
        ops.matmul(f"{name} weight", out, d.tokens, inner, reads=reads[name])
        into = [full] if index == 0 else []
        ops.matmul(f"{name} input", d.tokens, out, inner, creates=into)
    ops.kernel("free", 0, kernels=0, frees=[source, *reversed(low_rank.values()), *gradients])
    ops.norm_backward(model, full)


def _latent_products(
    source: Tensor, low_rank: dict[str, Tensor], gradients: list[Tensor]
) -> dict[str, tuple[Tensor, ...]]:
    """What each projection's weight gradient is multiplied from; a low-rank tensor counts its gradient."""
    dq, dk, dv = gradients
    products: dict[str, tuple[Tensor, ...]] = {name: (made, source) for name, made in low_rank.items()}
    products["kv_b_proj"] = dk, dv, low_rank["kv_a_proj_with_mqa"]
    if "q_a_proj" in low_rank:
        products["q_b_proj"] = dq, low_rank["q_a_proj"]
    else:
        products["q_proj"] = dq, source
    return products


def _rows(ops: Operations, model: ModelSpec, topology: Topology) -> int:
    """Token copies that this rank's experts see under balanced loads."""
    return ops.d.local_tokens * _experts(model).top_k * topology.etp


def _exchange_tokens(ops: Operations, name: str, rows: int, topology: Topology) -> None:
    """Token copies to or from the ranks that hold their experts."""
    if topology.ep > 1:
        ops.collective("all_to_all", name, rows * ops.d.hidden * ops.d.itemsize, group="ep")
    if topology.etp > 1:
        kind = "reduce_scatter" if name.startswith("combine") else "all_gather"
        ops.collective(kind, f"{name} over etp", rows * ops.d.hidden * ops.d.itemsize, group="etp")


def _moe_kept(ops: Operations, model: ModelSpec, topology: Topology) -> list[Tensor]:
    d, experts = ops.d, _experts(model)
    rows, inner = _rows(ops, model, topology), experts.intermediate_size // topology.etp
    kept = [
        ops.saved("scores", d.local_tokens * experts.num_experts, itemsize=d.statistics_itemsize),
        ops.saved("dispatched", rows * d.hidden),
        ops.saved("expert gate", rows * inner),
        ops.saved("expert up", rows * inner),
        ops.saved("expert output", rows * d.hidden),
    ]
    shared = experts.shared_intermediate_size // d.tp
    if shared:
        kept += [ops.saved(f"shared {name}", d.tokens * shared) for name in ("gate", "up")]
    return kept


def moe_forward(ops: Operations, model: ModelSpec, topology: Topology) -> None:
    """Router, dispatch, experts, combine and shared experts, forward."""
    d, experts = ops.d, _experts(model)
    rows, inner = _rows(ops, model, topology), experts.intermediate_size // topology.etp
    scores, dispatched, gate, up, output, *shared = _moe_kept(ops, model, topology)
    normed = ops.norm(model)
    ops.matmul("router", d.local_tokens, d.hidden, experts.num_experts, creates=[scores])
    ops.kernel("permute", rows * d.hidden, kernels=6, creates=[dispatched])
    _exchange_tokens(ops, "dispatch", rows, topology)
    product = ops.tensor("expert product", rows * inner)
    ops.matmul("experts gate", rows, d.hidden, inner, creates=[gate])
    ops.matmul("experts up", rows, d.hidden, inner, creates=[up])
    ops.kernel("experts swiglu", rows * inner, passes=5, kernels=2, creates=[product])
    ops.matmul("experts down", rows, inner, d.hidden, creates=[output], frees=[product])
    _exchange_tokens(ops, "combine", rows, topology)
    y = ops.x(1)
    ops.kernel("unpermute", rows * d.hidden, passes=3, kernels=3, creates=[y])
    if shared:
        _shared_forward(ops, experts.shared_intermediate_size // d.tp, normed, shared)
    ops.kernel("residual", d.local_tokens * d.hidden, passes=3, frees=[normed])


def _shared_forward(ops: Operations, inner: int, normed: Tensor, kept: list[Tensor]) -> None:
    d = ops.d
    source = ops.gathered("gather shared input", normed, keep=True)
    product, partial = (
        ops.tensor("shared product", d.tokens * inner),
        ops.tensor("partial", d.tokens * d.hidden),
    )
    for name, made in zip(("gate", "up"), kept, strict=True):
        ops.matmul(f"shared {name}", d.tokens, d.hidden, inner, creates=[made])
    frees = [source] if d.sequence_parallel else []
    ops.kernel("shared swiglu", d.tokens * inner, passes=5, kernels=2, creates=[product], frees=frees)
    ops.matmul("shared down", d.tokens, inner, d.hidden, creates=[partial], frees=[product])
    local = ops.tensor("shared output", d.local_tokens * d.hidden)
    ops.reduced("reduce shared output", partial, local)
    ops.kernel(
        "add shared", d.local_tokens * d.hidden, passes=3, frees=[local if d.sequence_parallel else partial]
    )


def moe_backward(ops: Operations, model: ModelSpec, topology: Topology) -> None:
    """Combine, experts, dispatch, router and shared experts, backward."""
    d, experts = ops.d, _experts(model)
    rows, inner = _rows(ops, model, topology), experts.intermediate_size // topology.etp
    scores, dispatched, gate, up, output, *shared = _moe_kept(ops, model, topology)
    doutput, product, dproduct = (
        ops.tensor("expert doutput", rows * d.hidden),
        ops.tensor("expert product", rows * inner),
        ops.tensor("expert dproduct", rows * inner),
    )
    ops.kernel("unpermute backward", rows * d.hidden, passes=4, kernels=4, creates=[doutput], frees=[output])
    _exchange_tokens(ops, "dispatch gradient", rows, topology)
    ops.kernel("experts swiglu again", rows * inner, passes=5, kernels=2, creates=[product])
    ops.matmul("experts down weight", inner, rows, d.hidden, frees=[product], reads=[doutput, product])
    ops.matmul("experts down input", rows, d.hidden, inner, creates=[dproduct], frees=[doutput])
    dgate = ops.tensor("expert dgate", rows * inner)
    ops.kernel(
        "experts swiglu gradient", rows * inner, passes=9, kernels=3, creates=[dgate], frees=[gate, up]
    )
    dup = dproduct  # the gradient of up takes its place
    drows = ops.tensor("dispatched gradient", rows * d.hidden)
    for name, gradient in (("gate", dgate), ("up", dup)):
        ops.matmul(f"experts {name} weight", inner, rows, d.hidden, reads=[gradient, dispatched])
    ops.matmul("experts gate input", rows, inner, d.hidden, creates=[drows])
    ops.matmul("experts up input", rows, inner, d.hidden, frees=[dgate, dup, dispatched])
    _exchange_tokens(ops, "combine gradient", rows, topology)
    normed, part = ops.norm_again(model), ops.tensor("dnormed_local", d.local_tokens * d.hidden)
    ops.kernel("permute backward", rows * d.hidden, passes=3, kernels=3, creates=[part], frees=[drows])
    ops.matmul("router weight", experts.num_experts, d.local_tokens, d.hidden, reads=[scores, normed])
    ops.matmul("router input", d.local_tokens, experts.num_experts, d.hidden, frees=[scores])
    if shared:
        _shared_backward(ops, experts.shared_intermediate_size // d.tp, normed, shared)
    size = d.local_tokens * d.hidden
    ops.kernel("norm backward", size, passes=16, kernels=7, creates=[ops.g()], frees=[normed, part])
    ops.kernel("residual gradient", size, passes=3, frees=[ops.x(), *ops.statistics(model), ops.g(1)])


def _shared_backward(ops: Operations, inner: int, normed: Tensor, kept: list[Tensor]) -> None:
    d = ops.d
    full = ops.gathered("gather shared gradient", ops.g(1), keep=True)
    source = ops.gathered("gather shared input", normed, keep=True, for_weights=True)
    product, dproduct, dgate = (
        ops.tensor(f"shared {n}", d.tokens * inner) for n in ("product", "dproduct", "dgate")
    )
    ops.kernel("shared swiglu again", d.tokens * inner, passes=5, kernels=2, creates=[product])
    ops.matmul("shared down weight", inner, d.tokens, d.hidden, frees=[product], reads=[full, product])
    frees = [full] if d.sequence_parallel else []
    ops.matmul("shared down input", d.tokens, d.hidden, inner, creates=[dproduct], frees=frees)
    ops.kernel("shared swiglu gradient", d.tokens * inner, passes=9, kernels=3, creates=[dgate], frees=kept)
    dup = dproduct  # the gradient of up takes its place
    for name, gradient in (("gate", dgate), ("up", dup)):
        ops.matmul(f"shared {name} weight", inner, d.tokens, d.hidden, reads=[gradient, source])
    partial, local = (
        ops.tensor("partial", d.tokens * d.hidden),
        ops.tensor("shared dnormed", d.local_tokens * d.hidden),
    )
    frees = [source] if d.sequence_parallel else []
    ops.matmul("shared gate input", d.tokens, inner, d.hidden, creates=[partial], frees=frees)
    ops.matmul("shared up input", d.tokens, inner, d.hidden, frees=[dgate, dup])
    ops.reduced("reduce shared gradient", partial, local)
    ops.kernel(
        "add shared gradient", d.local_tokens * d.hidden, frees=[local if d.sequence_parallel else partial]
    )
