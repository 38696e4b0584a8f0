"""Where a volume's brain is: a few places in it, for crops that must contain some of it."""

from __future__ import annotations

import numpy as np

from decovae.data.volumes import Shape

PLACES = 64
THRESHOLD = 0.1
"""Of the intensity, scaled so that percentile 0 is 0 and percentile 99.5 is 1: brain, or head where the skull is on."""
FULL = 65536
TRIES = 1 << 14
FIRST = 1 << 10


def foreground_places(volume: np.ndarray, *, low: float, high: float) -> bytes:
    """Up to 64 places drawn from the voxels of `volume` that are brighter than a tenth of the scaled range.

    The draw depends on the shape and the intensities alone.

    Args:
        volume: `(D, H, W)`, in RAS axes, any real dtype and strides.
        low, high: the intensities that are scaled to 0 and to 1; `low` is the larger where the scale is inverted.

    Returns:
        Three little-endian 16-bit numbers a place, each the share of an axis in 65,536ths, so that places are the same
        on any grid over the same box. Empty if none of 16,384 voxels drawn is bright enough.
    """
    generator = np.random.Generator(np.random.PCG64(0))
    voxels = generator.integers(volume.shape, size=(TRIES, 3))
    bright = _bright(volume, voxels[:FIRST], low, high)  # enough of them, but for the emptiest volumes
    if len(bright) < PLACES:
        bright = np.concatenate([bright, _bright(volume, voxels[FIRST:], low, high)])
    chosen = bright[:PLACES]
    return ((chosen * 2 + 1) * FULL // (2 * np.array(volume.shape))).astype("<u2").tobytes()


def _bright(volume: np.ndarray, voxels: np.ndarray, low: float, high: float) -> np.ndarray:
    values = volume[voxels[:, 0], voxels[:, 1], voxels[:, 2]].astype(np.float64)
    return voxels[(values - low) / (high - low) > THRESHOLD]


def places_on_grid(foreground: bytes, grid: Shape) -> np.ndarray:
    """The voxels of a grid that places lie in: `(places, 3)`, int64."""
    shares = np.frombuffer(foreground, "<u2").reshape(-1, 3).astype(np.int64)
    return shares * np.array(grid) // FULL
