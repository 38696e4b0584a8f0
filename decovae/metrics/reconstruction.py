"""How close a reconstruction is to its volume: PSNR, 3D SSIM, and LPIPS on slices."""

from __future__ import annotations

import torch
from torch import Tensor

from decovae.losses.perceptual import PerceptualLoss


def psnr(reconstruction: Tensor, volume: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, data range 1, of one pair clipped to [0, 1].

    Args:
        reconstruction: (1, D, H, W) or (1, 1, D, H, W).
        volume: like ``reconstruction``.
    """
    from monai.metrics import PSNRMetric

    return float(PSNRMetric(max_val=1.0)(_clipped(reconstruction), _clipped(volume)))


def ssim(reconstruction: Tensor, volume: Tensor) -> float:
    """Structural similarity over an 11³ Gaussian window (σ = 1.5), data range 1, of one pair clipped to [0, 1].

    The mean is over windows that lie inside the volume, as in scikit-image.

    Args:
        reconstruction: (1, D, H, W) or (1, 1, D, H, W), every axis at least 11.
        volume: like ``reconstruction``.
    """
    from monai.metrics import SSIMMetric

    # The variances behind it are differences of large numbers: neither bf16 nor TF32 is exact enough for them.
    with (
        torch.autocast(volume.device.type, enabled=False),
        torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False),
    ):
        return float(SSIMMetric(spatial_dims=3, data_range=1.0)(_clipped(reconstruction), _clipped(volume)))


def lpips(reconstruction: Tensor, volume: Tensor, network: PerceptualLoss, *, every: int = 5) -> float:
    """LPIPS of one pair clipped to [0, 1], mean over every fifth slice of each plane and over the three planes.

    Args:
        reconstruction: (1, D, H, W) or (1, 1, D, H, W).
        volume: like ``reconstruction``.
        network: features with calibrated heads.
        every: distance between slices.

    Raises:
        ValueError: if the network's features are random: their distance is no LPIPS.
    """
    if not network.calibrated:
        raise ValueError("LPIPS needs pretrained features; these are random")
    pair = [_clipped(reconstruction), _clipped(volume)]
    planes = []
    for axis in (2, 3, 4):
        first, second = (image.movedim(axis, 1).flatten(0, 1)[every // 2 :: every] for image in pair)
        planes.append((first, second))
    with torch.autocast(volume.device.type, enabled=False):
        return float(network(planes)) / len(planes)


def _clipped(image: Tensor) -> Tensor:
    image = image.float().clamp(0, 1)
    return torch.atleast_1d(image)[None] if image.ndim == 4 else image
