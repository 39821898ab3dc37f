"""DeepSpeed's ZeRO-3 on the Llama of ``peers.py``; the package is optional.

Over gloo on CPU, the optimizer that the other sides have, no clipping (its own default would clip at 1).
On first use it compiles an extension for exchanges between processes of one machine, which takes minutes and
goes through shared memory: bytes sent there pass by no socket.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from counters import LiveBytes
from peers import adamw, llama
from torch_peers import averaged

from picotron.planner.plan import TrainingPlan
from picotron.runtime.data import HostBatch


class DeepSpeedTrainer:
    """One process of ZeRO-3."""

    def __init__(self, plan: TrainingPlan) -> None:
        """One microbatch a rank."""
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed

        deepspeed.init_distributed("gloo", verbose=False)
        module = llama(plan)
        config = {
            "train_micro_batch_size_per_gpu": plan.micro_batch,
            "gradient_accumulation_steps": plan.num_microbatches,
            # One bucket, as its default of 5e8 elements gives too, which would be a buffer of 2 GB.
            "zero_optimization": {"stage": 3, "reduce_bucket_size": plan.model.num_parameters},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,
            "steps_per_print": 10**9,
        }
        optimizer = adamw(module, plan.workload)
        self.engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)

    def step(self, batches: Sequence[HostBatch]) -> float:
        """The mean loss over all ranks' batches."""
        total = 0.0
        for batch in batches:
            loss = self.engine(torch.from_numpy(batch.ids), torch.from_numpy(batch.targets))
            self.engine.backward(loss)
            self.engine.step()
            total += loss.item() / len(batches)
        return averaged(total)

    def measured_step(self, batches: Sequence[HostBatch]) -> tuple[float, int]:
        """A step's loss and its peak of live bytes."""
        with LiveBytes() as tracker:
            loss = self.step(batches)
        return loss, tracker.peak_bytes
