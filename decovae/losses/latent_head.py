"""The latent head of a VAE: sampling, the KL divergence and the channel moments from one read of μ and log σ²."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from decovae.losses.moments import ChannelMoments, channel_moments, name_of, samples_of
from decovae_kernels import latent_head

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Latent(NamedTuple):
    """What `LatentHead` returns.

    Attributes:
        z: the sample μ + σ·ε, of μ's shape and dtype; μ itself without sampling.
        kl: D_KL(N(μ, σ²) ‖ N(0, 1)), averaged over this process's elements; scalar, float32 (float64 for float64).
        moments: channel moments of μ; any decorrelation loss and `analyze_latents` take them in place of μ.
    """

    z: torch.Tensor
    kl: torch.Tensor
    moments: ChannelMoments


class LatentHead(nn.Module):
    """In place of a VAE's sampling, KL and decorrelation code:

        head = LatentHead()
        z, kl, moments = head(mu, log_variance)
        loss = reconstruction_loss(decoder(z), x) + 5e-4 * kl + vad_loss(moments)

    ε is drawn from a Philox stream of its own: a function of a seed and of a voxel's place in the batch alone, or in
    the longer sequence of volumes that `first` says the batch is a part of; the same on every device, in every memory
    layout, and again in backward, which does not keep it. Every call that samples without a seed advances torch's
    generator of the latent's device by the draw of one 64-bit integer, the seed, whatever the shape; so
    torch.manual_seed, activation checkpointing and CUDA graphs behave as with torch.randn.

    Args:
        group: process group whose joint batch `moments` describe where there is sampling, that is in training; else
            they are the local batch's. The KL divergence is an average over the local batch, which DDP and FSDP average
            over ranks.
    """

    def __init__(self, *, group: ProcessGroup | None = None) -> None:
        super().__init__()
        self.group = group

    def forward(
        self,
        mu: torch.Tensor,
        log_variance: torch.Tensor,
        *,
        sample: bool | None = None,
        seed: int | None = None,
        offset: int = 0,
        first: int = 0,
    ) -> Latent:
        """Sample the posterior, and measure it.

        Args:
            mu: latent mean (N, C, *spatial) or (N, C), float16, bfloat16, float32 or float64.
            log_variance: log σ² of the same shape on the same device. Clamp it before if it can be large.
            sample: whether to draw z; None means in training mode only.
            seed: for noise that does not depend on torch's generator, which is then left alone; below 2⁶³.
            offset: 0 … 2³²−1, another stream under the same seed: a step's number, say.
            first: 0 … 2³²−1, the number of the batch's first volume under this seed: a batch shared by processes, or by
                several calls, has the noise of the whole where each says with which of its volumes it begins.

        Raises:
            TypeError: `mu` is not a floating-point tensor.
            ValueError: fewer than 2 dimensions or (without a group) samples, `log_variance` is unlike `mu`, or `offset`
                or `first` is out of range.
        """
        if not (self.training if sample is None else sample):
            return Latent(mu, kl_divergence(mu, log_variance), channel_moments(mu))
        if seed is None:
            key = torch.randint(2**63 - 1, (1,), device=mu.device)
        else:
            key = torch.full((1,), seed, dtype=torch.int64, device=mu.device)
        z, kl, packed = latent_head(mu, log_variance, key, offset=offset, first=first, group=name_of(self.group))
        return Latent(z, kl, ChannelMoments(packed, samples_of(mu) if self.group is None else None))


def kl_divergence(mu: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """D_KL(N(μ, σ²) ‖ N(0, 1)), mean over all latent elements; scalar, float32 (float64 for float64)."""
    dtype = torch.promote_types(mu.dtype, torch.float32)
    mu, log_variance = mu.to(dtype), log_variance.to(dtype)
    return 0.5 * (mu.square() + log_variance.exp() - log_variance - 1).mean()
