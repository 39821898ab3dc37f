"""How the two ends of a message meet, by the semantics of the world.

- ``buffered``: a send is complete when posted, its content taken then, as with small messages on gloo.
- ``rendezvous``: both ends are complete when both are posted, as with large messages and on NCCL. A program
  that needs no buffer runs under either.
- ``batched``: rendezvous, and between two ranks the messages of one channel, both directions, run in the
  order in which each of the two posted them, one batch after the other; a lone message is a batch of its
  own. So it is on an NCCL communicator, where ``ncclGroupStart`` and ``ncclGroupEnd`` enclose a batch.

Under all of them receives are matched in posting order per (sender, receiver, channel).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal

from picotron.planner.clock import Operation as Timed
from picotron.planner.clock import advance
from picotron.runtime.arithmetic import flip_bit
from picotron.runtime.guards import CHANGED
from picotron.runtime.ledger import Batch, Ledger, Post
from picotron.runtime.scheduler import Scheduler

Semantics = Literal["buffered", "rendezvous", "batched"]
SEMANTICS: tuple[Semantics, ...] = ("buffered", "rendezvous", "batched")

Seconds = Callable[[int, int, int], float]  # of a message: sender, receiver, bytes


class Messages:
    """Matches the ends of messages in ``ledger``; called by the rank that holds the baton."""

    def __init__(self, scheduler: Scheduler, ledger: Ledger, semantics: Semantics, seconds: Seconds) -> None:
        self._scheduler, self._ledger, self._seconds = scheduler, ledger, seconds
        self._semantics = semantics

    def post(self, posts: Sequence[Post]) -> None:
        """Take up what one rank posts together; whatever can meet, meets."""
        if self._semantics == "batched":
            if posts:
                self._queue(Batch(tuple(posts), len(posts)))
            return
        for post in posts:
            if post.kind == "send" and self._semantics == "buffered":
                self._take_content(post)
            self._offer(post)

    def _take_content(self, post: Post) -> None:
        """Complete a send by copying what it sends."""
        post.tensor, post.guards = post.tensor.clone(), ()
        post.start_seconds = post.end_seconds = post.ready_seconds

    def abandon(self, rank: int) -> None:
        """Fail what waits for messages of ``rank``, which is gone; what stands behind it goes on."""
        failed = []
        for queue in (*self._ledger.sends.values(), *self._ledger.receives.values()):
            for post in [post for post in queue if post.peer == rank and post.end_seconds is None]:
                queue.remove(post)
                self._scheduler.fail(post, self._ledger.vanished[rank])
                failed.append(post)
        self._go_on(failed)

    def _queue(self, batch: Batch) -> None:
        batch.every_line = self._ledger.batches
        for post in batch.posts:
            post.batch = batch
        for queue in batch.queues:
            line = self._ledger.batches.setdefault(queue, deque())
            line.append(batch)
            batch.lines.append(line)
        self._begin([batch])

    def _begin(self, batches: list[Batch]) -> None:
        """Offer the messages of every batch that has become the first of all its queues."""
        while batches:
            batch = batches.pop()
            if batch.begun or any(line[0] is not batch for line in batch.lines):
                continue
            batch.begun = True
            before = max(self._ledger.batch_ends.get(queue, 0.0) for queue in batch.queues)
            for post in batch.posts:
                post.ready_seconds = max(post.ready_seconds, before)
            for post in batch.posts:
                for ended in self._offer(post):
                    batches += self._end_one(ended)

    def _go_on(self, ended: Sequence[Post]) -> None:
        """Begin what stood behind messages that have ended."""
        self._begin([batch for post in ended if post.batch is not None for batch in self._end_one(post)])

    def _end_one(self, post: Post) -> list[Batch]:
        """Count a message off its batch; returns the batches that then come first in a queue."""
        batch = post.batch
        assert batch is not None
        batch.num_open -= 1
        if batch.num_open:
            return []
        ended_seconds = max(other.end_seconds or other.ready_seconds for other in batch.posts)
        for queue, line in zip(batch.queues, batch.lines, strict=True):
            self._ledger.batch_ends[queue] = max(self._ledger.batch_ends.get(queue, 0.0), ended_seconds)
            line.popleft()
        following = [line[0] for line in batch.lines if line]
        for other in batch.posts:
            other.batch = None  # the two refer to each other, which would keep tensors alive
        return following

    def _offer(self, post: Post) -> tuple[Post, ...]:
        """Match ``post`` with the first of the other end, if that is there; returns what has ended."""
        sends, receives = self._ledger.sends, self._ledger.receives
        own, others = (sends, receives) if post.kind == "send" else (receives, sends)
        queue = others.get(post.key)
        if queue:
            other = queue.popleft()
            send, receive = (post, other) if post.kind == "send" else (other, post)
            self._meet(send, receive)
            return send, receive
        if post.peer in self._ledger.vanished and post.end_seconds is None:
            self._scheduler.fail(post, self._ledger.vanished[post.peer])
            return (post,)
        own.setdefault(post.key, deque()).append(post)
        return ()

    def _meet(self, send: Post, receive: Post) -> None:
        """Move the content, and say when that was; or fail both ends."""
        problem = _disagreement(send, receive)
        changed = next((end for end in (send, receive) if any(w.changed() for w in end.guards)), None)
        if problem is not None or changed is not None:
            blamed = None if changed is None else (changed.rank, changed.describe(), changed.place)
            for end in (send, receive):
                self._scheduler.fail(end, problem or CHANGED, blamed)
            return
        receive.tensor.copy_(send.tensor)
        if receive.corrupt is not None:
            flip_bit(receive.tensor, *receive.corrupt)
        size = send.tensor.numel() * send.tensor.element_size()
        buffered = send.end_seconds is not None
        ready = send.ready_seconds if buffered else max(send.ready_seconds, receive.ready_seconds)
        timed = Timed((send.key,), ready, self._seconds(send.rank, receive.rank, size))
        span = advance(self._scheduler.streams, timed)
        self._scheduler.streams[send.key] = span.end
        receive.start_seconds, receive.end_seconds = span
        if not buffered:
            send.start_seconds, send.end_seconds = span
        for post in (send, receive):
            for watched in post.guards:
                watched.refresh()
            self._scheduler.wake(post)


def _disagreement(send: Post, receive: Post) -> str | None:
    want, got = receive.tensor, send.tensor
    if (want.dtype, want.shape) == (got.dtype, got.shape):
        return None
    told = "; ".join(
        f"rank {post.rank} posted {post.describe()} of {post.tensor.dtype} {list(post.tensor.shape)}"
        + (f" ({post.place})" if post.place else "")
        for post in (send, receive)
    )
    return f"a message and its receive must agree in dtype and shape: {told}"
