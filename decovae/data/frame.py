"""Where a grid of voxels lies in the world."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from decovae.data.resample import true_size
from decovae.data.volumes import Affine, Shape, affine_rows


@dataclass(frozen=True)
class Frame:
    """A grid of voxels and its place: what a volume's file says besides its intensities.

    Attributes:
        shape: voxels along the axes left→right, posterior→anterior, inferior→superior (RAS).
        affine: the rows of the 4 × 4 matrix from voxel indices to millimetres; a voxel's index is its centre.
    """

    shape: Shape
    affine: Affine

    @property
    def matrix(self) -> np.ndarray:
        """The affine as an array, `(4, 4)`, float64."""
        return np.array(self.affine, dtype=np.float64)

    def on_grid(self, grid: Shape) -> Frame:
        """The frame of the same box cut into `grid` voxels: the outer faces coincide, not the outer centres.

        This is where the voxels of `decovae.data.resample.resample_crop` lie.
        """
        scale = np.divide(self.shape, grid)
        turned = np.diag([*scale, 1.0])
        turned[:3, 3] = (scale - 1) / 2
        return Frame(grid, affine_rows(self.matrix @ turned))

    def ratios(self, spacing: tuple[float, float, float]) -> tuple[float, float, float]:
        """The sizes of voxels of `spacing` millimetres in voxels of this frame, along its axes."""
        x, y, z = np.divide(spacing, np.linalg.norm(self.matrix[:3, :3], axis=0)).tolist()
        return x, y, z

    def true_size(self, grid: Shape, spacing: tuple[float, float, float]) -> Frame:
        """The frame of `grid` voxels of `spacing` millimetres around the middle of this one.

        This is where the voxels of `decovae.data.resample.resample_true_size` lie.
        """
        places = map(true_size, self.shape, grid, self.ratios(spacing))
        firsts, steps = zip(*places, strict=True)
        turned = np.diag([*steps, 1.0])
        turned[:3, 3] = firsts
        return Frame(grid, affine_rows(self.matrix @ turned))

    def as_dict(self) -> dict[str, Any]:
        """The frame in JSON's types."""
        return {"shape": list(self.shape), "affine": [list(row) for row in self.affine]}

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Frame:
        """The frame that `as_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: `entry` is no such thing.
        """
        depth, height, width = (int(size) for size in entry["shape"])
        return cls((depth, height, width), affine_rows(entry["affine"]))
