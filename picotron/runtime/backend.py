"""The world a rank runs in: groups, collectives, point-to-point messages, a clock and random state.

Two worlds answer this ``Protocol``: ``simulated`` (every rank a thread of one process) and ``distributed``
(torch.distributed: gloo on CPU, NCCL on CUDA). Code takes its backend as an argument and runs on either.

Rules both keep:

- Every operation returns a ``Handle``; its tensors belong to the operation until ``wait`` has returned: they
  may be neither written, nor (where they are written by it) read. Blocking use is ``.wait()`` at once.
- Collectives of one group are posted in the same order by all its members.
- Receives are matched when posted, in posting order per (sender, receiver, channel). A send may end as
  soon as it is posted or only once its receive is: count on neither.
- Tensors are dense and contiguous, on the backend's device. Operations see values: they record no autograd.
- A broken rule is an ``ExecutionError`` that names the rank and the operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

import torch
from attrs import field, frozen
from torch.utils._python_dispatch import _disable_current_modes

from picotron.errors import ExecutionError

REDUCTIONS = ("sum", "max", "avg")

_REDUCIBLE = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,  # max alone: whether any
)


Mark = Any
"""A moment on a rank's clock: seconds or, on the device's clock, what ``seconds_since`` alone can read."""


class Handle(Protocol):
    """An operation under way. Every handle is to be waited for, once at least."""

    @property
    def span(self) -> tuple[Mark, Mark] | None:
        """Start and end on the rank's clock once it has been waited for, where the backend knows them."""

    def wait(self) -> None:
        """Return once the operation is complete; a second call returns at once.

        On CUDA, complete means: for whatever the current stream runs next.
        """


@frozen
class Group:
    """The ascending world ranks of one communicator; ``payload`` is the backend's own."""

    ranks: tuple[int, ...]
    name: str = ""
    payload: object = field(default=None, eq=False, repr=False)

    @property
    def size(self) -> int:
        """Number of members."""
        return len(self.ranks)

    def index(self, rank: int) -> int:
        """Position of a world rank in the group; ExecutionError if it is not a member."""
        try:
            return self.ranks.index(rank)
        except ValueError:
            raise ExecutionError(f"rank must be a member of group {self}, got {rank}") from None

    def __str__(self) -> str:
        """As reports name it: ``tp0 [0, 1]``."""
        return f"{self.name} {list(self.ranks)}".lstrip()


@frozen
class Transfer:
    """One end of a message: ``kind`` is "send" to or "recv" from world rank ``peer``."""

    kind: Literal["send", "recv"]
    tensor: torch.Tensor
    peer: int
    channel: str = ""


Clock = Literal["virtual", "virtual cpu", "host", "device"]
"""What mark() tells: seconds that spend() and prices make pass, a thread's own CPU seconds, the host's, or
the device's."""


@frozen(kw_only=True)
class Capabilities:
    """What a backend can do, and what is dear on it."""

    name: str  # "simulated" | "gloo" | "nccl"
    clock: Clock
    fused_reduce_scatter: bool  # False: it moves and adds as much as an all_reduce
    dtypes: tuple[torch.dtype, ...] = _REDUCIBLE  # those that can be reduced


