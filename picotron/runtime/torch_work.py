"""Work under way, as ``torch.distributed`` hands it out, over the handles of one simulated rank.

Work is waited for once: by its user, by whoever asks whether it is complete (nobody can poll: a rank gives
way only when it waits), or when the rank leaves. Its future is complete when asked for, except during
backward, where it is completed as the pass ends: so DistributedDataParallel, which asks at once and waits in
C++ at the end, overlaps on the virtual clock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from attrs import define, field

from picotron.errors import ExecutionError
from picotron.runtime.backend import Backend, Handle, Transfer, unseen

_Work: Any = dist.Work  # untyped, as torch's stubs have it otherwise than torch calls it

Tensors = Sequence[torch.Tensor]
Part = tuple[Handle, Callable[[], None] | None]  # an operation, and what is to be done once it is complete


@define(eq=False)
class Posted:
    """What one rank has posted through torch: ``pending`` is not waited for yet, ``batch`` not yet posted."""

    backend: Backend
    pending: dict[int, SimulatedWork] = field(factory=dict)
    batch: list[tuple[Transfer, SimulatedWork]] | None = None

    def work(self, parts: Sequence[Part], results: Tensors, source: int = -1) -> SimulatedWork:
        """Work that is complete when every part is."""
        work = SimulatedWork(self, parts, results, source)
        self.pending[id(work)] = work
        return work

    def post_batch(self) -> None:
        """Post together the messages called for since ``batch`` was begun."""
        batch, self.batch = self.batch or [], None
        if batch:
            handle = self.backend.batch([transfer for transfer, _ in batch])
            for _, work in batch:
                work.parts, work.held_back = [(handle, None)], False

    def drain(self) -> None:
        """Wait for everything that nobody has waited for, in order of posting."""
        for work in list(self.pending.values()):
            work.wait()
            work.let_go()

    def let_go(self) -> None:
        """Hold on to nothing that is still under way."""
        for work in list(self.pending.values()):
            work.let_go()


class SimulatedWork(_Work):  # type: ignore[misc]
    """An operation under way, as ``torch.distributed`` hands it out."""

    def __init__(self, posted: Posted, parts: Sequence[Part], results: Tensors, source: int) -> None:
        super().__init__()
        self.parts: Sequence[Part] = parts
        self._posted, self._results, self._source = posted, list(results), source
        self._done = False
        self.held_back = False  # a message of a batch that is not posted yet
        self._future: _Future | None = None

    def wait(self, timeout: object = None) -> bool:
        """Return once complete; ``timeout`` is left aside: a deadlock is found at once."""
        if not self._done:
            self._posted.pending.pop(id(self), None)
            if self.held_back:
                raise ExecutionError(
                    "a message of a batch is posted when the batch ends, which this one never did",
                    rank=self._posted.backend.rank,
                )
            for handle, _ in self.parts:
                handle.wait()
            with unseen():
                for _, finish in self.parts:
                    if finish is not None:
                        finish()
            self._done, self.parts = True, ()
            if self._future is not None and not self._future.is_set():
                self._future.set_result(self._results)
        return True

    def let_go(self) -> None:
        """Keep nothing alive, and have torch forget it: its registry holds what nobody has waited for."""
        self._posted.pending.pop(id(self), None)
        results, self._done, self.parts, self._results = self._results, True, (), []
        with unseen():
            for result in results:
                torch.ops._c10d_functional.wait_tensor(result)

    def synchronize(self) -> None:
        """As wait."""
        self.wait()

    def is_completed(self) -> bool:
        """True, having waited."""
        return self.wait()

    def is_success(self) -> bool:
        """True, having waited."""
        return self.wait()

    def result(self) -> list[torch.Tensor]:
        """What the operation has written."""
        self.wait()
        return self._results

    def source_rank(self) -> int:
        """Of a receive: the sender's rank in the group."""
        return self._source

    def _source_rank(self) -> int:
        return self._source

    def get_future(self) -> Any:
        """A future of the result: complete, or, during backward, completed by the time the pass ends."""
        if self._future is None:
            self._future = _Future(self.wait)
            if self._done:
                self._future.set_result(self._results)
            elif not _when_backward_ends(self.wait):
                self.wait()
        return self._future


def _when_backward_ends(call: Callable[[], Any]) -> bool:
    """Have the autograd engine make ``call`` at the end of the pass; False if it is at no node of one."""
    if torch._C._current_autograd_node() is None:
        return False
    torch.autograd.Variable._execution_engine.queue_callback(call)
    return True


class _Future(torch.futures.Future[Any]):
    """A future that whoever waits for it completes: torch's own would block the rank that has to."""

    def __init__(self, complete: Callable[[], object]) -> None:
        super().__init__()
        self._complete = complete

    def is_set(self) -> bool:
        return super().done()

    def done(self) -> bool:
        self._complete()
        return True

    def wait(self) -> Any:
        self._complete()
        return super().wait()

    def value(self) -> Any:
        self._complete()
        return super().value()

    def then(self, callback: Callable[[Any], Any]) -> Any:
        following = _Future(self._complete)

        def follow(_: object) -> None:
            try:
                following.set_result(callback(self))
            except Exception as error:
                following.set_exception(error)

        self.add_done_callback(follow)
        return following
