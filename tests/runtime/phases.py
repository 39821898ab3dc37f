"""Runs a model's segments phase by phase, without a program, and holds their memory against the plan's."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from attrs import frozen

from picotron.planner.body import segment_memory
from picotron.planner.plan import TrainingPlan
from picotron.planner.stage import stage_bodies
from picotron.runtime.backend import Backend
from picotron.runtime.data import DeviceTokens, HostBatch
from picotron.runtime.memory import MemoryTracker
from picotron.runtime.pipeline import Session
from picotron.runtime.simulated import simulate
from tests.runtime.models import random_weights


def tokens(batch: int, seq_len: int, *, vocab: int = 67, seed: int = 0) -> HostBatch:
    """Random ids and targets; the first sequence has five."""
    draw = np.random.default_rng(seed)
    targets = draw.integers(0, vocab, (batch, seq_len))
    targets[0, 5:] = -100
    return HostBatch(draw.integers(0, vocab, (batch, seq_len)), targets)


@frozen(kw_only=True)
class Walked:
    """One rank's gradients after a walk, and bytes of every segment: (left, at its highest moment)."""

    gradients: dict[str, torch.Tensor]
    planned: list[tuple[int, int]]
    measured: list[tuple[int, int]]


def walk(made: TrainingPlan, order: str, *, seed: int = 0, finish: bool = True) -> list[Walked]:
    """Every rank's walk through ``order`` ("F0 I0 W0"); ``made`` has one stage.

    ``finish``: check that nothing of any microbatch is left.
    """
    return simulate(
        lambda backend: _walk(made, order.split(), backend, finish), made.topology.world_size, seed=seed
    )


def _walk(made: TrainingPlan, order: list[str], backend: Backend, finish: bool) -> Walked:
    session = Session(made, backend, random_weights)
    d = made.dims(backend.rank)
    bodies = stage_bodies(made.model, made.topology, 0, made.stage_segments[0], d)
    segments = {
        "F": bodies.forward.segments,
        "B": bodies.backward.segments,
        "I": bodies.backward_input.segments,
        "W": bodies.backward_weight.segments,
    }
    session.communicator.measuring = True
    session.statistics[2] = 1
    saved: dict[str, list[dict[str, Any]]] = {}
    planned, measured = [], []
    with (
        torch.no_grad(),
        MemoryTracker(itertools.chain(*session.standing_tensors().values())) as tracker,
    ):
        level = tracker.live_bytes
        for phase, microbatch in order:
            kept = saved.setdefault(microbatch, [])
            tensor = torch.empty(0, dtype=session.parameters.dtype)
            for number, body in enumerate(segments[phase]):
                runner = session.runners[number if phase == "F" else -1 - number]
                tracker.restart_peak()
                session.communicator.open(f"{phase}{microbatch} {body.name}", 0, body.communication)
                if phase == "F":
                    batch = tokens(d.batch, d.seq_len, vocab=made.model.vocab_size, seed=int(microbatch))
                    tensor, own = runner.forward(tensor, DeviceTokens(batch, backend.device))
                    kept.append(own)
                    del own
                elif phase == "B":
                    tensor = runner.backward(kept[-1 - number], tensor)
                    kept[-1 - number].clear()
                elif phase == "I":
                    tensor = runner.backward_input(kept[-1 - number], tensor)
                else:
                    runner.backward_weight(kept[-1 - number])
                session.communicator.close()
                backend.settle()
                left, highest = segment_memory(body)
                planned.append((level + int(left.sum()), level + int(highest.sum())))
                measured.append((tracker.live_bytes, tracker.peak_bytes))
                level = planned[-1][0]
            del tensor
        assert not finish or not any(itertools.chain(*saved.values()))
        saved.clear()
    gradients = {name: gradient.clone() for name, gradient in session.gradients.items()}
    return Walked(gradients=gradients, planned=planned, measured=measured)
