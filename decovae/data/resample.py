"""Linear resizing of one crop of a volume from only the part of the volume that it covers."""

from __future__ import annotations

import numpy as np
import torch

from decovae.data.volumes import Shape


def axis_weights(source: int, target: int, start: int, stop: int) -> tuple[slice, np.ndarray]:
    """Rows `start` to `stop` of the matrix that resizes an axis from `source` to `target` voxels.

    Voxel centres lie at half-integers, the two ends of the axis coincide (`align_corners=False`). Enlarging is linear
    interpolation. Shrinking widens the triangle by the scale, as Pillow and `F.interpolate(antialias=True)` do. At the
    ends the triangle is cut and its rest normalised, which clamps to the edge where it interpolates.

    Returns:
        The slice of the source axis that those rows touch, and their weights on it, `(stop - start, touched)`, float64.
    """
    scale = source / target
    support = max(scale, 1.0)
    centres = (np.arange(start, stop) + 0.5) * scale - 0.5  # in source voxels
    first = max(int(np.floor(centres[0] - support)) + 1, 0)
    last = min(int(np.ceil(centres[-1] + support)) - 1, source - 1)
    distance = np.abs(np.arange(first, last + 1) - centres[:, None])
    weights = np.maximum(1.0 - distance / support, 0.0)
    return slice(first, last + 1), weights / weights.sum(axis=1, keepdims=True)


def resample_crop(
    volume: np.ndarray, *, grid: Shape, corner: Shape, size: Shape, low: float = 0.0, high: float = 1.0
) -> torch.Tensor:
    """The crop of `size` at `corner` of `volume` resized to `grid`, scaled so that `low` is 0 and `high` is 1.

    Equal, to rounding, to resizing all of `volume` and cropping it, at a cost that depends on the crop alone.

    Args:
        volume: `(D, H, W)`, any real dtype and strides.
        grid, corner, size: voxels along the same axes; the crop lies inside the grid.

    Returns:
        `size`, float32, on the CPU, not clipped.
    """
    touched, matrices = zip(
        *(
            axis_weights(source, target, start, start + count)
            for source, target, start, count in zip(volume.shape, grid, corner, size, strict=True)
        ),
        strict=True,
    )
    block = volume[touched]
    # Single precision holds 8- and 16-bit integers exactly; wider sources are scaled before they are rounded to it.
    # Copying in C order gives equal memory, so equal bits, whichever way the file's axes run.
    precise = block.astype(np.result_type(block.dtype, np.float32), order="C")
    precise -= precise.dtype.type(low)
    precise /= precise.dtype.type(high - low)
    crop = torch.from_numpy(precise.astype(np.float32, copy=False))
    # Each product turns the axes by one place, so three of them bring every axis through and back to its place.
    for source, target, matrix in zip(volume.shape[::-1], grid[::-1], matrices[::-1], strict=True):
        crop = crop.movedim(-1, 0) if source == target else _contract_last(crop, matrix)
    return crop.contiguous()


def _contract_last(crop: torch.Tensor, matrix: np.ndarray) -> torch.Tensor:
    return torch.tensordot(torch.from_numpy(matrix.astype(np.float32)), crop, dims=([1], [2]))
