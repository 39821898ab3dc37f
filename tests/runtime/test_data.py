"""Text to token ids, samples to microbatches: labels, padding and order by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from picotron.errors import PlanError
from picotron.planner.plan import TrainingPlan
from picotron.runtime.data import (
    IGNORED,
    STANDARD_LIBRARY_BYTES,
    ByteText,
    DeviceTokens,
    HostBatch,
    byte_text,
    collate,
    standard_library_text,
    step_batches,
)
from tests.runtime.models import random_samples, tiny_model, tiny_plan, tiny_workload


def samples(text: bytes, seq_len: int) -> list[bytes]:
    data = ByteText(np.frombuffer(text, dtype=np.uint8), seq_len)
    return [bytes(data[index].astype(np.uint8)) for index in range(len(data))]


def test_neighbouring_samples_share_one_byte() -> None:
    """Seven bytes in samples of two tokens and a label: the last is short where bytes run out."""
    assert samples(b"abcdefg", 2) == [b"abc", b"cde", b"efg"]
    assert samples(b"abcdef", 2) == [b"abc", b"cde", b"ef"]
    assert samples(b"ab", 8) == [b"ab"]


def test_a_byte_alone_is_no_sample() -> None:
    """It would have no label."""
    assert samples(b"a", 2) == samples(b"", 2) == []


def test_labels_are_the_next_tokens() -> None:
    """Whole, short, single and too long samples of a microbatch with four positions."""
    whole, short, single, long = ([1, 2, 3, 4, 5], [6, 7, 8], [9], [1, 2, 3, 4, 5, 6, 7])
    batch = collate([np.array(sample) for sample in (whole, short, single, long)], 4)
    assert batch.ids.tolist() == [[1, 2, 3, 4], [6, 7, 8, 0], [9, 0, 0, 0], [1, 2, 3, 4]]
    none = IGNORED
    expected = [[2, 3, 4, 5], [7, 8, none, none], [none] * 4, [2, 3, 4, 5]]
    assert batch.targets.tolist() == expected
    assert batch.num_valid == 4 + 2 + 0 + 4


def test_an_id_of_zero_is_a_label() -> None:
    """Only IGNORED has no loss."""
    assert collate([np.array([5, 0, 0])], 2).num_valid == 2


def test_device_tokens_are_fresh_and_flat() -> None:
    """Each call copies: what a segment does to its labels leaves the batch alone."""
    batch = HostBatch(np.array([[1, 2], [3, 4]]), np.array([[2, IGNORED], [4, 5]]))
    tokens = DeviceTokens(batch, torch.device("cpu"))
    tokens.labels().fill_(0)
    assert tokens.labels().tolist() == [2, IGNORED, 4, 5]
    assert tokens.token_ids().tolist() == [1, 2, 3, 4]
    assert tokens.token_ids().dtype == torch.int64


def test_a_file_is_read_as_its_bytes(tmp_path: Path) -> None:
    """UTF-8 is two tokens a letter here; no tokenizer stands between."""
    path = tmp_path / "text"
    path.write_text("aé", encoding="utf-8")
    assert byte_text(path, 8).data.tolist() == [97, 0xC3, 0xA9]
    assert byte_text(str(path), 8, limit_bytes=2).data.tolist() == [97, 0xC3]


def test_a_folder_is_its_text_files_in_order(tmp_path: Path) -> None:
    """Sorted by path, folders below included, other files left out."""
    (tmp_path / "b").mkdir()
    for name, text in (("b/x.py", "3"), ("c.md", "4"), ("a.txt", "12"), ("b/y.bin", "no"), ("z.png", "no")):
        (tmp_path / name).write_text(text)
    assert bytes(byte_text(tmp_path, 8).data) == b"1234"
    assert bytes(byte_text(tmp_path, 8, limit_bytes=3).data) == b"123"


def test_text_must_exist_and_not_be_empty(tmp_path: Path) -> None:
    """A missing path, an empty file, one byte and a folder without text are refused by name."""
    with pytest.raises(PlanError, match=r"the data path must exist, got '.*nowhere'"):
        byte_text(tmp_path / "nowhere", 8)
    with pytest.raises(PlanError, match=r"at least two bytes of text, got 0 in '.*'"):
        byte_text(tmp_path, 8)
    for size in (0, 1):
        (tmp_path / "short.txt").write_bytes(b"x" * size)
        with pytest.raises(PlanError, match=f"at least two bytes of text, got {size} in '.*short.txt'"):
            byte_text(tmp_path / "short.txt", 8)


def test_the_standard_library_has_text() -> None:
    """Every machine can train on it: more than a megabyte, at most 16, and it is Python."""
    data = standard_library_text(128)
    assert 2**20 < len(data.data) <= STANDARD_LIBRARY_BYTES
    assert b"import" in bytes(data.data)
    assert len(data[0]) == 129


def made(*, dp: int = 1, micro_batch: int = 1, global_batch: int = 8, seed: int = 0) -> TrainingPlan:
    work = tiny_workload(global_batch=global_batch, seq_len=4, seed=seed)
    return tiny_plan(tiny_model("llama"), work, dp=dp, micro_batch=micro_batch)


def seen(plan: TrainingPlan, consumed: int, dp_index: int = 0) -> list[list[int]]:
    """The first token of every sample in each microbatch, samples being numbered by it."""
    data = [np.full(5, number) for number in range(10)]
    return [
        batch.ids[:, 0].tolist() for batch in step_batches(plan, data, consumed=consumed, dp_index=dp_index)
    ]


def test_ranks_take_neighbouring_samples() -> None:
    """Eight samples on two ranks in microbatches of two: the first rank has the first four."""
    alone = [number for (number,) in seen(made(), 0)]
    for dp_index in range(2):
        first = 4 * dp_index
        expected = [alone[first : first + 2], alone[first + 2 : first + 4]]
        assert seen(made(dp=2, micro_batch=2), 0, dp_index) == expected


def test_an_epoch_sees_every_sample_once() -> None:
    """Five steps of eight are four epochs of ten samples, each in another order."""
    order = [number for step in range(5) for (number,) in seen(made(), 8 * step)]
    epochs = [order[first : first + 10] for first in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_seed_draws_the_order() -> None:
    """Equal seeds see equal samples, others others."""
    assert seen(made(seed=1), 0) == seen(made(seed=1), 0) != seen(made(seed=2), 0)


@pytest.mark.parametrize(("token", "shown"), [(67, "67"), (-1, "-1")])
def test_ids_outside_the_vocabulary_are_refused(token: int, shown: str) -> None:
    """As a token and as a label, before anything runs; the id itself is named."""
    for sample in ([1, 2, 3, token], [token, 2, 3]):
        if token < 0 and sample[-1] == token:
            continue  # a negative label is one without loss
        with pytest.raises(PlanError, match=rf"must be in \[0, 67\), the vocabulary of llama, got {shown}"):
            step_batches(made(), [np.array(sample)], consumed=0, dp_index=0)


def test_a_sample_without_labels_counts_none() -> None:
    """Single tokens fill their places and weigh nothing."""
    data = random_samples(67, 4, ragged=True)
    single = [number for number, sample in enumerate(data) if len(sample) == 1]
    assert len(single) >= 3
    assert all(collate([data[number]], 4).num_valid == 0 for number in single)
