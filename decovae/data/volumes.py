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
        shape: voxels along the axes left→right, posterior→anterior, inferior→superior (RAS), of the volume in its file.
            What `Volumes.read` returns covers the same box, in other voxels where a store has resized it.
        low: the intensity that is scaled to 0, the volume's percentile 0, in the unit of `Volumes.read`.
        high: the intensity that is scaled to 1, the volume's percentile 99.5.
        affine: from indices of those voxels of the file, turned to RAS axes, to millimetres.
        columns: what else the CSV manifest says of the volume, column to value, without `path` and `subject`; empty
            for volumes that were not found by a manifest.
        session: which of the subject's sessions it is of, where that is known.
        foreground: places in the brain, see `decovae.data.foreground`; empty where nobody looked.
        sha256: of the prepared volume's file, from a store's index; empty where there is none. It tells when the volume
            is another one, which a store's `low` and `high`, nearly the same for all volumes, do not.
    """

    subject: str
    source: str
    shape: Shape
    low: float
    high: float
    affine: Affine
    columns: Mapping[str, str] = field(default_factory=dict, hash=False)
    session: str = ""
    foreground: bytes = b""
    sha256: str = ""


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


def in_memory_order(volume: np.ndarray) -> np.ndarray:
    """All voxels of a volume in a row, as they lie in memory: no copy where axes were only turned or flipped."""
    return volume[tuple(slice(None, None, -1 if step < 0 else 1) for step in volume.strides)].ravel(order="K")


def intensity_range(volume: np.ndarray, *, inverted: bool = False) -> tuple[float, float]:
    """The percentiles 0 and 99.5 of `volume`, which scaling maps to 0 and 1.

    Scaling by percentiles undoes any linear map of the intensities, so a file's slope and intercept need not be
    applied; only a negative slope shows. `inverted` says so: the percentiles are then those of `-volume`, negated.

    Raises:
        ValueError: NaN, infinite or constant intensities, or such that their difference is infinite; the message
            completes "the volume …".
    """
    values = in_memory_order(volume)
    with np.errstate(invalid="ignore"):
        darkest, brightest = values.min(), values.max()  # where a NaN or infinity shows, without a mask of the whole
    if not np.isfinite([darkest, brightest]).all():
        raise ValueError("holds NaN or infinite intensities")
    # Between the two that the rank lies between, as NumPy's percentiles do, but in float64 whatever the voxels.
    rank = (values.size - 1) * (0.005 if inverted else 0.995)
    below = int(rank)
    first, second = _ranked(values, below, min(below + 1, values.size - 1), from_bottom=inverted)
    low = float(brightest if inverted else darkest)
    part = rank - below
    high = second - (second - first) * (1 - part) if part >= 0.5 else first + (second - first) * part  # as in NumPy
    if low == high:
        raise ValueError(f"is constant: {low:g} in at least 99.5 % of its voxels")
    if not np.isfinite(high - low):
        raise ValueError(f"has intensities from {darkest:g} to {brightest:g}, too far apart to be scaled")
    return low, high


def _ranked(values: np.ndarray, *ranks: int, from_bottom: bool) -> list[float]:
    """The values at neighbouring ranks near the top, or the bottom, of the sorted order.

    Sorting, even in part, costs more than reading the file. A sample tells where that end of the order begins, with
    room to spare, and only what lies beyond has to be put in order.
    """
    sample = np.sort(values[:: max(values.size >> 14, 1)])
    for share in (0.0075, 0.1):
        edge = sample[int(sample.size * share) if from_bottom else int(sample.size * (1 - share))]
        end = _beyond(values, edge, from_bottom=from_bottom)
        places = [rank if from_bottom else rank - (values.size - end.size) for rank in ranks]
        if min(places) >= 0 and max(places) < end.size:
            break
    else:
        end, places = values.copy(), list(ranks)
    end.partition(places)
    return [float(end[place]) for place in places]


def _beyond(values: np.ndarray, edge: Any, *, from_bottom: bool) -> np.ndarray:
    """The few values that are not above, or not below, an edge: by eights, of most of which none is."""
    compare = np.less_equal if from_bottom else np.greater_equal
    whole = values.size - values.size % 8
    eights = np.flatnonzero(compare(values[:whole], edge).view(np.uint64) != 0)
    near = values[:whole].view(f"V{8 * values.itemsize}")[eights].view(values.dtype)
    near = np.concatenate([near, values[whole:]])
    return near[compare(near, edge)]
