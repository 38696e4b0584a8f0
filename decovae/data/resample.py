"""Linear resizing of one crop of a volume from only the part of the volume that it covers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from decovae.data.volumes import Shape

SLABS = 16
SAME_SPACING = 1e-4  # voxels whose sizes differ by less are not interpolated: over 256 of them the drift is 1/40 voxel


def axis_weights(source: int, target: int, start: int, stop: int) -> tuple[slice, np.ndarray]:
    """Rows `start` to `stop` of the matrix that resizes an axis from `source` to `target` voxels.

    Voxel centres lie at half-integers, the two ends of the axis coincide (`align_corners=False`). Enlarging is linear
    interpolation. Shrinking widens the triangle by the scale, as Pillow and `F.interpolate(antialias=True)` do. At the
    ends the triangle is cut and its rest normalised, which clamps to the edge where it interpolates.

    Returns:
        The slice of the source axis that those rows touch, and their weights on it, `(stop - start, touched)`, float64.
    """
    scale = source / target
    return _triangle(source, (np.arange(start, stop) + 0.5) * scale - 0.5, scale)


def _triangle(source: int, centres: np.ndarray, scale: float) -> tuple[slice, np.ndarray]:
    """Weights of an axis's voxels around increasing `centres`, in source voxels; none where the axis has ended."""
    support = max(scale, 1.0)
    first = max(int(np.floor(centres[0] - support)) + 1, 0)
    last = min(int(np.ceil(centres[-1] + support)) - 1, source - 1)
    distance = np.abs(np.arange(first, last + 1) - centres[:, None])
    weights = np.maximum(1.0 - distance / support, 0.0)
    weights[(centres < -0.5) | (centres > source - 0.5)] = 0.0
    return slice(first, last + 1), weights / np.maximum(weights.sum(axis=1, keepdims=True), np.finfo(float).tiny)


def resample_crop(
    volume: np.ndarray, *, grid: Shape, corner: Shape, size: Shape, low: float = 0.0, high: float = 1.0
) -> torch.Tensor:
    """The crop of `size` at `corner` of `volume` resized to `grid`, scaled so that `low` is 0 and `high` is 1.

    Equal, to rounding, to resizing all of `volume` and cropping it, at a cost that depends on the crop alone. Equal to
    the bit whichever way the volume's axes run, whatever the number of threads.

    Args:
        volume: `(D, H, W)`, any real dtype and strides.
        grid, corner, size: voxels along the same axes; the crop lies inside the grid.

    Returns:
        `size`, float32, on the CPU, not clipped.
    """
    axes = [
        (slice(start, start + count), None) if source == target else axis_weights(source, target, start, start + count)
        for source, target, start, count in zip(volume.shape, grid, corner, size, strict=True)
    ]
    return _weighted(volume, axes, low=low, high=high)


def true_size(source: int, target: int, ratio: float) -> tuple[float, float]:
    """Where `target` voxels lie on an axis of `source` voxels that has the same centre: the first one, and the step.

    Args:
        ratio: their size in source voxels. Where that is 1, they lie on source voxels, so up to half a one off centre.

    Returns:
        In source voxels, whose centres are the integers.
    """
    if abs(ratio - 1) < SAME_SPACING:
        return (source - target) // 2, 1.0
    return (source - 1) / 2 - (target - 1) / 2 * ratio, ratio


def resample_true_size(
    volume: np.ndarray, *, grid: Shape, ratios: tuple[float, float, float], low: float = 0.0, high: float = 1.0
) -> torch.Tensor:
    """`volume` in `grid` voxels around its centre, cut off where the grid ends and scaled 0 where the volume does.

    Args:
        volume: `(D, H, W)`, any real dtype and strides.
        grid: voxels along the same axes.
        ratios: the size of the grid's voxels in voxels of the volume; larger ones are means over what they cover.
        low, high: the intensities that are scaled to 0 and to 1.

    Returns:
        `grid`, float32, on the CPU, not clipped.
    """
    axes = []
    for source, target, ratio in zip(volume.shape, grid, ratios, strict=True):
        first, step = true_size(source, target, ratio)
        axes.append(_triangle(source, first + np.arange(target) * step, step))
    return _weighted(volume, axes, low=low, high=high)


def _weighted(
    volume: np.ndarray, axes: Sequence[tuple[slice, np.ndarray | None]], *, low: float, high: float
) -> torch.Tensor:
    """A block of `volume`, scaled, then summed along each axis by a matrix of weights; None leaves an axis as it is."""
    depth, height, width = (touched for touched, _ in axes)
    block = volume[depth, height, width]
    x, y, z = (matrix if matrix is None else matrix.astype(np.float32) for _, matrix in axes)
    if x is None and y is None and z is None:
        return torch.from_numpy(_scaled(block, low, high))
    # The last axis first is how NIfTI lies in memory; whatever lay otherwise does so from here on.
    turned = block.T
    values = np.empty((len(turned) if z is None else len(z), *turned.shape[1:]), np.float32)
    for start in range(0, len(values), SLABS):  # only a few slabs are ever held in more than the file's own bytes
        rows = slice(start, start + SLABS)
        if z is None:
            values[rows] = _scaled(turned[rows], low, high)
        else:
            used = np.flatnonzero(z[rows].any(axis=0))
            touched = slice(used[0], used[-1] + 1) if used.size else slice(0)
            values[rows] = _sums(_scaled(turned[touched], low, high), 0, z[rows, touched])
    values = values if y is None else _sums(values, 1, y)
    values = np.ascontiguousarray(values.T)
    return torch.from_numpy(values if x is None else _sums(values, 0, x))


def _scaled(block: np.ndarray, low: float, high: float) -> np.ndarray:
    """A copy in float32, in C order. Single precision holds 8- and 16-bit integers exactly; wider ones are scaled
    before they are rounded to it."""
    precise = block.astype(np.result_type(block.dtype, np.float32), order="C")
    precise -= precise.dtype.type(low)
    precise /= precise.dtype.type(high - low)
    return precise.astype(np.float32, copy=False)


def _sums(values: np.ndarray, axis: int, matrix: np.ndarray) -> np.ndarray:
    """Sums along an axis, weighted by each row of `matrix`, `(target, source)`.

    A row has two or three weights, so this is less work than a product of matrices. Each product and each sum is
    rounded on its own and in order, so that bits do not depend on the processor.
    """
    shape = list(values.shape)
    shape[axis] = len(matrix)
    result = np.zeros(shape, np.float32)
    sources, targets = np.moveaxis(values, axis, 0), np.moveaxis(result, axis, 0)
    term = np.empty(targets.shape[1:], np.float32)
    for target, weights in zip(targets, matrix, strict=True):
        for count, place in enumerate(np.flatnonzero(weights)):
            np.multiply(sources[place], weights[place], out=term if count else target)
            if count:
                target += term
    return result
