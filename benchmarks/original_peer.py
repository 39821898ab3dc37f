"""The original picotron (github.com/huggingface/picotron), from a checkout, patched in memory only.

It does not run on CPU as published: ``flash_attn`` is imported unconditionally, and ``torch.cuda`` is
synchronised after every exchange between stages. Here ``flash_attn`` is an empty stand-in (its own PyTorch
attention and norm are used), ``torch.cuda.synchronize`` does nothing, and weights and data are ours. The rest
is its ``train.py``'s loop: its model, its tensor, pipeline (1F1B) and bucketed data parallelism, AdamW as it
calls it. Both packages are called picotron, so its modules are imported while ours are put aside.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from counters import LiveBytes
from torch import nn

from picotron.planner.plan import TrainingPlan
from picotron.runtime.data import HostBatch
from picotron.runtime.layout import initial_weights

STUBS = {
    "flash_attn.flash_attn_interface": "flash_attn_func",
    "flash_attn.layers.rotary": "apply_rotary_emb",
    "flash_attn.ops.triton.layer_norm": "layer_norm_fn",
}
VARIABLES = {"FLASH_ATTEN": "0", "DTYPE": "float32", "DEVICE": "cpu", "CONTEXT_PARALLEL": "0"}
NAMES = {  # ours to its own, by parts of a name
    "model.embed_tokens": "embedding",
    "model.layers": "decoder_layers",
    "self_attn.o_proj": "attention.out_proj",
    "self_attn": "attention",
    "model.norm": "final_norm",
    "lm_head": "final_proj",
}


@contextmanager
def imported_from(path: Path) -> Iterator[None]:
    """Inside, ``import picotron`` finds the checkout at ``path``; afterwards it is ours again."""

    def taken() -> dict[str, ModuleType]:
        names = [name for name in sys.modules if name.split(".")[0] == "picotron"]
        return {name: sys.modules.pop(name) for name in names}

    ours = taken()
    package = sys.modules["picotron"] = ModuleType("picotron")
    package.__path__ = [str(path / "picotron")]
    try:
        yield
    finally:
        taken()
        sys.modules.update(ours)


def patch_environment() -> None:
    """What the original needs of its surroundings on a CPU."""
    os.environ.update(VARIABLES)
    for name, function in STUBS.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:end]), ModuleType(".".join(parts[:end])))
        setattr(sys.modules[name], function, None)
    torch.cuda.synchronize = lambda device=None: None


def its_name(name: str) -> str:
    """The original's name of our parameter ``name``."""
    for ours, its in NAMES.items():
        name = name.replace(ours, its)
    return name


class Loader:
    """A step's microbatches, as its training steps ask for them."""

    def __init__(self, batches: Sequence[HostBatch]) -> None:
        self.grad_acc_steps, self._left = len(batches), iter(batches)

    def __next__(self) -> dict[str, Any]:
        batch = next(self._left)
        return {
            "input_ids": torch.from_numpy(batch.ids),
            "target_ids": torch.from_numpy(batch.targets),
            "position_ids": torch.arange(batch.ids.shape[1]).expand(batch.ids.shape),
            "hidden_states": None,
        }


class OriginalTrainer:
    """One process of the original picotron over gloo."""

    def __init__(self, path: Path, plan: TrainingPlan) -> None:
        """``path``: a checkout of the original."""
        dist.init_process_group("gloo")
        patch_environment()
        with imported_from(path):
            import picotron.process_group_manager as pgm
            from picotron.data_parallel.data_parallel import DataParallelBucket
            from picotron.model import Llama
            from picotron.pipeline_parallel.pipeline_parallel import (
                PipelineParallel,
                train_step_pipeline_1f1b,
            )
            from picotron.tensor_parallel.tensor_parallel import apply_tensor_parallel
            from picotron.utils import average_loss_across_dp_cp_ranks
        top, spec = plan.topology, plan.model
        pgm.setup_process_group_manager(top.tp, 1, top.pp, top.dp)
        self.groups: Any = pgm.process_group_manager
        self.train_step, self.average = train_step_pipeline_1f1b, average_loss_across_dp_cp_ranks
        config = SimpleNamespace(
            hidden_size=spec.hidden_size,
            intermediate_size=spec.intermediate_size,
            num_attention_heads=spec.num_heads,
            num_key_value_heads=spec.num_kv_heads,
            num_hidden_layers=spec.num_layers,
            vocab_size=spec.vocab_size,
            max_position_embeddings=plan.workload.seq_len,
            rms_norm_eps=spec.norm_eps,
            rope_theta=spec.rope_theta,
        )
        model: Any = Llama(config)
        if top.tp > 1:
            model = apply_tensor_parallel(model)
        model = PipelineParallel(model, config)
        self._load(model, plan)
        self.model: Any = DataParallelBucket(model) if top.dp > 1 else model
        self.optimizer = self._optimizer(model, plan)
        self.shape = plan.micro_batch, plan.workload.seq_len, spec.hidden_size

    def _load(self, model: nn.Module, plan: TrainingPlan) -> None:
        """The plan's first weights, this rank's part of each."""
        draw, held = initial_weights(plan), dict(model.named_parameters())
        for placement in plan.layout:
            mine = held.get(its_name(placement.name))
            if mine is None:
                continue
            whole = draw(placement)
            cut = [dim for dim, size in enumerate(whole.shape) if size != mine.shape[dim]]
            part = whole.chunk(plan.topology.tp, cut[0])[self.groups.tp_rank] if cut else whole
            mine.data.copy_(part)

    @staticmethod
    def _optimizer(model: nn.Module, plan: TrainingPlan) -> torch.optim.AdamW:
        """AdamW as it calls it, neither fused nor foreach on a CPU; matrices alone decay, as in our plan."""
        work, every = plan.workload, list(model.parameters())
        groups = [
            {"params": [p for p in every if p.dim() > 1], "weight_decay": work.weight_decay},
            {"params": [p for p in every if p.dim() <= 1], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        return torch.optim.AdamW(groups, lr=work.learning_rate, betas=(work.beta1, work.beta2))

    def step(self, batches: Sequence[HostBatch]) -> float:
        """The mean loss over data-parallel ranks, as the last stage's ranks know it."""
        device = torch.device("cpu")
        self.optimizer.zero_grad()
        loss = self.train_step(self.model, Loader(batches), self.shape, device, torch.float32)
        mean: float = self.average(loss, device)
        self.optimizer.step()
        if hasattr(self.model, "reset"):
            self.model.reset()
        return mean

    def measured_step(self, batches: Sequence[HostBatch]) -> tuple[float, int]:
        """A step's loss and its peak of live bytes."""
        with LiveBytes() as tracker:
            loss = self.step(batches)
        return loss, tracker.peak_bytes
