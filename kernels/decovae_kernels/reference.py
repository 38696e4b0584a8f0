"""What the operators compute, in as few words as possible. The tests hold every implementation against this."""

from __future__ import annotations

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
