"""The benchmark of the runtime beside its peers compares equal trainings and counts what all sides send."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from tests.test_benchmarks import REPORT_KEYS, ROOT, run_script

pytest.importorskip("torch.distributed.tensor.parallel", reason="this torch has no tensor parallelism")

ROW_KEYS = {
    "row",
    "ours",
    "refused",
    "peers",
    "single",
    "absent",
    "over_peers",
    "verdicts",
    "max_loss_difference",
}
SIDE_KEYS = {
    "engine",
    "what",
    "world_size",
    "cpu_seconds",
    "other_seconds",
    "wall_seconds",
    "over_single",
    "over_single_interval",
    "sent_bytes",
    "loopback_bytes",
    "payload",
    "peak_bytes_by_rank",
    "resident_bytes_by_rank",
    "losses",
}
STEPS = 2 + 2 * 1 + 3  # warm-up, rounds * steps, and three looks


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """Standard output and JSON of the tiny model over sockets, tensor parallel beside DTensor."""
    path = tmp_path_factory.mktemp("runtime") / "report.json"
    options = ("--model", "tiny", "--rounds", "2", "--steps-per-round", "1", "--sockets")
    done = run_script(*options, "--rows", "tp2", "--json", str(path), script="runtime.py")
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(path.read_text(encoding="utf-8"))


def test_the_json_has_the_stated_keys(ran: tuple[str, dict[str, Any]]) -> None:
    """The report's keys are those of all benchmarks; a row's sides are ours, the peers and the single one."""
    _, report = ran
    assert report.keys() == REPORT_KEYS
    (row,) = report["rows"]
    assert row.keys() == ROW_KEYS
    for side in (row["ours"], *row["peers"], row["single"]):
        assert side.keys() == SIDE_KEYS


def test_all_sides_train_the_same(ran: tuple[str, dict[str, Any]]) -> None:
    """Every step's loss, also of the steps that are looked at, is the single process's to 1e-5, and falls."""
    (row,) = ran[1]["rows"]
    single = row["single"]["losses"]
    assert len(single) == STEPS and single[-1] < single[0]
    for side in (row["ours"], *row["peers"]):
        assert side["losses"] == pytest.approx(single, rel=0, abs=1e-5)
    assert row["max_loss_difference"] <= 1e-5


def test_a_payload_is_what_sockets_carry(ran: tuple[str, dict[str, Any]]) -> None:
    """In a pair each rank sends what it gives to an all-reduce: sockets carry that, and a little more."""
    (row,) = ran[1]["rows"]
    for side in (row["ours"], *row["peers"]):
        payload = sum(size for _, size in side["payload"].values())
        assert payload <= side["sent_bytes"] <= 1.1 * payload + 4096
    assert row["single"]["sent_bytes"] == 0 and row["single"]["payload"] == {}


def test_dtensor_sends_what_it_is_known_to(ran: tuple[str, dict[str, Any]]) -> None:
    """Seven all-reduces a layer against our four: of 8 x 16 tokens, 32 wide, 4 bytes each, on two ranks."""
    (row,) = ran[1]["rows"]
    width = 8 * 16 * 32 * 4
    ours, (dtensor,) = row["ours"], row["peers"]
    least = 4 * 4 * width * 2  # layers, all-reduces, bytes, ranks
    assert least < ours["payload"]["all_reduce"][1] < least + 3 * 2 * width
    assert 7 * 4 * width * 2 < dtensor["payload"]["all_reduce"][1]


def test_every_rank_is_watched(ran: tuple[str, dict[str, Any]]) -> None:
    """Each rank has a peak of live bytes and one of its memory; ranks of a cut model hold less."""
    (row,) = ran[1]["rows"]
    for side in (row["ours"], *row["peers"]):
        assert len(side["peak_bytes_by_rank"]) == len(side["resident_bytes_by_rank"]) == 2
        assert max(side["peak_bytes_by_rank"]) < row["single"]["peak_bytes_by_rank"][0]


def test_targets_are_judged(ran: tuple[str, dict[str, Any]]) -> None:
    """The row's two targets, in the JSON and below the table."""
    printed, report = ran
    assert [verdict["target"] for verdict in report["rows"][0]["verdicts"]] == ["CPU / single", "payload MB"]
    assert "tp2: payload MB 0.593, target 141: met" in printed


def _benchmark(name: str) -> Any:
    """A module of the benchmarks, which is no package."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return __import__(name)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def test_a_verdict_follows_from_the_interval() -> None:
    """Met or missed where the whole interval is on one side of the bound, open where it is not."""
    judged = _benchmark("runtime")._judged
    assert judged("x", 1.0, 1.1, interval=(0.9, 1.05)).verdict == "met"
    assert judged("x", 1.0, 0.8, interval=(0.9, 1.05)).verdict == "missed"
    assert judged("x", 1.0, 1.0, interval=(0.9, 1.05)).verdict == "open"
    assert judged("bytes", 142.7, 141.0).verdict == "missed"


def test_a_resized_storage_is_counted_anew() -> None:
    """What FSDP2 frees by resizing in place is gone, what it fills again is there."""
    import torch

    counters = _benchmark("counters")
    tensor = torch.empty(1 << 20, dtype=torch.uint8)
    with counters.LiveBytes() as tracker:
        before = tracker.peak_bytes
        tensor.untyped_storage().resize_(0)
        other = torch.zeros(1 << 20, dtype=torch.uint8)
        assert tracker.peak_bytes - before < 1 << 19
        tensor.untyped_storage().resize_(1 << 20)
        tensor.zero_()
        assert tracker.peak_bytes - before >= 1 << 20
    del other


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("--original", "nowhere"), "checkout of huggingface/picotron"), (("--rows", "tp2,no"), "got no")],
)
def test_what_cannot_be_had_is_refused(
    arguments: tuple[str, str],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit code 2 and a message that names it, before anything starts."""
    with pytest.raises(SystemExit) as ended:
        _benchmark("runtime").options_of(arguments)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_without_deepspeed_its_option_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a traceback in the middle of a run."""
    runtime = _benchmark("runtime")
    monkeypatch.setattr(runtime, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        runtime.options_of(["--deepspeed"])
    assert "pip install deepspeed" in capsys.readouterr().err


def test_a_profile_says_where_time_goes() -> None:
    """Spans are counted without what is nested in them, and methods are as they were afterwards."""
    profile = _benchmark("cpu_profile")

    class Worker:
        def outer(self) -> None:
            self.inner()

        def inner(self) -> None:
            sum(range(200_000))

    worker, spans = Worker(), profile.Spans()
    with profile.watched([(worker, "outer", "outer"), (worker, "inner", "inner")], spans):
        worker.outer()
    worker.outer()
    assert spans.times == {"outer": 1, "inner": 1}
    assert spans.seconds["outer"] < spans.seconds["inner"]
    assert vars(worker) == {}
