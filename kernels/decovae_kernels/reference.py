"""What the operators compute, in as few words as possible. The tests hold every implementation against this."""

from __future__ import annotations

import torch


def channel_moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (C,) and scatter Σ_s (x_s − mean)(x_s − mean)ᵀ (C, C) of `x` (N, C, *spatial), in float64."""
    samples = x.double().movedim(1, 0).flatten(1)
    mean = samples.mean(dim=1)
    centred = samples - mean[:, None]
    return mean, centred @ centred.T
