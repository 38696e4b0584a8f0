"""Structural similarity of volumes: SSIM (Wang et al., 2004) and its terms over several scales (Wang et al., 2003).

The windows are 11³ Gaussians of σ = 1.5. A Gaussian is separable, so a window mean is 33 multiplications instead of
1331, and with the sum u = x + y and the difference v = x − y of the two images, four window means suffice for

    luminance = (E[u]² − E[v]² + 2 c₁) / (E[u]² + E[v]² + 2 c₁)
    contrast  = (Var u − Var v + 2 c₂) / (Var u + Var v + 2 c₂)

which are the published terms. A variance is the difference E[u²] − E[u]²; in float32 its rounding moves a window whose
images lie 0.6 apart by 2e-4, so windows are computed in float64, slab by slab.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

TAPS = 11
SIGMA = 1.5
LUMINANCE_CONSTANT = 0.01**2
CONTRAST_CONSTANT = 0.03**2
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Of the five scales, from fine to coarse (Wang et al., 2003)."""

CPU_SLAB = 2**18  # voxels: small enough for a processor's cache, large enough for slabs to overlap by little
GPU_SLAB = 2**22  # 32 MB a field, and few launches


def ssim_terms(first: Tensor, second: Tensor) -> Tensor:
    """Mean SSIM and mean contrast term over all windows that lie inside the volume.

    Args:
        first: (D, H, W), floating point, intensities in [0, 1], every axis at least 11.
        second: like ``first``.

    Returns:
        (2,), float64, on the images' device: SSIM, contrast.

    Raises:
        ValueError: if the shapes differ, are not 3D, or are smaller than a window.
    """
    if first.shape != second.shape or first.ndim != 3 or min(first.shape) < TAPS:
        raise ValueError(
            f"SSIM compares two (D, H, W) volumes of one shape, every axis at least {TAPS}, "
            f"not {tuple(first.shape)} and {tuple(second.shape)}"
        )
    total = torch.zeros(2, dtype=torch.float64, device=first.device)
    for x, y in _slabs(first, second):
        total += _window_sums(x, y)
    return total / math.prod(size - TAPS + 1 for size in first.shape)


def multiscale_terms(first: Tensor, second: Tensor) -> Tensor:
    """:func:`ssim_terms` at each scale that fits, from fine to coarse, each the last one averaged over 2³ voxels.

    An odd axis loses its last voxel on the way, as in other implementations.

    Returns:
        (scales, 2), float64.

    Raises:
        ValueError: like :func:`ssim_terms`.
    """
    scales = [ssim_terms(first, second)]
    for _ in range(ms_ssim_scales(first.shape) - 1):
        first, second = (F.avg_pool3d(image[None], 2)[0] for image in (first, second))
        scales.append(ssim_terms(first, second))
    return torch.stack(scales)


def ms_ssim_scales(shape: Sequence[int]) -> int:
    """How many of the five scales fit: at the last of them every axis still has to hold a window of 11 voxels.

    Five from 176 voxels on, four from 88, three from 44, two from 22.

    Args:
        shape: (D, H, W).

    Raises:
        ValueError: if not even one fits.
    """
    if min(shape) < TAPS:
        raise ValueError(f"a volume of {tuple(shape)} holds no SSIM window: every axis needs {TAPS} voxels")
    return min((min(shape) // TAPS).bit_length(), len(SCALE_WEIGHTS))


def combine_scales(terms: Tensor) -> float:
    """MS-SSIM of :func:`multiscale_terms`: the product of the mean contrasts and the coarsest SSIM to their weights.

    The five weights are taken as published, though they sum to 1.0001; the first few of them, where fewer scales fit,
    are divided by their sum. A negative term counts as 0.
    """
    weights = terms.new_tensor(SCALE_WEIGHTS[: len(terms)])
    if len(weights) < len(SCALE_WEIGHTS):
        weights = weights / weights.sum()
    bases = torch.cat([terms[:-1, 1], terms[-1:, 0]]).clamp(min=0)
    return float((bases**weights).prod())


def _slabs(first: Tensor, second: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The volumes in overlapping float64 slabs along their first axis, so that memory does not grow with the volume."""
    depth, height, width = first.shape
    voxels = CPU_SLAB if first.device.type == "cpu" else GPU_SLAB
    step = max(1, voxels // (height * width))
    for start in range(0, depth - TAPS + 1, step):
        stop = min(start + step + TAPS - 1, depth)
        yield first[start:stop].double(), second[start:stop].double()


def _window_sums(x: Tensor, y: Tensor) -> Tensor:
    """Sums of SSIM and contrast over the windows of a slab, (2,) float64."""
    u, v = x + y, x - y
    mean_u, mean_v, var_u, var_v = (_window_means(field) for field in (u, v, u.square(), v.square()))
    square_u, square_v = mean_u.square_(), mean_v.square_()
    var_u.sub_(square_u).add_(2 * CONTRAST_CONSTANT)
    var_v.sub_(square_v)
    square_u.add_(2 * LUMINANCE_CONSTANT)
    contrast = (var_u - var_v).div_(var_u.add_(var_v))
    ssim = (square_u - square_v).div_(square_u.add_(square_v)).mul_(contrast)
    return torch.stack([term.sum() for term in (ssim, contrast)])


def _window_means(field: Tensor) -> Tensor:
    """Gaussian-weighted means of the windows inside (D, H, W), one axis at a time.

    Sums of shifted copies, not a convolution or a matrix product: with one channel neither is faster, and autocast and
    TF32 leave additions alone.
    """
    for axis in range(3):
        windows = field.shape[axis] - TAPS + 1
        mean = field.narrow(axis, 0, windows) * WEIGHTS[0]
        for tap in range(1, TAPS):
            mean.add_(field.narrow(axis, tap, windows), alpha=WEIGHTS[tap])
        field = mean
    return field


def _gaussian() -> list[float]:
    weights = [math.exp(-((tap - TAPS // 2) ** 2) / (2 * SIGMA**2)) for tap in range(TAPS)]
    return [weight / sum(weights) for weight in weights]


WEIGHTS = _gaussian()
