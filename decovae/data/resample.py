"""Linear resizing of one crop of a volume from only the part of the volume that it covers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import numpy as np
import torch

from decovae.data.volumes import Shape, times

PIECE = 1 << 21
"""Voxels that are summed at a time: few beside a volume, and enough that the calls that it takes do not count."""
MOST = 1 << 29
"""Voxels between two axes, where the result has fewer."""
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
        `size`, float32, on the CPU, of any strides, not clipped.
    """
    axes = [
        (slice(start, start + count), None) if source == target else axis_weights(source, target, start, start + count)
        for source, target, start, count in zip(volume.shape, grid, corner, size, strict=True)
    ]
    return _weighted(volume, axes, grid, low=low, high=high)


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
        `grid`, float32, on the CPU, of any strides, not clipped.
    """
    axes = []
    for source, target, ratio in zip(volume.shape, grid, ratios, strict=True):
        first, step = true_size(source, target, ratio)
        axes.append(_triangle(source, first + np.arange(target) * step, step))
    return _weighted(volume, axes, grid, low=low, high=high)


def _weighted(
    volume: np.ndarray, axes: Sequence[tuple[slice, np.ndarray | None]], grid: Shape, *, low: float, high: float
) -> torch.Tensor:
    """A block of `volume`, scaled, then summed along each axis by a matrix of weights; None leaves an axis as it is.

    Axes that shrink most come first: what lies in between is then never larger than both the block and the result.
    Their order follows from the whole volume's shape and not from the block's: a crop is rounded as the whole is.

    Raises:
        ValueError: what lies in between would be too large; the message completes "the volume …".
    """
    depth, height, width = (touched for touched, _ in axes)
    values = volume[depth, height, width]
    # Of equal ones, the last first, as NIfTI lies in memory.
    order = sorted((2, 1, 0), key=lambda axis: grid[axis] / volume.shape[axis])
    sizes = [size if matrix is None else len(matrix) for size, (_, matrix) in zip(values.shape, axes, strict=True)]
    room = max(MOST, math.prod(sizes))
    unscaled = True
    for axis in order:
        matrix = axes[axis][1]
        if matrix is not None:
            length = values.shape[axis]
            if (between := max(length, values.size // max(length, 1) * len(matrix))) > room:
                raise ValueError(
                    f"is {times(volume.shape)} voxels, and to resize it to {times(grid)} takes "
                    f"{between * 4 / 2**30:.1f} GiB in between: resample it to fewer voxels first"
                )
            values = _sums(values, axis, matrix.astype(np.float32), (low, high) if unscaled else None)
            unscaled = False
    values = _scaled(values, low, high) if unscaled else values
    return torch.from_numpy(values if min(values.strides) > 0 else values.copy(order="K"))


def _scaled(block: np.ndarray, low: float, high: float) -> np.ndarray:
    """A copy in float32, positive strides. Single precision holds 8- and 16-bit integers exactly; wider ones are scaled
    before they are rounded to it."""
    precise = block.astype(np.result_type(block.dtype, np.float32))
    precise -= precise.dtype.type(low)
    precise /= precise.dtype.type(high - low)
    return precise.astype(np.float32, copy=False)


def _sums(values: np.ndarray, axis: int, matrix: np.ndarray, span: tuple[float, float] | None) -> np.ndarray:
    """Sums along an axis, weighted by each row of `matrix`, `(target, source)`, piece by piece.

    A row has two or three weights, so this is less work than a product of matrices. Each product and each sum is
    rounded on its own and in order, so that bits do not depend on the processor.

    Args:
        span: what is to be scaled to 0 and 1 first; None for what is.

    Returns:
        An array in whose memory the axis comes first and the others in their order before.
    """
    back = [slice(None, None, -1 if step < 0 else 1) for step in values.strides]
    others = sorted((other for other in range(3) if other != axis), key=lambda other: -abs(values.strides[other]))
    layout = (axis, *others)
    sources = values[tuple(back)].transpose(layout)  # as it lies in memory
    count, outer, inner = sources.shape
    result = np.empty((len(matrix), outer, inner), np.float32)
    places = range(count)[back[axis]]
    terms = [[(places[number], row[number]) for number in np.flatnonzero(row)] for row in matrix]
    columns = max(min(PIECE // count, inner), 1)
    rows = max(PIECE // (count * columns), 1)
    for top, left in product(range(0, outer, rows), range(0, inner, columns)):
        where = slice(None), slice(top, top + rows), slice(left, left + columns)
        piece = _axis_first(sources[where], span)
        term = np.empty(piece.shape[1:], np.float32)
        for target, weights in zip(result[where], terms, strict=True):
            if not weights:
                target[...] = 0
            for number, (place, weight) in enumerate(weights):
                np.multiply(piece[place], weight, out=term if number else target)
                if number:
                    target += term
    back[axis] = slice(None)
    return result.transpose(np.argsort(layout))[tuple(back)]


def _axis_first(piece: np.ndarray, span: tuple[float, float] | None) -> np.ndarray:
    """A piece of three axes, scaled, its first axis the slowest in memory."""
    if abs(piece.strides[0]) > abs(piece.strides[2]) or min(piece.shape) == 1:
        return np.ascontiguousarray(piece if span is None else _scaled(piece, *span))
    turned = piece.transpose(1, 2, 0)  # copied as it lies, then turned by torch, which does that in blocks
    lines = np.ascontiguousarray(turned if span is None else _scaled(turned, *span)).reshape(-1, len(piece))
    return torch.from_numpy(lines).t().contiguous().numpy().reshape(piece.shape)
