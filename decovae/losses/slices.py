"""2D slices of 3D volumes in the three anatomical planes, for losses that see images."""

from __future__ import annotations

import torch
from torch import Tensor


def random_slices(fraction: float, *volumes: Tensor) -> list[tuple[Tensor, ...]]:
    """The same random slices of each of several volumes, plane by plane.

    Slices of all volumes of the batch are drawn together, without replacement, from torch's CPU generator, so that the
    draw does not depend on the device.

    Args:
        fraction: share of the N·D, N·H and N·W slices to draw in each plane, in (0, 1]; at least one slice is drawn.
        volumes: (N, C, D, H, W) each, of one shape.

    Returns:
        For each plane (across D, H and W: sagittal, coronal, axial in RAS axes) one (slices, C, rows, columns) tensor
        for each of ``volumes``.

    Raises:
        ValueError: if the volumes differ in shape or are not 5D, or ``fraction`` is not in (0, 1].
    """
    shape = volumes[0].shape
    if len(shape) != 5 or any(volume.shape != shape for volume in volumes):
        raise ValueError(f"volumes must share one (N, C, D, H, W) shape, not {[tuple(v.shape) for v in volumes]}")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction of slices must be in (0, 1], not {fraction}")
    planes = []
    for axis in (2, 3, 4):
        available = shape[0] * shape[axis]
        drawn = torch.randperm(available)[: max(1, round(fraction * available))].to(volumes[0].device)
        sample, position = drawn // shape[axis], drawn % shape[axis]
        planes.append(tuple(volume.movedim(axis, 1)[sample, position] for volume in volumes))
    return planes
