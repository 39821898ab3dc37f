"""Where each rank sits in the grid of pipeline, data, context and tensor parallelism.

The world is the product pp * dp * cp * tp, row-major over ``order`` (slowest first), so with the default
order tensor-parallel neighbours are adjacent ranks. Expert parallelism does not multiply the world: the
dp * cp * tp ranks of a pipeline stage are cut again as expert-dp * ep * etp for the expert layers.
Source: Narayanan et al. 2021, Megatron-LM, arXiv:2104.04473; for experts Liu et al. 2025,
MoE Parallel Folding, arXiv:2504.14960.
"""

from __future__ import annotations

import math
import re

import numpy as np
from attrs import Attribute, field, frozen
from attrs.validators import ge, instance_of

from picotron.errors import PlanError
from picotron.planner.validators import are_words, as_tuple, must_be

AXES = ("pp", "dp", "cp", "tp")  # the default order, slowest-varying first
GROUP_AXES: dict[str, tuple[str, ...]] = {
    "pp": ("pp",),
    "dp": ("dp",),
    "cp": ("cp",),
    "tp": ("tp",),
    "dp_cp": ("dp", "cp"),
    "tp_pp": ("pp", "tp"),
    "world": AXES,
}
_CUT_NAME = re.compile(r"(tp(?=:)|dp_cp|edp)([:/])([1-9][0-9]{0,17})", re.ASCII)
EXPERT_AXES = ("edp", "ep", "etp")  # how a stage's ranks are cut for expert layers, slowest first


