"""Scaled intensities in the 16 bits of a store's file, and that file's checksum."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from decovae.data.store import npy_header
from decovae.data.volumes import Shape

COARSEST = 2**11
"""Steps in the scaled range 0 to 1 that 16 bits have to allow, or they are floating-point numbers."""
LARGEST_FLOAT16 = 65504.0
PART = 2**18
"""Voxels that are converted at a time: they stay in the cache of a core."""


class Checksum:
    """The SHA-256 of a store's file of a volume, from its parts in order, on a thread of its own."""

    def __init__(self, grid: Shape) -> None:
        self._grid = grid
        self._hash = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1)
        self._begun = False

    def __enter__(self) -> Checksum:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def add(self, part: np.ndarray) -> None:
        """Go on with a part of the voxels, in the file's order, which nobody changes any more."""
        if not self._begun:
            self._hash.update(npy_header(self._grid, part.dtype.name))
            self._begun = True
        self._thread.submit(self._hash.update, part.data)

    def hexdigest(self) -> str:
        """In hexadecimal, once this is closed."""
        return self._hash.hexdigest()


def sixteen_bits(
    scaled: Tensor, *, darkest: float, brightest: float, done: Callable[[np.ndarray], None] = lambda part: None
) -> tuple[np.ndarray, float, float]:
    """Scaled intensities in 16 bits, and the values there that stand for 0 and for 1.

    Args:
        scaled: float32, on the CPU, of any strides. The result is contiguous.
        darkest, brightest: its extremes.
        done: told of each part of the result, along the first axis, when it is there.

    Raises:
        ValueError: not finite, constant, or too wide a range; the message completes "the volume …".
    """
    if not (math.isfinite(darkest) and math.isfinite(brightest)):
        raise ValueError("has intensities too far apart to be scaled")
    if darkest == brightest:
        raise ValueError(f"is constant once it is on the grid: {darkest:g} of its range everywhere")
    bottom = min(darkest, 0.0)
    # A power of two: scaling back is then exact in float32, on any device.
    steps = 2.0 ** math.floor(math.log2(65534 / (max(brightest, 0.0) - bottom)))
    if steps >= COARSEST:
        low = -32768.0 - round(bottom * steps)
        return _in_parts(scaled, torch.int16, steps, low, done), low, low + steps
    if max(brightest, -darkest) > LARGEST_FLOAT16:
        raise ValueError(
            f"has outliers of {max(brightest, -darkest):.3g} times the range from its percentile 0 to 99.5, more than "
            "16 bits hold: clip them"
        )
    return _in_parts(scaled, torch.float16, 1.0, 0.0, done), 0.0, 1.0


def _in_parts(
    scaled: Tensor, dtype: torch.dtype, steps: float, low: float, done: Callable[[np.ndarray], None]
) -> np.ndarray:
    result = torch.empty(scaled.shape, dtype=dtype)
    rows = max(PART // scaled[0].numel(), 1)
    for source, target in zip(scaled.split(rows), result.split(rows), strict=True):
        target.copy_(source.mul(steps).round_().add_(low) if dtype == torch.int16 else source)
        done(target.numpy())
    return result.numpy()
