"""What training asks of a collection of volumes, whether it comes from files or from the template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

Shape = tuple[int, int, int]
Affine = tuple[tuple[float, ...], ...]
"""The four rows of a 4 × 4 matrix."""


def times(sizes: Sequence[int]) -> str:
    """Sizes as a person writes them: 4×5×6."""
    return "×".join(map(str, sizes))


def affine_rows(matrix: Any) -> Affine:
    """A `(4, 4)` array or nested list as rows of floats, which records can be compared by.

    Raises:
        TypeError, ValueError: `matrix` is not 4 × 4 finite numbers.
    """
    array = np.asarray(matrix, dtype=np.float64)
    if array.shape != (4, 4) or not np.isfinite(array).all():
        raise ValueError(f"an affine is 4 × 4 finite numbers, not {matrix!r}")
    return tuple(tuple(row) for row in array.tolist())


@dataclass(frozen=True)
class VolumeRecord:
    """What is known of a volume without reading it again.

    Attributes:
        subject: whose brain it is; all volumes of a subject stay on one side of the split.
        source: the file's path, or `template:7` for subject 7 of the template cohort.
        shape: voxels along the axes left→right, posterior→anterior, inferior→superior (RAS).
        low: the intensity that is scaled to 0, the volume's percentile 0, in the unit of `Volumes.read`.
        high: the intensity that is scaled to 1, the volume's percentile 99.5.
        affine: from voxel indices of what `Volumes.read` returns to millimetres, RAS.
        columns: what else the CSV manifest says of the volume, column to value, without `path` and `subject`; empty
            for volumes that were not found by a manifest.
    """

    subject: str
    source: str
    shape: Shape
    low: float
    high: float
    affine: Affine
    columns: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class LeftOut:
    """A volume that cannot be used: whose it is, the file's path, and the sentence that says why."""

    subject: str
    source: str
    reason: str


class Volumes(Protocol):
    """A collection of checked volumes, in an order that depends on nothing but the collection."""

    @property
    def records(self) -> Sequence[VolumeRecord]:
        """One record a volume."""
        ...

    def read(self, index: int) -> np.ndarray:
        """Volume `index`, `(D, H, W)` in RAS axes, as stored: any real dtype and strides, memory-mapped if possible."""
        ...


def intensity_range(volume: np.ndarray, *, inverted: bool = False) -> tuple[float, float]:
    """The percentiles 0 and 99.5 of `volume`, which scaling maps to 0 and 1.

    Scaling by percentiles undoes any linear map of the intensities, so a file's slope and intercept need not be
    applied; only a negative slope shows. `inverted` says so: the percentiles are then those of `-volume`, negated.

    Raises:
        ValueError: NaN, infinite or constant intensities; the message completes "the volume …".
    """
    values = volume.ravel(order="K")  # in memory order: no copy for a volume whose axes were only turned
    with np.errstate(invalid="ignore"):
        extremes = values.min(), values.max()  # where a NaN or an infinity shows, without a mask of the whole
    if not np.isfinite(extremes).all():
        raise ValueError("holds NaN or infinite intensities")
    low, high = (float(value) for value in np.percentile(values, (100.0, 0.5) if inverted else (0.0, 99.5)))
    if low == high:
        raise ValueError(f"is constant: its percentiles 0 and 99.5 are both {low:g}")
    return low, high
