"""The walker: runs a plan's program on one rank, row by row, and nothing else.

A rank holds one stage or several; what one hands to the next on the same rank stays where it is.
A ``Session`` opens what the plan needs (groups, weights, gradient buckets, optimizer) and takes steps. What
it measures comes back in the planner's own types: every row in a ``Timeline``, live bytes at every segment's
end in a ``MemoryTimeline``, payload by collective and group.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from attrs import define, evolve, frozen

from picotron.errors import ExecutionError
from picotron.planner.body import Category
from picotron.planner.flat import FlatBucket
from picotron.planner.layout import Placement
from picotron.planner.memory import MemoryTimeline, cell_kind
from picotron.planner.plan import TrainingPlan
from picotron.planner.program import COMPUTE, COPIES, RECEIVES, SENDS, Kind, Row, anchored, rows
from picotron.planner.sharding import PARAMETERS
from picotron.planner.timeline import STREAMS
from picotron.planner.topology import Coordinate, coordinate, rank_of
from picotron.runtime.backend import Backend, Handle, Mark
from picotron.runtime.buckets import BucketBuffers
from picotron.runtime.communicator import Communicator
from picotron.runtime.data import Feed, HostBatch
from picotron.runtime.foreign import Modules, check_modules
from picotron.runtime.kernels import rotary_tables, statistics_dtype
from picotron.runtime.layout import WeightSource, initial_weights
from picotron.runtime.memory import MemoryTracker, storage_bytes
from picotron.runtime.optimizer import learning_rate, verdict
from picotron.runtime.parameters import Parameters
from picotron.runtime.segments import Context, SegmentRunner
from picotron.runtime.sharded import StageGathers, UnitGathers, open_units, whole_gradients, whole_weights
from picotron.runtime.stages import Stage
from picotron.runtime.topology import open_groups

_EXCHANGES = (Kind.REDUCE, Kind.REDUCE_SCATTER, Kind.ALL_GATHER)
_POSTED = (*SENDS, *RECEIVES, *COPIES, *_EXCHANGES, Kind.UNSHARD)  # rows that end at their WAIT
Entry = tuple[int, int, int, int, float, float]  # rank, row, operation, stream, start, end
Span = tuple[Mark, Mark]
Noted = tuple[int, int, int, int, Mark, Mark]  # the same, as the clock told it
Passed = tuple[bool, int, int]  # whether forward, stage and microbatch of what passes between stages


class LossError(ExecutionError):
    """Too many steps in a row without a finite loss; the weights are still those of the last good one."""


@frozen(kw_only=True)
class StepResult:
    """One step as every rank knows it, and what this rank measured of it.

    ``entries`` are timeline rows in seconds since the step began on this rank's clock; ``memory`` is None
    unless the step was asked to measure it. ``skipped``: loss or gradient norm was not finite, so that no
    rank has changed weights or optimizer; a step counts all the same, for the data and the learning rate.
    """

    step: int
    loss: float
    grad_norm: float
    num_tokens: int
    seconds: float
    cpu_seconds: float
    learning_rate: float
    payload_bytes: tuple[tuple[str, str, int], ...]
    entries: tuple[Entry, ...]
    memory: MemoryTimeline | None = None
    skipped: bool = False


@frozen
class _Posted:
    """A transfer or copy under way: its handle, its timeline entry, and its tensor where it has one.

    ``kept``: what the tensor was cast from to travel, and is cast back into.
    """

    handle: Handle
    entry: int
    tensor: torch.Tensor | None
    kept: torch.Tensor | None = None


@define
class _Walk:
    """What one step holds while it runs."""

    batches: Sequence[HostBatch]
    feed: Feed
    tracker: MemoryTracker | None
    started: Mark
    inputs: dict[Passed, torch.Tensor]  # received or handed over, by the stage that takes it
    outputs: dict[Passed, torch.Tensor]  # to be sent, by the stage that made it
    posted: dict[int, _Posted]
    gathers: dict[int, UnitGathers | StageGathers]  # by stage
    entries: list[Noted]
    memory: list[tuple[int, int, int, int]]
    skipped: bool = False


def check_world(plan: TrainingPlan, backend: Backend) -> None:
    """Raise ExecutionError unless ``backend`` has the ranks that ``plan`` needs."""
    if backend.world_size != plan.topology.world_size:
        raise ExecutionError(
            f"the plan needs {plan.topology.world_size} ranks, got a world of {backend.world_size}; "
            f"launch {plan.topology.world_size} processes or plan again",
            rank=backend.rank,
        )


class Session:
    """One rank's part of a plan, opened on a backend."""

    def __init__(
        self,
        plan: TrainingPlan,
        backend: Backend,
        weights: WeightSource | None = None,
        *,
        modules: Modules | None = None,
    ) -> None:
        """Collective: every rank opens its session with the same plan. Raises ExecutionError otherwise.

        ``modules``: by name of a segment ("mlp 0"), what computes in its place (``runtime.foreign``). Raises
        PlanError, before anything opens, for one that cannot.
        """
        check_modules(plan, modules or {})
        check_world(plan, backend)
        backend.at(-1, -1, "opening a session")
        self.plan, self.backend = plan, backend
        self.where = coordinate(plan.topology, backend.rank)
        self.program = plan.program(self.where.tp)
        self.rows = rows(self.program, self.where.pp)
        self.row_names = tuple(map(str, self.rows))
        self.anchored = anchored(self.rows)
        self.communicator = Communicator(backend, open_groups(plan, backend))
        backend.open_channels(self._channels())
        self.positions = plan.token_positions(self.where.cp)
        self.parameters = Parameters(plan, self.where, backend.device, weights or initial_weights(plan))
        self.statistics = torch.zeros(3, dtype=torch.float64, device=backend.device)
        self.units = {
            stage: open_units(plan, stage, self.parameters)
            for stage in plan.rank_stages(self.where.pp)
            if plan.zero_stage == PARAMETERS
        }
        self.fillings = self._open_fillings()
        self.context = self._open_context()
        self.stages = {
            stage: Stage(plan, stage, self.where.tp, self.context, modules)
            for stage in plan.rank_stages(self.where.pp)
        }
        # on clipping and skipping: the host then reads last
        self.decides_on_device = backend.device.type != "cpu"
        self.num_steps = 0
        self.skipped_in_a_row = 0

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The rank's slice of each parameter, by name; of those only of which it keeps all."""
        return self.parameters.kept_whole(lambda own: own.elastic_weights is None, self.parameters.weights)

    @property
    def gradients(self) -> dict[str, torch.Tensor]:
        """The gradient of each, as the last step left it; of those only of which this rank has all."""
        return self.parameters.kept_whole(lambda own: own.flat.ranks == 1, self.parameters.gradients)

    def whole_weights(self) -> dict[str, torch.Tensor]:
        """The rank's slice of each parameter, however ranks share it. Collective: every rank calls it."""
        return whole_weights(self.parameters, self.backend, self.communicator.groups)

    def whole_gradients(self) -> dict[str, torch.Tensor]:
        """The gradient of each, however ranks share it. Collective: every rank calls it."""
        return whole_gradients(self.parameters, self.backend, self.communicator.groups)

    @property
    def placements(self) -> tuple[Placement, ...]:
        """Where each lives."""
        return self.parameters.placements

    @property
    def runners(self) -> list[SegmentRunner]:
        """The segments of all its stages, in order."""
        return [segment for stage in self.stages.values() for segment in stage.segments]

    def _open_fillings(self) -> dict[tuple[int, int], list[BucketBuffers]]:
        """The buckets that a B or W fills and reduces, by the stage and segment that add to them first."""
        found: dict[tuple[int, int], list[BucketBuffers]] = {}
        for stage in self.plan.rank_stages(self.where.pp):
            for filling in self.plan.variant(stage, self.where.tp).fillings:
                bucket = self.parameters.buckets[stage, filling.index]
                found.setdefault((stage, filling.first), []).append(bucket)
        return found

    def _channels(self) -> list[tuple[int, int, str]]:
        """Sender, receiver and name of the channels that this rank's messages take, in ascending order."""
        found = set()
        for row in self.rows:
            if row.kind in SENDS or row.kind in RECEIVES:
                ends = self.backend.rank, rank_of(self.plan.topology, self._neighbour(row.peer))
                sender, receiver = ends if row.kind in SENDS else ends[::-1]
                found.add((sender, receiver, channel_name(row, self.where.pp)))
        return sorted(found)

    def _open_context(self) -> Context:
        plan, model, device = self.plan, self.plan.model, self.backend.device
        d = plan.dims(self.where.tp)
        rotary = positions = None
        places = torch.from_numpy(self.positions).to(device)
        if model.rope_theta is not None:
            wide = statistics_dtype(self.parameters.dtype)
            rotary = rotary_tables(places, model.head_dim, model.rope_theta, model.rope_scaling, wide)
        elif self.plan.stage_rank(0) == self.where.pp:
            first = self.where.tp * d.local_tokens if d.sequence_parallel else 0
            positions = places[(torch.arange(d.local_tokens, device=device) + first) % d.seq_len]
        return Context(
            model=model,
            dims=d,
            tp_index=self.where.tp,
            communicator=self.communicator,
            weights=self.parameters.bound_weights(),
            gradients=self.parameters.bound_gradients(),
            statistics=self.statistics,
            rotary=rotary,
            positions=positions,
        )

    def standing_tensors(self) -> dict[Category, list[torch.Tensor]]:
        """Everything that lives between steps, by the plan's categories."""
        positions = [] if self.context.positions is None else [self.context.positions]
        return {
            **self.parameters.standing(),
            "constants": [self.statistics, *(self.context.rotary or ()), *positions],
        }

    def step(self, batches: Sequence[HostBatch], *, measure_memory: bool = False) -> StepResult:
        """Run the program once over this rank's microbatches, of which it takes its tokens.

        Where loss or gradient norm is not finite, no weight changes; LossError where that follows on the
        plan's ``max_skipped_steps`` of such steps.
        """
        self._check_batches(batches)
        standing = self.standing_tensors() if measure_memory else {}
        tracker = None
        if measure_memory:
            tracker = MemoryTracker(itertools.chain(*standing.values(), self.parameters.elastic()))
        batches = [batch.at(self.positions) for batch in batches]
        feed = Feed(batches, self.backend.device)
        walk = _Walk(batches, feed, tracker, self.backend.mark(), {}, {}, {}, {}, [], [])
        cpu_before = self.backend.cpu_seconds()
        self.communicator.payload_bytes = {}
        self.communicator.measuring = measure_memory
        self.statistics.zero_()
        self.parameters.zero_gradients()
        with torch.no_grad(), tracker or nullcontext():
            self._run_rows(walk)
        if self.decides_on_device:
            self._read_norm(walk)
        loss_sum, num_valid = self.statistics[1:].tolist()
        grad_norm = math.sqrt(float(self.statistics[0]))
        entries, seconds = self._read_clock(walk)
        result = StepResult(
            step=self.num_steps,
            loss=loss_sum / num_valid,
            grad_norm=grad_norm,
            num_tokens=int(num_valid),
            seconds=seconds,
            cpu_seconds=self.backend.cpu_seconds() - cpu_before,
            learning_rate=learning_rate(self.plan.workload, self.num_steps),
            payload_bytes=tuple(
                sorted((*key, size) for key, size in self.communicator.payload_bytes.items())
            ),
            entries=entries,
            memory=_memory_timeline(self.backend.rank, walk.memory, standing) if tracker else None,
            skipped=walk.skipped,
        )
        self.num_steps += 1
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if walk.skipped else 0
        return result

    def _read_clock(self, walk: _Walk) -> tuple[tuple[Entry, ...], float]:
        """What was noted, and the whole step, in seconds since the step began."""
        marks = [self.backend.mark(), *itertools.chain(*(entry[4:] for entry in walk.entries))]
        whole, *seconds = self.backend.seconds_since(walk.started, marks)
        spans = zip(seconds[::2], seconds[1::2], strict=True)
        return tuple((*entry[:4], *span) for entry, span in zip(walk.entries, spans, strict=True)), whole

    def _check_batches(self, batches: Sequence[HostBatch]) -> None:
        """Raise ExecutionError unless they are the microbatches that the plan runs."""
        shape = self.plan.micro_batch, self.plan.workload.seq_len
        got = [batch.ids.shape for batch in batches]
        if got != [shape] * self.plan.num_microbatches:
            raise ExecutionError(
                f"a step needs {self.plan.num_microbatches} microbatches of shape {shape}, got shapes {got}",
                rank=self.backend.rank,
            )

    def _run_rows(self, walk: _Walk) -> None:
        """All of them, in order."""
        for index, row in enumerate(self.rows):
            self._run(walk, index, row)

    def _run(self, walk: _Walk, index: int, row: Row) -> None:
        """One row; what it did is recorded."""
        if row.anchor_row >= 0:
            return  # done inside its anchor
        self._do(walk, index, row)
        self._note_memory(walk, index, -1)

    def _do(self, walk: _Walk, index: int, row: Row) -> None:
        """Act on a row and record when."""
        self.backend.at(self.num_steps, index, self.row_names[index])
        started = self.backend.mark()
        try:
            span = self._act(walk, index, row)
        except ExecutionError as error:
            if error.action is None or error.position is None:
                raise type(error)(
                    error.message, rank=self.backend.rank, action=str(row), position=f"row {index}"
                ) from error
            raise
        if row.kind not in _POSTED:
            began, ended = span or (started, self.backend.mark())
            walk.entries.append((self.backend.rank, index, -1, 0, began, ended))

    def _act(self, walk: _Walk, index: int, row: Row) -> Span | None:
        """Do what a row says; returns when that was, where it is a collective and the backend tells."""
        if row.kind is Kind.FORWARD:
            self._forward(walk, index, row)
        elif row.kind in COMPUTE:
            self._backward(walk, index, row)
        elif row.kind in SENDS or row.kind in RECEIVES:
            self._transfer(walk, index, row)
        elif row.kind in COPIES:
            handle = self.communicator.start_copy(COPIES[row.kind], row.bytes)
            self._note_posted(walk, index, "copy", handle)
        elif row.kind is Kind.WAIT:
            self._wait(walk, row)
        elif row.kind in _EXCHANGES:
            self._exchange(walk, index, row)
        elif row.kind is Kind.UNSHARD:
            self._unshard(walk, index, row)
        elif row.kind is Kind.RESHARD:
            self._reshard(walk, row)
        elif row.kind is Kind.COUNT:
            return self._count(walk, row)
        elif row.kind is Kind.NORM:
            return self._norm(walk, row)
        elif row.kind is Kind.UPDATE:
            self._update(walk)
        else:
            raise ExecutionError(f"{row.kind.name} is planned and priced, and cannot be run yet")
        return None

    def _forward(self, walk: _Walk, index: int, row: Row) -> None:
        tokens = walk.feed.tokens(row.microbatch)
        passed = True, row.stage, row.microbatch
        y = self.stages[row.stage].forward(
            row.microbatch, tokens, walk.inputs.pop(passed, None), partial(self._around, walk, index, row)
        )
        self._pass_on(walk, passed, y)
        walk.feed.pin_after(row.microbatch)

    def _backward(self, walk: _Walk, index: int, row: Row) -> None:
        passed = False, row.stage, row.microbatch
        gradient = self.stages[row.stage].backward(
            row.kind, row.microbatch, walk.inputs.pop(passed, None), partial(self._around, walk, index, row)
        )
        if row.kind is not Kind.BACKWARD_WEIGHT:
            self._pass_on(walk, passed, gradient)

    @contextmanager
    def _around(self, walk: _Walk, index: int, row: Row, order: int, place: int) -> Iterator[None]:
        """One segment of a row: its collectives, its memory, and the rows that follow it inside the row.

        Around it come and go the parameters of its unit and the full gradients of the buckets that it fills.
        """
        body, cost = self.stages[row.stage].planned(row.kind, order)
        action = f"{self.row_names[index]} {body.name}"
        self.backend.at(self.num_steps, index, action)
        if walk.tracker is not None:
            walk.tracker.restart_peak()
        gathers = None if row.kind is Kind.BACKWARD_WEIGHT else walk.gathers.get(row.stage)
        if isinstance(gathers, UnitGathers):
            gathers.before(place)
        if row.kind in (Kind.BACKWARD, Kind.BACKWARD_WEIGHT):
            for bucket in self.fillings.get((row.stage, place), ()):
                bucket.begin()
        self.communicator.open(action, index, body.communication, cost.compute)
        yield
        self.communicator.close()
        if isinstance(gathers, UnitGathers):
            gathers.after(place)
        self._note_memory(walk, index, order)
        for inside in self.anchored.get((index, place), ()):
            self._do(walk, inside, self.rows[inside])
        if walk.tracker is not None:
            walk.tracker.restart_peak()

    def _pass_on(self, walk: _Walk, made: Passed, tensor: torch.Tensor) -> None:
        """Leave what a stage has made to the next one on this rank, or to its send."""
        forward, stage, microbatch = made
        following = stage + 1 if forward else stage - 1
        if following in self.stages:
            walk.inputs[forward, following, microbatch] = tensor
        elif 0 <= following < self.plan.num_stages:
            walk.outputs[made] = tensor

    def _note_memory(self, walk: _Walk, index: int, operation: int) -> None:
        if walk.tracker is not None:
            self.backend.settle()
            walk.memory.append((index, operation, walk.tracker.live_bytes, walk.tracker.peak_bytes))
            walk.tracker.restart_peak()

    def _transfer(self, walk: _Walk, index: int, row: Row) -> None:
        peer = rank_of(self.plan.topology, self._neighbour(row.peer))
        channel = channel_name(row, self.where.pp)
        if row.kind in SENDS:
            tensor = walk.outputs.pop((row.kind is Kind.SEND_F, row.stage, row.microbatch))
            handle = self.communicator.send(tensor, peer, channel, row.bytes)
        else:
            d = self.context.dims
            tensor = torch.empty(
                d.local_tokens, d.hidden, dtype=self.parameters.dtype, device=self.backend.device
            )
            handle = self.communicator.receive(tensor, peer, channel, row.bytes)
        self._note_posted(walk, index, "send" if row.kind in SENDS else "receive", handle, tensor)

    def _note_posted(
        self,
        walk: _Walk,
        index: int,
        stream: str,
        handle: Handle,
        tensor: torch.Tensor | None = None,
        kept: torch.Tensor | None = None,
    ) -> None:
        """Keep what was posted until its WAIT, which also tells when it was known to have ended."""
        walk.posted[index] = _Posted(handle, len(walk.entries), tensor, kept)
        now = self.backend.mark()
        walk.entries.append((self.backend.rank, index, -1, STREAMS.index(stream), now, now))

    def _neighbour(self, pp: int) -> Coordinate:
        return Coordinate(pp=pp, dp=self.where.dp, cp=self.where.cp, tp=self.where.tp)

    def _wait(self, walk: _Walk, row: Row) -> None:
        posted = walk.posted.pop(row.target)
        posted.handle.wait()
        entry = walk.entries[posted.entry]
        span = posted.handle.span or (entry[4], self.backend.mark())
        walk.entries[posted.entry] = (*entry[:4], *span)
        if posted.kept is not None and posted.tensor is not None:
            posted.kept.copy_(posted.tensor)
        target = self.rows[row.target]
        if target.kind in RECEIVES and posted.tensor is not None:
            walk.inputs[target.kind is Kind.RECV_F, target.stage, target.microbatch] = posted.tensor
        elif target.kind is Kind.REDUCE_SCATTER:
            self._fold(target, posted)
        elif target.kind is Kind.UNSHARD:
            self._check_gathered(walk.gathers[target.stage].num_bytes, target)

    def _exchange(self, walk: _Walk, index: int, row: Row) -> None:
        """Post what is done with a bucket: its sum, the sum of a part, or the gathering of its parameters."""
        own, group = self.parameters.buckets[row.stage, row.part], self.program.groups[row.group]
        if row.kind is Kind.ALL_GATHER:
            handle = self.communicator.start_all_gather(own.weights, own.kept_weights, group, row.bytes)
            self._note_posted(walk, index, "collective", handle, own.weights)
        elif row.kind is Kind.REDUCE:
            travelling = own.kept_gradients.to(self.parameters.reduce_dtype)
            handle = self.communicator.start_all_reduce(travelling, group, row.bytes)
            kept = None if travelling is own.kept_gradients else own.kept_gradients
            self._note_posted(walk, index, "collective", handle, travelling, kept)
        else:
            self._scatter(walk, index, row, own)

    def _scatter(self, walk: _Walk, index: int, row: Row, own: BucketBuffers) -> None:
        """Post the sum of a bucket's gradients, of which this rank keeps its part."""
        if own.elastic_gradients is not None:
            self._end_travels(walk, own.flat)
            own.is_travelling = True
        whole = own.gradients.to(self.parameters.reduce_dtype)
        part = own.own_part(whole)
        group = self.program.groups[row.group]
        handle = self.communicator.start_reduce_scatter(part, whole, group, row.bytes)
        in_place = own.is_travelling or whole is own.gradients
        self._note_posted(walk, index, "collective", handle, part, None if in_place else own.own_gradients)

    def _end_travels(self, walk: _Walk, following: FlatBucket) -> None:
        """Before a bucket travels, wait for those of the same ranks that earlier segments completed."""
        for index, posted in walk.posted.items():
            row = self.rows[index]
            if row.kind is Kind.REDUCE_SCATTER and self.program.groups[row.group] == following.group:
                earlier = self.parameters.buckets[row.stage, row.part]
                if earlier.is_travelling and not self._completes_with(row, following):
                    posted.handle.wait()
                    self._fold(row, posted)
                    walk.posted[index] = evolve(posted, tensor=None)

    def _completes_with(self, row: Row, other: FlatBucket) -> bool:
        """Whether the bucket of ``row`` is complete after the same segment as another of its stage."""
        own = self.plan.stage_buckets[other.stage]
        return row.stage == other.stage and own[row.part].ready_segment == own[other.index].ready_segment

    def _fold(self, row: Row, posted: _Posted) -> None:
        """Add what a reduce-scatter has left to what this rank keeps, unless that is done."""
        own = self.parameters.buckets[row.stage, row.part]
        if own.is_travelling:
            assert posted.tensor is not None
            own.fold(posted.tensor)

    def _unshard(self, walk: _Walk, index: int, row: Row) -> None:
        """Begin to gather the parameters of a stage: of its first unit to compute, or of all."""
        found: UnitGathers | StageGathers
        if self.plan.reshard == "stage":
            found = StageGathers(self.communicator, self.units[row.stage])
        else:
            backward = cell_kind(index, self.rows) is not Kind.FORWARD
            found = UnitGathers(self.communicator, self.units[row.stage], backward)
        walk.gathers[row.stage] = found
        found.start()
        self._note_posted(walk, index, "collective", found)

    def _check_gathered(self, num_bytes: int, row: Row) -> None:
        if num_bytes != row.bytes:
            raise ExecutionError(f"units must gather the planned {row.bytes} bytes, got {num_bytes}")

    def _reshard(self, walk: _Walk, row: Row) -> None:
        """Let go of a stage's parameters; of one that is gathered by the unit each has gone already."""
        gathers = walk.gathers.pop(row.stage)
        if isinstance(gathers, StageGathers):
            gathers.release()

    def _meet(self, walk: _Walk, row: Row, tensor: torch.Tensor) -> Span | None:
        """Sum ``tensor`` over the row's group; when that was, if the backend tells."""
        if not row.bytes:
            return None
        handle = self.communicator.start_all_reduce(tensor, self.program.groups[row.group], row.bytes)
        handle.wait()
        return handle.span

    def _count(self, walk: _Walk, row: Row) -> Span | None:
        count = self.statistics[2:]
        count.fill_(sum(batch.num_valid for batch in walk.batches))
        return self._meet(walk, row, count)

    def _norm(self, walk: _Walk, row: Row) -> Span | None:
        """Squared norm, loss and token count, each counted by one rank for all, summed over the world."""
        where, last = self.where, self.plan.num_stages - 1 in self.stages
        self.parameters.add_square_norm(self.statistics[0])
        if not (last and where.tp == 0):
            self.statistics[1:].zero_()
        elif where.dp or where.cp:
            self.statistics[2:].zero_()
        span = self._meet(walk, row, self.statistics)
        if not self.decides_on_device:
            self._read_norm(walk)
        return span

    def _read_norm(self, walk: _Walk) -> None:
        """Know, on the host, whether the step is skipped; raise for one that ends the run."""
        values = self.statistics.tolist()
        if not values[2]:
            raise ExecutionError(
                "a step needs at least one token with a label, got none", rank=self.backend.rank
            )
        walk.skipped = not all(math.isfinite(value) for value in values)
        if walk.skipped and self.skipped_in_a_row == self.plan.workload.max_skipped_steps:
            raise self._too_many_skipped(values[1] / values[2], values[0])

    def _too_many_skipped(self, loss: float, square_norm: float) -> LossError:
        """What ends the run: one more step without a finite loss or gradient norm."""
        before = self.skipped_in_a_row
        return LossError(
            f"loss and gradient norm must be finite, got {loss} and "
            f"{math.sqrt(square_norm) if square_norm >= 0 else square_norm} in step {self.num_steps}"
            f"{f', and none in the {before} skipped before it' if before else ''}; "
            "the weights are those of the last good step: lower the learning rate or look at the data",
            rank=self.backend.rank,
            action="NORM",
            position=f"step {self.num_steps}",
        )

    def _update(self, walk: _Walk) -> None:
        """The optimizer's step; of a step that is skipped, nothing."""
        if self.decides_on_device:
            clipping = verdict(self.statistics, self.plan.workload.max_grad_norm)
            self.parameters.update(self.num_steps, clipping)
        elif walk.skipped:
            return
        else:
            self.parameters.update(self.num_steps, math.sqrt(float(self.statistics[0])))
        self.backend.spend(sum(stage.costs.update_seconds for stage in self.stages.values()))


