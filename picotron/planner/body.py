"""What happens inside one (stage, phase): segments, their operations, and the tensors they make and free.

A body is shared by all microbatches. Each operation says what it computes (FLOPs, bytes moved), what it
communicates (group and payload) and which tensors are born and die with it, so that cost, memory and the
order of collectives are all read from one list. The kernel set described is *eager*: the operations that
the runtime's own layers run, one tensor library call at a time, with flash attention.

Names: ``i.x`` is the input of segment i, ``i.g`` its gradient; other tensors carry the segment's index.
The tensors between segments hold ``local_tokens`` tokens: a tensor-parallel share of them under sequence
parallelism (Korthikanti et al. 2022, arXiv:2205.05198), else all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np
from attrs import field, frozen

from picotron.errors import PlanError
from picotron.planner.layout import even_ranges
from picotron.planner.model import ModelSpec, Segment
from picotron.planner.topology import Topology

Category = Literal["parameters", "gradients", "optimizer", "constants", "data", "activations", "workspace", "buffers"]
CATEGORIES: tuple[Category, ...] = (
    "parameters",
    "gradients",
    "optimizer",
    "constants",
    "data",
    "activations",
    "workspace",
    "buffers",
)
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "exchange")
INDEX_BYTES = 8  # token ids and labels are int64


@frozen
class Tensor:
    """A buffer that a body makes or frees."""

    name: str
    bytes: int
    category: Category = "activations"


@frozen(kw_only=True)
class Operation:
    """One step of a segment.

    ``creates`` are live while it runs; ``frees`` die when it has. ``payload_bytes`` of a collective is what
    one rank hands over: the tensor (all_reduce), the whole output (all_gather) or the whole input.
    """

    name: str
    kind: str  # "matmul" | "attention" | "kernel" | one of COLLECTIVES
    flops: int = 0
    moved_bytes: int = 0
    kernels: int = 1
    group: str = ""
    payload_bytes: int = 0
    creates: tuple[Tensor, ...] = ()
    frees: tuple[Tensor, ...] = ()


@frozen(kw_only=True)
class SegmentBody:
    """The operations of one segment in one phase."""

    name: str
    operations: tuple[Operation, ...]
    collectives: tuple[Operation, ...] = field(init=False, repr=False, eq=False)

    @collectives.default
    def _collectives(self) -> tuple[Operation, ...]:
        return tuple(operation for operation in self.operations if operation.kind in COLLECTIVES)


@frozen(kw_only=True)
class Body:
    """The segments of one stage in one phase, in the order in which they run."""

    stage: int
    phase: str  # "F" or "B"
    segments: tuple[SegmentBody, ...]

    @property
    def flops(self) -> int:
        """FLOPs of one microbatch."""
        return sum(operation.flops for segment in self.segments for operation in segment.operations)


@frozen(kw_only=True)
class Dims:
    """Sizes on one rank, in elements; what every operation below is a product of."""

    batch: int
    seq_len: int  # tokens of one sequence on this rank
    context: int  # ranks that share a sequence
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tp: int
    sequence_parallel: bool
    itemsize: int

    @property
    def tokens(self) -> int:
        """Tokens of a microbatch on this rank's tensor-parallel group."""
        return self.batch * self.seq_len

    @property
    def local_tokens(self) -> int:
        """Tokens in the tensors between segments."""
        return self.tokens // self.tp if self.sequence_parallel else self.tokens

    @property
    def full_bytes(self) -> int:
        """A hidden-size tensor of all tokens."""
        return self.tokens * self.hidden * self.itemsize

    @property
    def local_bytes(self) -> int:
        """A hidden-size tensor as it stands between segments."""
        return self.local_tokens * self.hidden * self.itemsize

    @property
    def statistics_itemsize(self) -> int:
        """Bytes of a softmax statistic: never below fp32."""
        return max(4, self.itemsize)