class Backend(Protocol):
    """One rank's view of its world. Ranks, sources and peers are world ranks, in [0, world_size)."""

    @property
    def rank(self) -> int:
        """Which rank this is."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""

    @property
    def device(self) -> torch.device:
        """Where this rank's tensors live."""

    @property
    def capabilities(self) -> Capabilities:
        """What this backend can do."""

    def new_group(self, ranks: Sequence[int], name: str = "") -> Group:
        """A communicator of ascending ``ranks``.

        Collective over the world: every rank, member or not, opens every group in the same order. Groups
        of equal ranks are separate communicators.
        """

    def open_channels(self, channels: Sequence[tuple[int, int, str]]) -> None:
        """Make ready for messages on ``channels``: (sender, receiver, channel) in ascending order.

        Both ends of a channel name it. Messages on others are allowed; where a channel is a communicator of
        its own, the first message then waits for the peer's, which can be a deadlock.
        """

    def all_reduce(self, tensor: torch.Tensor, group: Group, op: str = "sum") -> Handle:
        """Replace ``tensor`` by its sum, max or avg over the group."""

    def all_gather(self, output: torch.Tensor, input: torch.Tensor, group: Group) -> Handle:
        """Write to ``output`` the members' inputs, concatenated along dim 0 in group order.

        ``input`` may be this rank's own part of ``output``.
        """

    def reduce_scatter(
        self, output: torch.Tensor, input: torch.Tensor, group: Group, op: str = "sum"
    ) -> Handle:
        """Write to ``output`` this rank's part, along dim 0 in group order, of the reduced inputs.

        ``output`` may be this rank's own part of ``input``.
        """

    def all_to_all(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        group: Group,
        output_sizes: Sequence[int] | None = None,
        input_sizes: Sequence[int] | None = None,
    ) -> Handle:
        """Send part i of ``input`` to member i and receive its part for this rank as part i of ``output``.

        Sizes are rows of dim 0 per member, even if left out.
        """

    def exchange(self, output: torch.Tensor, input: torch.Tensor, group: Group) -> Handle:
        """Send ``input`` to the next member, and receive ``output`` from the one before.

        The last member's next is the first. All tensors are of one shape.
        """

    def broadcast(self, tensor: torch.Tensor, group: Group, source: int) -> Handle:
        """Replace ``tensor`` by that of world rank ``source``, a member."""

    def send(self, tensor: torch.Tensor, peer: int, channel: str = "") -> Handle:
        """Send to ``peer`` on the ordered stream ``channel`` of this pair and direction."""

    def recv(self, tensor: torch.Tensor, peer: int, channel: str = "") -> Handle:
        """Receive into ``tensor`` the next message of ``peer`` on ``channel``, in order of posting."""

    def batch(self, transfers: Sequence[Transfer]) -> Handle:
        """Post several sends and receives together, in no order among them; complete when all are."""

    def copy(self, kind: str, payload_bytes: int) -> Handle:
        """Say that an "offload" to the host, or a "reload" from it, begins; the clock's view of its end.

        Each kind has a stream of its own. The bytes themselves are moved by whoever says so.
        """

    def barrier(self) -> None:
        """Return once every rank of the world has called it."""

    def gather_objects(self, value: object) -> list[object]:
        """Every rank's picklable value, in rank order, on every rank. Control plane: not payload."""

    def settle(self) -> None:
        """Return once completed operations have let go of their tensors; for measuring live memory."""

    def mark(self) -> Mark:
        """Now on this rank's clock; never waits."""

    def seconds_since(self, start: Mark, marks: Sequence[Mark]) -> list[float]:
        """Seconds from ``start`` to each of ``marks``. A device's clock is waited for: ask after the step."""

    def spend(self, seconds: float) -> None:
        """Compute for so long by the plan: moves a virtual clock, and does nothing where time is real."""

    def at(self, step: int, index: int, action: str = "") -> None:
        """Say where this rank is, for reports and for faults that strike there.

        ``step`` and ``index`` are those of a training step and a row, or -1 outside of one.
        """

    def cpu_seconds(self) -> float:
        """CPU seconds this rank has spent since its backend was opened, its communication included."""

    def random_scope(self, seed: int) -> AbstractContextManager[torch.Generator]:
        """A fresh generator on this rank's device; draw from it, not from torch's global state."""

    def abort(self, error: BaseException) -> None:
        """Tell the other ranks that this one has failed with ``error``."""


class unseen:  # noqa: N801
    """A context in which neither autograd nor a dispatch mode sees what is done."""

    __slots__ = ("_grad", "_modes")

    def __enter__(self) -> None:
        """A class, and not a generator, since every operation of a simulated rank passes here."""
        self._grad = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        self._modes: Any = None
        if torch._C._len_torch_dispatch_stack():
            self._modes = _disable_current_modes()
            self._modes.__enter__()

    def __exit__(self, *error: object) -> None:
        """Put both back."""
        if self._modes is not None:
            self._modes.__exit__(*error)
        torch._C._set_grad_enabled(self._grad)


def check_ranks(rank: int, ranks: Sequence[int], world_size: int) -> tuple[int, ...]:
    """The members of a new group, ascending; ExecutionError if they cannot be one."""
    members = tuple(ranks)
    if not members or members != tuple(sorted({r for r in members if 0 <= r < world_size})):
        raise ExecutionError(
            f"ranks must be distinct, ascending and in [0, {world_size}), got {list(members)}",
            rank=rank,
            action="new_group",
        )
    return members


def check_all_reduce(rank: int, group: Group, tensor: torch.Tensor, op: str) -> None:
    """ExecutionError unless this all_reduce is in order."""
    action = _member_action("all_reduce", rank, group)
    _check_dense(rank, action, tensor)
    _check_reduction(rank, action, tensor, op)


def check_all_gather(rank: int, group: Group, output: torch.Tensor, input: torch.Tensor) -> None:
    """ExecutionError unless this all_gather is in order."""
    action = _member_action("all_gather", rank, group)
    _check_dense(rank, action, output, input)
    _check_rows(rank, action, "output", output, "input", input, group.size)


def check_reduce_scatter(rank: int, group: Group, output: torch.Tensor, input: torch.Tensor, op: str) -> None:
    """ExecutionError unless this reduce_scatter is in order."""
    action = _member_action("reduce_scatter", rank, group)
    _check_dense(rank, action, output, input)
    _check_reduction(rank, action, input, op)
    _check_rows(rank, action, "input", input, "output", output, group.size)


