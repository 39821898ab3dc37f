"""A rank's parameters, their gradients in the plan's buckets, and the optimizer that moves them.

Every bucket is one flat buffer of weights, one of gradients and, of the part that this rank updates, one of
each moment and (in mixed precision) of main weights. Parameters and gradients are views by name. Of what
ranks share, full gradients stand while they fill and travel, and full weights while their unit computes; the
rest of the time their views are without memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from attrs import frozen

from picotron.planner.body import Category
from picotron.planner.flat import FlatBucket, counted_ranges, flat_bucket, place_in_group
from picotron.planner.plan import TrainingPlan
from picotron.planner.plan_buckets import shares_table
from picotron.planner.topology import Coordinate
from picotron.runtime.buckets import (
    BucketBuffers,
    BucketWeights,
    Elastic,
    open_buffers,
    open_weights,
    own_range,
    views,
)
from picotron.runtime.layout import DTYPES, WIDTHS, WeightSource, slice_of
from picotron.runtime.optimizer import (
    MOMENT_NAMES,
    Optimizer,
    Range,
    Verdict,
    clip_coefficient,
    learning_rate,
)

Key = tuple[int, int]  # stage and index of a bucket
HEAD = "lm_head.weight"


@frozen
class HeadTable:
    """A head's own view of the table that it shares with an embedding, and of the gradient they share."""

    whole: Elastic
    weight: torch.Tensor
    gradient: torch.Tensor


