"""Flat buffers on a device: a bucket's weights, gradients and optimizer state, each in one memory.

Parameters and their gradients are views of these buffers for as long as a session lives. What a rank does not
keep is *elastic*: its memory comes and goes, its views stay the same objects, so that whoever holds a view of
a parameter keeps nothing alive and copies nothing. A view is to be read or written only while the memory is
there.
"""

from __future__ import annotations

import torch
from attrs import define, frozen

from picotron.planner.flat import FlatBucket
from picotron.planner.layout import Range
from picotron.runtime.memory import ELASTIC


class Elastic:
    """A flat tensor whose memory can be given back and made again, empty; ``tensor`` stays the same."""

    def __init__(self, numel: int, dtype: torch.dtype, device: torch.device) -> None:
        self.tensor = torch.empty(numel, dtype=dtype, device=device)
        self._storage = self.tensor.untyped_storage()
        self._num_bytes = self._storage.nbytes()
        setattr(self._storage, ELASTIC, True)

    def allocate(self) -> torch.Tensor:
        """Its memory, with anything in it."""
        self._storage.resize_(self._num_bytes)
        return self.tensor

    def release(self) -> None:
        """Give the memory back."""
        self._storage.resize_(0)


@define
class BucketBuffers:
    """What one rank has of a bucket.

    ``weights`` and ``gradients`` are the whole buffers, elastic where the rank keeps a part alone, and
    ``weight_views`` and ``gradient_views`` each parameter's part of them; ``kept_...`` are the parts that the
    rank keeps and updates, views of the whole where that stands, and ``own_gradients`` its part of the whole.
    ``main``: the same part of
    the main weights, the weights themselves where they are their own. ``moments``: the optimizer's, by name.
    """

    flat: FlatBucket
    place: int
    weights: torch.Tensor
    kept_weights: torch.Tensor
    weight_views: dict[str, torch.Tensor]
    gradients: torch.Tensor
    kept_gradients: torch.Tensor
    own_gradients: torch.Tensor
    gradient_views: dict[str, torch.Tensor]
    main: torch.Tensor
    moments: dict[str, torch.Tensor]
    elastic_weights: Elastic | None = None
    elastic_gradients: Elastic | None = None
    is_fresh: bool = True  # nothing of this step is in the kept gradients yet
    is_travelling: bool = False  # the full gradients are being reduced

    def own_range(self, name: str) -> tuple[Range, Range]:
        """Where the kept part has elements of a parameter, and which of its elements they are."""
        return own_range(self.flat, self.place, name)

    def begin(self) -> None:
        """Make the memory of full gradients that fill and travel, and fill it with zeros."""
        assert self.elastic_gradients is not None
        self.elastic_gradients.allocate().zero_()

    def own_part(self, whole: torch.Tensor) -> torch.Tensor:
        """The part of a whole buffer that this rank keeps."""
        first, stop = self.flat.part(self.place)
        return whole[first:stop]

    def fold(self, part: torch.Tensor) -> None:
        """Add this rank's reduced ``part`` to what it keeps, and let go of the full gradients."""
        assert self.elastic_gradients is not None
        if self.is_fresh:
            self.kept_gradients.copy_(part)
        else:
            self.kept_gradients.add_(part)
        self.is_fresh = self.is_travelling = False
        self.elastic_gradients.release()


def own_range(flat: FlatBucket, place: int, name: str) -> tuple[Range, Range]:
    """Where the part at ``place`` has elements of a parameter, and which of its elements they are."""
    begin, end = flat.range_of(name)
    first, stop = flat.part(place)
    low = max(begin, first)
    high = max(low, min(end, stop))
    return (low - first, high - first), (low - begin, high - begin)


@frozen(kw_only=True)
class BucketWeights:
    """The weights of a bucket, which stand before anything else of it does: fields as in BucketBuffers."""

    weights: torch.Tensor
    weight_views: dict[str, torch.Tensor]
    kept_weights: torch.Tensor
    main: torch.Tensor
    elastic_weights: Elastic | None


def open_weights(
    flat: FlatBucket,
    place: int,
    *,
    compute: torch.dtype,
    main: torch.dtype | None,
    device: torch.device,
) -> BucketWeights:
    """Weights of zero at ``place`` of a bucket's group; elastic ones are without memory."""
    elastic = None if flat.keeps_parameters else Elastic(flat.padded_numel, compute, device)
    if elastic is None:
        whole = torch.zeros(flat.padded_numel, dtype=compute, device=device)
        first, stop = flat.part(place)
        kept = whole[first:stop]
    else:
        whole = elastic.tensor
        kept = torch.zeros(flat.part_numel, dtype=compute, device=device)
    found = BucketWeights(
        weights=whole,
        weight_views=views(flat, whole),
        kept_weights=kept,
        main=kept if main is None else torch.zeros(flat.part_numel, dtype=main, device=device),
        elastic_weights=elastic,
    )
    if elastic is not None:
        elastic.release()
    return found


def open_buffers(
    flat: FlatBucket,
    place: int,
    weights: BucketWeights,
    *,
    gradient: torch.dtype,
    moment: torch.dtype,
    moments: tuple[str, ...],
) -> BucketBuffers:
    """All of a bucket at ``place`` of its group: gradients and moments are zero."""
    device = weights.kept_weights.device
    elastic = None if flat.keeps_gradients else Elastic(flat.padded_numel, gradient, device)
    gradients = (
        torch.zeros(flat.padded_numel, dtype=gradient, device=device) if elastic is None else elastic.tensor
    )
    first, stop = flat.part(place)

    def part(dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(flat.part_numel, dtype=dtype, device=device)

    own_gradients = gradients[first:stop]
    found = BucketBuffers(
        flat=flat,
        place=place,
        weights=weights.weights,
        kept_weights=weights.kept_weights,
        weight_views=weights.weight_views,
        gradients=gradients,
        kept_gradients=own_gradients if elastic is None else part(gradient),
        own_gradients=own_gradients,
        gradient_views=views(flat, gradients),
        main=weights.main,
        moments={name: part(moment) for name in moments},
        elastic_weights=weights.elastic_weights,
        elastic_gradients=elastic,
    )
    if elastic is not None:
        elastic.release()
    return found


def views(flat: FlatBucket, whole: torch.Tensor) -> dict[str, torch.Tensor]:
    """Each parameter's part of a buffer of its bucket, by name and in its own shape."""
    columns = zip(flat.names, flat.shapes, flat.offsets, flat.offsets[1:], strict=False)
    return {name: whole[first:stop].view(shape) for name, shape, first, stop in columns}
