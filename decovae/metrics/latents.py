"""How much of a latent space's capacity is used: channel similarity, effective rank, explained variance.

All four measures are functions of the channels' moments. Those of a whole data set are gathered volume by volume:

    moments = channel_moments(first)
    for latent in rest:
        moments = moments.merge(channel_moments(latent))
    analysis = analyze_latents(moments)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from decovae.losses.moments import ChannelMoments, channel_moments, normalized


@dataclass(frozen=True)
class LatentAnalysis:
    """Measures of the use of C latent channels.

    Attributes:
        cosine_similarity: mean absolute cosine between two different channels, means not subtracted, 0 to 1.
        pearson: mean absolute Pearson correlation between two different channels, 0 to 1.
        effective_rank: exp of the entropy of the covariance's eigenvalues over their sum, 1 to C; 0 where no channel
            varies.
        explained_variance: share of each principal component, descending, (C,) float64 on the CPU; zeros where no
            channel varies.
    """

    cosine_similarity: float
    pearson: float
    effective_rank: float
    explained_variance: torch.Tensor


def analyze_latents(z: torch.Tensor | ChannelMoments) -> LatentAnalysis:
    """Measure the latents `z`, (N, C, *spatial) or (N, C), any float dtype; every voxel is a sample of the channels.

    `z` may also be moments that were gathered before, over any number of volumes, or for a loss. With one channel there
    is no pair: both similarities are 0. Non-finite latents give NaN.

    Raises:
        TypeError: `z` is not a floating-point tensor.
        ValueError: `z` has fewer than 2 dimensions or fewer than 2 samples.
    """
    moments = z if isinstance(z, ChannelMoments) else channel_moments(z.detach() if isinstance(z, torch.Tensor) else z)
    moments = moments.detach().cpu()
    mean, scatter = moments.mean, moments.scatter
    shares = _component_shares(scatter)
    return LatentAnalysis(
        # The uncentred cosine is the correlation formula applied to second moments about zero.
        cosine_similarity=_mean_absolute_off_diagonal(normalized(scatter + moments.count * torch.outer(mean, mean))),
        pearson=_mean_absolute_off_diagonal(moments.correlation),
        effective_rank=_effective_rank(shares),
        explained_variance=shares,
    )


def _mean_absolute_off_diagonal(matrix: torch.Tensor) -> float:
    channels = len(matrix)
    off_diagonal = matrix.abs() * (1 - torch.eye(channels, dtype=matrix.dtype))
    return float(off_diagonal.sum()) / max(channels * (channels - 1), 1)


def _component_shares(scatter: torch.Tensor) -> torch.Tensor:
    """Eigenvalues over their sum, descending."""
    if not scatter.isfinite().all():  # the eigensolver refuses it
        return torch.full_like(scatter[0], torch.nan)
    eigenvalues = torch.linalg.eigvalsh(scatter).flip(0).clamp(min=0)  # rounding can leave −1e-17
    total = eigenvalues.sum()
    return eigenvalues / total if total > 0 else eigenvalues


def _effective_rank(shares: torch.Tensor) -> float:
    if not shares.any():
        return 0.0
    return float(torch.special.entr(shares).sum().exp())
