"""Which slice of which parameter lives where: the one record that everything else reads.

Initialising, clipping, reductions, weights in and out all ask the same ``Placement``: its cut, the axes
over which identical copies live, and the groups over which its gradient must still be summed.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from attrs import frozen

from picotron.planner.model import ModelSpec, Parameter, Segment, segments
from picotron.planner.tensor import CUT_RULES, kv_copies
from picotron.planner.topology import Coordinate, Topology

Range = tuple[int, int]  # start and stop along one dimension


@frozen(kw_only=True)
class Cut:
    """Dimension ``dim`` is cut over ``axis``: its ``blocks`` fused parts into ``parts`` slices each.

    With more ranks than parts, neighbouring ranks hold copies of the same slice.
    """

    axis: str
    dim: int
    degree: int
    parts: int
    blocks: int = 1

    @property
    def copies(self) -> int:
        """Neighbouring ranks of the axis that hold the same slice."""
        return self.degree // self.parts


@frozen(kw_only=True)
class Placement:
    """Where one parameter lives in one pipeline stage, which pipeline rank ``rank`` holds.

    ``replicated``: axes whose ranks hold identical values. ``partial``: groups, in order, over which a
    rank's gradient must be summed to be the whole. ``tied_to``: the parameter of another stage that this
    one equals. ``expert``: (index, experts in all) where it belongs to one, held by one expert-parallel
    rank in each copy.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    init: str
    stage: int
    rank: int
    segment: int
    cut: Cut | None
    replicated: tuple[str, ...]
    partial: tuple[str, ...]
    tied_to: str | None = None
    expert: tuple[int, int] | None = None

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return math.prod(self.shape)


def even_ranges(size: int, parts: int) -> tuple[Range, ...]:
    """``size`` cut into ``parts`` neighbouring ranges; lengths differ by one at most, longer first."""
    return tuple(even_range(size, parts, part) for part in range(parts))


def even_range(size: int, parts: int, part: int) -> Range:
    """One of them."""
    base, extra = divmod(size, parts)
    start = base * part + min(part, extra)
    return start, start + base + (part < extra)