def channel_name(row: Row, rank: int) -> str:
    """The channel of a message that pipeline rank ``rank`` posts in ``row``.

    Activations go up the ranks on one and gradients down on another. What goes the opposite way, where stages
    come back to lower ranks, has channels of its own, so that all messages of a channel go one way.
    """
    sender, receiver = (rank, row.peer) if row.kind in SENDS else (row.peer, rank)
    forward = row.kind in (Kind.SEND_F, Kind.RECV_F)
    name = "forward" if forward else "backward"
    return name if forward == (sender < receiver) else f"{name} return"


def _memory_timeline(
    rank: int,
    entries: Iterable[tuple[int, int, int, int]],
    standing: Mapping[Category, Iterable[torch.Tensor]],
) -> MemoryTimeline:
    """As measured; what does not stand between steps is all of one category, activations."""
    columns: Any = np.array(list(entries), dtype=np.int64).reshape(-1, 4).T
    sizes = [(name, storage_bytes(tensors)) for name, tensors in standing.items()]
    other = int(columns[3].max()) - sum(size for _, size in sizes)
    return MemoryTimeline(
        rank=rank,
        row=columns[0],
        operation=columns[1],
        live_bytes=columns[2],
        peak_bytes=columns[3],
        peak_by_category=tuple((name, size) for name, size in [*sizes, ("activations", other)] if size),
    )
