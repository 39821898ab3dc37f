"""When a process dies, all others end soon, and say who died and where."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from picotron.errors import ExecutionError
from picotron.planner.plan import TrainingPlan
from picotron.planner.program import rows
from picotron.runtime import watchdog
from picotron.runtime.connections import break_off, open_connections
from picotron.runtime.data import step_batches
from picotron.runtime.distributed import DistributedBackend, connect
from picotron.runtime.pipeline import Session
from picotron.runtime.watchdog import Watchdog
from tests.runtime.gloo import launch
from tests.runtime.models import random_samples, random_weights, tiny_model, tiny_plan, tiny_workload

QUICK = {"BREAK_SECONDS": 0.3, "GRACE_SECONDS": 1.0, "TELL_SECONDS": 0.2}  # so that the tests are


def pipeline() -> TrainingPlan:
    return tiny_plan(tiny_model("gpt2", layers=3), tiny_workload(global_batch=3), pp=3)


def until_a_neighbour_dies(folder: Path) -> None:
    """Rank 2 is killed in step 1; rank 1 is busy and does not ask for it; rank 0 waits for rank 1 alone.

    What each was told, and when: in a file of its own, its standard error in another.
    """
    for name, value in QUICK.items():
        setattr(watchdog, name, value)
    made, processes = pipeline(), connect(60)
    os.dup2(os.open(folder / f"stderr-{processes.rank}", os.O_CREAT | os.O_WRONLY), 2)
    data = random_samples(made.model.vocab_size, made.workload.seq_len)
    backend = DistributedBackend(processes, device="cpu", timeout_seconds=60)
    try:
        session = Session(made, backend, random_weights)
        session.step(step_batches(made, data, consumed=0, dp_index=0))
        if processes.rank == 2:
            session.runners[0].forward = lambda x, tokens: _die(folder)  # type: ignore[method-assign]
        if processes.rank == 1:
            session.runners[0].forward = lambda x, tokens: time.sleep(60)  # type: ignore[method-assign]
            backend.send(session.statistics.new_zeros(8, 24), 2, "forward")  # in place of rank 1's own
        session.step(step_batches(made, data, consumed=3, dp_index=0))
    except ExecutionError as error:
        seconds = time.time() - float((folder / "death").read_text())
        (folder / f"told-{processes.rank}").write_text(f"{seconds}\n{error}")
        backend.abort(error)


def _die(folder: Path) -> Any:
    time.sleep(2 * QUICK["TELL_SECONDS"])  # for the others to hear where
    (folder / "death").write_text(str(time.time()))
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_death_of_a_process_ends_all_others(tmp_path: Path) -> None:
    """Who waits for somebody else, and who is busy: each says who died, and who was where."""
    with pytest.raises(RuntimeError, match="rank 1 failed:\nit ended without a result, exit code 3"):
        launch(until_a_neighbour_dies, 3, tmp_path, killed=[2], timeout_seconds=60)
    forward = next(row for row in rows(pipeline().program(0), 2) if str(row).startswith("2F0"))
    index = rows(pipeline().program(0), 2).index(forward)
    gone = f"rank 2 is gone: its process ended without a word, last seen at step 1, row {index}, 2F0"
    seconds, error = (tmp_path / "told-0").read_text().split("\n", 1)
    assert float(seconds) < QUICK["BREAK_SECONDS"] + QUICK["GRACE_SECONDS"]
    assert re.match(rf"rank 0, action \S+, position row \d+: {gone}", error)
    ended = (tmp_path / "stderr-1").read_text()
    assert re.search(rf"picotron: rank 1, at step 1, row \d+, 1F0 attention 1: {gone}", ended)


@pytest.fixture
def dogs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Watchdog]]:
    """Four ranks' watchdogs in this process; what they end is written down in ``ended``."""
    for name, value in QUICK.items():
        monkeypatch.setattr(watchdog, name, value)
    ended: list[str] = []
    monkeypatch.setattr(
        Watchdog, "_end", lambda self, why, code: ended.append(f"{self.rank}: {why} ({code})")
    )
    store: Any = dist.HashStore()  # type: ignore[attr-defined]
    made = [Watchdog(rank, 4, store, lambda: None) for rank in range(4)]
    made[0].ended = ended  # type: ignore[attr-defined]
    yield made
    for dog in made:
        dog.leave()
        dog.close()


def test_the_first_rank_is_watched_too(dogs: list[Watchdog]) -> None:
    """It alone connects the others: each of them sees its end for itself, and where it was."""
    dogs[0].at((3, 14, "0B1 mlp"))
    time.sleep(3 * QUICK["TELL_SECONDS"])
    dogs[0].close()  # without a word
    words = "rank 0 is gone: its process ended without a word, last seen at step 3, row 14, 0B1 mlp"
    assert [dog.wait(5.0) for dog in dogs[1:]] == [words] * 3


def test_a_rank_that_leaves_is_not_missed(dogs: list[Watchdog]) -> None:
    """Nothing is told of who ends in good order, the first rank among them; later deaths are."""
    dogs[3].leave()
    dogs[3].close()
    assert [dog.wait(2 * QUICK["TELL_SECONDS"]) for dog in dogs[:3]] == [None] * 3
    dogs[2].close()  # without a word
    assert "rank 2 is gone" in str(dogs[1].wait(5.0))
    assert dogs[3].news is None


def test_a_failure_is_told_once_and_first(dogs: list[Watchdog]) -> None:
    """What the first rank to fail says reaches everybody; what follows from it does not."""
    dogs[2].failed("rank 2 failed: ValueError: my fault")
    assert [dogs[rank].wait(5.0) for rank in (0, 1, 3)] == ["rank 2 failed: ValueError: my fault"] * 3
    dogs[1].failed("rank 1 failed too")
    time.sleep(QUICK["TELL_SECONDS"])
    assert "my fault" in str(dogs[3].news)


def test_sigterm_is_obeyed_with_its_cause(dogs: list[Watchdog]) -> None:
    """A launcher ends the others of a rank that died: the line says who, not that somebody sent SIGTERM."""
    os.kill(os.getpid(), signal.SIGTERM)
    dogs[3].close()  # without a word
    deadline = time.monotonic() + 5.0
    while not (ended := [line for line in dogs[0].ended if line.startswith("0: ")]):  # type: ignore[attr-defined]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert re.fullmatch(r"0: rank 3 is gone: .*before its first row; SIGTERM \(143\)", ended[0])


def test_only_the_connections_named_are_broken_off() -> None:
    """Who waits to receive is told at once; a listener and another connection stay as they are."""
    listener = socket.create_server(("127.0.0.1", 0))
    with listener, socket.create_connection(listener.getsockname()) as kept:
        kept_peer, _ = listener.accept()
        before = open_connections()
        with socket.create_connection(listener.getsockname()) as broken:
            broken_peer, _ = listener.accept()
            break_off(open_connections() - before)
            assert broken.recv(1) == b"" and broken_peer.recv(1) == b""
            kept.sendall(b"x")
            assert kept_peer.recv(1) == b"x"
            socket.create_connection(listener.getsockname()).close()
            broken_peer.close()
        kept_peer.close()