def check_all_to_all(
    rank: int,
    group: Group,
    output: torch.Tensor,
    input: torch.Tensor,
    output_sizes: Sequence[int] | None,
    input_sizes: Sequence[int] | None,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The rows per member of output and input; ExecutionError unless this all_to_all is in order."""
    action = _member_action("all_to_all", rank, group)
    _check_dense(rank, action, output, input)
    if output.dim() == 0 or input.dim() == 0 or output.shape[1:] != input.shape[1:]:
        raise ExecutionError(
            f"output and input must agree in every dim but 0, got {_shape(output)} and {_shape(input)}",
            rank=rank,
            action=action,
        )
    _check_apart(rank, action, output, input)
    return (
        _part_sizes(rank, action, "output", output, output_sizes, group.size),
        _part_sizes(rank, action, "input", input, input_sizes, group.size),
    )


def check_exchange(rank: int, group: Group, output: torch.Tensor, input: torch.Tensor) -> None:
    """ExecutionError unless this exchange is in order."""
    action = _member_action("exchange", rank, group)
    _check_dense(rank, action, output, input)
    if output.shape != input.shape:
        raise ExecutionError(
            f"output and input must have one shape, got {_shape(output)} and {_shape(input)}",
            rank=rank,
            action=action,
        )
    _check_apart(rank, action, output, input)


def check_broadcast(rank: int, group: Group, tensor: torch.Tensor, source: int) -> None:
    """ExecutionError unless this broadcast is in order."""
    action = _member_action("broadcast", rank, group)
    _check_dense(rank, action, tensor)
    if source not in group.ranks:
        raise ExecutionError(
            f"source must be a world rank of group {group}, got {source}", rank=rank, action=action
        )


def check_message(rank: int, kind: str, tensor: torch.Tensor, peer: int, world_size: int) -> None:
    """ExecutionError unless this send or recv is in order."""
    if kind not in ("send", "recv"):
        raise ExecutionError(f"kind must be send or recv, got {kind!r}", rank=rank, action="batch")
    _check_dense(rank, kind, tensor)
    if not 0 <= peer < world_size or peer == rank:
        raise ExecutionError(
            f"peer must be another rank in [0, {world_size}), got {peer}", rank=rank, action=kind
        )


def _member_action(kind: str, rank: int, group: Group) -> str:
    """The operation as errors name it; ExecutionError if the rank is not a member."""
    if rank not in group.ranks:
        raise ExecutionError(
            f"only members take part in a collective of group {group}: open a group that includes the rank",
            rank=rank,
            action=kind,
        )
    return kind


def _check_dense(rank: int, action: str, *tensors: torch.Tensor) -> None:
    for tensor in tensors:
        if not isinstance(tensor, torch.Tensor):
            raise ExecutionError(f"tensors must be torch's, got {tensor!r}", rank=rank, action=action)
        if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
            raise ExecutionError(
                f"tensors must be plain, got a {type(tensor).__name__}: pass what it holds",
                rank=rank,
                action=action,
            )
        if not tensor.is_contiguous():
            raise ExecutionError(
                f"tensors must be contiguous, got strides {tensor.stride()} for {_shape(tensor)}: "
                "pass tensor.contiguous()",
                rank=rank,
                action=action,
            )
        if tensor.dtype != tensors[0].dtype:
            raise ExecutionError(
                f"output and input must have one dtype, got {tensors[0].dtype} and {tensor.dtype}",
                rank=rank,
                action=action,
            )


def _check_apart(rank: int, action: str, output: torch.Tensor, input: torch.Tensor) -> None:
    if input.numel() and output.data_ptr() == input.data_ptr():
        raise ExecutionError("output and input must be different memory, got one", rank=rank, action=action)


def _check_reduction(rank: int, action: str, tensor: torch.Tensor, op: str) -> None:
    if op not in REDUCTIONS:
        raise ExecutionError(f"op must be one of {REDUCTIONS}, got {op!r}", rank=rank, action=action)
    refused = (op == "avg" and not tensor.is_floating_point()) or (op == "sum" and tensor.dtype == torch.bool)
    if tensor.dtype not in _REDUCIBLE or refused:
        raise ExecutionError(
            f"dtype must be one that {op} is defined for, got {tensor.dtype}: cast first",
            rank=rank,
            action=action,
        )


def _check_rows(
    rank: int,
    action: str,
    whole_name: str,
    whole: torch.Tensor,
    part_name: str,
    part: torch.Tensor,
    size: int,
) -> None:
    """The whole is ``size`` parts along dim 0."""
    if part.dim() == 0 or whole.shape != (size * part.shape[0], *part.shape[1:]):
        raise ExecutionError(
            f"{whole_name} must be {size} times {part_name} along dim 0, "
            f"got {_shape(whole)} for {_shape(part)}",
            rank=rank,
            action=action,
        )


def _part_sizes(
    rank: int, action: str, name: str, tensor: torch.Tensor, sizes: Sequence[int] | None, count: int
) -> tuple[int, ...]:
    rows = tensor.shape[0]
    if sizes is None and rows % count == 0:
        return (rows // count,) * count
    if sizes is None or len(sizes) != count or sum(sizes) != rows or min(sizes) < 0:
        got = f"{rows} rows" if sizes is None else f"{list(sizes)} for {rows} rows"
        raise ExecutionError(
            f"{name} sizes must be {count} counts that add up to its rows, got {got}",
            rank=rank,
            action=action,
        )
    return tuple(sizes)


def _shape(tensor: torch.Tensor) -> list[int]:
    return list(tensor.shape)
