"""Plain PyTorch, as a good practitioner would write it: what Picotron's runtime is measured against.

A Llama decoder of stock modules trained by autograd, fused attention and fused AdamW, alone, data parallel
under DDP, tensor parallel by three autograd functions, or cut into stages that torch's own pipeline runtime
walks by any schedule that it can read. Parameters bear their Hugging Face names, so that both sides start
from the same weights. Nothing of Picotron's runtime is used but its first weights and its memory tracker,
which watches both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from attrs import evolve
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention, silu
from torch.nn.parallel import DistributedDataParallel

from picotron.planner.model import ModelSpec
from picotron.planner.pipeline import Schedule, schedule_to_csv
from picotron.planner.plan import TrainingPlan
from picotron.planner.workload import Workload
from picotron.runtime.data import HostBatch
from picotron.runtime.layout import DTYPES, WeightSource, initial_weights
from picotron.runtime.memory import MemoryTracker


def rotated(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """The rotation of x [batch, heads, s, d] by its positions; tables are [s, d/2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.head_dim, self.shared = spec.head_dim, spec.num_heads != spec.num_kv_heads
        query, key = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.q_proj = nn.Linear(spec.hidden_size, query, bias=False)
        self.k_proj = nn.Linear(spec.hidden_size, key, bias=False)
        self.v_proj = nn.Linear(spec.hidden_size, key, bias=False)
        self.o_proj = nn.Linear(query, spec.hidden_size, bias=False)

    def forward(self, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        """X [batch, s, hidden]."""
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotated(q, cosine, sine), rotated(k, cosine, sine)
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.shared)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """silu(gate) * up, then down."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=False)
        self.up_proj = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=False)
        self.down_proj = nn.Linear(spec.intermediate_size, spec.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X [batch, s, hidden]."""
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention and MLP, each after a norm and around a residual."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(spec.hidden_size, eps=spec.norm_eps)
        self.self_attn = Attention(spec)
        self.post_attention_layernorm = nn.RMSNorm(spec.hidden_size, eps=spec.norm_eps)
        self.mlp = Mlp(spec)

    def forward(self, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        """X [batch, s, hidden]."""
        x = x + self.self_attn(self.input_layernorm(x), cosine, sine)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers and the last norm."""

    cosine: torch.Tensor
    sine: torch.Tensor

    def __init__(self, spec: ModelSpec, seq_len: int) -> None:
        super().__init__()
        assert spec.rope_theta is not None, "the peer is a Llama"
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.layers = nn.ModuleList(Layer(spec) for _ in range(spec.num_layers))
        self.norm = nn.RMSNorm(spec.hidden_size, eps=spec.norm_eps)
        frequencies = 1.0 / spec.rope_theta ** (torch.arange(0, spec.head_dim, 2) / spec.head_dim)
        angles = torch.outer(torch.arange(seq_len), frequencies)
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states [batch, s, hidden] of ids [batch, s]."""
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, self.cosine, self.sine)
        return self.norm(x)


class Llama(nn.Module):
    """The mean loss of a batch."""

    def __init__(self, spec: ModelSpec, seq_len: int) -> None:
        super().__init__()
        self.model = Decoder(spec, seq_len)
        self.lm_head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of ``targets`` [batch, s] after ``ids`` [batch, s]."""
        logits = self.lm_head(self.model(ids))
        return cross_entropy(logits.flatten(0, 1), targets.flatten())


def llama(plan: TrainingPlan, draw: WeightSource | None = None) -> Llama:
    """The plan's model with weights that ``draw`` gives, else with the plan's first ones."""
    module, draw = Llama(plan.model, plan.workload.seq_len), draw or initial_weights(plan)
    module.to(DTYPES[plan.workload.precision])
    module.load_state_dict({placement.name: draw(placement) for placement in plan.layout})
    return module


def adamw(module: nn.Module, work: Workload) -> torch.optim.AdamW:
    """The workload's optimizer; matrices alone decay."""
    groups = [
        {"params": [p for p in module.parameters() if p.dim() > 1], "weight_decay": work.weight_decay},
        {"params": [p for p in module.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=work.learning_rate, betas=(work.beta1, work.beta2), fused=True)


class PlainTrainer:
    """One process; microbatches accumulate their gradients."""

    def __init__(self, plan: TrainingPlan) -> None:
        self.plan = plan
        module = self._made(plan)
        self.module: nn.Module = self._wrapped(module)
        self.optimizer = adamw(module, plan.workload)

    def _made(self, plan: TrainingPlan) -> nn.Module:
        return llama(plan)

    def _wrapped(self, module: nn.Module) -> nn.Module:
        return module

    def _backward_scope(self, *, last: bool) -> AbstractContextManager[object]:
        return nullcontext()

    def step(self, batches: Sequence[HostBatch]) -> float:
        """The mean loss of one step over ``batches``, all labels of which count."""
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for index, batch in enumerate(batches):
            ids, targets = torch.from_numpy(batch.ids), torch.from_numpy(batch.targets)
            with self._backward_scope(last=index == len(batches) - 1):
                loss = self.module(ids, targets) / len(batches)
                loss.backward()
            total += loss.item()
        self.optimizer.step()
        return total

    def measured_step(self, batches: Sequence[HostBatch]) -> tuple[float, int]:
        """A step's loss and its peak of live bytes."""
        tracker = MemoryTracker(self._standing_tensors())
        with tracker:
            loss = self.step(batches)
        return loss, tracker.peak_bytes

    def _standing_tensors(self) -> Iterable[torch.Tensor]:
        for state in self.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))
        yield from self.module.buffers()
        for parameter in self.module.parameters():
            yield parameter.detach()
            if parameter.grad is not None:
                yield parameter.grad


class DdpTrainer(PlainTrainer):
    """DistributedDataParallel, which reduces in the last microbatch; gradients live in its buckets.

    Over the process group that is open, or gloo: the process finds torchrun's variables in its environment.
    """

    def __init__(self, plan: TrainingPlan) -> None:
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        super().__init__(plan)

    def _wrapped(self, module: nn.Module) -> nn.Module:
        return DistributedDataParallel(module, gradient_as_bucket_view=True)

    def _backward_scope(self, *, last: bool) -> AbstractContextManager[object]:
        assert isinstance(self.module, DistributedDataParallel)
        return nullcontext() if last else self.module.no_sync()

    def step(self, batches: Sequence[HostBatch]) -> float:
        """The mean loss over all ranks' batches."""
        loss = torch.tensor(super().step(batches))
        dist.all_reduce(loss)
        return loss.item() / dist.get_world_size()


_CUT_DIMS = {  # of the weights that tensor parallelism cuts, by the module's name
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head"), 0),
    **dict.fromkeys(("o_proj", "down_proj"), 1),
}


class Copied(torch.autograd.Function):
    """The same on every rank; gradients are summed (Shoeybi et al. 2019, section 3)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient


class Summed(torch.autograd.Function):
    """The sum over the ranks; each gets the whole gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(x)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


class Gathered(torch.autograd.Function):
    """The ranks' parts side by side along the last dim; each gets its part of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.chunk(dist.get_world_size(), dim=-1)[dist.get_rank()]


class TensorParallelTrainer(PlainTrainer):
    """One rank's heads and columns, in the process group that is open; the embedding and norms are whole."""

    def _made(self, plan: TrainingPlan) -> Llama:
        size, rank, spec = dist.get_world_size(), dist.get_rank(), plan.model
        local = evolve(
            spec,
            num_heads=spec.num_heads // size,
            num_kv_heads=spec.num_kv_heads // size,
            intermediate_size=spec.intermediate_size // size,
        )
        module, draw = Llama(local, plan.workload.seq_len), initial_weights(plan)
        module.lm_head = nn.Linear(spec.hidden_size, spec.vocab_size // size, bias=False)
        state = {}
        for placement in plan.layout:
            whole, dim = draw(placement), _CUT_DIMS.get(placement.name.split(".")[-2])
            state[placement.name] = whole if dim is None else whole.chunk(size, dim)[rank]
        module.load_state_dict(state)
        blocks = [block for layer in module.model.layers for block in (layer.self_attn, layer.mlp)]
        for block in (*blocks, module.lm_head):
            block.register_forward_pre_hook(lambda _, given: (Copied.apply(given[0]), *given[1:]))
        for block in blocks:
            block.register_forward_hook(lambda _, given, out: Summed.apply(out))
        module.lm_head.register_forward_hook(lambda _, given, out: Gathered.apply(out))
        return module


class Stage(nn.Module):
    """Consecutive ``layers`` of a Llama by their Hugging Face names: hidden states in, hidden states out.

    The first stage takes ids, the last gives logits.
    """

    cosine: torch.Tensor
    sine: torch.Tensor

    def __init__(self, whole: Llama, layers: range) -> None:
        super().__init__()
        decoder = whole.model
        self.model = nn.ModuleDict({"layers": nn.ModuleDict({str(i): decoder.layers[i] for i in layers})})
        if layers.start == 0:
            self.model["embed_tokens"] = decoder.embed_tokens
        if layers.stop == len(decoder.layers):
            self.model["norm"], self.lm_head = decoder.norm, whole.lm_head
        self.register_buffer("cosine", decoder.cosine, persistent=False)
        self.register_buffer("sine", decoder.sine, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X [batch, s] of ids, else [batch, s, hidden]."""
        if "embed_tokens" in self.model:
            x = self.model["embed_tokens"](x)
        for layer in self.model["layers"].values():
            x = layer(x, self.cosine, self.sine)
        return self.lm_head(self.model["norm"](x)) if "norm" in self.model else x


def stages(whole: Llama, stage_layers: Sequence[int]) -> list[Stage]:
    """``whole`` cut into stages of so many layers each, which share its parameters."""
    ends = list(accumulate(stage_layers))
    return [Stage(whole, range(end - num, end)) for end, num in zip(ends, stage_layers, strict=True)]


def pipeline_runtime(
    schedule: Schedule,
    own: Mapping[int, nn.Module],
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    group: dist.ProcessGroup | None = None,
) -> Any:
    """Torch's own pipeline runtime, ready to walk ``schedule`` as it reads it from a file.

    ``own`` are this rank's stages; ``loss`` is of one microbatch, and gradients add up over the microbatches.
    """
    from torch.distributed.pipelining import PipelineStage
    from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime

    device = torch.device("cpu")
    parts = [
        PipelineStage(module, stage, schedule.num_stages, device, group=group)
        for stage, module in sorted(own.items())
    ]
    runtime = _PipelineScheduleRuntime(parts, schedule.num_microbatches, loss_fn=loss, scale_grads=False)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "schedule.csv"
        path.write_text(schedule_to_csv(schedule), encoding="utf-8")
        runtime._load_csv(str(path), format="compute_only")
    return runtime


class PipelineTrainer(PlainTrainer):
    """One rank of torch's pipeline runtime over gloo, with the plan's own stages and schedule."""

    def __init__(self, plan: TrainingPlan) -> None:
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        self.own = plan.rank_stages(dist.get_rank())
        super().__init__(plan)
        num_microbatches = plan.num_microbatches

        def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return cross_entropy(logits.flatten(0, 1), targets.flatten()) / num_microbatches

        assert isinstance(self.module, nn.ModuleList)
        own = dict(zip(self.own, self.module, strict=True))
        self.runtime = pipeline_runtime(plan.schedule, own, loss)
        self.first, self.last = 0 in self.own, plan.num_stages - 1 in self.own

    def _made(self, plan: TrainingPlan) -> nn.Module:
        every = stages(llama(plan), plan.stage_layers)
        return nn.ModuleList([every[stage] for stage in self.own])

    def step(self, batches: Sequence[HostBatch]) -> float:
        """The mean loss of one step, which every rank is told."""
        self.optimizer.zero_grad(set_to_none=True)
        losses: list[torch.Tensor] = []
        self.runtime.step(
            *([_stacked([batch.ids for batch in batches])] if self.first else []),
            target=_stacked([batch.targets for batch in batches]) if self.last else None,
            losses=losses,
            return_outputs=False,
        )
        self.optimizer.step()
        total = torch.tensor(float(sum(loss.item() for loss in losses)))
        dist.all_reduce(total)
        return total.item()


def _stacked(arrays: Sequence[np.ndarray]) -> torch.Tensor:
    """One batch of all microbatches, which the runtime cuts again."""
    return torch.from_numpy(np.concatenate(arrays))
