"""Flips and quarter turns in a row are one of 48 orientations, and one movement of the voxels."""

from __future__ import annotations

from typing import NamedTuple

import torch

from decovae.data.volumes import Shape


class Orientation(NamedTuple):
    """Axis `d` of the result is axis `axes[d]` of the patch, run through backwards where `backwards[d]`."""

    axes: Shape = (0, 1, 2)
    backwards: tuple[bool, bool, bool] = (False, False, False)

    def flipped(self, axis: int) -> Orientation:
        """This one, then `axis` flipped."""
        first, second, third = (self.backwards[d] ^ (d == axis) for d in range(3))
        return self._replace(backwards=(first, second, third))

    def turned(self, start: int, end: int) -> Orientation:
        """This one, then a quarter turn from axis `start` towards axis `end`, as `numpy.rot90` has it."""
        axes, backwards = list(self.axes), list(self.backwards)
        axes[start], axes[end] = axes[end], axes[start]
        backwards[start], backwards[end] = not backwards[end], backwards[start]
        return Orientation((axes[0], axes[1], axes[2]), (backwards[0], backwards[1], backwards[2]))


def orient(patch: torch.Tensor, orientation: Orientation, out: torch.Tensor) -> None:
    """Write `patch`, `(D, H, W)`, in its `orientation` into `out`."""
    flips = [axis for axis, backwards in zip(orientation.axes, orientation.backwards, strict=True) if backwards]
    if flips:
        patch = patch.flip(flips)
    # Rows first, in runs of memory; what makes columns of them then reads one plane at a time. In one go the strides of
    # a transposed patch make its voxels fall on the same few lines of the cache.
    rows = patch.permute(*(axis for axis in orientation.axes if axis != 2), 2).contiguous()
    out.copy_(rows.movedim(2, orientation.axes.index(2)))
