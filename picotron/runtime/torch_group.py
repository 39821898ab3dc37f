"""A ``torch.distributed`` process group over one simulated rank's backend.

Every call is made of the backend's own operations, so prices, deadlock reports and refusals are the world's:

- *SUM, MAX, AVG and PREMUL_SUM* are the world's reductions (the last of inputs multiplied first). Every other
  reduction, and dtypes the world does not reduce, exchange the tensors and reduce them on each rank, in
  ascending order of world ranks, so their bits are those of that order too.
- *gather and scatter* are uneven all_to_alls; ``reduce`` and ``barrier`` are all_reduces (of a copy, of one
  number); lists of unlike sizes are gathered by one broadcast a member.
- *A message* travels on a channel named by group and tag. What ``batch_isend_irecv`` or a coalescing block
  posts is one batch of the world.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from picotron.errors import ExecutionError
from picotron.runtime.backend import REDUCTIONS, Group, Transfer, unseen
from picotron.runtime.torch_work import Part, Posted, SimulatedWork, Tensors

BACKEND_NAME = "threaded"  # under this name, and no other, DeviceMesh keeps the meshes of threads apart

_FOLD: Mapping[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "SUM": torch.add,
    "PRODUCT": torch.mul,
    "MIN": torch.minimum,
    "MAX": torch.maximum,
    "BAND": torch.bitwise_and,
    "BOR": torch.bitwise_or,
    "BXOR": torch.bitwise_xor,
}

# Untyped: torch's stubs have overloads of arguments that torch itself never passes.
_ProcessGroup: Any = dist.ProcessGroup


def _quietly(method: Callable[..., SimulatedWork]) -> Callable[..., SimulatedWork]:
    """``method`` on plain tensors, unseen by autograd and dispatch modes."""

    @wraps(method)
    def quiet(self: SimulatedGroup, *args: Any, **kwargs: Any) -> SimulatedWork:
        plain = [_plain(arg) for arg in args]
        with unseen():
            return method(self, *plain, **{name: _plain(arg) for name, arg in kwargs.items()})

    return quiet


def _plain(value: Any) -> Any:
    """``value``, the results of functional collectives in it waited for: others must not have to do that."""
    if isinstance(value, AsyncCollectiveTensor):
        return value.trigger_wait()  # type: ignore[no-untyped-call]
    return [_plain(element) for element in value] if isinstance(value, list | tuple) else value


class SimulatedGroup(_ProcessGroup):  # type: ignore[misc]
    """One rank's end of a process group; ``members`` are world ranks in the order of their group ranks.

    Only what torch calls is here, under the names (old and new) and with the arguments that it uses.
    """

    def __init__(
        self, posted: Posted, group: Group, members: Sequence[int], name: str, description: str
    ) -> None:
        backend = posted.backend
        self.members = tuple(members)
        super().__init__(self.members.index(backend.rank), len(self.members))
        self._posted, self._backend, self._group = posted, backend, group
        self._name, self._description = name, description
        self._places = [group.index(rank) for rank in self.members]  # by group rank, in ascending order
        self._coalesced: list[SimulatedWork] | None = None
        self._store = HashStore()

    # What it is.

    @property
    def group_name(self) -> Any:
        """The name under which torch keeps it."""
        return self._name

    @property
    def group_desc(self) -> str:
        """What it is for."""
        return self._description

    def getBackendName(self) -> str:  # noqa: N802
        """As torch's logs name it."""
        return BACKEND_NAME

    def _get_backend_name(self) -> str:
        return BACKEND_NAME

    def name(self) -> str:
        """As torch's logs name it."""
        return BACKEND_NAME

    def get_group_store(self) -> HashStore:
        """A store that no other rank sees."""
        return self._store

    @property
    def _device_types(self) -> list[torch.device]:
        return [self._backend.device]

    def __repr__(self) -> str:
        return f"SimulatedGroup({self._group})"

    # Its life.

    def new_group(
        self,
        ranks: Sequence[int],
        timeout: object = None,
        pg_options: object = None,
        group_name: str = "",
        group_desc: str | None = None,
    ) -> SimulatedGroup | None:
        """A group of world ranks, None on ranks outside it. Torch calls this on the default group."""
        if not group_name.isdigit():  # a hash, by which torch names groups that only their members open
            raise ExecutionError(
                "use_local_synchronization=True is not simulated: have every rank call new_group",
                rank=self._backend.rank,
                action="new_group",
            )
        name = group_desc or f"group {group_name}"
        group = self._backend.new_group(sorted(ranks), name)
        if self._backend.rank not in ranks:
            return None
        return SimulatedGroup(self._posted, group, ranks, group_name, name)

    def shutdown(self) -> None:
        """Wait for what was posted: destroy_process_group calls this."""
        self._posted.drain()

    def abort(self) -> None:
        """Nothing is held beyond an operation's end."""

    def _start_coalescing(self, device: object = None) -> None:
        self._coalesced, self._posted.batch = [], []

    def _end_coalescing(self, device: object = None) -> SimulatedWork:
        works, self._coalesced = self._coalesced or [], None
        self._posted.post_batch()
        return self._posted.work([(work, None) for work in works], [])

    # Collectives.

    @_quietly
    def allreduce(self, tensors: Tensors, opts: Any = None) -> SimulatedWork:
        """Replace each tensor by its reduction."""
        return self._work([self._all_reduce(tensor, _reduction(opts)) for tensor in tensors], tensors)

    def allreduce_coalesced(self, tensors: Tensors, opts: Any = None) -> SimulatedWork:
        """As allreduce."""
        return self.allreduce(tensors, opts)

    @_quietly
    def reduce(self, tensors: Tensors, opts: Any) -> SimulatedWork:
        """Replace each tensor by its reduction on the root, and leave it alone elsewhere."""
        totals = [tensor.contiguous().clone() for tensor in tensors]
        parts = [self._all_reduce(total, _reduction(opts)) for total in totals]
        if self.rank() == opts.rootRank:
            parts = [
                (handle, _then(finish, _copy_out([tensor], [total])))
                for (handle, finish), tensor, total in zip(parts, tensors, totals, strict=True)
            ]
        return self._work(parts, tensors)

    @_quietly
    def broadcast(self, tensors: Tensors, opts: Any) -> SimulatedWork:
        """Replace each tensor by that of the root."""
        root = self.members[opts.rootRank]
        parts: list[Part] = [(self._backend.broadcast(t, self._group, root), None) for t in tensors]
        return self._work(parts, tensors)

    @_quietly
    def barrier(self, opts: Any = None) -> SimulatedWork:
        """Complete once every member has called it."""
        return self._work([self._all_reduce(torch.zeros(1), "SUM")], [])

    @_quietly
    def allgather(self, outputs: Sequence[Tensors], inputs: Tensors, opts: Any = None) -> SimulatedWork:
        """Gather each input into the tensors of its list."""
        parts = [
            part
            for listed, tensor in zip(outputs, inputs, strict=True)
            for part in self._all_gather(listed, tensor)
        ]
        return self._work(parts, [tensor for listed in outputs for tensor in listed])

    def allgather_coalesced(
        self, outputs: Sequence[Tensors], inputs: Tensors, opts: Any = None
    ) -> SimulatedWork:
        """As allgather; of each member one list, of its tensors."""
        return self.allgather(list(zip(*outputs, strict=True)), inputs, opts)

    def all_gather_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> SimulatedWork:
        """Gather ``input`` into the parts of ``output``, along dim 0."""
        return self.all_gather_single_coalesced([output], [input], opts)

    @_quietly
    def all_gather_single_coalesced(
        self, outputs: Tensors, inputs: Tensors, opts: Any = None
    ) -> SimulatedWork:
        """As all_gather_single, for each."""
        parts: list[Part] = []
        for output, tensor in zip(outputs, inputs, strict=True):
            if self._ascending():
                handle = self._backend.all_gather(_flat(output), _flat(tensor), self._group)
                parts.append((handle, None))
            else:
                parts += self._all_gather(_flat(output).chunk(self.size()), tensor)
        return self._work(parts, outputs)

    @_quietly
    def reduce_scatter(self, outputs: Tensors, inputs: Sequence[Tensors], opts: Any = None) -> SimulatedWork:
        """Reduce the lists, and write to each output this rank's element of its own."""
        parts = [
            self._reduce_scatter(output, listed, _reduction(opts))
            for output, listed in zip(outputs, inputs, strict=True)
        ]
        return self._work(parts, outputs)

    def reduce_scatter_single(
        self, output: torch.Tensor, input: torch.Tensor, opts: Any = None
    ) -> SimulatedWork:
        """Reduce ``input``, and write this rank's part of it, along dim 0, to ``output``."""
        return self.reduce_scatter_single_coalesced([output], [input], opts)

    @_quietly
    def reduce_scatter_single_coalesced(
        self, outputs: Tensors, inputs: Tensors, opts: Any = None
    ) -> SimulatedWork:
        """As reduce_scatter_single, for each."""
        parts: list[Part] = []
        op = _reduction(opts)
        for output, tensor in zip(outputs, inputs, strict=True):
            if self._ascending() and (own := self._own(op, tensor)):
                handle = self._backend.reduce_scatter(_flat(output), _flat(tensor), self._group, own)
                parts.append((handle, None))
            else:
                pieces = torch.split(_flat(tensor), max(output.numel(), 1))
                parts.append(self._reduce_scatter(output, pieces[: self.size()], op))
        return self._work(parts, outputs)

    @_quietly
    def all_to_all_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_sizes: Sequence[int] | None = None,
        input_sizes: Sequence[int] | None = None,
        opts: Any = None,
    ) -> SimulatedWork:
        """Exchange parts, along dim 0; no sizes are even sizes."""
        if self._ascending():
            handle = self._backend.all_to_all(
                output, input, self._group, output_sizes or None, input_sizes or None
            )
            return self._work([(handle, None)], [output])
        outputs, inputs = (
            torch.split(tensor, list(sizes)) if sizes else tensor.chunk(self.size())
            for tensor, sizes in ((output, output_sizes), (input, input_sizes))
        )
        return self._work([self._exchange(outputs, inputs)], [output])

    @_quietly
    def alltoall(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> SimulatedWork:
        """Send ``inputs[i]`` to member i, and receive its tensor for this rank in ``outputs[i]``."""
        return self._work([self._exchange(outputs, inputs)], outputs)

    @_quietly
    def gather(self, outputs: Sequence[Tensors], inputs: Tensors, opts: Any) -> SimulatedWork:
        """Gather each input into the tensors of the root's list."""
        parts = []
        for i, tensor in enumerate(inputs):
            nothing = tensor.new_empty(0)
            sent = [tensor if r == opts.rootRank else nothing for r in range(self.size())]
            parts.append(self._exchange(outputs[i] if outputs else [nothing] * self.size(), sent))
        return self._work(parts, [tensor for listed in outputs for tensor in listed])

    @_quietly
    def scatter(self, outputs: Tensors, inputs: Sequence[Tensors], opts: Any) -> SimulatedWork:
        """Receive in each output this rank's tensor of the root's list."""
        parts = []
        for i, tensor in enumerate(outputs):
            nothing = tensor.new_empty(0)
            received = [tensor if r == opts.rootRank else nothing for r in range(self.size())]
            parts.append(self._exchange(received, inputs[i] if inputs else [nothing] * self.size()))
        return self._work(parts, outputs)

    # Messages.

    @_quietly
    def send(self, tensors: Tensors, dst: int, tag: int = 0) -> SimulatedWork:
        """Send to group rank ``dst``."""
        return self._message("send", tensors, dst, tag)

    @_quietly
    def recv(self, tensors: Tensors, src: int, tag: int = 0) -> SimulatedWork:
        """Receive from group rank ``src``."""
        return self._message("recv", tensors, src, tag)

    def recv_anysource(self, tensors: Tensors, tag: int) -> SimulatedWork:
        """Refused: which message came first would depend on the interleaving."""
        raise ExecutionError(
            "a receive from any source is not simulated: name src", rank=self._backend.rank, action="recv"
        )

    def _message(self, kind: Any, tensors: Tensors, peer: int, tag: int) -> SimulatedWork:
        (tensor,) = tensors
        channel = f"tag {tag}" if self._name == "0" else f"tag {tag} of group {self._name}"
        transfer = Transfer(kind, tensor, self.members[peer], channel)
        if self._posted.batch is not None:
            work = self._work([], tensors, peer)
            work.held_back = True
            self._posted.batch.append((transfer, work))
            return work
        post = self._backend.send if kind == "send" else self._backend.recv
        return self._work([(post(tensor, transfer.peer, channel), None)], tensors, peer)

    # What they are made of.

    def _work(self, parts: Sequence[Part], results: Tensors, source: int = -1) -> SimulatedWork:
        work = self._posted.work(parts, results, source)
        if self._coalesced is not None:
            self._coalesced.append(work)
        return work

    def _ascending(self) -> bool:
        return self.members == self._group.ranks

    def _own(self, op: Any, tensor: torch.Tensor) -> str | None:
        """The world's own name for a reduction of ``tensor``; None if it is to be composed."""
        name = _name(op).lower()
        if name == "avg" and not tensor.is_floating_point():
            raise ExecutionError(
                f"AVG is for floating-point tensors, got {tensor.dtype}: reduce with SUM and divide",
                rank=self._backend.rank,
                action="reduction",
            )
        if name not in REDUCTIONS or tensor.dtype not in self._backend.capabilities.dtypes:
            return None
        return None if tensor.dtype == torch.bool and name != "max" else name

    def _all_reduce(self, tensor: torch.Tensor, op: Any) -> Part:
        if _name(op) == "PREMUL_SUM":
            tensor.mul_(op.factor)
            op = "SUM"
        if own := self._own(op, tensor):
            return self._backend.all_reduce(tensor, self._group, own), None
        whole = tensor.new_empty(self.size() * tensor.numel())
        handle = self._backend.all_gather(whole, _flat(tensor), self._group)
        return handle, lambda: _reduce_out(tensor, whole.chunk(self.size()), op)

    def _all_gather(self, outputs: Tensors, input: torch.Tensor) -> list[Part]:
        if len({output.numel() for output in outputs}) > 1:
            outputs[self.rank()].copy_(input)
            return [
                (self._backend.broadcast(_flat(output), self._group, rank), None)
                for rank, output in zip(self.members, outputs, strict=True)
            ]
        whole = input.new_empty(self.size() * input.numel())
        handle = self._backend.all_gather(whole, input.reshape(-1), self._group)
        pieces = whole.view(self.size(), -1)
        return [(handle, _copy_out(outputs, [pieces[place] for place in self._places]))]

    def _reduce_scatter(self, output: torch.Tensor, inputs: Tensors, op: Any) -> Part:
        if _name(op) == "PREMUL_SUM":
            inputs = [tensor * op.factor for tensor in inputs]
            op = "SUM"
        whole = _join([inputs[i] for i in self._ascending_order()])
        sizes = [inputs[i].numel() for i in self._ascending_order()]
        own = self._own(op, whole)
        if own and len(set(sizes)) == 1:
            return self._backend.reduce_scatter(_flat(output), whole, self._group, own), None
        if own:
            mine = torch.split(whole, sizes)[self._places[self.rank()]]
            return self._backend.all_reduce(whole, self._group, own), _copy_out([output], [mine])
        received = output.new_empty(self.size() * output.numel())
        handle = self._backend.all_to_all(received, whole, self._group, [output.numel()] * self.size(), sizes)
        return handle, lambda: _reduce_out(output, received.chunk(self.size()), op)

    def _exchange(self, outputs: Tensors, inputs: Tensors) -> Part:
        """An all_to_all of lists."""
        order = self._ascending_order()
        sent = _join([inputs[i] for i in order])
        sizes = [outputs[i].numel() for i in order]
        received = sent.new_empty(sum(sizes))
        sent_sizes = [inputs[i].numel() for i in order]
        handle = self._backend.all_to_all(received, sent, self._group, sizes, sent_sizes)
        return handle, _copy_out([outputs[i] for i in order], torch.split(received, sizes))

    def _ascending_order(self) -> list[int]:
        """Group ranks in ascending order of world ranks."""
        return sorted(range(self.size()), key=lambda i: self.members[i])

    # Other names that torch knows them by.

    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """The elements in one dim; as it is, for the world to refuse, if it is not contiguous."""
    return tensor.detach().view(-1) if tensor.is_contiguous() else tensor


def _join(tensors: Tensors) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _copy_out(outputs: Tensors, pieces: Tensors) -> Callable[[], None]:
    """Something that copies each piece to its output."""

    def copy() -> None:
        for output, piece in zip(outputs, pieces, strict=True):
            output.copy_(piece.view(output.shape))

    return copy


def _then(first: Callable[[], None] | None, second: Callable[[], None]) -> Callable[[], None]:
    def both() -> None:
        if first is not None:
            first()
        second()

    return both


def _reduction(opts: Any) -> Any:
    """The reduction that options name: sum, if there are none."""
    return "SUM" if opts is None else opts.reduceOp


def _name(op: Any) -> str:
    return op if isinstance(op, str) else str(op.op.name)


def _reduce_out(output: torch.Tensor, pieces: Tensors, op: Any) -> None:
    fold = _FOLD[_name(op)]
    total = pieces[0]
    for piece in pieces[1:]:
        total = fold(total, piece)
    output.copy_(total.view(output.shape))