def _degree(instance: object, attribute: Attribute[int], value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PlanError(f"{attribute.name} must be a positive whole number, got {value!r}")


@frozen(kw_only=True)
class Topology:
    """Parallel degrees, in ranks along each axis, and the order in which ranks run through them."""

    pp: int = field(default=1, validator=_degree)
    dp: int = field(default=1, validator=_degree)
    cp: int = field(default=1, validator=_degree)
    tp: int = field(default=1, validator=_degree)
    ep: int = field(default=1, validator=_degree)
    etp: int = field(default=1, validator=_degree)
    order: tuple[str, ...] = field(
        default=AXES, converter=as_tuple, validator=must_be("a sequence of axes, slowest first", are_words)
    )

    @order.validator
    def _order_and_experts(self, _: Attribute[tuple[str, ...]], value: tuple[str, ...]) -> None:
        if sorted(value) != sorted(AXES):
            raise PlanError(f"order must name each of {AXES} once, slowest first, got {value!r}")
        stage = self.dp * self.cp * self.tp
        if stage % (self.ep * self.etp):
            raise PlanError(
                f"ep * etp must divide dp * cp * tp = {stage}, got ep={self.ep}, etp={self.etp}; "
                "expert parallelism cuts the same ranks again"
            )

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.pp * self.dp * self.cp * self.tp

    @property
    def edp(self) -> int:
        """Copies of each expert in one pipeline stage."""
        return self.dp * self.cp * self.tp // (self.ep * self.etp)


@frozen(kw_only=True)
class Coordinate:
    """One rank's index along each axis, and along the axes that cut its stage again for experts."""

    pp: int = field(default=0, validator=[instance_of(int), ge(0)])
    dp: int = field(default=0, validator=[instance_of(int), ge(0)])
    cp: int = field(default=0, validator=[instance_of(int), ge(0)])
    tp: int = field(default=0, validator=[instance_of(int), ge(0)])
    edp: int = field(default=0, validator=[instance_of(int), ge(0)])
    ep: int = field(default=0, validator=[instance_of(int), ge(0)])
    etp: int = field(default=0, validator=[instance_of(int), ge(0)])


def degrees(topology: Topology) -> tuple[int, ...]:
    """The degree of each axis, in the topology's own order."""
    return tuple(getattr(topology, axis) for axis in topology.order)


def coordinate(topology: Topology, rank: int) -> Coordinate:
    """Where ``rank`` sits. Raises PlanError outside [0, world_size)."""
    if not 0 <= rank < topology.world_size:
        raise PlanError(f"rank must be in [0, {topology.world_size}), got {rank!r}")
    dense = _unravel(rank, topology.order, degrees(topology))
    within = [axis for axis in topology.order if axis != "pp"]
    position = 0
    for axis in within:
        position = position * getattr(topology, axis) + dense[axis]
    experts = _unravel(position, EXPERT_AXES, (topology.edp, topology.ep, topology.etp))
    return Coordinate(**dense, **experts)


def rank_of(topology: Topology, where: Coordinate) -> int:
    """The rank that sits at ``where``, read along AXES: the inverse of ``coordinate``."""
    for axis in AXES:
        index, degree = getattr(where, axis), getattr(topology, axis)
        if index >= degree:
            raise PlanError(f"{axis} index must be in [0, {degree}), got {index}")
    indices = tuple(getattr(where, axis) for axis in topology.order)
    return int(np.ravel_multi_index(indices, degrees(topology)))


def groups(topology: Topology, axis: str) -> tuple[tuple[int, ...], ...]:
    """All ranks that form communicators of one kind, as tuples of ascending ranks.

    ``axis`` is one of ``GROUP_AXES`` (each rank is in exactly one group), one of ``EXPERT_AXES``,
    ``"embedding"`` (first and last rank of each pipeline: the two ends that tie their embeddings),
    ``"tp:k"`` (each tensor-parallel group cut into runs of k neighbours: the ranks that share a
    key/value head), or the like of data parallelism: ``"dp_cp:k"`` and ``"edp:k"`` are runs of k ranks that
    share one sharded copy, ``"dp_cp/k"`` and ``"edp/k"`` the ranks of equal place in those runs, which hold
    copies of the same shard. Raises PlanError for any other name.
    """
    if axis in GROUP_AXES:
        return _grouped(np.arange(topology.world_size), degrees(topology), topology.order, GROUP_AXES[axis])
    if axis in EXPERT_AXES:
        return _expert_groups(topology, axis)
    if axis == "embedding":
        return tuple(tuple(dict.fromkeys((pipe[0], pipe[-1]))) for pipe in groups(topology, "pp"))
    cut = _cut_groups(topology, axis)
    if cut is not None:
        return cut
    known = (*GROUP_AXES, *EXPERT_AXES, "embedding", "tp:k (k dividing tp)")
    raise PlanError(f"axis must be one of {', '.join(known)}, got {axis!r}")


def _cut_groups(topology: Topology, name: str) -> tuple[tuple[int, ...], ...] | None:
    """The groups of one axis cut into runs (":k"), or what crosses the runs ("/k"); None for another name."""
    found = _CUT_NAME.fullmatch(name)
    if found is None:
        return None
    whole, size = groups(topology, found[1]), int(found[3])
    if len(whole[0]) % size:
        return None
    runs = [[group[first : first + size] for first in range(0, len(group), size)] for group in whole]
    if found[2] == ":":
        return tuple(run for own in runs for run in own)
    return tuple(across for own in runs for across in zip(*own, strict=True))


def group_of(topology: Topology, axis: str, rank: int) -> tuple[int, ...]:
    """The group of ``axis`` that ``rank`` belongs to; the rank alone where it belongs to none."""
    return next((group for group in groups(topology, axis) if rank in group), (rank,))


def group_size(topology: Topology, axis: str) -> int:
    """Ranks in each group of ``axis``."""
    if axis in GROUP_AXES:
        return math.prod(getattr(topology, name) for name in GROUP_AXES[axis])
    return len(groups(topology, axis)[0])


def stage_ranks(topology: Topology, stage: int) -> tuple[int, ...]:
    """Ascending ranks at pipeline coordinate ``stage``."""
    grid = _grouped(np.arange(topology.world_size), degrees(topology), topology.order, ("dp", "cp", "tp"))
    return grid[stage]


def _unravel(index: int, names: tuple[str, ...], sizes: tuple[int, ...]) -> dict[str, int]:
    """The index along each axis of the ``index``-th cell of a row-major grid."""
    found = {}
    for name, size in zip(reversed(names), reversed(sizes), strict=True):
        index, found[name] = divmod(index, size)
    return found


def _grouped(
    ranks: np.ndarray, sizes: tuple[int, ...], names: tuple[str, ...], varied: tuple[str, ...]
) -> tuple[tuple[int, ...], ...]:
    kept_dims = [dim for dim, name in enumerate(names) if name not in varied]
    varied_dims = [dim for dim, name in enumerate(names) if name in varied]
    size = math.prod(sizes[dim] for dim in varied_dims)
    rows = ranks.reshape(sizes).transpose(kept_dims + varied_dims).reshape(-1, size)
    return tuple(tuple(row) for row in rows.tolist())


def _expert_groups(topology: Topology, axis: str) -> tuple[tuple[int, ...], ...]:
    sizes = (topology.edp, topology.ep, topology.etp)
    return tuple(
        group
        for stage in range(topology.pp)
        for group in _grouped(np.array(stage_ranks(topology, stage)), sizes, EXPERT_AXES, (axis,))
    )