def dims(
    model: ModelSpec,
    topology: Topology,
    *,
    micro_batch: int,
    seq_len: int,
    sequence_parallel: bool,
    itemsize: int,
    tp_index: int = 0,
) -> Dims:
    """The local sizes at ``tp_index``. Raises PlanError where tokens cannot be cut evenly."""
    tp, cp = topology.tp, topology.cp
    if seq_len % cp:
        raise PlanError(f"cp must divide seq_len {seq_len}, got cp={cp}")
    tokens = micro_batch * seq_len // cp
    if sequence_parallel and tokens % tp:
        raise PlanError(
            f"sequence parallelism needs tp to divide the {tokens} tokens of a microbatch, got tp={tp}; "
            "change micro_batch or seq_len, or plan with sequence_parallel=False"
        )
    first, stop = even_ranges(model.vocab_size, tp)[tp_index]
    return Dims(
        batch=micro_batch,
        seq_len=seq_len // cp,
        context=cp,
        hidden=model.hidden_size,
        heads=model.num_heads // tp,
        kv_heads=max(1, model.num_kv_heads // tp),
        head_dim=model.head_dim,
        intermediate=model.intermediate_size // tp,
        vocab=stop - first,
        tp=tp,
        sequence_parallel=sequence_parallel,
        itemsize=itemsize,
    )


def forward_body(model: ModelSpec, topology: Topology, stage: int, own: tuple[Segment, ...], d: Dims) -> Body:
    """Forward of one microbatch through the segments ``own`` of ``stage``."""
    bodies = []
    for index, segment in enumerate(own):
        ops = _Ops(d, index)
        _FORWARD[_variant(model, segment)](ops, model, topology)
        bodies.append(SegmentBody(name=_segment_name(segment), operations=tuple(ops.operations)))
    return Body(stage=stage, phase="F", segments=tuple(bodies))


def backward_body(model: ModelSpec, topology: Topology, stage: int, own: tuple[Segment, ...], d: Dims) -> Body:
    """Full backward of one microbatch, last segment first."""
    bodies = []
    for index, segment in reversed(list(enumerate(own))):
        ops = _Ops(d, index)
        _BACKWARD[_variant(model, segment)](ops, model, topology)
        bodies.append(SegmentBody(name=_segment_name(segment), operations=tuple(ops.operations)))
    return Body(stage=stage, phase="B", segments=tuple(bodies))


def collective_bytes(body: Body) -> dict[tuple[str, str], int]:
    """Payload of one microbatch by (kind, group)."""
    totals: dict[tuple[str, str], int] = {}
    for segment in body.segments:
        for operation in segment.collectives:
            key = operation.kind, operation.group
            totals[key] = totals.get(key, 0) + operation.payload_bytes
    return totals


def segment_memory(segment: SegmentBody) -> tuple[np.ndarray, np.ndarray]:
    """What the segment leaves, and what stands at its highest moment, by category, in bytes over its start."""
    live = np.zeros(len(CATEGORIES), dtype=np.int64)
    peak = live.copy()
    for operation in segment.operations:
        _add(live, operation.creates, 1)
        if live.sum() > peak.sum():
            peak = live.copy()
        _add(live, operation.frees, -1)
    return live, peak


def _add(live: np.ndarray, tensors: Iterable[Tensor], sign: int) -> None:
    for tensor in tensors:
        live[CATEGORIES.index(tensor.category)] += sign * tensor.bytes


def _segment_name(segment: Segment) -> str:
    return segment.kind if segment.layer is None else f"{segment.kind} {segment.layer}"


def _variant(model: ModelSpec, segment: Segment) -> str:
    if segment.kind == "attention":
        if model.latent_attention is not None:
            return "latent attention"
        return "fused attention" if any(p.role == "fused_qkv" for p in segment.parameters) else "attention"
    if segment.kind == "mlp":
        return "gated mlp" if model.gated_mlp else "plain mlp"
    return segment.kind


class _Ops:
    """Collects the operations of one segment; keeps what is alive so that a free knows its bytes."""

    def __init__(self, d: Dims, index: int) -> None:
        self.d, self.index = d, index
        self.operations: list[Operation] = []

    def x(self, offset: int = 0) -> Tensor:
        """The tensor that enters (or, with offset 1, leaves) this segment."""
        return Tensor(f"{self.index + offset}.x", self.d.local_bytes, "activations")

    def g(self, offset: int = 0) -> Tensor:
        """Its gradient."""
        return Tensor(f"{self.index + offset}.g", self.d.local_bytes, "workspace")

    def tensor(self, name: str, elements: int, category: Category = "workspace", itemsize: int = 0) -> Tensor:
        return Tensor(f"{self.index}.{name}", elements * (itemsize or self.d.itemsize), category)

    def saved(self, name: str, elements: int, itemsize: int = 0) -> Tensor:
        return self.tensor(name, elements, "activations", itemsize)

    def matmul(
        self, name: str, m: int, k: int, n: int, *, batch: int = 1, creates: Iterable[Tensor] = (), frees: Iterable[Tensor] = ()
    ) -> None:
        """[m, k] @ [k, n], ``batch`` times."""
        self.operations.append(
            Operation(
                name=name,
                kind="matmul",
                flops=2 * m * k * n * batch,
                moved_bytes=(m * k + k * n + m * n) * batch * self.d.itemsize,
                creates=tuple(creates),
                frees=tuple(frees),
            )
        )

    def kernel(
        self,
        name: str,
        elements: int,
        *,
        passes: int = 2,
        kernels: int = 1,
        creates: Iterable[Tensor] = (),
        frees: Iterable[Tensor] = (),
    ) -> None:
        """A memory-bound step that reads or writes ``elements`` ``passes`` times in all."""
        self.operations.append(
            Operation(
                name=name,
                kind="kernel",
                moved_bytes=elements * passes * self.d.itemsize,
                kernels=kernels,
                creates=tuple(creates),
                frees=tuple(frees),
            )
        )

    def collective(
        self,
        kind: str,
        name: str,
        payload_bytes: int,
        *,
        group: str = "tp",
        creates: Iterable[Tensor] = (),
        frees: Iterable[Tensor] = (),
    ) -> None:
        self.operations.append(
            Operation(
                name=name,
                kind=kind,
                kernels=0,
                group=group,
                payload_bytes=payload_bytes,
                creates=tuple(creates),
                frees=tuple(frees),
            )
        )

    def gathered(self, name: str, local: Tensor, *, keep: bool = False) -> Tensor:
        """All tokens of ``local``: gathered under sequence parallelism, else ``local`` itself."""
        if not self.d.sequence_parallel:
            return local
        full = self.tensor(name, self.d.tokens * self.d.hidden)
        self.collective("all_gather", name, full.bytes, creates=[full], frees=[] if keep else [local])
        return full

    def reduced(self, name: str, full: Tensor, local: Tensor) -> None:
        """Sum ``full`` over tp into ``local`` (the same tensor without sequence parallelism)."""
        if self.d.sequence_parallel:
            self.collective("reduce_scatter", name, full.bytes, creates=[local], frees=[full])
        elif self.d.tp > 1:
            self.collective("all_reduce", name, full.bytes)

    def partial_sum(self, local: Tensor) -> Tensor:
        """Where a row-parallel product lands before it is reduced into ``local``."""
        return self.tensor("partial", self.d.tokens * self.d.hidden) if self.d.sequence_parallel else local

    def norm(self, model: ModelSpec) -> Tensor:
        """The segment's norm over hidden; keeps its statistics."""
        normed = self.tensor("normed", self.d.local_tokens * self.d.hidden)
        self.kernel(
            "norm",
            self.d.local_tokens * self.d.hidden,
            passes=5 if model.norm == "rms" else 3,
            kernels=7 if model.norm == "rms" else 1,
            creates=[normed, *self.statistics(model)],
        )
        return normed

    def statistics(self, model: ModelSpec) -> list[Tensor]:
        names = ("inverse",) if model.norm == "rms" else ("mean", "inverse")
        return [self.saved(name, self.d.local_tokens) for name in names]

    def norm_again(self, model: ModelSpec) -> Tensor:
        """The normed input, computed again in backward rather than kept."""
        normed = self.tensor("normed", self.d.local_tokens * self.d.hidden)
        scratch = [] if model.norm == "rms" else [self.tensor(f"again{i}", self.d.local_tokens) for i in range(2)]
        self.kernel("norm again", self.d.local_tokens * self.d.hidden, passes=4, creates=[normed, *scratch], frees=scratch)
        return normed

    def norm_backward(self, model: ModelSpec, full: Tensor) -> None:
        """From the gradient of the normed input (``full``) to ``i.g``, in place for RMS norms."""
        d, x, incoming = self.d, self.x(), self.g(1)
        size = d.local_tokens * d.hidden
        after = [x, *self.statistics(model), *([] if self.is_last else [incoming])]
        if model.norm == "rms":
            self.reduced("reduce gradient", full, self.g())
            self.rms_backward("norm backward", d.local_tokens, d.hidden)
        else:
            part = self.tensor("dnormed_local", size) if d.sequence_parallel else full
            self.reduced("reduce gradient", full, part)
            small = [self.tensor("dscale", d.hidden), self.tensor("dshift", d.hidden)]
            self.kernel("norm backward", size, passes=5, creates=[self.g(), *small], frees=[part, *small])
        self.kernel("residual gradient", size, passes=0 if self.is_last else 3, frees=after)

    is_last = False  # the head: nothing comes back into it and it adds no residual

    def dnormed(self, model: ModelSpec) -> Tensor:
        """Where the gradient of the normed input lands before it is reduced."""
        in_place = model.norm == "rms" and not self.d.sequence_parallel
        return self.g() if in_place else self.tensor("dnormed", self.d.tokens * self.d.hidden)

    def rms_backward(self, name: str, rows: int, width: int) -> None:
        unit, product = self.tensor(f"{name} unit", rows * width), self.tensor(f"{name} product", rows * width)
        small, dot = self.tensor(f"{name} scale", width), self.tensor(f"{name} dot", rows)
        self.kernel(name, rows * width, passes=3, creates=[unit])
        self.kernel(name, rows * width, passes=4, kernels=2, creates=[product, small], frees=[small])
        self.kernel(name, rows * width, passes=2, creates=[dot], frees=[product])
        self.kernel(name, rows * width, passes=7, kernels=3, frees=[unit, dot])


def _token_ids(ops: _Ops) -> Tensor:
    return ops.tensor("token_ids", ops.d.tokens, "data", INDEX_BYTES)


def _embedding_forward(ops: _Ops, model: ModelSpec, topology: Topology) -> None:
    d, y = ops.d, ops.x(1)
    ops.kernel("load tokens", d.tokens, creates=[_token_ids(ops)])
    full = ops.partial_sum(y)
    if d.tp == 1:
        ops.kernel("lookup", d.tokens * d.hidden, creates=[full])
    else:
        masks = _vocabulary_masks(ops)
        ops.kernel("lookup", d.tokens * d.hidden, passes=4, kernels=2, creates=[full], frees=masks)
    ops.reduced("reduce embedding", full, y)
    if model.rope_theta is None:
        rows = ops.tensor("positions", d.local_tokens * d.hidden)
        ops.kernel("add positions", d.local_tokens * d.hidden, passes=5, kernels=2, creates=[rows], frees=[rows])


def _vocabulary_masks(ops: _Ops) -> list[Tensor]:
    """Which tokens fall into this rank's slice of the vocabulary."""
    d = ops.d
    local, outside = ops.tensor("local_ids", d.tokens, itemsize=INDEX_BYTES), ops.tensor("outside", d.tokens, itemsize=1)
    below = ops.tensor("below", d.tokens, itemsize=1)
    ops.kernel("vocabulary slice", d.tokens, passes=4, kernels=5, creates=[local, outside, below], frees=[below])
    return [local, outside]


def _embedding_backward(ops: _Ops, model: ModelSpec, topology: Topology) -> None:
    d, incoming = ops.d, ops.g(1)
    if model.rope_theta is None:
        ops.kernel("position gradient", d.local_tokens * d.hidden, passes=3)
    full = ops.gathered("gather gradient", incoming)
    masks = _vocabulary_masks(ops) if d.tp > 1 else []
    ops.kernel("table gradient", d.tokens * d.hidden, passes=3, frees=[full, *masks, _token_ids(ops)])


def _head_forward(ops: _Ops, model: ModelSpec, topology: Topology) -> None:
    d = ops.d
    labels = ops.tensor("labels", d.tokens, "data", INDEX_BYTES)
    ops.kernel("load labels", d.tokens, creates=[labels])
    source = ops.gathered("gather head input", ops.norm(model))
    logits = ops.saved("logits", d.tokens * d.vocab)
    ops.matmul("head", d.tokens, d.hidden, d.vocab, creates=[logits], frees=[source])
    work = logits
    if d.statistics_itemsize != d.itemsize:
        work = ops.tensor("logits32", d.tokens * d.vocab, itemsize=d.statistics_itemsize)
        ops.kernel("to fp32", d.tokens * d.vocab, passes=3, creates=[work], frees=[logits])

    def vector(name: str, times: int = 1) -> Tensor:
        return ops.tensor(name, times * d.tokens, itemsize=d.statistics_itemsize)

    top, target, total = vector("top"), vector("target"), vector("total")
    ops.kernel("row maximum", d.tokens * d.vocab, passes=1, creates=[top])
    if d.tp > 1:
        ops.collective("all_reduce", "maximum over vocabulary", top.bytes)
    ops.kernel("shift", d.tokens * d.vocab, frees=[top])
    if d.tp > 1:
        masks = _vocabulary_masks(ops)
    else:
        masks = [ops.tensor("safe_labels", d.tokens, itemsize=INDEX_BYTES)]
        ops.kernel("labels", d.tokens, creates=masks)
    ops.kernel("target logit", d.tokens, creates=[target])
    ops.kernel("exponentials", d.tokens * d.vocab, passes=3, kernels=2, creates=[total])
    if d.tp > 1:
        stacked = vector("target and total", 2)
        ops.kernel("stack", 2 * d.tokens, creates=[stacked], frees=[target, total])
        ops.collective("all_reduce", "sum over vocabulary", stacked.bytes)
        target_and_total = [stacked]
    else:
        target_and_total = [target, total]
    valid, loss = ops.tensor("valid", d.tokens, itemsize=1), vector("loss")
    scalar = ops.tensor("loss_sum", 1, itemsize=8)
    ops.kernel("token loss", d.tokens, passes=6, kernels=5, creates=[valid, loss, scalar], frees=[loss, scalar])
    minus = vector("minus_one")
    ops.kernel("softmax", d.tokens * d.vocab, passes=2, creates=[minus], frees=[minus, *target_and_total, *masks])
    weight = vector("weight")
    ops.kernel("logit gradient", d.tokens * d.vocab, passes=2, kernels=3, creates=[weight], frees=[weight, valid, labels])
    if work is not logits:
        ops.kernel("from fp32", d.tokens * d.vocab, passes=3, creates=[logits], frees=[work])


def _head_backward(ops: _Ops, model: ModelSpec, topology: Topology) -> None:
    d = ops.d
    ops.is_last = True
    logits = ops.saved("logits", d.tokens * d.vocab)
    source = ops.gathered("gather head input", ops.norm_again(model))
    ops.matmul("head weight", d.vocab, d.tokens, d.hidden, frees=[source])
    full = ops.dnormed(model)
    ops.matmul("head input", d.tokens, d.vocab, d.hidden, creates=[full], frees=[logits])
    ops.norm_backward(model, full)


def _projections(model: ModelSpec, d: Dims) -> list[tuple[str, int]]:
    return [
        ("q", d.heads * d.head_dim),
        ("k", d.kv_heads * d.head_dim),
        ("v", d.kv_heads * d.head_dim),
    ]


def _attention_forward(ops: _Ops, model: ModelSpec, topology: Topology) -> None:
    d = ops.d
    source = ops.gathered("gather attention input", ops.norm(model))
    sizes = _projections(model, d)
    for name, width in sizes:
        label = f"{name}_raw" if model.qk_norm and name != "v" else name
        frees = [source] if name == "v" else []
        ops.matmul(f"{name}_proj", d.tokens, d.hidden, width, creates=[ops.saved(label, d.tokens * width)], frees=frees)
    if model.qk_norm:
        for name, heads in (("q", d.heads), ("k", d.kv_heads)):
            statistics, normed = _head_norm_tensors(ops, name, heads)
            ops.kernel(f"{name}_norm", d.tokens * heads * d.head_dim, passes=5, kernels=7, creates=[statistics, normed])
    _rotate(ops, model)
    context = ops.saved("context", d.tokens * d.heads * d.head_dim)
    _attend(ops, forward=True, creates=[context, _log_sum_exp(ops)])
    _output_projection(ops, d.heads * d.head_dim)


def _head_norm_tensors(ops: _Ops, name: str, heads: int) -> tuple[Tensor, Tensor]:
    d = ops.d
    return ops.saved(f"{name}_inverse", d.tokens * heads), ops.saved(name, d.tokens * heads * d.head_dim)


def _log_sum_exp(ops: _Ops) -> Tensor:
    d = ops.d
    return ops.saved("log_sum_exp", d.tokens * d.heads, itemsize=d.statistics_itemsize)


def _rotate(ops: _Ops, model: ModelSpec) -> None:
    """Rotary positions on q and k, in place but for half a tensor."""
    d = ops.d
    for name, heads in (("q", d.heads), ("k", d.kv_heads)):
        if model.rope_theta is not None:
            half = ops.tensor(f"{name} half", d.tokens * heads * d.head_dim // 2)
            ops.kernel(f"rotate {name}", d.tokens * heads * d.head_dim, passes=5, kernels=5, creates=[half], frees=[half])


def _attend(ops: _Ops, *, forward: bool, creates: Iterable[Tensor], frees: Iterable[Tensor] = (), v_dim: int = 0) -> None:
    """Causal flash attention: half of the score matrix; backward computes the scores once more."""
    d = ops.d
    if d.context > 1:
        kv_bytes = 2 * d.tokens * d.kv_heads * d.head_dim * d.itemsize
        steps = (d.context - 1) if forward else 2 * (d.context - 1)
        ops.collective("exchange", "ring of keys and values", steps * kv_bytes, group="cp")
    keys = d.seq_len * d.context
    one = d.batch * d.heads * d.seq_len * (keys + 1)  # 2 · (s · keys / 2) multiply-adds, a unit of head_dim
    widths = (d.head_dim + (v_dim or d.head_dim)) if forward else (3 * d.head_dim + 2 * (v_dim or d.head_dim))
    ops.operations.append(
        Operation(
            name="attention" if forward else "attention backward",
            kind="attention",
            flops=one * widths,
            moved_bytes=(4 if forward else 8) * d.tokens * d.heads * d.head_dim * d.itemsize,
            creates=tuple(creates),
            frees=tuple(frees),
        )
    )


def _output_projection(ops: _Ops, width: int, *, biased: bool = True) -> None:
    """Row-parallel product into the residual stream."""
    d, y = ops.d, ops.x(1)
    full = ops.partial_sum(y)
    ops.matmul("output projection", d.tokens, width, d.hidden, creates=[full])
    ops.reduced("reduce output", full, y)
    ops.kernel("residual", d.local_tokens * d.hidden, passes=3)


def _attention_backward(ops: _Ops, model: ModelSpec, topology: Topology) -> None:
    d = ops.d
    width = d.heads * d.head_dim
    _output_backward(ops, width, into="dcontext")
    sizes = _projections(model, d)
    inputs = [ops.saved(name, d.tokens * size) for name, size in sizes]
    gradients = [ops.tensor(f"d{name}", d.tokens * size) for name, size in sizes]
    context, dcontext = ops.saved("context", d.tokens * width), ops.tensor("dcontext", d.tokens * width)
    _attend(ops, forward=False, creates=gradients, frees=[*inputs, context, _log_sum_exp(ops), dcontext])
    _rotate(ops, model)
    if model.qk_norm:
        for name, heads in (("q", d.heads), ("k", d.kv_heads)):
            ops.rms_backward(f"{name}_norm backward", d.tokens * heads, d.head_dim)
            raw = ops.saved(f"{name}_raw", d.tokens * heads * d.head_dim)
            statistics, _ = _head_norm_tensors(ops, name, heads)
            ops.kernel("free", 0, kernels=0, frees=[raw, statistics])
    source = ops.gathered("gather attention input", ops.norm_again(model))
    for name, size in sizes:
        ops.matmul(f"{name}_proj weight", size, d.tokens, d.hidden)
        if model.qkv_bias:
            _bias_gradient(ops, f"{name}_proj", d.tokens, size)
    ops.kernel("free", 0, kernels=0, frees=[source])
    full = ops.dnormed(model)
    for (name, size), gradient in zip(sizes, gradients, strict=True):
        ops.matmul(
            f"{name}_proj input", d.tokens, size, d.hidden, creates=[full] if name == "q" else [], frees=gradients if name == "v" else []
        )
    ops.norm_backward(model, full)


def _bias_gradient(ops: _Ops, name: str, tokens: int, width: int) -> None:
    small = ops.tensor(f"{name} dbias", width)
    ops.kernel(f"{name} bias", tokens * width, passes=1, kernels=2, creates=[small], frees=[small])


def _output_backward(ops: _Ops, width: int, *, into: str, before: Iterable[Tensor] = (), bias: bool = False) -> None:
    """Weight and input gradients of the row-parallel product; ``before`` dies after the weight's."""
    d, incoming = ops.d, ops.g(1)
    if bias:
        _bias_gradient(ops, "output", d.local_tokens, d.hidden)
    full = ops.gathered("gather gradient", incoming, keep=True)
    ops.matmul("output weight", d.hidden, d.tokens, width, frees=before)
    frees = [full] if d.sequence_parallel else []
    ops.matmul("output input", d.tokens, d.hidden, width, creates=[ops.tensor(into, d.tokens * width)], frees=frees)


def _fused_attention_forward(ops: _Ops, model: ModelSpec, topology: Topology) -> None:
    d = ops.d
    source = ops.gathered("gather attention input", ops.norm(model))
    width = d.heads * d.head_dim
    ops.matmul("c_attn", d.tokens, d.hidden, 3 * width, creates=[ops.saved("qkv", d.tokens * 3 * width)], frees=[source])
    _attend(ops, forward=True, creates=[ops.saved("context", d.tokens * width), _log_sum_exp(ops)])
    _output_projection(ops, width)


def _fused_attention_backward(ops: _Ops, model: ModelSpec, topology: Topology) -> None:
    d = ops.d
    width = d.heads * d.head_dim
    _output_backward(ops, width, into="dcontext", bias=True)
    qkv = ops.saved("qkv", d.tokens * 3 * width)
    parts = [ops.tensor(f"d{name}", d.tokens * width) for name in "qkv"]
    context, dcontext = ops.saved("context", d.tokens * width), ops.tensor("dcontext", d.tokens * width)
    _attend(ops, forward=False, creates=parts, frees=[qkv, context, _log_sum_exp(ops), dcontext])
    fused = ops.tensor("dqkv", d.tokens * 3 * width)
    ops.kernel("join", d.tokens * 3 * width, creates=[fused], frees=parts)
    _biased_input_backward(ops, model, "c_attn", fused, 3 * width)


def _biased_input_backward(ops: _Ops, model: ModelSpec, name: str, gradient: Tensor, width: int) -> None:
    """Backward of the biased column-parallel product after the norm."""
    d = ops.d
    source = ops.gathered(f"gather {name} input", ops.norm_again(model))
    ops.matmul(f"{name} weight", d.hidden, d.tokens, width, frees=[source])
    _bias_gradient(ops, name, d.tokens, width)
    full = ops.dnormed(model)
    ops.matmul(f"{name} input", d.tokens, width, d.hidden, creates=[full], frees=[gradient])
    ops.norm_backward(model, full)


def _gated_mlp_forward(ops: _Ops, model: ModelSpec, topology: Topology) -> None:
    d = ops.d
    size = d.tokens * d.intermediate
    source = ops.gathered("gather mlp input", ops.norm(model))
    ops.matmul("gate", d.tokens, d.hidden, d.intermediate, creates=[ops.saved("gate", size)])
    ops.matmul("up", d.tokens, d.hidden, d.intermediate, creates=[ops.saved("up", size)], frees=[source])
    y, product = ops.x(1), ops.tensor("product", size)
    full = ops.partial_sum(y)
    ops.kernel("swiglu", size, passes=5, kernels=2, creates=[product])
    ops.matmul("down", d.tokens, d.intermediate, d.hidden, creates=[full], frees=[product])
    ops.reduced("reduce output", full, y)
    ops.kernel("residual", d.local_tokens * d.hidden, passes=3)


def _gated_mlp_backward(ops: _Ops, model: ModelSpec, topology: Topology) -> None:
    d = ops.d
    size = d.tokens * d.intermediate
    gate, up = ops.saved("gate", size), ops.saved("up", size)
    active, product, dproduct, dgate = (ops.tensor(name, size) for name in ("active", "product", "dproduct", "dgate"))
    ops.kernel("swiglu again", size, passes=5, kernels=2, creates=[active, product])
    _output_backward(ops, d.intermediate, into="dproduct", before=[product])
    ops.kernel("up gradient", size, passes=6, kernels=2, frees=[up])
    ops.kernel("gate gradient", size, passes=3, creates=[dgate], frees=[dproduct, gate])
    source = ops.gathered("gather mlp input", ops.norm_again(model))
    ops.matmul("gate weight", d.intermediate, d.tokens, d.hidden)
    ops.matmul("up weight", d.intermediate, d.tokens, d.hidden, frees=[source])
    full = ops.dnormed(model)
    ops.matmul("gate input", d.tokens, d.intermediate, d.hidden, creates=[full])
    ops.matmul("up input", d.tokens, d.intermediate, d.hidden, frees=[dgate, active])
    ops.norm_backward(model, full)


def _plain_mlp_forward(ops: _Ops, model: ModelSpec, topology: Topology) -> None:
    d = ops.d
    size = d.tokens * d.intermediate
    source = ops.gathered("gather mlp input", ops.norm(model))
    ops.matmul("fc", d.tokens, d.hidden, d.intermediate, creates=[ops.saved("fc", size)], frees=[source])
    y, active = ops.x(1), ops.tensor("active", size)
    full = ops.partial_sum(y)
    ops.kernel("gelu", size, creates=[active])
    ops.matmul("proj", d.tokens, d.intermediate, d.hidden, creates=[full], frees=[active])
    ops.reduced("reduce output", full, y)
    ops.kernel("residual", d.local_tokens * d.hidden, passes=5, kernels=2)


def _plain_mlp_backward(ops: _Ops, model: ModelSpec, topology: Topology) -> None:
    d = ops.d
    size = d.tokens * d.intermediate
    fc, active, dactive, dfc = ops.saved("fc", size), *(ops.tensor(name, size) for name in ("active", "dactive", "dfc"))
    ops.kernel("gelu again", size, creates=[active])
    _output_backward(ops, d.intermediate, into="dactive", before=[active], bias=True)
    ops.kernel("gelu gradient", size, passes=3, creates=[dfc], frees=[dactive, fc])
    _biased_input_backward(ops, model, "fc", dfc, d.intermediate)


_FORWARD = {
    "embedding": _embedding_forward,
    "attention": _attention_forward,
    "fused attention": _fused_attention_forward,
    "gated mlp": _gated_mlp_forward,
    "plain mlp": _plain_mlp_forward,
    "head": _head_forward,
}
_BACKWARD = {
    "embedding": _embedding_backward,
    "attention": _attention_backward,
    "fused attention": _fused_attention_backward,
    "gated mlp": _gated_mlp_backward,
    "plain mlp": _plain_mlp_backward,
    "head": _head_backward,
}


