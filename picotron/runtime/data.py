"""Text to token ids, and the microbatches that each rank sees.

The tokenizer is byte-level: a vocabulary of the 256 byte values. A sample is ``seq_len + 1`` neighbouring
bytes; one that is shorter (the last) is padded, and a padded position has no label.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from attrs import define, field, frozen

from picotron.errors import PlanError
from picotron.planner.data import microbatch_slice, sample_indices
from picotron.planner.plan import TrainingPlan
from picotron.runtime.backend import unseen

IGNORED = -100  # the label of a position without loss
STANDARD_LIBRARY_BYTES = 16 * 2**20  # as much of it as a default run reads


class Dataset(Protocol):
    """Samples of at most ``seq_len + 1`` token ids, each an int64 array."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, index: int) -> np.ndarray:
        """Token ids of one sample."""


@frozen(eq=False)
class ByteText:
    """Bytes of text, cut into samples of ``seq_len + 1``; neighbours share one byte."""

    data: np.ndarray
    seq_len: int

    def __len__(self) -> int:
        return max(0, -(-(len(self.data) - 1) // self.seq_len))

    def __getitem__(self, index: int) -> np.ndarray:
        start = index * self.seq_len
        return self.data[start : start + self.seq_len + 1].astype(np.int64)


def byte_text(path: str | Path, seq_len: int, *, limit_bytes: int | None = None) -> ByteText:
    """Every file at ``path`` (a file, or a folder with all text files below it), one after the other.

    Raises PlanError where the path is missing, unreadable or without two bytes of text.
    """
    if not str(path):
        raise PlanError("the data path must not be empty; name a text file or a folder of them")
    root = Path(path)
    if not root.exists():
        raise PlanError(f"the data path must exist, got {str(path)!r}; name a text file or a folder of them")
    chunks, total = [], 0
    for file in [root] if root.is_file() else _text_files(root):
        try:
            chunks.append(file.read_bytes())
        except OSError as error:
            raise PlanError(f"the data must be readable, got {str(file)!r}: {error.strerror}") from None
        total += len(chunks[-1])
        if limit_bytes is not None and total >= limit_bytes:
            break
    data = np.frombuffer(b"".join(chunks)[:limit_bytes], dtype=np.uint8)
    if len(data) < 2:
        raise PlanError(
            f"the data must hold at least two bytes of text, got {len(data)} in {str(path)!r}; "
            f"a folder is searched for {', '.join(TEXT_SUFFIXES)}"
        )
    return ByteText(data, seq_len)


TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".json", ".jsonl", ".csv", ".html", ".tex", ".c", ".h")


def _text_files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.suffix in TEXT_SUFFIXES and path.is_file())


def standard_library_text(seq_len: int) -> ByteText:
    """The source text of the Python standard library's own modules, which every machine has."""
    root = Path(sysconfig.get_paths()["stdlib"])
    data = b"".join(path.read_bytes() for path in sorted(root.glob("*.py")))
    return ByteText(np.frombuffer(data[:STANDARD_LIBRARY_BYTES], dtype=np.uint8), seq_len)


@frozen(eq=False)
class HostBatch:
    """One microbatch on the host: token ids and labels, [micro_batch, seq_len] int64."""

    ids: np.ndarray
    targets: np.ndarray

    def at(self, positions: np.ndarray) -> HostBatch:
        """The tokens at these positions of every sequence, each with the label that it has in the whole."""
        return HostBatch(self.ids[:, positions], self.targets[:, positions])

    @property
    def num_valid(self) -> int:
        """Labels with a loss."""
        return int((self.targets >= 0).sum())


def collate(samples: Sequence[np.ndarray], seq_len: int) -> HostBatch:
    """Samples as one microbatch: labels are the next tokens, IGNORED past the end of a sample."""
    ids = np.zeros((len(samples), seq_len), dtype=np.int64)
    targets = np.full((len(samples), seq_len), IGNORED, dtype=np.int64)
    for row, sample in enumerate(samples):
        length = min(len(sample), seq_len + 1) - 1
        ids[row, : len(sample[:seq_len])] = sample[:seq_len]
        if length > 0:
            targets[row, :length] = sample[1 : length + 1]
    return HostBatch(ids, targets)


