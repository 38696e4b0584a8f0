"""How close a reconstruction is to its volume: PSNR, SSIM and MS-SSIM in 3D, and LPIPS on slices.

All of them take one volume and its reconstruction, any float dtype, and clip both to [0, 1]. NaN gives NaN. What is
summed or subtracted is so in float64; LPIPS's features are float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from decovae.losses.perceptual import PerceptualLoss
from decovae.metrics.exact import exact_arithmetic
from decovae.metrics.structural import combine_scales, ms_ssim_scales, multiscale_terms, ssim_terms

__all__ = ["lpips", "ms_ssim", "ms_ssim_scales", "psnr", "ssim", "ssim_and_ms_ssim"]

# Pixels that pass through LPIPS's network at once, 4 and 64 slices of 256 × 128: on a CPU what stays in its cache, on a
# GPU what fills it; 0.6 GB there.
CPU_PIXELS, GPU_PIXELS = 2**17, 2**21


def psnr(reconstruction: Tensor, volume: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, data range 1, of one pair clipped to [0, 1]; infinite where they are equal.

    Args:
        reconstruction: (1, D, H, W) or (1, 1, D, H, W).
        volume: like ``reconstruction``.

    Raises:
        ValueError: if the shapes differ or hold more than one volume.
    """
    first, second = _pair(reconstruction, volume)
    squared_error = (first - second).square_().mean(dtype=torch.float64)  # of a float32 square: 1e-7 of it
    return float(-10 * squared_error.log10())


def ssim(reconstruction: Tensor, volume: Tensor) -> float:
    """Structural similarity over an 11³ Gaussian window (σ = 1.5), data range 1, of one pair clipped to [0, 1].

    The mean is over windows that lie inside the volume, as in scikit-image.

    Args:
        reconstruction: (1, D, H, W) or (1, 1, D, H, W), every axis at least 11.
        volume: like ``reconstruction``.

    Raises:
        ValueError: if the shapes differ, hold more than one volume, or are smaller than a window.
    """
    return float(ssim_terms(*_pair(reconstruction, volume))[0])


def ms_ssim(reconstruction: Tensor, volume: Tensor) -> float:
    """Multi-scale structural similarity (Wang et al., 2003) of one pair clipped to [0, 1], in 3D.

    The five published weights where every axis has at least 176 voxels; below, the first :func:`ms_ssim_scales` of
    them divided by their sum, so volumes of different grids are then not comparable. Windows, constants and range are
    those of :func:`ssim`; a negative mean contrast counts as 0.

    Args:
        reconstruction: (1, D, H, W) or (1, 1, D, H, W), every axis at least 11.
        volume: like ``reconstruction``.

    Raises:
        ValueError: like :func:`ssim`.
    """
    return combine_scales(multiscale_terms(*_pair(reconstruction, volume)))


def ssim_and_ms_ssim(reconstruction: Tensor, volume: Tensor) -> tuple[float, float]:
    """:func:`ssim` and :func:`ms_ssim` at the price of the second: its finest scale holds the first."""
    terms = multiscale_terms(*_pair(reconstruction, volume))
    return float(terms[0, 0]), combine_scales(terms)


def lpips(reconstruction: Tensor, volume: Tensor, network: PerceptualLoss, *, every: int = 5) -> float:
    """LPIPS of one pair clipped to [0, 1], mean over every fifth slice of each plane and over the three planes.

    Args:
        reconstruction: (1, D, H, W) or (1, 1, D, H, W).
        volume: like ``reconstruction``.
        network: features with calibrated heads.
        every: distance between slices; the first is the middle one of the first ``every``.

    Raises:
        ValueError: if the network's features are random: their distance is no LPIPS; if the shapes differ or hold more
            than one volume; or if ``every`` leaves a plane without a slice.
    """
    if not network.calibrated:
        raise ValueError("LPIPS needs pretrained features; these are random")
    pair = torch.stack(_pair(reconstruction, volume))
    if every < 1 or every // 2 >= min(pair.shape[1:]):
        raise ValueError(f"every = {every} leaves a plane of a {tuple(pair.shape[1:])} volume without a slice")
    with exact_arithmetic(volume.device):
        planes = [_plane_distance(pair.movedim(axis, 1)[:, every // 2 :: every], network) for axis in (1, 2, 3)]
    return sum(planes) / len(planes)


def _plane_distance(slices: Tensor, network: PerceptualLoss) -> float:
    """Mean distance between the two images' slices, (2, slices, rows, columns)."""
    on_cpu = slices.device.type == "cpu"
    at_once = max(1, (CPU_PIXELS if on_cpu else GPU_PIXELS) // (slices.shape[2] * slices.shape[3]))
    total = 0.0
    for batch in slices.split(at_once, dim=1):
        # The three channels that the network makes of grey anyway, made here: so they can lie channels-last, in which
        # its convolutions take less than half the time on a CPU.
        first, second = (image[:, None].expand(-1, 3, -1, -1) for image in batch)
        if on_cpu:
            first, second = (image.contiguous(memory_format=torch.channels_last) for image in (first, second))
        total += float(network.network(first, second, normalize=True).sum(dtype=torch.float64))
    return total / slices.shape[1]


def _pair(reconstruction: Tensor, volume: Tensor) -> tuple[Tensor, Tensor]:
    """Both as (D, H, W), float32, clipped, outside autograd."""
    if reconstruction.shape != volume.shape or volume.ndim not in (4, 5) or volume.shape[:-3].numel() != 1:
        raise ValueError(
            "a reconstruction and its volume are (1, D, H, W) or (1, 1, D, H, W) of one shape, "
            f"not {tuple(reconstruction.shape)} and {tuple(volume.shape)}"
        )
    first, second = (image.detach().float().clamp(0, 1) for image in (reconstruction, volume))
    return first.reshape(volume.shape[-3:]), second.reshape(volume.shape[-3:])
