"""Gibbs ringing: a patch without its high spatial frequencies, as MONAI's `GibbsNoise` has it."""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np
import torch

from decovae.data.volumes import Shape

ON_THE_EDGE = 1 + 1e-6
"""Rounding shall not put out what lies on the ball's surface; squares of distances are further apart than this."""

Radius = TypeVar("Radius", float, np.ndarray)


def kept_radius(alpha: Radius, patch: Shape) -> Radius:
    """Frequencies up to this, in periods per patch, are left when a share of `alpha` of the radius is cut off."""
    return (1 - alpha) * (max(patch) * math.sqrt(2) / 2)


def cut_frequencies(patches: torch.Tensor, radius: torch.Tensor, *, largest: float) -> None:
    """Leave the frequencies in a ball, in place.

    MONAI centres the ball between zero and the frequency below where a size is even, so that a frequency may be inside
    and its mirror image not, and takes the real part of what comes out. Of a real patch, that is each frequency times
    the mean of its own and its mirror image's place in the ball, and half of the frequencies hold everything.

    Args:
        patches: `(N, D, H, W)`, float32.
        radius: of each sample's ball, `(N, 1, 1, 1)`.
        largest: a bound on `radius`; frequencies beyond it are not computed.
    """
    depth, height, width = patches.shape[1:]
    reach = math.floor(largest + 0.5)
    # Each axis is transformed as the last one, in runs of memory, and what is cut off is cut before the next one.
    low = torch.fft.rfft(patches)[..., : reach + 1]
    low = _without_high(torch.fft.fft(low.transpose(-1, -2)), reach)  # N D W H
    low = _without_high(torch.fft.fft(low.movedim(1, -1)), reach)  # N W H D
    low = low * _weights((depth, height, width), radius, reach)
    low = torch.fft.ifft(_with_zeros(low, depth))
    low = torch.fft.ifft(_with_zeros(low.movedim(-1, 1), height))
    patches.copy_(torch.fft.irfft(low.transpose(-1, -2), n=width))


def _weights(patch: Shape, radius: torch.Tensor, reach: int) -> torch.Tensor:
    """The mean of two balls, mirror images of each other: 0, 1/2 or 1 for each kept frequency, `(N, W, H, D)`."""
    inside = []
    for sign in (1, -1):
        squares = []
        for size in patch:
            frequency = torch.fft.fftfreq(size, 1 / size, device=radius.device).round_()
            mirrored = torch.where(frequency == -size / 2, frequency, sign * frequency)  # the Nyquist is its own mirror
            squares.append((mirrored + (0.0 if size % 2 else 0.5)).square_())
        depth, height = (_without_high(square, reach) for square in squares[:2])
        width = squares[2][: min(reach, patch[2] // 2) + 1]
        inside.append(width[:, None, None] + height[:, None] + depth <= radius.square() * ON_THE_EDGE)
    return (inside[0].float() + inside[1].float()) / 2


def _without_high(spectrum: torch.Tensor, reach: int) -> torch.Tensor:
    """Frequencies 0 to `reach` and −`reach` to −1 along the last axis, all of them where there are no more."""
    if 2 * reach + 1 >= spectrum.shape[-1]:
        return spectrum
    return torch.cat([spectrum[..., : reach + 1], spectrum[..., -reach:]], -1) if reach else spectrum[..., :1]


def _with_zeros(low: torch.Tensor, size: int) -> torch.Tensor:
    """Undo `_without_high`, with zeros for what it left out."""
    *others, kept = low.shape
    if kept == size:
        return low
    above = kept // 2 + 1
    return torch.cat([low[..., :above], low.new_zeros((*others, size - kept)), low[..., above:]], -1)