class Parameters:
    """What one rank holds of the model's parameters.

    ``weights`` and ``gradients`` are views by name of the flat buffers in ``buckets``, by (stage, index).
    Torch does not look whether a view still has memory: those of elastic buffers are for the segments that
    the walker runs. In 16 bits fp32 main weights are moved, which the weights are rounded from.
    """

    def __init__(
        self, plan: TrainingPlan, where: Coordinate, device: torch.device, source: WeightSource
    ) -> None:
        self.plan, self.where = plan, where
        self.placements = plan.held(where)
        self.dtype, self.reduce_dtype = DTYPES[plan.workload.precision], WIDTHS[plan.format.reduce]
        self.buckets = self._open_buckets(device, source)
        self.weights = {
            name: view for own in self.buckets.values() for name, view in own.weight_views.items()
        }
        self.gradients = {
            name: view for own in self.buckets.values() for name, view in own.gradient_views.items()
        }
        self.head_tables = self._open_head_tables(device)
        self.optimizer = Optimizer(plan.workload, self._ranges(), device)
        self._counted = [
            own.kept_gradients[first:stop]
            for own in self.buckets.values()
            for first, stop in counted_ranges(plan, own.flat, where)
        ]

    def _open_buckets(self, device: torch.device, source: WeightSource) -> dict[Key, BucketBuffers]:
        """All weights first: what drawing and cutting them takes is gone before the rest is made."""
        plan, form = self.plan, self.plan.format
        flats = [
            flat_bucket(plan, bucket, self.where)
            for stage in plan.rank_stages(self.where.pp)
            for bucket in plan.stage_buckets[stage]
        ]
        places = [place_in_group(plan, flat, self.where)[0] for flat in flats]
        weights: dict[Key, BucketWeights] = {}
        for flat, place in reversed([*zip(flats, places, strict=True)]):  # about as a file has them
            own = weights[flat.stage, flat.index] = open_weights(
                flat,
                place,
                compute=self.dtype,
                main=WIDTHS[form.main] if form.main else None,
                device=device,
            )
            self._draw(flat, place, own, source)
        return {
            (flat.stage, flat.index): open_buffers(
                flat,
                place,
                weights[flat.stage, flat.index],
                gradient=WIDTHS[form.gradient],
                moment=WIDTHS[form.moment],
                moments=MOMENT_NAMES[plan.workload.optimizer],
            )
            for flat, place in zip(flats, places, strict=True)
        }

    def _open_head_tables(self, device: torch.device) -> dict[Key, HeadTable]:
        """For a head: the table that it shares with the embedding, to be gathered apart, by its bucket."""
        plan = self.plan
        if not (plan.num_stages - 1 in plan.rank_stages(self.where.pp) and shares_table(plan)):
            return {}
        found = {}
        for key, own in self.buckets.items():
            name = own.flat.names[0]
            if own.elastic_weights is not None and plan.placement(name).role == "embedding":
                whole = Elastic(own.flat.padded_numel, self.dtype, device)
                found[key] = HeadTable(whole, views(own.flat, whole.tensor)[name], self.gradients[name])
                whole.release()
        return found

    def bound_weights(self) -> dict[str, torch.Tensor]:
        """The weights by the names that segments know them by: a head's own table has the head's."""
        tables = self.head_tables.values()
        return self.weights | {name: table.weight for name, table in zip([HEAD], tables, strict=False)}

    def bound_gradients(self) -> dict[str, torch.Tensor]:
        """The gradients, by the same names."""
        tables = self.head_tables.values()
        return self.gradients | {name: table.gradient for name, table in zip([HEAD], tables, strict=False)}

    def _draw(self, flat: FlatBucket, place: int, own: BucketWeights, source: WeightSource) -> None:
        """Fill in the first weights; of those that are kept in parts, a bucket at a time stands whole.

        Main weights begin with what is drawn, not with what a narrower format keeps of it.
        """
        if own.elastic_weights is not None:
            own.elastic_weights.allocate().zero_()
        for placement in (p for p in self.placements if p.name in own.weight_views):
            first = slice_of(source(placement), placement, self.where)
            own.weight_views[placement.name].copy_(first)
            if own.main is not own.kept_weights:
                (low, high), (begin, end) = own_range(flat, place, placement.name)
                own.main[low:high] = first.reshape(-1)[begin:end]
            del first
        if own.elastic_weights is not None:
            begin, end = flat.part(place)
            own.kept_weights.copy_(own.weights[begin:end])
            own.elastic_weights.release()

    def _ranges(self) -> list[Range]:
        """What the optimizer updates alike, bucket by bucket."""
        found = []
        for own in self.buckets.values():
            first, stop = own.flat.part(own.place)
            for (begin, end), decays in own.flat.decays():
                low, high = max(begin, first) - first, min(end, stop) - first
                found.append(
                    Range(
                        weights=own.main[low:high],
                        gradients=own.kept_gradients[low:high],
                        moments={name: moment[low:high] for name, moment in own.moments.items()},
                        decays=decays,
                    )
                )
        return found

    def standing(self) -> dict[Category, list[torch.Tensor]]:
        """What lives between steps, by the plan's categories."""
        every = self.buckets.values()
        return {
            "parameters": [own.kept_weights for own in every],
            "gradients": [own.kept_gradients for own in every],
            "optimizer": [
                *(own.main for own in every if own.main is not own.kept_weights),
                *self.optimizer.tensors(),
            ],
        }

    def kept_whole(
        self, is_kept: Callable[[BucketBuffers], bool], views: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Those of ``views``, by name, whose buckets ``is_kept`` chooses."""
        return {name: views[name] for own in self.buckets.values() if is_kept(own) for name in own.flat.names}

    def elastic(self) -> list[torch.Tensor]:
        """What has memory some of the time."""
        every = self.buckets.values()
        found = [
            *(own.elastic_weights for own in every),
            *(own.elastic_gradients for own in every),
            *(table.whole for table in self.head_tables.values()),
        ]
        return [one.tensor for one in found if one is not None]

    def zero_gradients(self) -> None:
        """Forget the gradients of the step before."""
        for own in self.buckets.values():
            own.is_fresh = True
            if own.elastic_gradients is None:
                own.gradients.zero_()

    def add_square_norm(self, total: torch.Tensor) -> None:
        """Add to ``total`` (fp64) the squares of the gradients that this rank counts for the world."""
        for part in self._counted:
            norm = torch.linalg.vector_norm(part, dtype=torch.float64)
            total.addcmul_(norm, norm)
            del norm

    def update(self, step: int, clipping: float | Verdict) -> None:
        """The optimizer's step ``step``, after clipping by the norm over the world, or by its verdict."""
        work = self.plan.workload
        decided = clipping if isinstance(clipping, Verdict) else None
        if not isinstance(clipping, Verdict):
            coefficient = clip_coefficient(clipping, work.max_grad_norm)
            for own in self.buckets.values() if coefficient < 1.0 else ():
                own.kept_gradients.mul_(coefficient)
        self.optimizer.update(learning_rate(work, step), decided)
        for own in self.buckets.values():
            if own.main is not own.kept_weights:
                own.kept_weights.copy_(own.main)

    def state(self, name: str) -> dict[str, tuple[tuple[int, int], torch.Tensor]]:
        """What this rank keeps of a parameter's optimizer state, by what it is.

        Each is a flat view, and the range of the elements of the parameter's slice that it is of.
        """
        own = next(own for own in self.buckets.values() if name in own.flat.names)
        (low, high), of = own.own_range(name)
        kept = {**own.moments, **({} if own.main is own.kept_weights else {"main": own.main})}
        return {what: (of, flat[low:high]) for what, flat in kept.items()}
