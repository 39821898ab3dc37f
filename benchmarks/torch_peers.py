"""PyTorch's own parallelism on the Llama of ``peers.py``, as its tutorials and torchtitan put it together.

Tensor parallelism by DTensor (``parallelize_module``) with the vocabulary-parallel loss, with and without
sequence parallelism; FSDP2 (``fully_shard`` of every layer, then of the rest); 1F1B of
``torch.distributed.pipelining``; and all three at once. Each over gloo, from the plan's sizes and weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from counters import LiveBytes
from peers import Llama, PlainTrainer, _stacked, stages
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.functional import cross_entropy

from picotron.planner.plan import TrainingPlan
from picotron.runtime.data import HostBatch


class DistributedTrainer(PlainTrainer):
    """A process of a peer over gloo; its memory is watched with storages that may be resized."""

    def __init__(self, plan: TrainingPlan) -> None:
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        top = plan.topology
        self.mesh = init_device_mesh("cpu", (top.pp, top.dp, top.tp), mesh_dim_names=("pp", "dp", "tp"))
        super().__init__(plan)

    def measured_step(self, batches: Sequence[HostBatch]) -> tuple[float, int]:
        """A step's loss and its peak of live bytes."""
        with LiveBytes() as tracker:
            loss = self.step(batches)
        return loss, tracker.peak_bytes


def cut_layers(layers: Sequence[nn.Module], mesh: DeviceMesh, *, sequence: bool) -> None:
    """Tensor parallelism of decoder layers; ``sequence``: between the blocks, tokens are cut too."""
    rows = RowwiseParallel(output_layouts=Shard(1)) if sequence else RowwiseParallel()
    styles: dict[str, ParallelStyle] = {
        **{f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"},
        **{f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")},
        "self_attn.o_proj": rows,
        "mlp.down_proj": rows,
    }
    if sequence:
        styles |= {
            "input_layernorm": SequenceParallel(),
            "post_attention_layernorm": SequenceParallel(),
            "self_attn": PrepareModuleInput(
                input_layouts=(Shard(1), None, None), desired_input_layouts=(Replicate(), None, None)
            ),
            "mlp": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        }
    for layer in layers:
        parallelize_module(layer, mesh, styles)


def cut_ends(
    embedding: tuple[nn.Module, str] | None,
    norm: tuple[nn.Module, str] | None,
    head: tuple[nn.Module, str] | None,
    mesh: DeviceMesh,
    *,
    sequence: bool,
) -> None:
    """Tensor parallelism of the vocabulary's two tables; logits stay cut, as ``loss_parallel`` takes them."""
    between = Shard(1) if sequence else Replicate()
    style = ColwiseParallel(input_layouts=between, output_layouts=Shard(-1), use_local_output=False)
    if embedding is not None:
        rows = RowwiseParallel(input_layouts=Replicate(), output_layouts=between)
        parallelize_module(embedding[0], mesh, {embedding[1]: rows})
    if norm is not None and sequence:
        parallelize_module(norm[0], mesh, {norm[1]: SequenceParallel()})
    if head is not None:
        parallelize_module(head[0], mesh, {head[1]: style})


class DTensorTrainer(DistributedTrainer):
    """Tensor parallelism by DTensor."""

    def _wrapped(self, module: nn.Module) -> nn.Module:
        assert isinstance(module, Llama)
        decoder, mesh = module.model, self.mesh["tp"]
        cut_layers(list(decoder.layers), mesh, sequence=self.plan.sequence_parallel)
        cut_ends(
            (decoder, "embed_tokens"),
            (decoder, "norm"),
            (module, "lm_head"),
            mesh,
            sequence=self.plan.sequence_parallel,
        )
        return module

    def step(self, batches: Sequence[HostBatch]) -> float:
        """The mean loss of one step."""
        with loss_parallel():
            return super().step(batches)


def averaged(loss: float) -> float:
    """The mean of all ranks' ``loss``."""
    total = torch.tensor(loss)
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


class FsdpTrainer(DistributedTrainer):
    """FSDP2: parameters, gradients and optimizer state sharded, layer by layer."""

    def _wrapped(self, module: nn.Module) -> nn.Module:
        assert isinstance(module, Llama)
        for layer in module.model.layers:
            fully_shard(layer, mesh=self.mesh["dp"])
        return fully_shard(module, mesh=self.mesh["dp"])

    def step(self, batches: Sequence[HostBatch]) -> float:
        """The mean loss over all ranks' batches."""
        return averaged(super().step(batches))


class PipelinesTrainer(DistributedTrainer):
    """1F1B of ``torch.distributed.pipelining``, each stage under DTensor and FSDP2 where the plan says so."""

    def __init__(self, plan: TrainingPlan) -> None:
        super().__init__(plan)
        num_microbatches = plan.num_microbatches

        def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return cross_entropy(logits.flatten(0, 1), targets.flatten()) / num_microbatches

        where = self.mesh["pp"].get_local_rank()
        stage = PipelineStage(
            self.module, where, plan.num_stages, torch.device("cpu"), group=self.mesh["pp"].get_group()
        )
        self.runtime = Schedule1F1B(stage, num_microbatches, loss_fn=loss, scale_grads=False)
        self.first, self.last = where == 0, where == plan.num_stages - 1

    def _made(self, plan: TrainingPlan) -> nn.Module:
        whole = super()._made(plan)
        assert isinstance(whole, Llama)
        return stages(whole, plan.stage_layers)[self.mesh["pp"].get_local_rank()]

    def _wrapped(self, module: nn.Module) -> nn.Module:
        layers: Any = module.model["layers"].values()
        if self.plan.topology.tp > 1:
            mesh, own = self.mesh["tp"], module.model
            cut_layers(list(layers), mesh, sequence=False)
            cut_ends(
                (own, "embed_tokens") if "embed_tokens" in own else None,
                (own, "norm") if "norm" in own else None,
                (module, "lm_head") if hasattr(module, "lm_head") else None,
                mesh,
                sequence=False,
            )
        if self.plan.topology.dp > 1:
            for layer in layers:
                fully_shard(layer, mesh=self.mesh["dp"], reshard_after_forward=False)
            fully_shard(module, mesh=self.mesh["dp"], reshard_after_forward=False)
        return module

    def step(self, batches: Sequence[HostBatch]) -> float:
        """The mean loss of one step, which every rank is told."""
        self.optimizer.zero_grad(set_to_none=True)
        losses: list[Any] = []
        with loss_parallel() if self.plan.topology.tp > 1 else nullcontext():
            self.runtime.step(
                *([_stacked([batch.ids for batch in batches])] if self.first else []),
                target=_stacked([batch.targets for batch in batches]) if self.last else None,
                losses=losses,
                return_outputs=False,
            )
        self.optimizer.step()
        own = sum(loss.item() for loss in losses)
        total = torch.tensor(float(own))
        dist.all_reduce(total)
        return total.item() / (self.plan.topology.dp * self.plan.topology.tp)