def cut_ranges(cut: Cut, size: int, index: int) -> tuple[Range, ...]:
    """Ranges along ``cut.dim`` (of length ``size``) held at ``index`` of the cut's axis, one a block."""
    block = size // cut.blocks
    start, stop = even_range(block, cut.parts, index // cut.copies)
    return tuple((first + start, first + stop) for first in range(0, size, block))


def is_held(placement: Placement, topology: Topology, where: Coordinate) -> bool:
    """Whether the rank at ``where`` holds any of ``placement``."""
    if placement.expert is None:
        return where.pp == placement.rank
    index, num_experts = placement.expert
    first, stop = even_range(num_experts, topology.ep, where.ep)
    return where.pp == placement.rank and first <= index < stop


def local_shape(placement: Placement, where: Coordinate) -> tuple[int, ...]:
    """Shape of the slice held at ``where``."""
    if placement.cut is None:
        return placement.shape
    dim = placement.cut.dim
    ranges = cut_ranges(placement.cut, placement.shape[dim], getattr(where, placement.cut.axis))
    length = sum(stop - start for start, stop in ranges)
    return (*placement.shape[:dim], length, *placement.shape[dim + 1 :])


def local_numel(placement: Placement, where: Coordinate) -> int:
    """Elements of the slice held at ``where``."""
    return math.prod(local_shape(placement, where))


def counts_in_norm(placement: Placement, where: Coordinate, *, shared: Collection[str] = ()) -> bool:
    """Whether this copy is the one that a sum over all ranks counts (gradient norm, number of elements).

    ``shared``: axes whose ranks hold parts of one copy rather than copies.
    """
    if placement.tied_to is not None:
        return False
    first_copy = placement.cut is None or getattr(where, placement.cut.axis) % placement.cut.copies == 0
    return first_copy and all(
        getattr(where, axis) == 0 for axis in placement.replicated if axis not in shared
    )


def layout(
    model: ModelSpec,
    topology: Topology,
    stage_layers: tuple[int, ...],
    *,
    sequence_parallel: bool,
    stage_ranks: tuple[int, ...] | None = None,
) -> tuple[Placement, ...]:
    """Every placement, in order of stage and segment; ``stage_layers`` is the number of layers a stage.

    ``stage_ranks``: the pipeline rank of each stage, stage s on rank s unless given. With tied embeddings and
    first and last stage on two ranks the last stage holds its own copy of the table, under the name
    ``lm_head.weight``, tied to the first stage's. On one rank the two share the table.
    """
    ranks = tuple(range(len(stage_layers))) if stage_ranks is None else stage_ranks
    apart = model.tied_embeddings and ranks[0] != ranks[-1]
    placements = [
        _placement(model, topology, parameter, (stage, ranks[stage], index), sequence_parallel, apart)
        for stage, own in enumerate(stage_segments(model, stage_layers))
        for index, segment in enumerate(own)
        for parameter in segment.parameters
    ]
    if apart:
        placements.append(_tied_head(placements, ranks))
    return tuple(placements)


def stage_segments(model: ModelSpec, stage_layers: tuple[int, ...]) -> tuple[tuple[Segment, ...], ...]:
    """The segments of each stage: the first has the embedding too, the last the head."""
    embedding, *blocks, head = segments(model)
    per_stage, first = [], 0
    for layers in stage_layers:
        per_stage.append([s for s in blocks if s.layer is not None and first <= s.layer < first + layers])
        first += layers
    per_stage[0].insert(0, embedding)
    per_stage[-1].append(head)
    return tuple(map(tuple, per_stage))


def _placement(
    model: ModelSpec,
    topology: Topology,
    parameter: Parameter,
    place: tuple[int, int, int],
    sequence_parallel: bool,
    apart: bool,
) -> Placement:
    """``place``: stage, pipeline rank and segment. ``apart``: a tied table has a copy on another rank."""
    is_expert = parameter.role.startswith("expert_")
    cut = _cut(model, topology, parameter, axis="etp" if is_expert else "tp")
    return Placement(
        name=parameter.name,
        shape=parameter.shape,
        role=parameter.role,
        init=parameter.init,
        stage=place[0],
        rank=place[1],
        segment=place[2],
        cut=cut,
        replicated=("edp",) if is_expert else ("dp", "cp") if cut else ("dp", "cp", "tp"),
        partial=_partial_groups(topology, parameter, cut, sequence_parallel, apart),
        expert=(_expert_index(parameter.name), model.experts.num_experts)
        if is_expert and model.experts
        else None,
    )


def _cut(model: ModelSpec, topology: Topology, parameter: Parameter, *, axis: str) -> Cut | None:
    rule = CUT_RULES[parameter.role]
    degree = getattr(topology, axis)
    if rule.dim is None or degree == 1:
        return None
    parts = degree // kv_copies(model, degree) if rule.heads else degree
    return Cut(axis=axis, dim=rule.dim, degree=degree, parts=parts, blocks=rule.blocks)


def _partial_groups(
    topology: Topology, parameter: Parameter, cut: Cut | None, sequence_parallel: bool, apart: bool
) -> tuple[str, ...]:
    rule = CUT_RULES[parameter.role]
    found = []
    if topology.tp > 1 and (rule.partial == "always" or (rule.partial == "sequence" and sequence_parallel)):
        found.append("tp")
    if cut is not None and cut.copies > 1:
        found.append(f"tp:{cut.copies}")
    if parameter.role.startswith("expert_"):
        found += ["edp"] * (topology.edp > 1)
    else:
        found += ["dp_cp"] * (topology.dp * topology.cp > 1)
    if parameter.role == "embedding" and apart:
        found.append("embedding")
    return tuple(found)


def _tied_head(placements: list[Placement], stage_ranks: tuple[int, ...]) -> Placement:
    table = next(p for p in placements if p.role == "embedding")
    last = len(stage_ranks) - 1
    head_segment = max(p.segment for p in placements if p.stage == last)
    return Placement(
        name="lm_head.weight",
        shape=table.shape,
        role="head",
        init=table.init,
        stage=last,
        rank=stage_ranks[last],
        segment=head_segment,
        cut=table.cut,
        replicated=table.replicated,
        partial=table.partial,
        tied_to=table.name,
    )


def _expert_index(name: str) -> int:
    words = name.split(".")
    return int(words[words.index("experts") + 1])