def step_batches(
    plan: TrainingPlan, dataset: Dataset, *, consumed: int, dp_index: int
) -> tuple[HostBatch, ...]:
    """One data-parallel rank's microbatches of the step that starts after ``consumed`` samples."""
    work = plan.workload
    order = sample_indices(
        num_samples=len(dataset), consumed=consumed, count=work.global_batch, seed=work.seed
    )
    slices = (
        microbatch_slice(
            dp=plan.topology.dp,
            dp_index=dp_index,
            num_microbatches=plan.num_microbatches,
            microbatch=index,
            micro_batch=plan.micro_batch,
        )
        for index in range(plan.num_microbatches)
    )
    return tuple(
        collate([_checked(plan, dataset[i], i) for i in order[part]], work.seq_len) for part in slices
    )


def _checked(plan: TrainingPlan, sample: np.ndarray, index: int) -> np.ndarray:
    """The sample, if it has ids and the model has a row for each."""
    if not isinstance(sample, np.ndarray) or sample.ndim != 1 or sample.dtype.kind not in "iu":
        raise PlanError(
            f"a sample must be a 1-D array of whole numbers, got {sample!r:.80} as sample {index}"
        )
    if not len(sample):
        raise PlanError(f"a sample must hold at least one token id, got none in sample {index}")
    lowest, highest = int(sample.min()), int(sample.max())
    if lowest < 0 or highest >= plan.model.vocab_size:
        raise PlanError(
            f"token ids must be in [0, {plan.model.vocab_size}), the vocabulary of {plan.model.name}, "
            f"got {lowest if lowest < 0 else highest} in sample {index}; "
            "use a model whose vocabulary covers the tokenizer's"
        )
    return sample


@define(eq=False)
class DeviceTokens:
    """A microbatch as segments take it: fresh tensors on the device, made when asked for.

    On CUDA they are copied from pinned memory, so that the host does not wait for the copy.
    """

    batch: HostBatch
    device: torch.device
    asked_for: set[str] = field(factory=set)
    _pinned: dict[str, torch.Tensor] = field(factory=dict)

    def token_ids(self) -> torch.Tensor:
        """[T] int64."""
        return self._fresh("ids")

    def labels(self) -> torch.Tensor:
        """[T] int64."""
        return self._fresh("targets")

    def pin(self, name: str) -> None:
        """Have a part of the batch in memory that a GPU copies from by itself."""
        if self.device.type == "cuda" and name not in self._pinned:
            with unseen():
                self._pinned[name] = torch.from_numpy(getattr(self.batch, name)).flatten().pin_memory()

    def _fresh(self, name: str) -> torch.Tensor:
        self.asked_for.add(name)
        self.pin(name)
        source = self._pinned.get(name)
        if source is None:
            source = torch.from_numpy(getattr(self.batch, name)).flatten()
        target = torch.empty(source.shape, dtype=torch.int64, device=self.device)
        return target.copy_(source, non_blocking=True)


class Feed:
    """A step's microbatches on their way to the device, each pinned while the device runs the one before."""

    def __init__(self, batches: Sequence[HostBatch], device: torch.device) -> None:
        self._tokens = [DeviceTokens(batch, device) for batch in batches]

    def tokens(self, microbatch: int) -> DeviceTokens:
        """Those of ``microbatch``."""
        return self._tokens[microbatch]

    def pin_after(self, microbatch: int) -> None:
        """Pin, of the one after ``microbatch``, what was asked for of it."""
        if microbatch + 1 < len(self._tokens):
            for name in sorted(self._tokens[microbatch].asked_for):
                self._tokens[microbatch + 1].pin(name)
