"""Smooth random fields and diffeomorphisms, drawn on lattices of fixed millimetres so that no grid shows in them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from decovae.data.volumes import Shape

SQUARINGS = 6  # the flow of a velocity field over unit time as 2⁶ small steps
SPLINE_RMS = (151 / 315) ** 1.5  # of a field of cubic B-splines with coefficients of variance 1, mean over places


def smooth_field(
    generator: np.random.Generator, *, channels: int, spacing: float, extent: Sequence[float], shape: Shape
) -> torch.Tensor:
    """A stationary Gaussian random field of root mean square 1, evaluated at the voxel centres of a grid.

    Cubic B-splines with independent coefficients on a lattice of `spacing` millimetres. The draw depends on spacing
    and extent only, so the same generator gives the same field on every grid.

    Args:
        extent: millimetres that the grid covers, an axis each.

    Returns:
        `(channels, *shape)`, float32.
    """
    counts = [int(np.ceil(length / spacing)) + 3 for length in extent]
    field = torch.from_numpy(generator.standard_normal((channels, *counts), dtype=np.float32) / np.float32(SPLINE_RMS))
    for size, length, count in zip(shape, extent, counts, strict=True):
        basis = torch.from_numpy(_spline_basis((np.arange(size) + 0.5) * (length / size / spacing), count))
        # Contracting axis 1 and appending the result turns the three axes by one place each time.
        field = torch.tensordot(field, basis, dims=([1], [1]))
    return field


def _spline_basis(positions: np.ndarray, count: int) -> np.ndarray:
    """Values of `count` uniform cubic B-splines at `positions` in units of their spacing: `(positions, count)`."""
    distance = np.abs(positions[:, None] + 1 - np.arange(count))
    inner = 2 / 3 - distance**2 + distance**3 / 2
    outer = np.maximum(2 - distance, 0) ** 3 / 6
    return np.where(distance < 1, inner, outer).astype(np.float32)


def exponential(velocity: torch.Tensor, *, extent: Sequence[float]) -> torch.Tensor:
    """The displacement of the diffeomorphism that flows along a stationary velocity field, by scaling and squaring.

    Args:
        velocity: `(3, D, H, W)`, millimetres, on a grid that covers `extent` millimetres.

    Returns:
        The displacement on the same grid, millimetres.
    """
    displacement = velocity / 2**SQUARINGS
    places = centres(velocity.shape[1:], extent)
    for _ in range(SQUARINGS):
        displacement = displacement + sample(displacement, places + displacement, extent=extent, outside="border")
    return displacement


def centres(shape: Sequence[int], extent: Sequence[float]) -> torch.Tensor:
    """Millimetres from the box's corner to each voxel's centre, `(3, *shape)`, float32."""
    axes = [(torch.arange(size) + 0.5) * (length / size) for size, length in zip(shape, extent, strict=True)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


def sample(image: torch.Tensor, places: torch.Tensor, *, extent: Sequence[float], outside: str) -> torch.Tensor:
    """`image`, `(C, D, H, W)`, at `places`, `(3, *shape)` in millimetres, by linear interpolation: `(C, *shape)`.

    `outside` is `grid_sample`'s padding mode: `border` or `zeros`.
    """
    size = torch.tensor(extent, dtype=places.dtype).view(3, 1, 1, 1)
    relative = (places * (2 / size) - 1).flip(0)  # grid_sample counts the axes from the last
    return F.grid_sample(image[None], relative.movedim(0, -1)[None], padding_mode=outside, align_corners=False)[0]
