"""What the operators compute, in as few words as possible. The tests hold every implementation against this."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def channel_moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (C,) and scatter Σ_s (x_s − mean)(x_s − mean)ᵀ (C, C) of `x` (N, C, *spatial), in float64."""
    samples = x.double().movedim(1, 0).flatten(1)
    mean = samples.mean(dim=1)
    centred = samples - mean[:, None]
    return mean, centred @ centred.T


def latent_head(
    mu: torch.Tensor, log_variance: torch.Tensor, epsilon: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """z = μ + σ·ε, mean of ½ (μ² + σ² − log σ² − 1), and the packed moments of `mu`, for a given ε."""
    mean, scatter = channel_moments(mu)
    count = mean.new_full((1,), mu.numel() // mu.shape[1])
    z = mu + (0.5 * log_variance).exp() * epsilon
    kl = 0.5 * (mu.square() + log_variance.exp() - log_variance - 1).mean()
    return z, kl, torch.cat([count, mean, scatter.flatten()])


def upsample_conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """A 3³ convolution with zero padding of `x` (N, C, D, H, W), interpolated trilinearly to twice its size."""
    upsampled = torch.nn.functional.interpolate(x, scale_factor=2, mode="trilinear")
    return torch.nn.functional.conv3d(upsampled, weight, bias, padding=1)


def group_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    *,
    silu: bool = True,
    shift: torch.Tensor | None = None,
) -> torch.Tensor:
    """SiLU(GroupNorm(x + shift))."""
    if shift is not None:
        x = x + shift.view(-1, *[1] * (x.ndim - 2))
    y = torch.nn.functional.group_norm(x, groups, weight, bias, eps)
    return torch.nn.functional.silu(y) if silu else y


def residual_block(
    x: torch.Tensor, p: Sequence[Any], groups: tuple[int, int], eps: tuple[float, float]
) -> torch.Tensor:
    """x + conv₂(silu(norm₂(conv₁(silu(norm₁(x)))))), parameters in the order of `BlockParameters`."""
    conv3d = torch.nn.functional.conv3d
    h = conv3d(group_norm(x, p[0], p[1], groups[0], eps[0]), p[2], p[3], padding=1)
    h = conv3d(group_norm(h, p[4], p[5], groups[1], eps[1]), p[6], p[7], padding=1)
    return h + (x if p[8] is None else conv3d(x, p[8], p[9]))
