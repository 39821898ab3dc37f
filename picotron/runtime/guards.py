"""Tensors that an operation owns, watched: changed by anyone else before ``wait``, the run is refused.

Torch counts every write to a tensor's memory through torch (its version); views of one tensor share the
count. So a tensor that is the whole of its memory is watched by its version alone. Of a part of a larger one,
other parts may be written meanwhile: there a checksum looks into an unlike version. On a GPU, where that
would wait for the device, there is none, and a part is not watched. Writes that torch does not count (through
numpy, or ``.data``) are not seen.
"""

from __future__ import annotations

import ctypes
import zlib

import torch
from attrs import define

CHANGED = (
    "a tensor belongs to its operation until wait has returned, and was changed before: "
    "wait first, or work on a clone"
)


@define
class Guard:
    """A tensor as it was when last looked at."""

    tensor: torch.Tensor
    version: int
    checksum: int | None

    def changed(self) -> bool:
        """Whether someone else has written to the tensor since."""
        return _version(self.tensor) != self.version and (
            self.checksum is None or _checksum(self.tensor) != self.checksum
        )

    def refresh(self) -> None:
        """Take what is there now, which the operation itself has written, for right."""
        self.version = _version(self.tensor)
        if self.checksum is not None:
            self.checksum = _checksum(self.tensor)


def guard(tensor: torch.Tensor) -> Guard:
    """Begin to watch ``tensor``."""
    whole = tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
    return Guard(tensor, _version(tensor), None if whole else _checksum(tensor))


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _checksum(tensor: torch.Tensor) -> int:
    if tensor.device.type != "cpu" or not tensor.numel():
        return 0
    size = tensor.numel() * tensor.element_size()  # an array of numpy's would forbid to resize the storage
    return zlib.crc32((ctypes.c_ubyte * size).from_address(tensor.data_ptr()))
