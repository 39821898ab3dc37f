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

from collections.abc import Iterable
from typing import Literal

import numpy as np
from attrs import field, frozen

from picotron.errors import PlanError
from picotron.planner.context import ContextParallel
from picotron.planner.layout import even_ranges
from picotron.planner.model import ModelSpec
from picotron.planner.topology import Topology

TensorOverlap = Literal["none", "weight_gradient", "chunked"]
"""What multiplies while tensor-parallel ranks communicate.

weight_gradient: weights' gradients, while the input's is summed. chunked: that, and in forward the products
of one chunk of the input while the next one is gathered.
"""
GATHER_CHUNKS = (4, 2)  # of a rank's tokens; the first that divides them
Category = Literal[
    "parameters", "gradients", "optimizer", "constants", "data", "activations", "workspace", "buffers"
]
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
WAIT = "wait"  # the kind of an operation at whose place an earlier asynchronous collective must have ended
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
    one rank hands over: the tensor (all_reduce), the whole output (all_gather) or the whole input. One that
    is ``asynchronous`` moves while the rank goes on; the first WAIT that no earlier one has met is its end.
    A step of the weight gradients names what it ``reads``; every other step names nothing.
    ``shape`` of a matmul is (m, n, k, batch): ``batch`` times [m, k] @ [k, n]; of attention it is that of the
    scores, [queries, head_dim] @ [head_dim, keys] for each head. Empty where nothing is said.
    ``core``: whether selective recompute runs it again.
    """

    name: str
    kind: str  # "matmul" | "attention" | "kernel" | "wait" | one of COLLECTIVES
    flops: int = 0
    moved_bytes: int = 0
    kernels: int = 1
    group: str = ""
    payload_bytes: int = 0
    creates: tuple[Tensor, ...] = ()
    frees: tuple[Tensor, ...] = ()
    reads: tuple[Tensor, ...] = ()
    shape: tuple[int, ...] = ()
    asynchronous: bool = False
    core: bool = False

    @property
    def for_weights(self) -> bool:
        """Whether it serves the weight gradients alone, so that it may wait for W."""
        return bool(self.reads)


@frozen(kw_only=True)
class SegmentBody:
    """The operations of one segment in one phase."""

    name: str
    operations: tuple[Operation, ...]
    collectives: tuple[Operation, ...] = field(init=False, repr=False, eq=False)
    communication: tuple[Operation, ...] = field(init=False, repr=False, eq=False)
    """Collectives, and where asynchronous ones are waited for."""

    @collectives.default
    def _collectives(self) -> tuple[Operation, ...]:
        return tuple(operation for operation in self.operations if operation.kind in COLLECTIVES)

    @communication.default
    def _communication(self) -> tuple[Operation, ...]:
        return tuple(step for step in self.operations if step.kind in COLLECTIVES or step.kind == WAIT)


@frozen(kw_only=True)
class Body:
    """The segments of one stage in one phase, in the order in which they run."""

    stage: int
    phase: str  # "F", "B", "I" or "W"
    segments: tuple[SegmentBody, ...]

    @property
    def flops(self) -> int:
        """FLOPs of one microbatch."""
        return sum(operation.flops for segment in self.segments for operation in segment.operations)


@frozen(kw_only=True)
class Bodies:
    """What a stage does with a microbatch: F, then B or, split in two, I and W."""

    forward: Body
    backward: Body
    backward_input: Body
    backward_weight: Body


@frozen(kw_only=True)
class Dims:
    """Sizes on one rank, in elements; what every operation below is a product of."""

    batch: int
    seq_len: int  # tokens of one sequence on this rank
    context: int  # ranks that share a sequence
    context_parallel: ContextParallel  # how
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tp: int
    sequence_parallel: bool
    itemsize: int
    gradient_itemsize: int = 0  # of weight gradients; 0: as ``itemsize``
    adds_products: bool = False  # weight products are made in the compute format, then added to the gradient
    loss_chunks: int = 1  # in which the loss takes the tokens
    tensor_overlap: TensorOverlap = "none"
    compiled: bool = False  # steps bound by memory are one kernel each

    @property
    def tokens(self) -> int:
        """Tokens of a microbatch on this rank's tensor-parallel group."""
        return self.batch * self.seq_len

    @property
    def local_tokens(self) -> int:
        """Tokens in the tensors between segments."""
        return self.tokens // self.tp if self.sequence_parallel else self.tokens

    @property
    def gather_chunks(self) -> int:
        """In how many chunks of tokens forward gathers the input of a block."""
        if self.tensor_overlap != "chunked":
            return 1
        return next(chunks for chunks in GATHER_CHUNKS if self.local_tokens % chunks == 0)

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
        """Bytes of what is summed over many elements (softmax, norms, rotations): never below fp32."""
        return max(4, self.itemsize)

    @property
    def casts_gradients(self) -> bool:
        """Whether gradients are accumulated in another format than they are computed in."""
        return self.gradient_itemsize not in (0, self.itemsize)


def dims(
    model: ModelSpec,
    topology: Topology,
    *,
    micro_batch: int,
    seq_len: int,
    sequence_parallel: bool,
    itemsize: int,
    gradient_itemsize: int = 0,
    adds_products: bool = False,
    tp_index: int = 0,
    context: ContextParallel = "ring",
    loss_chunks: int = 1,
    tensor_overlap: TensorOverlap = "none",
    compiled: bool = False,
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
        context_parallel=context,
        hidden=model.hidden_size,
        heads=model.num_heads // tp,
        kv_heads=max(1, model.num_kv_heads // tp),
        head_dim=model.head_dim,
        intermediate=model.intermediate_size // tp,
        vocab=stop - first,
        tp=tp,
        sequence_parallel=sequence_parallel,
        itemsize=itemsize,
        gradient_itemsize=gradient_itemsize,
        adds_products=adds_products,
        loss_chunks=loss_chunks,
        tensor_overlap=tensor_overlap,
        compiled=compiled,
    )


def collective_bytes(body: Body) -> dict[tuple[str, str], int]:
    """Payload of one microbatch by (kind, group)."""
    totals: dict[tuple[str, str], int] = {}
    for segment in body.segments:
        for operation in segment.collectives:
            key = operation.kind, operation.group
            totals[key] = totals.get(key, 0) + operation.payload_bytes
    return totals


def segment_memory(segment: SegmentBody) -> tuple[np.ndarray, np.ndarray]:
    """Bytes over its start, by category: what the segment leaves, and what stands at its highest moment."""
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
